//! A disk that is only arithmetic, on a clock that moves when told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::random::Random;

/// How irregular a disk is; the default is not at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Jitter {
    /// Latencies are log-normal: this is the standard deviation of their logarithm, and the disk's own the median.
    pub latency_spread: f64,
    /// The whole disk stops once in so many reads, on average; 0 for never.
    pub stall_once_in: u32,
    /// For so long.
    pub stall_ns: u64,
    /// Whether it tells of finished reads only when it has done all that it was given, as some virtual disks do.
    pub in_lumps: bool,
}

impl Jitter {
    /// A latency around `median_ns`.
    fn latency_ns(&self, median_ns: u64, random: &mut Random) -> u64 {
        match self.latency_spread {
            0.0 => median_ns,
            spread => (median_ns as f64 * (spread * random.normal()).exp()) as u64,
        }
    }

    /// How long the disk stops now; mostly not at all.
    fn stall_ns(&self, random: &mut Random) -> u64 {
        match self.stall_once_in {
            0 => 0,
            once_in if random.below(u64::from(once_in)) == 0 => self.stall_ns,
            _ => 0,
        }
    }
}

/// A disk: `depth` reads overlap their latencies and share the bandwidth in the order they came.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Of all reads together.
    pub bytes_per_second: f64,
    /// From the start of a read to its first byte.
    pub latency_ns: u64,
    /// Reads that the disk works on at a time; more of them wait.
    pub depth: usize,
    /// What it adds to that at times.
    pub jitter: Jitter,
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
    /// Whether reads finish together.
    pub(super) fn in_lumps(&self) -> bool {
        self.disk.jitter.in_lumps
    }

    pub(super) fn new(disk: Disk) -> Self {
        Queue {
            disk,
            transfers_done_ns: 0,
            places_done_ns: vec![0; disk.depth.max(1)],
        }
    }

    /// When a read of `len` bytes that comes at `now_ns` is done.
    pub(super) fn take(&mut self, len: u32, now_ns: u64, random: &mut Random) -> u64 {
        let place = self
            .places_done_ns
            .iter_mut()
            .min()
            .expect("a disk has a place");
        let jitter = self.disk.jitter;
        let latency_ns = jitter.latency_ns(self.disk.latency_ns, random);
        let first_byte = now_ns.max(*place) + latency_ns;
        match jitter.stall_ns(random) {
            0 => {}
            stall_ns => self.transfers_done_ns = self.transfers_done_ns.max(now_ns) + stall_ns,
        }
        let transfer_ns = f64::from(len) / self.disk.bytes_per_second * 1e9;
        *place = first_byte.max(self.transfers_done_ns) + transfer_ns.round() as u64;
        self.transfers_done_ns = *place;
        *place
    }
}
