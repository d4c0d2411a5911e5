//! A disk that is only arithmetic, on a clock that moves when told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A disk: `depth` reads overlap their latencies and share the bandwidth in the order they came.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Of all reads together.
    pub bytes_per_second: f64,
    /// From the start of a read to its first byte.
    pub latency_ns: u64,
    /// Reads that the disk works on at a time; more of them wait.
    pub depth: usize,
}

/// A clock that only moves when told to; clones show the same time.
#[derive(Clone, Debug, Default)]
pub struct Clock(Arc<AtomicU64>);

impl Clock {
    /// Nanoseconds since the beginning.
    pub fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Lets time pass: work is done while the disk reads.
    pub fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::Relaxed);
    }

    /// Lets time pass until then, if that is still to come.
    pub(super) fn advance_to(&self, ns: u64) {
        self.0.fetch_max(ns, Ordering::Relaxed);
    }
}

/// What a disk is busy with.
#[derive(Debug)]
pub(super) struct Queue {
    disk: Disk,
    /// When the transfers given so far are done.
    transfers_done_ns: u64,
    /// When each of the reads that the disk works on at a time is done.
    places_done_ns: Vec<u64>,
}

impl Queue {
    pub(super) fn new(disk: Disk) -> Self {
        Queue {
            disk,
            transfers_done_ns: 0,
            places_done_ns: vec![0; disk.depth.max(1)],
        }
    }

    /// When a read of `len` bytes that comes at `now_ns` is done.
    pub(super) fn take(&mut self, len: u32, now_ns: u64) -> u64 {
        let place = self
            .places_done_ns
            .iter_mut()
            .min()
            .expect("a disk has a place");
        let first_byte = now_ns.max(*place) + self.disk.latency_ns;
        let transfer_ns = f64::from(len) / self.disk.bytes_per_second * 1e9;
        *place = first_byte.max(self.transfers_done_ns) + transfer_ns.round() as u64;
        self.transfers_done_ns = *place;
        *place
    }
}
