//! How far the processor runs ahead of the GPU, and the memory for what a launch reads besides tensors.
//!
//! Tables (of tiles, pages, rows) stand in two halves of a fixed piece of memory. An op takes all its
//! tables from one half. When that is full, or enough was launched, the other half is next, once all
//! that was launched while it was last in use is done: so the GPU is never more than two halves behind,
//! and no table is overwritten before it was read.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use super::driver::{Driver, Stream};
use crate::arena::Span;
use crate::error::Result;

/// Ops of one half at most.
const OPS_MAX: u32 = 64;
/// The event that the end of all launches is known by; the halves have the ones before it.
const FINISH: usize = 2;
/// The events that [`finish`] waits for, in the order of `Stream`.
const FINISHED: [usize; 2] = [FINISH, 3];
/// Tables begin at a multiple of this.
const ALIGNMENT: usize = 16;

/// The queue of one device.
pub(super) struct Queue {
    tables: Span<u8>,
    half: usize,
    used: usize,
    ops: u32,
    /// The half's event was recorded and not waited for.
    pending: [bool; 2],
}

/// Bytes that a table of `count` values takes.
pub(super) const fn table_bytes<T>(count: usize) -> usize {
    (count * size_of::<T>()).next_multiple_of(ALIGNMENT)
}

impl Queue {
    pub(super) fn new(tables: Span<u8>) -> Queue {
        Queue {
            tables,
            half: 0,
            used: 0,
            ops: 0,
            pending: [false; 2],
        }
    }

    /// Begins an op with tables of `bytes` together.
    ///
    /// # Errors
    /// What the device did before failed.
    pub(super) fn begin(&mut self, driver: &dyn Driver, bytes: usize) -> Result<()> {
        let half_bytes = self.tables.len() / 2;
        assert!(
            bytes <= half_bytes,
            "tables of {bytes} bytes in {half_bytes}"
        );
        if self.ops == OPS_MAX || self.used + bytes > half_bytes {
            driver.record(Stream::Compute, self.half)?;
            self.pending[self.half] = true;
            self.half = 1 - self.half;
            if self.pending[self.half] {
                wait(driver, self.half, &mut || ())?;
                self.pending[self.half] = false;
            }
            (self.used, self.ops) = (0, 0);
        }
        self.ops += 1;
        Ok(())
    }

    /// Room for a table of the op that was begun: `count` values, not written yet, until the next op begins.
    pub(super) fn table<T>(&mut self, count: usize) -> *mut T {
        let (bytes, half_bytes) = (table_bytes::<T>(count), self.tables.len() / 2);
        assert!(self.used + bytes <= half_bytes, "the op began with less");
        let at = self.half * half_bytes + self.used;
        self.used += bytes;
        self.tables[at..].as_mut_ptr().cast()
    }

    /// A table of the op that was begun.
    pub(super) fn put<T: Copy>(&mut self, values: impl ExactSizeIterator<Item = T>) -> *const T {
        let table = self.table::<T>(values.len());
        for (i, value) in values.enumerate() {
            // SAFETY: within the table, which nobody reads yet; spans and tables are aligned.
            unsafe { table.add(i).write(value) };
        }
        table
    }

    /// The memory that tables stand in.
    pub(super) fn memory(&self) -> (NonNull<u8>, usize) {
        self.tables.mapping()
    }

    /// Waits until all is done; `poll` is called meanwhile.
    ///
    /// # Errors
    /// Something failed.
    pub(super) fn finish(&mut self, driver: &dyn Driver, poll: &mut dyn FnMut()) -> Result<()> {
        driver.record(Stream::Compute, FINISH)?;
        wait(driver, FINISH, poll)?;
        self.pending = [false; 2];
        (self.used, self.ops) = (0, 0);
        Ok(())
    }
}

/// Waits until all is done that a stream was given.
///
/// # Errors
/// Something failed.
pub(super) fn finish(driver: &dyn Driver, stream: Stream) -> Result<()> {
    let event = FINISHED[stream as usize];
    driver.record(stream, event)?;
    wait(driver, event, &mut || ())
}

fn wait(driver: &dyn Driver, event: usize, poll: &mut dyn FnMut()) -> Result<()> {
    while !driver.done(event)? {
        poll();
        std::thread::yield_now();
    }
    Ok(())
}
