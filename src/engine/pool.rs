//! What the models of an arena share: the slots, the window that streamed tiles pass through, threads and rings.
//!
//! Pure, like [`plan`](super::plan): from the models' plans and the budget to the number of slots.

use super::plan::{Line, Plan, ROWS_TRIED, Request, SLOTS_LEAST};
use crate::device::Placement;
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
    /// What the engine was opened with: no budget is larger, since the arena does not grow.
    pub memory_most: u64,
    /// Slots that streamed tiles pass through.
    pub window: u32,
    /// The slots of a GPU's own memory, if one computes there: KV pages are in these then.
    pub gpu: Option<GpuPool>,
    /// What a GPU's driver has taken for itself, if it shares the memory.
    pub(super) gpu_context: u64,
    pub(super) threads: usize,
    /// Bytes that clients can make the process hold.
    pub(super) clients_bytes: u64,
    /// How the disk wants to be read, if that was measured.
    pub(super) disk: Option<Advice>,
    /// Bytes of the longest row of weights of all models.
    pub(super) row_bytes_max: usize,
}

/// The slots of a GPU's own memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuPool {
    /// The promise: nothing that is taken of the GPU's memory is beyond it.
    pub memory: u64,
    /// How many there are; chosen for the models of the start.
    pub slots: usize,
    /// Of those, slots that tiles pass through which do not stay.
    pub window: u32,
}

/// What models have together.
#[derive(Clone, Copy)]
struct Sums {
    tiles: usize,
    every_sweep: usize,
    /// Tiles that have to stay in memory.
    resident: usize,
    pages: usize,
}

impl Pool {
    /// A pool that no model shares yet, in the budgets of `request`.
    pub fn new(request: &Request, slot_bytes: usize) -> Pool {
        let gpu = request.gpu;
        Pool {
            memory: request.memory,
            slot_bytes,
            slots: 0,
            memory_most: request.memory,
            window: 0,
            gpu_context: gpu.map_or(0, Placement::context_bytes),
            gpu: gpu.and_then(Placement::gpu_memory).map(|memory| GpuPool {
                memory,
                slots: 0,
                window: 0,
            }),
            threads: request.threads,
            clients_bytes: request.clients_bytes,
            disk: request.disk,
            row_bytes_max: 0,
        }
    }

    /// The same pool in another budget, until models [share](Self::shared_by) it.
    ///
    /// # Errors
    /// The budget is larger than the one that the engine was opened with.
    pub fn within(self, memory: u64) -> Result<Pool> {
        if memory > self.memory_most {
            let [mib, most] = [memory.div_ceil(1 << 20), self.memory_most >> 20];
            return Err(Error::new(
                Kind::Budget,
                format!("{mib} MiB are more than the {most} MiB that there is address space for"),
                format!("give no more than {most} MiB, or start again with --memory {mib}MiB"),
            ));
        }
        Ok(Pool { memory, ..self })
    }

