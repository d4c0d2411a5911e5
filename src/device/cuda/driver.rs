//! What the device asks of the CUDA driver. Below it is NVIDIA's library, or in tests a fake one.
//!
//! There are two streams: what is given to one runs in that order, some time later, beside what runs in the other.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use crate::error::Result;
use crate::store::{COPIES_MAX, MARKS_MAX};

/// The compute capability that the kernels ask for: `mma` with int8 and asynchronous copies came with it.
pub const CAPABILITY_MIN: (u32, u32) = (8, 0);
/// The first driver that knows the kernels' PTX, as it tells its version: the one of ISA 7.4, unless the build says that
/// it is newer.
pub const VERSION_MIN: u32 = match option_env!("AIRSTREAM_DRIVER_MIN") {
    Some(version) => number(version),
    None => 11_040,
};

const fn number(text: &str) -> u32 {
    let (digits, mut number, mut i) = (text.as_bytes(), 0, 0);
    while i < digits.len() {
        number = 10 * number + (digits[i] - b'0') as u32;
        i += 1;
    }
    number
}

/// A driver's version as people know it.
pub fn version_name(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// What is known of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// It shares the processor's memory, and computes there; else in its own.
    pub integrated: bool,
    /// Bytes of the processor's memory that opening it has taken, for its context and the kernels: if it shares that.
    pub context_bytes: u64,
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelId(pub u64);

/// A kernel to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Which.
    pub kernel: KernelId,
    /// Blocks in each direction.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// What it is given.
    pub args: Args,
}

/// What is done in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Launches, and copies among what they use.
    Compute,
    /// Copies of tiles into the GPU's own memory.
    Tiles,
}

/// Events that a driver has: of the queue of launches, of copies of tiles, of marks between launches.
pub const EVENTS: usize = QUEUE_EVENTS + COPIES_MAX + MARKS_MAX;
/// Of the halves of the queue, of the end of all launches, and of the end of all copies.
pub(super) const QUEUE_EVENTS: usize = 4;

/// The CUDA driver, as far as it is used. Any error may be a sticky one, after which nothing works any more.
pub trait Driver: Send + Sync {
    /// What is known of the GPU.
    fn facts(&self) -> &Facts;

    /// Bytes of its own memory that are free now.
    ///
    /// # Errors
    /// The driver does not say.
    fn free_bytes(&self) -> Result<u64>;

    /// Takes memory of the GPU's own; its address.
    ///
    /// # Errors
    /// There is not so much.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Gives it back.
    ///
    /// # Safety
    /// It was allocated, and nothing uses it, now or later.
    unsafe fn free(&self, address: u64);

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

    /// Runs a kernel in [`Stream::Compute`]. The arguments are copied.
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

    /// Runs kernels one after the other, as `launch` does. The place is how many batches of them came since all was last
    /// waited for: the batch may be the one that came at this place before, with other arguments here and there.
    ///
    /// # Errors
    /// As for `launch`.
    ///
    /// # Safety
    /// As for `launch`.
    unsafe fn launch_all(&self, _place: usize, launches: &[Launch]) -> Result<()> {
        // SAFETY: the caller vouches for them.
        unsafe { self.launch_each(launches) }
    }

    /// Runs kernels one after the other, each by a launch of its own.
    ///
    /// # Errors
    /// As for `launch`.
    ///
    /// # Safety
    /// As for `launch`.
    unsafe fn launch_each(&self, launches: &[Launch]) -> Result<()> {
        launches.iter().try_for_each(|launch| {
            // SAFETY: the caller vouches for it.
            unsafe { self.launch(launch.kernel, launch.grid, launch.threads, &launch.args) }
        })
    }

    /// Copies between addresses of the GPU, or of registered memory of the processor's (CUDA has one space of addresses
    /// for both).
    ///
    /// # Errors
    /// As for `launch`.
    ///
    /// # Safety
    /// Both ranges are allocated or registered, do not overlap, and stay valid until it is done.
    unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// Marks a place in a stream, behind all that was given to it so far.
    ///
    /// # Errors
    /// As for `launch`.
    fn record(&self, stream: Stream, event: usize) -> Result<()>;

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
pub unsafe trait Arg: Copy {}
// SAFETY: the kernels' `u32`.
unsafe impl Arg for u32 {}
// SAFETY: the kernels' `u64`, and their pointers.
unsafe impl Arg for u64 {}
// SAFETY: the kernels' `float`.
unsafe impl Arg for f32 {}

/// Shared memory that `matmul` of blocks of 32 asks a launch for: SHARED_BYTES there, and the most that any kernel does.
pub const MATMUL_SHARED_BYTES: u32 = 80 << 10;

/// The arguments of a launch, in order, and the shared memory that it gives each block beside what kernels have.
#[derive(Debug, Clone, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Args {
    bytes: [u8; ARGS_BYTES],
    offsets: [u8; ARGS_MAX],
    count: u8,
    used: u8,
    shared_bytes: u32,
}

impl Args {
    /// None yet.
    #[allow(clippy::new_without_default)] // Nobody wants a launch without arguments.
    pub fn new() -> Args {
        Args {
            bytes: [0; ARGS_BYTES],
            offsets: [0; ARGS_MAX],
            count: 0,
            used: 0,
            shared_bytes: 0,
        }
    }

    /// With shared memory that the kernel asks for.
    pub fn with_shared(self, shared_bytes: u32) -> Args {
        Args {
            shared_bytes,
            ..self
        }
    }

    /// Bytes of it.
    pub fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }

    /// One more.
    pub fn with<T: Arg>(mut self, value: T) -> Args {
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
