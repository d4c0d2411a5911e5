//! Queries, keys and values before attention against f64; what is in the pages is the same, in f16.
#![allow(unsafe_code)]

use super::{Random, bits, close, everywhere};
use crate::device::cpu::{Cpu, Heads, KvLayout, KvPlace, RopePairing};
use half::f16;

/// Puts keys and values in their places as they are.
///
/// # Safety
/// As for [`Cpu::place_heads`].
pub(super) unsafe fn append(
    cpu: &Cpu,
    layout: &KvLayout,
    places: &[KvPlace],
    (k, v): (&[f32], &[f32]),
) {
    let heads = Heads {
        q: &mut [],
        k: &mut k.to_vec(),
        v: &mut v.to_vec(),
        biases: None,
        norms: None,
        eps: 0.0,
        cos: &[],
        sin: &[],
        pairing: RopePairing::Halves,
    };
    // SAFETY: the caller vouches for it.
    unsafe { cpu.place_heads(heads, layout, places) };
}

/// What a head is when biased, normed and rotated.
fn exact(
    x: &[f32],
    bias: Option<&[f32]>,
    norm: Option<&[f32]>,
    angles: &[f32],
    pairing: RopePairing,
) -> Vec<f64> {
    let mut x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    for (x, bias) in x.iter_mut().zip(bias.into_iter().flatten()) {
        *x += f64::from(*bias);
    }
    let squares: f64 = x.iter().map(|x| x * x).sum();
    let factor = 1.0 / (squares / x.len() as f64 + 1e-5).sqrt();
    for (x, weight) in x.iter_mut().zip(norm.into_iter().flatten()) {
        *x *= factor * f64::from(*weight);
    }
    for (i, angle) in angles.iter().enumerate() {
        let (a, b) = match pairing {
            RopePairing::Adjacent => (2 * i, 2 * i + 1),
            RopePairing::Halves => (i, i + angles.len()),
        };
        let (sin, cos) = f64::from(*angle).sin_cos();
        (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
    }
    x
}

#[test]
fn heads_are_biased_normed_and_rotated_and_keys_and_values_are_in_their_places() {
    let mut random = Random(6);
    let cases = [
        (1, 64, 32, RopePairing::Adjacent),
        (9, 64, 32, RopePairing::Halves),
        (40, 80, 20, RopePairing::Halves),
        (21, 256, 128, RopePairing::Adjacent),
    ];
    for (case, (rows, head_dim, pairs, pairing)) in cases.into_iter().enumerate() {
        // As many heads of queries as of keys, and the same: so that keys can be compared.
        let (kv_heads, dim) = (3, 3 * head_dim);
        let layout = KvLayout {
            kv_heads,
            head_dim,
            page_positions: 32,
        };
        let (x, v) = (random.floats(rows * dim), random.floats(rows * dim));
        let (bias, v_bias, norm) = (
            random.floats(dim),
            random.floats(dim),
            random.floats(head_dim),
        );
        let biases = [&bias[..], &bias, &v_bias];
        let biases = (case % 2 == 1).then_some(biases);
        let norms = (case >= 2).then_some([&norm[..], &norm]);
        let angles: Vec<f32> = random
            .floats(rows * pairs)
            .iter()
            .map(|x| x * 3.0)
            .collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let q = everywhere(|cpu| {
            let (mut q, mut pages) = (x.clone(), vec![vec![0_u16; layout.page_bytes() / 2]; 2]);
            let places: Vec<KvPlace> = (0..rows)
                .map(|row| KvPlace {
                    page: pages[row / 32].as_mut_ptr().cast(),
                    index: row % 32,
                })
                .collect();
            let heads = Heads {
                q: &mut q,
                k: &mut x.clone(),
                v: &mut v.clone(),
                biases,
                norms,
                eps: 1e-5,
                cos: &cos,
                sin: &sin,
                pairing,
            };
            // SAFETY: the pages have the layout's size, and places differ.
            unsafe { cpu.place_heads(heads, &layout, &places) };
            for (i, (key, value)) in q.iter().zip(&v).enumerate() {
                let (row, head, d) = (i / dim, i % dim / head_dim, i % head_dim);
                let (page, index) = (&pages[row / 32], row % 32);
                let halves = layout.head_bytes() / 2;
                let got = page[head * halves + index / 16 * 16 * head_dim + 16 * d + index % 16];
                assert_eq!(got, f16::from_f32(*key).to_bits(), "key {i}");
                let got = page[(kv_heads + head) * halves + index * head_dim + d];
                let value = value + biases.map_or(0.0, |_| v_bias[i % dim]);
                assert_eq!(got, f16::from_f32(value).to_bits(), "value {i}");
            }
            q
        });
        let expected = x.chunks(head_dim).enumerate().flat_map(|(i, head)| {
            let bias = biases.map(|all| &all[0][i % kv_heads * head_dim..][..head_dim]);
            let angles = &angles[i / kv_heads * pairs..][..pairs];
            exact(head, bias, norms.map(|all| all[0]), angles, pairing)
        });
        close(&q, expected, 1e-5);
        assert!(bits(&q) != bits(&x));
    }
}
