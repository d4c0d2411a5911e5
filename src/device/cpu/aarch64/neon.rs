//! The vector in NEON with dot products: four quarters of four lanes.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `Vector`.
#![allow(unsafe_op_in_unsafe_fn)]

use super::quarter::Quarter;
use crate::device::cpu::vector::Vector;
use std::arch::aarch64::{float32x4_t, int32x4_t};

/// Four registers.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Neon;

type Integers = [int32x4_t; 4];
type Floats = [float32x4_t; 4];

/// The expression for each quarter.
macro_rules! quarters {
    ($quarter:ident => $value:expr) => {
        [
            {
                const $quarter: usize = 0;
                $value
            },
            {
                const $quarter: usize = 1;
                $value
            },
            {
                const $quarter: usize = 2;
                $value
            },
            {
                const $quarter: usize = 3;
                $value
            },
        ]
    };
}

impl Vector for Neon {
    type I = Integers;
    type F = Floats;

    const SIGNED_OFFSET: i32 = Quarter::<0>::SIGNED_OFFSET;
    const WEIGHTS_FIRST: bool = Quarter::<0>::WEIGHTS_FIRST;

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        Quarter::<0>::prefetch(p)
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Integers {
        quarters!(Q => Quarter::<Q>::load(p))
    }
    #[inline(always)]
    unsafe fn load_columns(p: *const u8, stride: usize) -> [Integers; 4] {
        let [a, b, c, d] = quarters!(Q => Quarter::<Q>::load_columns(p, stride));
        [
            [a[0], b[0], c[0], d[0]],
            [a[1], b[1], c[1], d[1]],
            [a[2], b[2], c[2], d[2]],
            [a[3], b[3], c[3], d[3]],
        ]
    }
    #[inline(always)]
    unsafe fn store(a: Integers, p: *mut u8) {
        quarters!(Q => Quarter::<Q>::store(a[Q], p));
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> Integers {
        [Quarter::<0>::splat(x); 4]
    }
    #[inline(always)]
    unsafe fn and(a: Integers, b: Integers) -> Integers {
        quarters!(Q => Quarter::<Q>::and(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn or(a: Integers, b: Integers) -> Integers {
        quarters!(Q => Quarter::<Q>::or(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn xor(a: Integers, b: Integers) -> Integers {
        quarters!(Q => Quarter::<Q>::xor(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn shl(a: Integers, n: u32) -> Integers {
        quarters!(Q => Quarter::<Q>::shl(a[Q], n))
    }
    #[inline(always)]
    unsafe fn shr(a: Integers, n: u32) -> Integers {
        quarters!(Q => Quarter::<Q>::shr(a[Q], n))
    }
    #[inline(always)]
    unsafe fn add_i(a: Integers, b: Integers) -> Integers {
        quarters!(Q => Quarter::<Q>::add_i(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn sub_i(a: Integers, b: Integers) -> Integers {
        quarters!(Q => Quarter::<Q>::sub_i(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn max_i(a: Integers, b: Integers) -> Integers {
        quarters!(Q => Quarter::<Q>::max_i(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn mul_i(a: Integers, b: Integers) -> Integers {
        quarters!(Q => Quarter::<Q>::mul_i(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn add_pairs(a: Integers, b: Integers) -> Integers {
        quarters!(Q => Quarter::<Q>::add_pairs(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn dot(acc: Integers, weights: Integers, a: *const i8) -> Integers {
        quarters!(Q => Quarter::<Q>::dot(acc[Q], weights[Q], a))
    }
    #[inline(always)]
    unsafe fn signed(weights: Integers) -> Integers {
        weights
    }
    #[inline(always)]
    unsafe fn dot_signed(acc: Integers, weights: Integers, a: *const i8) -> Integers {
        Self::dot(acc, weights, a)
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: Integers, weights: Integers, a: *const i16) -> Integers {
        quarters!(Q => Quarter::<Q>::dot_pairs(acc[Q], weights[Q], a))
    }
    #[inline(always)]
    unsafe fn store_bytes(a: Integers, p: *mut i8) {
        quarters!(Q => Quarter::<Q>::store_bytes(a[Q], p));
    }
    #[inline(always)]
    unsafe fn to_f(a: Integers) -> Floats {
        quarters!(Q => Quarter::<Q>::to_f(a[Q]))
    }
    #[inline(always)]
    unsafe fn round(a: Floats) -> Integers {
        quarters!(Q => Quarter::<Q>::round(a[Q]))
    }
    #[inline(always)]
    unsafe fn from_bits(a: Integers) -> Floats {
        quarters!(Q => Quarter::<Q>::from_bits(a[Q]))
    }
    #[inline(always)]
    unsafe fn to_bits(a: Floats) -> Integers {
        quarters!(Q => Quarter::<Q>::to_bits(a[Q]))
    }
    #[inline(always)]
    unsafe fn load_f(p: *const f32) -> Floats {
        quarters!(Q => Quarter::<Q>::load_f(p))
    }
    #[inline(always)]
    unsafe fn store_f(a: Floats, p: *mut f32) {
        quarters!(Q => Quarter::<Q>::store_f(a[Q], p));
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u8) -> Floats {
        quarters!(Q => Quarter::<Q>::load_half(p))
    }
    #[inline(always)]
    unsafe fn store_half(a: Floats, p: *mut u8) {
        quarters!(Q => Quarter::<Q>::store_half(a[Q], p));
    }
    #[inline(always)]
    unsafe fn low_half(a: Integers) -> Floats {
        quarters!(Q => Quarter::<Q>::low_half(a[Q]))
    }
    #[inline(always)]
    unsafe fn high_half(a: Integers) -> Floats {
        quarters!(Q => Quarter::<Q>::high_half(a[Q]))
    }
    #[inline(always)]
    unsafe fn splat_f(x: f32) -> Floats {
        [Quarter::<0>::splat_f(x); 4]
    }
    #[inline(always)]
    unsafe fn add(a: Floats, b: Floats) -> Floats {
        quarters!(Q => Quarter::<Q>::add(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn sub(a: Floats, b: Floats) -> Floats {
        quarters!(Q => Quarter::<Q>::sub(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn mul(a: Floats, b: Floats) -> Floats {
        quarters!(Q => Quarter::<Q>::mul(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn div(a: Floats, b: Floats) -> Floats {
        quarters!(Q => Quarter::<Q>::div(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn fma(a: Floats, b: Floats, c: Floats) -> Floats {
        quarters!(Q => Quarter::<Q>::fma(a[Q], b[Q], c[Q]))
    }
    #[inline(always)]
    unsafe fn max(a: Floats, b: Floats) -> Floats {
        quarters!(Q => Quarter::<Q>::max(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn min(a: Floats, b: Floats) -> Floats {
        quarters!(Q => Quarter::<Q>::min(a[Q], b[Q]))
    }
    #[inline(always)]
    unsafe fn select_range(from: usize, to: usize, a: Floats, other: Floats) -> Floats {
        quarters!(Q => Quarter::<Q>::select_range(from, to, a[Q], other[Q]))
    }
}

crate::device::cpu::kernels::kernels!(
    #[target_feature(enable = "neon,dotprod")]
    Neon, strips by Quarter<0>, Quarter<1>, Quarter<2>, Quarter<3>
);
