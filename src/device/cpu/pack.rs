//! Packing: a strip of 16 rows transposed, so that the 16 lanes of a vector are 16 rows.
//!
//! For each column of quant blocks come first the odd half-words of the 16
//! rows (32 bytes; only for types whose block is an odd number of half-words,
//! whose f16 scale it is), then dword 0 of the 16 rows (64 bytes), dword 1 and
//! so on. Nothing is added, so a strip can be packed where it lies.
#![allow(unsafe_code)]

use crate::format::quant::QuantType;

/// Rows in a strip.
pub(super) const STRIP_ROWS: usize = 16;

/// How a row divides into half-words and dwords.
struct Shape {
    /// Bytes of a block. (Two values of a 16 bit float type count as one.)
    block_bytes: usize,
    /// Where in a block the odd half-word is.
    half_at: Option<usize>,
    /// Where in a block the dwords start.
    dwords_at: usize,
}

impl Shape {
    fn of(qtype: QuantType) -> Shape {
        let block_bytes = qtype.block_bytes().max(4);
        match qtype {
            // The f16 scale stands first.
            QuantType::Q4_0 | QuantType::Q5_0 | QuantType::Q8_0 => {
                Shape { block_bytes, half_at: Some(0), dwords_at: 2 }
            }
            // The f16 scale stands last.
            QuantType::Q3_K | QuantType::Q6_K => {
                Shape { block_bytes, half_at: Some(block_bytes - 2), dwords_at: 0 }
            }
            _ => Shape { block_bytes, half_at: None, dwords_at: 0 },
        }
    }

    fn dwords(&self) -> usize {
        self.block_bytes / 4
    }

    /// Bytes of the half-words of a packed block.
    fn half_bytes(&self) -> usize {
        if self.half_at.is_some() { 2 * STRIP_ROWS } else { 0 }
    }
}

/// Packs `rows` rows (at most 16) of `row_bytes` at `from` into the strip `to`; missing rows are zero.
///
/// # Safety
/// `from` is valid for `rows` rows, `to` for 16; they do not overlap.
pub(super) unsafe fn pack_strip(
    qtype: QuantType,
    row_bytes: usize,
    rows: usize,
    from: *const u8,
    to: *mut u8,
) {
    let shape = Shape::of(qtype);
    let blocks = row_bytes / shape.block_bytes;
    // Rows a power of two apart share cache sets, so stay on each row for some cache lines.
    let chunk = 256_usize.div_ceil(shape.block_bytes);
    // SAFETY: every offset stays within the rows and the strip, whose sizes the caller vouches for.
    unsafe {
        if rows < STRIP_ROWS {
            to.write_bytes(0, STRIP_ROWS * row_bytes);
        }
        for first in (0..blocks).step_by(chunk) {
            for row in 0..rows {
                for block in first..(first + chunk).min(blocks) {
                    let from = from.add(row * row_bytes + block * shape.block_bytes);
                    let to = to.add(STRIP_ROWS * block * shape.block_bytes);
                    if let Some(at) = shape.half_at {
                        let half = from.add(at).cast::<u16>().read_unaligned();
                        to.cast::<u16>().add(row).write_unaligned(half);
                    }
                    let from = from.add(shape.dwords_at).cast::<u32>();
                    let to = to.add(shape.half_bytes()).cast::<u32>().add(row);
                    for dword in 0..shape.dwords() {
                        to.add(STRIP_ROWS * dword).write_unaligned(from.add(dword).read_unaligned());
                    }
                }
            }
        }
    }
}

/// Row `lane` (0..16) of a packed strip, back in GGUF layout, into `out` (one row's bytes).
///
/// `strip` is a whole strip of 16 rows. (A tile's last strip, when it has fewer
/// rows, is never packed.) Panics when the sizes disagree.
pub fn unpack_row(qtype: QuantType, strip: &[u8], lane: usize, out: &mut [u8]) {
    assert!(lane < STRIP_ROWS && strip.len() == STRIP_ROWS * out.len());
    let shape = Shape::of(qtype);
    let packed = strip.chunks_exact(STRIP_ROWS * shape.block_bytes);
    for (block, packed) in out.chunks_exact_mut(shape.block_bytes).zip(packed) {
        let (halves, dwords) = packed.split_at(shape.half_bytes());
        if let Some(at) = shape.half_at {
            block[at..at + 2].copy_from_slice(&halves[2 * lane..2 * lane + 2]);
        }
        let block = block[shape.dwords_at..].chunks_exact_mut(4);
        for (dword, of_16) in block.zip(dwords.chunks_exact(4 * STRIP_ROWS)) {
            dword.copy_from_slice(&of_16[4 * lane..4 * lane + 4]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_comes_back_from_a_packed_strip() {
        for qtype in QuantType::ALL {
            let row_bytes = qtype.row_bytes(3 * 256);
            let rows: Vec<u8> = (0..STRIP_ROWS * row_bytes).map(|i| (i * 31 + i / 251) as u8).collect();
            let mut strip = vec![0; rows.len()];
            // SAFETY: both buffers hold 16 rows.
            unsafe { pack_strip(qtype, row_bytes, 16, rows.as_ptr(), strip.as_mut_ptr()) };
            let mut row = vec![0; row_bytes];
            for lane in 0..STRIP_ROWS {
                unpack_row(qtype, &strip, lane, &mut row);
                assert!(row == rows[lane * row_bytes..][..row_bytes], "{} lane {lane}", qtype.name());
            }
        }
    }
}
