//! What this machine can do at most: bytes from memory, and dot products. The floors of every op.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use super::Cpu;
use super::strip::prefetch;
use super::vector::Vector;

/// Chains of dot products that run side by side: as many as hide the latency of one.
pub(super) const CHAINS: usize = 8;
/// Dot products of each chain in one unit of work.
const ROUNDS: usize = 1 << 16;
/// Bytes that one unit of reading takes.
const UNIT_BYTES: usize = 64 << 10;
/// The best of so many runs counts.
const RUNS: usize = 5;

/// Keeps the units for integer dot products busy: (rounds, 32 activations, where the sums go).
pub(super) type DotsFn = unsafe fn(usize, *const i8, *mut u8);

/// `rounds` dot products in each of [`CHAINS`] chains.
///
/// # Safety
/// `a` is valid for 32 bytes, `out` for 64, and the caller is compiled for `V`.
#[inline(always)]
pub(super) unsafe fn dots<V: Vector>(rounds: usize, a: *const i8, out: *mut u8) {
    // SAFETY: as the caller vouches.
    unsafe {
        let weights = V::splat(0x0102_0304);
        let mut sums = [V::splat(0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = V::dot(*sum, weights, a);
            }
        }
        let all = sums
            .into_iter()
            .fold(V::splat(0), |all, sum| V::add_i(all, sum));
        V::store(all, out);
    }
}

/// Reads memory as fast as a core can: (bytes, a multiple of [`READ_BYTES`]; where they are; where their sum goes).
pub(super) type ReadFn = unsafe fn(usize, *const u8, *mut u8);

/// Bytes that are read in one go, into as many sums, so that no chain of them is the limit.
const READ_BYTES: usize = 64 * CHAINS;

/// Sums up `bytes` bytes from `p` on, asking for them ahead of their use as the kernels do.
///
/// # Safety
/// `p` is valid for `bytes` bytes, `out` for 64, and the caller is compiled for `V`.
#[inline(always)]
pub(super) unsafe fn read<V: Vector>(bytes: usize, p: *const u8, out: *mut u8) {
    // SAFETY: as the caller vouches.
    unsafe {
        let mut sums = [V::splat(0); CHAINS];
        for at in (0..bytes).step_by(READ_BYTES) {
            prefetch::<V>(p.add(at), READ_BYTES);
            for (chain, sum) in sums.iter_mut().enumerate() {
                *sum = V::add_i(*sum, V::load(p.add(at + 64 * chain)));
            }
        }
        let all = sums
            .into_iter()
            .fold(V::splat(0), |all, sum| V::add_i(all, sum));
        V::store(all, out);
    }
}

/// Seconds of the fastest of some runs of `f`.
pub fn fastest(mut f: impl FnMut()) -> f64 {
    let timed = (0..RUNS).map(|_| {
        let began = Instant::now();
        f();
        began.elapsed().as_secs_f64()
    });
    timed.fold(f64::MAX, f64::min)
}

impl Cpu {
    /// Products of two 8-bit integers, summed up, per second with all threads: nothing of a matrix product is faster.
    pub fn dot_rate(&self) -> f64 {
        let units = 4 * self.threads();
        let seconds = fastest(|| {
            self.pool.run(units, &|_, _| {
                let mut out = [0; 64];
                // SAFETY: the arrays are as large as the kernel asks, and the processor has its instruction set.
                unsafe { (self.kernels.dots)(ROUNDS, [1; 32].as_ptr(), out.as_mut_ptr()) };
                black_box(out);
            });
        });
        (units * ROUNDS * CHAINS * 64) as f64 / seconds
    }

    /// Bytes per second that all threads together read from `memory`, which should be larger than any cache.
    pub fn read_rate(&self, memory: &[u64]) -> f64 {
        let words = UNIT_BYTES / size_of::<u64>();
        let units = memory.len() / words;
        let seconds = fastest(|| {
            self.pool.run(units, &|_, unit| {
                let unit = &memory[unit * words..(unit + 1) * words];
                let mut out = [0; 64];
                // SAFETY: the arrays are as large as the kernel asks, and the processor has its instruction set.
                unsafe { (self.kernels.read)(UNIT_BYTES, unit.as_ptr().cast(), out.as_mut_ptr()) };
                black_box(out);
            });
        });
        (units * UNIT_BYTES) as f64 / seconds
    }
}
