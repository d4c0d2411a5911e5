//! Quantization and products, for every type, width, alignment and batch.

use super::attention::quantize;
use super::launch::{Memory, Runner, launch};
use super::quantized::Quantized;
use super::{ORDERS, assert_same, cpu, floats};
use crate::support::weights::{Rng, random_blocks};
use airstream::device::cpu::{Activations, Kinds, Precision, TileView};
use airstream::device::cuda::driver::{Args, MATMUL_SHARED_BYTES};
use airstream::format::quant::{QuantType, dequantize_row};

/// `Tile` of `kernels/weights.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tile {
    data: u64,
    out: u64,
    rows: u32,
    stride: u32,
    first: u32,
}

/// Weights that begin `lead` bytes behind an address aligned to 16, and end where their last 16 bytes end.
struct Weights {
    memory: Memory<u128>,
    lead: usize,
}

impl Weights {
    fn new(gpu: &'static dyn Runner, bytes: &[u8], lead: usize) -> Weights {
        let mut padded = vec![u8::MAX; (lead + bytes.len()).next_multiple_of(16)];
        padded[lead..][..bytes.len()].copy_from_slice(bytes);
        let word = |bytes: &[u8]| u128::from_le_bytes(bytes.try_into().expect("16 bytes"));
        let words: Vec<u128> = padded.chunks_exact(16).map(word).collect();
        Weights {
            memory: Memory::of(gpu, &words),
            lead,
        }
    }

    /// Where they begin.
    fn data(&self) -> u64 {
        self.memory.at(0) + self.lead as u64
    }
}

/// What the CPU makes of it.
fn on_cpu(qtype: QuantType, weights: &[u8], cols: usize, x: &[f32]) -> Vec<f32> {
    let (rows, batch) = (weights.len() / qtype.row_bytes(cols), x.len() / cols);
    let cpu = cpu();
    let mut memory =
        vec![0_u64; Activations::bytes(batch, cols, Kinds::ALL, Precision::Bits12).div_ceil(8)];
    // SAFETY: the memory outlives the view and nothing else uses it.
    let mut view = unsafe {
        Activations::new(
            memory.as_mut_ptr().cast(),
            memory.len() * 8,
            Precision::Bits12,
        )
    };
    cpu.quantize(x, cols, Kinds::of(qtype), &mut view);
    let (mut weights, mut out) = (weights.to_vec(), vec![f32::NAN; batch * rows]);
    let tile = TileView {
        id: 0,
        data: weights.as_mut_ptr(),
        qtype,
        cols,
        rows,
        packed: false,
        keep: false,
        out: out.as_mut_ptr(),
        out_stride: rows,
    };
    // SAFETY: weights and outputs live and are the tile's.
    unsafe { cpu.matmul(&[tile], &view, &|_, _, _| (), &mut || ()) };
    out
}

