//! Keys, values and attention: the CPU's within one split, exact arithmetic to compare with beyond.

use super::heads::{Layout, append_on_cpu, append_on_gpu, pages_on_gpu};
use super::launch::{Memory, Runner, launch};
use super::quantized::Quantized;
use super::{ORDERS, assert_same, cpu, floats};
use crate::support::weights::Rng;
use airstream::device::cpu::{AttentionRow, AttentionShape, Kinds, KvLayout};
use airstream::device::cuda::driver::Arg;
use half::f16;

/// `SPLIT` of `kernels/attention.h`.
const SPLIT: usize = 256;
const SCALE: f32 = 0.125;

#[repr(C)]
#[derive(Clone, Copy)]
struct Row {
    pages: u64,
    start: u32,
    position: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Unit {
    first_row: u32,
    rows: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    layout: Layout,
    heads: u32,
    unit_heads: u32,
    scale: f32,
    softcap: f32,
    splits_max: u32,
}
// SAFETY: eight words.
unsafe impl Arg for Shape {}

/// Has the kernel put splits of the rows together that begin with `first`, from where each stands, and quantize them.
fn join(
    gpu: &'static dyn Runner,
    order: u64,
    shape: Shape,
    (rows, out, partial): (&[Row], u64, u64),
    first: usize,
    into: &Quantized,
) {
    let end = first + rows.len();
    let filling = if end == into.rows() {
        into.padded() as usize - end
    } else {
        0
    };
    let grid = [
        (into.cols() as u32).div_ceil(256),
        (rows.len() + filling) as u32,
        1,
    ];
    if grid[1] > 0 {
        let rows = Memory::of(gpu, rows);
        launch!(
            gpu, order, "join_quantize", grid, 64;
            shape, rows.at(0), out, partial, into.argument(first)
        );
    }
}

/// Has the kernel quantize rows, as if attention had given them.
pub fn quantize(gpu: &'static dyn Runner, order: u64, x: &Memory<f32>, into: &Quantized) {
    let row = Row {
        pages: 0,
        start: 0,
        position: 0,
    };
    let layout = KvLayout {
        kv_heads: 1,
        head_dim: into.cols(),
        page_positions: 16,
    };
    let shape = Shape {
        layout: Layout::of(&layout),
        heads: 1,
        unit_heads: 1,
        scale: 1.0,
        softcap: 0.0,
        splits_max: 1,
    };
    let rows = vec![row; into.rows()];
    join(gpu, order, shape, (&rows, x.at(0), 0), 0, into);
}

/// One session: keys and values of all positions, and a query for each.
struct Case {
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    positions: usize,
    window: usize,
    softcap: Option<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

impl Case {
    fn new(shape: [usize; 4], window: usize, softcap: Option<f32>) -> Case {
        let [kv_heads, group, head_dim, positions] = shape;
        let mut random = Rng(positions as u64);
        let mut three = |n| {
            floats(&mut random, n)
                .into_iter()
                .map(|x| 3.0 * x)
                .collect::<Vec<f32>>()
        };
        let kv = positions * kv_heads * head_dim;
        let (k, v, q) = (three(kv), three(kv), three(kv * group));
        Case {
            kv_heads,
            group,
            head_dim,
            positions,
            window,
            softcap,
            k,
            v,
            q,
        }
    }

    fn layout(&self, page_positions: usize) -> KvLayout {
        KvLayout {
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            page_positions,
        }
    }

    fn start(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }

    fn row_values(&self) -> usize {
        self.kv_heads * self.group * self.head_dim
    }

    /// Pages with every position; what holds none is not a number.
    fn pages(&self, page_positions: usize) -> Vec<Vec<u16>> {
        let halves = self.layout(page_positions).page_bytes() / 2;
        vec![vec![f16::NAN.to_bits(); halves]; self.positions.div_ceil(page_positions)]
    }

