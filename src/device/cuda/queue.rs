//! How far the processor runs ahead of the GPU, and the memory for what a launch reads besides tensors.
//!
//! Tables (of tiles, pages, rows) stand in two halves of a fixed piece of memory, and in a copy of it on the GPU, where
//! kernels read them. An op takes all its tables from one half. When that is full, or enough was launched, the other half is next, once all
//! that was launched while it was last in use is done: so the GPU is never more than two halves behind,
//! and no table is overwritten before it was read.
#![allow(unsafe_code)]

use std::ops::{Range, RangeInclusive};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use super::driver::{Driver, Stream};
use crate::arena::Span;
use crate::error::Result;

/// Ops of one half at most.
const OPS_MAX: u32 = 64;
/// The event that the end of all launches is known by; the halves have the ones before it.
pub(super) const FINISH: usize = 2;
/// The events that [`finish`] waits for, in the order of `Stream`.
const FINISHED: [usize; 2] = [FINISH, 3];
/// Tables begin at a multiple of this.
const ALIGNMENT: usize = 16;

/// The queue of one device.
pub(super) struct Queue {
    tables: Span<u8>,
    half: usize,
    used: usize,
    /// How much of the half's tables launches were told of.
    staged: usize,
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
            staged: 0,
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
            self.free(driver, self.half, &mut || ())?;
            (self.used, self.staged, self.ops) = (0, 0, 0);
        }
        self.ops += 1;
        Ok(())
    }

    /// Waits for the other half while there is still work in this one, if it is about to be next; `poll` is called
    /// meanwhile. Ops that come now and then and can poll say this, so that none that cannot has to wait.
    ///
    /// # Errors
    /// What the device did before failed.
    pub(super) fn make_room(&mut self, driver: &dyn Driver, poll: &mut dyn FnMut()) -> Result<()> {
        match self.ops >= OPS_MAX / 2 || self.used >= self.tables.len() / 4 {
            true => self.free(driver, 1 - self.half, poll),
            false => Ok(()),
        }
    }

    /// Waits until nothing reads the tables of a half.
    fn free(&mut self, driver: &dyn Driver, half: usize, poll: &mut dyn FnMut()) -> Result<()> {
        if self.pending[half] {
            wait(driver, half, poll)?;
            self.pending[half] = false;
        }
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

    /// Tables that were put since this was last asked: where in the memory they stand, and their bytes.
    pub(super) fn new_tables(&mut self) -> Option<Range<usize>> {
        let begin = self.half * (self.tables.len() / 2);
        let new = begin + self.staged..begin + self.used;
        self.staged = self.used;
        (!new.is_empty()).then_some(new)
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
        // The next sweep's tables stand where this one's did.
        (self.half, self.used, self.staged, self.ops) = (0, 0, 0, 0);
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

/// So long a wait spins: the GPU is about to be done, and waking up from a sleep takes as long.
const SPIN: Duration = Duration::from_micros(50);
/// A sleep is this part of the time that was waited so far, which is late by little, within bounds.
const NAP_SHARE: u32 = 32;
const NAP: RangeInclusive<Duration> = Duration::from_micros(10)..=Duration::from_micros(100);

/// Has this thread's sleeps end when they should: the kernel adds up to 50 us otherwise, a few percent of a sweep.
fn wake_in_time() {
    thread_local! {
        static SET: nix::Result<()> = nix::sys::prctl::set_timerslack(1);
    }
    SET.with(|_| ());
}

/// Waits for an event; `poll` is called meanwhile. The processor sleeps between: a board's power is the GPU's too.
fn wait(driver: &dyn Driver, event: usize, poll: &mut dyn FnMut()) -> Result<()> {
    let begun = Instant::now();
    wake_in_time();
    while !driver.done(event)? {
        poll();
        let waited = begun.elapsed();
        match waited < SPIN {
            true => std::thread::yield_now(),
            false => std::thread::sleep((waited / NAP_SHARE).clamp(*NAP.start(), *NAP.end())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::driver::{Args, Facts, KernelId};
    use super::*;
    use crate::arena::Reservation;

    /// A driver that only has events, each of which is done some time after it was recorded.
    struct Late {
        after: Duration,
        begun: Instant,
        asked: AtomicU32,
    }

    impl Late {
        fn by(after: Duration) -> Late {
            Late {
                after,
                begun: Instant::now(),
                asked: AtomicU32::new(0),
            }
        }

        fn asked(&self) -> u32 {
            self.asked.load(Ordering::Relaxed)
        }
    }

    impl Driver for Late {
        fn record(&self, _: Stream, _: usize) -> Result<()> {
            Ok(())
        }

        fn done(&self, _: usize) -> Result<bool> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            Ok(self.begun.elapsed() >= self.after)
        }

        fn facts(&self) -> &Facts {
            unreachable!("events alone are asked for")
        }

        fn free_bytes(&self) -> Result<u64> {
            unreachable!("events alone are asked for")
        }

        fn allocate(&self, _: usize) -> Result<u64> {
            unreachable!("events alone are asked for")
        }

        unsafe fn free(&self, _: u64) {}

        unsafe fn register(&self, _: NonNull<u8>, _: usize) -> Result<u64> {
            unreachable!("events alone are asked for")
        }

        unsafe fn unregister(&self, _: NonNull<u8>) {}

        fn kernel(&self, _: &str) -> Result<KernelId> {
            unreachable!("events alone are asked for")
        }

        unsafe fn launch(&self, _: KernelId, _: [u32; 3], _: u32, _: &Args) -> Result<()> {
            unreachable!("events alone are asked for")
        }

        unsafe fn copy(&self, _: Stream, _: u64, _: u64, _: usize) -> Result<()> {
            unreachable!("events alone are asked for")
        }
    }

    #[test]
    fn ops_that_can_poll_wait_for_those_that_cannot() {
        let mut memory = Reservation::new(4096).expect("a page");
        let mut queue = Queue::new(memory.carve(4096).expect("all of it"));
        let driver = Late::by(Duration::from_millis(30));
        let mut polls = 0;
        let ops = |queue: &mut Queue, count, polls: &mut u32| {
            for _ in 0..count {
                queue.make_room(&driver, &mut || *polls += 1).expect("well");
                queue.begin(&driver, 0).expect("well");
            }
        };
        // One half after the other: nothing is to be waited for.
        ops(&mut queue, OPS_MAX + OPS_MAX / 2, &mut polls);
        assert_eq!((polls, driver.asked()), (0, 0));
        ops(&mut queue, 1, &mut polls);
        assert!(
            polls > 0,
            "the first half is waited for while the second one has work"
        );
        let asked = driver.asked();
        for _ in 0..OPS_MAX / 2 {
            queue.begin(&driver, 0).expect("well");
        }
        assert_eq!(driver.asked(), asked, "ops that cannot poll do not wait");
    }

    #[test]
    fn a_long_wait_is_slept_through() {
        let driver = Late::by(Duration::from_millis(40));
        finish(&driver, Stream::Compute).expect("well");
        // Spinning asks ten thousands of times; fifty microseconds of it a few hundred times at most.
        assert!(driver.asked() < 4000, "asked {} times", driver.asked());
    }
}
