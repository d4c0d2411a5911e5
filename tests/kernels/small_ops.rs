//! The ops on single values, and what reads memory.

use super::launch::{Memory, launch};
use super::{assert_same, cpu, floats};
use crate::support::weights::Rng;

#[test]
fn ops_on_single_values_are_the_cpus() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(3);
    for n in [1, 31, 256, 1000] {
        let mut x = floats(&mut random, n);
        x.iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x *= [0.1, 3.0, 100.0][i % 3]);
        let grid = [n.div_ceil(256) as u32, 1, 1];
        let mut expected = x.clone();
        let got = Memory::of(gpu, &x);
        cpu().scale(&mut expected, 0.7);
        launch!(gpu, 0, "scale", grid, 256; got.at(0), n as u64, 0.7_f32);
        assert_same(&got.values(), &expected, "scale");
        let (mut expected, got) = (x.clone(), Memory::of(gpu, &x));
        cpu().softcap(&mut expected, 30.0);
        launch!(gpu, 0, "softcap", grid, 256; got.at(0), n as u64, 30.0_f32);
        assert_same(&got.values(), &expected, "softcap");
    }
}

#[test]
fn the_cap_of_what_is_not_finite_is_not_either() {
    let Some(gpu) = crate::runner() else { return };
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0];
    let got = Memory::of(gpu, &bad);
    launch!(gpu, 0, "softcap", [1, 1, 1], 256; got.at(0), bad.len() as u64, 30.0_f32);
    let finite: Vec<bool> = got.values().iter().map(|x: &f32| x.is_finite()).collect();
    assert_eq!(finite, [false, false, false, true]);
}

#[test]
fn all_that_is_to_be_read_is_read() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(6);
    for (count, blocks) in [(1, 1), (1023, 3), (5000, 2), (4096, 7)] {
        let words: Vec<u128> = (0..count)
            .map(|_| u128::from(random.next()) << 64 | u128::from(random.next()))
            .collect();
        let (there, out) = (
            Memory::of(gpu, &words),
            Memory::of(gpu, &vec![0_u32; blocks]),
        );
        launch!(
            gpu, 1, "read_memory", [blocks as u32, 1, 1], 256;
            there.at(0), count as u64, blocks as u32, out.at(0)
        );
        let all = words.iter().fold(0, |all, word| all ^ word);
        let expected = (0..4).fold(0, |folded, i| folded ^ (all >> (32 * i)) as u32);
        assert_eq!(
            out.values().iter().fold(0, |a, b| a ^ b),
            expected,
            "{count} by {blocks}"
        );
    }
}