    fn on_cpu(&self, first: usize, page_positions: usize) -> (Vec<Vec<u16>>, Vec<f32>) {
        let mut pages = self.pages(page_positions);
        append_on_cpu(&self.layout(page_positions), &mut pages, &self.k, &self.v);
        let layout = self.layout(page_positions);
        let pointers: Vec<*const u8> = pages.iter().map(|p| p.as_ptr().cast()).collect();
        let mut out = vec![f32::NAN; (self.positions - first) * self.row_values()];
        let queries: Vec<AttentionRow> = (first..self.positions)
            .map(|p| AttentionRow {
                q: self.q[p * self.row_values()..].as_ptr(),
                out: out[(p - first) * self.row_values()..].as_mut_ptr(),
                pages: pointers.as_ptr(),
                position: p as u32,
                start: self.start(p) as u32,
            })
            .collect();
        let shape = AttentionShape {
            layout,
            heads: self.kv_heads * self.group,
            scale: SCALE,
            softcap: self.softcap,
        };
        // SAFETY: pages and rows live and have the layout's sizes, and outputs are disjoint.
        unsafe {
            cpu().attention(&queries, &shape);
        }
        (pages, out)
    }

    /// Rows from `first` on, in units of at most `unit_rows` rows.
    fn on_gpu(
        &self,
        gpu: &'static dyn Runner,
        order: u64,
        first: usize,
        page_positions: usize,
        unit_rows: usize,
    ) -> (Vec<Vec<u16>>, Vec<f32>) {
        let pages = pages_on_gpu(gpu, &self.pages(page_positions));
        let layout = Layout::of(&self.layout(page_positions));
        append_on_gpu(gpu, order, layout, &pages, &self.k, &self.v);

        // Pages that no row sees may be missing.
        let unseen = self.start(first) / page_positions;
        let page = |(i, page): (usize, &Memory<u16>)| if i < unseen { 0 } else { page.at(0) };
        let pointers: Vec<u64> = pages.iter().enumerate().map(page).collect();
        let pointers = Memory::of(gpu, &pointers);
        let rows: Vec<Row> = (first..self.positions)
            .map(|p| Row {
                pages: pointers.at(0),
                start: self.start(p) as u32,
                position: p as u32,
            })
            .collect();
        let heads = self.kv_heads * self.group;
        let unit_heads = self.group.min(8);
        let unit_rows = unit_rows.min(32 / unit_heads);
        let units: Vec<Unit> = (0..rows.len())
            .step_by(unit_rows)
            .map(|row| Unit {
                first_row: row as u32,
                rows: unit_rows.min(rows.len() - row) as u32,
            })
            .collect();
        let splits = |from: u32, to: u32| to as usize / SPLIT - from as usize / SPLIT + 1;
        let splits_max = rows
            .iter()
            .map(|r| splits(r.start, r.position))
            .max()
            .expect("rows");
        let unit_splits = units
            .iter()
            .map(|u| {
                splits(
                    rows[u.first_row as usize].start,
                    rows[(u.first_row + u.rows) as usize - 1].position,
                )
            })
            .max()
            .expect("units");
        let shape = Shape {
            layout,
            heads: heads as u32,
            unit_heads: unit_heads as u32,
            scale: SCALE,
            softcap: self.softcap.unwrap_or(0.0),
            splits_max: splits_max as u32,
        };
        let (values, row_partial) = (self.row_values(), heads * splits_max * (self.head_dim + 2));
        let nothing = |count: usize| Memory::of(gpu, &vec![f32::NAN; count]);
        let (partial, out) = (
            nothing(rows.len() * row_partial),
            nothing(rows.len() * values),
        );
        let q = Memory::of(gpu, &self.q[first * values..]);
        let parts = self.kv_heads * self.group.div_ceil(unit_heads);
        let grid = [unit_splits as u32, parts as u32, units.len() as u32];
        let (unit_table, row_table) = (Memory::of(gpu, &units), Memory::of(gpu, &rows));
        launch!(
            gpu, order, "attend", grid, 256;
            shape, unit_table.at(0), row_table.at(0), q.at(0), out.at(0), partial.at(0)
        );
        let joined = Quantized::new(gpu, rows.len(), values, Kinds::F32);
        let half = rows.len() / 2;
        for (from, to) in [(0, half), (half, rows.len())] {
            let places = (
                &rows[from..to],
                out.at(from * values),
                partial.at(from * row_partial),
            );
            join(gpu, order, shape, places, from, &joined);
        }
        let pages = pages.iter().map(Memory::values).collect();
        (pages, joined.plain())
    }

