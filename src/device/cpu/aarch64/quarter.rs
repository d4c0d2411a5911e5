//! Four lanes of the vector in one 128 bit register.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `Vector`.
#![allow(unsafe_op_in_unsafe_fn)]

use crate::device::cpu::vector::Vector;
use std::arch::aarch64::*;
use std::arch::asm;

/// Lanes 4`Q`..4`Q` + 4: in memory, where a vector always has 16 lanes, it loads and stores its own
/// and leaves the others alone.
///
/// 32 registers hold what a kernel needs of a quarter for 8 rows; of all 16 lanes they do not.
///
/// With `MATRICES`, two parts of activations are multiplied as the columns of a matrix by `smmla`: a vector of
/// weights is 2 rows of 8 columns then, and a vector of dot products those of 2 rows with the 2 parts.
#[derive(Clone, Copy)]
pub(super) struct Quarter<const Q: usize, const MATRICES: bool = false>;

impl<const Q: usize, const MATRICES: bool> Vector for Quarter<Q, MATRICES> {
    type I = int32x4_t;
    type F = float32x4_t;

    /// `sdot` takes signed weights.
    const SIGNED_OFFSET: i32 = 0;
    /// A block's weights are 8 registers, and an activation register serves four `sdot`.
    const WEIGHTS_FIRST: bool = true;

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // One of the four walks over a line asks for it.
        if Q == 0 {
            asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, readonly, preserves_flags));
        }
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> int32x4_t {
        vld1q_s32(p.cast::<i32>().add(4 * Q))
    }
    #[inline(always)]
    unsafe fn load_columns(p: *const u8, stride: usize) -> [int32x4_t; 4] {
        let row = |i: usize| vld1q_s32(p.add((4 * Q + i) * stride).cast());
        let (a, b, c, d) = (row(0), row(1), row(2), row(3));
        let (ab_even, ab_odd) = (vtrn1q_s32(a, b), vtrn2q_s32(a, b));
        let (cd_even, cd_odd) = (vtrn1q_s32(c, d), vtrn2q_s32(c, d));
        [
            low_halves(ab_even, cd_even),
            low_halves(ab_odd, cd_odd),
            high_halves(ab_even, cd_even),
            high_halves(ab_odd, cd_odd),
        ]
    }
    #[inline(always)]
    unsafe fn store(a: int32x4_t, p: *mut u8) {
        vst1q_s32(p.cast::<i32>().add(4 * Q), a)
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> int32x4_t {
        vdupq_n_s32(x)
    }
    #[inline(always)]
    unsafe fn and(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vandq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vorrq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn xor(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        veorq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn shl(a: int32x4_t, n: u32) -> int32x4_t {
        vshlq_s32(a, vdupq_n_s32(n as i32))
    }
    #[inline(always)]
    unsafe fn shr(a: int32x4_t, n: u32) -> int32x4_t {
        let a = vreinterpretq_u32_s32(a);
        vreinterpretq_s32_u32(vshlq_u32(a, vdupq_n_s32(-(n as i32))))
    }
    #[inline(always)]
    unsafe fn field(a: int32x4_t, n: u32, mask: i32) -> int32x4_t {
        let [byte, ..] = mask.to_le_bytes();
        if mask == i32::from_le_bytes([byte; 4]) && byte.leading_zeros() >= n {
            // Shifting bytes moves nothing across their borders, so there may be nothing to mask.
            let bytes = vshlq_u8(vreinterpretq_u8_s32(a), vdupq_n_s8(-(n as i8)));
            let bytes = vreinterpretq_s32_u8(bytes);
            if byte == 0xff >> n {
                return bytes;
            }
            return vandq_s32(bytes, vdupq_n_s32(mask));
        }
        vandq_s32(Self::shr(a, n), vdupq_n_s32(mask))
    }
    #[inline(always)]
    unsafe fn add_i(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vaddq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn sub_i(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vsubq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn max_i(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vmaxq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn mul_i(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vmulq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn insert(mut a: int32x4_t, bits: int32x4_t, mask: i32) -> int32x4_t {
        // The compiler would take two instructions, since it knows of the zeros.
        asm!(
            "bit {a:v}.16b, {bits:v}.16b, {mask:v}.16b",
            a = inout(vreg) a, bits = in(vreg) bits, mask = in(vreg) vdupq_n_s32(mask),
            options(pure, nomem, nostack, preserves_flags),
        );
        a
    }
    #[inline(always)]
    unsafe fn less(a: int32x4_t, n: i8) -> int32x4_t {
        vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(a), vdupq_n_s8(n)))
    }
    #[inline(always)]
    unsafe fn half(a: int32x4_t, i: usize) -> int32x4_t {
        vshrq_n_s32::<16>(if i == 0 { vshlq_n_s32::<16>(a) } else { a })
    }
    #[inline(always)]
    unsafe fn add_product(mut acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        asm!(
            "mla {acc:v}.4s, {a:v}.4s, {b:v}.4s",
            acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b,
            options(nomem, nostack, preserves_flags),
        );
        acc
    }
    #[inline(always)]
    unsafe fn add_pairs(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_s16(vaddq_s16(
            vreinterpretq_s16_s32(a),
            vreinterpretq_s16_s32(b),
        ))
    }
    #[inline(always)]
    unsafe fn dot(mut acc: int32x4_t, weights: int32x4_t, a: *const i8) -> int32x4_t {
        // A load of 4 bytes into a vector register keeps the vector pipes free, unlike one to all lanes.
        let a = a.cast::<f32>().read_unaligned();
        asm!(
            "sdot {acc:v}.4s, {weights:v}.16b, {a:v}.4b[0]",
            acc = inout(vreg) acc, weights = in(vreg) weights, a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags),
        );
        acc
    }
    #[inline(always)]
    unsafe fn dot_one(acc: int32x4_t, weights: [int32x4_t; 4], a: *const i8) -> int32x4_t {
        let a = vld1q_s8(a);
        let acc = dot_lane::<0>(acc, weights[0], a);
        let acc = dot_lane::<1>(acc, weights[1], a);
        let acc = dot_lane::<2>(acc, weights[2], a);
        dot_lane::<3>(acc, weights[3], a)
    }
    #[inline(always)]
    unsafe fn of_16(weights: [int32x4_t; 4]) -> [int32x4_t; 4] {
        if !MATRICES {
            return weights;
        }
        let [a, b, c, d] = weights;
        [
            vzip1q_s32(a, b),
            vzip2q_s32(a, b),
            vzip1q_s32(c, d),
            vzip2q_s32(c, d),
        ]
    }
    #[inline(always)]
    unsafe fn dot_two(
        acc: [int32x4_t; 2],
        weights: [int32x4_t; 4],
        a: *const i8,
    ) -> [int32x4_t; 2] {
        let (first, second) = (vld1q_s8(a), vld1q_s8(a.add(16)));
        let [mut a, mut b] = acc;
        if MATRICES {
            a = dot_matrix(a, weights[0], first);
            b = dot_matrix(b, weights[1], first);
            a = dot_matrix(a, weights[2], second);
            b = dot_matrix(b, weights[3], second);
            return [a, b];
        }
        a = dot_lane::<0>(a, weights[0], first);
        b = dot_lane::<2>(b, weights[0], first);
        a = dot_lane::<1>(a, weights[1], first);
        b = dot_lane::<3>(b, weights[1], first);
        a = dot_lane::<0>(a, weights[2], second);
        b = dot_lane::<2>(b, weights[2], second);
        a = dot_lane::<1>(a, weights[3], second);
        b = dot_lane::<3>(b, weights[3], second);
        [a, b]
    }
    #[inline(always)]
    unsafe fn of_two(a: *const i32) -> [int32x4_t; 2] {
        if MATRICES {
            return [vreinterpretq_s32_s64(vld1q_dup_s64(a.cast())); 2];
        }
        [vld1q_dup_s32(a), vld1q_dup_s32(a.add(1))]
    }
    #[inline(always)]
    unsafe fn for_two(a: int32x4_t) -> [int32x4_t; 2] {
        if MATRICES {
            return [vzip1q_s32(a, a), vzip2q_s32(a, a)];
        }
        [a, a]
    }
    #[inline(always)]
    unsafe fn apart(dots: [int32x4_t; 2]) -> [int32x4_t; 2] {
        if MATRICES {
            return [vuzp1q_s32(dots[0], dots[1]), vuzp2q_s32(dots[0], dots[1])];
        }
        dots
    }
    #[inline(always)]
    unsafe fn signed(weights: int32x4_t) -> int32x4_t {
        weights
    }
    #[inline(always)]
    unsafe fn dot_signed(acc: int32x4_t, weights: int32x4_t, a: *const i8) -> int32x4_t {
        Self::dot(acc, weights, a)
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: int32x4_t, weights: int32x4_t, a: *const i16) -> int32x4_t {
        let a = vreinterpretq_s16_s32(vdupq_n_s32(a.cast::<i32>().read_unaligned()));
        let weights = vreinterpretq_s16_s32(weights);
        let low = vmull_s16(vget_low_s16(weights), vget_low_s16(a));
        let high = vmull_high_s16(weights, a);
        vaddq_s32(acc, vpaddq_s32(low, high))
    }
    #[inline(always)]
    unsafe fn dot_sums(
        weights: &[int32x4_t; 8],
        pairs: usize,
        times: usize,
        a: *const i16,
    ) -> int32x4_t {
        // Two sums, so that one row's products wait less for each other.
        let mut sums = [vdupq_n_s32(0); 2];
        for i in 0..pairs / 4 {
            let (w, a) = (&weights[4 * i..], a.add(8 * i));
            if times == 2 {
                // The same weights go with both times' halves, so that these can be added up first.
                let (a, b) = (vld1q_s16(a), vld1q_s16(a.add(2 * pairs)));
                let low = vaddl_s16(vget_low_s16(a), vget_low_s16(b));
                let high = vaddl_high_s16(a, b);
                sums[0] = vmlaq_laneq_s32::<0>(sums[0], Self::half(w[0], 0), low);
                sums[1] = vmlaq_laneq_s32::<1>(sums[1], Self::half(w[0], 1), low);
                sums[0] = vmlaq_laneq_s32::<2>(sums[0], Self::half(w[1], 0), low);
                sums[1] = vmlaq_laneq_s32::<3>(sums[1], Self::half(w[1], 1), low);
                sums[0] = vmlaq_laneq_s32::<0>(sums[0], Self::half(w[2], 0), high);
                sums[1] = vmlaq_laneq_s32::<1>(sums[1], Self::half(w[2], 1), high);
                sums[0] = vmlaq_laneq_s32::<2>(sums[0], Self::half(w[3], 0), high);
                sums[1] = vmlaq_laneq_s32::<3>(sums[1], Self::half(w[3], 1), high);
            } else {
                let a = vld1q_s16(a);
                let (even, odd) = halves_of(w[0], w[1]);
                sums[0] = vmlal_laneq_s16::<0>(sums[0], vget_low_s16(even), a);
                sums[1] = vmlal_laneq_s16::<1>(sums[1], vget_low_s16(odd), a);
                sums[0] = vmlal_high_laneq_s16::<2>(sums[0], even, a);
                sums[1] = vmlal_high_laneq_s16::<3>(sums[1], odd, a);
                let (even, odd) = halves_of(w[2], w[3]);
                sums[0] = vmlal_laneq_s16::<4>(sums[0], vget_low_s16(even), a);
                sums[1] = vmlal_laneq_s16::<5>(sums[1], vget_low_s16(odd), a);
                sums[0] = vmlal_high_laneq_s16::<6>(sums[0], even, a);
                sums[1] = vmlal_high_laneq_s16::<7>(sums[1], odd, a);
            }
        }
        vaddq_s32(sums[0], sums[1])
    }
    #[inline(always)]
    unsafe fn store_bytes(a: int32x4_t, p: *mut i8) {
        let halves = vreinterpretq_s8_s16(vcombine_s16(vmovn_s32(a), vdup_n_s16(0)));
        let bytes = vreinterpretq_s32_s8(vuzp1q_s8(halves, halves));
        p.cast::<i32>()
            .add(Q)
            .write_unaligned(vgetq_lane_s32::<0>(bytes));
    }
    #[inline(always)]
    unsafe fn to_f(a: int32x4_t) -> float32x4_t {
        vcvtq_f32_s32(a)
    }
    #[inline(always)]
    unsafe fn round(a: float32x4_t) -> int32x4_t {
        vcvtnq_s32_f32(a)
    }
    #[inline(always)]
    unsafe fn from_bits(a: int32x4_t) -> float32x4_t {
        vreinterpretq_f32_s32(a)
    }
    #[inline(always)]
    unsafe fn to_bits(a: float32x4_t) -> int32x4_t {
        vreinterpretq_s32_f32(a)
    }
    #[inline(always)]
    unsafe fn load_f(p: *const f32) -> float32x4_t {
        vld1q_f32(p.add(4 * Q))
    }
    #[inline(always)]
    unsafe fn store_f(a: float32x4_t, p: *mut f32) {
        vst1q_f32(p.add(4 * Q), a)
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u8) -> float32x4_t {
        widen(vld1_u16(p.cast::<u16>().add(4 * Q)))
    }
    #[inline(always)]
    unsafe fn store_half(a: float32x4_t, p: *mut u8) {
        let halves: uint16x4_t;
        asm!(
            "fcvtn {halves:v}.4h, {a:v}.4s",
            halves = lateout(vreg) halves, a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags),
        );
        vst1_u16(p.cast::<u16>().add(4 * Q), halves)
    }
    #[inline(always)]
    unsafe fn low_half(a: int32x4_t) -> float32x4_t {
        widen(vmovn_u32(vreinterpretq_u32_s32(a)))
    }
    #[inline(always)]
    unsafe fn high_half(a: int32x4_t) -> float32x4_t {
        widen(vshrn_n_u32::<16>(vreinterpretq_u32_s32(a)))
    }
    #[inline(always)]
    unsafe fn splat_f(x: f32) -> float32x4_t {
        vdupq_n_f32(x)
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vaddq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vsubq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vmulq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vdivq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        vfmaq_f32(c, a, b)
    }
    // `fmax` and `fmin` would answer NaN with NaN.
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vbslq_f32(vcgtq_f32(a, b), a, b)
    }
    #[inline(always)]
    unsafe fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vbslq_f32(vcltq_f32(a, b), a, b)
    }
    #[inline(always)]
    unsafe fn select_range(
        from: usize,
        to: usize,
        a: float32x4_t,
        other: float32x4_t,
    ) -> float32x4_t {
        const LANES: [u32; 4] = [0, 1, 2, 3];
        let lane = vaddq_u32(vld1q_u32(LANES.as_ptr()), vdupq_n_u32(4 * Q as u32));
        let inside = vandq_u32(
            vcgeq_u32(lane, vdupq_n_u32(from as u32)),
            vcltq_u32(lane, vdupq_n_u32(to as u32)),
        );
        vbslq_f32(inside, a, other)
    }
}

