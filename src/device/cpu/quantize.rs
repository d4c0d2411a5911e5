//! Activations to int8, as ggml does it on x86-64 and ARM.
//!
//! Blocks of 32 (`quantize_row_q8_0`, `_q8_1`): the scale d is the largest
//! magnitude / 127, rounded to f16 for use; values go to the nearest integer,
//! halves to even; the sum that meets a minimum is f16(d x sum) with the
//! unrounded d. Blocks of 256 (`quantize_row_q8_K`): the value of largest
//! magnitude becomes -127, the scale stays f32.
#![allow(unsafe_code)]
// SAFETY (of every block in this file): pointers are valid for the sizes that
// `QuantizeFn` names, and the caller is compiled for `V`.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::activations::{BLOCK_32_BYTES, BLOCK_256_BYTES};
use super::vector::{Vector, abs, max, sum};

/// Quantizes one row: (values, cols, panel, rows in the panel, row within the panel).
pub(super) type QuantizeFn = unsafe fn(*const f32, usize, *mut u8, usize, usize);

/// 16 values times `factor` as integers to `q`; their sum.
#[inline(always)]
unsafe fn put_16<V: Vector>(x: V::F, factor: V::F, q: *mut u8) -> f32 {
    unsafe {
        let x = V::round(V::min(V::mul(x, factor), V::splat_f(127.0)));
        V::store_bytes(x, q.cast());
        sum::<V>(V::to_f(x))
    }
}

/// Into blocks of 32.
#[inline(always)]
pub(super) unsafe fn quantize_32<V: Vector>(
    mut x: *const f32,
    cols: usize,
    mut panel: *mut u8,
    rows: usize,
    row: usize,
) {
    unsafe {
        for _ in 0..cols / 32 {
            let (a, b) = (V::load_f(x), V::load_f(x.add(16)));
            let largest = max::<V>(V::max(abs::<V>(a), abs::<V>(b)));
            let factor = V::splat_f(if largest == 0.0 { 0.0 } else { 127.0 / largest });
            let q = panel.add(32 * row);
            let sum = put_16::<V>(a, factor, q) + put_16::<V>(b, factor, q.add(16));
            let scale = largest / 127.0;
            let rounded = super::vector::lanes::<V>(V::through_half(V::splat_f(scale)))[0];
            let scaled_sum = super::vector::lanes::<V>(V::through_half(V::splat_f(scale * sum)))[0];
            panel
                .add(32 * rows)
                .cast::<f32>()
                .add(row)
                .write_unaligned(rounded);
            panel
                .add(36 * rows)
                .cast::<f32>()
                .add(row)
                .write_unaligned(scaled_sum);
            panel
                .add(40 * rows)
                .cast::<i32>()
                .add(row)
                .write_unaligned(-sum as i32);
            x = x.add(32);
            panel = panel.add(BLOCK_32_BYTES * rows);
        }
    }
}

/// Into blocks of 256.
#[inline(always)]
pub(super) unsafe fn quantize_256<V: Vector>(
    mut x: *const f32,
    cols: usize,
    mut panel: *mut u8,
    rows: usize,
    row: usize,
) {
    unsafe {
        for _ in 0..cols / 256 {
            let signed_max = signed_max::<V>(x);
            let inverse = if signed_max == 0.0 {
                0.0
            } else {
                -127.0 / signed_max
            };
            let scale = if signed_max == 0.0 {
                0.0
            } else {
                1.0 / inverse
            };
            let factor = V::splat_f(inverse);
            let sums_32 = panel.add(260 * rows + 16 * row).cast::<i16>();
            let sums_16 = panel.add(276 * rows + 32 * row).cast::<i16>();
            for run in 0..8 {
                let q = panel.add(32 * (run * rows + row));
                let values = x.add(32 * run);
                let low = put_16::<V>(V::load_f(values), factor, q) as i16;
                let high = put_16::<V>(V::load_f(values.add(16)), factor, q.add(16)) as i16;
                sums_32.add(pair_order(run)).write_unaligned(low + high);
                sums_16.add(pair_order(2 * run)).write_unaligned(low);
                sums_16.add(pair_order(2 * run + 1)).write_unaligned(high);
            }
            panel
                .add(256 * rows)
                .cast::<f32>()
                .add(row)
                .write_unaligned(scale);
            x = x.add(256);
            panel = panel.add(BLOCK_256_BYTES * rows);
        }
    }
}

/// Where sum `i` stands: 0, 2, 1, 3 within each four.
#[inline(always)]
fn pair_order(i: usize) -> usize {
    i / 4 * 4 + [0, 2, 1, 3][i % 4]
}

/// Of 256 values, the one of largest magnitude; the first of several.
#[inline(always)]
unsafe fn signed_max<V: Vector>(x: *const f32) -> f32 {
    unsafe {
        let mut high = V::load_f(x);
        let mut low = high;
        for i in 1..16 {
            let x = V::load_f(x.add(16 * i));
            high = V::max(high, x);
            low = V::min(low, x);
        }
        let (high, low) = (max::<V>(high), -max::<V>(V::sub(V::splat_f(0.0), low)));
        if high > -low {
            high
        } else if high < -low {
            low
        } else {
            // Both signs reach it, and the first one counts.
            (0..256)
                .map(|i| *x.add(i))
                .find(|x| x.abs() == high)
                .unwrap_or(0.0)
        }
    }
}

/// One row as it is into a panel of `rows` rows.
///
/// # Safety
/// As for [`QuantizeFn`].
pub(super) unsafe fn copy_f32(x: *const f32, cols: usize, panel: *mut u8, rows: usize, row: usize) {
    let panel = panel.cast::<f32>();
    for col in 0..cols {
        unsafe { panel.add(col * rows + row).write_unaligned(*x.add(col)) };
    }
}