/// The kernels' product, the matrix cut into tiles of `tile_rows` rows, each at another alignment.
fn on_gpu(
    gpu: &'static dyn Runner,
    order: u64,
    qtype: QuantType,
    (weights, tile_rows, lead): (&[u8], usize, usize),
    cols: usize,
    x: &[f32],
) -> Vec<f32> {
    let row_bytes = qtype.row_bytes(cols);
    let (rows, batch) = (weights.len() / row_bytes, x.len() / cols);
    let parts: Vec<Weights> = weights
        .chunks(tile_rows * row_bytes)
        .enumerate()
        .map(|(i, tile)| Weights::new(gpu, tile, (lead * (i + 1)) % 16))
        .collect();
    let (x, out) = (
        Memory::of(gpu, x),
        Memory::of(gpu, &vec![f32::NAN; batch * rows]),
    );
    let tiles: Vec<Tile> = parts
        .iter()
        .enumerate()
        .map(|(i, part)| Tile {
            data: part.data(),
            out: out.at(i * tile_rows),
            rows: tile_rows.min(rows - i * tile_rows) as u32,
            stride: rows as u32,
            first: (i * tile_rows) as u32,
        })
        .collect();
    let (table, count) = (Memory::of(gpu, &tiles), tiles.len() as u32);
    let name = qtype.name().to_lowercase();
    let grid = |rows_each: usize, batches: usize| {
        [tile_rows.div_ceil(rows_each) as u32, count, batches as u32]
    };
    if Kinds::of(qtype) == Kinds::F32 {
        let warps = batch.div_ceil(8).min(8);
        let grid = grid(32, batch.div_ceil(8 * warps));
        let name = format!("floats_{name}");
        launch!(gpu, order, &name, grid, 32 * warps as u32; table.at(0), cols as u32, x.at(0), batch as u32);
        return out.values();
    }
    let rows_of_all = rows;
    let rows = Quantized::new(gpu, batch, cols, Kinds::of(qtype));
    quantize(gpu, order, &x, &rows);
    let x = rows.blocks(Kinds::of(qtype));
    if batch == 1 {
        let name = format!("matvec_{name}");
        launch!(gpu, order, &name, grid(8, 1), 128; table.at(0), cols as u32, x);
    } else if batch <= 8 {
        let name = format!("matpanel_{name}");
        launch!(gpu, order, &name, grid(32, 1), 128; table.at(0), cols as u32, x, batch as u32);
    } else if qtype.block_values() == 32 {
        let name = format!("matmul_{name}");
        let args = Args::new()
            .with(table.at(0))
            .with(cols as u32)
            .with(x)
            .with(batch as u32)
            .with(count)
            .with_shared(MATMUL_SHARED_BYTES);
        let grid = [
            rows_of_all.div_ceil(128) as u32,
            1,
            batch.div_ceil(128) as u32,
        ];
        // SAFETY: what the kernel asks for.
        unsafe { gpu.launch(order, &name, grid, 256, &args) };
    } else {
        let name = format!("matmul_{name}");
        let threads = 64 * batch.div_ceil(64).min(4) as u32;
        let grid = grid(64, batch.div_ceil(256));
        launch!(gpu, order, &name, grid, threads; table.at(0), cols as u32, x, batch as u32);
    }
    out.values()
}

/// Activations with blocks of zeros, ties and tiny values among random ones.
fn hard_rows(random: &mut Rng, count: usize) -> Vec<f32> {
    let mut x = floats(random, count);
    for run in x.chunks_mut(16) {
        match random.next() % 12 {
            0 => run.fill(0.0),
            1 => run.iter_mut().for_each(|x| *x *= 1e-6),
            2 => (run[1], run[5]) = (-4.0, 4.0),
            3 => (run[2], run[3]) = (3.5, -3.5),
            4 => run.fill(2.0),
            _ => {}
        }
    }
    x
}

#[test]
fn products_are_the_cpus_bit_for_bit() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(7);
    for qtype in QuantType::ALL {
        let step = if qtype.block_values() == 256 { 256 } else { 32 };
        // (rows, rows of a tile, columns, batch)
        let cases = [
            (1, 16, 1, 1),
            (50, 32, 3, 1),
            (33, 16, if step == 32 { 147 } else { 19 }, 1),
            (17, 16, 2, 2),
            (70, 80, if step == 32 { 19 } else { 3 }, 17),
            (67, 80, if step == 32 { 67 } else { 14 }, 5),
            (20, 16, 1, 131),
        ];
        for (case, (rows, tile_rows, steps, batch)) in cases.into_iter().enumerate() {
            let cols = step * steps;
            let weights = random_blocks(&mut random, qtype, rows * cols, 0.05);
            let x = hard_rows(&mut random, batch * cols);
            let expected = on_cpu(qtype, &weights, cols, &x);
            let matrix = (&weights[..], tile_rows, [0, 2, 7, 14, 1][case % 5]);
            let got = on_gpu(gpu, ORDERS[case % 3], qtype, matrix, cols, &x);
            let what = format!("{} {rows} rows of {cols}, batch {batch}", qtype.name());
            assert_same(&got, &expected, &what);
        }
    }
}

