//! Matrices: every weight type, shape and way of keeping tiles.
#![allow(unsafe_code)]

use super::oracle::{self, Weights};
use super::{Random, activations, bits, devices};
use crate::device::cpu::matmul::CHUNK_COLS;
use crate::device::cpu::{Activations, Cpu, Kinds, Precision, TileView};
use crate::format::quant::QuantType;

/// A device of each instruction set, at each precision.
fn devices_and_precisions(threads: usize) -> impl Iterator<Item = (Cpu, Precision)> {
    let precisions = Precision::ALL.into_iter();
    precisions.flat_map(move |precision| devices(threads).map(move |cpu| (cpu, precision)))
}

/// Every weight type, at each precision.
fn types_and_precisions() -> impl Iterator<Item = (QuantType, Precision)> {
    let types = QuantType::ALL.into_iter();
    types.flat_map(|qtype| Precision::ALL.map(|precision| (qtype, precision)))
}

/// A matrix in memory, cut into tiles of `tile_rows` rows; `data` starts `offset` bytes in.
struct Matrix {
    qtype: QuantType,
    rows: usize,
    cols: usize,
    tile_rows: usize,
    offset: usize,
    memory: Vec<u8>,
}

impl Matrix {
    fn new(
        qtype: QuantType,
        rows: usize,
        cols: usize,
        tile_rows: usize,
        offset: usize,
        weights: &[u8],
    ) -> Matrix {
        let mut memory = vec![0; offset];
        memory.extend_from_slice(weights);
        Matrix {
            qtype,
            rows,
            cols,
            tile_rows,
            offset,
            memory,
        }
    }

    fn tiles(&mut self, packed: bool, keep: bool, out: &mut [f32]) -> Vec<TileView> {
        assert!(out.len().is_multiple_of(self.rows));
        let row_bytes = self.qtype.row_bytes(self.cols);
        let data = self.memory[self.offset..].as_mut_ptr();
        let first_rows = (0..self.rows).step_by(self.tile_rows);
        first_rows
            .map(|row| TileView {
                id: row as u32,
                // SAFETY: the row is within the matrix.
                data: unsafe { data.add(row * row_bytes) },
                qtype: self.qtype,
                cols: self.cols,
                rows: self.tile_rows.min(self.rows - row),
                packed,
                keep,
                // SAFETY: the row is within the first batch row's output.
                out: unsafe { out.as_mut_ptr().add(row) },
                out_stride: self.rows,
            })
            .collect()
    }

    /// The product with each of `x`, for what the tiles say of themselves.
    fn multiply(&mut self, cpu: &Cpu, x: &Activations, packed: bool, keep: bool) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.rows() * self.rows];
        let tiles = self.tiles(packed, keep, &mut out);
        // SAFETY: tiles and outputs live and are disjoint.
        unsafe { cpu.matmul(&tiles, x, &|_, _, _| (), &mut || ()) };
        out
    }
}

/// What the products of `weights` with rows of `cols` values are, which are rounded to `precision`.
fn expected(
    qtype: QuantType,
    weights: &[u8],
    precision: Precision,
    cols: usize,
    x: &[f32],
) -> Vec<f32> {
    let rows = weights.chunks_exact(qtype.row_bytes(cols));
    let of = |x| {
        rows.clone()
            .map(move |row| oracle::dot(qtype, row, x, precision))
    };
    x.chunks_exact(cols).flat_map(of).collect()
}