    /// The pool when these models share it: each takes its own part of the budget first.
    ///
    /// # Errors
    /// The budget cannot hold the minimum; the error says what the minimum is.
    pub fn shared_by<'a>(mut self, plans: impl Iterator<Item = &'a Plan> + Clone) -> Result<Pool> {
        let sum = |of: fn(&Plan) -> usize| plans.clone().map(of).sum::<usize>();
        let all = Sums {
            tiles: sum(|p| p.tiles.len()),
            every_sweep: sum(|p| p.tiles_every_sweep),
            resident: sum(|p| p.tiles_resident),
            pages: sum(|p| p.pages_full),
        };
        let gpu_own = plans.clone().map(Plan::gpu_own_bytes).sum();
        let gpu = match self.gpu {
            Some(gpu) => Some(gpu.shared(all, gpu_own, self.slot_bytes)?),
            None => None,
        };
        // What comes to these slots when all contexts are full.
        let Sums {
            tiles,
            every_sweep,
            resident,
            pages,
        } = match &gpu {
            Some(gpu) => gpu.below(all),
            None => all,
        };
        let own: u64 = plans.clone().map(Plan::own_bytes).sum();
        let row_bytes_max = plans.map(|p| p.row_bytes_max).max().unwrap_or(0);

        self.row_bytes_max = row_bytes_max;
        let others = own + self.common_bytes();
        let slots = self.memory.saturating_sub(others) / self.slot_bytes as u64;
        // The rows' slot, all pages, what has to stay, and the least window there must be.
        let least = 1 + pages + resident + WINDOW_SLOTS_LEAST.min(all.tiles);
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
        // Even what a GPU keeps passes through once.
        let passing = tiles.max(all.tiles.min(*WINDOW_SLOTS.end()));
        let slots = (slots as usize).min(1 + passing + pages);
        let in_flight = self.disk.map_or(0, |disk| disk.bytes_in_flight());
        let window = window(
            (slots, slots - 1),
            self.slot_bytes,
            2 * in_flight,
            pages + resident,
            every_sweep,
        );
        Ok(Pool {
            slots,
            window: window.min(all.tiles) as u32,
            gpu,
            ..self
        })
    }

    /// The lines of the budget that all models share, slots aside.
    pub fn common_lines(&self) -> Vec<Line> {
        let scratch = Cpu::scratch_bytes(self.threads, self.row_bytes_max) as u64;
        let line = |what, bytes| Line { what, bytes };
        let mut lines = vec![line("kernel scratch", scratch), line("I/O rings", IO_BYTES)];
        if self.gpu_context > 0 {
            lines.push(line("the GPU driver's own", self.gpu_context));
        }
        if self.clients_bytes > 0 {
            lines.push(line("clients and their requests", self.clients_bytes));
        }
        lines
    }

    fn common_bytes(&self) -> u64 {
        self.common_lines().iter().map(|line| line.bytes).sum()
    }

    /// How the budget, and that of a GPU's own memory, is divided: what each of these models has for itself, then what
    /// all share.
    pub fn shares(&self, plans: &[&Plan]) -> Vec<[Vec<Line>; 2]> {
        let slots = |what, slots: usize| Line {
            what,
            bytes: (slots * self.slot_bytes) as u64,
        };
        let pages: usize = plans.iter().map(|plan| plan.pages_full).sum();
        let own = |plan: &&Plan| {
            let (mut lines, mut gpu_lines) =
                (plan.own_lines().to_vec(), plan.gpu_own_lines().to_vec());
            let lines_of_pages = match self.gpu {
                Some(_) => &mut gpu_lines,
                None => &mut lines,
            };
            lines_of_pages.push(slots("slots: KV pages (context full)", plan.pages_full));
            [lines, gpu_lines]
        };
        let mut common = self.common_lines();
        let mut gpu_common = Vec::new();
        match &self.gpu {
            Some(gpu) => {
                common.push(slots("slots: weights", self.slots));
                gpu_common.push(slots("slots: weights", gpu.slots - pages));
            }
            None => common.push(slots("slots: weights", self.slots - pages)),
        }
        let own = plans.iter().map(own);
        own.chain([[common, gpu_common]]).collect()
    }

    /// What the budget is used for by models with these plans.
    pub fn total_bytes(&self, plans: &[Plan]) -> u64 {
        let own: u64 = plans.iter().map(Plan::own_bytes).sum();
        own + self.common_bytes() + (self.slots * self.slot_bytes) as u64
    }

    /// Bytes of all slots that there can ever be.
    pub fn reserved_bytes(&self) -> usize {
        self.memory_most as usize / self.slot_bytes * self.slot_bytes
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

impl GpuPool {
    /// The pool when models share it that take `own` bytes of the GPU's memory for themselves.
    ///
    /// # Errors
    /// The budget cannot hold the minimum, or what was left for models that come later.
    fn shared(self, all: Sums, own: u64, slot_bytes: usize) -> Result<GpuPool> {
        let room = (self.memory.saturating_sub(own) / slot_bytes as u64) as usize;
        let least = all.pages + all.resident + WINDOW_SLOTS_LEAST.min(all.tiles);
        let slots = match self.slots {
            0 => room.min(all.pages + all.tiles),
            chosen => chosen,
        };
        if room < slots.max(least) {
            let minimum = (own + (slots.max(least) * slot_bytes) as u64).div_ceil(1 << 20);
            return Err(Error::new(
                Kind::Budget,
                format!(
                    "{} MiB of the GPU's memory cannot hold the buffers, the contexts and a window of copies",
                    self.memory >> 20
                ),
                format!(
                    "give --gpu-memory {minimum}MiB or more, smaller contexts, or fewer models"
                ),
            ));
        }
        if slots < least {
            return Err(Error::new(
                Kind::Budget,
                "the slots on the GPU were chosen for fewer contexts",
                "name the model among those that are loaded at the start",
            ));
        }
        let held = all.pages + all.resident;
        let window = window((slots, slots), slot_bytes, 0, held, all.every_sweep);
        Ok(GpuPool {
            slots,
            window: window.min(all.tiles) as u32,
            ..self
        })
    }

    /// What is left for the slots below when all contexts are full.
    fn below(&self, all: Sums) -> Sums {
        let capacity = self.slots - all.pages;
        let kept = match capacity < all.every_sweep {
            true => capacity - self.window as usize,
            false => capacity.min(all.tiles),
        };
        Sums {
            tiles: all.tiles - kept,
            every_sweep: all.every_sweep.saturating_sub(kept),
            resident: 0,
            pages: 0,
        }
    }
}

/// Slots that tiles pass through, out of `slots`, of which `capacity` are for tiles and pages, and `held` for pages and
/// tiles that stay; at least `bytes_least` where there is room for it.
fn window(
    (slots, capacity): (usize, usize),
    slot_bytes: usize,
    bytes_least: usize,
    held: usize,
    every_sweep: usize,
) -> usize {
    let window_bytes = (slots * slot_bytes / WINDOW_SHARE)
        .max(bytes_least)
        .clamp(*WINDOW_BYTES.start(), *WINDOW_BYTES.end());
    (window_bytes / slot_bytes)
        .min(every_sweep.saturating_sub(capacity) / WINDOW_OF_STREAMED)
        .clamp(*WINDOW_SLOTS.start(), *WINDOW_SLOTS.end())
        .min(slots / 8)
        .min(capacity - held)
        .max(WINDOW_SLOTS_LEAST.min(every_sweep))
}

/// A model to plan for, and what for.
pub(super) type Subject<'a> = (&'a Config, &'a MatrixPlan, &'a Request);