#[test]
fn random_shapes_are_the_cpus_too() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(23);
    for _ in 0..40 {
        let mut below = |n: u64| (random.next() % n) as usize;
        let qtype = QuantType::ALL[below(13)];
        let cols = match qtype.block_values() {
            1 => 1 + below(200),
            32 => 32 * (1 + below(40)),
            _ => 256 * (1 + below(6)),
        };
        // The CPU takes halves in pairs.
        let cols = match qtype {
            QuantType::F16 | QuantType::BF16 => cols.next_multiple_of(2),
            _ => cols,
        };
        let (rows, tile_rows) = (1 + below(60), 16 * (1 + below(3)));
        let (batch, lead, order) = (
            [1, 1 + below(8), 9 + below(16)][below(3)],
            below(16),
            below(5) as u64,
        );
        let weights = random_blocks(&mut random, qtype, rows * cols, 0.05);
        let x = hard_rows(&mut random, batch * cols);
        let got = on_gpu(gpu, order, qtype, (&weights, tile_rows, lead), cols, &x);
        let what = format!(
            "{} {rows} rows of {cols} in tiles of {tile_rows} at {lead}, batch {batch}, order {order}",
            qtype.name()
        );
        assert_same(&got, &on_cpu(qtype, &weights, cols, &x), &what);
    }
}

#[test]
fn more_rows_than_a_block_takes_are_the_cpus_too() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(5);
    for qtype in [QuantType::Q4_0, QuantType::Q2_K] {
        let (cols, batch) = (256, 265);
        let weights = random_blocks(&mut random, qtype, 3 * cols, 0.05);
        let x = hard_rows(&mut random, batch * cols);
        let got = on_gpu(gpu, 1, qtype, (&weights, 3, 2), cols, &x);
        assert_same(&got, &on_cpu(qtype, &weights, cols, &x), qtype.name());
    }
}

#[test]
fn extreme_weights_and_activations_overflow_nothing() {
    let Some(gpu) = crate::runner() else { return };
    for qtype in QuantType::ALL.into_iter().filter(|t| t.block_values() > 1) {
        let cols = 256;
        for byte in [0xff, 0x80, 0x00] {
            let mut weights = vec![byte; 2 * qtype.row_bytes(cols)];
            for block in weights.chunks_exact_mut(qtype.block_bytes()) {
                for at in halves(qtype) {
                    block[*at..at + 2].copy_from_slice(&half::f16::MAX.to_le_bytes());
                }
            }
            for batch in [1, 2, 9] {
                let x: Vec<f32> = (0..batch * cols)
                    .map(|i| if i / cols == 0 { 1e4 } else { -1e4 })
                    .collect();
                let got = on_gpu(gpu, 0, qtype, (&weights, 2, 4), cols, &x);
                let what = format!("{} {byte:#x} batch {batch}", qtype.name());
                assert_same(&got, &on_cpu(qtype, &weights, cols, &x), &what);
            }
        }
    }
}

/// Where in a block the f16 scales are.
fn halves(qtype: QuantType) -> &'static [usize] {
    match qtype {
        QuantType::Q4_0 | QuantType::Q5_0 | QuantType::Q8_0 => &[0],
        QuantType::Q2_K => &[80, 82],
        QuantType::Q3_K => &[108],
        QuantType::Q6_K => &[208],
        _ => &[0, 2],
    }
}

#[test]
fn embeddings_are_the_loaders_bit_for_bit() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(9);
    for qtype in QuantType::ALL {
        let (rows, cols) = (3, 768);
        let weights = random_blocks(&mut random, qtype, rows * cols, 0.05);
        let mut expected = vec![0.0; rows * cols];
        dequantize_row(qtype, &weights, &mut expected);
        let parts: Vec<Weights> = weights
            .chunks(qtype.row_bytes(cols))
            .zip([0, 6, 11])
            .map(|(row, lead)| Weights::new(gpu, row, lead))
            .collect();
        let mut pointers: Vec<u64> = parts.iter().map(Weights::data).collect();
        pointers.push(0);
        expected.extend([7.0; 768]);
        let out = Memory::of(gpu, &vec![7.0_f32; (rows + 1) * cols]);
        let pointers = Memory::of(gpu, &pointers);
        let name = format!("embed_{}", qtype.name().to_lowercase());
        let grid = [(cols / 32).div_ceil(64) as u32, rows as u32 + 1, 1];
        launch!(gpu, 0, &name, grid, 64; pointers.at(0), cols as u32, out.at(0));
        assert_same(&out.values(), &expected, qtype.name());
    }
}
