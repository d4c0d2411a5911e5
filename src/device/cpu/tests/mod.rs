//! Every kernel of every instruction set at hand against plain scalar code.
#![allow(unsafe_code)]

mod attention;
mod heads;
mod matmul;
mod oracle;
mod row_ops;
mod small_ops;

use super::{Activations, Cpu, Isa, Kinds, Precision};

/// Row bytes that any test needs.
const ROW_BYTES_MAX: usize = 64 << 10;

/// A device for each instruction set that this processor has, with `threads` threads.
fn devices(threads: usize) -> impl Iterator<Item = Cpu> {
    let isas = Isa::ALL.into_iter().filter(|isa| isa.available());
    isas.map(move |isa| Cpu::new(threads, isa, ROW_BYTES_MAX).expect("the processor has it"))
}

/// Memory for activations, and the view of it.
fn activations(
    rows: usize,
    cols: usize,
    kinds: Kinds,
    precision: Precision,
) -> (Vec<u64>, Activations) {
    let bytes = Activations::bytes(rows, cols, kinds, precision);
    let mut memory = vec![0_u64; bytes.div_ceil(8)];
    // SAFETY: the memory lives as long as the view and nothing else uses it.
    let view = unsafe { Activations::new(memory.as_mut_ptr().cast(), memory.len() * 8, precision) };
    (memory, view)
}

/// Runs `op` on every device; all results must have the same bits. Returns one.
fn everywhere(op: impl Fn(&Cpu) -> Vec<f32>) -> Vec<f32> {
    let mut first = None;
    for threads in [1, 2] {
        for cpu in devices(threads) {
            let out = op(&cpu);
            let first = first.get_or_insert_with(|| out.clone());
            assert!(
                bits(first) == bits(&out),
                "{} with {threads} threads",
                cpu.isa()
            );
        }
    }
    first.expect("plain Rust is always there")
}

/// Each result is within `tolerance` (of its size, or of 1) of the exact one.
fn close(got: &[f32], exact: impl Iterator<Item = f64>, tolerance: f64) {
    for (i, (got, exact)) in got.iter().zip(exact).enumerate() {
        let error = (f64::from(*got) - exact).abs() / exact.abs().max(1.0);
        assert!(error < tolerance, "value {i}: {got}, not {exact}");
    }
}

/// Seeded random numbers: xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 32) as usize) % n
    }

    /// In -1.0..1.0.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// The bits, which tell -0 from 0 and find any two NaN of the same kind equal.
fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn names_of_instruction_sets_are_read_back() {
    for isa in Isa::ALL {
        assert_eq!(isa.name().parse::<Isa>().ok(), Some(isa));
    }
    assert!("mmx".parse::<Isa>().is_err());
    assert!(Isa::detect().available());
}
