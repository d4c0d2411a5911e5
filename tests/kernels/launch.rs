//! What runs kernels, and memory that they work on.

use std::marker::PhantomData;

use airstream::device::cuda::driver::Args;

/// Runs kernels on memory of its own. Whatever fails is a panic that names it.
pub trait Runner: Sync {
    /// Takes memory for these bytes; its address for kernels, a multiple of 16. It may not be touched otherwise.
    fn put(&self, bytes: &[u8]) -> u64;

    /// What is in memory that was taken.
    fn get(&self, address: u64, into: &mut [u8]);

    /// Gives memory of `bytes` back.
    fn free(&self, address: u64, bytes: usize);

    /// Runs a kernel in blocks of `threads` and waits for it; in this order of its threads, where that can be chosen.
    ///
    /// # Safety
    /// The arguments are the kernel's, and memory that was taken is all they point to.
    unsafe fn launch(&self, order: u64, name: &str, grid: [u32; 3], threads: u32, args: &Args);
}

/// Values where kernels can work on them.
pub struct Memory<T> {
    runner: &'static dyn Runner,
    address: u64,
    count: usize,
    values: PhantomData<T>,
}

impl<T: Copy> Memory<T> {
    /// Memory that holds these, which have no padding.
    pub fn of(runner: &'static dyn Runner, values: &[T]) -> Memory<T> {
        // SAFETY: the values are bytes, all of them written.
        let bytes =
            unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
        Memory {
            runner,
            address: runner.put(bytes),
            count: values.len(),
            values: PhantomData,
        }
    }

    /// Where a kernel finds the value `index`, or the end.
    pub fn at(&self, index: usize) -> u64 {
        assert!(index <= self.count, "value {index} of {}", self.count);
        self.address + (index * size_of::<T>()) as u64
    }

    /// The values as they are now.
    pub fn values(&self) -> Vec<T> {
        let mut bytes = vec![0; self.count * size_of::<T>()];
        self.runner.get(self.address, &mut bytes);
        let value = |bytes: &[u8]| {
            // SAFETY: the bytes of a value, and there are values in this memory alone.
            unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
        };
        bytes.chunks_exact(size_of::<T>()).map(value).collect()
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        self.runner.free(self.address, self.count * size_of::<T>());
    }
}

/// Launches a kernel in some order of its threads: the arguments must be of the kernel's types.
macro_rules! launch {
    ($runner:expr, $order:expr, $name:expr, $grid:expr, $threads:expr; $($argument:expr),* $(,)?) => {{
        let args = airstream::device::cuda::driver::Args::new()$(.with($argument))*;
        // SAFETY: the tests give each kernel what it asks for.
        unsafe { $runner.launch($order, $name, $grid, $threads, &args) };
    }};
}
pub(crate) use launch;
