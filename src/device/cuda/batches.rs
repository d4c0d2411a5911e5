//! Launches that go to the driver together, and the tables that they read.
//!
//! A launch waits here until enough have come, or until something is asked of the driver that has to come behind it: a
//! copy in its stream, a mark, memory. Then the tables that all of them read, which the processor has written one behind
//! the other, go to the GPU's memory in one copy, and the launches after it. Kernels that read their tables where the
//! processor wrote them take longer than their work on a GPU behind a bus: a sweep of an 8B model on an H200 took 6.6 ms
//! so, and 4.1 ms with tables of its own.
//!
//! From sweep to sweep the batches are the same, but for what tables say: so a driver may keep one to give it at once.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{Args, Driver, Facts, KernelId, Launch, Stream};
use super::queue::FINISH;
use crate::error::Result;

/// Launches of the first batch after the device was finished: the GPU begins early. Each batch has twice as many as the
/// one before it, up to the most.
const LAUNCHES_MIN: usize = 8;
pub(super) const LAUNCHES_MAX: usize = 64;

/// Bytes of tables that are not on the GPU yet.
#[derive(Debug, Clone, Copy)]
struct Tables {
    to: u64,
    from: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Waiting {
    launches: Vec<Launch>,
    tables: Option<Tables>,
    /// Batches since the device was finished.
    place: usize,
}

/// A driver that is given launches in batches.
pub(super) struct Batches {
    driver: Arc<dyn Driver>,
    waiting: Mutex<Waiting>,
}

impl Batches {
    pub(super) fn new(driver: Arc<dyn Driver>) -> Batches {
        Batches {
            driver,
            waiting: Mutex::new(Waiting {
                launches: Vec::with_capacity(LAUNCHES_MAX),
                tables: None,
                place: 0,
            }),
        }
    }

    /// Has tables be on the GPU before the next launch runs.
    ///
    /// # Errors
    /// The driver refuses what waited before them.
    ///
    /// # Safety
    /// As of [`Driver::copy`]; nobody writes them until all is done that is launched before the device is finished.
    pub(super) unsafe fn stage(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        let mut waiting = self.waiting();
        match &mut waiting.tables {
            Some(tables) if tables.to + tables.bytes as u64 == to => tables.bytes += bytes,
            Some(_) => {
                self.give(&mut waiting)?;
                waiting.tables = Some(Tables { to, from, bytes });
            }
            none => *none = Some(Tables { to, from, bytes }),
        }
        Ok(())
    }

    /// Nothing fails between two changes of it.
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the driver all that waits.
    fn give(&self, waiting: &mut Waiting) -> Result<()> {
        if let Some(Tables { to, from, bytes }) = waiting.tables.take() {
            // SAFETY: whoever staged them vouches for both.
            unsafe { self.driver.copy(Stream::Compute, to, from, bytes)? };
        }
        if waiting.launches.is_empty() {
            return Ok(());
        }
        // SAFETY: whoever launched them vouches for their arguments.
        let given = unsafe { self.driver.launch_all(waiting.place, &waiting.launches) };
        waiting.launches.clear();
        waiting.place += 1;
        given
    }

    fn give_all(&self) -> Result<()> {
        self.give(&mut self.waiting())
    }
}

impl Driver for Batches {
    fn facts(&self) -> &Facts {
        self.driver.facts()
    }

    fn free_bytes(&self) -> Result<u64> {
        self.driver.free_bytes()
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.driver.allocate(bytes)
    }

    unsafe fn free(&self, address: u64) {
        // SAFETY: passed on; whoever frees has waited for all that was launched, which has it given.
        unsafe { self.driver.free(address) };
    }

    unsafe fn register(&self, base: NonNull<u8>, bytes: usize) -> Result<u64> {
        // SAFETY: passed on.
        unsafe { self.driver.register(base, bytes) }
    }

    unsafe fn unregister(&self, base: NonNull<u8>) {
        // SAFETY: passed on, as for `free`.
        unsafe { self.driver.unregister(base) };
    }

    fn kernel(&self, name: &str) -> Result<KernelId> {
        self.driver.kernel(name)
    }

    unsafe fn launch(
        &self,
        kernel: KernelId,
        grid: [u32; 3],
        threads: u32,
        args: &Args,
    ) -> Result<()> {
        let mut waiting = self.waiting();
        waiting.launches.push(Launch {
            kernel,
            grid,
            threads,
            args: args.clone(),
        });
        match waiting.launches.len() == LAUNCHES_MAX.min(LAUNCHES_MIN << waiting.place.min(8)) {
            true => self.give(&mut waiting),
            false => Ok(()),
        }
    }

    unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        if stream == Stream::Compute {
            self.give_all()?;
        }
        // SAFETY: passed on.
        unsafe { self.driver.copy(stream, to, from, bytes) }
    }