/// Activations with zero blocks, ties of both signs and tiny values among random ones.
fn hard_rows(rows: usize, cols: usize, random: &mut Random) -> Vec<f32> {
    let mut x = random.floats(rows * cols);
    for run in x.chunks_mut(16) {
        match random.below(12) {
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
fn products_are_the_oracles_bit_for_bit_on_every_instruction_set() {
    let mut random = Random(7);
    let cpus: Vec<Cpu> = devices(2).collect();
    for (qtype, precision) in types_and_precisions() {
        let step = if qtype.block_values() == 256 { 256 } else { 32 };
        for (case, rows) in [1, 15, 16, 17, 50, 96].into_iter().enumerate() {
            let cols = step * (1 + case % 3);
            let kind = [Weights::Random, Weights::Random, Weights::ZeroScales][case % 3];
            let weights = oracle::weights(qtype, rows, cols, kind, &mut random);
            let batch = [1, 2, 3, 8, 13, 20][case];
            let x = hard_rows(batch, cols, &mut random);
            let (_memory, mut view) = activations(batch, cols, Kinds::ALL, precision);
            let expected = expected(qtype, &weights, precision, cols, &x);
            let offset = [0, 32, 2, 7][case % 4];
            for cpu in &cpus {
                cpu.quantize(&x, cols, Kinds::of(qtype), &mut view);
                let mut matrix = Matrix::new(qtype, rows, cols, 32, offset, &weights);
                for (packed, keep) in [(false, false), (false, true), (true, true), (true, false)] {
                    let got = matrix.multiply(cpu, &view, packed, keep);
                    assert!(
                        bits(&got) == bits(&expected),
                        "{} {} {precision} bits rows {rows} cols {cols} batch {batch} packed {packed} keep {keep}:\n{:?}\n{:?}",
                        cpu.isa(),
                        qtype.name(),
                        &got[..rows.min(16)],
                        &expected[..rows.min(16)],
                    );
                }
            }
        }
    }
}

#[test]
fn extreme_weights_and_activations_overflow_nothing() {
    let mut random = Random(3);
    for (cpu, precision) in devices_and_precisions(1) {
        for qtype in QuantType::ALL {
            for kind in [Weights::Ones, Weights::Zeros, Weights::Lowest] {
                let (rows, cols) = (16, 512);
                let weights = oracle::weights(qtype, rows, cols, kind, &mut random);
                // Panels of 8, 4 and 2 rows, of which each two are as far apart as they can be.
                let batch = 14;
                let signs = [1e4, -1e4].into_iter().cycle().take(batch);
                let x: Vec<f32> = signs.flat_map(|x| vec![x; cols]).collect();
                let (_memory, mut view) = activations(batch, cols, Kinds::ALL, precision);
                cpu.quantize(&x, cols, Kinds::ALL, &mut view);
                let got = Matrix::new(qtype, rows, cols, 16, 0, &weights)
                    .multiply(&cpu, &view, false, false);
                let expected = expected(qtype, &weights, precision, cols, &x);
                assert_eq!(
                    bits(&got),
                    bits(&expected),
                    "{} {} {precision} bits {kind:?}",
                    cpu.isa(),
                    qtype.name()
                );
            }
        }
    }
}

#[test]
fn a_row_is_the_same_in_every_batch_and_with_any_number_of_threads() {
    let mut random = Random(11);
    for (qtype, precision) in types_and_precisions() {
        // More columns than large batches take at once, and a strip that is not whole.
        let (rows, cols) = (19, CHUNK_COLS + 256);
        let weights = oracle::weights(qtype, rows, cols, Weights::Random, &mut random);
        let x = hard_rows(20, cols, &mut random);
        let mut alone = Vec::new();
        for (threads, batch) in [(1, 1), (2, 7), (3, 20), (2, 64 / 4)] {
            for cpu in devices(threads) {
                let (_memory, mut view) = activations(batch, cols, Kinds::of(qtype), precision);
                let mut matrix = Matrix::new(qtype, rows, cols, 48, 0, &weights);
                let mut all = Vec::new();
                for x in x.chunks(batch * cols) {
                    cpu.quantize(x, cols, Kinds::of(qtype), &mut view);
                    all.extend(matrix.multiply(&cpu, &view, false, false));
                }
                if alone.is_empty() {
                    alone = bits(&all);
                }
                assert!(
                    alone == bits(&all),
                    "{} {} {precision} bits batch {batch}",
                    cpu.isa(),
                    qtype.name()
                );
            }
        }
    }
}

#[test]
fn products_are_close_to_those_of_the_values() {
    let mut random = Random(5);
    for (cpu, precision) in devices_and_precisions(1) {
        for qtype in QuantType::ALL {
            let (rows, cols) = (16, 2048);
            let weights = oracle::weights(qtype, rows, cols, Weights::Random, &mut random);
            let x = random.floats(cols);
            let (_memory, mut view) = activations(1, cols, Kinds::ALL, precision);
            cpu.quantize(&x, cols, Kinds::ALL, &mut view);
            let got =
                Matrix::new(qtype, rows, cols, 16, 0, &weights).multiply(&cpu, &view, false, false);
            for (row, got) in weights.chunks_exact(qtype.row_bytes(cols)).zip(got) {
                let values = oracle::values(qtype, row);
                let terms = values.iter().zip(&x).map(|(w, x)| w * f64::from(*x));
                let (exact, norm) = terms.fold((0.0, 0.0), |(s, n), t| (s + t, n + t * t));
                // Rounding moves each activation by up to 1/254 or 1/3536 of the largest, at random.
                let tolerance = match precision {
                    Precision::Bits8 => 0.05,
                    Precision::Bits12 => 0.0036,
                } * f64::sqrt(norm);
                assert!(
                    (exact - f64::from(got)).abs() < tolerance,
                    "{}: {exact} {got}",
                    qtype.name()
                );
            }
        }
    }
}

#[test]
fn a_group_of_tiles_of_several_types_is_multiplied_at_once_and_polled() {
    let mut random = Random(13);
    let cpu = devices(2).last().expect("plain Rust is always there");
    let cols = 256;
    let x = random.floats(3 * cols);
    let (_memory, mut view) = activations(3, cols, Kinds::ALL, Precision::default());
    cpu.quantize(
        &x,
        cols,
        Kinds::of(QuantType::Q4_K) | Kinds::of(QuantType::Q8_0),
        &mut view,
    );
    let data: Vec<_> = [(QuantType::Q4_K, 40), (QuantType::Q8_0, 33)]
        .map(|(qtype, rows)| {
            (
                qtype,
                rows,
                oracle::weights(qtype, rows, cols, Weights::Random, &mut random),
            )
        })
        .into();
    let mut matrices: Vec<_> = data
        .iter()
        .map(|(qtype, rows, weights)| Matrix::new(*qtype, *rows, cols, 16, 0, weights))
        .collect();
    let mut outs: Vec<_> = matrices.iter().map(|m| vec![0.0; 3 * m.rows]).collect();
    let tiles: Vec<_> = matrices
        .iter_mut()
        .zip(&mut outs)
        .flat_map(|(m, out)| m.tiles(false, true, out))
        .collect();
    let mut polls = 0;
    // SAFETY: tiles and outputs live and are disjoint.
    unsafe { cpu.matmul(&tiles, &view, &|_, _, _| (), &mut || polls += 1) };
    assert!(polls > 0);
    for ((qtype, _, weights), out) in data.iter().zip(outs) {
        assert_eq!(
            bits(&out),
            bits(&expected(*qtype, weights, view.precision(), cols, &x))
        );
    }
}

#[test]
fn each_strip_is_inspected_once_as_it_is_in_the_file() {
    let cpu = Cpu::new(
        2,
        crate::device::cpu::Isa::detect(),
        QuantType::Q4_0.row_bytes(256),
    )
    .expect("threads start");
    let mut random = Random(23);
    let (qtype, rows, cols) = (QuantType::Q4_0, 72, 256);
    let weights = oracle::weights(qtype, rows, cols, Weights::Random, &mut random);
    let (_memory, mut view) = activations(1, cols, Kinds::ALL, Precision::default());
    cpu.quantize(&random.floats(cols), cols, Kinds::of(qtype), &mut view);
    for keep in [false, true] {
        let mut matrix = Matrix::new(qtype, rows, cols, 32, 0, &weights);
        for (packed, strips) in [(false, 5), (keep, if keep { 1 } else { 5 })] {
            let mut out = vec![0.0; rows];
            let tiles = matrix.tiles(packed, keep, &mut out);
            let seen = std::sync::Mutex::new(Vec::new());
            let inspect = |id: u32, strip: usize, bytes: &[u8]| {
                let at = id as usize + 16 * strip;
                assert_eq!(bytes, &weights[at * qtype.row_bytes(cols)..][..bytes.len()]);
                seen.lock().expect("no panic before").push(at);
            };
            // SAFETY: tiles and outputs live and are disjoint.
            unsafe { cpu.matmul(&tiles, &view, &inspect, &mut || ()) };
            let mut seen = seen.into_inner().expect("no panic before");
            seen.sort_unstable();
            // Of packed tiles only the strip that stays as it is: the last one, which is shorter.
            assert_eq!(seen, [0, 16, 32, 48, 64][5 - strips..]);
        }
    }
}

/// Wherever it stands, and whatever the weights: all products of its row show it, and none of another row's.
#[test]
fn a_value_that_is_not_finite_hides_nowhere() {
    let mut random = Random(29);
    let (rows, cols, batch) = (17, 512, 10);
    for (cpu, precision) in devices_and_precisions(2) {
        for (case, qtype) in QuantType::ALL.into_iter().enumerate() {
            let weights = oracle::weights(qtype, rows, cols, Weights::Random, &mut random);
            let mut matrix = Matrix::new(qtype, rows, cols, 32, 0, &weights);
            let mut product = |x: &[f32]| {
                let (_memory, mut view) = activations(batch, cols, Kinds::ALL, precision);
                cpu.quantize(x, cols, Kinds::of(qtype), &mut view);
                matrix.multiply(&cpu, &view, false, false)
            };
            let x = random.floats(batch * cols);
            let sound = product(&x);
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let (row, col) = (random.below(batch), random.below(cols));
                let mut x = x.clone();
                x[row * cols + col] = bad;
                let got = product(&x);
                for of in 0..batch {
                    let (got, sound) = (&got[of * rows..][..rows], &sound[of * rows..][..rows]);
                    let what =
                        format!("{} {qtype:?} case {case}: {bad} at {row}, {col}", cpu.isa());
                    match of == row {
                        true => assert!(got.iter().all(|y| !y.is_finite()), "{what}: {got:?}"),
                        false => assert_eq!(bits(got), bits(sound), "{what}: row {of}"),
                    }
                }
            }
        }
    }
}

#[test]
fn widths_that_are_no_whole_blocks_are_refused() {
    assert!(Cpu::check_matrix(QuantType::Q4_K, 576).is_err());
    assert!(Cpu::check_matrix(QuantType::F16, 7).is_err());
    assert!(Cpu::check_matrix(QuantType::Q4_1, 576).is_ok());
    assert!(Cpu::check_matrix(QuantType::F32, 7).is_ok());
}
