//! Attention of a few queries over the pages of one key-value head.
//!
//! Blocks of 16 aligned absolute positions are taken in order, each with an
//! online softmax (Milakov and Gimelshein, 2018): the order of the arithmetic
//! depends on positions alone, never on pages or on the other queries.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `AttendFn`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Lanes and rows of several arrays run together.

use super::kv::KvLayout;
use super::vector::{Vector, exp, max, sum, tanh};

/// Queries that one call may have.
pub(super) const QUERIES_MAX: usize = 32;

/// One head of one row.
#[derive(Clone, Copy)]
pub(super) struct Query {
    /// `head_dim` values.
    pub q: *const f32,
    /// `head_dim` values.
    pub out: *mut f32,
    /// First position it attends to.
    pub start: usize,
    /// Behind the last position it attends to.
    pub end: usize,
}

/// What all queries of a call share.
pub(super) struct Shared<'a> {
    /// The session's pages.
    pub pages: *const *const u8,
    pub layout: &'a KvLayout,
    pub kv_head: usize,
    pub scale: f32,
    pub softcap: Option<f32>,
}

impl Shared<'_> {
    /// Keys and values of the block at a position; null where there is no page.
    ///
    /// # Safety
    /// `pages` reaches that far.
    #[inline(always)]
    unsafe fn block(&self, position: usize) -> (*const u8, *const u8) {
        let KvLayout {
            head_dim,
            page_positions,
            ..
        } = *self.layout;
        let page = *self.pages.add(position / page_positions);
        if page.is_null() {
            return (page, page);
        }
        let offset =
            self.kv_head * self.layout.head_bytes() + position % page_positions * head_dim * 2;
        (
            page.add(offset),
            page.add(self.layout.values_offset() + offset),
        )
    }
}

/// The kernel: at most `QUERIES_MAX` queries.
pub(super) type AttendFn = unsafe fn(&[Query], &Shared);

/// The online softmax of one query: the largest score so far, and the sums of the weights in 16 lanes.
#[derive(Clone, Copy)]
struct State<V: Vector> {
    largest: f32,
    sums: V::F,
}

/// See [`AttendFn`].
///
/// # Safety
/// As for [`AttendFn`].
#[inline(always)]
pub(super) unsafe fn attend<V: Vector>(queries: &[Query], shared: &Shared) {
    let head_dim = shared.layout.head_dim;
    let mut states = [State::<V> {
        largest: f32::NEG_INFINITY,
        sums: V::splat_f(0.0),
    }; QUERIES_MAX];
    let states = &mut states[..queries.len()];
    let (mut first, mut end) = (usize::MAX, 0);
    for query in queries {
        query.out.write_bytes(0, head_dim);
        first = first.min(query.start / 16 * 16);
        end = end.max(query.end);
    }
    for block in (first..end).step_by(16) {
        let (keys, values) = shared.block(block);
        if keys.is_null() {
            continue; // A gap that no query attends to.
        }
        if block + 16 < end {
            // The next block's lines come in while this one is worked on.
            let (keys, values) = shared.block(block + 16);
            for line in (0..32 * head_dim).step_by(64) {
                V::prefetch(keys.wrapping_add(line));
                V::prefetch(values.wrapping_add(line));
            }
        }
        let mut next = 0;
        while next < queries.len() {
            let left = queries.len() - next;
            let (some, states) = (queries.as_ptr().add(next), states.as_mut_ptr().add(next));
            if left >= 4 {
                block_of_16::<V, 4>(
                    &*some.cast(),
                    &mut *states.cast(),
                    shared,
                    block,
                    keys,
                    values,
                );
                next += 4;
            } else if left >= 2 {
                block_of_16::<V, 2>(
                    &*some.cast(),
                    &mut *states.cast(),
                    shared,
                    block,
                    keys,
                    values,
                );
                next += 2;
            } else {
                block_of_16::<V, 1>(
                    &*some.cast(),
                    &mut *states.cast(),
                    shared,
                    block,
                    keys,
                    values,
                );
                next += 1;
            }
        }
    }
    for (query, state) in queries.iter().zip(states) {
        let factor = V::splat_f(1.0 / sum::<V>(state.sums));
        for d in (0..head_dim).step_by(16) {
            V::store_f(
                V::mul(V::load_f(query.out.add(d)), factor),
                query.out.add(d),
            );
        }
    }
}

