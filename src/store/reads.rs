//! Reads of tiles: what to read next, where to, and what became of it.

use std::time::Duration;

use std::sync::atomic::Ordering;

use super::{Next, Partial, Phase, REAP_MAX, Store};
use crate::arena::SlotId;
use crate::error::{Error, Kind, Result};
use crate::io::{Completion, FileId, Read};
use crate::trace::What;

/// Tokens from here on are reads of single rows, and from there on those that measure the disk; below they are tiles.
pub(super) const ROW_TOKEN: u64 = 1 << 32;
pub(super) const MEASURED_TOKEN: u64 = 1 << 33;

/// Why a read has failed, where it is not the kernel that says so.
pub(super) const WRONG_BYTES: &str =
    "its checksum was wrong twice, so these are not the bytes that were there before";

/// How long to pause before the kernel, which is short of something, is asked again.
const PAUSE: Duration = Duration::from_millis(1);

/// The error that cannot happen: reads are only submitted while fewer than the queue's depth are in flight.
pub(super) fn queue_full() -> Error {
    Error::new(
        Kind::Io,
        "the queue of reads is full",
        "this is a defect: please report it",
    )
}

/// Pauses if the kernel needs time before a read goes on.
pub(super) fn pause_before(next: Next) {
    if next == Next::GoOnLater {
        std::thread::sleep(PAUSE);
    }
}

impl Store {
    /// Takes in finished reads and copies and begins the next ones; never blocks.
    pub(super) fn poll(&mut self) -> Result<()> {
        self.reap(false)?;
        self.stage()?;
        self.read_ahead()
    }

    /// Keeps the disk busy while the device computes; an error waits for the next `acquire`.
    pub fn feed(&mut self) {
        if self.feed_error.is_none() {
            self.feed_error = self.poll().err();
        }
    }

    /// Starts considering tiles from the current range on again (slots or plan have changed).
    pub(super) fn restart_ahead(&mut self) {
        self.order.restart();
        self.ahead_failed = false;
        if let Some(staging) = &mut self.staging {
            staging.order.restart();
        }
    }

    /// Submits reads for the coming tiles that are not in memory, in the order of their use.
    fn read_ahead(&mut self) -> Result<()> {
        let mut submitted = false;
        while self.io.in_flight() < self.in_flight_max() {
            let Some((tile, used)) = self.order.next() else {
                break;
            };
            if self.wants(tile, used) {
                let Some(slot) = self.slot_for_read() else {
                    break;
                };
                self.read_into(tile, slot)?;
                submitted = true;
            }
            self.order.step();
        }
        if submitted {
            self.io.flush()?;
        }
        Ok(())
    }

    /// Whether reading ahead has passed by a tile of the current range that is needed.
    pub(super) fn passed_by(&self) -> bool {
        let mut passed = self.current.clone().take(self.order.considered() as usize);
        passed.any(|tile| self.wants(tile, true))
    }

    /// Reads in flight at most.
    pub(super) fn in_flight_max(&self) -> usize {
        self.io.depth().min(self.reads_max)
    }

    /// Whether an absent tile is to be read ahead; `used` if one of the sweeps at hand uses it.
    fn wants(&self, tile: u32, used: bool) -> bool {
        let state = &self.states[tile as usize];
        // A tile of the current range that was used and given up in this pass is needed in the next sweep only,
        // and so is one that the plan does not even stream.
        let used_up = self.current.contains(&tile) && state.pass == self.pass;
        let worth = match used {
            true => self.residency.reads(tile),
            false => self.residency.keeps(tile) || self.residency.keeps_on_device(tile),
        };
        state.phase == Phase::Absent && !used_up && worth && !self.on_device(tile)
    }

    /// A slot for the tile that is considered for reading: a free one, or that of a tile outside the plan (which has
    /// changed) that is used later.
    fn slot_for_read(&mut self) -> Option<SlotId> {
        if self.free.is_empty() {
            let mut order = std::mem::take(&mut self.order);
            let stale = order.last_stale(|tile| self.is_stale(tile));
            self.order = order;
            self.give_up(stale?);
        }
        self.free.pop()
    }

