//! What the device asks of the CUDA driver. Below it is NVIDIA's library, or in tests a fake one.
//!
//! There is one stream: launches and copies run in the order they are given, some time later.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use crate::error::Result;

/// What is known of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// It shares the processor's memory.
    pub integrated: bool,
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelId(pub u64);

/// Events that a driver has.
pub const EVENTS: usize = 3;

/// The CUDA driver, as far as it is used. Any error may be a sticky one, after which nothing works any more.
pub trait Driver: Send {
    /// What is known of the GPU.
    fn facts(&self) -> &Facts;

    /// Pins memory of the processor and makes it visible to the GPU; its address there.
    ///
    /// # Errors
    /// The GPU cannot, or the system refuses to pin so much.
    ///
    /// # Safety
    /// The memory stays mapped until it is unregistered.
    unsafe fn register(&self, base: NonNull<u8>, bytes: usize) -> Result<u64>;

    /// Takes it back. Nothing may be running.
    ///
    /// # Safety
    /// It was registered.
    unsafe fn unregister(&self, base: NonNull<u8>);

    /// The kernel of this name.
    ///
    /// # Errors
    /// The module has none.
    fn kernel(&self, name: &str) -> Result<KernelId>;

    /// Runs a kernel behind what was given before. The arguments are copied.
    ///
    /// # Errors
    /// The driver refuses, now or because of what ran before.
    ///
    /// # Safety
    /// The arguments are the kernel's, and what they point to stays valid until it has run.
    unsafe fn launch(
        &self,
        kernel: KernelId,
        grid: [u32; 3],
        threads: u32,
        args: &Args,
    ) -> Result<()>;

    /// Copies between addresses of the GPU, behind what was given before.
    ///
    /// # Errors
    /// As for `launch`.
    ///
    /// # Safety
    /// Both ranges are registered, do not overlap, and stay valid until it is done.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// Marks a place behind all that was given so far.
    ///
    /// # Errors
    /// As for `launch`.
    fn record(&self, event: usize) -> Result<()>;

    /// Whether all before the place last marked so is done.
    ///
    /// # Errors
    /// Something that ran before failed.
    fn done(&self, event: usize) -> Result<bool>;
}

/// Bytes that the arguments of a kernel take at most, and their number.
const ARGS_BYTES: usize = 128;
const ARGS_MAX: usize = 8;

/// Types that kernels take by value.
///
/// # Safety
/// Implementors have the layout of the kernel's type, without padding that matters.
pub(super) unsafe trait Arg: Copy {}
// SAFETY: the kernels' `u32`.
unsafe impl Arg for u32 {}
// SAFETY: the kernels' `u64`, and their pointers.
unsafe impl Arg for u64 {}
// SAFETY: the kernels' `float`.
unsafe impl Arg for f32 {}

/// The arguments of a launch, in order.
#[derive(Clone)]
#[repr(C, align(16))]
pub struct Args {
    bytes: [u8; ARGS_BYTES],
    offsets: [u8; ARGS_MAX],
    count: u8,
    used: u8,
}

impl Args {
    /// None yet.
    pub(super) fn new() -> Args {
        Args {
            bytes: [0; ARGS_BYTES],
            offsets: [0; ARGS_MAX],
            count: 0,
            used: 0,
        }
    }

    /// One more.
    pub(super) fn with<T: Arg>(mut self, value: T) -> Args {
        let at = usize::from(self.used).next_multiple_of(align_of::<T>());
        assert!(at + size_of::<T>() <= ARGS_BYTES, "too many arguments");
        // SAFETY: there is room, and the place is aligned since the array is.
        unsafe {
            self.bytes
                .as_mut_ptr()
                .add(at)
                .cast::<T>()
                .write_unaligned(value)
        };
        self.offsets[usize::from(self.count)] = at as u8;
        self.count += 1;
        self.used = (at + size_of::<T>()) as u8;
        self
    }

    /// A pointer to each, as the driver's launch takes them.
    pub fn pointers(&self) -> [*mut std::ffi::c_void; ARGS_MAX] {
        let mut pointers = [std::ptr::null_mut(); ARGS_MAX];
        for (pointer, &offset) in pointers.iter_mut().zip(&self.offsets[..self.count.into()]) {
            *pointer = self.bytes[offset.into()..].as_ptr().cast_mut().cast();
        }
        pointers
    }
}
