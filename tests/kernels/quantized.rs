//! Memory that kernels quantize rows into.

use airstream::device::cpu::Kinds;

/// `QuantizedBlocks` and `Activations` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Blocks {
    q: *const u128,
    scales: *const f32,
    sums: *const u32,
}

/// `QuantizedRows` of `kernels/quantize.h`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct QuantizedRows {
    blocks: [Blocks; 2],
    plain: *const f32,
    rows: u32,
    first: u32,
    cols: u32,
    panel: u32,
}

/// The kinds of blocks, and the values in one.
const BLOCKS: [(Kinds, usize); 2] = [(Kinds::BLOCKS_32, 32), (Kinds::BLOCKS_256, 256)];

/// Rows of some kinds, nothing at first.
#[derive(PartialEq)]
pub struct Quantized {
    rows: usize,
    cols: usize,
    q: [Vec<u128>; 2],
    scales: [Vec<u32>; 2],
    sums: [Vec<u32>; 2],
    pub plain: Vec<f32>,
}

impl Quantized {
    pub fn new(rows: usize, cols: usize, kinds: Kinds) -> Quantized {
        let padded = if rows == 1 {
            1
        } else {
            rows.next_multiple_of(8)
        };
        let values = |kind| match kinds.contains(kind) {
            true => padded * cols,
            false => 0,
        };
        // All ones are no number.
        let words = |count: usize| vec![u32::MAX; count];
        Quantized {
            rows,
            cols,
            q: BLOCKS.map(|(kind, _)| vec![0; 2 * values(kind) / 16]),
            scales: BLOCKS.map(|(kind, block)| words(values(kind) / block)),
            sums: BLOCKS.map(|(kind, _)| words(values(kind) / 32)),
            plain: match kinds.contains(Kinds::F32) {
                true => vec![f32::NAN; rows * cols],
                false => Vec::new(),
            },
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows with those that fill the last panel up.
    pub fn padded(&self) -> u32 {
        match self.rows {
            1 => 1,
            rows => rows.next_multiple_of(8) as u32,
        }
    }

    /// Where the blocks of one kind stand; nowhere if they are not wanted.
    pub fn blocks(&self, kind: Kinds) -> Blocks {
        let place = BLOCKS.iter().position(|&(of, _)| of == kind);
        let i = place.expect("a kind of blocks");
        match self.q[i].is_empty() {
            true => Blocks {
                q: std::ptr::null(),
                scales: std::ptr::null(),
                sums: std::ptr::null(),
            },
            false => Blocks {
                q: self.q[i].as_ptr(),
                scales: self.scales[i].as_ptr().cast(),
                sums: self.sums[i].as_ptr(),
            },
        }
    }

    /// What a kernel is told of it that begins with row `first`.
    pub fn argument(&mut self, first: usize) -> QuantizedRows {
        QuantizedRows {
            blocks: BLOCKS.map(|(kind, _)| self.blocks(kind)),
            plain: match self.plain.is_empty() {
                true => std::ptr::null(),
                false => self.plain.as_ptr(),
            },
            rows: self.rows as u32,
            first: first as u32,
            cols: self.cols as u32,
            panel: if self.rows == 1 { 1 } else { 8 },
        }
    }
}
