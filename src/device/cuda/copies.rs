//! The store's copies of tiles into the GPU's own memory, and its marks in what the GPU is given to compute.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use super::driver::{Driver, QUEUE_EVENTS, Stream};
use super::queue::finish;
use crate::error::Result;
use crate::store::{COPIES_MAX, Copies, MARKS_MAX};

/// Events in the order in which they are recorded, over and over.
struct Ring {
    stream: Stream,
    first: usize,
    len: usize,
    recorded: u64,
    done: u64,
}

impl Ring {
    fn record(&mut self, driver: &dyn Driver) -> Result<()> {
        assert!(
            self.recorded - self.done < self.len as u64,
            "a ring is full"
        );
        driver.record(self.stream, self.first + self.recorded as usize % self.len)?;
        self.recorded += 1;
        Ok(())
    }

    fn done(&mut self, driver: &dyn Driver) -> Result<u64> {
        while self.done < self.recorded
            && driver.done(self.first + self.done as usize % self.len)?
        {
            self.done += 1;
        }
        Ok(self.done)
    }
}

/// The copies of one GPU.
pub(super) struct TileCopies {
    driver: Arc<dyn Driver>,
    copies: Ring,
    marks: Ring,
}

impl TileCopies {
    pub(super) fn new(driver: &Arc<dyn Driver>) -> TileCopies {
        let ring = |stream, first, len| Ring {
            stream,
            first,
            len,
            recorded: 0,
            done: 0,
        };
        TileCopies {
            driver: Arc::clone(driver),
            copies: ring(Stream::Tiles, QUEUE_EVENTS, COPIES_MAX),
            marks: ring(Stream::Compute, QUEUE_EVENTS + COPIES_MAX, MARKS_MAX),
        }
    }
}

impl Copies for TileCopies {
    unsafe fn begin(&mut self, from: NonNull<u8>, to: NonNull<u8>, bytes: usize) -> Result<()> {
        let address = |memory: NonNull<u8>| memory.as_ptr().expose_provenance() as u64;
        // SAFETY: the caller vouches for both.
        unsafe {
            let (from, to) = (address(from), address(to));
            self.driver.copy(Stream::Tiles, to, from, bytes)?;
        }
        self.copies.record(self.driver.as_ref())
    }

    fn done(&mut self) -> Result<u64> {
        self.copies.done(self.driver.as_ref())
    }

    fn mark(&mut self) -> Result<()> {
        self.marks.record(self.driver.as_ref())
    }

    fn passed(&mut self) -> Result<u64> {
        self.marks.done(self.driver.as_ref())
    }
}

impl Drop for TileCopies {
    fn drop(&mut self) {
        if let Err(error) = finish(self.driver.as_ref(), Stream::Tiles) {
            log::debug!("ending copies: {error}");
        }
    }
}
