//! Kernels that a CUDA driver runs, on the GPU's own memory.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use airstream::arena::{Reservation, Span};
use airstream::device::cuda::driver::{Args, Driver, KernelId, Stream};

use crate::kernels::launch::Runner;

/// Bytes that go to the GPU and back at a time.
const STAGED_BYTES: usize = 1 << 20;
/// What the end of all that was given to the GPU is known by.
const EVENT: usize = 0;

/// One piece of work at a time, each of which is waited for: so what fails is known by its name.
pub struct Driven {
    driver: Arc<dyn Driver>,
    work: Mutex<Work>,
}

struct Work {
    kernels: HashMap<String, KernelId>,
    /// Registered memory.
    staged: Span<u8>,
}

impl Driven {
    pub fn new(driver: Arc<dyn Driver>) -> Driven {
        let mut memory = Reservation::new(STAGED_BYTES).expect("a small one");
        let staged = memory.carve(STAGED_BYTES).expect("all of it");
        let (base, bytes) = staged.mapping();
        // SAFETY: it stays mapped while there is the span.
        unsafe { driver.register(base, bytes) }.unwrap_or_else(|e| panic!("{e}"));
        Driven {
            driver,
            work: Mutex::new(Work {
                kernels: HashMap::new(),
                staged,
            }),
        }
    }

    /// A test that failed has left nothing behind that others would see.
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, doing: &str) {
        let done = || {
            self.driver.record(Stream::Compute, EVENT)?;
            while !self.driver.done(EVENT)? {
                std::thread::sleep(Duration::from_micros(20));
            }
            Ok(())
        };
        done().unwrap_or_else(|e: airstream::error::Error| panic!("{doing}: {e}"));
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) {
        // SAFETY: one is staged memory, the other the GPU's own that was taken; it is waited for.
        let copied = unsafe { self.driver.copy(Stream::Compute, to, from, bytes) };
        copied.unwrap_or_else(|e| panic!("a copy of {bytes} bytes: {e}"));
        self.wait("a copy");
    }
}

impl Runner for Driven {
    fn put(&self, bytes: &[u8]) -> u64 {
        let mut work = self.work();
        let address = { self.driver.allocate(bytes.len().max(1)) }
            .unwrap_or_else(|e| panic!("{} bytes of the GPU's memory: {e}", bytes.len()));
        let staged = work.staged.as_ptr().expose_provenance() as u64;
        for (i, part) in bytes.chunks(STAGED_BYTES).enumerate() {
            work.staged[..part.len()].copy_from_slice(part);
            self.copy(address + (i * STAGED_BYTES) as u64, staged, part.len());
        }
        address
    }

    fn get(&self, address: u64, into: &mut [u8]) {
        let work = self.work();
        let staged = work.staged.as_ptr().expose_provenance() as u64;
        for (i, part) in into.chunks_mut(STAGED_BYTES).enumerate() {
            self.copy(staged, address + (i * STAGED_BYTES) as u64, part.len());
            part.copy_from_slice(&work.staged[..part.len()]);
        }
    }

    fn free(&self, address: u64, _: usize) {
        let _work = self.work();
        // SAFETY: it was allocated, and all work was waited for.
        unsafe { self.driver.free(address) };
    }

    unsafe fn launch(&self, _: u64, name: &str, grid: [u32; 3], threads: u32, args: &Args) {
        let mut work = self.work();
        let kernel = match work.kernels.get(name) {
            Some(kernel) => *kernel,
            None => self.driver.kernel(name).unwrap_or_else(|e| panic!("{e}")),
        };
        work.kernels.insert(name.to_owned(), kernel);
        let what = format!("{name} in a grid of {grid:?} x {threads}");
        // SAFETY: the caller vouches for the arguments.
        let launched = unsafe { self.driver.launch(kernel, grid, threads, args) };
        launched.unwrap_or_else(|e| panic!("{what}: {e}"));
        self.wait(&what);
    }
}
