//! What the models of an arena share: the slots, the window that streamed tiles pass through, threads and rings.
//!
//! Pure, like [`plan`](super::plan): from the models' plans and the budget to the number of slots.

use super::plan::{Line, Plan, Request, SLOTS_LEAST};
use crate::device::cpu::Cpu;
use crate::error::{Error, Kind, Result};
use crate::format::tile::{self, Matrix};
use crate::io::advice::Advice;
use crate::model::config::Config;
use crate::model::kv;
use crate::model::weights::MatrixPlan;

/// Streamed tiles pass through this part of the pool. A real disk delivers in lumps, and a large window has read
/// enough to compute with in between. On a virtual disk that finishes all it was given at once, the 8B had 0.82 of the
/// roofline with 20 MiB, 0.89 with 32 MiB and 0.94 to 0.96 with 48 MiB (the budgets differed too, so the window may
/// not be all of the reason).
const WINDOW_SHARE: usize = 24;
/// Bounds of the window, in bytes: what a disk delivers in a millisecond or in some tens of them.
const WINDOW_BYTES: std::ops::RangeInclusive<usize> = 2 << 20..=48 << 20;
/// Bounds of the window, in slots.
const WINDOW_SLOTS: std::ops::RangeInclusive<usize> = 8..=64;
/// Where nearly all fits, the window takes no more than this part of what does not: it adds to what streams.
const WINDOW_OF_STREAMED: usize = 16;
/// The fewest slots that streamed tiles can pass through without the disk idling all the time.
const WINDOW_SLOTS_LEAST: usize = 4;
/// Reads in flight at least, whatever the window: single rows are read in batches.
const DEPTH_MIN: usize = 8;
/// Memory of the io_uring rings and of the fallback's threads.
const IO_BYTES: u64 = 256 << 10;

/// The slots of an arena, and what else its models share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// The promise: nothing that the process maps for its work is beyond it.
    pub memory: u64,
    /// Bytes of a slot.
    pub slot_bytes: usize,
    /// Slots in use: for the weights and KV pages of all models, and one for single rows.
    pub slots: usize,
    /// Slots that there is address space for.
    pub slots_reserved: usize,
    /// Slots that streamed tiles pass through.
    pub window: u32,
    pub(super) threads: usize,
    /// How the disk wants to be read, if that was measured.
    pub(super) disk: Option<Advice>,
    /// Bytes of the longest row of weights of all models.
    pub(super) row_bytes_max: usize,
}

impl Pool {
    /// A pool that no model shares yet, in a budget of `memory`.
    pub fn new(memory: u64, slot_bytes: usize, threads: usize, disk: Option<Advice>) -> Pool {
        Pool {
            memory,
            slot_bytes,
            slots: 0,
            slots_reserved: (memory / slot_bytes as u64) as usize,
            window: 0,
            threads,
            disk,
            row_bytes_max: 0,
        }
    }

    /// The pool when these models share it: each takes its own part of the budget first.
    ///
    /// # Errors
    /// The budget cannot hold the minimum; the error says what the minimum is.
    pub fn shared_by<'a>(self, plans: impl Iterator<Item = &'a Plan> + Clone) -> Result<Pool> {
        let sum = |of: fn(&Plan) -> usize| plans.clone().map(of).sum::<usize>();
        let (tiles, pages) = (sum(|p| p.tiles.len()), sum(|p| p.pages_full));
        let every_sweep = sum(|p| p.tiles_every_sweep);
        let own: u64 = plans.clone().map(Plan::own_bytes).sum();
        let row_bytes_max = plans.map(|p| p.row_bytes_max).max().unwrap_or(0);

        let others = own + common_bytes(self.threads, row_bytes_max);
        let slots = self.memory.saturating_sub(others) / self.slot_bytes as u64;
        // The rows' slot, all pages, and the least window there must be.
        let least = 1 + pages + WINDOW_SLOTS_LEAST.min(tiles);
        if (slots as usize) < least {
            let minimum = (others + (least * self.slot_bytes) as u64).div_ceil(1 << 20);
            return Err(Error::new(
                Kind::Budget,
                format!(
                    "a budget of {} MiB cannot hold the buffers, the contexts and a window of reads",
                    self.memory >> 20
                ),
                format!("give at least {minimum} MiB, smaller contexts, or fewer models"),
            ));
        }
        let slots = (slots as usize)
            .min(1 + tiles + pages)
            .min(self.slots_reserved);
        let capacity = slots - 1;
        let in_flight = self.disk.map_or(0, |disk| disk.bytes_in_flight());
        let window_bytes = (slots * self.slot_bytes / WINDOW_SHARE)
            .max(2 * in_flight)
            .clamp(*WINDOW_BYTES.start(), *WINDOW_BYTES.end());
        let window = (window_bytes / self.slot_bytes)
            .min(every_sweep.saturating_sub(capacity) / WINDOW_OF_STREAMED)
            .clamp(*WINDOW_SLOTS.start(), *WINDOW_SLOTS.end())
            .min(slots / 8)
            .min(capacity - pages)
            .clamp(WINDOW_SLOTS_LEAST.min(every_sweep), tiles);
        Ok(Pool {
            slots,
            window: window as u32,
            row_bytes_max,
            ..self
        })
    }

    /// The lines of the budget that all models share, slots aside.
    pub fn common_lines(&self) -> [Line; 2] {
        let scratch = Cpu::scratch_bytes(self.threads, self.row_bytes_max) as u64;
        let line = |what, bytes| Line { what, bytes };
        [line("kernel scratch", scratch), line("I/O rings", IO_BYTES)]
    }

    /// What the budget is used for by models with these plans.
    pub fn total_bytes(&self, plans: &[Plan]) -> u64 {
        let own: u64 = plans.iter().map(Plan::own_bytes).sum();
        let common: u64 = self.common_lines().iter().map(|l| l.bytes).sum();
        own + common + (self.slots * self.slot_bytes) as u64
    }

    /// Bytes of the longest row of weights of all models.
    pub fn row_bytes_max(&self) -> usize {
        self.row_bytes_max
    }

    /// Reads in flight at most.
    pub fn depth(&self) -> usize {
        depth(self.window)
    }
}

