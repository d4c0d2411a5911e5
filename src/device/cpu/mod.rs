//! The CPU device.
#![allow(unsafe_code)]

mod activations;
mod isa;
mod kv;
mod x86_64;

pub use activations::{Activations, Kinds};
pub use isa::Isa;
pub use kv::{KvLayout, KvRow};

use crate::error::Result;
use crate::format::quant::QuantType;

/// The CPU: a pool of threads and the kernels for its instruction set.
///
/// One thread at a time gives it work (it is `Send`, not `Sync`). No op
/// allocates.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    not_sync: std::marker::PhantomData<std::cell::Cell<()>>,
}

/// A tile to multiply with: a run of whole rows of a weight matrix.
///
/// A tile starts at a multiple of 16 rows of its matrix and holds a multiple
/// of 16 rows, except at the matrix's end.
#[derive(Debug, Clone, Copy)]
pub struct TileView {
    /// The first row's first byte. Any alignment.
    pub data: *mut u8,
    /// How the weights are stored.
    pub qtype: QuantType,
    /// Values per row.
    pub cols: usize,
    /// Rows in the tile.
    pub rows: usize,
    /// The tile has been packed by an earlier `matmul` with `keep`.
    pub packed: bool,
    /// The tile stays in its slot: pack it there, unless it is packed already. The caller then
    /// marks the tile as packed. Its whole strips are no longer in GGUF layout (`unpack_row`).
    pub keep: bool,
    /// The first output: batch row 0, tile row 0.
    pub out: *mut f32,
    /// f32s from one batch row's output to the next one's.
    pub out_stride: usize,
}

/// One query row of attention.
#[derive(Debug, Clone, Copy)]
pub struct AttentionRow {
    /// The query: `heads` x `head_dim`.
    pub q: *const f32,
    /// The output: `heads` x `head_dim`.
    pub out: *mut f32,
    /// The session's pages of this layer; page i holds the positions from i x `page_positions`.
    /// Pages that hold no position of `start..=position` are not touched (null, say).
    pub pages: *const *const u8,
    /// The row's own position, the last one it attends to.
    pub position: u32,
    /// The first position it attends to.
    pub start: u32,
}

/// Which dimensions of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// 2i and 2i + 1 (llama).
    Adjacent,
    /// i and i + half (neox: qwen, gemma).
    Halves,
}

impl Cpu {
    /// A device with `threads` threads (the caller is one of them), whose tiles have rows of at most `row_bytes_max` bytes.
    pub fn new(threads: usize, isa: Isa, row_bytes_max: usize) -> Result<Cpu> {
        let _ = (threads, row_bytes_max);
        Ok(Cpu { isa, not_sync: std::marker::PhantomData })
    }

    /// Bytes of scratch that [`Cpu::new`] allocates: one strip of 16 rows per thread.
    pub const fn scratch_bytes(threads: usize, row_bytes_max: usize) -> usize {
        threads * (16 * row_bytes_max).next_multiple_of(4096)
    }

    /// Threads that work, the caller among them.
    pub fn threads(&self) -> usize {
        unimplemented!()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Whether a matrix of this type and width can be multiplied with; the error says why not.
    pub fn check_matrix(qtype: QuantType, cols: usize) -> Result<()> {
        let _ = (qtype, cols);
        unimplemented!()
    }

    /// Quantizes the rows of `x` (rows x `cols`) into `kinds`.
    pub fn quantize(&self, x: &[f32], cols: usize, kinds: Kinds, into: &mut Activations) {
        let _ = (x, cols, kinds, into);
        unimplemented!()
    }

    /// Multiplies every row of `x` with every tile: `out[row][i] = dot(tile row i, x row)`.
    ///
    /// `poll` is called on this thread now and then, so that reads in flight can be served.
    ///
    /// # Safety
    /// The tiles' data and outputs are valid, disjoint, and nobody else touches them meanwhile.
    pub unsafe fn matmul(&self, tiles: &[TileView], x: &Activations, poll: &mut dyn FnMut()) {
        let _ = (tiles, x, poll);
        unimplemented!()
    }

    /// `out = x / rms(x) * weight` per group of `weight.len()` values (a row, or a head of a row).
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let _ = (x, weight, eps, out);
        unimplemented!()
    }

    /// [`Cpu::rms_norm`] in place.
    pub fn rms_norm_in_place(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        let _ = (x, weight, eps);
        unimplemented!()
    }

    /// `x += y`; `y` may be shorter and is then repeated (a bias for every row).
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        let _ = (x, y);
        unimplemented!()
    }

    /// `x *= factor`.
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        let _ = (x, factor);
        unimplemented!()
    }

    /// `x = cap * tanh(x / cap)`.
    pub fn softcap(&self, x: &mut [f32], cap: f32) {
        let _ = (x, cap);
        unimplemented!()
    }

    /// `gate = silu(gate) * up`.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        let _ = (gate, up);
        unimplemented!()
    }

    /// `gate = gelu(gate) * up`, with the tanh approximation.
    pub fn gelu_tanh_mul(&self, gate: &mut [f32], up: &[f32]) {
        let _ = (gate, up);
        unimplemented!()
    }

    /// Rotates every head of `x` (rows x heads x `head_dim`) by the row's angles.
    ///
    /// `cos` and `sin` are rows x n; the first 2n dimensions of a head rotate.
    pub fn rope(&self, x: &mut [f32], rows: usize, head_dim: usize, cos: &[f32], sin: &[f32], pairing: RopePairing) {
        let _ = (x, rows, head_dim, cos, sin, pairing);
        unimplemented!()
    }

    /// Writes keys and values into their pages.
    ///
    /// # Safety
    /// The pointers are valid for the layout's sizes; no two rows are the same place of the same page.
    pub unsafe fn kv_append(&self, layout: &KvLayout, rows: &[KvRow]) {
        let _ = (layout, rows);
        unimplemented!()
    }

    /// Attention of every row over its pages: softmax of `scale * q.k`, softly capped if `softcap` says so.
    ///
    /// # Safety
    /// The pointers are valid for the layout's sizes; every position of `start..=position` has
    /// been appended; outputs are disjoint.
    pub unsafe fn attention(&self, rows: &[AttentionRow], layout: &KvLayout, heads: usize, scale: f32, softcap: Option<f32>) {
        let _ = (rows, layout, heads, scale, softcap);
        unimplemented!()
    }
}

/// Bytes of row `lane` (0..16) of a packed strip, back in GGUF layout, into `out` (one row's bytes).
///
/// `strip` is a whole strip: 16 rows. A tile's last strip, when it has fewer rows, is never packed.
pub fn unpack_row(qtype: QuantType, cols: usize, strip: &[u8], lane: usize, out: &mut [u8]) {
    let _ = (qtype, cols, strip, lane, out);
    unimplemented!()
}
