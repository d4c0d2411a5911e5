//! From matrices to tiles: runs of whole rows that fit in one slot.
//!
//! GGUF tensors do not begin on the disk's blocks, so a tile is read as the
//! enclosing aligned range, and its rows begin [`Tile::lead`] bytes into the slot.

use crate::arena::PAGE_BYTES;
use crate::format::gguf::TensorInfo;
use crate::format::quant::QuantType;

/// Kernels compute this many rows at a time, so tiles are cut at multiples of it.
pub const STRIP_ROWS: usize = 16;
/// The smallest and the largest slot that the planner considers.
pub const SLOT_BYTES_MIN: usize = 64 << 10;
/// See [`SLOT_BYTES_MIN`].
pub const SLOT_BYTES_MAX: usize = 4 << 20;

/// How often a matrix is used, as uses of each tile per sweep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Use {
    /// Every tile in every sweep.
    EverySweep,
    /// Single rows on demand (an embedding table): worth keeping only when all else fits.
    ByRow,
}

/// One weight matrix of the model file, `rows` outputs of `cols` inputs.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// The tensor's name, for errors and listings.
    pub name: String,
    /// How its values are stored.
    pub qtype: QuantType,
    /// Output rows.
    pub rows: usize,
    /// Values in a row.
    pub cols: usize,
    /// Which of the model's files holds it.
    pub file: u16,
    /// Where it begins in that file.
    pub offset: u64,
    /// When it is used.
    pub used: Use,
}

impl Matrix {
    /// The matrix that a tensor holds.
    pub fn new(tensor: &TensorInfo, used: Use) -> Self {
        Matrix {
            name: tensor.name.clone(),
            qtype: tensor.qtype,
            rows: tensor.rows,
            cols: tensor.cols,
            file: tensor.file as u16,
            offset: tensor.offset,
            used,
        }
    }

    /// Bytes of one row in the file.
    pub fn row_bytes(&self) -> usize {
        self.qtype.row_bytes(self.cols)
    }

    /// Bytes of the whole matrix in the file.
    pub fn bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes() as u64
    }

    /// Rows of each of its tiles (but the last) in slots of `slot_bytes`; 0 if not even one strip fits.
    pub fn tile_rows(&self, slot_bytes: usize) -> usize {
        // A tile's first byte is anywhere in its first disk block, so one block of the slot may be lost to the lead.
        let fitting = slot_bytes.saturating_sub(PAGE_BYTES) / self.row_bytes();
        let rows_max = if fitting >= self.rows {
            self.rows
        } else {
            fitting / STRIP_ROWS * STRIP_ROWS
        };
        if rows_max == 0 {
            return 0;
        }
        // Equal tiles rather than full ones and a small rest: every slot is then equally well used.
        self.rows
            .div_ceil(self.rows.div_ceil(rows_max))
            .next_multiple_of(STRIP_ROWS)
            .min(rows_max)
    }
}

/// A run of whole rows of one matrix: what is read, kept and given up as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// Index of its matrix.
    pub matrix: u32,
    /// Its first row in the matrix.
    pub first_row: u32,
    /// How many rows it has.
    pub rows: u32,
    /// Which file it is in.
    pub file: u16,
    /// Where its first row begins in that file.
    pub offset: u64,
    /// Bytes of its rows.
    pub bytes: u32,
}

impl Tile {
    /// Where the aligned range that encloses it begins in the file.
    pub fn read_offset(&self) -> u64 {
        self.offset - self.lead() as u64
    }

    /// Bytes between the start of that range and the tile's first row.
    pub fn lead(&self) -> usize {
        (self.offset % PAGE_BYTES as u64) as usize
    }

    /// Length of that range.
    pub fn read_bytes(&self) -> usize {
        (self.lead() + self.bytes as usize).next_multiple_of(PAGE_BYTES)
    }
}

/// Cuts the matrices into tiles for slots of `slot_bytes`, in order.
///
/// Returns the tiles and, for each matrix, the range of its tiles. Panics if a strip of some
/// matrix does not fit in a slot: the planner chooses slots with [`slot_bytes_min`].
pub fn cut(matrices: &[Matrix], slot_bytes: usize) -> (Vec<Tile>, Vec<std::ops::Range<u32>>) {
    let mut tiles = Vec::new();
    let mut ranges = Vec::with_capacity(matrices.len());
    for (index, matrix) in matrices.iter().enumerate() {
        let tile_rows = matrix.tile_rows(slot_bytes);
        assert!(
            tile_rows > 0,
            "{}: a strip is larger than a slot of {slot_bytes} bytes",
            matrix.name
        );
        let first = tiles.len() as u32;
        for first_row in (0..matrix.rows).step_by(tile_rows) {
            let rows = tile_rows.min(matrix.rows - first_row);
            tiles.push(Tile {
                matrix: index as u32,
                first_row: first_row as u32,
                rows: rows as u32,
                file: matrix.file,
                offset: matrix.offset + (first_row * matrix.row_bytes()) as u64,
                bytes: (rows * matrix.row_bytes()) as u32,
            });
        }
        ranges.push(first..tiles.len() as u32);
    }
    (tiles, ranges)
}

