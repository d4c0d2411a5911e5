//! Activations to integers of 12 bits in two parts of 8 (`activations` says why).
//!
//! The scale of a block is its largest magnitude / 2032; values go to the
//! nearest integer, halves to even.
#![allow(unsafe_code)]
// SAFETY (of every block in this file): pointers are valid for the sizes that
// `QuantizeFn` names, and the caller is compiled for `V`.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::activations::{BLOCK_32_BYTES, BLOCK_256_BYTES, FINE_BITS, Q_MAX};
use super::vector::{Vector, abs, max, sum};

/// Quantizes one row: (values, cols, panel, rows in the panel, row within the panel).
pub(super) type QuantizeFn = unsafe fn(*const f32, usize, *mut u8, usize, usize);

/// 16 values times `factor` as integers, in two parts, to `coarse` and `fine`; the sums of the parts.
#[inline(always)]
unsafe fn put_16<V: Vector>(x: V::F, factor: V::F, coarse: *mut u8, fine: *mut u8) -> [f32; 2] {
    unsafe {
        let q = V::round(V::mul(x, factor));
        // Exact: q is a small integer, and so is what is left of it.
        let high = V::round(V::mul(V::to_f(q), V::splat_f(1.0 / FINE)));
        let low = V::sub_i(q, V::shl(high, FINE_BITS));
        V::store_bytes(high, coarse.cast());
        V::store_bytes(low, fine.cast());
        [sum::<V>(V::to_f(high)), sum::<V>(V::to_f(low))]
    }
}

/// What a coarse unit is worth in fine ones.
const FINE: f32 = (1 << FINE_BITS) as f32;

/// Blocks of nothing larger than this count as zero: the factor of smaller ones would not be finite.
const NOTHING: f32 = 1e-30;

/// What values are multiplied with to become integers, and the scale that undoes it.
#[inline(always)]
fn factor_and_scale(largest: f32) -> (f32, f32) {
    if largest < NOTHING {
        (0.0, 0.0)
    } else {
        (Q_MAX / largest, largest / Q_MAX)
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
            let (factor, scale) = factor_and_scale(largest);
            let factor = V::splat_f(factor);
            let coarse = panel.add(32 * row);
            let fine = coarse.add(32 * rows);
            let a = put_16::<V>(a, factor, coarse, fine);
            let b = put_16::<V>(b, factor, coarse.add(16), fine.add(16));
            let sum = (a[0] + b[0]) * FINE + (a[1] + b[1]);
            let at = |field: usize| panel.add((64 + 4 * field) * rows).cast::<f32>().add(row);
            at(0).write_unaligned(scale);
            at(1).write_unaligned(scale * sum);
            at(2).cast::<i32>().write_unaligned(-sum as i32);
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
            let mut largest = abs::<V>(V::load_f(x));
            for i in 1..16 {
                largest = V::max(largest, abs::<V>(V::load_f(x.add(16 * i))));
            }
            let (factor, scale) = factor_and_scale(max::<V>(largest));
            let factor = V::splat_f(factor);
            let sums_32 = panel.add(516 * rows + 32 * row).cast::<i16>();
            let sums_16 = panel.add(548 * rows + 64 * row).cast::<i16>();
            for run in 0..8 {
                let coarse = panel.add(32 * (2 * run * rows + row));
                let fine = coarse.add(32 * rows);
                let values = x.add(32 * run);
                let low = put_16::<V>(V::load_f(values), factor, coarse, fine);
                let high = put_16::<V>(
                    V::load_f(values.add(16)),
                    factor,
                    coarse.add(16),
                    fine.add(16),
                );
                for part in 0..2 {
                    let (low, high) = (low[part] as i16, high[part] as i16);
                    let (sums_32, sums_16) = (sums_32.add(8 * part), sums_16.add(16 * part));
                    sums_32.add(pair_order(run)).write_unaligned(low + high);
                    sums_16.add(pair_order(2 * run)).write_unaligned(low);
                    sums_16.add(pair_order(2 * run + 1)).write_unaligned(high);
                }
            }
            panel
                .add(512 * rows)
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
