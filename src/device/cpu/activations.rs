//! Activations as the kernels want them: quantized once per row, laid out in panels.
//!
//! Rows are grouped into panels of 8, then at most one panel each of 4, 2 and
//! 1 rows, so that a kernel for R rows walks one pointer and finds all R rows
//! of a quant block at constant distances. One panel of R rows holds, per
//! block:
//!
//! | kind | per block of one panel |
//! |---|---|
//! | [`Kinds::Q12_32`] (block 32) | a run, `scale: [R] f32`, `scaled_sum: [R] f32`, `minus_sum: i32` of each part |
//! | [`Kinds::Q12_256`] (block 256) | 8 runs, `scale: [R] f32`, `sums32: [R][2][8] i16`, `sums16: [R][16] i16` |
//! | [`Kinds::F32`] (block 1) | `x: [R] f32` |
//!
//! A value is an integer `q` of almost 12 bits times the block's scale. ggml
//! rounds activations to 8 bits; that alone moves the distribution of a small
//! model by a KL divergence of 0.003 to 0.007, and by another amount for each
//! order of summation. Four bits more make it 1/200 of that.
//!
//! # Three dot products of bytes for two rows
//!
//! Machines multiply bytes, so an integer of 12 bits stands in parts. A single
//! row has two: `q = 16 coarse + fine`, and a run of 32 columns of it is
//! `[coarse, fine][32] i8`. But the fine part wastes half of its byte, and two
//! rows can share it. Let `a` and `b` be the integers of two neighbouring rows.
//! As 16 and 15 have no common factor, there is one `z` of 240 (-120..=120)
//! that leaves the same rest as `a` when divided by 16, and the same as `b`
//! when divided by 15 (the Chinese remainder theorem). So
//!
//! ```text
//! a = 16 x + z        b = 15 y + z        x, y and z within a byte
//! ```
//!
//! and three dot products of bytes make the exact dot products of both rows,
//! where coarse and fine parts take four. A run of a panel of several rows is
//! `[R / 2][x, y, z][32] i8`. A row's integers, and so its results, do not
//! depend on the rows beside it.
//!
//! The minus sums of a 32-block are what a dot product with a part begins at, for weights that are
//! too large by 8: -8 times the sum of the part's bytes.
//!
//! The sums of a 256-block are of 16 values each. `sums16` has them all, in the
//! order 0, 2, 1, 3 within each four: the order in which two masks pull pairs of
//! 16 bit scales out of a dword. `sums32` has those of the first halves of the 8
//! runs, then those of the second halves, each in that order.
#![allow(unsafe_code)]

use crate::format::quant::QuantType;
use std::ops::BitOr;

/// A single row's integer is `coarse << FINE_BITS` plus a fine part; so is the first one's of two
/// rows `x << FINE_BITS` plus `z`.
pub(super) const FINE_BITS: u32 = 4;
/// The second row's integer of two is `SECOND * y + z`.
pub(super) const SECOND: i32 = (1 << FINE_BITS) - 1;
/// The largest magnitude of an activation's integer. `y` fits a byte up to 15 * 127 - 120 = 1785. A
/// whole block of 256 still sums up exactly in 32 bits: 256 values of Q6_K, 32 x 128 x 1768 each, are
/// the most there can be. (CUDA's kernels have the same number.)
pub(super) const Q_MAX: f32 = 1768.0;

/// What weights are too large by where the minus sums are taken as they are; a power of two.
pub(super) const MINUS_SUMS_OFFSET: i32 = 8;

/// The largest number of rows in a panel.
pub(super) const PANEL_ROWS: usize = 8;

/// A set of activation kinds; which one a matrix needs follows from its weight type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kinds(u8);

impl Kinds {
    /// No kind.
    pub const NONE: Kinds = Kinds(0);
    /// Blocks of 32 values of 12 bits with one scale.
    pub const Q12_32: Kinds = Kinds(1);
    /// Blocks of 256 values of 12 bits with one scale.
    pub const Q12_256: Kinds = Kinds(2);
    /// Plain f32.
    pub const F32: Kinds = Kinds(4);
    /// Every kind.
    pub const ALL: Kinds = Kinds(7);

