//! The vector that every kernel is written over: 16 lanes of 32 bits.
//!
//! An instruction set is one implementation of [`Vector`]; what is built from
//! it here and in the kernels is therefore the same arithmetic everywhere, bit
//! for bit.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `Vector`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Lanes and rows of several arrays run together.

/// Declares the methods of [`Vector`], which are all unsafe for the same reasons.
macro_rules! methods {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $result:ty;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            /// The caller is compiled for the instruction set; pointers are valid for what is
            /// loaded or stored (prefetches excepted), at any alignment.
            unsafe fn $name($($arg: $type),*) -> $result;
        )*
    };
}

/// 16 lanes of 32 bits, as integers (`I`) or floats (`F`).
///
/// Every method is `#[inline(always)]`. Integer operations wrap. A dword of "bytes" or "pairs" is read
/// in little-endian order.
pub(super) trait Vector: Copy + 'static {
    /// 16 integers.
    type I: Copy;
    /// 16 floats.
    type F: Copy;

    /// What [`Vector::signed`] adds to each weight byte; the caller takes it off again.
    const SIGNED_OFFSET: i32;

    /// Whether 8 vectors of weights fit registers beside what they are multiplied with. Then each two
    /// parts of the activations go through all of them in turn (`weights_first`), else each vector of
    /// weights through all parts.
    const WEIGHTS_FIRST: bool = false;

    /// Whether there are 32 registers of 16 lanes: then `groups_first` has the kernels for strips.
    const MANY_REGISTERS: bool = false;

    methods! {
        /// Asks for the cache line at `p`, which may be anywhere.
        fn prefetch(p: *const u8) -> ();
        /// 16 dwords.
        fn load(p: *const u8) -> Self::I;
        /// Dword i of each of 16 rows, `stride` bytes apart, for i < 4.
        fn load_columns(p: *const u8, stride: usize) -> [Self::I; 4];
        /// Stores 16 dwords.
        fn store(a: Self::I, p: *mut u8) -> ();
        /// `x` in every lane.
        fn splat(x: i32) -> Self::I;
        /// Bitwise and.
        fn and(a: Self::I, b: Self::I) -> Self::I;
        /// Bitwise or.
        fn or(a: Self::I, b: Self::I) -> Self::I;
        /// Bitwise exclusive or.
        fn xor(a: Self::I, b: Self::I) -> Self::I;
        /// Each lane shifted left by `n` < 32.
        fn shl(a: Self::I, n: u32) -> Self::I;
        /// Each lane shifted right by `n` < 32, zeros moving in.
        fn shr(a: Self::I, n: u32) -> Self::I;
        /// Sum of lanes.
        fn add_i(a: Self::I, b: Self::I) -> Self::I;
        /// Difference of lanes.
        fn sub_i(a: Self::I, b: Self::I) -> Self::I;
        /// The larger lanes.
        fn max_i(a: Self::I, b: Self::I) -> Self::I;
        /// Low 32 bits of the product of lanes.
        fn mul_i(a: Self::I, b: Self::I) -> Self::I;
        /// Sum of 16 bit halves.
        fn add_pairs(a: Self::I, b: Self::I) -> Self::I;
        /// `acc` + the dot product of each lane's 4 bytes (0..=127) with the same 4 signed bytes at `a` (-127..=127).
        fn dot(acc: Self::I, weights: Self::I, a: *const i8) -> Self::I;
        /// Signed weight bytes as [`Vector::dot_signed`] wants them.
        fn signed(weights: Self::I) -> Self::I;
        /// As [`Vector::dot`], for weights from [`Vector::signed`], each too large by `SIGNED_OFFSET`.
        fn dot_signed(acc: Self::I, weights: Self::I, a: *const i8) -> Self::I;
        /// `acc` + the dot product of each lane's 2 signed halves with the same 2 signed halves at `a`.
        fn dot_pairs(acc: Self::I, weights: Self::I, a: *const i16) -> Self::I;
        /// The 16 low bytes.
        fn store_bytes(a: Self::I, p: *mut i8) -> ();

        /// Integers to floats, to nearest even.
        fn to_f(a: Self::I) -> Self::F;
        /// Floats to integers, to nearest even. The floats fit.
        fn round(a: Self::F) -> Self::I;
        /// The bits of integers as floats.
        fn from_bits(a: Self::I) -> Self::F;
        /// The bits of floats as integers.
        fn to_bits(a: Self::F) -> Self::I;

        /// 16 floats.
        fn load_f(p: *const f32) -> Self::F;
        /// Stores 16 floats.
        fn store_f(a: Self::F, p: *mut f32) -> ();
        /// 16 f16 values, 32 bytes.
        fn load_half(p: *const u8) -> Self::F;
        /// Stores 16 floats as f16, to nearest even.
        fn store_half(a: Self::F, p: *mut u8) -> ();
        /// The f16 in each lane's low half.
        fn low_half(a: Self::I) -> Self::F;
        /// The f16 in each lane's high half.
        fn high_half(a: Self::I) -> Self::F;
        /// `x` in every lane.
        fn splat_f(x: f32) -> Self::F;
        /// Sum.
        fn add(a: Self::F, b: Self::F) -> Self::F;
        /// Difference.
        fn sub(a: Self::F, b: Self::F) -> Self::F;
        /// Product.
        fn mul(a: Self::F, b: Self::F) -> Self::F;
        /// Quotient.
        fn div(a: Self::F, b: Self::F) -> Self::F;
        /// `a * b + c`, rounded once.
        fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
        /// The larger; `b` if either is NaN.
        fn max(a: Self::F, b: Self::F) -> Self::F;
        /// The smaller; `b` if either is NaN.
        fn min(a: Self::F, b: Self::F) -> Self::F;
        /// Lanes `from..to` of `a`, the other lanes of `other`.
        fn select_range(from: usize, to: usize, a: Self::F, other: Self::F) -> Self::F;
    }

    /// The integer at `p` in every lane.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn splat_at(p: *const i32) -> Self::I {
        Self::splat(p.read_unaligned())
    }

    /// `(a >> n) & mask`.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn field(a: Self::I, n: u32, mask: i32) -> Self::I {
        Self::and(Self::shr(a, n), Self::splat(mask))
    }

    /// `a`, which has zeros where `mask` has ones, with what `bits` has there.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn insert(a: Self::I, bits: Self::I, mask: i32) -> Self::I {
        Self::or(a, Self::and(bits, Self::splat(mask)))
    }

    /// Bytes of 0..=127, less `n` each, as signed bytes.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn less(a: Self::I, n: i8) -> Self::I {
        let top = Self::splat(0x8080_8080_u32 as i32);
        let n = Self::splat(i32::from_le_bytes([n as u8; 4]));
        Self::xor(Self::sub_i(Self::or(a, top), n), top)
    }

    /// Each lane's half `i`, with its sign.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn half(a: Self::I, i: usize) -> Self::I {
        let sign = Self::splat(0x8000);
        let half = Self::field(a, 16 * i as u32, 0xffff);
        Self::sub_i(Self::xor(half, sign), sign)
    }

    /// `acc + a * b`.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn add_product(acc: Self::I, a: Self::I, b: Self::I) -> Self::I {
        Self::add_i(acc, Self::mul_i(a, b))
    }

    /// The dot product of each lane's halves in the first `pairs` of `weights` with the halves at `a`,
    /// `times` over with the next halves.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn dot_sums(
        weights: &[Self::I; 8],
        pairs: usize,
        times: usize,
        a: *const i16,
    ) -> Self::I {
        let mut sum = Self::splat(0);
        for i in 0..times * pairs {
            sum = Self::dot_pairs(sum, weights[i % pairs], a.add(2 * i));
        }
        sum
    }

    /// Dwords of 16 columns as [`Vector::dot_two`] wants them.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn of_16(weights: [Self::I; 4]) -> [Self::I; 4] {
        weights
    }

    /// `acc` + the dot products of 16 columns of signed weight bytes ([`Vector::of_16`]) with the two
    /// parts at `a`, of which 8 columns take turns. How they stand in the two vectors, only
    /// [`Vector::of_two`], [`Vector::for_two`] and [`Vector::apart`] know.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn dot_two(acc: [Self::I; 2], weights: [Self::I; 4], a: *const i8) -> [Self::I; 2] {
        let mut acc = acc;
        for i in 0..4 {
            let a = a.add(16 * (i / 2) + 4 * (i % 2));
            acc[0] = Self::dot_signed(acc[0], weights[i], a);
            acc[1] = Self::dot_signed(acc[1], weights[i], a.add(8));
        }
        acc
    }

    /// As [`Vector::dot_two`] with a single part, whose 16 columns are one behind the other.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn dot_one(acc: Self::I, weights: [Self::I; 4], a: *const i8) -> Self::I {
        let mut acc = acc;
        for i in 0..4 {
            acc = Self::dot_signed(acc, weights[i], a.add(4 * i));
        }
        acc
    }

    /// `a[0]` in every lane's dot product with the first of two parts, `a[1]` in those with the second.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn of_two(a: *const i32) -> [Self::I; 2] {
        [
            Self::splat(a.read_unaligned()),
            Self::splat(a.add(1).read_unaligned()),
        ]
    }

    /// What multiplies the dot products of each lane with two parts by that lane of `a`.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn for_two(a: Self::I) -> [Self::I; 2] {
        [a, a]
    }

    /// The dot products with the first of two parts, and those with the second.
    ///
    /// # Safety
    /// As for the others.
    #[inline(always)]
    unsafe fn apart(dots: [Self::I; 2]) -> [Self::I; 2] {
        dots
    }
}