/// The 16 positions from `block` on, for Q queries.
///
/// # Safety
/// As for [`AttendFn`].
#[inline(always)]
unsafe fn block_of_16<V: Vector, const Q: usize>(
    queries: &[Query; Q],
    states: &mut [State<V>; Q],
    shared: &Shared,
    block: usize,
    keys: *const u8,
    values: *const u8,
) {
    let head_dim = shared.layout.head_dim;
    // Positions in the block that each query sees, and that any sees.
    let mut seen = [(0, 0); Q];
    let (mut any_from, mut any_to) = (16, 0);
    for i in 0..Q {
        let from = queries[i].start.max(block) - block;
        let to = queries[i].end.clamp(block, block + 16) - block;
        if from < to {
            seen[i] = (from, to);
            (any_from, any_to) = (any_from.min(from), any_to.max(to));
        }
    }
    if any_from >= any_to {
        return;
    }
    // Even and odd dimensions run in two chains, so that one query keeps two units busy.
    let mut scores = [[V::splat_f(0.0); 2]; Q];
    for d in (0..head_dim).step_by(2) {
        let pair = [
            V::load_half(keys.add(32 * d)),
            V::load_half(keys.add(32 * d + 32)),
        ];
        for i in 0..Q {
            let q = queries[i].q.add(d);
            scores[i][0] = V::fma(pair[0], V::splat_f(*q), scores[i][0]);
            scores[i][1] = V::fma(pair[1], V::splat_f(*q.add(1)), scores[i][1]);
        }
    }
    let mut weights = [[0.0_f32; 16]; Q];
    let mut rescale = [1.0_f32; Q];
    for i in 0..Q {
        let (from, to) = seen[i];
        if from == to {
            continue;
        }
        let mut score = V::mul(V::add(scores[i][0], scores[i][1]), V::splat_f(shared.scale));
        if let Some(cap) = shared.softcap {
            let cap = V::splat_f(cap);
            score = V::mul(tanh::<V>(V::div(score, cap)), cap);
        }
        let state = &mut states[i];
        let masked = V::select_range(from, to, score, V::splat_f(f32::NEG_INFINITY));
        let block_max = max::<V>(masked);
        let largest = if block_max > state.largest {
            block_max
        } else {
            state.largest
        };
        let weight = exp::<V>(V::sub(masked, V::splat_f(largest)));
        let weight = V::select_range(from, to, weight, V::splat_f(0.0));
        // Mostly the largest score is an old one, and e^0 is exactly 1.
        if largest != state.largest {
            let factor = exp::<V>(V::splat_f(state.largest - largest));
            rescale[i] = super::vector::lanes::<V>(factor)[0];
            state.largest = largest;
        }
        state.sums = V::fma(state.sums, V::splat_f(rescale[i]), weight);
        V::store_f(weight, weights[i].as_mut_ptr());
    }
    let mut d = 0;
    while d + 64 <= head_dim {
        add_values::<V, Q, 4>(
            queries,
            &rescale,
            &weights,
            any_from..any_to,
            values,
            head_dim,
            d,
        );
        d += 64;
    }
    while d < head_dim {
        add_values::<V, Q, 1>(
            queries,
            &rescale,
            &weights,
            any_from..any_to,
            values,
            head_dim,
            d,
        );
        d += 16;
    }
}

/// 16 x C dimensions from `d` on: `out = out * rescale + the weighted values`.
///
/// # Safety
/// As for [`AttendFn`].
#[inline(always)]
unsafe fn add_values<V: Vector, const Q: usize, const C: usize>(
    queries: &[Query; Q],
    rescale: &[f32; Q],
    weights: &[[f32; 16]; Q],
    positions: std::ops::Range<usize>,
    values: *const u8,
    head_dim: usize,
    d: usize,
) {
    let mut acc = [[V::splat_f(0.0); C]; Q];
    for i in 0..Q {
        for c in 0..C {
            let old = V::load_f(queries[i].out.add(d + 16 * c));
            acc[i][c] = V::mul(old, V::splat_f(rescale[i]));
        }
    }
    for position in positions {
        let values = values.add(2 * (position * head_dim + d));
        let mut value = [V::splat_f(0.0); C];
        for c in 0..C {
            value[c] = V::load_half(values.add(32 * c));
        }
        for i in 0..Q {
            let weight = V::splat_f(*weights[i].as_ptr().add(position));
            for c in 0..C {
                acc[i][c] = V::fma(value[c], weight, acc[i][c]);
            }
        }
    }
    for i in 0..Q {
        for c in 0..C {
            V::store_f(acc[i][c], queries[i].out.add(d + 16 * c));
        }
    }
}
