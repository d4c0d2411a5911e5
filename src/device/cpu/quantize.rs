//! Activations to integers of 8 or 12 bits in parts of 8 (`precision` says why and how).
//!
//! The scale of a block is its largest magnitude / 127 or 1768; values go to the
//! nearest integer, halves to even.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `QuantizeFn`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Blocks run through several arrays and spans.

use super::activations::{MINUS_SUMS_OFFSET, block_32_bytes, block_256_bytes, run_bytes};
use super::precision::{BITS_8, FINE_BITS, SECOND, parts, q_max, shape};
use super::vector::{Vector, abs};
use super::weights_first;

/// Quantizes columns of the one row of a panel, or of two rows of a larger one: (values, from one row's to the next
/// one's, columns, the panel from the first of these on, rows in the panel, row within the panel, the first one of two).
pub(super) type QuantizeFn = unsafe fn(*const f32, usize, usize, *mut u8, usize, usize);

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

/// The largest integer of each row of a square of integers that are not negative.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn row_maxima<V: Vector>(square: &Square) -> V::I {
    let mut maxima = V::splat(0);
    for i in 0..4 {
        let [a, b, c, d] = columns::<V>(square, i);
        let (ab, cd) = (V::max_i(a, b), V::max_i(c, d));
        maxima = V::max_i(maxima, V::max_i(ab, cd));
    }
    maxima
}

/// 16 values times `factor` as integers.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn integers<V: Vector>(x: *const f32, factor: f32) -> V::I {
    V::round(V::mul(V::load_f(x), V::splat_f(factor)))
}

/// The quotient of small integers that `by` divides, or the nearest integer to any other.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn divide<V: Vector>(q: V::I, by: i32) -> V::I {
    V::round(V::mul(V::to_f(q), V::splat_f(1.0 / by as f32)))
}

/// What is left of `q` when the nearest multiple of `by` is taken off.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn rest<V: Vector>(q: V::I, by: i32) -> V::I {
    V::sub_i(q, V::mul_i(divide::<V>(q, by), V::splat(by)))
}

/// What a coarse unit is worth in fine ones.
const FIRST: i32 = 1 << FINE_BITS;

/// 16 integers of a single row as two parts.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn parts_of_single<V: Vector>(q: V::I) -> [V::I; 3] {
    let coarse = divide::<V>(q, FIRST);
    let fine = V::sub_i(q, V::shl(coarse, FINE_BITS));
    [coarse, fine, V::splat(0)]
}

/// 16 integers of each of two rows as three parts.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn parts_of_pair<V: Vector>(a: V::I, b: V::I) -> [V::I; 3] {
    // a + 16 k leaves the rest of a when divided by 16, and that of a + k when divided by 15.
    let k = rest::<V>(V::sub_i(b, a), SECOND);
    let z = rest::<V>(V::add_i(a, V::shl(k, FINE_BITS)), FIRST * SECOND);
    let x = divide::<V>(V::sub_i(a, z), FIRST);
    let y = divide::<V>(V::sub_i(b, z), SECOND);
    [x, y, z]
}

/// 16 columns of a part of a run of `parts` parts, from column 16 `half` on.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn put<V: Vector>(q: V::I, run: *mut u8, parts: usize, part: usize, half: usize) {
    if !V::WEIGHTS_FIRST || weights_first::alone(parts, part) {
        return V::store_bytes(q, run.add(32 * part + 16 * half).cast());
    }
    let mut columns = [0_i8; 16];
    V::store_bytes(q, columns.as_mut_ptr());
    for eight in 0..2 {
        let to = run.add(weights_first::columns_at(part, 2 * half + eight));
        to.copy_from_nonoverlapping(columns.as_ptr().add(8 * eight).cast(), 8);
    }
}

/// Blocks of nothing larger than this count as zero: the factor of smaller ones would not be finite.
const NOTHING: f32 = 1e-30;

/// What stands for values that are not finite.
const ZEROS: [f32; 16] = [0.0; 16];

