//! The ops that end in quantized rows: the CPU's values, rounded as the kernel does that rounds attention. (That
//! this is the CPU's rounding is for the products to show.)

use super::attention::quantize;
use super::launch::{Memory, Runner, launch};
use super::quantized::Quantized;
use super::{ORDERS, assert_same, cpu, floats};
use crate::support::weights::Rng;
use airstream::device::cpu::{Activation, Activations, Added, Cpu, Kinds, Precision, Residual};

/// Rows, columns, and what they are quantized into.
fn shapes() -> [(usize, usize, Kinds); 8] {
    [
        (1, 256, Kinds::ALL),
        (1, 2304, Kinds::F32 | Kinds::BLOCKS_256),
        (1, 576, Kinds::F32 | Kinds::BLOCKS_32),
        (1, 76, Kinds::F32),
        (3, 288, Kinds::F32 | Kinds::BLOCKS_32),
        (9, 1280, Kinds::ALL),
        (2, 2100, Kinds::F32),
        // More than a block that norms it can keep.
        (2, 8192 + 288, Kinds::F32 | Kinds::BLOCKS_32),
    ]
}

/// The one row that the CPU quantizes into plain floats.
fn plain_row(cols: usize, op: impl FnOnce(&Cpu, &mut Activations)) -> Vec<f32> {
    let mut row = vec![f32::NAN; cols + 16];
    // SAFETY: the memory outlives the view and nothing else uses it.
    let mut view =
        unsafe { Activations::new(row.as_mut_ptr().cast(), 4 * row.len(), Precision::Bits12) };
    op(&cpu(), &mut view);
    row.truncate(cols);
    row
}

/// Whether a kernel has rounded what it should have, and has made of it what the other kernel makes of the same values.
fn assert_rounded(
    gpu: &'static dyn Runner,
    got: &Quantized,
    kinds: Kinds,
    expected: &[f32],
    what: &str,
) {
    assert_same(&got.plain(), expected, what);
    let alone = Quantized::new(gpu, expected.len() / got.cols(), got.cols(), kinds);
    quantize(gpu, 0, &Memory::of(gpu, expected), &alone);
    assert!(got.is_same_as(&alone), "{what}: otherwise rounded");
}

#[test]
fn sums_and_norms_are_the_cpus() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(1);
    for (case, (rows, dim, kinds)) in shapes().into_iter().enumerate() {
        for added in 0..3 {
            let x = floats(&mut random, rows * dim);
            let (y, weights) = (
                floats(&mut random, rows * dim),
                floats(&mut random, 2 * dim),
            );
            let (weight, y_weight) = weights.split_at(dim);
            let (mut stream, mut expected) = (x.clone(), Vec::new());
            for (x, y) in stream.chunks_mut(dim).zip(y.chunks(dim)) {
                let weight_of = [None, None, Some(y_weight)][added];
                let residual = Residual {
                    x,
                    added: (added > 0).then_some(Added {
                        y,
                        weight: weight_of,
                    }),
                    weight,
                    eps: 1e-5,
                };
                expected.extend(plain_row(dim, |cpu, into| {
                    cpu.norm_quantize(residual, Kinds::F32, into);
                }));
            }
            let got = Quantized::new(gpu, rows, dim, kinds);
            let [got_stream, y, y_weight, weight] =
                [&x[..], &y, y_weight, weight].map(|values| Memory::of(gpu, values));
            let wanted = |wanted: bool, memory: &Memory<f32>| if wanted { memory.at(0) } else { 0 };
            let threads = 64 * dim.div_ceil(512).clamp(1, 16) as u32;
            launch!(
                gpu, ORDERS[case % 3], "norm_quantize", [got.padded(), 1, 1], threads;
                got_stream.at(0), wanted(added > 0, &y), wanted(added > 1, &y_weight), weight.at(0), 1e-5_f32,
                got.argument(0)
            );
            let what = format!("{rows} x {dim}, {added} added");
            assert_same(&got_stream.values(), &stream, &what);
            assert_rounded(gpu, &got, kinds, &expected, &what);
        }
    }
}

/// Wherever a value stands that is not finite, and where a sum of squares is: the scales of all blocks of the row tell
/// of it, and those of the other rows do not.
#[test]
fn what_is_not_finite_hides_in_no_block() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(5);
    let (rows, dim) = (3, 512);
    for (bad, at) in [
        (f32::NAN, 0),
        (f32::NAN, 131),
        (-f32::NAN, 511),
        (f32::INFINITY, 40),
        (f32::NEG_INFINITY, 300),
        (1e30, 77),
    ] {
        let mut x = floats(&mut random, rows * dim);
        x[dim + at] = bad;
        let weight = vec![1.0; dim];
        let got = Quantized::new(gpu, rows, dim, Kinds::ALL);
        let (x, weight) = (Memory::of(gpu, &x), Memory::of(gpu, &weight));
        launch!(
            gpu, 0, "norm_quantize", [got.padded(), 1, 1], 64;
            x.at(0), 0_u64, 0_u64, weight.at(0), 1e-5_f32, got.argument(0)
        );
        for row in 0..rows {
            let scales = got.scales(row);
            assert_eq!(scales.len(), dim / 32 + dim / 256);
            let sound = scales.iter().all(|scale| scale.is_finite());
            let unsound = scales.iter().all(|scale| !scale.is_finite());
            assert!(
                [sound, unsound][usize::from(row == 1)],
                "{bad} at {at}, row {row}: {scales:?}"
            );
        }
    }
}

#[test]
fn gates_are_the_cpus() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(3);
    for (case, (rows, cols, kinds)) in shapes().into_iter().enumerate() {
        for (activation, kernel) in [
            (Activation::Silu, "silu_quantize"),
            (Activation::GeluTanh, "gelu_tanh_quantize"),
        ] {
            let (mut gate, up) = (
                floats(&mut random, rows * cols),
                floats(&mut random, rows * cols),
            );
            for (i, x) in gate.iter_mut().enumerate() {
                *x *= [0.1, 3.0, 100.0][i % 3];
            }
            let rows_of_both = gate.chunks(cols).zip(up.chunks(cols));
            let expected: Vec<f32> = rows_of_both
                .flat_map(|row| {
                    plain_row(cols, |cpu, into| {
                        cpu.gate_quantize(activation, row, cols, Kinds::F32, into);
                    })
                })
                .collect();
            let got = Quantized::new(gpu, rows, cols, kinds);
            let grid = [cols.div_ceil(512) as u32, got.padded(), 1];
            let (gate, up) = (Memory::of(gpu, &gate), Memory::of(gpu, &up));
            launch!(gpu, ORDERS[case % 3], kernel, grid, 128; gate.at(0), up.at(0), got.argument(0));
            assert_rounded(
                gpu,
                &got,
                kinds,
                &expected,
                &format!("{kernel} {rows} x {cols}"),
            );
        }
    }
}