    /// The kind that weights of `qtype` are multiplied with.
    pub const fn of(qtype: QuantType) -> Kinds {
        match qtype.block_values() {
            1 => Kinds::F32,
            32 => Kinds::Q12_32,
            _ => Kinds::Q12_256,
        }
    }

    /// Whether all of `other` is in this set.
    pub const fn contains(self, other: Kinds) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Kinds {
    type Output = Kinds;
    fn bitor(self, other: Kinds) -> Kinds {
        Kinds(self.0 | other.0)
    }
}

/// Bytes of a run of 32 columns of a panel.
pub(super) const fn run_bytes(rows: usize) -> usize {
    if rows == 1 { 2 * 32 } else { rows / 2 * 3 * 32 }
}

/// Bytes of a Q12_32 block of a panel.
pub(super) const fn block_32_bytes(rows: usize) -> usize {
    run_bytes(rows) + rows * (4 + 4) + run_bytes(rows) / 32 * 4
}

/// Bytes of a Q12_256 block of a panel.
pub(super) const fn block_256_bytes(rows: usize) -> usize {
    8 * run_bytes(rows) + rows * (4 + 2 * 16 + 2 * 16)
}

/// Bytes of `cols` columns of a panel in each kind: Q12_32, Q12_256, F32.
const fn panel_bytes(rows: usize, cols: usize) -> [usize; 3] {
    [
        cols / 32 * block_32_bytes(rows),
        cols / 256 * block_256_bytes(rows),
        rows * cols * 4,
    ]
}

/// Bytes of the panels of `rows` rows in each kind. All panels of several rows have the same bytes per row.
const fn bytes_of_rows(rows: usize, cols: usize) -> [usize; 3] {
    let even = panel_bytes(2, cols);
    let last = panel_bytes(1, cols);
    let mut bytes = [0; 3];
    let mut kind = 0;
    while kind < 3 {
        let all = rows / 2 * even[kind] + rows % 2 * last[kind];
        bytes[kind] = all.next_multiple_of(64);
        kind += 1;
    }
    bytes
}

/// Rows of activations, quantized into the kinds that a group of matrices needs.
///
/// A view of a span of the arena; [`super::Cpu::quantize`] fills it.
#[derive(Debug)]
pub struct Activations {
    base: *mut u8,
    bytes: usize,
    rows: usize,
    cols: usize,
    kinds: Kinds,
}

// SAFETY: the span belongs to this view alone (the contract of `new`); reads from several threads
// happen only while nobody holds it mutably.
unsafe impl Send for Activations {}
// SAFETY: as above.
unsafe impl Sync for Activations {}

impl Activations {
    /// Bytes that a view needs for up to `rows_max` rows of up to `cols_max` values, in `kinds`.
    pub const fn bytes(rows_max: usize, cols_max: usize, kinds: Kinds) -> usize {
        let all = bytes_of_rows(rows_max, cols_max);
        let mut total = 0;
        let mut kind = 0;
        while kind < 3 {
            if kinds.0 & (1 << kind) != 0 {
                total += all[kind];
            }
            kind += 1;
        }
        total
    }

    /// A view over `bytes` bytes at `base`.
    ///
    /// # Safety
    /// The span is valid for reads and writes as long as the view lives, is
    /// aligned to 4 bytes, and nothing else touches it.
    pub unsafe fn new(base: *mut u8, bytes: usize) -> Activations {
        debug_assert!(base.addr().is_multiple_of(4));
        Activations {
            base,
            bytes,
            rows: 0,
            cols: 0,
            kinds: Kinds::NONE,
        }
    }

    /// Rows that the last quantization filled.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Kinds that the last quantization filled.
    pub fn kinds(&self) -> Kinds {
        self.kinds
    }

