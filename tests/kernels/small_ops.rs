//! The ops between the products, and the choice of the largest logits.

use super::launch::launch;
use super::shim::Shim;
use super::weights::Rng;
use super::{ORDERS, assert_same, cpu, floats};
use airstream::device::cpu::RopePairing;

#[test]
fn norms_are_the_cpus() {
    let Some(shim) = Shim::get() else { return };
    let mut random = Rng(1);
    for (case, (groups, n)) in [(3, 64), (2, 576), (1, 4096), (2, 2050), (5, 7)]
        .into_iter()
        .enumerate()
    {
        let (x, weight) = (floats(&mut random, groups * n), floats(&mut random, n));
        let (mut expected, mut out) = (x.clone(), x);
        cpu().rms_norm_in_place(&mut expected, &weight, 1e-5);
        launch!(
            shim, ORDERS[case % 3], "rms_norm", [groups as u32, 1, 1], 128;
            out.as_mut_ptr(), weight.as_ptr(), n as u32, 1e-5_f32
        );
        assert_same(&out, &expected, &format!("{groups} x {n}"));
    }
}

#[test]
fn rotations_are_the_cpus() {
    let Some(shim) = Shim::get() else { return };
    let mut random = Rng(2);
    for (rows, heads, head_dim, n) in [(1, 3, 64, 32), (4, 9, 64, 32), (3, 2, 80, 20)] {
        for pairing in [RopePairing::Adjacent, RopePairing::Halves] {
            let x = floats(&mut random, rows * heads * head_dim);
            let (cos, sin) = (floats(&mut random, rows * n), floats(&mut random, rows * n));
            let (mut expected, mut got) = (x.clone(), x);
            cpu().rope(&mut expected, rows, head_dim, &cos, &sin, pairing);
            let grid = [(heads * n).div_ceil(256) as u32, rows as u32, 1];
            launch!(
                shim, 0, "rope", grid, 256;
                got.as_mut_ptr(), cos.as_ptr(), sin.as_ptr(), (heads * head_dim) as u32, head_dim as u32, n as u32,
                u32::from(pairing == RopePairing::Adjacent)
            );
            assert_same(
                &got,
                &expected,
                &format!("{rows} x {heads} x {head_dim} {pairing:?}"),
            );
        }
    }
}

#[test]
fn ops_on_single_values_are_the_cpus() {
    let Some(shim) = Shim::get() else { return };
    let mut random = Rng(3);
    for n in [1, 31, 256, 1000] {
        let mut x = floats(&mut random, n);
        x.iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x *= [0.1, 3.0, 100.0][i % 3]);
        let y = floats(&mut random, n);
        let grid = [n.div_ceil(256) as u32, 1, 1];
        let mut expected = x.clone();
        let mut got = x.clone();
        cpu().scale(&mut expected, 0.7);
        launch!(shim, 0, "scale", grid, 256; got.as_mut_ptr(), n as u64, 0.7_f32);
        assert_same(&got, &expected, "scale");
        (expected, got) = (x.clone(), x.clone());
        cpu().softcap(&mut expected, 30.0);
        launch!(shim, 0, "softcap", grid, 256; got.as_mut_ptr(), n as u64, 30.0_f32);
        assert_same(&got, &expected, "softcap");
        for period in [n, n.div_ceil(4)]
            .into_iter()
            .filter(|p| n.is_multiple_of(*p))
        {
            (expected, got) = (x.clone(), x.clone());
            cpu().add(&mut expected, &y[..period]);
            launch!(shim, 0, "add", grid, 256; got.as_mut_ptr(), y.as_ptr(), n as u64, period as u64);
            assert_same(&got, &expected, "add");
        }
    }
}

#[test]
fn all_that_is_to_be_read_is_read() {
    let Some(shim) = Shim::get() else { return };
    let mut random = Rng(6);
    for (count, blocks) in [(1, 1), (1023, 3), (5000, 2), (4096, 7)] {
        let words: Vec<u128> = (0..count)
            .map(|_| u128::from(random.next()) << 64 | u128::from(random.next()))
            .collect();
        let mut out = vec![0_u32; blocks];
        launch!(
            shim, 1, "read_memory", [blocks as u32, 1, 1], 256;
            words.as_ptr(), count as u64, blocks as u32, out.as_mut_ptr()
        );
        let all = words.iter().fold(0, |all, word| all ^ word);
        let expected = (0..4).fold(0, |folded, i| folded ^ (all >> (32 * i)) as u32);
        assert_eq!(
            out.iter().fold(0, |a, b| a ^ b),
            expected,
            "{count} by {blocks}"
        );
    }
}
