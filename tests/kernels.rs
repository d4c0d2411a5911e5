//! The CUDA kernels, compiled for this machine: each is the CPU's op, bit for bit.
//!
//! A block's threads run as fibers that switch at barriers and exchanges (`kernels/host/shim.cpp`), in
//! several orders, and all of it once more under the address and undefined-behaviour sanitizers.
//! Attention over more than one split is the exception: there it rounds otherwise, and is compared
//! with exact arithmetic.
#![allow(unsafe_code)]

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/heads.rs"]
mod heads;
#[path = "kernels/launch.rs"]
mod launch;
#[path = "kernels/products.rs"]
mod products;
#[path = "kernels/quantized.rs"]
mod quantized;
#[path = "kernels/row_ops.rs"]
mod row_ops;
#[path = "kernels/sanitizers.rs"]
mod sanitizers;
#[path = "support/shim.rs"]
mod shim;
#[path = "kernels/small_ops.rs"]
mod small_ops;
#[path = "support/weights.rs"]
mod weights;

use airstream::device::cpu::{Cpu, Isa};
use weights::Rng;

/// Orders of threads and blocks: forwards, backwards, at random.
const ORDERS: [u64; 3] = [0, 1, 7919];

fn cpu() -> Cpu {
    Cpu::new(1, Isa::detect(), 64 << 10).expect("this processor has it")
}

fn floats(random: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.range(-1.0, 1.0)).collect()
}

/// Whether two results are the same bit for bit, and where they are not.
fn assert_same(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!(
            a.to_bits() == b.to_bits(),
            "{what}: value {i}: {a:e} instead of {b:e}"
        );
    }
}
