//! Queries, keys and values before attention: the CPU's, bit for bit.

use super::launch::{Memory, Runner, launch};
use super::{ORDERS, assert_same, cpu, floats};
use crate::support::weights::Rng;
use airstream::device::cpu::{Heads, KvLayout, KvPlace, RopePairing};
use airstream::device::cuda::driver::Arg;

/// `KvLayout` of `kernels/pages.h`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Layout {
    kv_heads: u32,
    head_dim: u32,
    page_positions: u32,
}
// SAFETY: three words.
unsafe impl Arg for Layout {}

impl Layout {
    pub fn of(layout: &KvLayout) -> Layout {
        Layout {
            kv_heads: layout.kv_heads as u32,
            head_dim: layout.head_dim as u32,
            page_positions: layout.page_positions as u32,
        }
    }
}

/// `KvPlace` of `kernels/pages.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    page: u64,
    index: u64,
}

/// `Heads` of `kernels/place_heads.cu`: addresses.
#[repr(C)]
#[derive(Clone, Copy)]
struct HeadsAt {
    q: u64,
    kv: [u64; 2],
    biases: [u64; 3],
    norms: [u64; 2],
    cos: u64,
    sin: u64,
    places: u64,
}
// SAFETY: pointers.
unsafe impl Arg for HeadsAt {}

fn on_cpu(layout: &KvLayout, pages: &mut [Vec<u16>], heads: Heads<'_>) {
    let count = heads.k.len() / (layout.kv_heads * layout.head_dim);
    let place = |position: usize| KvPlace {
        page: pages[position / layout.page_positions].as_mut_ptr().cast(),
        index: position % layout.page_positions,
    };
    let places: Vec<KvPlace> = (0..count).map(place).collect();
    // SAFETY: the pages have the layout's size, and places differ.
    unsafe { cpu().place_heads(heads, layout, &places) };
}

fn on_gpu(
    gpu: &'static dyn Runner,
    order: u64,
    layout: Layout,
    pages: &[Memory<u16>],
    heads: Heads<'_>,
) {
    let [kv_heads, head_dim, page_positions] =
        [layout.kv_heads, layout.head_dim, layout.page_positions].map(|n| n as usize);
    let rows = heads.k.len() / (kv_heads * head_dim);
    let (q_heads, pairs) = (heads.q.len() / (rows * head_dim), heads.cos.len() / rows);
    let place = |position: usize| Place {
        page: pages[position / page_positions].at(0),
        index: (position % page_positions) as u64,
    };
    let places = Memory::of(gpu, &(0..rows).map(place).collect::<Vec<Place>>());
    let put = |values: &[f32]| Memory::of(gpu, values);
    let (q, k, v) = (put(heads.q), put(heads.k), put(heads.v));
    let (cos, sin) = (put(heads.cos), put(heads.sin));
    let biases = heads.biases.map(|all| all.map(put));
    let norms = heads.norms.map(|both| both.map(put));
    let heads_at = HeadsAt {
        q: q.at(0),
        kv: [k.at(0), v.at(0)],
        biases: biases
            .as_ref()
            .map_or([0; 3], |all| all.each_ref().map(|one| one.at(0))),
        norms: norms
            .as_ref()
            .map_or([0; 2], |both| both.each_ref().map(|one| one.at(0))),
        cos: cos.at(0),
        sin: sin.at(0),
        places: places.at(0),
    };
    let grid = [(q_heads + 2 * kv_heads) as u32, rows as u32, 1];
    let threads = head_dim.next_multiple_of(32).min(256) as u32;
    launch!(
        gpu, order, "place_heads", grid, threads;
        heads_at, layout, q_heads as u32, pairs as u32, u32::from(heads.pairing == RopePairing::Adjacent), heads.eps
    );
    heads.q.copy_from_slice(&q.values());
}

/// Keys and values as they are.
fn only_append<'a>(k: &'a mut [f32], v: &'a mut [f32]) -> Heads<'a> {
    Heads {
        q: &mut [],
        k,
        v,
        biases: None,
        norms: None,
        eps: 0.0,
        cos: &[],
        sin: &[],
        pairing: RopePairing::Halves,
    }
}

/// Has the CPU write all positions' keys and values to pages.
pub fn append_on_cpu(layout: &KvLayout, pages: &mut [Vec<u16>], k: &[f32], v: &[f32]) {
    on_cpu(layout, pages, only_append(&mut k.to_vec(), &mut v.to_vec()));
}

/// Has the kernel do so.
pub fn append_on_gpu(
    gpu: &'static dyn Runner,
    order: u64,
    layout: Layout,
    pages: &[Memory<u16>],
    k: &[f32],
    v: &[f32],
) {
    let (k, v) = (&mut k.to_vec(), &mut v.to_vec());
    on_gpu(gpu, order, layout, pages, only_append(k, v));
}

/// Pages for kernels.
pub fn pages_on_gpu(gpu: &'static dyn Runner, pages: &[Vec<u16>]) -> Vec<Memory<u16>> {
    pages.iter().map(|page| Memory::of(gpu, page)).collect()
}

#[test]
fn heads_before_attention_are_the_cpus() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(2);
    // Rows, heads of queries and of keys, dimensions, pairs.
    let cases = [
        (1, 3, 1, 64, 32),
        (4, 9, 3, 64, 32),
        (3, 2, 2, 80, 20),
        (20, 4, 1, 256, 128),
        (2, 1, 1, 288, 144),
    ];
    for (case, (rows, q_heads, kv_heads, head_dim, pairs)) in cases.into_iter().enumerate() {
        for variant in 0..4 {
            let layout = KvLayout {
                kv_heads,
                head_dim,
                page_positions: 16,
            };
            let (q_dim, kv_dim) = (q_heads * head_dim, kv_heads * head_dim);
            let mut floats = |n| floats(&mut random, n);
            let [q, k, v] = [q_dim, kv_dim, kv_dim].map(|dim| floats(rows * dim));
            let [of_q, of_k, of_v] = [q_dim, kv_dim, kv_dim].map(&mut floats);
            let norms = [head_dim; 2].map(&mut floats);
            let (cos, sin) = (floats(rows * pairs), floats(rows * pairs));
            let heads = |on: &mut dyn FnMut(&mut [Vec<u16>], Heads<'_>)| {
                let (mut q, mut pages) = (q.clone(), vec![vec![0; layout.page_bytes() / 2]; 2]);
                let heads = Heads {
                    q: &mut q,
                    k: &mut k.clone(),
                    v: &mut v.clone(),
                    biases: (variant % 2 == 1).then_some([&of_q[..], &of_k, &of_v]),
                    norms: (variant >= 2).then_some([&norms[0][..], &norms[1]]),
                    eps: 1e-5,
                    cos: &cos,
                    sin: &sin,
                    pairing: [RopePairing::Adjacent, RopePairing::Halves][(case + variant) % 2],
                };
                on(&mut pages, heads);
                (q, pages)
            };
            let expected = heads(&mut |pages, heads| on_cpu(&layout, pages, heads));
            let order = ORDERS[case % 3];
            let got = heads(&mut |pages, heads| {
                let there = pages_on_gpu(gpu, pages);
                on_gpu(gpu, order, Layout::of(&layout), &there, heads);
                for (page, there) in pages.iter_mut().zip(there) {
                    *page = there.values();
                }
            });
            let what = format!("case {case}, variant {variant}");
            assert_same(&got.0, &expected.0, &what);
            assert!(got.1 == expected.1, "{what}: pages");
        }
    }
}
