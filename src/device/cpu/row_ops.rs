//! Ops that end in quantized rows: what they compute is rounded while it is in the first cache, and never
//! written as floats.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use super::Cpu;
use super::activations::{Activations, Kinds, panel_of};
use super::kernels::Kernels;
use super::kv::{AttentionRow, AttentionShape};
use super::matmul::Shared;
use super::quantize::{QuantizeFn, copy_f32};

/// What a gate goes through before it is multiplied with what it gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// Gaussian error unit, tanh approximation.
    GeluTanh,
}

/// The residual stream before a product: what the part before has made is added to it, then it is normed.
#[derive(Debug)]
pub struct Residual<'a> {
    /// rows x dim: the stream.
    pub x: &'a mut [f32],
    /// What is added to it first.
    pub added: Option<Added<'a>>,
    /// dim: the weights of the norm.
    pub weight: &'a [f32],
    /// What keeps the norm of nothing finite.
    pub eps: f32,
}

/// What is added to the residual stream.
#[derive(Debug, Clone, Copy)]
pub struct Added<'a> {
    /// rows x dim: a product.
    pub y: &'a [f32],
    /// dim: the weights of the norm that it goes through before, if it does.
    pub weight: Option<&'a [f32]>,
}

impl Residual<'_> {
    /// Rows, and values of each.
    pub(in crate::device) fn shape(&self) -> (usize, usize) {
        let dim = self.weight.len();
        assert!(self.x.len().is_multiple_of(dim));
        if let Some(Added { y, weight }) = self.added {
            assert_eq!(y.len(), self.x.len());
            assert!(weight.is_none_or(|weight| weight.len() == dim));
        }
        (self.x.len() / dim, dim)
    }
}

/// Columns of two rows that are computed and then rounded at a time: 8 KiB of floats. Whole blocks.
const PIECE_COLS: usize = 1024;

/// So many columns of two rows, computed and not rounded yet.
type Piece = MaybeUninit<[[f32; PIECE_COLS]; 2]>;

/// Rows, or columns: the first one and how many.
type Run = (usize, usize);

/// Activations that are being filled.
struct Rounding<'a> {
    into: &'a Activations,
    kernels: &'static Kernels,
}

impl Rounding<'_> {
    /// Rounds `cols` columns from `col` on, a multiple of 256, of the even row `row` and of the one behind it, if there
    /// is one. Their values stand at `x`, one row's `stride` behind the other's.
    ///
    /// # Safety
    /// The values are there, and nobody else writes these rows' columns.
    unsafe fn put(&self, row: usize, (col, cols): Run, x: *const f32, stride: usize) {
        let (into, precision) = (self.into, self.into.precision() as usize);
        let (first, width) = panel_of(into.rows(), row);
        let put = |kind, quantize: QuantizeFn| {
            if into.kinds().contains(kind) {
                let panel = into.panel(kind, first, width, col);
                // SAFETY: `shape` made room for every panel; the caller vouches for the rest.
                unsafe { quantize(x, stride, cols, panel, width, row - first) }
            }
        };
        put(Kinds::BLOCKS_32, self.kernels.quantize_32[precision]);
        put(Kinds::BLOCKS_256, self.kernels.quantize_256[precision]);
        put(Kinds::F32, copy_f32);
    }
}