/// What values are multiplied with to become integers, and the scale that undoes it.
#[inline(always)]
fn factor_and_scale(largest: f32, bits: u32) -> (f32, f32) {
    if largest < NOTHING {
        (0.0, 0.0)
    } else if largest < f32::INFINITY {
        (q_max(bits) / largest, largest / q_max(bits))
    } else {
        // The integers will be zeros; what is infinite would be sound in a product with nothing else.
        (0.0, f32::NAN)
    }
}

/// What becomes of 256 columns or less of the one row or the two rows of a panel, by 16 columns.
struct Quantized {
    /// Of each row.
    scales: [[f32; 16]; 2],
    /// The sums of each part.
    sums: [[i32; 16]; 3],
}

impl Quantized {
    /// The sum of the `i`-th 16 integers of row `r`, in a panel of `rows` rows.
    #[inline(always)]
    fn sum<const BITS: u32>(&self, rows: usize, r: usize, i: usize) -> i32 {
        let [x, y, z] = [0, 1, 2].map(|part: usize| self.sums[part][i]);
        match (BITS, rows, r) {
            (BITS_8, _, 0) => x,
            (BITS_8, ..) => y,
            (_, 1, _) => FIRST * x + y,
            (_, _, 0) => FIRST * x + z,
            _ => SECOND * y + z,
        }
    }
}

/// Which of a panel's parts is the first one of row `row`, the first one of two.
const fn first_part(rows: usize, row: usize, bits: u32) -> usize {
    let (groups, parts_each) = shape(rows, bits);
    row * groups / rows * parts_each
}

/// Quantizes up to 256 columns; `block` columns share a scale. Runs of 32 go `run_stride` bytes apart.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
unsafe fn quantize_256_columns<V: Vector, const BITS: u32>(
    x: [*const f32; 2],
    cols: usize,
    block: usize,
    (panel, run_stride): (*mut u8, usize),
    (rows, row): (usize, usize),
) -> Quantized {
    let count = cols / 16;
    let (mut factors, mut scales) = ([[0.0; 16]; 2], [[0.0; 16]; 2]);
    let mut squares: [Square; 3] = [[[0; 16]; 16]; 3];
    for r in 0..rows.min(2) {
        for i in 0..count {
            let magnitudes = abs::<V>(V::load_f(x[r].add(16 * i)));
            V::store(V::to_bits(magnitudes), squares[r][i].as_mut_ptr().cast());
        }
        // Magnitudes are in the order of their bits, what is no number behind all that are: so nothing hides it, and the
        // block's scale tells of it whatever the integers are.
        let mut largest = [0_i32; 16];
        V::store(row_maxima::<V>(&squares[r]), largest.as_mut_ptr().cast());
        for first in (0..count).step_by(block / 16) {
            let of_block = first..count.min(first + block / 16);
            let largest = largest[of_block.clone()].iter().copied().max();
            let largest = f32::from_bits(largest.unwrap_or(0) as u32);
            let (factor, scale) = factor_and_scale(largest, BITS);
            factors[r][of_block.clone()].fill(factor);
            scales[r][of_block].fill(scale);
        }
    }
    // What is not finite is no integer, and must not get into the part that two rows share.
    let finite = |r: usize, i: usize| match scales[r][i].is_finite() {
        true => x[r].add(16 * i),
        false => ZEROS.as_ptr(),
    };
    for i in 0..count {
        let run = panel.add(i / 2 * run_stride);
        let a = integers::<V>(finite(0, i), factors[0][i]);
        let b = match rows {
            1 => V::splat(0),
            _ => integers::<V>(finite(1, i), factors[1][i]),
        };
        let values = match (BITS, rows) {
            (BITS_8, _) => [a, b, V::splat(0)],
            (_, 1) => parts_of_single::<V>(a),
            _ => parts_of_pair::<V>(a, b),
        };
        for part in 0..parts(rows.min(2), BITS) {
            let at = first_part(rows, row, BITS) + part;
            put::<V>(values[part], run, parts(rows, BITS), at, i % 2);
        }
        for part in 0..3 {
            V::store(values[part], squares[part][i].as_mut_ptr().cast());
        }
    }
    let mut sums = [[0; 16]; 3];
    for part in 0..3 {
        let of_part = row_sums::<V>(&squares[part]);
        V::store(of_part, sums[part].as_mut_ptr().cast());
    }
    Quantized { scales, sums }
}

