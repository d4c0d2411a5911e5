//! The vector in AVX2, FMA and F16C: two 256 bit registers.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `Vector`.
#![allow(unsafe_op_in_unsafe_fn)]

use crate::device::cpu::vector::Vector;
use std::arch::x86_64::*;

/// Two ymm registers: lanes 0 to 7 and 8 to 15.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Avx2;

impl Vector for Avx2 {
    type I = [__m256i; 2];
    type F = [__m256; 2];

    /// The sign of a weight can move to the activation, so nothing is added.
    const SIGNED_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast())
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> [__m256i; 2] {
        [
            _mm256_loadu_si256(p.cast()),
            _mm256_loadu_si256(p.add(32).cast()),
        ]
    }
    #[inline(always)]
    unsafe fn load_columns(p: *const u8, stride: usize) -> [[__m256i; 2]; 4] {
        let low = columns_of_8(p, stride);
        let high = columns_of_8(p.add(8 * stride), stride);
        [
            [low[0], high[0]],
            [low[1], high[1]],
            [low[2], high[2]],
            [low[3], high[3]],
        ]
    }
    #[inline(always)]
    unsafe fn store(a: [__m256i; 2], p: *mut u8) {
        _mm256_storeu_si256(p.cast(), a[0]);
        _mm256_storeu_si256(p.add(32).cast(), a[1]);
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> [__m256i; 2] {
        [_mm256_set1_epi32(x); 2]
    }
    #[inline(always)]
    unsafe fn shl(a: [__m256i; 2], n: u32) -> [__m256i; 2] {
        let n = _mm_cvtsi32_si128(n as i32);
        [_mm256_sll_epi32(a[0], n), _mm256_sll_epi32(a[1], n)]
    }
    #[inline(always)]
    unsafe fn shr(a: [__m256i; 2], n: u32) -> [__m256i; 2] {
        let n = _mm_cvtsi32_si128(n as i32);
        [_mm256_srl_epi32(a[0], n), _mm256_srl_epi32(a[1], n)]
    }
    #[inline(always)]
    unsafe fn and(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn or(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn xor(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn add_i(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub_i(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn max_i(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_max_epi32(a[0], b[0]), _mm256_max_epi32(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul_i(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [
            _mm256_mullo_epi32(a[0], b[0]),
            _mm256_mullo_epi32(a[1], b[1]),
        ]
    }
    #[inline(always)]
    unsafe fn add_pairs(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_add_epi16(a[0], b[0]), _mm256_add_epi16(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn dot(acc: [__m256i; 2], weights: [__m256i; 2], a: *const i8) -> [__m256i; 2] {
        let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
        // Two products of at most 127 * 127 fit 16 bits, so nothing saturates.
        [
            add_quads(acc[0], _mm256_maddubs_epi16(weights[0], a)),
            add_quads(acc[1], _mm256_maddubs_epi16(weights[1], a)),
        ]
    }
    #[inline(always)]
    unsafe fn signed(weights: [__m256i; 2]) -> [__m256i; 2] {
        weights
    }
    #[inline(always)]
    unsafe fn dot_signed(acc: [__m256i; 2], weights: [__m256i; 2], a: *const i8) -> [__m256i; 2] {
        let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
        // |w| is at most 128 and |a| at most 127: two products fit 16 bits.
        let dot = |w| _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
        [
            add_quads(acc[0], dot(weights[0])),
            add_quads(acc[1], dot(weights[1])),
        ]
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: [__m256i; 2], weights: [__m256i; 2], a: *const i16) -> [__m256i; 2] {
        let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
        [
            _mm256_add_epi32(acc[0], _mm256_madd_epi16(weights[0], a)),
            _mm256_add_epi32(acc[1], _mm256_madd_epi16(weights[1], a)),
        ]
    }
    #[inline(always)]
    unsafe fn store_bytes(a: [__m256i; 2], p: *mut i8) {
        // Packing works within 128 bit lanes; the permutation puts the quarters in order.
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a[0], a[1]));
        let (low, high) = (
            _mm256_castsi256_si128(words),
            _mm256_extracti128_si256::<1>(words),
        );
        _mm_storeu_si128(p.cast(), _mm_packs_epi16(low, high));
    }
    #[inline(always)]
    unsafe fn to_f(a: [__m256i; 2]) -> [__m256; 2] {
        [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn round(a: [__m256; 2]) -> [__m256i; 2] {
        [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])]
    }
    #[inline(always)]
    unsafe fn from_bits(a: [__m256i; 2]) -> [__m256; 2] {
        [_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn to_bits(a: [__m256; 2]) -> [__m256i; 2] {
        [_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1])]
    }
    #[inline(always)]
    unsafe fn load_f(p: *const f32) -> [__m256; 2] {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn store_f(a: [__m256; 2], p: *mut f32) {
        _mm256_storeu_ps(p, a[0]);
        _mm256_storeu_ps(p.add(8), a[1]);
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u8) -> [__m256; 2] {
        [
            _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast())),
        ]
    }
    #[inline(always)]
    unsafe fn store_half(a: [__m256; 2], p: *mut u8) {
        _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a[0]));
        _mm_storeu_si128(
            p.add(16).cast(),
            _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a[1]),
        );
    }
    #[inline(always)]
    unsafe fn low_half(a: [__m256i; 2]) -> [__m256; 2] {
        let mask = _mm256_set1_epi32(0xffff);
        halves(_mm256_and_si256(a[0], mask), _mm256_and_si256(a[1], mask))
    }
    #[inline(always)]
    unsafe fn high_half(a: [__m256i; 2]) -> [__m256; 2] {
        halves(_mm256_srli_epi32::<16>(a[0]), _mm256_srli_epi32::<16>(a[1]))
    }
    #[inline(always)]
    unsafe fn splat_f(x: f32) -> [__m256; 2] {
        [_mm256_set1_ps(x); 2]
    }
    #[inline(always)]
    unsafe fn add(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn div(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn max(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn min(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn fma(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        [
            _mm256_fmadd_ps(a[0], b[0], c[0]),
            _mm256_fmadd_ps(a[1], b[1], c[1]),
        ]
    }
    #[inline(always)]
    unsafe fn select_range(
        from: usize,
        to: usize,
        a: [__m256; 2],
        other: [__m256; 2],
    ) -> [__m256; 2] {
        let (from, to) = (
            _mm256_set1_epi32(from as i32 - 1),
            _mm256_set1_epi32(to as i32),
        );
        let pick = |first, a, other| {
            let lane = _mm256_add_epi32(
                _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                _mm256_set1_epi32(first),
            );
            let inside =
                _mm256_and_si256(_mm256_cmpgt_epi32(lane, from), _mm256_cmpgt_epi32(to, lane));
            _mm256_blendv_ps(other, a, _mm256_castsi256_ps(inside))
        };
        [pick(0, a[0], other[0]), pick(8, a[1], other[1])]
    }
}

/// Dword i of each of 8 rows, for i < 4.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
unsafe fn columns_of_8(p: *const u8, stride: usize) -> [__m256i; 4] {
    // Rows i and i + 4 in the halves of a register: what is left is to transpose 4 x 4 dwords
    // within each half.
    let load = |row: usize| {
        let low = _mm256_castsi128_si256(_mm_loadu_si128(p.add(row * stride).cast()));
        _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(p.add((row + 4) * stride).cast()))
    };
    let (a, b, c, d) = (load(0), load(1), load(2), load(3));
    let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab_low, cd_low),
        _mm256_unpackhi_epi64(ab_low, cd_low),
        _mm256_unpacklo_epi64(ab_high, cd_high),
        _mm256_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// `acc` + the sums of neighbouring 16 bit values.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
unsafe fn add_quads(acc: __m256i, pairs: __m256i) -> __m256i {
    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// 16 dwords that hold an f16 each, as floats.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
unsafe fn halves(low: __m256i, high: __m256i) -> [__m256; 2] {
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
    [
        _mm256_cvtph_ps(_mm256_castsi256_si128(words)),
        _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(words)),
    ]
}

crate::device::cpu::kernels::kernels!(
    #[target_feature(enable = "avx2,fma,f16c")]
    Avx2
);