    /// Sets the shape that is about to be filled. Panics when the span is too small for it.
    pub(super) fn shape(&mut self, rows: usize, cols: usize, kinds: Kinds) {
        let needed = Activations::bytes(rows, cols, kinds);
        assert!(
            needed <= self.bytes,
            "activations of {needed} bytes do not fit a span of {}",
            self.bytes
        );
        (self.rows, self.cols, self.kinds) = (rows, cols, kinds);
    }

    /// The panel of `width` rows from row `first` on, of one `kind`, which must be among those
    /// filled; from column `col` on, the first one of a block of 256 or of all.
    pub(super) fn panel(&self, kind: Kinds, first: usize, width: usize, col: usize) -> *mut u8 {
        assert!(
            self.kinds.contains(kind),
            "the activations were not quantized for this weight type"
        );
        debug_assert!(first.is_multiple_of(2) && first + width <= self.rows && col <= self.cols);
        let all = bytes_of_rows(self.rows, self.cols);
        let index = kind.0.ilog2() as usize;
        let before: usize = (0..index)
            .filter(|i| self.kinds.0 & (1 << i) != 0)
            .map(|i| all[i])
            .sum();
        let rows_before = first / 2 * panel_bytes(2, self.cols)[index];
        let offset = before + rows_before + panel_bytes(width, col)[index];
        // SAFETY: `shape` checked that every kind fits the span.
        unsafe { self.base.add(offset) }
    }
}

/// The panels of `rows` rows: (first row, rows in it) of panel 0, 1, ...
pub(super) fn panels(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut row = 0;
    std::iter::from_fn(move || {
        let width = panel_width(rows - row)?;
        row += width;
        Some((row - width, width))
    })
}

/// Rows of the next panel when `left` rows are left: 8, 4, 2, 1 or none.
fn panel_width(left: usize) -> Option<usize> {
    match left {
        0 => None,
        PANEL_ROWS.. => Some(PANEL_ROWS),
        _ => Some(1 << left.ilog2()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_cover_all_rows_in_order() {
        for rows in 0..40 {
            let mut next = 0;
            for (first, width) in panels(rows) {
                assert_eq!(first, next);
                assert!([1, 2, 4, 8].contains(&width));
                next += width;
            }
            assert_eq!(next, rows);
        }
    }

    #[test]
    fn panels_of_all_kinds_follow_each_other_without_a_gap_or_an_overlap() {
        for rows in 1..40 {
            let cols = 512;
            let bytes = Activations::bytes(rows, cols, Kinds::ALL);
            let mut memory = vec![0_u64; bytes.div_ceil(8)];
            // SAFETY: the memory lives longer than the view.
            let mut view = unsafe { Activations::new(memory.as_mut_ptr().cast(), bytes) };
            view.shape(rows, cols, Kinds::ALL);
            let base = memory.as_ptr().addr();
            let mut next = 0_usize;
            for (index, kind) in [Kinds::Q12_32, Kinds::Q12_256, Kinds::F32]
                .into_iter()
                .enumerate()
            {
                next = next.next_multiple_of(64);
                for (first, width) in panels(rows) {
                    let at = |col| view.panel(kind, first, width, col).addr() - base;
                    assert_eq!(at(0), next);
                    assert_eq!(at(256) - at(0), panel_bytes(width, 256)[index]);
                    next = at(cols);
                }
            }
            assert!(next <= bytes);
        }
    }

    #[test]
    fn fewer_rows_never_take_more_bytes() {
        for rows in 1..40 {
            let of = |rows| Activations::bytes(rows, 1024, Kinds::ALL);
            assert!((1..rows).all(|fewer| of(fewer) <= of(rows)));
        }
    }

    #[test]
    fn kinds_follow_the_weight_type() {
        assert_eq!(Kinds::of(QuantType::F16), Kinds::F32);
        assert_eq!(Kinds::of(QuantType::Q8_0), Kinds::Q12_32);
        assert_eq!(Kinds::of(QuantType::Q6_K), Kinds::Q12_256);
        assert!((Kinds::F32 | Kinds::Q12_32).contains(Kinds::F32));
    }
}
