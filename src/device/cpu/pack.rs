//! Packing: a strip of 16 rows transposed, so that the 16 lanes of a vector are 16 rows.
//!
//! For each column of quant blocks come first the odd half-words of the 16
//! rows (32 bytes; only for types whose block is an odd number of half-words,
//! whose f16 scale it is), then dword 0 of the 16 rows (64 bytes), dword 1 and
//! so on. Nothing is added, so a strip can be packed where it lies. The fifth
//! bits of Q5_0 and Q5_1 stand in the order that the kernels want them in.
#![allow(unsafe_code)]

use super::vector::Vector;
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
    /// Which of the dwords, if any, has fifth bits of 32 values.
    fifth_bits: Option<usize>,
}

impl Shape {
    fn of(qtype: QuantType) -> Shape {
        let block_bytes = qtype.block_bytes().max(4);
        let fifth_bits = match qtype {
            QuantType::Q5_0 => Some(0),
            QuantType::Q5_1 => Some(1),
            _ => None,
        };
        match qtype {
            // The f16 scale stands first.
            QuantType::Q4_0 | QuantType::Q5_0 | QuantType::Q8_0 => Shape {
                block_bytes,
                half_at: Some(0),
                dwords_at: 2,
                fifth_bits,
            },
            // The f16 scale stands last.
            QuantType::Q3_K | QuantType::Q6_K => Shape {
                block_bytes,
                half_at: Some(block_bytes - 2),
                dwords_at: 0,
                fifth_bits,
            },
            _ => Shape {
                block_bytes,
                half_at: None,
                dwords_at: 0,
                fifth_bits,
            },
        }
    }

    fn dwords(&self) -> usize {
        self.block_bytes / 4
    }

    /// Bytes of the half-words of a packed block.
    fn half_bytes(&self) -> usize {
        if self.half_at.is_some() {
            2 * STRIP_ROWS
        } else {
            0
        }
    }
}

/// Swaps of bits, each of those that are set in a mask with those so many places above them, which
/// together put the fifth bits of values 4j + b and 16 + 4j + b (j < 4) to bits j and 4 + j of byte b:
/// one shift brings four of them where they belong, each in its value's byte.
const SWAPS: [(u32, i32); 4] = [
    (1, 0x2222_2222),
    (3, 0x0a0a_0a0a),
    (6, 0x00cc_00cc),
    (12, 0x0000_f0f0),
];

/// The bits of `x` where one of [`SWAPS`] puts them. It is its own inverse.
fn swap(x: i32, (places, mask): (u32, i32)) -> i32 {
    let differ = (x ^ (x as u32 >> places) as i32) & mask;
    x ^ differ ^ (differ << places)
}

/// All [`SWAPS`] of each lane.
///
/// # Safety
/// The caller is compiled for `V`.
#[inline(always)]
unsafe fn swap_all<V: Vector>(mut x: V::I) -> V::I {
    for (places, mask) in SWAPS {
        // SAFETY: the contract above.
        unsafe {
            let differ = V::and(V::xor(x, V::shr(x, places)), V::splat(mask));
            x = V::xor(x, V::xor(differ, V::shl(differ, places)));
        }
    }
    x
}

/// Packs a strip: (weight type, bytes of a row, rows, from, to). Rows missing from 16 become zero.
pub(super) type PackFn = unsafe fn(QuantType, usize, usize, *const u8, *mut u8);

/// Bytes of a row that are asked for at once, and how far ahead: 16 rows at a distance are more
/// than processors follow by themselves.
const AHEAD_BYTES: usize = 256;