/// The smallest slot that holds a strip of every matrix.
pub fn slot_bytes_min(matrices: &[Matrix]) -> usize {
    let strip = |m: &Matrix| m.rows.min(STRIP_ROWS) * m.row_bytes() + PAGE_BYTES;
    matrices
        .iter()
        .map(strip)
        .max()
        .unwrap_or(0)
        .next_multiple_of(PAGE_BYTES)
        .max(SLOT_BYTES_MIN)
}

/// Chooses the slot size that wastes least memory and still makes long reads.
///
/// `slots_min` is how many slots the memory of `pool_bytes` must at least be divided into (a
/// window of reads, and KV pages, need several even when memory is short). `read_bytes_min` is how
/// long reads should be, if the memory allows it.
pub fn choose_slot_bytes(
    matrices: &[Matrix],
    pool_bytes: usize,
    slots_min: usize,
    read_bytes_min: usize,
) -> usize {
    let smallest = slot_bytes_min(matrices);
    let largest = (pool_bytes / slots_min.max(1) / PAGE_BYTES * PAGE_BYTES)
        .clamp(smallest, SLOT_BYTES_MAX.max(smallest));
    let smallest = smallest
        .max(read_bytes_min.next_multiple_of(PAGE_BYTES))
        .min(largest);
    let weight_bytes: u64 = matrices.iter().map(Matrix::bytes).sum();
    // A read costs about as much as the transfer of this many bytes more, so very short ones lose.
    const READ_OVERHEAD_BYTES: f64 = 16384.0;
    let worth = |slot_bytes: usize| {
        let tiles: usize = matrices
            .iter()
            .map(|m| m.rows.div_ceil(m.tile_rows(slot_bytes)))
            .sum();
        let used = weight_bytes as f64 / (tiles * slot_bytes) as f64;
        used * slot_bytes as f64 / (slot_bytes as f64 + READ_OVERHEAD_BYTES)
    };
    (smallest..=largest)
        .step_by(PAGE_BYTES)
        .max_by(|&a, &b| worth(a).total_cmp(&worth(b)))
        .unwrap_or(smallest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize, offset: u64) -> Matrix {
        Matrix {
            name: "m".into(),
            qtype: QuantType::Q4_0,
            rows,
            cols,
            file: 0,
            offset,
            used: Use::EverySweep,
        }
    }

    #[test]
    fn tiles_cover_every_row_once_and_fit_their_slot() {
        for (rows, cols) in [(16, 32), (100, 4096), (4096, 4096), (1024, 14336), (5, 64)] {
            let matrices = [matrix(rows, cols, 12345 * 32)];
            for slot_bytes in [slot_bytes_min(&matrices), 256 << 10, 1 << 20] {
                let slot_bytes = slot_bytes.max(slot_bytes_min(&matrices));
                let (tiles, ranges) = cut(&matrices, slot_bytes);
                assert_eq!(ranges[0], 0..tiles.len() as u32);
                let mut next = 0;
                for tile in &tiles {
                    assert_eq!(tile.first_row, next);
                    assert!(tile.read_bytes() <= slot_bytes, "{tile:?}");
                    assert_eq!(tile.read_offset() % PAGE_BYTES as u64, 0);
                    next += tile.rows;
                    assert!(
                        next as usize == rows || (tile.rows as usize).is_multiple_of(STRIP_ROWS)
                    );
                }
                assert_eq!(next as usize, rows);
            }
        }
    }

    #[test]
    fn the_chosen_slot_wastes_little_of_an_8b_model() {
        let matrices: Vec<Matrix> = [
            (4096, 4096),
            (1024, 4096),
            (1024, 4096),
            (4096, 4096),
            (14336, 4096),
        ]
        .into_iter()
        .map(|(rows, cols)| matrix(rows, cols, 0))
        .collect();
        let slot_bytes = choose_slot_bytes(&matrices, 2 << 30, 64, 0);
        let (tiles, _) = cut(&matrices, slot_bytes);
        let used: u64 = tiles.iter().map(|t| u64::from(t.bytes)).sum();
        assert!(
            used as f64 / (tiles.len() * slot_bytes) as f64 > 0.97,
            "{slot_bytes}"
        );
        assert!(slot_bytes >= 512 << 10);
        // Long reads are a wish, that the memory may not allow: slots are whole pages all the same.
        for pool_bytes in [(2 << 30) - 12345, (64 << 20) + 777, 1 << 20] {
            for read_bytes_min in [1, 1 << 20, (2 << 20) + 1, 16 << 20] {
                let bytes = choose_slot_bytes(&matrices, pool_bytes, 96, read_bytes_min);
                assert!(bytes.is_multiple_of(PAGE_BYTES) && bytes <= SLOT_BYTES_MAX);
                let allowed = (pool_bytes / 96).max(slot_bytes_min(&matrices));
                assert!(bytes <= allowed, "{bytes} of {allowed}");
                assert!(
                    bytes
                        >= read_bytes_min
                            .min(allowed / PAGE_BYTES * PAGE_BYTES)
                            .min(SLOT_BYTES_MAX)
                );
            }
        }
    }
}
