//! Weight types with blocks of 256 values and integer scales for parts of them: Q2_K to Q6_K.
//!
//! Layouts: ggml's `block_q2_K` and so on, each packed over 16 rows (`pack`):
//! 16 f16 where the block has an odd half, then each dword of 16 rows. In the
//! notes "qs: 4..36" means dwords 4 to 35.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `Codec256`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Indices name dwords and rows, not only places in an array.

use super::vector::Vector;

/// The integer scales of a block: one byte for each sub-block of each row, four to a dword.
pub(super) struct Scales<V: Vector> {
    /// Scales of sub-blocks 4i..4i+4, each too large by `Codec256::SCALE_OFFSET`.
    pub scales: [V::I; 4],
    /// What is multiplied with the sums of the activations: the scales again (types with an
    /// `OFFSET`), or the minimums (0..=127). Sub-blocks 4i and 4i+2 as signed 16 bit pairs, then
    /// 4i+1 and 4i+3.
    pub pairs: [V::I; 8],
}

/// How to read a packed block of 256 values x 16 rows.
///
/// The block is 8 runs of 32 values; run = `INNER` x outer + inner. All
/// methods: `p` points at a packed block, and the caller is compiled for `V`.
pub(super) trait Codec256<V: Vector> {
    /// Bytes of a packed block.
    const BYTES: usize;
    /// Runs that share the same dwords: 2 or 4.
    const INNER: usize;
    /// Values that share an integer scale: 32 or 16.
    const SUB_VALUES: usize;
    /// What the weights are too large by (a power of two), or 0 for a type with minimums.
    const OFFSET: i32;
    /// What the bytes in `Scales::scales` are too large by.
    const SCALE_OFFSET: i32;

    /// The block's integer scales.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn scales(p: *const u8) -> Scales<V>;
    /// Values 4j..4j+4 of a run of each row, as bytes of 0..=127 plus `OFFSET`; j < 8.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn weights(p: *const u8, outer: usize, inner: usize, j: usize) -> V::I;
    /// The scale of the integer scales.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn scale(p: *const u8) -> V::F;
    /// The scale of the minimums, for a type that has them.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn min_scale(_p: *const u8) -> V::F {
        V::splat_f(0.0)
    }
}

/// Dword `i` at `p`.
///
/// # Safety
/// As for [`Codec256`].
#[inline(always)]
unsafe fn dword<V: Vector>(p: *const u8, i: usize) -> V::I {
    V::load(p.add(64 * i))
}

/// `(x >> shift) & mask`.
///
/// # Safety
/// As for [`Codec256`].
#[inline(always)]
unsafe fn field<V: Vector>(x: V::I, shift: usize, mask: i32) -> V::I {
    V::field(x, shift as u32, mask)
}

/// What is at bit `from`, at bit `to` instead.
///
/// # Safety
/// As for [`Codec256`].
#[inline(always)]
unsafe fn moved<V: Vector>(x: V::I, from: usize, to: usize) -> V::I {
    if from < to {
        V::shl(x, (to - from) as u32)
    } else {
        V::shr(x, (from - to) as u32)
    }
}

/// Four bytes in a dword, taken off `offset`, as 16 bit pairs: (0, 2), (1, 3).
///
/// # Safety
/// As for [`Codec256`].
#[inline(always)]
unsafe fn pairs<V: Vector>(bytes: V::I, offset: i32) -> [V::I; 2] {
    let minus = V::splat((-offset & 0xffff) | (-offset << 16));
    let (even, odd) = (
        field::<V>(bytes, 0, 0x00ff_00ff),
        field::<V>(bytes, 8, 0x00ff_00ff),
    );
    [V::add_pairs(even, minus), V::add_pairs(odd, minus)]
}

