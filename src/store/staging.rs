//! Slots of a device's own memory, and the copies of tiles into them.
//!
//! A tile goes from disk into a slot of the processor's memory, is checked there, and is copied into a slot of
//! the device in the order of use, as far ahead as slots are free. The device computes on what lies in its own slots
//! alone; KV pages take such slots too.
//!
//! Two fences: *a slot of the processor's is read into again only when its copy is done*, and *a slot of the device's
//! is written again only when the device has passed a mark set after the last work that reads it*.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::ptr::NonNull;

use super::order::Order;
use super::{Phase, Store};
use crate::arena::{SlotId, Slots};
use crate::error::Result;
use crate::format::tile::STRIP_ROWS;

/// Copies on their way at most.
pub const COPIES_MAX: usize = 16;
/// Marks that were set and not passed, at most.
pub const MARKS_MAX: usize = 16;

/// What copies into a device's memory, and knows how far the device has come with its work.
pub trait Copies: Send {
    /// Begins a copy; copies are done in the order in which they were begun, and no more than [`COPIES_MAX`] are on
    /// their way.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Safety
    /// `from` is memory that the device was shown and `to` its own; nobody writes either, nor reads `to`, until the copy
    /// is done.
    unsafe fn begin(&mut self, from: NonNull<u8>, to: NonNull<u8>, bytes: usize) -> Result<()>;

    /// How many copies are done so far.
    ///
    /// # Errors
    /// The device fails.
    fn done(&mut self) -> Result<u64>;

    /// Sets a mark behind all that the device was given to compute so far; no more than [`MARKS_MAX`] are not passed.
    ///
    /// # Errors
    /// The device fails.
    fn mark(&mut self) -> Result<()>;

    /// How many marks the device has passed so far.
    ///
    /// # Errors
    /// The device fails.
    fn passed(&mut self) -> Result<u64>;
}

/// Where on the device a tile is; [`Phase::Reading`] while it is copied there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) phase: Phase,
    slot: SlotId,
}

impl Place {
    pub(super) const ABSENT: Place = Place {
        phase: Phase::Absent,
        slot: 0,
    };
}

/// The device's level of memory.
pub(super) struct Staging {
    copies: Box<dyn Copies>,
    slots: Slots,
    free: Vec<SlotId>,
    /// Of each tile.
    pub(super) places: Vec<Place>,
    /// Which tiles are used next, and how many of them were considered for a copy.
    pub(super) order: Order,
    /// Tiles on their way, the one that arrives first at the front.
    copying: VecDeque<u32>,
    copied: u64,
    /// Slots that are free once the device has passed a mark, in the order of marks.
    retiring: VecDeque<(SlotId, u64)>,
    marks: u64,
    passed: u64,
    /// The last slots that retire wait for a mark that was not set yet.
    unmarked: bool,
}

impl Staging {
    /// A slot is no longer used by what the device is given from now on.
    fn retire(&mut self, slot: SlotId) {
        self.retiring.push_back((slot, self.marks + 1));
        self.unmarked = true;
    }

    /// Drops a tile that no work from now on uses.
    fn give_up(&mut self, tile: u32) {
        let place = &mut self.places[tile as usize];
        assert_eq!(place.phase, Phase::Ready, "only an idle tile is given up");
        place.phase = Phase::Absent;
        let slot = place.slot;
        self.retire(slot);
    }

    /// Whether a slot becomes free, or a tile arrives, without anything being begun.
    pub(super) fn is_busy(&self) -> bool {
        !self.copying.is_empty() || !self.retiring.is_empty()
    }

    /// Sets the mark that slots wait for, and takes back those that the device is done with.
    fn collect(&mut self) -> Result<()> {
        if self.unmarked && self.marks - self.passed < MARKS_MAX as u64 {
            self.copies.mark()?;
            self.marks += 1;
            self.unmarked = false;
        }
        if self.passed < self.marks {
            self.passed = self.copies.passed()?;
        }
        while let Some(&(slot, mark)) = self.retiring.front()
            && mark <= self.passed
        {
            self.retiring.pop_front();
            self.free.push(slot);
        }
        Ok(())
    }
}

impl Store {
    /// Has the device compute in `slots` of its own from now on, of which streamed tiles pass through `window`; said
    /// before the first model comes.
    pub fn set_device(&mut self, slots: Slots, window: u32, copies: Box<dyn Copies>) {
        assert!(self.models.is_empty(), "the device's memory comes first");
        assert_eq!(slots.slot_bytes(), self.slots.slot_bytes(), "slots differ");
        self.residency.set_device_capacity(slots.count());
        self.residency.set_device_window(window);
        self.staging = Some(Staging {
            copies,
            free: (0..slots.count()).rev().collect(),
            places: Vec::new(),
            order: Order::default(),
            copying: VecDeque::with_capacity(COPIES_MAX),
            copied: 0,
            retiring: VecDeque::with_capacity(slots.count() as usize),
            slots,
            marks: 0,
            passed: 0,
            unmarked: false,
        });
    }