/// The lanes as an array.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(super) unsafe fn lanes<V: Vector>(a: V::F) -> [f32; 16] {
    let mut out = [0.0; 16];
    V::store_f(a, out.as_mut_ptr());
    out
}

/// The sum of the lanes, in halves: (0 + 8) + (4 + 12) and so on.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(super) unsafe fn sum<V: Vector>(a: V::F) -> f32 {
    fold(lanes::<V>(a), |a, b| a + b)
}

/// The largest lane.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(super) unsafe fn max<V: Vector>(a: V::F) -> f32 {
    fold(lanes::<V>(a), |a, b| if a > b { a } else { b })
}

/// Folds the upper half onto the lower one until one value is left.
#[inline(always)]
fn fold(x: [f32; 16], f: impl Fn(f32, f32) -> f32) -> f32 {
    let [mut a, mut b, mut c] = [[0.0; 8], [0.0; 8], [0.0; 8]];
    for i in 0..8 {
        a[i] = f(x[i], x[i + 8]);
    }
    for i in 0..4 {
        b[i] = f(a[i], a[i + 4]);
    }
    for i in 0..2 {
        c[i] = f(b[i], b[i + 2]);
    }
    f(c[0], c[1])
}

/// Without the sign.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(super) unsafe fn abs<V: Vector>(a: V::F) -> V::F {
    V::from_bits(V::and(V::to_bits(a), V::splat(0x7fff_ffff)))
}

