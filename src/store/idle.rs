//! What the store does while nobody computes: it goes on reading, or measures the disk.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::reads::{MEASURED_TOKEN, queue_full};
use super::{Phase, REAP_MAX, Store};
use crate::arena::SlotId;
use crate::error::Result;
use crate::io::measure::{Bandwidth, cpu_seconds};
use crate::io::{Completion, FileId, Read};

/// What [`Store::measure_disk`] found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DiskSample {
    /// How fast the disk was; none if nothing streams.
    pub bandwidth: Option<Bandwidth>,
    /// Bytes that the sweep before had read ahead for the next one, which reads them again.
    pub dropped_bytes: u64,
}

impl Store {
    /// Fills free slots from disk without a sweep; says whether reads or copies are still in flight. Never blocks: call
    /// it again a millisecond later.
    ///
    /// # Errors
    /// The system takes no reads. A read that fails is no error: its tile is read again when it is needed.
    pub fn idle(&mut self) -> Result<bool> {
        self.poll()?;
        let copying = self.staging.as_ref().is_some_and(|s| s.is_busy());
        Ok(copying || self.io.in_flight() > 0)
    }

    /// How fast the disk is at present, between two sweeps and in the store's own memory: it reads what streams, as a
    /// sweep would if computing took no time, for `budget`.
    ///
    /// The first and the last reads are not counted, so what counts is the disk at its work. What was read ahead is
    /// dropped.
    ///
    /// # Errors
    /// A read failed.
    pub fn measure_disk(&mut self, budget: Duration) -> Result<DiskSample> {
        assert!(
            self.acquired.is_empty() && self.waiting == 0,
            "the disk is measured between sweeps"
        );
        let dropped_bytes = (0..self.tiles.len() as u32)
            .filter(|&tile| self.is_ahead(tile))
            .map(|tile| self.tiles[tile as usize].read_bytes() as u64)
            .sum();
        self.drain()?;
        for tile in 0..self.tiles.len() as u32 {
            if self.is_ahead(tile) {
                self.give_up(tile);
            }
        }
        self.restart_ahead();
        let streamed = self.residency.streamed().collect();
        let depth = self.free.len().min(self.in_flight_max());
        let places = self.free.split_off(self.free.len() - depth);
        let measured = self.measure_into(&places, streamed, budget);
        if self.io.in_flight() == 0 {
            self.free.extend(places);
        } else {
            // The system broke down in the middle of it, so reads may still arrive there: these slots are lost.
            let capacity = self.residency.capacity();
            self.residency.set_capacity(capacity - places.len() as u32);
        }
        Ok(DiskSample {
            bandwidth: measured?,
            dropped_bytes,
        })
    }

    /// Whether a tile that streams has arrived before its turn.
    fn is_ahead(&self, tile: u32) -> bool {
        self.states[tile as usize].phase == Phase::Ready && !self.residency.keeps(tile)
    }

    /// Reads `tiles` into `places`, which are nobody's, again and again.
    fn measure_into(
        &mut self,
        places: &[SlotId],
        mut tiles: Vec<u32>,
        budget: Duration,
    ) -> Result<Option<Bandwidth>> {
        if tiles.is_empty() || places.is_empty() {
            return Ok(None);
        }
        tiles.sort_unstable();
        let from = tiles.partition_point(|&tile| tile < self.current.end) % tiles.len();
        tiles.rotate_left(from);
        let mut submitted = 0;
        for _ in places {
            self.submit_measured(&tiles, &mut submitted, places)?;
        }
        self.io.flush()?;

        let mut done = [Completion::NONE; REAP_MAX];
        let (mut finished, mut bytes, mut failed) = (0, 0, None);
        let (mut begun, mut found) = (None, None);
        // All reads are waited for, whatever comes of them: the slots are free again afterwards.
        while self.io.in_flight() > 0 {
            let count = self.io.reap(&mut done, true)?;
            finished += count;
            for completion in &done[..count] {
                match completion.result {
                    Ok(got) => bytes += u64::from(got),
                    Err(Errno::EINTR | Errno::EAGAIN) => {}
                    Err(errno) => failed = failed.or(Some((completion.token, errno))),
                }
            }
            match begun {
                None if finished >= places.len() => {
                    (begun, bytes) = (Some((Instant::now(), cpu_seconds()?)), 0);
                }
                Some((start, cpu_start)) if found.is_none() && start.elapsed() >= budget => {
                    found = Some(Bandwidth {
                        bytes,
                        seconds: start.elapsed().as_secs_f64(),
                        cpu_seconds: cpu_seconds()? - cpu_start,
                    });
                }
                _ => {}
            }
            for _ in 0..count {
                if found.is_none() && failed.is_none() {
                    self.submit_measured(&tiles, &mut submitted, places)?;
                }
            }
            self.io.flush()?;
        }
        if let Some((token, errno)) = failed {
            let submitted = (token - MEASURED_TOKEN) as usize;
            let what = self.tiles[tiles[submitted % tiles.len()] as usize];
            return Err(self.read_error(
                what.matrix as usize,
                what.file,
                what.offset,
                errno.desc(),
            ));
        }
        Ok(found)
    }

    /// Submits the read of the next of `tiles` into one of `places`, for its time only.
    fn submit_measured(
        &mut self,
        tiles: &[u32],
        submitted: &mut usize,
        places: &[SlotId],
    ) -> Result<()> {
        let what = &self.tiles[tiles[*submitted % tiles.len()] as usize];
        let read = Read {
            file: FileId(what.file),
            offset: what.read_offset(),
            len: what.read_bytes() as u32,
            into: self.slots.ptr(places[*submitted % places.len()]),
            token: MEASURED_TOKEN + *submitted as u64,
        };
        *submitted += 1;
        // SAFETY: the slots are out of the free list until every read is reaped. Two reads may be in flight to one of
        // them, which is harmless: nobody ever looks at these bytes.
        let result = unsafe { self.io.submit(read) };
        result.map_err(|_| queue_full())
    }
}
