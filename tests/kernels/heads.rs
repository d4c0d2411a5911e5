//! Queries, keys and values before attention: the CPU's, bit for bit.

use super::launch::launch;
use super::shim::Shim;
use super::weights::Rng;
use super::{ORDERS, assert_same, cpu, floats};
use airstream::device::cpu::{Heads, KvLayout, KvPlace, RopePairing};

/// `KvLayout` of `kernels/pages.h`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Layout {
    kv_heads: u32,
    head_dim: u32,
    page_positions: u32,
}

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
    page: *mut u8,
    index: u64,
}

/// `Heads` of `kernels/place_heads.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct HeadsAt {
    q: *mut f32,
    kv: [*const f32; 2],
    biases: [*const f32; 3],
    norms: [*const f32; 2],
    cos: *const f32,
    sin: *const f32,
    places: *const Place,
}

/// The place of each position in pages that follow each other.
fn places(pages: &mut [Vec<u16>], page_positions: usize, count: usize) -> Vec<KvPlace> {
    let place = |position: usize| KvPlace {
        page: pages[position / page_positions].as_mut_ptr().cast(),
        index: position % page_positions,
    };
    (0..count).map(place).collect()
}

fn on_cpu(layout: &KvLayout, pages: &mut [Vec<u16>], heads: Heads<'_>) {
    let count = heads.k.len() / (layout.kv_heads * layout.head_dim);
    let places = places(pages, layout.page_positions, count);
    // SAFETY: the pages have the layout's size, and places differ.
    unsafe { cpu().place_heads(heads, layout, &places) };
}

fn on_gpu(shim: &Shim, order: u64, layout: Layout, pages: &mut [Vec<u16>], heads: Heads<'_>) {
    let [kv_heads, head_dim, page_positions] =
        [layout.kv_heads, layout.head_dim, layout.page_positions].map(|n| n as usize);
    let rows = heads.k.len() / (kv_heads * head_dim);
    let (q_heads, pairs) = (heads.q.len() / (rows * head_dim), heads.cos.len() / rows);
    let places: Vec<Place> = places(pages, page_positions, rows)
        .iter()
        .map(|place| Place {
            page: place.page,
            index: place.index as u64,
        })
        .collect();
    let heads_at = HeadsAt {
        q: heads.q.as_mut_ptr(),
        kv: [heads.k.as_ptr(), heads.v.as_ptr()],
        biases: heads
            .biases
            .map_or([std::ptr::null(); 3], |all| all.map(<[f32]>::as_ptr)),
        norms: heads
            .norms
            .map_or([std::ptr::null(); 2], |all| all.map(<[f32]>::as_ptr)),
        cos: heads.cos.as_ptr(),
        sin: heads.sin.as_ptr(),
        places: places.as_ptr(),
    };
    let grid = [(q_heads + 2 * kv_heads) as u32, rows as u32, 1];
    let threads = head_dim.next_multiple_of(32).min(256) as u32;
    launch!(
        shim, order, "place_heads", grid, threads;
        heads_at, layout, q_heads as u32, pairs as u32, u32::from(heads.pairing == RopePairing::Adjacent), heads.eps
    );
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
    shim: &Shim,
    order: u64,
    layout: Layout,
    pages: &mut [Vec<u16>],
    k: &[f32],
    v: &[f32],
) {
    let (k, v) = (&mut k.to_vec(), &mut v.to_vec());
    on_gpu(shim, order, layout, pages, only_append(k, v));
}

#[test]
fn heads_before_attention_are_the_cpus() {
    let Some(shim) = Shim::get() else { return };
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
                on_gpu(shim, order, Layout::of(&layout), pages, heads);
            });
            let what = format!("case {case}, variant {variant}");
            assert_same(&got.0, &expected.0, &what);
            assert!(got.1 == expected.1, "{what}: pages");
        }
    }
}