/// Into blocks of 32.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
pub(super) unsafe fn quantize_32<V: Vector, const BITS: u32>(
    x: *const f32,
    stride: usize,
    cols: usize,
    mut panel: *mut u8,
    rows: usize,
    row: usize,
) {
    for first in (0..cols).step_by(256) {
        let (some, block_bytes) = ((cols - first).min(256), block_32_bytes(rows, BITS));
        let x = [x.add(first), x.wrapping_add(stride + first)];
        let done = quantize_256_columns::<V, BITS>(x, some, 32, (panel, block_bytes), (rows, row));
        for block in 0..some / 32 {
            let meta = panel.add(block * block_bytes + run_bytes(rows, BITS));
            for r in 0..rows.min(2) {
                let scale = done.scales[r][2 * block];
                let sum =
                    done.sum::<BITS>(rows, r, 2 * block) + done.sum::<BITS>(rows, r, 2 * block + 1);
                let to = meta.cast::<f32>().add(row + r);
                to.write_unaligned(scale);
                to.add(rows).write_unaligned(scale * sum as f32);
            }
            let minus_sums = meta.add(8 * rows).cast::<i32>();
            let minus_sums = minus_sums.add(first_part(rows, row, BITS));
            for part in 0..parts(rows.min(2), BITS) {
                let sum = done.sums[part][2 * block] + done.sums[part][2 * block + 1];
                minus_sums
                    .add(part)
                    .write_unaligned(-MINUS_SUMS_OFFSET * sum);
            }
        }
        panel = panel.add(some / 32 * block_bytes);
    }
}

/// Into blocks of 256.
///
/// # Safety
/// As for [`QuantizeFn`].
#[inline(always)]
pub(super) unsafe fn quantize_256<V: Vector, const BITS: u32>(
    x: *const f32,
    stride: usize,
    cols: usize,
    mut panel: *mut u8,
    rows: usize,
    row: usize,
) {
    for first in (0..cols).step_by(256) {
        let run = run_bytes(rows, BITS);
        let x = [x.add(first), x.wrapping_add(stride + first)];
        let done = quantize_256_columns::<V, BITS>(x, 256, 256, (panel, run), (rows, row));
        for r in 0..rows.min(2) {
            let meta = panel.add(8 * run);
            let scale = meta.cast::<f32>().add(row + r);
            let sums_32 = meta.add(4 * rows + 32 * (row + r)).cast::<i16>();
            let sums_16 = meta.add(36 * rows + 32 * (row + r)).cast::<i16>();
            scale.write_unaligned(done.scales[r][0]);
            for i in 0..8 {
                // 16 integers of 1768 at most fit 16 bits.
                let low = done.sum::<BITS>(rows, r, 2 * i) as i16;
                let high = done.sum::<BITS>(rows, r, 2 * i + 1) as i16;
                sums_32.add(pair_order(i)).write_unaligned(low);
                sums_32.add(8 + pair_order(i)).write_unaligned(high);
                sums_16.add(pair_order(2 * i)).write_unaligned(low);
                sums_16.add(pair_order(2 * i + 1)).write_unaligned(high);
            }
        }
        panel = panel.add(block_256_bytes(rows, BITS));
    }
}

/// Where sum `i` stands: 0, 2, 1, 3 within each four.
#[inline(always)]
fn pair_order(i: usize) -> usize {
    i / 4 * 4 + [0, 2, 1, 3][i % 4]
}

/// The one row or the two rows as they are.
///
/// # Safety
/// As for [`QuantizeFn`].
pub(super) unsafe fn copy_f32(
    x: *const f32,
    stride: usize,
    cols: usize,
    panel: *mut u8,
    rows: usize,
    row: usize,
) {
    let panel = panel.cast::<f32>();
    for r in 0..rows.min(2) {
        for col in 0..cols {
            let value = *x.add(r * stride + col);
            panel.add(col * rows + row + r).write_unaligned(value);
        }
    }
}
