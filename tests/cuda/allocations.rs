//! Between two tokens the engine's thread allocates nothing on a GPU with memory of its own either.

use std::ptr::NonNull;
use std::sync::Arc;

use airstream::device::cuda::driver::{Args, Driver, Facts, KernelId, Stream};
use airstream::error::Result;

use super::checks::{Gpu, PLENTY, models};
use super::counting_thread::counted;
use super::fake_gpu::FakeGpu;
use super::staged_checks;

/// The fake, whose own allocations do not count.
struct Uncounted(FakeGpu);

impl Uncounted {
    fn call<T>(&self, call: impl FnOnce(&FakeGpu) -> T) -> T {
        let before = counted(false);
        let answer = call(&self.0);
        counted(before);
        answer
    }
}

impl Driver for Uncounted {
    fn facts(&self) -> &Facts {
        self.0.facts()
    }

    fn free_bytes(&self) -> Result<u64> {
        self.call(Driver::free_bytes)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.call(|gpu| gpu.allocate(bytes))
    }

    unsafe fn free(&self, address: u64) {
        // SAFETY: passed on.
        self.call(|gpu| unsafe { gpu.free(address) });
    }

    unsafe fn register(&self, base: NonNull<u8>, bytes: usize) -> Result<u64> {
        // SAFETY: passed on.
        self.call(|gpu| unsafe { gpu.register(base, bytes) })
    }

    unsafe fn unregister(&self, base: NonNull<u8>) {
        // SAFETY: passed on.
        self.call(|gpu| unsafe { gpu.unregister(base) });
    }

    fn kernel(&self, name: &str) -> Result<KernelId> {
        self.call(|gpu| gpu.kernel(name))
    }

    unsafe fn launch(
        &self,
        kernel: KernelId,
        grid: [u32; 3],
        threads: u32,
        args: &Args,
    ) -> Result<()> {
        // SAFETY: passed on.
        self.call(|gpu| unsafe { gpu.launch(kernel, grid, threads, args) })
    }

    unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: passed on.
        self.call(|gpu| unsafe { gpu.copy(stream, to, from, bytes) })
    }

    fn record(&self, stream: Stream, event: usize) -> Result<()> {
        self.call(|gpu| gpu.record(stream, event))
    }

    fn done(&self, event: usize) -> Result<bool> {
        self.call(|gpu| gpu.done(event))
    }
}

#[test]
fn tokens_without_an_allocation_while_tiles_pass_through_both_memories() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, _) = models(folder.path());
    let Some(fake) = FakeGpu::new(4) else { return };
    let gpu: Gpu = Arc::new(Uncounted(fake.with_memory(PLENTY as usize)));
    staged_checks::tokens_without_an_allocation(&model, &gpu);
}
