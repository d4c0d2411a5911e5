//! Activations as the kernels want them: quantized once per row, laid out in panels.
//!
//! Rows are grouped into panels of 8, then at most one panel each of 4, 2 and
//! 1 rows, so that a kernel for R rows walks one pointer and finds all R rows
//! of a quant block at constant distances. One panel of R rows holds, per
//! block:
//!
//! | kind | per block of one panel |
//! |---|---|
//! | [`Kinds::BLOCKS_32`] | a run, `scale: [R] f32`, `scaled_sum: [R] f32`, `minus_sum: i32` of each part |
//! | [`Kinds::BLOCKS_256`] | 8 runs, `scale: [R] f32`, `sums32: [R][2][8] i16`, `sums16: [R][16] i16` |
//! | [`Kinds::F32`] (block 1) | `x: [R] f32` |
//!
//! A value is an integer `q` of 8 or almost 12 bits times the block's scale; the integers stand in parts of
//! a byte each (`precision` says why and how). A run is 32 columns of them: `[group of rows][part][32] i8`.
//! For instruction sets that take two parts at a time (`weights_first`), each two parts stand side by side
//! instead: 8 columns of one and 8 of the other take turns. The last part of an odd number stays as it is.
//! A row's integers, and so its results, do not depend on the rows beside it.
//!
//! The minus sums of a 32-block are what a dot product with a part begins at, for weights that are
//! too large by 8: -8 times the sum of the part's bytes.
//!
//! The sums of a 256-block are of 16 values each. `sums16` has them all, in the
//! order 0, 2, 1, 3 within each four: the order in which two masks pull pairs of
//! 16 bit scales out of a dword. `sums32` has those of the first halves of the 8
//! runs, then those of the second halves, each in that order.
#![allow(unsafe_code)]