/// See [`PackFn`].
///
/// # Safety
/// `from` is valid for `rows` rows, `to` for 16, and they do not overlap; the caller is compiled
/// for `V`.
#[inline(always)]
pub(super) unsafe fn pack_strip<V: Vector>(
    qtype: QuantType,
    row_bytes: usize,
    rows: usize,
    from: *const u8,
    to: *mut u8,
) {
    let shape = Shape::of(qtype);
    if rows < STRIP_ROWS {
        // SAFETY: the contract above.
        return unsafe { pack_rows(&shape, row_bytes, rows, from, to) };
    }
    let mut asked = 0;
    for at in (0..row_bytes).step_by(shape.block_bytes) {
        // SAFETY: a block of each row lies within the rows and the strip; a prefetch may go anywhere.
        unsafe {
            if at >= asked {
                for row in 0..STRIP_ROWS {
                    let row = from.wrapping_add(row * row_bytes + at + AHEAD_BYTES);
                    (0..AHEAD_BYTES)
                        .step_by(64)
                        .for_each(|line| V::prefetch(row.wrapping_add(line)));
                }
                asked = at + AHEAD_BYTES;
            }
            let (from, to) = (from.add(at), to.add(STRIP_ROWS * at));
            if let Some(at) = shape.half_at {
                for row in 0..STRIP_ROWS {
                    let half = from
                        .add(row * row_bytes + at)
                        .cast::<u16>()
                        .read_unaligned();
                    to.cast::<u16>().add(row).write_unaligned(half);
                }
            }
            let (from, to) = (from.add(shape.dwords_at), to.add(shape.half_bytes()));
            let dwords = shape.dwords();
            if dwords < 4 {
                for row in 0..STRIP_ROWS {
                    let dword = from.add(row * row_bytes).cast::<u32>().read_unaligned();
                    to.cast::<u32>().add(row).write_unaligned(dword);
                }
            } else {
                // The last four may have been done in part: they are done again.
                for dword in (0..dwords).step_by(4).map(|i| i.min(dwords - 4)) {
                    let columns = V::load_columns(from.add(4 * dword), row_bytes);
                    for (i, mut column) in columns.into_iter().enumerate() {
                        if shape.fifth_bits == Some(dword + i) {
                            column = swap_all::<V>(column);
                        }
                        V::store(column, to.add(64 * (dword + i)));
                    }
                }
            }
        }
    }
}

/// As [`pack_strip`], dword by dword.
///
/// # Safety
/// As for [`pack_strip`].
unsafe fn pack_rows(shape: &Shape, row_bytes: usize, rows: usize, from: *const u8, to: *mut u8) {
    // SAFETY: every offset stays within the rows and the strip.
    unsafe {
        to.write_bytes(0, STRIP_ROWS * row_bytes);
        for row in 0..rows {
            for at in (0..row_bytes).step_by(shape.block_bytes) {
                let (from, to) = (from.add(row * row_bytes + at), to.add(STRIP_ROWS * at));
                if let Some(at) = shape.half_at {
                    let half = from.add(at).cast::<u16>().read_unaligned();
                    to.cast::<u16>().add(row).write_unaligned(half);
                }
                let from = from.add(shape.dwords_at).cast::<i32>();
                let to = to.add(shape.half_bytes()).cast::<i32>().add(row);
                for dword in 0..shape.dwords() {
                    let mut x = from.add(dword).read_unaligned();
                    if shape.fifth_bits == Some(dword) {
                        x = SWAPS.into_iter().fold(x, swap);
                    }
                    to.add(STRIP_ROWS * dword).write_unaligned(x);
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
        let of_16 = dwords.chunks_exact(4 * STRIP_ROWS);
        for (i, (dword, of_16)) in block.zip(of_16).enumerate() {
            dword.copy_from_slice(&of_16[4 * lane..4 * lane + 4]);
            if shape.fifth_bits == Some(i) {
                let x = i32::from_le_bytes([dword[0], dword[1], dword[2], dword[3]]);
                let x = SWAPS.into_iter().rev().fold(x, swap);
                dword.copy_from_slice(&x.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::portable::Portable;
    use super::*;

    #[test]
    fn fifth_bits_stand_in_their_values_bytes() {
        for value in 0..32 {
            let (j, byte, high) = (value / 4 % 4, value % 4, value / 16);
            let swapped = SWAPS.into_iter().fold(1 << value, swap);
            assert_eq!(swapped as u32, 1 << (8 * byte + 4 * high + j), "{value}");
        }
    }

    #[test]
    fn every_row_comes_back_from_a_packed_strip() {
        for qtype in QuantType::ALL {
            let row_bytes = qtype.row_bytes(3 * 256);
            let rows: Vec<u8> = (0..STRIP_ROWS * row_bytes)
                .map(|i| (i * 31 + i / 251) as u8)
                .collect();
            let mut strip = vec![0; rows.len()];
            // SAFETY: both buffers hold 16 rows.
            unsafe {
                pack_strip::<Portable>(qtype, row_bytes, 16, rows.as_ptr(), strip.as_mut_ptr())
            };
            let mut row = vec![0; row_bytes];
            for lane in 0..STRIP_ROWS {
                unpack_row(qtype, &strip, lane, &mut row);
                assert!(
                    row == rows[lane * row_bytes..][..row_bytes],
                    "{} lane {lane}",
                    qtype.name()
                );
            }
        }
    }
}
