//! Every kernel of every instruction set at hand against plain scalar code.

mod attention;
mod matmul;
mod oracle;
mod small_ops;

use super::{Cpu, Isa};

/// Row bytes that any test needs.
const ROW_BYTES_MAX: usize = 64 << 10;

/// A device for each instruction set that this processor has, with `threads` threads.
fn devices(threads: usize) -> impl Iterator<Item = Cpu> {
    let isas = Isa::ALL.into_iter().filter(|isa| isa.available());
    isas.map(move |isa| Cpu::new(threads, isa, ROW_BYTES_MAX).expect("the processor has it"))
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
