//! How a memory budget is divided: a pure function from the model's shape and the budget to every line of it.

use crate::arena::PAGE_BYTES;
use crate::device::cpu::{Cpu, KvLayout};
use crate::error::{Error, Kind, Result};
use crate::format::tile::{self, Tile};
use crate::model::config::Config;
use crate::model::forward::{BatchLimits, Model};
use crate::model::kv::{self, Session};
use crate::model::weights::MatrixPlan;
use crate::residency::Residency;
use crate::store::{Store, tile_uses};

/// The context that is planned for where the user names none and the model allows it.
pub const CONTEXT_DEFAULT: usize = 4096;
/// Rows per sweep that are tried, best first: a prompt costs one pass over the disk per so many tokens.
const ROWS_TRIED: [usize; 7] = [512, 256, 128, 64, 32, 16, 8];
/// The buffers of a sweep may take this fraction of the budget.
const BUFFERS_SHARE: u64 = 16;
/// Streamed tiles pass through this part of the pool. A real disk delivers in lumps, and a large window has read
/// enough to compute with in between: with 8B in 2400 MiB, 12 MiB made 1.13 tok/s (1.03 to 1.31) and 48 MiB 1.40
/// (1.12 to 1.57), medians of all 12 rounds each on a virtual disk whose own speed varied twofold.
const WINDOW_SHARE: usize = 48;
/// Bounds of the window, in bytes: what a disk delivers in a millisecond or in some tens of them.
const WINDOW_BYTES: std::ops::RangeInclusive<usize> = 2 << 20..=64 << 20;
/// Bounds of the window, in slots.
const WINDOW_SLOTS: std::ops::RangeInclusive<usize> = 8..=64;
/// Where nearly all fits, the window takes no more than this part of what does not: it adds to what streams.
const WINDOW_OF_STREAMED: usize = 16;
/// The fewest slots that streamed tiles can pass through without the disk idling all the time.
const WINDOW_SLOTS_LEAST: usize = 4;
/// Slots the pool is divided into at least where the model's rows allow: fewer would make streaming coarse.
const SLOTS_LEAST: usize = 96;
/// Reads in flight at least, whatever the window: single rows are read in batches.
const DEPTH_MIN: usize = 8;
/// Memory of the io_uring rings and of the fallback's threads.
const IO_BYTES: u64 = 256 << 10;

/// What to plan for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The promise: nothing that the process maps for its work is beyond it.
    pub memory: u64,
    /// Positions of a session; chosen if none.
    pub context: Option<usize>,
    /// Sessions at a time.
    pub sessions: usize,
    /// The most rows in a sweep; chosen if none.
    pub rows: Option<usize>,
    /// Rows that want logits in one sweep.
    pub logits_rows: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Bytes of the tokenizer's tables.
    pub tokenizer_bytes: usize,
}

/// One line of the budget.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Line {
    /// What the memory is for.
    pub what: &'static str,
    /// How much of it.
    pub bytes: u64,
}

/// A divided budget.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The promise that was planned for.
    pub memory: u64,
    /// Its lines; their sum is at most `memory`.
    pub lines: Vec<Line>,
    /// Positions of a session.
    pub context: usize,
    /// The largest batch.
    pub limits: BatchLimits,
    /// Bytes of a slot.
    pub slot_bytes: usize,
    /// Slots of the pool that weights and KV pages share.
    pub slots: usize,
    /// Slots that there is address space for: the budget may grow to them.
    pub slots_reserved: usize,
    /// Slots that all KV pages take when every session's context is full.
    pub pages_full: usize,
    /// Layout of a page.
    pub layout: KvLayout,
    /// Slots that streamed tiles pass through.
    pub window: u32,
    /// Bytes of the arena's fixed part.
    pub fixed_bytes: usize,
    /// All tiles of the model, in the order of the sweep.
    pub tiles: Vec<Tile>,
    /// The policy, with an empty context.
    pub residency: Residency,
}

