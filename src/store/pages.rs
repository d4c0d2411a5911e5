//! Slots that the weights give up for KV pages, and get back: the device's own where it has some.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use super::{Phase, Store};
use crate::arena::SlotId;
use crate::error::{Error, Kind, Result};

impl Store {
    /// Takes a slot away from the weights, for a KV page.
    ///
    /// Must be called between passes, when no tile is handed out.
    ///
    /// # Errors
    /// No slot can be spared: the window of reads and what has to stay is all that is left.
    pub fn take_page(&mut self) -> Result<SlotId> {
        assert!(self.acquired.is_empty(), "pages are taken between passes");
        if self.staging.is_some() {
            return self.take_device_page();
        }
        let capacity = self.residency.capacity();
        if self.pages_free() == 0 {
            return Err(Error::new(
                Kind::Budget,
                "the context has grown to all the memory there is",
                "give more --memory, or a smaller --ctx",
            ));
        }
        let least = self.residency.least_kept();
        self.residency.set_capacity(capacity - 1);
        if let Some(tile) = least.filter(|&t| !self.residency.keeps(t))
            && self.states[tile as usize].phase == Phase::Ready
        {
            self.give_up(tile);
        }
        self.restart_ahead();
        // If the least worthy tile was not there to be dropped, another outside the plan makes room, or comes to.
        while self.free.is_empty() {
            if !self.give_up_furthest() {
                self.reap(true)?;
            }
        }
        Ok(self.free.pop().expect("just seen"))
    }

    /// Gives a page's slot back to the weights.
    pub fn free_page(&mut self, slot: SlotId) {
        if self.staging.is_some() {
            return self.free_device_page(slot);
        }
        debug_assert!(!self.free.contains(&slot));
        self.free.push(slot);
        self.residency.set_capacity(self.residency.capacity() + 1);
        self.restart_ahead();
    }

    /// Slots that KV pages may still take.
    pub fn pages_free(&self) -> u32 {
        let plan = &self.residency;
        let (capacity, window) = match self.staging {
            Some(_) => (plan.device_capacity(), plan.device_window()),
            None => (plan.capacity(), plan.window()),
        };
        self.spare(capacity, window)
    }

    /// The memory of a slot that [`take_page`](Self::take_page) gave.
    pub fn page(&self, slot: SlotId) -> NonNull<u8> {
        self.device_page(slot)
            .unwrap_or_else(|| self.slots.ptr(slot))
    }

    /// Takes a slot of the device away from the weights.
    fn take_device_page(&mut self) -> Result<SlotId> {
        if self.pages_free() == 0 {
            return Err(Error::new(
                Kind::Budget,
                "the context has grown to all the memory of the GPU that it may have",
                "give more --gpu-memory, or a smaller --ctx",
            ));
        }
        let least = self.residency.least_kept_on_device();
        let capacity = self.residency.device_capacity();
        self.residency.set_device_capacity(capacity - 1);
        if let Some(tile) = least.filter(|&tile| self.is_stale_on_device(tile)) {
            self.give_up_on_device(tile..tile + 1);
        }
        self.restart_ahead();
        // Its slot is free once the device has passed what read it.
        loop {
            if let Some(slot) = self.take_free_on_device()? {
                return Ok(slot);
            }
        }
    }

    /// Gives a page's slot back to the weights, once the device is done with it.
    fn free_device_page(&mut self, slot: SlotId) {
        let capacity = self.residency.device_capacity();
        self.residency.set_device_capacity(capacity + 1);
        self.retire_on_device(slot);
        self.restart_ahead();
    }
}
