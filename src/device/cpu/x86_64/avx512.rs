//! The vector in AVX-512 F, BW, DQ, VL and VNNI: one 512 bit register.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `Vector`.
#![allow(unsafe_op_in_unsafe_fn)]

use crate::device::cpu::vector::Vector;
use std::arch::x86_64::*;

/// One zmm register.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Avx512;

impl Vector for Avx512 {
    type I = __m512i;
    type F = __m512;

    /// `vpdpbusd` wants one unsigned side, so signed weights move up by 128.
    const SIGNED_OFFSET: i32 = 128;
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast())
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn load_columns(p: *const u8, stride: usize) -> [__m512i; 4] {
        // Rows i, i + 4, i + 8 and i + 12 in the quarters of a register: what is left is to
        // transpose 4 x 4 dwords within each quarter.
        let (a, b) = (quarters(p, stride), quarters(p.add(stride), stride));
        let (c, d) = (
            quarters(p.add(2 * stride), stride),
            quarters(p.add(3 * stride), stride),
        );
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab_low, cd_low),
            _mm512_unpackhi_epi64(ab_low, cd_low),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ]
    }
    #[inline(always)]
    unsafe fn store(a: __m512i, p: *mut u8) {
        _mm512_storeu_si512(p.cast(), a)
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn splat_at(p: *const i32) -> __m512i {
        broadcast(p)
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn xor(a: __m512i, b: __m512i) -> __m512i {
        _mm512_xor_si512(a, b)
    }
    #[inline(always)]
    unsafe fn shl(a: __m512i, n: u32) -> __m512i {
        _mm512_sll_epi32(a, _mm_cvtsi32_si128(n as i32))
    }
    #[inline(always)]
    unsafe fn shr(a: __m512i, n: u32) -> __m512i {
        _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32))
    }
    #[inline(always)]
    unsafe fn add_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn sub_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_sub_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn max_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_max_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn mul_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_mullo_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn add_pairs(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi16(a, b)
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512i, weights: __m512i, a: *const i8) -> __m512i {
        _mm512_dpbusd_epi32(
            acc,
            weights,
            _mm512_set1_epi32(a.cast::<i32>().read_unaligned()),
        )
    }
    #[inline(always)]
    unsafe fn signed(weights: __m512i) -> __m512i {
        _mm512_xor_si512(weights, _mm512_set1_epi8(-128))
    }
    #[inline(always)]
    unsafe fn dot_signed(acc: __m512i, weights: __m512i, a: *const i8) -> __m512i {
        Self::dot(acc, weights, a)
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: __m512i, weights: __m512i, a: *const i16) -> __m512i {
        dot_pairs(acc, weights, a)
    }
    #[inline(always)]
    unsafe fn store_bytes(a: __m512i, p: *mut i8) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(a))
    }
    #[inline(always)]
    unsafe fn to_f(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512i {
        _mm512_cvtps_epi32(a)
    }
    #[inline(always)]
    unsafe fn from_bits(a: __m512i) -> __m512 {
        _mm512_castsi512_ps(a)
    }
    #[inline(always)]
    unsafe fn to_bits(a: __m512) -> __m512i {
        _mm512_castps_si512(a)
    }
    #[inline(always)]
    unsafe fn load_f(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store_f(a: __m512, p: *mut f32) {
        _mm512_storeu_ps(p, a)
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u8) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn store_half(a: __m512, p: *mut u8) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a))
    }
    #[inline(always)]
    unsafe fn low_half(a: __m512i) -> __m512 {
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a))
    }
    #[inline(always)]
    unsafe fn high_half(a: __m512i) -> __m512 {
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(a)))
    }
    #[inline(always)]
    unsafe fn splat_f(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn select_range(from: usize, to: usize, a: __m512, other: __m512) -> __m512 {
        let mask = (u32::MAX << from) & !(u32::MAX << to);
        _mm512_mask_blend_ps(mask as __mmask16, other, a)
    }
}

/// The dword at `p` in every lane. The compiler would rather shift a single lane and then move it to all,
/// which is slower than to load it into all.
///
/// # Safety
/// As for [`Vector`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(p: *const i32) -> __m512i {
    let all;
    std::arch::asm!(
        "vpbroadcastd {all}, dword ptr [{p}]",
        all = lateout(zmm_reg) all,
        p = in(reg) p,
        options(pure, readonly, nostack, preserves_flags),
    );
    all
}

/// `vpdpwssd`, which the compiler would take apart into two instructions.
///
/// # Safety
/// As for [`Vector`].
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_pairs(mut acc: __m512i, weights: __m512i, a: *const i16) -> __m512i {
    std::arch::asm!(
        "vpdpwssd {acc}, {weights}, dword ptr [{a}]{{1to16}}",
        acc = inout(zmm_reg) acc,
        weights = in(zmm_reg) weights,
        a = in(reg) a,
        options(pure, readonly, nostack, preserves_flags),
    );
    acc
}

/// 16 bytes of each of four rows, 4 x `stride` bytes apart.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
unsafe fn quarters(p: *const u8, stride: usize) -> __m512i {
    let load = |row: usize| _mm_loadu_si128(p.add(4 * row * stride).cast());
    let x = _mm512_castsi128_si512(load(0));
    let x = _mm512_inserti32x4::<1>(x, load(1));
    let x = _mm512_inserti32x4::<2>(x, load(2));
    _mm512_inserti32x4::<3>(x, load(3))
}

crate::device::cpu::kernels::kernels!(
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    Avx512
);