/// The pairs of four dwords.
///
/// # Safety
/// As for [`Codec256`].
#[inline(always)]
unsafe fn all_pairs<V: Vector>(bytes: [V::I; 4], offset: i32) -> [V::I; 8] {
    let (a, b) = (pairs::<V>(bytes[0], offset), pairs::<V>(bytes[1], offset));
    let (c, d) = (pairs::<V>(bytes[2], offset), pairs::<V>(bytes[3], offset));
    [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
}

/// The 8 scales and 8 minimums of 6 bits of Q4_K and Q5_K, from three dwords at `p`.
///
/// # Safety
/// As for [`Codec256`].
#[inline(always)]
unsafe fn six_bit_scales<V: Vector>(p: *const u8) -> Scales<V> {
    let (x, y, z) = (dword::<V>(p, 0), dword::<V>(p, 1), dword::<V>(p, 2));
    let zero = V::splat(0);
    let low = |x| V::and(x, V::splat(0x3f3f_3f3f));
    // The upper four take their top two bits from the lower four's spare ones.
    let high = |nibble, spare| V::or(nibble, field::<V>(spare, 2, 0x3030_3030));
    let scales = [low(x), high(field::<V>(z, 0, 0x0f0f_0f0f), x), zero, zero];
    let mins = [low(y), high(field::<V>(z, 4, 0x0f0f_0f0f), y), zero, zero];
    Scales {
        scales,
        pairs: all_pairs::<V>(mins, 0),
    }
}

/// Scales, minimums (nibbles of 16 bytes): 0..4; qs of 2 bits: 4..20; d, dmin: 20.
pub(super) struct Q2K;

impl<V: Vector> Codec256<V> for Q2K {
    const BYTES: usize = 16 * 84;
    const INNER: usize = 4;
    const SUB_VALUES: usize = 16;
    const OFFSET: i32 = 0;
    const SCALE_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn scales(p: *const u8) -> Scales<V> {
        let (mut scales, mut mins) = ([V::splat(0); 4], [V::splat(0); 4]);
        for i in 0..4 {
            scales[i] = field::<V>(dword::<V>(p, i), 0, 0x0f0f_0f0f);
            mins[i] = field::<V>(dword::<V>(p, i), 4, 0x0f0f_0f0f);
        }
        Scales {
            scales,
            pairs: all_pairs::<V>(mins, 0),
        }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8, outer: usize, inner: usize, j: usize) -> V::I {
        field::<V>(dword::<V>(p, 4 + 8 * outer + j), 2 * inner, 0x0303_0303)
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::low_half(dword::<V>(p, 20))
    }
    #[inline(always)]
    unsafe fn min_scale(p: *const u8) -> V::F {
        V::high_half(dword::<V>(p, 20))
    }
}

/// d, packed first; third bits: 0..8; qs of 2 bits: 8..24; 16 scales of 6 bits: 24..27.
pub(super) struct Q3K;

impl<V: Vector> Codec256<V> for Q3K {
    const BYTES: usize = 16 * 110;
    const INNER: usize = 4;
    const SUB_VALUES: usize = 16;
    const OFFSET: i32 = 4;
    const SCALE_OFFSET: i32 = 32;

    #[inline(always)]
    unsafe fn scales(p: *const u8) -> Scales<V> {
        let p = p.add(32);
        let (x, y, z) = (dword::<V>(p, 24), dword::<V>(p, 25), dword::<V>(p, 26));
        let mut scales = [x, y, x, y];
        for i in 0..4 {
            let low = field::<V>(scales[i], 4 * (i / 2), 0x0f0f_0f0f);
            scales[i] = V::or(low, V::shl(field::<V>(z, 2 * i, 0x0303_0303), 4));
        }
        Scales {
            scales,
            pairs: all_pairs::<V>(scales, 32),
        }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8, outer: usize, inner: usize, j: usize) -> V::I {
        let p = p.add(32);
        let low = field::<V>(dword::<V>(p, 8 + 8 * outer + j), 2 * inner, 0x0303_0303);
        let high = V::shr(dword::<V>(p, j), 4 * outer as u32);
        V::insert(low, moved::<V>(high, inner, 2), 0x0404_0404)
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::load_half(p)
    }
}

/// d, dmin: 0; scales and minimums of 6 bits: 1..4; qs of 4 bits: 4..36.
pub(super) struct Q4K;

impl<V: Vector> Codec256<V> for Q4K {
    const BYTES: usize = 16 * 144;
    const INNER: usize = 2;
    const SUB_VALUES: usize = 32;
    const OFFSET: i32 = 0;
    const SCALE_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn scales(p: *const u8) -> Scales<V> {
        six_bit_scales::<V>(p.add(64))
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8, outer: usize, inner: usize, j: usize) -> V::I {
        field::<V>(dword::<V>(p, 4 + 8 * outer + j), 4 * inner, 0x0f0f_0f0f)
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::low_half(dword::<V>(p, 0))
    }
    #[inline(always)]
    unsafe fn min_scale(p: *const u8) -> V::F {
        V::high_half(dword::<V>(p, 0))
    }
}

/// d, dmin: 0; scales and minimums of 6 bits: 1..4; fifth bits: 4..12; qs of 4 bits: 12..44.
pub(super) struct Q5K;

impl<V: Vector> Codec256<V> for Q5K {
    const BYTES: usize = 16 * 176;
    const INNER: usize = 2;
    const SUB_VALUES: usize = 32;
    const OFFSET: i32 = 0;
    const SCALE_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn scales(p: *const u8) -> Scales<V> {
        six_bit_scales::<V>(p.add(64))
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8, outer: usize, inner: usize, j: usize) -> V::I {
        let low = field::<V>(dword::<V>(p, 12 + 8 * outer + j), 4 * inner, 0x0f0f_0f0f);
        let high = V::shr(dword::<V>(p, 4 + j), 2 * outer as u32);
        V::insert(low, moved::<V>(high, inner, 4), 0x1010_1010)
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::low_half(dword::<V>(p, 0))
    }
    #[inline(always)]
    unsafe fn min_scale(p: *const u8) -> V::F {
        V::high_half(dword::<V>(p, 0))
    }
}

/// d, packed first; low nibbles: 0..32; upper 2 bits: 32..48; 16 signed scales: 48..52.
pub(super) struct Q6K;

impl<V: Vector> Codec256<V> for Q6K {
    const BYTES: usize = 16 * 210;
    const INNER: usize = 4;
    const SUB_VALUES: usize = 16;
    const OFFSET: i32 = 32;
    const SCALE_OFFSET: i32 = 128;

    #[inline(always)]
    unsafe fn scales(p: *const u8) -> Scales<V> {
        let flip = V::splat(0x8080_8080_u32 as i32);
        let mut scales = [flip; 4];
        for i in 0..4 {
            scales[i] = V::xor(dword::<V>(p.add(32), 48 + i), flip);
        }
        Scales {
            scales,
            pairs: all_pairs::<V>(scales, 128),
        }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8, outer: usize, inner: usize, j: usize) -> V::I {
        let p = p.add(32);
        let low = dword::<V>(p, 16 * outer + 8 * (inner % 2) + j);
        let low = field::<V>(low, 4 * (inner / 2), 0x0f0f_0f0f);
        let high = moved::<V>(dword::<V>(p, 32 + 8 * outer + j), 2 * inner, 4);
        V::insert(low, high, 0x3030_3030)
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::load_half(p)
    }
}
