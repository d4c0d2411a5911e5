//! The CUDA kernels, compiled for this machine: each is the CPU's op, bit for bit.
//!
//! A block's threads run as fibers that switch at barriers and exchanges (`kernels/host/shim.cpp`), in
//! several orders, and all of it once more under the address and undefined-behaviour sanitizers.
#![allow(unsafe_code)]

#[path = "kernels/mod.rs"]
mod kernels;
#[path = "kernels/sanitizers.rs"]
mod sanitizers;
#[path = "support/shim.rs"]
mod shim;
#[path = "support"]
mod support {
    pub mod weights;
}

use std::alloc::{Layout, alloc, dealloc};
use std::ptr;

use airstream::device::cuda::driver::Args;
use kernels::launch::Runner;
use shim::Shim;

/// What runs the kernels here; none where they cannot be compiled.
pub fn runner() -> Option<&'static dyn Runner> {
    Shim::get().map(|shim| shim as &dyn Runner)
}

/// Pieces of memory that end where what is in them ends, so that the sanitizer knows of each byte behind them.
fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes.max(1), 16).expect("a size")
}

fn at(address: u64) -> *mut u8 {
    ptr::with_exposed_provenance_mut(address as usize)
}

impl Runner for Shim {
    fn put(&self, bytes: &[u8]) -> u64 {
        // SAFETY: the layout has a size; the memory is as large as the bytes.
        unsafe {
            let memory = alloc(layout(bytes.len()));
            assert!(!memory.is_null(), "there is memory");
            memory.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            memory.expose_provenance() as u64
        }
    }

    fn get(&self, address: u64, into: &mut [u8]) {
        // SAFETY: memory that was taken, and as large; nothing runs.
        unsafe { at(address).copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
    }

    fn free(&self, address: u64, bytes: usize) {
        // SAFETY: it was taken with this layout.
        unsafe { dealloc(at(address), layout(bytes)) };
    }

    unsafe fn launch(&self, order: u64, name: &str, grid: [u32; 3], threads: u32, args: &Args) {
        // SAFETY: the caller vouches for the arguments.
        unsafe { Shim::launch(self, name, grid, threads, &args.pointers(), order) };
    }
}