    /// With nothing in flight and nothing to hand out: makes room for a tile of the current range and reads it.
    pub(super) fn read_urgent(&mut self) -> Result<()> {
        let missing = |s: &Self, t: &u32| {
            let state = &s.states[*t as usize];
            state.phase == Phase::Absent && state.pass != s.pass && !s.on_device(*t)
        };
        let tile = self
            .current
            .clone()
            .find(|t| missing(self, t))
            .expect("a tile that is waited for is absent, in flight or ready");
        if self.free.is_empty() && !self.give_up_furthest() && !self.give_up_kept()? {
            return Err(Error::new(
                Kind::Budget,
                "no slot is left to read a tile into",
                "give more --memory, or a smaller --ctx",
            ));
        }
        let slot = self.free.pop().expect("just made");
        self.read_into(tile, slot)?;
        self.io.flush()
    }

    /// Drops an idle tile that the plan would keep: the last resort when the plan shrank while slots were in use. False if
    /// there is none.
    fn give_up_kept(&mut self) -> Result<bool> {
        let outside = |s: &Self, t: &u32| {
            s.states[*t as usize].phase == Phase::Ready && !s.current.contains(t)
        };
        let Some(tile) = (0..self.tiles.len() as u32).find(|t| outside(self, t)) else {
            return Ok(false);
        };
        self.wait_for_readers()?;
        self.give_up(tile);
        self.restart_ahead();
        Ok(true)
    }

    /// Submits the first read of a tile into a slot that is its own from now on.
    fn read_into(&mut self, tile: u32, slot: SlotId) -> Result<()> {
        let state = &mut self.states[tile as usize];
        (state.slot, state.read) = (slot, Partial::NONE);
        self.submit(tile)
    }

    /// Submits the read of what is still missing of a tile into its slot.
    fn submit(&mut self, tile: u32) -> Result<()> {
        let state = &mut self.states[tile as usize];
        assert!(
            matches!(state.phase, Phase::Absent | Phase::Reading),
            "tile {tile} is in memory"
        );
        state.phase = Phase::Reading;
        let what = &self.tiles[tile as usize];
        let arrived = state.read.arrived() as usize;
        // SAFETY: arrived is less than the length of the read, which fits in the slot.
        let into = unsafe { self.slots.ptr(state.slot).add(arrived) };
        let read = Read {
            file: FileId(what.file),
            offset: what.read_offset() + arrived as u64,
            len: (what.read_bytes() - arrived) as u32,
            into,
            token: u64::from(tile),
        };
        self.trace.submitted(read.token, What::Tile(tile));
        // SAFETY: the slot belongs to this tile until the read is reaped: `Reading` tiles are not handed out, and
        // their slots are not in the free list.
        let submitted = unsafe { self.io.submit(read) };
        submitted.map_err(|_| queue_full())
    }

    /// Takes in finished reads; with `wait` blocks until one is.
    pub(super) fn reap(&mut self, wait: bool) -> Result<()> {
        let mut done = std::mem::replace(&mut self.done, [Completion::NONE; REAP_MAX]);
        let mut wait = wait;
        let result = loop {
            let count = match self.io.reap(&mut done, wait) {
                Ok(count) => count,
                Err(e) => break Err(e),
            };
            wait = false;
            // Every completion is taken in even if one of them is an error: no read may be forgotten.
            let mut failed = None;
            for completion in &done[..count] {
                self.trace
                    .completed(completion.token, completion.result.unwrap_or(0));
                let taken = match completion.token {
                    // Left of a measurement in which the system broke down.
                    MEASURED_TOKEN.. => Ok(()),
                    ROW_TOKEN.. => self.row_done(completion),
                    _ => self.tile_done(completion),
                };
                failed = failed.or(taken.err());
            }
            match failed {
                Some(e) => break Err(e),
                None if count < REAP_MAX => break Ok(()),
                None => {}
            }
        };
        self.done = done;
        result
    }