    fn exact(&self, position: usize) -> Vec<f64> {
        let value = |x: f32| f64::from(f16::from_f32(x).to_f32());
        let mut out = Vec::new();
        for head in 0..self.kv_heads * self.group {
            let kv = |p: usize| (p * self.kv_heads + head / self.group) * self.head_dim;
            let q = &self.q[position * self.row_values() + head * self.head_dim..][..self.head_dim];
            let score = |p: usize| {
                let dot: f64 = (0..self.head_dim)
                    .map(|d| f64::from(q[d]) * value(self.k[kv(p) + d]))
                    .sum();
                let score = dot * f64::from(SCALE);
                self.softcap
                    .map_or(score, |c| (score / f64::from(c)).tanh() * f64::from(c))
            };
            let scores: Vec<f64> = (self.start(position)..=position).map(score).collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..self.head_dim {
                let weighted = weights.iter().enumerate();
                let dot: f64 = weighted
                    .map(|(i, w)| w * value(self.v[kv(self.start(position) + i) + d]))
                    .sum();
                out.push(dot / sum);
            }
        }
        out
    }
}

#[test]
fn attention_within_a_split_is_the_cpus_bit_for_bit() {
    let Some(gpu) = crate::runner() else { return };
    let cases = [
        (Case::new([3, 3, 64, 70], usize::MAX, None), 50),
        (Case::new([1, 4, 256, 40], 9, None), 20),
        (Case::new([2, 7, 80, 37], 17, Some(5.0)), 0),
        (Case::new([2, 1, 16, 100], 33, None), 80),
        (Case::new([1, 20, 32, 20], usize::MAX, None), 10),
        (Case::new([1, 2, 288, 20], usize::MAX, None), 15),
    ];
    for (i, (case, first)) in cases.iter().enumerate() {
        for (page_positions, unit_rows) in [(16, 1), (64, 8)] {
            let (pages, expected) = case.on_cpu(*first, page_positions);
            let (got_pages, got) =
                case.on_gpu(gpu, ORDERS[i % 3], *first, page_positions, unit_rows);
            assert!(pages == got_pages, "case {i}: pages");
            assert_same(
                &got,
                &expected,
                &format!("case {i} page {page_positions} unit {unit_rows}"),
            );
        }
    }
}

#[test]
fn attention_of_random_shapes_is_the_cpus_too() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(29);
    for i in 0..10 {
        let mut below = |n: u64| (random.next() % n) as usize;
        let shape = [
            1 + below(3),
            1 + below(10),
            16 * (1 + below(8)),
            1 + below(60),
        ];
        let window = [usize::MAX, 1 + below(40)][below(2)];
        let softcap = [None, Some(4.0)][below(2)];
        let (first, page) = (below(shape[3] as u64), 16 * (1 + below(4)));
        let (unit, order) = (1 + below(32), below(4) as u64);
        let case = Case::new(shape, window, softcap);
        let (_, expected) = case.on_cpu(first, page);
        let (_, got) = case.on_gpu(gpu, order, first, page, unit);
        let what = format!("case {i}: {shape:?}, window {window}, {softcap:?}, from {first}");
        assert_same(&got, &expected, &what);
    }
}

#[test]
fn several_splits_are_exact_enough_and_the_same_in_every_batch() {
    let Some(gpu) = crate::runner() else { return };
    let cases = [
        (Case::new([1, 2, 32, 700], usize::MAX, None), 697),
        (Case::new([2, 1, 16, 530], 300, Some(8.0)), 500),
    ];
    for (case, first) in cases {
        let (_, together) = case.on_gpu(gpu, 7919, first, 64, 8);
        let (_, apart) = case.on_gpu(gpu, 1, first, 48, 1);
        assert_same(&together, &apart, "together and apart");
        let (_, last) = case.on_gpu(gpu, 0, case.positions - 1, 128, 1);
        assert_same(
            &together[together.len() - case.row_values()..],
            &last,
            "alone",
        );
        for (i, got) in together.chunks(case.row_values()).enumerate() {
            for (got, exact) in got.iter().zip(case.exact(first + i)) {
                assert!((f64::from(*got) - exact).abs() < 2e-5, "{got} {exact}");
            }
        }
    }
}