    /// Changes how many of the device's slots streamed tiles pass through, between sweeps.
    pub fn set_device_window(&mut self, window: u32) {
        self.residency.set_device_window(window);
        self.restart_ahead();
    }

    /// Bytes of the tables for `tiles` tiles on a device.
    pub fn device_table_bytes(tiles: usize) -> usize {
        tiles * size_of::<Place>()
    }

    /// Whether the device has the tile, or is about to have it.
    pub(super) fn on_device(&self, tile: u32) -> bool {
        let staging = self.staging.as_ref();
        staging.is_some_and(|s| s.places[tile as usize].phase != Phase::Absent)
    }

    /// Takes in copies that are done and begins the next ones, in the order of use; never blocks.
    pub(super) fn stage(&mut self) -> Result<()> {
        self.take_copies()?;
        loop {
            let Some(staging) = &mut self.staging else {
                return Ok(());
            };
            let next = staging.order.next();
            let Some((tile, used)) = next.filter(|_| staging.copying.len() < COPIES_MAX) else {
                return Ok(());
            };
            if self.wants_copy(tile, used) && !self.copy(tile)? {
                return Ok(());
            }
            if let Some(staging) = &mut self.staging {
                staging.order.step();
            }
        }
    }

    /// Takes in copies that are done, and slots that the device is done with.
    fn take_copies(&mut self) -> Result<()> {
        let Some(staging) = &mut self.staging else {
            return Ok(());
        };
        staging.collect()?;
        if staging.copying.is_empty() {
            return Ok(());
        }
        let done = staging.copies.done()?;
        while let Some(staging) = &mut self.staging
            && staging.copied < done
            && let Some(tile) = staging.copying.pop_front()
        {
            staging.copied += 1;
            staging.places[tile as usize].phase = Phase::Ready;
            self.states[tile as usize].phase = Phase::Ready;
            if !self.residency.keeps(tile) {
                self.give_up(tile);
            }
        }
        Ok(())
    }

    /// Whether a tile is to be copied ahead; `used` if one of the sweeps at hand uses it.
    fn wants_copy(&self, tile: u32, used: bool) -> bool {
        let used_up = self.current.contains(&tile) && self.states[tile as usize].pass == self.pass;
        let worth = match used {
            true => self.residency.copies(tile),
            false => self.residency.keeps_on_device(tile),
        };
        worth && !used_up && !self.on_device(tile)
    }

    /// Begins the copy of a tile; false if it is not in memory yet, or no slot is free for it.
    fn copy(&mut self, tile: u32) -> Result<bool> {
        let Some(slot) = self.slot_for_copy(tile) else {
            return Ok(false);
        };
        if !self.states[tile as usize].packed && !self.inspect(tile) {
            self.doubt(tile, false)?;
            return Ok(false);
        }
        let (state, what) = (&mut self.states[tile as usize], &self.tiles[tile as usize]);
        // Inspected, and handed out to the copy.
        (state.packed, state.doubted, state.phase) = (true, false, Phase::InUse);
        let Some(staging) = &mut self.staging else {
            return Ok(false);
        };
        staging.free.pop();
        let (from, to) = (self.slots.ptr(state.slot), staging.slots.ptr(slot));
        // SAFETY: the tile lies behind its lead in either slot. The slot of the processor's is in use until the copy is
        // done, so nothing is read into it; that of the device was free, so it has passed all work that read it.
        unsafe {
            let (from, to) = (from.add(what.lead()), to.add(what.lead()));
            staging.copies.begin(from, to, what.bytes as usize)?;
        }
        staging.places[tile as usize] = Place {
            phase: Phase::Reading,
            slot,
        };
        staging.copying.push_back(tile);
        self.counters.copied_bytes += u64::from(what.bytes);
        Ok(true)
    }

    /// The free slot for a tile that is in memory. If there is none, one outside the plan that is used later goes.
    fn slot_for_copy(&mut self, tile: u32) -> Option<SlotId> {
        let staging = self.staging.as_mut()?;
        if self.states[tile as usize].phase != Phase::Ready {
            return None;
        }
        if staging.free.is_empty() && staging.retiring.is_empty() {
            let mut order = std::mem::take(&mut staging.order);
            let stale = order.last_stale(|tile| self.is_stale_on_device(tile));
            let staging = self.staging.as_mut()?;
            staging.order = order;
            staging.give_up(stale?);
        }
        self.staging.as_ref()?.free.last().copied()
    }

    /// Whether a tile as it was read agrees with its checksums.
    fn inspect(&self, tile: u32) -> bool {
        let what = &self.tiles[tile as usize];
        let member = self.member_with(what.file);
        let (sums, number) = (member.integrity.sums(), tile - member.tiles.start);
        let strip_bytes = STRIP_ROWS * self.matrices[what.matrix as usize].row_bytes();
        // SAFETY: the tile is in memory, within its slot, and nobody writes it.
        let bytes = unsafe {
            let start = self.slots.ptr(self.states[tile as usize].slot);
            std::slice::from_raw_parts(start.add(what.lead()).as_ptr(), what.bytes as usize)
        };
        for (strip, bytes) in bytes.chunks(strip_bytes).enumerate() {
            sums.inspect(number, strip, bytes);
        }
        sums.tile_agrees(number)
    }

