//! Each CUDA kernel is the CPU's op, bit for bit, on whatever runs it.
//!
//! Attention over more than one split is the exception: there it rounds otherwise, and is compared with exact
//! arithmetic. What runs kernels is for the test binary to say: `crate::runner()`.

mod attention;
mod heads;
pub mod launch;
mod products;
mod quantized;
mod row_ops;
mod small_ops;
mod top_k;

use airstream::device::cpu::{Cpu, Isa};

use crate::support::weights::Rng;

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
