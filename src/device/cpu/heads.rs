//! What becomes of products before attention: queries that are ready, keys and values in their pages.
#![allow(unsafe_code)]

use super::Cpu;
use super::kv::{KvLayout, KvPlace};
use super::matmul::Shared;

/// Which dimensions of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// 2i and 2i + 1 (llama).
    Adjacent,
    /// i and i + half (neox: qwen, gemma).
    Halves,
}

/// Queries, keys and values as products give them, and what is done to them.
#[derive(Debug)]
pub struct Heads<'a> {
    /// rows x heads x `head_dim`: queries, which stay here.
    pub q: &'a mut [f32],
    /// rows x `kv_heads` x `head_dim`: keys. Nobody needs them behind.
    pub k: &'a mut [f32],
    /// rows x `kv_heads` x `head_dim`: values, as the keys.
    pub v: &'a mut [f32],
    /// What is added to a row of each first, if anything is.
    pub biases: Option<[&'a [f32]; 3]>,
    /// `head_dim`: the weights of the norms that each head of the queries, and of the keys, goes through next, if any.
    pub norms: Option<[&'a [f32]; 2]>,
    /// What keeps the norm of nothing finite.
    pub eps: f32,
    /// rows x pairs: the angles by which heads of queries and keys are rotated then, in their first 2 x pairs dimensions.
    pub cos: &'a [f32],
    /// As `cos`.
    pub sin: &'a [f32],
    /// Which dimensions are a pair.
    pub pairing: RopePairing,
}

impl Heads<'_> {
    /// Heads of a row of queries, and pairs of a head that rotate.
    pub(in crate::device) fn shape(&self, layout: &KvLayout, rows: usize) -> (usize, usize) {
        let KvLayout {
            kv_heads, head_dim, ..
        } = *layout;
        let (heads, pairs) = (self.q.len() / (rows * head_dim), self.cos.len() / rows);
        let kv_dim = kv_heads * head_dim;
        assert!(self.q.len() == rows * heads * head_dim);
        assert!(self.k.len() == rows * kv_dim && self.v.len() == rows * kv_dim);
        assert!(self.cos.len() == rows * pairs && self.sin.len() == rows * pairs);
        assert!(2 * pairs <= head_dim && head_dim.is_multiple_of(16));
        let lengths = [heads * head_dim, kv_dim, kv_dim];
        assert!(
            self.biases
                .is_none_or(|all| all.map(<[f32]>::len) == lengths)
        );
        assert!(
            self.norms
                .is_none_or(|all| all.map(<[f32]>::len) == [head_dim; 2])
        );
        (heads, pairs)
    }
}

impl Cpu {
    /// Makes queries ready for attention, and writes keys and values of each row to its place.
    ///
    /// # Safety
    /// Pages have the layout's size; no two rows have the same place.
    pub unsafe fn place_heads(&self, heads: Heads<'_>, layout: &KvLayout, places: &[KvPlace]) {
        if places.is_empty() {
            return;
        }
        let kernels = self.kernels;
        let KvLayout {
            kv_heads,
            head_dim,
            page_positions,
        } = *layout;
        let (q_heads, pairs) = heads.shape(layout, places.len());
        let (q_dim, kv_dim) = (q_heads * head_dim, kv_heads * head_dim);
        let Heads {
            q,
            k,
            v,
            biases,
            norms,
            eps,
            cos,
            sin,
            pairing,
        } = heads;
        let rows = [(q, q_dim), (k, kv_dim), (v, kv_dim)].map(|(x, dim)| (x.as_mut_ptr(), dim));
        let shared = Shared((rows, places));
        self.split(places.len(), q_dim + 2 * kv_dim, &|first, count| {
            let Shared((rows, places)) = &shared;
            for row in first..first + count {
                // SAFETY: the rows are within all three, and this call's own.
                let [q, k, v] = rows.map(|(x, dim)| unsafe { x.add(row * dim) });
                if let Some([of_q, of_k, of_v]) = biases {
                    for (x, bias) in [(q, of_q), (k, of_k), (v, of_v)] {
                        // SAFETY: as above; biases are as long.
                        unsafe { (kernels.add)(x, bias.as_ptr(), bias.len()) };
                    }
                }
                for (x, heads, kind) in [(q, q_heads, 0), (k, kv_heads, 1)] {
                    for head in 0..heads {
                        // SAFETY: the head is within the row; 2 x pairs dimensions are within the head.
                        unsafe {
                            let x = x.add(head * head_dim);
                            if let Some(norms) = norms {
                                let factor = (kernels.norm)(x, head_dim, eps);
                                (kernels.weigh)(x, factor, norms[kind].as_ptr(), x, head_dim);
                            }
                            let (cos, sin) = (&cos[row * pairs..], &sin[row * pairs..]);
                            let adjacent = pairing == RopePairing::Adjacent;
                            (kernels.rope)(x, cos.as_ptr(), sin.as_ptr(), pairs, adjacent);
                        }
                    }
                }
                let KvPlace { page, index } = places[row];
                debug_assert!(index < page_positions);
                for head in 0..kv_heads {
                    // SAFETY: offsets are within the page, which the caller vouches for.
                    unsafe {
                        let page = page.add(head * layout.head_bytes());
                        let key = page.add(index / 16 * 32 * head_dim + index % 16 * 2);
                        let value = page.add(layout.values_offset() + index * 2 * head_dim);
                        let at = head * head_dim;
                        (kernels.kv_head)(k.add(at), v.add(at), head_dim, key, value);
                    }
                }
            }
        });
    }
}