impl Plan {
    /// Divides the budget.
    ///
    /// # Errors
    /// The budget cannot hold the minimum; the error says what the minimum is.
    pub fn new(config: &Config, matrices: &MatrixPlan, request: &Request) -> Result<Plan> {
        if let Some(plan) = Plan::try_new(config, matrices, request) {
            return Ok(plan);
        }
        // The least budget that works, to a MiB: planning is cheap enough to search for it.
        let fits = |mib: u64| {
            Plan::try_new(
                config,
                matrices,
                &Request {
                    memory: mib << 20,
                    ..*request
                },
            )
            .is_some()
        };
        let (mut too_little, mut enough) = (request.memory >> 20, (request.memory >> 20).max(1));
        while !fits(enough) && enough < 1 << 24 {
            too_little = enough;
            enough *= 2;
        }
        while too_little + 1 < enough {
            let middle = (too_little + enough) / 2;
            if fits(middle) {
                enough = middle
            } else {
                too_little = middle
            }
        }
        let context = request
            .context
            .map_or(String::new(), |c| format!(" with a context of {c} tokens"));
        Err(Error::new(
            Kind::Budget,
            format!(
                "a budget of {} MiB cannot hold the minimum for this model{context}",
                request.memory >> 20
            ),
            format!("give --memory {enough}MiB or more, or a smaller --ctx"),
        ))
    }

    fn try_new(config: &Config, matrices: &MatrixPlan, request: &Request) -> Option<Plan> {
        let rows_allowed = |rows: usize| {
            let limits = BatchLimits {
                rows,
                logits_rows: request.logits_rows.min(rows),
            };
            let (_, buffers, _) = Model::carved_bytes(config, matrices, limits);
            buffers as u64 <= request.memory / BUFFERS_SHARE
        };
        let rows = request
            .rows
            .or_else(|| ROWS_TRIED.into_iter().find(|&r| rows_allowed(r)))
            .unwrap_or(1);
        let limits = BatchLimits {
            rows,
            logits_rows: request.logits_rows.min(rows),
        };
        let (vectors, buffers, logits) = Model::carved_bytes(config, matrices, limits);
        let row_bytes_max = matrices
            .matrices
            .iter()
            .map(|m| m.row_bytes())
            .max()
            .unwrap_or(0);

        // What is left for the pool is known only with the tables, and those depend on the slots: take the tables
        // for the smallest slots.
        let smallest = tile::slot_bytes_min(&matrices.matrices);
        let weight_bytes: u64 = matrices.matrices.iter().map(|m| m.bytes()).sum();
        let context_wanted = request
            .context
            .unwrap_or(CONTEXT_DEFAULT.min(config.context_max));
        let layout_least = kv::layout(config, smallest, context_wanted);
        let layout_least = KvLayout {
            page_positions: layout_least.page_positions.max(16),
            ..layout_least
        };
        let tiles_most = 2 * weight_bytes.div_ceil(smallest as u64) as usize;
        let tables = Store::table_bytes(&matrices.matrices, tiles_most)
            + request.sessions
                * Session::table_bytes(config.layers.len(), &layout_least, context_wanted);
        let mut lines = vec![
            Line {
                what: "tokenizer",
                bytes: request.tokenizer_bytes as u64,
            },
            Line {
                what: "norms and biases",
                bytes: vectors as u64,
            },
            Line {
                what: "buffers of a sweep",
                bytes: buffers as u64,
            },
            Line {
                what: "logits",
                bytes: logits as u64,
            },
            Line {
                what: "kernel scratch",
                bytes: Cpu::scratch_bytes(request.threads, row_bytes_max) as u64,
            },
            Line {
                what: "tables",
                bytes: tables as u64,
            },
            Line {
                what: "I/O rings",
                bytes: IO_BYTES,
            },
        ];
        let fixed_bytes = (vectors + buffers + logits).next_multiple_of(PAGE_BYTES);
        let spent: u64 = lines.iter().map(|l| l.bytes).sum::<u64>() + PAGE_BYTES as u64;
        let pool_bytes = request.memory.checked_sub(spent)? as usize;

        let slot_bytes = tile::choose_slot_bytes(&matrices.matrices, pool_bytes, SLOTS_LEAST);
        let (tiles, _) = tile::cut(&matrices.matrices, slot_bytes);
        let every_sweep = tile_uses(&matrices.matrices, &tiles)
            .iter()
            .filter(|&&r| r >= 1.0)
            .count();
        let slots = pool_bytes / slot_bytes;
        // The rows' slot, and the least window there must be.
        let overhead = 1 + WINDOW_SLOTS_LEAST.min(tiles.len());
        let pages = |context: usize| {
            let layout = kv::layout(config, slot_bytes, context);
            if layout.page_positions == 0 {
                return None;
            }
            let per_session: usize = config
                .layers
                .iter()
                .map(|spec| kv::pages_max(spec, &layout, context, limits.rows))
                .sum();
            Some((layout, request.sessions * per_session))
        };
        let (context, (layout, pages_full)) = match request.context {
            Some(context) => (context, pages(context)?),
            None => {
                // Half of the pool for a full context is the most that goes without being asked for.
                let mut context = context_wanted;
                loop {
                    let found = pages(context)?;
                    if found.1 <= slots / 2 || context <= 256 {
                        break (context, found);
                    }
                    context /= 2;
                }
            }
        };
        if slots < overhead + pages_full {
            return None;
        }
        let slots = slots.min(1 + tiles.len() + pages_full);
        let capacity = slots - 1;
        let window_bytes =
            (slots * slot_bytes / WINDOW_SHARE).clamp(*WINDOW_BYTES.start(), *WINDOW_BYTES.end());
        let window = (window_bytes / slot_bytes)
            .min(every_sweep.saturating_sub(capacity) / WINDOW_OF_STREAMED)
            .clamp(*WINDOW_SLOTS.start(), *WINDOW_SLOTS.end())
            .min(slots / 8)
            .min(capacity - pages_full)
            .clamp(WINDOW_SLOTS_LEAST.min(every_sweep), tiles.len()) as u32;
        let residency = Residency::new(
            &tile_uses(&matrices.matrices, &tiles),
            capacity as u32,
            window,
        );
        lines.extend(slot_lines(slots, pages_full, slot_bytes));
        Some(Plan {
            memory: request.memory,
            lines,
            context,
            limits,
            slot_bytes,
            slots,
            slots_reserved: slots,
            pages_full,
            layout,
            window,
            fixed_bytes,
            tiles,
            residency,
        })
    }

