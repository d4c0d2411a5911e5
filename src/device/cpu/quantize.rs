//! Activations to integers of 12 bits in two parts of 8 (`activations` says why).
//!
//! The scale of a block is its largest magnitude / 2032; values go to the
//! nearest integer, halves to even.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `QuantizeFn`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Blocks run through several arrays and spans.

use super::activations::{BLOCK_32_BYTES, BLOCK_256_BYTES, FINE_BITS, Q_MAX};
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

/// 16 values times `factor` as integers in two parts, to `coarse` and `fine`; the parts.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn put_16<V: Vector>(x: V::F, factor: V::F, coarse: *mut u8, fine: *mut u8) -> [V::I; 2] {
    let q = V::round(V::mul(x, factor));
    // Exact: q is a small integer, and so is what is left of it.
    let high = V::round(V::mul(V::to_f(q), V::splat_f(1.0 / FINE)));
    let low = V::sub_i(q, V::shl(high, FINE_BITS));
    V::store_bytes(high, coarse.cast());
    V::store_bytes(low, fine.cast());
    [high, low]
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
        let largest = lanes::<V>(row_maxima::<V>(&square));
        let mut scales = [0.0; 16];
        for i in 0..count {
            let (factor, scale) = factor_and_scale(largest[i]);
            scales[i] = scale;
            let (x, factor) = (x.add(32 * i), V::splat_f(factor));
            let coarse = panel.add(BLOCK_32_BYTES * rows * i + 32 * row);
            let fine = coarse.add(32 * rows);
            let a = put_16::<V>(V::load_f(x), factor, coarse, fine);
            let b = put_16::<V>(V::load_f(x.add(16)), factor, coarse.add(16), fine.add(16));
            let (high, low) = (V::add_i(a[0], b[0]), V::add_i(a[1], b[1]));
            let both = V::add_i(V::shl(high, FINE_BITS), low);
            V::store(both, square[i].as_mut_ptr().cast());
        }
        let sums = row_sums::<V>(&square);
        let scaled_sums = lanes::<V>(V::mul(V::load_f(scales.as_ptr()), V::to_f(sums)));
        let mut minus_sums = [0_i32; 16];
        V::store(V::sub_i(V::splat(0), sums), minus_sums.as_mut_ptr().cast());
        for i in 0..count {
            let meta = panel.add((BLOCK_32_BYTES * i + 64) * rows).cast::<f32>();
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
    let mut squares: [Square; 2] = [[[0; 16]; 16]; 2];
    for _ in 0..cols / 256 {
        let mut largest = abs::<V>(V::load_f(x));
        for i in 1..16 {
            largest = V::max(largest, abs::<V>(V::load_f(x.add(16 * i))));
        }
        let (factor, scale) = factor_and_scale(max::<V>(largest));
        let factor = V::splat_f(factor);
        for i in 0..16 {
            let coarse = panel.add(32 * (i / 2 * 2 * rows + row) + 16 * (i % 2));
            let fine = coarse.add(32 * rows);
            let parts = put_16::<V>(V::load_f(x.add(16 * i)), factor, coarse, fine);
            for part in 0..2 {
                V::store(parts[part], squares[part][i].as_mut_ptr().cast());
            }
        }
        for part in 0..2 {
            let mut sums = [0_i32; 16];
            V::store(row_sums::<V>(&squares[part]), sums.as_mut_ptr().cast());
            let sums_32 = panel.add(516 * rows + 32 * row + 16 * part).cast::<i16>();
            let sums_16 = panel.add(548 * rows + 64 * row + 32 * part).cast::<i16>();
            for i in 0..8 {
                let (low, high) = (sums[2 * i] as i16, sums[2 * i + 1] as i16);
                sums_32.add(pair_order(i)).write_unaligned(low + high);
                sums_16.add(pair_order(2 * i)).write_unaligned(low);
                sums_16.add(pair_order(2 * i + 1)).write_unaligned(high);
            }
        }
        let scale_at = panel.add(512 * rows).cast::<f32>().add(row);
        scale_at.write_unaligned(scale);
        x = x.add(256);
        panel = panel.add(BLOCK_256_BYTES * rows);
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
///
/// # Safety
/// As for [`QuantizeFn`].
pub(super) unsafe fn copy_f32(x: *const f32, cols: usize, panel: *mut u8, rows: usize, row: usize) {
    let panel = panel.cast::<f32>();
    for col in 0..cols {
        panel.add(col * rows + row).write_unaligned(*x.add(col));
    }
}
