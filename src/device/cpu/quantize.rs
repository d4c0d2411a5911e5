//! Activations to int8, as ggml does it on x86-64 and ARM.
//!
//! Blocks of 32 (`quantize_row_q8_0`, `_q8_1`): the scale d is the largest
//! magnitude / 127, rounded to f16 for use; values go to the nearest integer,
//! halves to even; the sum that meets a minimum is f16(d x sum) with the
//! unrounded d. Blocks of 256 (`quantize_row_q8_K`): the value of largest
//! magnitude becomes -127, the scale stays f32.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `QuantizeFn`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Blocks run through several arrays and spans.

use super::activations::{BLOCK_32_BYTES, BLOCK_256_BYTES};
use super::vector::{Vector, abs, lanes, max};

/// Quantizes one row: (values, cols, panel, rows in the panel, row within the panel).
pub(super) type QuantizeFn = unsafe fn(*const f32, usize, *mut u8, usize, usize);

/// 16 vectors of 16 lanes, as they are stored.
type Square = [[i32; 16]; 16];

/// Columns 4`i`..4`i` + 4 of a square: lane r is row r's value.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn columns<V: Vector>(square: &Square, i: usize) -> [V::I; 4] {
    V::load_columns(square[0].as_ptr().add(4 * i).cast(), 64)
}

/// The sum of each row of a square, all at once.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn row_sums<V: Vector>(square: &Square) -> V::I {
    let mut sums = V::splat(0);
    for i in 0..4 {
        let [a, b, c, d] = columns::<V>(square, i);
        sums = V::add_i(sums, V::add_i(V::add_i(a, b), V::add_i(c, d)));
    }
    sums
}

/// The largest float of each row of a square of floats that are not negative.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn row_maxima<V: Vector>(square: &Square) -> V::F {
    let mut maxima = V::splat_f(0.0);
    for i in 0..4 {
        let [a, b, c, d] = columns::<V>(square, i);
        let (ab, cd) = (
            V::max(V::from_bits(a), V::from_bits(b)),
            V::max(V::from_bits(c), V::from_bits(d)),
        );
        maxima = V::max(maxima, V::max(ab, cd));
    }
    maxima
}

/// 16 values times `factor` as integers to `q`; the integers.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn put_16<V: Vector>(x: V::F, factor: V::F, q: *mut u8) -> V::I {
    let x = V::round(V::min(V::mul(x, factor), V::splat_f(127.0)));
    V::store_bytes(x, q.cast());
    x
}

/// Into blocks of 32, 16 blocks at a time.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
pub(super) unsafe fn quantize_32<V: Vector>(
    x: *const f32,
    cols: usize,
    panel: *mut u8,
    rows: usize,
    row: usize,
) {
    let blocks = cols / 32;
    let mut square: Square = [[0; 16]; 16];
    for first in (0..blocks).step_by(16) {
        let count = (blocks - first).min(16);
        let (x, panel) = (x.add(32 * first), panel.add(BLOCK_32_BYTES * rows * first));
        for i in 0..count {
            let (a, b) = (V::load_f(x.add(32 * i)), V::load_f(x.add(32 * i + 16)));
            let larger = V::max(abs::<V>(a), abs::<V>(b));
            V::store(V::to_bits(larger), square[i].as_mut_ptr().cast());
        }
        let largest = row_maxima::<V>(&square);
        let factors = lanes::<V>(V::div(V::splat_f(127.0), largest));
        let scales = V::div(largest, V::splat_f(127.0));
        let largest = lanes::<V>(largest);
        for i in 0..count {
            let factor = V::splat_f(if largest[i] == 0.0 { 0.0 } else { factors[i] });
            let (x, q) = (
                x.add(32 * i),
                panel.add(BLOCK_32_BYTES * rows * i + 32 * row),
            );
            let a = put_16::<V>(V::load_f(x), factor, q);
            let b = put_16::<V>(V::load_f(x.add(16)), factor, q.add(16));
            V::store(V::add_i(a, b), square[i].as_mut_ptr().cast());
        }
        let sums = row_sums::<V>(&square);
        let scaled_sums = lanes::<V>(V::through_half(V::mul(scales, V::to_f(sums))));
        let scales = lanes::<V>(V::through_half(scales));
        let mut minus_sums = [0_i32; 16];
        V::store(V::sub_i(V::splat(0), sums), minus_sums.as_mut_ptr().cast());
        for i in 0..count {
            let meta = panel.add((BLOCK_32_BYTES * i + 32) * rows).cast::<f32>();
            meta.add(row).write_unaligned(scales[i]);
            meta.add(rows + row).write_unaligned(scaled_sums[i]);
            let minus_sum = meta.add(2 * rows + row).cast::<i32>();
            minus_sum.write_unaligned(minus_sums[i]);
        }
    }
}

/// Into blocks of 256.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
pub(super) unsafe fn quantize_256<V: Vector>(
    mut x: *const f32,
    cols: usize,
    mut panel: *mut u8,
    rows: usize,
    row: usize,
) {
    let mut square: Square = [[0; 16]; 16];
    for _ in 0..cols / 256 {
        let signed_max = signed_max::<V>(x);
        let (factor, scale) = match signed_max {
            0.0 => (0.0, 0.0),
            _ => (-127.0 / signed_max, 1.0 / (-127.0 / signed_max)),
        };
        let factor = V::splat_f(factor);
        for i in 0..16 {
            let q = panel.add(32 * (i / 2 * rows + row) + 16 * (i % 2));
            let q = put_16::<V>(V::load_f(x.add(16 * i)), factor, q);
            V::store(q, square[i].as_mut_ptr().cast());
        }
        let mut sums = [0_i32; 16];
        V::store(row_sums::<V>(&square), sums.as_mut_ptr().cast());
        let sums_32 = panel.add(260 * rows + 16 * row).cast::<i16>();
        let sums_16 = panel.add(276 * rows + 32 * row).cast::<i16>();
        for i in 0..8 {
            let (low, high) = (sums[2 * i] as i16, sums[2 * i + 1] as i16);
            sums_32.add(pair_order(i)).write_unaligned(low + high);
            sums_16.add(pair_order(2 * i)).write_unaligned(low);
            sums_16.add(pair_order(2 * i + 1)).write_unaligned(high);
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

/// Where sum `i` stands: 0, 2, 1, 3 within each four.
#[inline(always)]
fn pair_order(i: usize) -> usize {
    i / 4 * 4 + [0, 2, 1, 3][i % 4]
}

/// Of 256 values, the one of largest magnitude; the first of several.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn signed_max<V: Vector>(x: *const f32) -> f32 {
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

/// One row as it is into a panel of `rows` rows.
///
/// # Safety
/// As for [`QuantizeFn`].
///
/// # Safety
/// As for [`QuantizeFn`].
pub(super) unsafe fn copy_f32(x: *const f32, cols: usize, panel: *mut u8, rows: usize, row: usize) {
    let panel = panel.cast::<f32>();
    for col in 0..cols {
        panel.add(col * rows + row).write_unaligned(*x.add(col));
    }
}