    /// The same division of another budget: only the number of slots in use differs.
    ///
    /// # Errors
    /// The budget cannot hold the minimum; the error says what the minimum is.
    pub fn resized(&self, memory: u64) -> Result<Plan> {
        let slot_bytes = self.slot_bytes as u64;
        let others = self.total_bytes() - self.slots as u64 * slot_bytes;
        let least = 1 + self.pages_full + self.window as usize;
        let slots =
            (memory.saturating_sub(others) / slot_bytes).min(self.slots_reserved as u64) as usize;
        if slots < least {
            let minimum = (others + least as u64 * slot_bytes).div_ceil(1 << 20);
            return Err(Error::new(
                Kind::Budget,
                format!(
                    "a budget of {} MiB cannot hold what is in use",
                    memory >> 20
                ),
                format!(
                    "leave at least {minimum} MiB, or open the model again with a smaller context"
                ),
            ));
        }
        let mut plan = self.clone();
        (plan.memory, plan.slots) = (memory, slots);
        plan.lines.truncate(self.lines.len() - 2);
        plan.lines
            .extend(slot_lines(slots, self.pages_full, self.slot_bytes));
        plan.residency.set_capacity(slots as u32 - 1);
        Ok(plan)
    }

    /// Reads in flight at most.
    pub fn depth(&self) -> usize {
        (self.window as usize).max(DEPTH_MIN)
    }

    /// Bytes of the whole reservation.
    pub fn arena_bytes(&self) -> usize {
        self.fixed_bytes + self.slots * self.slot_bytes
    }

    /// The sum of all lines: what the budget is used for.
    pub fn total_bytes(&self) -> u64 {
        self.lines.iter().map(|l| l.bytes).sum()
    }

    /// Slots that the KV pages of one session take at `positions`.
    pub fn pages_at(&self, config: &Config, positions: usize) -> usize {
        config
            .layers
            .iter()
            .map(|spec| kv::pages_max(spec, &self.layout, positions, 1))
            .sum()
    }

    /// Bytes read from disk in every sweep while KV pages take `pages` slots: exactly what the store reads.
    pub fn streamed_bytes(&self, pages: usize) -> u64 {
        let mut residency = self.residency.clone();
        residency.set_capacity(residency.capacity() - pages as u32);
        residency
            .streamed()
            .map(|t| self.tiles[t as usize].read_bytes() as u64)
            .sum()
    }
}

/// The last two lines of a budget: the pool.
fn slot_lines(slots: usize, pages_full: usize, slot_bytes: usize) -> [Line; 2] {
    let line = |what, slots: usize| Line {
        what,
        bytes: (slots * slot_bytes) as u64,
    };
    [
        line("slots: KV pages (context full)", pages_full),
        line("slots: weights", slots - pages_full),
    ]
}
