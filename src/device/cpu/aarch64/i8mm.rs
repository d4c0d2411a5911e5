//! NEON with products of matrices of signed bytes (`smmla`), which do twice the work of a dot product.
//!
//! They pay from 4 rows on: bringing pairs of weight rows together for them takes a permutation for each
//! two, so that for one or two rows dot products are as fast. Everything else is NEON's.
#![allow(unsafe_code)]

use super::neon::KERNELS as NEON;
use super::quarter::Quarter;
use crate::device::cpu::codec_32::{self as c32, Codec32};
use crate::device::cpu::codec_256::{self as c256, Codec256};
use crate::device::cpu::kernels::{Kernels, compiled, compiled_strip};
use crate::device::cpu::measure::CHAINS;
use crate::device::cpu::precision::{BITS_8, BITS_12};
use crate::device::cpu::strip::{self, StripFn};
use crate::device::cpu::vector::Vector;
use crate::format::quant::QuantType;

compiled_strip! {
    #[target_feature(enable = "neon,dotprod,i8mm")]
    fn blocks_32[Codec32; Quarter<0, true>, Quarter<1, true>, Quarter<2, true>, Quarter<3, true>]
}
compiled_strip! {
    #[target_feature(enable = "neon,dotprod,i8mm")]
    fn blocks_256[Codec256; Quarter<0, true>, Quarter<1, true>, Quarter<2, true>, Quarter<3, true>]
}
compiled! {
    #[target_feature(enable = "neon,dotprod,i8mm")]
    fn dots[](rounds: usize, a: *const i8, out: *mut u8) = dots_of_matrices::<Quarter<0, true>>
}

/// As many products as [`dots`](crate::device::cpu::measure::dots), with matrices.
///
/// # Safety
/// As for [`dots`](crate::device::cpu::measure::dots); `V` is a quarter.
#[inline(always)]
unsafe fn dots_of_matrices<V: Vector>(rounds: usize, a: *const i8, out: *mut u8) {
    // SAFETY: as the caller vouches.
    unsafe {
        let weights = V::of_16([V::splat(0x0102_0304); 4]);
        let mut sums = [[V::splat(0); 2]; CHAINS];
        // 4 rows of 16 columns with 2 parts are as many as 4 columns of 16 rows, twice.
        for _ in 0..rounds / 2 {
            for sum in &mut sums {
                *sum = V::dot_two(*sum, weights, a);
            }
        }
        for [a, b] in sums {
            V::store(V::add_i(V::add_i(a, b), V::load(out)), out);
        }
    }
}

/// NEON's kernels of one weight type, with others for 4 and 8 rows.
const fn with(few: [[StripFn; 4]; 2], many: [[StripFn; 2]; 2]) -> [[StripFn; 4]; 2] {
    let [[one_8, two_8, ..], [one_12, two_12, ..]] = few;
    let [[four_8, eight_8], [four_12, eight_12]] = many;
    [
        [one_8, two_8, four_8, eight_8],
        [one_12, two_12, four_12, eight_12],
    ]
}

/// The kernels of one codec.
macro_rules! rows {
    ($kernel:ident, $codec:ty, $qtype:ident) => {
        with(
            NEON.strips[QuantType::$qtype as usize],
            [
                [
                    $kernel::<$codec, 4, BITS_8> as StripFn,
                    $kernel::<$codec, 8, BITS_8>,
                ],
                [$kernel::<$codec, 4, BITS_12>, $kernel::<$codec, 8, BITS_12>],
            ],
        )
    };
}

/// In the order of `QuantType`.
pub(in crate::device::cpu) static KERNELS: Kernels = Kernels {
    strips: [
        NEON.strips[QuantType::F32 as usize],
        NEON.strips[QuantType::F16 as usize],
        NEON.strips[QuantType::BF16 as usize],
        rows!(blocks_32, c32::Q4_0, Q4_0),
        rows!(blocks_32, c32::Q4_1, Q4_1),
        rows!(blocks_32, c32::Q5_0, Q5_0),
        rows!(blocks_32, c32::Q5_1, Q5_1),
        rows!(blocks_32, c32::Q8_0, Q8_0),
        rows!(blocks_256, c256::Q2K, Q2_K),
        rows!(blocks_256, c256::Q3K, Q3_K),
        rows!(blocks_256, c256::Q4K, Q4_K),
        rows!(blocks_256, c256::Q5K, Q5_K),
        rows!(blocks_256, c256::Q6K, Q6_K),
    ],
    dots,
    ..NEON
};
