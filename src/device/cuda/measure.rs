//! What the GPU's memory delivers.
#![allow(unsafe_code)]

use super::Cuda;
use super::driver::{Args, Stream};
use super::memory::Seen;
use crate::error::Result;

/// Bytes that a block of `read_memory` takes at a time, and blocks at most: enough for every GPU.
const READ_PIECE_BYTES: usize = 16 << 10;
const READERS_MAX: usize = 1024;
/// Bytes read at a time: more than caches hold.
const READ_BYTES_MAX: usize = 256 << 20;
/// Reads in a measurement.
const READS: usize = 8;
/// Copies in a measurement, each of 4 MiB where slots have so much in one piece.
const COPIES: usize = 8;
/// How often either is measured: the fastest time counts.
const TIMES: usize = 8;

impl Cuda {
    /// Bytes per second that the GPU reads of the largest pieces of memory it sees, at best: the limit of products
    /// with one row.
    ///
    /// # Errors
    /// The device fails.
    pub fn read_rate(&self) -> Result<f64> {
        // Several at a time: a large GPU has read what caches do not hold before the processor hears of it.
        self.rate(|| (0..READS).map(|_| self.read(READ_BYTES_MAX)).sum())
    }

    /// Bytes per second that go into the GPU's own memory, at best: the limit of what streams; none if it has none.
    ///
    /// # Errors
    /// The device fails.
    pub fn copy_rate(&self) -> Result<Option<f64>> {
        let Some(slots) = self.pinned.iter().max_by_key(|slots| slots.bytes) else {
            return Ok(None);
        };
        // What the splits of attention find is of no use between sweeps.
        let bytes = slots.bytes.min(4 * self.own.sizes.partial_values());
        let from = slots.base.as_ptr().expose_provenance() as u64;
        let copy = || {
            for _ in 0..COPIES {
                // SAFETY: there is as much of either, for as long as the device has not finished.
                let copy = || unsafe {
                    let to = self.own.partial();
                    self.driver.copy(Stream::Compute, to, from, bytes)
                };
                self.attempt(copy);
            }
            COPIES * bytes
        };
        self.rate(copy).map(Some)
    }

    /// Bytes per second of some work, which says how many it moves.
    fn rate(&self, work: impl Fn() -> usize) -> Result<f64> {
        let (mut fastest, mut bytes) = (f64::INFINITY, 0);
        for _ in 0..TIMES {
            self.finish(&mut || ())?;
            let begun = std::time::Instant::now();
            bytes = work();
            self.finish(&mut || ())?;
            fastest = fastest.min(begun.elapsed().as_secs_f64());
        }
        Ok(bytes as f64 / fastest)
    }

    /// Reads up to `bytes_max` bytes of the largest pieces of memory, which slots are in, and answers how many.
    pub(super) fn read(&self, bytes_max: usize) -> usize {
        let slots = || self.seen.iter().filter(|seen| !seen.is_image());
        let largest = slots().map(|seen| seen.bytes).max();
        let pieces = slots().filter(|seen| Some(seen.bytes) == largest);
        pieces.fold(0, |read, piece| {
            read + self.read_piece(piece, bytes_max - read)
        })
    }

    fn read_piece(&self, piece: &Seen, bytes_max: usize) -> usize {
        let bytes = piece.bytes.min(bytes_max) / 16 * 16;
        if bytes == 0 {
            return 0;
        }
        let blocks = (bytes / READ_PIECE_BYTES).clamp(1, READERS_MAX);
        let args = Args::new()
            .with(piece.address)
            .with(bytes as u64 / 16)
            .with(blocks as u32)
            .with(self.own.partial());
        self.op(self.kernels.read, [blocks, 1, 1], 256, args);
        bytes
    }
}