use super::precision::{Precision, parts};
use crate::format::quant::QuantType;
use std::ops::BitOr;

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
    /// Blocks of 32 integers with one scale.
    pub const BLOCKS_32: Kinds = Kinds(1);
    /// Blocks of 256 integers with one scale.
    pub const BLOCKS_256: Kinds = Kinds(2);
    /// Plain f32.
    pub const F32: Kinds = Kinds(4);
    /// Every kind.
    pub const ALL: Kinds = Kinds(7);

    /// The kind that weights of `qtype` are multiplied with.
    pub const fn of(qtype: QuantType) -> Kinds {
        match qtype.block_values() {
            1 => Kinds::F32,
            32 => Kinds::BLOCKS_32,
            _ => Kinds::BLOCKS_256,
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
pub(super) const fn run_bytes(rows: usize, bits: u32) -> usize {
    parts(rows, bits) * 32
}

/// Bytes of a block of 32 of a panel.
pub(super) const fn block_32_bytes(rows: usize, bits: u32) -> usize {
    run_bytes(rows, bits) + rows * (4 + 4) + parts(rows, bits) * 4
}

/// Bytes of a block of 256 of a panel.
pub(super) const fn block_256_bytes(rows: usize, bits: u32) -> usize {
    8 * run_bytes(rows, bits) + rows * (4 + 2 * 16 + 2 * 16)
}

/// Bytes of `cols` columns of a panel in each kind: blocks of 32, of 256, F32.
const fn panel_bytes(rows: usize, cols: usize, precision: Precision) -> [usize; 3] {
    [
        cols / 32 * block_32_bytes(rows, precision.bits()),
        cols / 256 * block_256_bytes(rows, precision.bits()),
        rows * cols * 4,
    ]
}

/// Bytes of the panels of `rows` rows in each kind. All panels of several rows have the same bytes per row.
const fn bytes_of_rows(rows: usize, cols: usize, precision: Precision) -> [usize; 3] {
    let even = panel_bytes(2, cols, precision);
    let last = panel_bytes(1, cols, precision);
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
    precision: Precision,
}

// SAFETY: the span belongs to this view alone (the contract of `new`); reads from several threads
// happen only while nobody holds it mutably.
unsafe impl Send for Activations {}
// SAFETY: as above.
unsafe impl Sync for Activations {}

impl Activations {
    /// Bytes that a view needs for up to `rows_max` rows of up to `cols_max` values, in `kinds`.
    pub const fn bytes(
        rows_max: usize,
        cols_max: usize,
        kinds: Kinds,
        precision: Precision,
    ) -> usize {
        let all = bytes_of_rows(rows_max, cols_max, precision);
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

    /// A view over `bytes` bytes at `base`, whose rows will be rounded to `precision`.
    ///
    /// # Safety
    /// The span is valid for reads and writes as long as the view lives, is
    /// aligned to 4 bytes, and nothing else touches it.
    pub unsafe fn new(base: *mut u8, bytes: usize, precision: Precision) -> Activations {
        debug_assert!(base.addr().is_multiple_of(4));
        Activations {
            base,
            bytes,
            rows: 0,
            cols: 0,
            kinds: Kinds::NONE,
            precision,
        }
    }

    /// How finely rows are rounded.
    pub fn precision(&self) -> Precision {
        self.precision
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
        let needed = Activations::bytes(rows, cols, kinds, self.precision);
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
        let all = bytes_of_rows(self.rows, self.cols, self.precision);
        let index = kind.0.ilog2() as usize;
        let before: usize = (0..index)
            .filter(|i| self.kinds.0 & (1 << i) != 0)
            .map(|i| all[i])
            .sum();
        let rows_before = first / 2 * panel_bytes(2, self.cols, self.precision)[index];
        let offset = before + rows_before + panel_bytes(width, col, self.precision)[index];
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

/// The panel that row `row` of `rows` rows is in.
pub(super) fn panel_of(rows: usize, row: usize) -> (usize, usize) {
    let whole = rows - rows % PANEL_ROWS;
    if row < whole {
        return (row - row % PANEL_ROWS, PANEL_ROWS);
    }
    let mut rest = panels(rows - whole).map(|(first, width)| (whole + first, width));
    rest.find(|(first, width)| row < first + width)
        .expect("a row within")
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
                assert!((first..first + width).all(|row| panel_of(rows, row) == (first, width)));
                next += width;
            }
            assert_eq!(next, rows);
        }
    }

    #[test]
    fn panels_of_all_kinds_follow_each_other_without_a_gap_or_an_overlap() {
        for (rows, precision) in (1..40).flat_map(|rows| Precision::ALL.map(|p| (rows, p))) {
            let cols = 512;
            let bytes = Activations::bytes(rows, cols, Kinds::ALL, precision);
            let mut memory = vec![0_u64; bytes.div_ceil(8)];
            // SAFETY: the memory lives longer than the view.
            let mut view =
                unsafe { Activations::new(memory.as_mut_ptr().cast(), bytes, precision) };
            view.shape(rows, cols, Kinds::ALL);
            let base = memory.as_ptr().addr();
            let mut next = 0_usize;
            for (index, kind) in [Kinds::BLOCKS_32, Kinds::BLOCKS_256, Kinds::F32]
                .into_iter()
                .enumerate()
            {
                next = next.next_multiple_of(64);
                for (first, width) in panels(rows) {
                    let at = |col| view.panel(kind, first, width, col).addr() - base;
                    assert_eq!(at(0), next);
                    assert_eq!(at(256) - at(0), panel_bytes(width, 256, precision)[index]);
                    next = at(cols);
                }
            }
            assert!(next <= bytes);
        }
    }

    #[test]
    fn fewer_rows_or_bits_never_take_more_bytes() {
        for rows in 1..40 {
            let of = |rows, precision| Activations::bytes(rows, 1024, Kinds::ALL, precision);
            for precision in Precision::ALL {
                assert!((1..rows).all(|fewer| of(fewer, precision) <= of(rows, precision)));
            }
            assert!(of(rows, Precision::Bits8) < of(rows, Precision::Bits12));
        }
    }

    #[test]
    fn kinds_follow_the_weight_type() {
        assert_eq!(Kinds::of(QuantType::F16), Kinds::F32);
        assert_eq!(Kinds::of(QuantType::Q8_0), Kinds::BLOCKS_32);
        assert_eq!(Kinds::of(QuantType::Q6_K), Kinds::BLOCKS_256);
        assert!((Kinds::F32 | Kinds::BLOCKS_32).contains(Kinds::F32));
    }
}