impl Cpu {
    /// Calls `work(rounding, (row, rows), (col, cols))` for the pieces of all pairs of rows, over the pool where that pays.
    /// The last row may be single.
    fn pieces(
        &self,
        (rows, cols): (usize, usize),
        kinds: Kinds,
        into: &mut Activations,
        work: impl Fn(&Rounding<'_>, Run, Run) + Sync,
    ) {
        into.shape(rows, cols, kinds);
        let (into, kernels) = (&*into, self.kernels);
        let (pairs, pieces) = (rows.div_ceil(2), cols.div_ceil(PIECE_COLS));
        let values = rows.min(2) * cols.min(PIECE_COLS);
        self.split(pairs * pieces, values, &|first, count| {
            let rounding = Rounding { into, kernels };
            for i in first..first + count {
                let (row, col) = (i / pieces * 2, i % pieces * PIECE_COLS);
                let (rows, cols) = (2.min(rows - row), PIECE_COLS.min(cols - col));
                work(&rounding, (row, rows), (col, cols));
            }
        });
    }

    /// Quantizes the rows of `x` (rows x `cols`) into `kinds`.
    pub fn quantize(&self, x: &[f32], cols: usize, kinds: Kinds, into: &mut Activations) {
        assert!(x.len().is_multiple_of(cols));
        let shape = (x.len() / cols, cols);
        self.pieces(shape, kinds, into, |rounding, (row, _), piece| {
            let x = x[row * cols + piece.0..].as_ptr();
            // SAFETY: the rows are within `x`; each piece is called for once.
            unsafe { rounding.put(row, piece, x, cols) };
        });
    }

    /// [`Cpu::attention`], and quantizes what it gives into `kinds`. The rows' outputs lie one behind the other.
    ///
    /// # Safety
    /// As for attention.
    pub unsafe fn attention_quantize(
        &self,
        rows: &[AttentionRow],
        shape: &AttentionShape,
        kinds: Kinds,
        into: &mut Activations,
    ) {
        let Some(first) = rows.first() else { return };
        let values = shape.row_values();
        let expected = |i: usize| first.out.wrapping_add(i * values);
        let mut places = rows.iter().enumerate();
        assert!(places.all(|(i, row)| row.out == expected(i)), "gaps");
        // SAFETY: what this function asks for; the outputs are written then, and are nobody else's.
        let attended = unsafe {
            self.attention(rows, shape);
            std::slice::from_raw_parts(first.out, rows.len() * values)
        };
        self.quantize(attended, values, kinds, into);
    }

    /// Quantizes `activation(gate) * up` (rows x `cols`) into `kinds`.
    pub fn gate_quantize(
        &self,
        activation: Activation,
        (gate, up): (&[f32], &[f32]),
        cols: usize,
        kinds: Kinds,
        into: &mut Activations,
    ) {
        assert!(gate.len() == up.len() && gate.len().is_multiple_of(cols));
        let kernel = match activation {
            Activation::Silu => self.kernels.silu_mul,
            Activation::GeluTanh => self.kernels.gelu_tanh_mul,
        };
        let shape = (gate.len() / cols, cols);
        self.pieces(shape, kinds, into, |rounding, (row, rows), piece| {
            let mut values = Piece::uninit();
            let values: *mut f32 = values.as_mut_ptr().cast();
            for i in 0..rows {
                let at = (row + i) * cols + piece.0;
                let (gate, up) = (gate[at..].as_ptr(), up[at..].as_ptr());
                // SAFETY: the columns are within both, and these are the piece's two rows.
                unsafe { kernel(gate, up, values.add(i * PIECE_COLS), piece.1) };
            }
            // SAFETY: the values have just been computed; each piece is called for once.
            unsafe { rounding.put(row, piece, values, PIECE_COLS) };
        });
    }

    /// `x += y`, where there is a `y`, in its own norm if it has one; then quantizes `x / rms(x) * weight` into `kinds`.
    pub fn norm_quantize(&self, residual: Residual<'_>, kinds: Kinds, into: &mut Activations) {
        let (rows, dim) = residual.shape();
        into.shape(rows, dim, kinds);
        let (into, kernels) = (&*into, self.kernels);
        let Residual {
            x,
            added,
            weight,
            eps,
        } = residual;
        let x = Shared(x.as_mut_ptr());
        self.split(rows.div_ceil(2), 2 * dim, &|first, count| {
            let x = &x;
            let rounding = Rounding { into, kernels };
            let mut piece = Piece::uninit();
            let piece: *mut f32 = piece.as_mut_ptr().cast();
            let columns = || {
                (0..dim)
                    .step_by(PIECE_COLS)
                    .map(|col| (col, PIECE_COLS.min(dim - col)))
            };
            for row in (first..first + count).map(|pair| 2 * pair) {
                let mut factors = [0.0; 2];
                for (row, factor) in (row..rows).zip(&mut factors) {
                    // SAFETY: the row is within `x` and `y`, and this call's own; a piece has room for its columns.
                    unsafe {
                        let x = x.0.add(row * dim);
                        match added.map(|added| (added.y[row * dim..].as_ptr(), added.weight)) {
                            None => {}
                            Some((y, None)) => (kernels.add)(x, y, dim),
                            Some((y, Some(weight))) => {
                                let factor = (kernels.norm)(y, dim, eps);
                                for (col, cols) in columns() {
                                    let weight = weight[col..].as_ptr();
                                    (kernels.weigh)(y.add(col), factor, weight, piece, cols);
                                    (kernels.add)(x.add(col), piece, cols);
                                }
                            }
                        }
                        *factor = (kernels.norm)(x, dim, eps);
                    }
                }
                for (col, cols) in columns() {
                    for (i, row) in (row..rows).take(2).enumerate() {
                        let weight = weight[col..].as_ptr();
                        // SAFETY: as above; these are the piece's two rows.
                        unsafe {
                            let (x, out) = (x.0.add(row * dim + col), piece.add(i * PIECE_COLS));
                            (kernels.weigh)(x, factors[i], weight, out, cols);
                        }
                    }
                    // SAFETY: the piece has just been filled; each pair is called for once.
                    unsafe { rounding.put(row, (col, cols), piece, PIECE_COLS) };
                }
            }
        });
    }
}
