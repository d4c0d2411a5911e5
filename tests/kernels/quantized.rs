//! Memory that kernels quantize rows into.

use airstream::device::cpu::Kinds;
use airstream::device::cuda::driver::Arg;

use super::launch::{Memory, Runner};

/// `QuantizedBlocks` and `Activations` of the kernels: addresses.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Blocks {
    q: u64,
    scales: u64,
    sums: u64,
}
// SAFETY: three pointers.
unsafe impl Arg for Blocks {}

/// `QuantizedRows` of `kernels/quantize.h`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct QuantizedRows {
    blocks: [Blocks; 2],
    plain: u64,
    rows: u32,
    first: u32,
    cols: u32,
    panel: u32,
}
// SAFETY: as there, without padding.
unsafe impl Arg for QuantizedRows {}

/// The kinds of blocks, and the values in one.
const BLOCKS: [(Kinds, usize); 2] = [(Kinds::BLOCKS_32, 32), (Kinds::BLOCKS_256, 256)];

/// What a row of some kind is quantized into.
struct Parts {
    q: Memory<u128>,
    scales: Memory<u32>,
    sums: Memory<u32>,
}

/// Rows of some kinds, nothing at first.
pub struct Quantized {
    rows: usize,
    cols: usize,
    blocks: [Option<Parts>; 2],
    plain: Option<Memory<f32>>,
}

impl Quantized {
    pub fn new(gpu: &'static dyn Runner, rows: usize, cols: usize, kinds: Kinds) -> Quantized {
        let values = padded(rows) * cols;
        // All ones are no number.
        let words = |count: usize| Memory::of(gpu, &vec![u32::MAX; count]);
        Quantized {
            rows,
            cols,
            blocks: BLOCKS.map(|(kind, block)| {
                kinds.contains(kind).then(|| Parts {
                    q: Memory::of(gpu, &vec![0; 2 * values / 16]),
                    scales: words(values / block),
                    sums: words(values / 32),
                })
            }),
            plain: { kinds.contains(Kinds::F32) }
                .then(|| Memory::of(gpu, &vec![f32::NAN; rows * cols])),
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
        padded(self.rows) as u32
    }

    /// The rows as they are; none unless they are wanted so.
    pub fn plain(&self) -> Vec<f32> {
        self.plain.as_ref().map_or_else(Vec::new, Memory::values)
    }

    /// Whether the same was made of other rows, bit for bit.
    pub fn is_same_as(&self, other: &Quantized) -> bool {
        type Values = (Vec<u128>, Vec<u32>, Vec<u32>);
        let blocks = |of: &Quantized| {
            let values = |p: &Parts| (p.q.values(), p.scales.values(), p.sums.values());
            of.blocks.each_ref().map(|parts| parts.as_ref().map(values))
        };
        let plain = |of: &Quantized| of.plain().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let [mine, others]: [[Option<Values>; 2]; 2] = [self, other].map(blocks);
        mine == others && plain(self) == plain(other)
    }

    /// The scales of all blocks of a row.
    pub fn scales(&self, row: usize) -> Vec<f32> {
        let panel = if self.rows == 1 { 1 } else { 8 };
        let of_kind = |(parts, (_, block)): (&Option<Parts>, (Kinds, usize))| {
            let all = parts
                .as_ref()
                .map_or_else(Vec::new, |parts| parts.scales.values());
            let blocks = if parts.is_some() {
                self.cols / block
            } else {
                0
            };
            let at = move |i: usize| (row / panel * blocks + i) * panel + row % panel;
            (0..blocks).map(move |i| f32::from_bits(all[at(i)]))
        };
        self.blocks.iter().zip(BLOCKS).flat_map(of_kind).collect()
    }

    /// Where the blocks of one kind stand; nowhere if they are not wanted.
    pub fn blocks(&self, kind: Kinds) -> Blocks {
        let place = BLOCKS.iter().position(|&(of, _)| of == kind);
        let parts = self.blocks[place.expect("a kind of blocks")].as_ref();
        let at = |parts: &Parts| Blocks {
            q: parts.q.at(0),
            scales: parts.scales.at(0),
            sums: parts.sums.at(0),
        };
        let nowhere = Blocks {
            q: 0,
            scales: 0,
            sums: 0,
        };
        parts.map_or(nowhere, at)
    }

    /// What a kernel is told of it that begins with row `first`.
    pub fn argument(&self, first: usize) -> QuantizedRows {
        QuantizedRows {
            blocks: BLOCKS.map(|(kind, _)| self.blocks(kind)),
            plain: self.plain.as_ref().map_or(0, |plain| plain.at(0)),
            rows: self.rows as u32,
            first: first as u32,
            cols: self.cols as u32,
            panel: if self.rows == 1 { 1 } else { 8 },
        }
    }
}

/// Rows with those that fill the last panel up.
fn padded(rows: usize) -> usize {
    match rows {
        1 => 1,
        rows => rows.next_multiple_of(8),
    }
}
