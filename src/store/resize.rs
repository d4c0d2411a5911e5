//! Slots that leave the pool and come back: the budget changes while the engine runs.

use std::ptr::NonNull;

use super::{Phase, Store};
use crate::error::{Error, Kind, Result};
use crate::io::{Io, Region};

impl Store {
    /// Slots in use: by tiles, pages, single rows, and free ones.
    pub fn slots_in_use(&self) -> u32 {
        self.slots.count() - self.withdrawn.len() as u32
    }

    /// Changes the number of slots in use and of those in the window, between sweeps; the memory of slots that leave goes
    /// back to the system.
    ///
    /// Reads in flight are waited for, since the kernel holds on to registered memory: `reopen` gives an [`Io`] over
    /// the regions that stay, and the old one ends. Tiles and pages in slots that stay are not touched.
    ///
    /// # Errors
    /// The pages and a window of reads need more slots, a read failed, or `reopen` did; nothing has changed then.
    pub fn resize(
        &mut self,
        slots: u32,
        window: u32,
        reopen: impl FnOnce(&[Region]) -> Result<Box<dyn Io>>,
    ) -> Result<()> {
        assert!(
            self.acquired.is_empty() && self.waiting == 0,
            "the pool is resized between sweeps"
        );
        let (before, slots) = (self.slots_in_use(), slots.min(self.slots.count()));
        let (capacity, window_before) = (self.residency.capacity(), self.residency.window());
        let leaving = before.saturating_sub(slots);
        let spare = capacity.saturating_sub(window.min(self.residency.tiles()));
        if leaving > spare {
            let least = before - spare;
            return Err(Error::new(
                Kind::Budget,
                format!("{slots} slots cannot hold the pages in use and a window of reads"),
                format!(
                    "leave at least {least} slots of {} bytes",
                    self.slot_bytes()
                ),
            ));
        }
        self.drain()?;
        let withdrawn = self.withdrawn.len();
        self.residency.set_window(window);
        if leaving > 0 {
            self.residency.set_capacity(capacity - leaving);
            self.make_free(leaving);
            // The last slots leave, so that the others stay few long regions.
            self.free.sort_unstable();
            let stay = self.free.len() - leaving as usize;
            self.withdrawn.extend(self.free.drain(stay..));
        } else {
            self.residency.set_capacity(capacity + (slots - before));
            let back = withdrawn - (slots - before) as usize;
            self.free.extend(self.withdrawn.drain(back..));
        }
        self.restart_ahead();
        // What both held would count twice against RLIMIT_MEMLOCK.
        self.io.register(&[]);
        match reopen(&self.regions()) {
            Ok(io) => self.io = io,
            Err(error) => {
                // As before: nothing was read since, so the slots that moved are still the last of their list.
                self.residency.set_window(window_before);
                self.residency.set_capacity(capacity);
                if leaving > 0 {
                    self.free.extend(self.withdrawn.drain(withdrawn..));
                } else {
                    let stay = self.free.len() - (slots - before) as usize;
                    self.withdrawn.extend(self.free.drain(stay..));
                }
                self.io.register(&self.regions());
                return Err(error);
            }
        }
        for &slot in &self.withdrawn[withdrawn.min(self.withdrawn.len())..] {
            self.slots.discard(slot);
        }
        Ok(())
    }

    /// Gives up tiles outside the plan, and if these are too few others, until so many slots are free.
    fn make_free(&mut self, slots: u32) {
        for kept in [false, true] {
            for tile in 0..self.tiles.len() as u32 {
                if kept && self.free.len() >= slots as usize {
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
        let live = self.live();
        let regions = self.slots.regions(|slot| live[slot as usize]).into_iter();
        regions.map(|(start, len)| Region { start, len }).collect()
    }

    /// The same in pieces of at most `bytes_max`, none of which ends within a slot.
    pub fn pieces(&self, bytes_max: usize) -> Vec<(NonNull<u8>, usize)> {
        let live = self.live();
        self.slots.pieces(bytes_max, |slot| live[slot as usize])
    }

    /// Whether each slot is in use.
    fn live(&self) -> Vec<bool> {
        let mut live = vec![true; self.slots.count() as usize];
        for &slot in &self.withdrawn {
            live[slot as usize] = false;
        }
        live
    }
}