/// A model to plan for, and what for.
pub(super) type Subject<'a> = (&'a Config, &'a MatrixPlan, &'a Request);

/// Divides a budget for some models, and chooses the slots that suit them all.
pub(super) fn divide(models: &[Subject], memory: u64, threads: usize) -> Result<(Pool, Vec<Plan>)> {
    if let [(config, matrices, request)] = models {
        let plan = Plan::new(config, matrices, request)?;
        let pool = Pool::new(memory, plan.slot_bytes, threads, request.disk)
            .shared_by([&plan].into_iter())?;
        return Ok((pool, vec![plan]));
    }
    let all: Vec<Matrix> = models
        .iter()
        .flat_map(|(_, matrices, _)| matrices.matrices.iter().cloned())
        .collect();
    let pages_least = models.iter().map(|(config, ..)| kv::page_bytes_min(config));
    let smallest = tile::slot_bytes_min(&all).max(pages_least.max().unwrap_or(0));
    let in_slots = |slot_bytes: usize, slots: usize| -> Result<Vec<Plan>> {
        let plan = |(config, matrices, request): &Subject| {
            Plan::in_slots(
                config,
                matrices,
                request,
                slot_bytes,
                slots / 2 / models.len(),
            )
        };
        models.iter().map(plan).collect()
    };
    // What the models take for themselves does not depend on the slots, so it is known before these are chosen.
    let own: u64 = in_slots(smallest, 0)?.iter().map(Plan::own_bytes).sum();
    let row_bytes_max = all.iter().map(Matrix::row_bytes).max().unwrap_or(0);
    let pool_bytes = memory.saturating_sub(own + common_bytes(threads, row_bytes_max)) as usize;
    let disk = models.iter().find_map(|(_, _, request)| request.disk);
    let read_bytes = disk.map_or(0, |disk| disk.read_bytes as usize);
    let slot_bytes =
        tile::choose_slot_bytes(&all, pool_bytes, SLOTS_LEAST, read_bytes).max(smallest);
    let mut plans = in_slots(slot_bytes, pool_bytes / slot_bytes)?;
    let pool = Pool::new(memory, slot_bytes, threads, disk).shared_by(plans.iter())?;
    for plan in &mut plans {
        plan.move_to(&pool);
    }
    Ok((pool, plans))
}

/// Bytes that all models share beside the slots.
pub(super) fn common_bytes(threads: usize, row_bytes_max: usize) -> u64 {
    Cpu::scratch_bytes(threads, row_bytes_max) as u64 + IO_BYTES
}

/// Reads in flight at most for a window of `slots`: half of it. Some disks (virtual ones above all) finish all that was
/// handed to them at once; then the other half is there to go on with, and they hardly stop.
pub(super) fn depth(slots: u32) -> usize {
    (slots as usize / 2).max(DEPTH_MIN)
}

/// The last two lines of a budget: the slots.
pub(super) fn slot_lines(slots: usize, pages_full: usize, slot_bytes: usize) -> [Line; 2] {
    let line = |what, slots: usize| Line {
        what,
        bytes: (slots * slot_bytes) as u64,
    };
    [
        line("slots: KV pages (context full)", pages_full),
        line("slots: weights", slots - pages_full),
    ]
}
