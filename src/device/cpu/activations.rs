//! Activations as the kernels want them: quantized once per row, laid out in panels.
//!
//! Rows are grouped into panels of 8, then at most one panel each of 4, 2 and
//! 1 rows, so that a kernel for R rows walks one pointer and finds all R rows
//! of a quant block at constant distances. One panel of R rows holds, per
//! block:
//!
//! | kind | per block of one panel |
//! |---|---|
//! | [`Kinds::Q12_32`] (block 32) | `coarse: [R][32] i8`, `fine: [R][32] i8`, `scale: [R] f32`, `scaled_sum: [R] f32`, `minus_sum: [R] i32` |
//! | [`Kinds::Q12_256`] (block 256) | `[8]` times (`coarse: [R][32] i8`, `fine: [R][32] i8`), `scale: [R] f32`, `sums32: [R][2][8] i16`, `sums16: [R][2][16] i16` |
//! | [`Kinds::F32`] (block 1) | `x: [R] f32` |
//!
//! A value is an integer of 12 bits, `q = 16 coarse + fine`, times the block's
//! scale. ggml rounds activations to 8 bits; that alone moves the distribution
//! of a small model by a KL divergence of 0.003 to 0.007, and by another
//! amount for each order of summation. Four bits more make it 1/256 of that,
//! for a second dot product with weights that are in registers already.
//!
//! The sums of 256-blocks (those of the coarse parts, then of the fine ones) stand in the order 0, 2, 1, 3 within each four: the
//! order in which two masks pull pairs of 16 bit scales out of a dword.
#![allow(unsafe_code)]

use crate::format::quant::QuantType;
use std::ops::BitOr;

/// An activation's integer is `coarse << FINE_BITS` plus a fine part.
pub(super) const FINE_BITS: u32 = 4;
/// The largest magnitude of an activation's integer. With it a whole block of 256 still sums up exactly in 32 bits:
/// 256 values of Q6_K, 32 x 128 x 2032 each, are the most there can be.
pub(super) const Q_MAX: f32 = 2032.0;

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

/// Bytes of one row of `cols` values in each kind: Q12_32, Q12_256, F32.
const fn row_bytes(cols: usize) -> [usize; 3] {
    [
        cols / 32 * BLOCK_32_BYTES,
        cols / 256 * BLOCK_256_BYTES,
        cols * 4,
    ]
}

/// Bytes of one row's share of a Q12_32 block.
pub(super) const BLOCK_32_BYTES: usize = 2 * 32 + 4 + 4 + 4;
/// Bytes of one row's share of a Q12_256 block.
pub(super) const BLOCK_256_BYTES: usize = 2 * 256 + 4 + 2 * 16 + 2 * 32;

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
        let row = row_bytes(cols_max);
        let mut total = 0;
        let mut kind = 0;
        while kind < 3 {
            if kinds.0 & (1 << kind) != 0 {
                total += (rows_max * row[kind]).next_multiple_of(64);
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

    /// Start of the first panel of one `kind`, which must be among those filled, and the bytes of one row.
    pub(super) fn kind(&self, kind: Kinds) -> (*mut u8, usize) {
        assert!(
            self.kinds.contains(kind),
            "the activations were not quantized for this weight type"
        );
        let row = row_bytes(self.cols);
        let mut offset = 0;
        let mut index = 0;
        while 1 << index != kind.0 {
            if self.kinds.0 & (1 << index) != 0 {
                offset += (self.rows * row[index]).next_multiple_of(64);
            }
            index += 1;
        }
        // SAFETY: `shape` checked that every kind fits the span.
        (unsafe { self.base.add(offset) }, row[index])
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
    fn kinds_follow_the_weight_type() {
        assert_eq!(Kinds::of(QuantType::F16), Kinds::F32);
        assert_eq!(Kinds::of(QuantType::Q8_0), Kinds::Q12_32);
        assert_eq!(Kinds::of(QuantType::Q6_K), Kinds::Q12_256);
        assert!((Kinds::F32 | Kinds::Q12_32).contains(Kinds::F32));
    }
}