/// What `plan` makes of the most rows in a sweep for which it makes anything; it is told how many there may be.
///
/// Where a GPU has its own memory, the budget of the processor's says little of how many rows are worth it: they are
/// fewer only where there is no plan with more.
///
/// # Errors
/// As of `plan`, for the fewest.
pub(super) fn with_most_rows<T, E>(
    request: &Request,
    plan: impl Fn(usize) -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    let fewer = match request.gpu.and_then(Placement::gpu_memory) {
        Some(_) => &ROWS_TRIED[1..],
        None => &[],
    };
    let most = plan(ROWS_TRIED[0]);
    fewer
        .iter()
        .fold(most, |found, &rows| found.or_else(|_| plan(rows)))
}

/// Divides a budget for some models, and chooses the slots that suit them all.
///
/// # Panics
/// There is no model.
pub(super) fn divide(models: &[Subject]) -> Result<(Pool, Vec<Plan>)> {
    if let [(config, matrices, request)] = models {
        let plan = Plan::new(config, matrices, request)?;
        let pool = Pool::new(request, plan.slot_bytes).shared_by([&plan].into_iter())?;
        return Ok((pool, vec![plan]));
    }
    // Of what all share, the requests of all say the same.
    let (_, _, first) = models[0];
    with_most_rows(first, |most| divide_with(models, most))
}

/// Divides a budget for several models, whose sweeps have no more than `rows_most` rows.
fn divide_with(models: &[Subject], rows_most: usize) -> Result<(Pool, Vec<Plan>)> {
    let all: Vec<Matrix> = models
        .iter()
        .flat_map(|(_, matrices, _)| matrices.matrices.iter().cloned())
        .collect();
    let pages_least = models.iter().map(|(config, ..)| kv::page_bytes_min(config));
    let smallest = tile::slot_bytes_min(&all).max(pages_least.max().unwrap_or(0));
    let in_slots = |slot_bytes: usize, slots: usize| -> Result<Vec<Plan>> {
        let plan = |(config, matrices, request): &Subject| {
            let pages_max = slots / 2 / models.len();
            Plan::in_slots(
                config,
                matrices,
                request,
                rows_most,
                (slot_bytes, pages_max),
            )
        };
        models.iter().map(plan).collect()
    };
    // What the models take for themselves does not depend on the slots, so it is known before these are chosen.
    let least = in_slots(smallest, 0)?;
    let own: u64 = least.iter().map(Plan::own_bytes).sum();
    let row_bytes_max = all.iter().map(Matrix::row_bytes).max().unwrap_or(0);
    let (_, _, first) = models[0];
    let pool_bytes = { first.memory }.saturating_sub(own + common_bytes(first, row_bytes_max));
    let gpu_own: u64 = least.iter().map(Plan::gpu_own_bytes).sum();
    let gpu_bytes = { first.gpu }
        .and_then(Placement::gpu_memory)
        .map(|memory| memory.saturating_sub(gpu_own));
    let disk = models.iter().find_map(|(_, _, request)| request.disk);
    let slot_bytes = choose_slot_bytes(&all, (pool_bytes, gpu_bytes), disk).max(smallest);
    let slots = gpu_bytes.unwrap_or(pool_bytes) as usize / slot_bytes;
    let mut plans = in_slots(slot_bytes, slots)?;
    let shared = Request { disk, ..*first };
    let pool = Pool::new(&shared, slot_bytes).shared_by(plans.iter())?;
    for plan in &mut plans {
        plan.move_to(&pool);
    }
    Ok((pool, plans))
}

/// Slots that suit these matrices in so many bytes, and in those that a GPU has of its own.
pub(super) fn choose_slot_bytes(
    matrices: &[Matrix],
    (bytes, gpu_bytes): (u64, Option<u64>),
    disk: Option<Advice>,
) -> usize {
    let bytes = gpu_bytes.unwrap_or(bytes).min(bytes) as usize;
    let read_bytes = disk.map_or(0, |disk| disk.read_bytes as usize);
    tile::choose_slot_bytes(matrices, bytes, SLOTS_LEAST, read_bytes)
}

/// Bytes that all models share beside the slots.
pub(super) fn common_bytes(request: &Request, row_bytes_max: usize) -> u64 {
    let scratch = Cpu::scratch_bytes(request.threads, row_bytes_max) as u64;
    let context = request.gpu.map_or(0, Placement::context_bytes);
    scratch + IO_BYTES + context + request.clients_bytes
}

/// Reads in flight at most for a window of `slots`: half of it. Some disks (virtual ones above all) finish all that was
/// handed to them at once; then the other half is there to go on with, and they hardly stop.
pub(super) fn depth(slots: u32) -> usize {
    (slots as usize / 2).max(DEPTH_MIN)
}
