//! Attention against a naive softmax in f64.
#![allow(unsafe_code)]

use super::heads::append;
use super::{Random, bits, devices};
use crate::device::cpu::{AttentionRow, AttentionShape, Cpu, KvLayout, KvPlace};
use half::f16;

/// One session's keys and values, positions x `kv_heads` x `head_dim`, and what is asked of them.
struct Case {
    kv_heads: usize,
    head_dim: usize,
    heads: usize,
    positions: usize,
    window: usize,
    softcap: Option<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// One query per position.
    q: Vec<f32>,
}

const SCALE: f32 = 0.125;

impl Case {
    fn new(
        kv_heads: usize,
        group: usize,
        head_dim: usize,
        positions: usize,
        window: usize,
        softcap: Option<f32>,
    ) -> Case {
        let mut random = Random(17 + positions as u64);
        let mut floats = |n| {
            random
                .floats(n)
                .into_iter()
                .map(|x| x * 3.0)
                .collect::<Vec<_>>()
        };
        let (kv, heads) = (positions * kv_heads * head_dim, kv_heads * group);
        let (k, v, q) = (floats(kv), floats(kv), floats(positions * heads * head_dim));
        Case {
            kv_heads,
            head_dim,
            heads,
            positions,
            window,
            softcap,
            k,
            v,
            q,
        }
    }

    fn start(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }

    fn naive(&self, position: usize) -> Vec<f64> {
        let value = |x: f32| f64::from(f16::from_f32(x).to_f32());
        let mut out = Vec::new();
        for head in 0..self.heads {
            let kv = |p: usize| {
                (p * self.kv_heads + head / (self.heads / self.kv_heads)) * self.head_dim
            };
            let q = &self.q[(position * self.heads + head) * self.head_dim..][..self.head_dim];
            let scores = (self.start(position)..=position).map(|p| {
                let dot: f64 = (0..self.head_dim)
                    .map(|d| f64::from(q[d]) * value(self.k[kv(p) + d]))
                    .sum();
                let score = dot * f64::from(SCALE);
                self.softcap.map_or(score, |cap| {
                    (score / f64::from(cap)).tanh() * f64::from(cap)
                })
            });
            let scores: Vec<f64> = scores.collect();
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

    /// The output of every position from `first` on, `batch` of them at a time. Pages that no row
    /// sees are null, and unused memory is NaN.
    fn run(&self, cpu: &Cpu, page_positions: usize, first: usize, batch: usize) -> Vec<f32> {
        let layout = KvLayout {
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            page_positions,
        };
        let nan = f16::NAN.to_bits();
        let mut pages =
            vec![vec![nan; layout.page_bytes() / 2]; self.positions.div_ceil(page_positions)];
        let kv = self.kv_heads * self.head_dim;
        let row = self.heads * self.head_dim;
        let mut out = vec![f32::NAN; (self.positions - first) * row];
        let mut appended = 0;
        for rows in (first..self.positions).collect::<Vec<_>>().chunks(batch) {
            let last = rows[rows.len() - 1];
            let places: Vec<KvPlace> = (appended..=last)
                .map(|p| KvPlace {
                    page: pages[p / page_positions].as_mut_ptr().cast(),
                    index: p % page_positions,
                })
                .collect();
            let new = appended * kv..(last + 1) * kv;
            let kv = (&self.k[new.clone()], &self.v[new]);
            // SAFETY: pages live and have the layout's size.
            unsafe { append(cpu, &layout, &places, kv) };
            appended = last + 1;
            let unseen = self.start(rows[0]) / page_positions;
            let pointers: Vec<*const u8> = (0..pages.len())
                .map(|i| {
                    if i < unseen {
                        std::ptr::null()
                    } else {
                        pages[i].as_ptr().cast()
                    }
                })
                .collect();
            let queries: Vec<AttentionRow> = rows
                .iter()
                .map(|&p| AttentionRow {
                    q: self.q[p * row..].as_ptr(),
                    out: out[(p - first) * row..].as_mut_ptr(),
                    pages: pointers.as_ptr(),
                    position: p as u32,
                    start: self.start(p) as u32,
                })
                .collect();
            let shape = AttentionShape {
                layout,
                heads: self.heads,
                scale: SCALE,
                softcap: self.softcap,
            };
            // SAFETY: as above, and outputs are disjoint.
            unsafe { cpu.attention(&queries, &shape) };
        }
        out
    }
}

#[test]
fn attention_is_a_softmax_and_the_same_for_any_pages_batches_threads_and_instructions() {
    let cases = [
        Case::new(3, 3, 64, 70, usize::MAX, None),
        Case::new(1, 4, 256, 40, 9, None),
        Case::new(2, 7, 80, 37, 17, Some(5.0)),
        Case::new(2, 1, 16, 100, 33, None),
        Case::new(1, 40, 32, 20, usize::MAX, None),
    ];
    for case in cases {
        let mut first_bits = Vec::new();
        for (threads, page_positions, batch) in [(1, 16, 1), (2, 32, 7), (3, 64, 33), (2, 128, 100)]
        {
            for cpu in devices(threads) {
                let out = case.run(&cpu, page_positions, 0, batch);
                if first_bits.is_empty() {
                    first_bits = bits(&out);
                    for (position, out) in out.chunks(case.heads * case.head_dim).enumerate() {
                        for (got, exact) in out.iter().zip(case.naive(position)) {
                            assert!(
                                (f64::from(*got) - exact).abs() < 2e-5,
                                "position {position}: {got} {exact}"
                            );
                        }
                    }
                }
                assert!(
                    bits(&out) == first_bits,
                    "{} threads {threads} page {page_positions} batch {batch}",
                    cpu.isa()
                );
            }
        }
    }
}

#[test]
fn several_sessions_share_a_batch() {
    let (a, b) = (
        Case::new(2, 2, 32, 20, usize::MAX, None),
        Case::new(2, 2, 32, 33, usize::MAX, None),
    );
    let layout = KvLayout {
        kv_heads: 2,
        head_dim: 32,
        page_positions: 64,
    };
    let cpu = devices(2).last().expect("plain Rust is always there");
    let mut pages = [(); 2].map(|()| vec![0_u16; layout.page_bytes() / 2]);
    let mut out = [(); 2].map(|()| vec![0.0; 4 * 32]);
    let mut pointers = Vec::new();
    for (case, page) in [&a, &b].into_iter().zip(&mut pages) {
        let page: *mut u8 = page.as_mut_ptr().cast();
        let place = |index| KvPlace { page, index };
        let places: Vec<KvPlace> = (0..case.positions).map(place).collect();
        // SAFETY: the page lives and has the layout's size.
        unsafe { append(&cpu, &layout, &places, (&case.k, &case.v)) };
        pointers.push(page.cast_const());
    }
    let mut rows = Vec::new();
    for (i, (case, out)) in [&a, &b].into_iter().zip(&mut out).enumerate() {
        let p = case.positions - 1;
        let (q, out) = (case.q[p * 128..].as_ptr(), out.as_mut_ptr());
        rows.push(AttentionRow {
            q,
            out,
            pages: &pointers[i],
            position: p as u32,
            start: 0,
        });
    }
    let shape = AttentionShape {
        layout,
        heads: 4,
        scale: SCALE,
        softcap: None,
    };
    // SAFETY: as above, and outputs are disjoint.
    unsafe { cpu.attention(&rows, &shape) };
    for (case, out) in [&a, &b].into_iter().zip(&out) {
        let alone = case.run(&cpu, 16, case.positions - 1, 1);
        assert_eq!(bits(out), bits(&alone));
    }
}