    /// Hands out the tiles of the current range that the device has.
    pub(super) fn hand_out_on_device(&mut self) {
        let Some(staging) = &mut self.staging else {
            return;
        };
        for tile in self.current.clone() {
            let (place, state) = (
                &mut staging.places[tile as usize],
                &mut self.states[tile as usize],
            );
            if place.phase == Phase::Ready && state.pass != self.pass {
                (place.phase, state.pass) = (Phase::InUse, self.pass);
                self.acquired.push(tile);
            }
        }
    }

    /// Where on the device a tile lies that is handed out there; none if the device has no memory of its own.
    pub(super) fn device_memory(&self, tile: u32) -> Option<NonNull<u8>> {
        let staging = self.staging.as_ref()?;
        let place = staging.places[tile as usize];
        assert_eq!(place.phase, Phase::InUse, "tile {tile} is not handed out");
        Some(staging.slots.ptr(place.slot))
    }

    /// Takes a tile back that work was given for.
    pub(super) fn release_on_device(&mut self, tile: u32) {
        if let Some(staging) = &mut self.staging {
            staging.places[tile as usize].phase = Phase::Ready;
            if !self.residency.keeps_on_device(tile) {
                staging.give_up(tile);
            }
        }
    }

    /// With nothing to hand out: whether the device is about to have something, or a slot for it. If not, a tile of the
    /// current range that is in memory goes there, whatever its turn.
    pub(super) fn wait_for_device(&mut self) -> Result<bool> {
        let Some(staging) = &self.staging else {
            return Ok(false);
        };
        if staging.is_busy() {
            std::thread::yield_now();
            return Ok(true);
        }
        let is_here = |tile: &u32| {
            let ready = self.states[*tile as usize].phase == Phase::Ready;
            ready && self.waits_for(*tile) && !self.on_device(*tile)
        };
        let Some(tile) = self.current.clone().find(is_here) else {
            return Ok(false);
        };
        match staging.free.is_empty() {
            true => self.make_room_on_device(),
            false => _ = self.copy(tile)?,
        }
        Ok(true)
    }

    /// The slot of a tile that lies idle on the device. It stays as it is for the work that is given next.
    pub(super) fn idle_on_device(&self, tile: u32) -> Option<NonNull<u8>> {
        let staging = self.staging.as_ref()?;
        let place = staging.places[tile as usize];
        (place.phase == Phase::Ready).then(|| staging.slots.ptr(place.slot))
    }

    /// Whether it does, and the plan does not keep it there, nor does the pass at hand need it.
    pub(super) fn is_stale_on_device(&self, tile: u32) -> bool {
        let keeps = self.residency.keeps_on_device(tile);
        self.idle_on_device(tile).is_some() && !keeps && !self.waits_for(tile)
    }

    /// Drops the idle tile of the device whose next use is furthest: one outside the plan if there is one, else any
    /// that the pass at hand does not need.
    fn make_room_on_device(&mut self) {
        let stale = self.furthest(|tile| self.is_stale_on_device(tile));
        let idle = |tile| self.idle_on_device(tile).is_some() && !self.waits_for(tile);
        if let Some(tile) = stale.or_else(|| self.furthest(idle)) {
            self.give_up_on_device(tile..tile + 1);
        }
    }

    /// A slot of the device that nothing uses; if there is none, one is on its way to be so.
    pub(super) fn take_free_on_device(&mut self) -> Result<Option<SlotId>> {
        self.take_copies()?;
        let Some(staging) = &mut self.staging else {
            return Ok(None);
        };
        let slot = staging.free.pop();
        if slot.is_none() && !staging.is_busy() {
            self.make_room_on_device();
        }
        Ok(slot)
    }

    /// Gives back a slot that [`take_free_on_device`](Self::take_free_on_device) gave.
    pub(super) fn retire_on_device(&mut self, slot: SlotId) {
        if let Some(staging) = &mut self.staging {
            staging.retire(slot);
        }
    }

    /// The memory of a slot of the device; none if it has no memory of its own.
    pub(super) fn device_page(&self, slot: SlotId) -> Option<NonNull<u8>> {
        self.staging.as_ref().map(|staging| staging.slots.ptr(slot))
    }

    /// Drops all of `tiles` that lie idle on the device.
    pub(super) fn give_up_on_device(&mut self, tiles: Range<u32>) {
        if let Some(staging) = &mut self.staging {
            for tile in tiles {
                if staging.places[tile as usize].phase == Phase::Ready {
                    staging.give_up(tile);
                }
            }
        }
    }

    /// Waits for all copies on their way.
    pub(super) fn drain_copies(&mut self) -> Result<()> {
        while self.staging.as_ref().is_some_and(|s| !s.copying.is_empty()) {
            self.take_copies()?;
            std::thread::yield_now();
        }
        Ok(())
    }
}
