//! The small ops against f64, and the instruction sets against each other.

use super::{Random, bits, close, everywhere};
use crate::device::cpu::{Cpu, RopePairing};

/// Lengths with and without tails, below and above what is split over threads.
const LENGTHS: [usize; 5] = [1, 15, 64, 1000, 20_001];

#[test]
fn norms_are_close_to_exact_ones() {
    let mut random = Random(1);
    for n in LENGTHS {
        for groups in [1, 5] {
            let (x, weight) = (random.floats(n * groups), random.floats(n));
            let out = everywhere(|cpu| {
                let mut x = x.clone();
                cpu.rms_norm_in_place(&mut x, &weight, 1e-5);
                x
            });
            let exact = x.chunks(n).flat_map(|x| {
                let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
                let factor = 1.0 / (squares / n as f64 + 1e-5).sqrt();
                x.iter()
                    .zip(&weight)
                    .map(move |(x, w)| f64::from(*x) * factor * f64::from(*w))
                    .collect::<Vec<_>>()
            });
            close(&out, exact, 1e-5);
        }
    }
}

#[test]
fn elementwise_ops_are_close_to_exact_ones() {
    let mut random = Random(2);
    for n in LENGTHS {
        let x: Vec<f32> = random.floats(n).into_iter().map(|x| x * 40.0).collect();
        let y = random.floats(n);
        let apply = |op: &dyn Fn(&Cpu, &mut [f32])| {
            everywhere(|cpu| {
                let mut x = x.clone();
                op(cpu, &mut x);
                x
            })
        };
        let pairs = || {
            x.iter()
                .zip(&y)
                .map(|(x, y)| (f64::from(*x), f64::from(*y)))
        };
        close(
            &apply(&|cpu, x| cpu.add(x, &y)),
            pairs().map(|(x, y)| x + y),
            1e-6,
        );
        close(
            &apply(&|cpu, x| cpu.scale(x, 0.3)),
            pairs().map(|(x, _)| x * f64::from(0.3_f32)),
            1e-6,
        );
        close(
            &apply(&|cpu, x| cpu.softcap(x, 30.0)),
            pairs().map(|(x, _)| (x / 30.0).tanh() * 30.0),
            1e-5,
        );
    }
}

#[test]
fn a_bias_is_added_to_every_row() {
    let mut random = Random(4);
    let (x, bias) = (random.floats(7 * 100), random.floats(100));
    let out = everywhere(|cpu| {
        let mut x = x.clone();
        cpu.add(&mut x, &bias);
        x
    });
    let exact: Vec<f32> = x
        .iter()
        .zip(bias.iter().cycle())
        .map(|(x, b)| x + b)
        .collect();
    assert_eq!(bits(&out), bits(&exact));
}

#[test]
fn rope_turns_each_pair_by_its_angle() {
    let mut random = Random(6);
    for (pairing, head_dim, n) in [
        (RopePairing::Adjacent, 64, 32),
        (RopePairing::Halves, 64, 32),
        (RopePairing::Halves, 80, 20),
    ] {
        let (rows, heads) = (9, 3);
        let x = random.floats(rows * heads * head_dim);
        let angles: Vec<f32> = random
            .floats(rows * n)
            .into_iter()
            .map(|x| x * 3.0)
            .collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let out = everywhere(|cpu| {
            let mut x = x.clone();
            cpu.rope(&mut x, rows, head_dim, &cos, &sin, pairing);
            x
        });
        for (i, (got, old)) in out.iter().zip(&x).enumerate() {
            let (row, head_start, d) =
                (i / head_dim / heads, i / head_dim * head_dim, i % head_dim);
            let pair = match pairing {
                _ if d >= 2 * n => None,
                RopePairing::Adjacent => Some((d / 2, 2 * (d / 2), 2 * (d / 2) + 1)),
                RopePairing::Halves => Some((d % n, d % n, d % n + n)),
            };
            let Some((angle, a, b)) = pair else {
                assert_eq!(got, old);
                continue;
            };
            let angle = f64::from(angles[row * n + angle]);
            let (a_old, b_old) = (f64::from(x[head_start + a]), f64::from(x[head_start + b]));
            let exact = if d == a {
                a_old * angle.cos() - b_old * angle.sin()
            } else {
                a_old * angle.sin() + b_old * angle.cos()
            };
            assert!((f64::from(*got) - exact).abs() < 1e-6);
        }
    }
}
