//! Reads from model files: submit, then reap completions.
//!
//! One trait, [`Io`], and three implementations: [`uring`] (io_uring, what a
//! real run uses), [`pread`] (positioned reads on a few threads, where io_uring
//! is not to be had) and [`sim`] (a seeded simulation for tests). An
//! implementation reports what the kernel said, short reads and errors
//! included; retrying, and naming the tensor in an error, is the store's work,
//! so that faults injected below the trait go through the same code as real
//! ones.
//!
//! What a caller must know about short reads: a read that crosses the end of
//! the file is short by nature ([`ModelFile::len`] tells). Any other short read
//! is to be continued from the last aligned offset it reached, since direct
//! reads start at multiples of [`ModelFile::align`].

pub mod advice;
pub mod buffer;
pub mod files;
pub mod measure;
pub mod pread;
pub mod sim;
pub mod uring;

use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;

use crate::error::Result;

pub use files::{Access, Fate, Files, Identity, ModelFile, open_model};

/// A model file, by its position in [`Files`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileId(pub u16);

/// One read of an aligned range into memory.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    /// The file to read.
    pub file: FileId,
    /// First byte; a multiple of the file's [`ModelFile::align`].
    pub offset: u64,
    /// Bytes to read; a multiple of the file's alignment, and never 0.
    pub len: u32,
    /// Where the bytes land; aligned like `offset`.
    pub into: NonNull<u8>,
    /// Comes back in the [`Completion`], for the caller to know its reads by.
    pub token: u64,
}

// SAFETY: a `Read` is a request, not an access. Whoever performs it relies on
// the promise made to `Io::submit`, which says that `into` may be written from
// any thread until the completion is reaped.
#[allow(unsafe_code)]
unsafe impl Send for Read {}

/// A finished read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// The token of its [`Read`].
    pub token: u64,
    /// The bytes read, which may be fewer than asked for, or why there are none.
    pub result: std::result::Result<u32, Errno>,
}

impl Completion {
    /// A value to fill the array that [`Io::reap`] writes to.
    pub const NONE: Completion = Completion {
        token: u64::MAX,
        result: Ok(0),
    };
}

/// As many reads as [`Io::depth`] are in flight already; reap some first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// A piece of memory that reads land in, for registration with the kernel.
///
/// Registration pins the pages behind it for the life of the [`Io`], or until it
/// [registers](Io::register) others: memory given back with `madvise` would be
/// lost to later reads, so keep the mapping as it is until then.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// First byte, page-aligned.
    pub start: NonNull<u8>,
    /// Bytes; io_uring takes 1 GiB at most.
    pub len: usize,
}

/// Reads in flight. Dropping an `Io` waits for all of them, so the memory they
/// land in may be freed afterwards.
pub trait Io: Send {
    /// Queues a read; it goes to the kernel with the next [`flush`](Io::flush).
    ///
    /// # Safety
    /// `into..into + len` is valid for writes, and nobody else reads or writes
    /// it, until the completion with this token is reaped or the `Io` is dropped.
    #[allow(unsafe_code)]
    unsafe fn submit(&mut self, read: Read) -> std::result::Result<(), Full>;

    /// Hands everything queued to the kernel, in one system call.
    fn flush(&mut self) -> Result<()>;

    /// Moves finished reads into `done`, as many as it holds, and returns how
    /// many. With `wait`, blocks for at least one if any is in flight, and then
    /// flushes first, for what was never sent never finishes.
    fn reap(&mut self, done: &mut [Completion], wait: bool) -> Result<usize>;

    /// The most reads that can be in flight.
    fn depth(&self) -> usize;

    /// Reads submitted and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Has the kernel hold on to the pages of these regions, and of no others, while nothing is in flight.
    ///
    /// What an `Io` holds counts against RLIMIT_MEMLOCK, so whoever replaces one has the old one hold nothing first. One
    /// that registers nothing has nothing to do.
    fn register(&mut self, _regions: &[Region]) {}

    /// What is at work, for the summary of a run: "io_uring, direct, registered buffers".
    fn describe(&self) -> &str;
}

/// The ways to read that a real run can use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backend {
    /// io_uring.
    Uring,
    /// Positioned reads on a few threads.
    Pread,
}

impl Backend {
    /// Starts to read in this way. `regions` is the memory that reads land in, registered with the kernel where it
    /// agrees.
    ///
    /// # Errors
    /// This system does not have it, or refuses.
    pub fn open(self, files: &Arc<Files>, regions: &[Region], depth: usize) -> Result<Box<dyn Io>> {
        Ok(match self {
            Backend::Uring => Box::new(uring::Uring::new(files, regions, depth)?),
            Backend::Pread => Box::new(pread::Pread::new(files, depth)?),
        })
    }
}

/// Starts the best way to read that this system has, or the one in `force`, and tells which it is.
///
/// Where io_uring is not to be had, says why in the log and reads with threads.
///
/// # Errors
/// As of [`Backend::open`].
pub fn choose(
    files: &Arc<Files>,
    regions: &[Region],
    depth: usize,
    force: Option<Backend>,
) -> Result<(Box<dyn Io>, Backend)> {
    if let Some(backend) = force {
        return Ok((backend.open(files, regions, depth)?, backend));
    }
    match Backend::Uring.open(files, regions, depth) {
        Ok(io) => Ok((io, Backend::Uring)),
        Err(e) => {
            log::warn!("{e}\n  reading with threads instead");
            Ok((Backend::Pread.open(files, regions, depth)?, Backend::Pread))
        }
    }
}
