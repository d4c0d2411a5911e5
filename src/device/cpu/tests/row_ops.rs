//! The ops that end in quantized rows: their values against f64, and their rounding as when the values are quantized by
//! themselves.
#![allow(unsafe_code)]

use super::{Random, activations, bits, close, everywhere};
use crate::device::cpu::activations::panels;
use crate::device::cpu::{Activation, Activations, Added, Cpu, Kinds, Precision, Residual};

/// Rows and columns: single rows and pairs, one piece and several, whole blocks of 256, of 32, and none.
const SHAPES: [(usize, usize); 8] = [
    (1, 64),
    (1, 20_480),
    (2, 288),
    (3, 1024),
    (5, 1024 + 256),
    (13, 2304),
    (40, 2080),
    (6, 1111),
];

/// The plain rows among activations.
fn plain(of: &Activations) -> Vec<f32> {
    let mut rows = vec![0.0; of.rows() * of.cols()];
    for (first, width) in panels(of.rows()) {
        let panel = of.panel(Kinds::F32, first, width, 0).cast::<f32>();
        for (row, col) in (0..width).flat_map(|row| (0..of.cols()).map(move |col| (row, col))) {
            // SAFETY: within the panel.
            let value = unsafe { panel.add(col * width + row).read_unaligned() };
            rows[(first + row) * of.cols() + col] = value;
        }
    }
    rows
}

/// What `op` quantizes, of this shape and on every device: as floats, which rounded by themselves are what it has made
/// of them.
fn quantized(
    (rows, cols): (usize, usize),
    op: impl Fn(&Cpu, Kinds, &mut Activations) -> Vec<f32>,
) -> (Vec<f32>, Vec<f32>) {
    let mut kinds = Kinds::F32;
    for (kind, block) in [(Kinds::BLOCKS_32, 32), (Kinds::BLOCKS_256, 256)] {
        if cols.is_multiple_of(block) {
            kinds = kinds | kind;
        }
    }
    let mut values = everywhere(|cpu| {
        let mut values = Vec::new();
        for precision in Precision::ALL {
            let (memory, mut view) = activations(rows, cols, kinds, precision);
            let also = op(cpu, kinds, &mut view);
            values = plain(&view);
            let (expected, mut view) = activations(rows, cols, kinds, precision);
            cpu.quantize(&values, cols, kinds, &mut view);
            assert!(memory == expected, "{rows} x {cols}, {precision} bits");
            values.extend(also);
        }
        values
    });
    let also = values.split_off(rows * cols);
    (values, also)
}

fn exact_norm(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let squares: f64 = x.iter().map(|x| x * x).sum();
    let factor = 1.0 / (squares / x.len() as f64 + 1e-5).sqrt();
    x.iter()
        .zip(weight)
        .map(|(x, w)| x * factor * f64::from(*w))
        .collect()
}

#[test]
fn what_is_added_to_the_stream_may_be_normed_and_the_stream_is() {
    let mut random = Random(31);
    for (case, (rows, dim)) in SHAPES.into_iter().enumerate() {
        let (x, y) = (random.floats(rows * dim), random.floats(rows * dim));
        let (weight, y_weight) = (random.floats(dim), random.floats(dim));
        let added = [
            None,
            Some(Added {
                y: &y,
                weight: None,
            }),
            Some(Added {
                y: &y,
                weight: Some(&y_weight),
            }),
        ][case % 3];
        let (normed, stream) = quantized((rows, dim), |cpu, kinds, into| {
            let mut x = x.clone();
            let residual = Residual {
                x: &mut x,
                added,
                weight: &weight,
                eps: 1e-5,
            };
            cpu.norm_quantize(residual, kinds, into);
            x
        });
        let (mut exact_stream, mut exact) = (Vec::new(), Vec::new());
        for (x, y) in x.chunks(dim).zip(y.chunks(dim)) {
            let y: Vec<f64> = y.iter().map(|y| f64::from(*y)).collect();
            let y = match added {
                None => vec![0.0; dim],
                Some(Added { weight: None, .. }) => y,
                Some(_) => exact_norm(&y, &y_weight),
            };
            let x: Vec<f64> = x.iter().zip(y).map(|(x, y)| f64::from(*x) + y).collect();
            exact.extend(exact_norm(&x, &weight));
            exact_stream.extend(x);
        }
        close(&stream, exact_stream.into_iter(), 1e-5);
        close(&normed, exact.into_iter(), 1e-5);
        assert_eq!(added.is_none(), bits(&stream) == bits(&x));
    }
}

#[test]
fn gates_are_close_to_exact_ones() {
    let mut random = Random(37);
    for (rows, cols) in SHAPES {
        let gate: Vec<f32> = random
            .floats(rows * cols)
            .iter()
            .map(|x| x * 40.0)
            .collect();
        let up = random.floats(rows * cols);
        let exact = |activation: fn(f64) -> f64| {
            let pairs = gate.iter().zip(&up);
            pairs.map(move |(gate, up)| activation(f64::from(*gate)) * f64::from(*up))
        };
        let of = |activation| {
            let op = |cpu: &Cpu, kinds, into: &mut Activations| {
                cpu.gate_quantize(activation, (&gate, &up), cols, kinds, into);
                Vec::new()
            };
            quantized((rows, cols), op).0
        };
        let silu = exact(|x| x / (1.0 + (-x).exp()));
        close(&of(Activation::Silu), silu, 1e-5);
        let gelu = exact(|x| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        });
        close(&of(Activation::GeluTanh), gelu, 1e-5);
    }
}