/// e to the power of each lane, within 2 units in the last place; arguments are clamped to -87..=88.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; a Taylor polynomial of degree 7 for e^r, then n goes into the exponent.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(super) unsafe fn exp<V: Vector>(x: V::F) -> V::F {
    let x = V::min(V::max(x, V::splat_f(-87.0)), V::splat_f(88.0));
    let n = V::round(V::mul(x, V::splat_f(std::f32::consts::LOG2_E)));
    let n_f = V::to_f(n);
    // ln 2 in two parts, the first with enough trailing zeros for n * part to be exact.
    let r = V::fma(n_f, V::splat_f(-0.693_359_4), x);
    let r = V::fma(n_f, V::splat_f(2.121_944_4e-4), r);
    let mut e = V::splat_f(1.0 / 5040.0);
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        e = V::fma(e, r, V::splat_f(c));
    }
    // Adding n to the exponent is exact: -126 <= n <= 127 and e is about 1.
    V::from_bits(V::add_i(V::to_bits(e), V::shl(n, 23)))
}

/// tanh of each lane: 1 - 2 / (e^2x + 1).
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(super) unsafe fn tanh<V: Vector>(x: V::F) -> V::F {
    let one = V::splat_f(1.0);
    let e = exp::<V>(V::add(x, x));
    V::sub(one, V::div(V::splat_f(2.0), V::add(e, one)))
}
