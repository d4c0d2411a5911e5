//! Slots that leave the pool and come back: the budget changes while the engine runs.
//!
//! Slots in use are always the first ones, so that those that leave are one run at the end of the arena. Scattered ones
//! would give little back: the system's huge pages are larger than a slot, and one slot in use keeps all of a page. What
//! lies in a slot that leaves moves to one that stays.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use super::{Phase, Store};
use crate::arena::SlotId;
use crate::error::{Error, Kind, Result};
use crate::io::{Io, Region};

/// A KV page that lies in another slot now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// Where it was.
    pub from: SlotId,
    /// Where it is.
    pub to: SlotId,
}

impl Store {
    /// Slots in use: by tiles, pages, single rows, and free ones.
    pub fn slots_in_use(&self) -> u32 {
        self.in_use
    }

    /// How many KV pages have to go before a pool of so many slots in use has room for a window of reads.
    pub fn pages_over(&self, slots: u32, window: u32) -> u32 {
        let spare = self.spare(self.residency.capacity(), window);
        self.in_use.saturating_sub(slots).saturating_sub(spare)
    }

    /// Changes the number of slots in use and of those in the window, between sweeps; the memory of slots that leave goes
    /// back to the system.
    ///
    /// Reads in flight are waited for. From then on `io` performs them, if it is given; it has nothing
    /// [registered](Io::register) so far. Answers which pages lie elsewhere now, by the slots where they were.
    ///
    /// # Errors
    /// The pages and a window of reads need more slots, or a read failed; nothing has changed then.
    pub fn resize(
        &mut self,
        slots: u32,
        window: u32,
        io: Option<Box<dyn Io>>,
    ) -> Result<Vec<Moved>> {
        assert!(
            self.acquired.is_empty() && self.waiting == 0,
            "the pool is resized between sweeps"
        );
        let missing = self.pages_over(slots, window) as usize * self.slot_bytes();
        if missing > 0 {
            return Err(Error::new(
                Kind::Budget,
                "so much memory cannot hold the conversations that there are and a window of reads",
                format!(
                    "give {} MiB more, or end a conversation first",
                    missing.div_ceil(1 << 20)
                ),
            ));
        }
        let (before, slots) = (self.in_use, slots.min(self.slots.count()));
        let capacity = self.residency.capacity();
        self.drain()?;
        self.residency.set_window(window);
        self.residency.set_capacity(capacity + slots - before);
        // The kernel holds on to registered memory, and what two hold counts twice against RLIMIT_MEMLOCK.
        self.io.register(&[]);
        if let Some(io) = io {
            self.io = io;
        }
        let moved = self.vacate(slots);
        self.free.extend(before..slots);
        // All may be free at once, and none of them comes with an allocation.
        self.free.reserve(slots as usize - self.free.len());
        self.slots.discard(slots..before);
        self.slots.take_back(before..slots);
        self.in_use = slots;
        self.io.register(&self.regions());
        self.restart_ahead();
        Ok(moved)
    }

    /// Empties all slots from `end` on, and answers which pages had to move for that.
    fn vacate(&mut self, end: SlotId) -> Vec<Moved> {
        self.make_free(self.in_use.saturating_sub(end));
        let mut used = vec![true; self.in_use as usize];
        for &slot in &self.free {
            used[slot as usize] = false;
        }
        self.free.retain(|&slot| slot < end);
        for tile in 0..self.tiles.len() {
            let state = self.states[tile];
            if state.phase == Phase::Ready && state.slot >= end {
                used[state.slot as usize] = false;
                let bytes = self.tiles[tile].lead() + self.tiles[tile].bytes as usize;
                self.states[tile].slot = self.copy_down(state.slot, bytes);
            }
        }
        // Nothing else is in use there but pages.
        let pages = (end..self.in_use).filter(|&slot| used[slot as usize]);
        let moved = pages.map(|from| Moved {
            from,
            to: self.copy_down(from, self.slots.slot_bytes()),
        });
        moved.collect()
    }

    /// Copies what lies in a slot to a free one.
    fn copy_down(&mut self, from: SlotId, bytes: usize) -> SlotId {
        let to = self.free.pop().expect("as many are free as have to be");
        // SAFETY: nothing is read into slots and nobody computes between sweeps, when this happens. They are the
        // processor's.
        unsafe { self.slots.copy(from, to, bytes) };
        to
    }

    /// Gives up tiles outside the plan, and if these are too few others, until so many slots are free.
    fn make_free(&mut self, slots: u32) {
        for kept in [false, true] {
            for tile in 0..self.tiles.len() as u32 {
                if self.free.len() >= slots as usize {
                    return;
                }
                let ready = self.states[tile as usize].phase == Phase::Ready;
                if ready && self.residency.keeps(tile) == kept {
                    self.give_up(tile);
                }
            }
        }
    }

    /// Waits for all reads and copies in flight.
    pub(super) fn drain(&mut self) -> Result<()> {
        self.drain_copies()?;
        while self.io.in_flight() > 0 {
            self.reap(true)?;
        }
        Ok(())
    }

    /// The slots in use, as regions to register for reads.
    pub fn regions(&self) -> Vec<Region> {
        let regions = self.slots.regions(self.in_use);
        regions.map(|(start, len)| Region { start, len }).collect()
    }

    /// The same in pieces of at most `bytes_max`, none of which ends within a slot.
    pub fn pieces(&self, bytes_max: usize) -> Vec<(NonNull<u8>, usize)> {
        self.slots.pieces(self.in_use, bytes_max).collect()
    }
}