    /// Counts a read that brought `bytes` of a file, if any.
    pub(super) fn count_read(&mut self, file: u16, bytes: u32) {
        if bytes == 0 {
            return;
        }
        if let Some(member) = self.models.iter_mut().find(|m| m.files.contains(&file)) {
            member.reads += 1;
        }
        self.counters.read_bytes += u64::from(bytes);
        self.counters.reads += 1;
        self.arrived_bytes
            .fetch_add(u64::from(bytes), Ordering::Relaxed);
    }

    fn tile_done(&mut self, completion: &Completion) -> Result<()> {
        let tile = completion.token as u32;
        let what = self.tiles[tile as usize];
        assert_eq!(
            self.states[tile as usize].phase,
            Phase::Reading,
            "a completion for a tile that is not being read"
        );
        self.count_read(what.file, completion.result.unwrap_or(0));
        let needed = what.lead() + what.bytes as usize;
        let state = &mut self.states[tile as usize];
        match state.read.take(completion.result, needed) {
            Next::Done => {
                state.phase = Phase::Ready;
                Ok(())
            }
            Next::Failed(why) => self.failed(tile, why),
            next => {
                pause_before(next);
                self.submit(tile)?;
                self.io.flush()
            }
        }
    }

    /// Drops a tile that did not agree with its checksums, so that it is read again, and handed out again if it was.
    ///
    /// # Errors
    /// It is the second time, and the pass at hand needs it.
    pub(super) fn doubt(&mut self, tile: u32, handed_out: bool) -> Result<()> {
        self.give_up(tile);
        let what = self.tiles[tile as usize];
        let state = &mut self.states[tile as usize];
        state.doubted = !state.doubted;
        if !state.doubted {
            let (matrix, file) = (what.matrix as usize, what.file);
            return match handed_out || self.waits_for(tile) {
                true => Err(self.read_error(matrix, file, what.offset, WRONG_BYTES)),
                false => Ok(()),
            };
        }
        if handed_out {
            state.pass = self.pass.wrapping_sub(1);
            self.waiting += 1;
        }
        self.restart_ahead();
        self.counters.doubted += 1;
        self.warn_of_wrong(what.matrix as usize, what.file, what.offset);
        Ok(())
    }

    /// Says that bytes are read again because of their checksum.
    pub(super) fn warn_of_wrong(&self, matrix: usize, file: u16, offset: u64) {
        log::warn!(
            "{} at offset {offset} of {} came with a wrong checksum; reading it again",
            self.matrices[matrix].name,
            self.paths[file as usize].display()
        );
    }

    /// Gives up a read that failed for good: the tile is absent and its slot free again.
    ///
    /// It is an error only if the pass at hand needs the tile. If not, the disk may be well again by the time the
    /// tile is needed, and it is read then.
    fn failed(&mut self, tile: u32, why: &str) -> Result<()> {
        let state = &mut self.states[tile as usize];
        (state.phase, state.doubted) = (Phase::Absent, false);
        self.free.push(state.slot);
        let what = self.tiles[tile as usize];
        if self.waits_for(tile) {
            self.restart_ahead();
            return Err(self.read_error(what.matrix as usize, what.file, what.offset, why));
        }
        self.ahead_failed = true;
        log::debug!("reading tile {tile} ahead failed ({why})");
        Ok(())
    }

    /// The error for bytes that cannot be had or relied on. If the file was changed, that is the reason.
    pub(super) fn read_error(&self, matrix: usize, file: u16, offset: u64, why: &str) -> Error {
        let member = self.member_with(file);
        let changed = member.integrity.changed(file - member.files.start);
        let remedy = match (changed, why) {
            (Some(_), _) => {
                "put the file back as it was, or start again to use it as it is now".to_owned()
            }
            (None, WRONG_BYTES) => member.integrity.remedy(),
            (None, _) => {
                "check the disk (dmesg) and that the file is whole, then ask again".to_owned()
            }
        };
        Error::new(
            Kind::Io,
            format!(
                "cannot read {} at offset {offset} of {}: {}",
                self.matrices[matrix].name,
                self.paths[file as usize].display(),
                changed.unwrap_or(why)
            ),
            remedy,
        )
    }
}