/// `acc` + the dot product of each lane's 4 bytes with dword `LANE` of `a`.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
unsafe fn dot_lane<const LANE: usize>(
    mut acc: int32x4_t,
    weights: int32x4_t,
    a: int8x16_t,
) -> int32x4_t {
    asm!(
        "sdot {acc:v}.4s, {weights:v}.16b, {a:v}.4b[{lane}]",
        acc = inout(vreg) acc, weights = in(vreg) weights, a = in(vreg) a, lane = const LANE,
        options(nomem, nostack, preserves_flags),
    );
    acc
}

/// `acc` + the dot products of 2 rows of 8 signed bytes with 2 more: first with each, then second with each.
///
/// # Safety
/// As for [`Vector`], with `i8mm`.
#[inline(always)]
unsafe fn dot_matrix(mut acc: int32x4_t, weights: int32x4_t, a: int8x16_t) -> int32x4_t {
    asm!(
        "smmla {acc:v}.4s, {weights:v}.16b, {a:v}.16b",
        acc = inout(vreg) acc, weights = in(vreg) weights, a = in(vreg) a,
        options(nomem, nostack, preserves_flags),
    );
    acc
}

/// The low halves of the lanes of `a` and then `b`, and the high halves.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
unsafe fn halves_of(a: int32x4_t, b: int32x4_t) -> (int16x8_t, int16x8_t) {
    let (a, b) = (vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
    (vuzp1q_s16(a, b), vuzp2q_s16(a, b))
}

/// Four f16 as floats.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
unsafe fn widen(halves: uint16x4_t) -> float32x4_t {
    let floats: float32x4_t;
    asm!(
        "fcvtl {floats:v}.4s, {halves:v}.4h",
        floats = lateout(vreg) floats, halves = in(vreg) halves,
        options(pure, nomem, nostack, preserves_flags),
    );
    floats
}

/// The low halves of two registers.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
unsafe fn low_halves(a: int32x4_t, b: int32x4_t) -> int32x4_t {
    vreinterpretq_s32_s64(vtrn1q_s64(
        vreinterpretq_s64_s32(a),
        vreinterpretq_s64_s32(b),
    ))
}

/// The high halves of two registers.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
unsafe fn high_halves(a: int32x4_t, b: int32x4_t) -> int32x4_t {
    vreinterpretq_s32_s64(vtrn2q_s64(
        vreinterpretq_s64_s32(a),
        vreinterpretq_s64_s32(b),
    ))
}
