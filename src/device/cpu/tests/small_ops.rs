//! The small ops against f64, and the instruction sets against each other.

use super::{Random, close, everywhere};
use crate::device::cpu::Cpu;

#[test]
fn the_cap_of_what_is_not_finite_is_not_either() {
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let capped = everywhere(|cpu| {
        let mut x = bad;
        cpu.softcap(&mut x, 30.0);
        // The bits of what is no number differ.
        x.map(|x| f32::from(u8::from(x.is_finite()))).to_vec()
    });
    assert_eq!(capped, [0.0; 3]);
}

/// Lengths with and without tails, below and above what is split over threads.
const LENGTHS: [usize; 5] = [1, 15, 64, 1000, 20_001];

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