    fn record(&self, stream: Stream, event: usize) -> Result<()> {
        if stream == Stream::Compute {
            let mut waiting = self.waiting();
            self.give(&mut waiting)?;
            if event == FINISH {
                waiting.place = 0;
            }
        }
        self.driver.record(stream, event)
    }

    fn done(&self, event: usize) -> Result<bool> {
        self.driver.done(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that writes down what it is given.
    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Log {
        fn note(&self, what: String) -> Result<()> {
            self.0.lock().expect("nobody panics with it").push(what);
            Ok(())
        }

        fn take(&self) -> String {
            let mut noted = self.0.lock().expect("nobody panics with it");
            std::mem::take(&mut *noted).join(", ")
        }
    }

    impl Driver for Log {
        fn facts(&self) -> &Facts {
            unreachable!("launches and copies alone are asked for")
        }

        fn free_bytes(&self) -> Result<u64> {
            unreachable!("launches and copies alone are asked for")
        }

        fn allocate(&self, _: usize) -> Result<u64> {
            unreachable!("launches and copies alone are asked for")
        }

        unsafe fn free(&self, _: u64) {}

        unsafe fn register(&self, _: NonNull<u8>, _: usize) -> Result<u64> {
            unreachable!("launches and copies alone are asked for")
        }

        unsafe fn unregister(&self, _: NonNull<u8>) {}

        fn kernel(&self, _: &str) -> Result<KernelId> {
            unreachable!("launches and copies alone are asked for")
        }

        unsafe fn launch(&self, _: KernelId, _: [u32; 3], _: u32, _: &Args) -> Result<()> {
            unreachable!("launches come in batches")
        }

        unsafe fn launch_all(&self, place: usize, launches: &[Launch]) -> Result<()> {
            self.note(format!("{} launches at {place}", launches.len()))
        }

        unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
            self.note(format!("{bytes} bytes {from} to {to} in {stream:?}"))
        }

        fn record(&self, stream: Stream, event: usize) -> Result<()> {
            self.note(format!("mark {event} in {stream:?}"))
        }

        fn done(&self, _: usize) -> Result<bool> {
            Ok(true)
        }
    }

    fn launch(batches: &Batches, count: usize) {
        for _ in 0..count {
            // SAFETY: nothing is done with it.
            unsafe { batches.launch(KernelId(1), [1; 3], 32, &Args::new()) }.expect("well");
        }
    }

    fn stage(batches: &Batches, to: u64, bytes: usize) {
        // SAFETY: nothing is done with them.
        unsafe { batches.stage(to, to + 1000, bytes) }.expect("well");
    }

    #[test]
    fn batches_grow_and_begin_anew_when_the_device_is_finished() {
        let log = Arc::new(Log::default());
        let batches = Batches::new(Arc::clone(&log) as Arc<dyn Driver>);
        for _ in 0..2 {
            launch(&batches, 8 + 16 + 32 + 64 + 64 + 3);
            let sizes = "8 launches at 0, 16 launches at 1, 32 launches at 2, 64 launches at 3, 64 launches at 4";
            assert_eq!(log.take(), sizes);
            batches.record(Stream::Compute, FINISH).expect("well");
            assert_eq!(log.take(), "3 launches at 5, mark 2 in Compute");
        }
    }

    #[test]
    fn nothing_of_a_stream_overtakes_launches_and_tables_come_before_them() {
        let log = Arc::new(Log::default());
        let batches = Batches::new(Arc::clone(&log) as Arc<dyn Driver>);
        stage(&batches, 0, 64);
        launch(&batches, 1);
        stage(&batches, 64, 32);
        launch(&batches, 1);
        // SAFETY: nothing is done with it.
        unsafe { batches.copy(Stream::Tiles, 5, 6, 7) }.expect("well");
        batches.record(Stream::Tiles, 9).expect("well");
        assert_eq!(log.take(), "7 bytes 6 to 5 in Tiles, mark 9 in Tiles");
        // SAFETY: as above.
        unsafe { batches.copy(Stream::Compute, 5, 6, 7) }.expect("well");
        let tables = "96 bytes 1000 to 0 in Compute, 2 launches at 0";
        assert_eq!(log.take(), format!("{tables}, 7 bytes 6 to 5 in Compute"));
        // Tables elsewhere end a batch.
        stage(&batches, 0, 8);
        launch(&batches, 1);
        stage(&batches, 512, 8);
        launch(&batches, 1);
        batches.record(Stream::Compute, 0).expect("well");
        assert_eq!(
            log.take(),
            "8 bytes 1000 to 0 in Compute, 1 launches at 1, \
             8 bytes 1512 to 512 in Compute, 1 launches at 2, mark 0 in Compute"
        );
    }
}
