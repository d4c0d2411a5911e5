//! How a memory budget is divided for a model: a pure function from its shape and the budget to every line.

use crate::arena::{HUGE_PAGE_BYTES, PAGE_BYTES};
use crate::device::Placement;
use crate::device::cpu::{Kinds, KvLayout, Precision};
use crate::device::cuda::{self, Sizes};
use crate::error::{Error, Kind, Result};
use crate::format::tile::{self, Tile};
use crate::io::advice::Advice;
use crate::model::config::Config;
use crate::model::forward::{BatchLimits, Model};
use crate::model::kv::{self, Session};
use crate::model::weights::MatrixPlan;
use crate::residency::Residency;
use crate::store::{Store, tile_uses};
use crate::text::SamplerScratch;

use super::pool::{self, Pool};

/// The context that is planned for where the user names none and the model allows it.
pub const CONTEXT_DEFAULT: usize = 4096;
/// A context that nobody asked for is not made smaller than this.
const CONTEXT_LEAST: usize = 256;
/// Rows per sweep that are tried, best first: a prompt costs one pass over the disk per so many tokens.
pub(super) const ROWS_TRIED: [usize; 7] = [512, 256, 128, 64, 32, 16, 8];
/// Drafts of a sweep where nobody says how many: with the row that is no draft they are a panel of the kernels.
const DRAFTS: usize = 7;
/// The same where a draft model makes them, of which more are right: two panels.
const DRAFTS_OF_MODEL: usize = 15;
/// Their logits may take this fraction of the budget.
const DRAFTS_SHARE: u64 = 64;
/// The buffers of a sweep may take this fraction of the budget.
const BUFFERS_SHARE: u64 = 16;
/// The same of the processor's memory where a GPU has the weights, or most of them, in its own: what of the buffers is
/// there at all.
const BUFFERS_SHARE_BESIDE_GPU: u64 = 4;
/// Slots the pool is divided into at least where the model's rows allow: fewer would make streaming coarse.
pub(super) const SLOTS_LEAST: usize = 96;

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
    /// Rows that want logits in one sweep, drafts aside.
    pub logits_rows: usize,
    /// Drafts in a sweep at most; chosen if none.
    pub drafts: Option<usize>,
    /// Whether a draft model makes drafts.
    pub drafted: bool,
    /// How finely activations are rounded.
    pub activations: Precision,
    /// Whether all weights have to stay in memory.
    pub resident: bool,
    /// Threads that compute.
    pub threads: usize,
    /// Bytes that clients can make the process hold.
    pub clients_bytes: u64,
    /// Where a GPU computes, if one does.
    pub gpu: Option<Placement>,
    /// Bytes of the tokenizer's tables.
    pub tokenizer_bytes: usize,
    /// How the disk wants to be read, if that was measured.
    pub disk: Option<Advice>,
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
    /// How many of the lines are the model's own, beside its slots.
    own_lines: usize,
    /// Its lines, as they are while the model is alone: the model's own first, then what all models share.
    pub lines: Vec<Line>,
    /// The promise for a GPU's own memory, if one computes there.
    pub gpu_memory: Option<u64>,
    /// Its lines, in the same order.
    pub gpu_lines: Vec<Line>,
    gpu_own_lines: usize,
    /// Positions of a session.
    pub context: usize,
    /// The largest batch.
    pub limits: BatchLimits,
    /// Rows of a sweep that may be drafts.
    pub drafts: usize,
    /// Bytes of a slot.
    pub slot_bytes: usize,
    /// Slots of the pool that weights and KV pages share.
    pub slots: usize,
    /// Slots that KV pages take when the contexts of as many sessions are full as there is surely memory for: of all
    /// sessions where memory is plenty, of one at least. The others may take slots from the weights meanwhile.
    pub pages_full: usize,
    /// Layout of a page.
    pub layout: KvLayout,
    /// Slots that streamed tiles pass through.
    pub window: u32,
    /// Slots of a GPU's own memory.
    pub gpu_slots: usize,
    /// Of these, slots that tiles pass through which do not stay.
    pub gpu_window: u32,
    /// Bytes of the model's vectors, buffers and logits.
    pub fixed_bytes: usize,
    /// What a GPU's own memory is made for, if one computes.
    pub gpu: Option<Sizes>,
    /// Bytes of its longest row of weights.
    pub row_bytes_max: usize,
    /// All tiles of the model, in the order of the sweep.
    pub tiles: Vec<Tile>,
    /// How many of them every sweep uses.
    pub tiles_every_sweep: usize,
    /// How many of them have to stay in memory.
    pub tiles_resident: usize,
    /// The policy, with an empty context and no other model.
    pub residency: Residency,
}

/// Which of a model's lines is that of the buffers.
const BUFFERS_LINE: usize = 2;

/// What a model takes whatever the pool is.
struct Own {
    limits: BatchLimits,
    drafts: usize,
    lines: Vec<Line>,
    gpu_lines: Vec<Line>,
    fixed_bytes: usize,
    row_bytes_max: usize,
    context_wanted: usize,
    gpu: Option<Sizes>,
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
        let with = |memory: u64, gpu: Option<Placement>| {
            let request = Request {
                memory,
                gpu,
                ..*request
            };
            Plan::try_new(config, matrices, &request).is_some()
        };
        let context = request
            .context
            .map_or(String::new(), |c| format!(" with a context of {c} tokens"));
        // What is too little by itself: the GPU's own memory, or else the processor's.
        let unbounded = request.gpu.map(|_| Placement::Staged {
            memory: u64::MAX >> 1,
        });
        if let Some(Placement::Staged { memory }) = request.gpu
            && with(request.memory, unbounded)
        {
            let enough = least_mib(memory, |memory| {
                with(request.memory, Some(Placement::Staged { memory }))
            });
            return Err(Error::new(
                Kind::Budget,
                format!(
                    "{} MiB of the GPU's memory cannot hold the minimum for this model{context}",
                    memory >> 20
                ),
                format!("give --gpu-memory {enough}MiB or more, a smaller --ctx, or --device cpu"),
            ));
        }
        let gpu = match request.gpu {
            Some(Placement::Staged { .. }) => unbounded,
            other => other,
        };
        let enough = least_mib(request.memory, |memory| with(memory, gpu));
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
        pool::with_most_rows(request, |most| {
            let rows = Own::rows_within(config, matrices, request, most);
            Plan::with_rows(config, matrices, request, rows).ok_or(())
        })
        .ok()
    }

    fn with_rows(
        config: &Config,
        matrices: &MatrixPlan,
        request: &Request,
        rows: usize,
    ) -> Option<Plan> {
        let own = Own::new(config, matrices, request, rows);
        let common_bytes = pool::common_bytes(request, own.row_bytes_max);
        let pool_bytes = request.memory.checked_sub(own.bytes() + common_bytes)?;
        let gpu_memory = request.gpu.and_then(Placement::gpu_memory);
        let gpu_bytes = match gpu_memory {
            Some(memory) => Some(memory.checked_sub(own.gpu_bytes())?),
            None => None,
        };
        let room = (pool_bytes, gpu_bytes);
        let slot_bytes = pool::choose_slot_bytes(&matrices.matrices, room, request.disk);
        let slots = gpu_bytes.unwrap_or(pool_bytes) as usize / slot_bytes;
        let mut plan = own.in_slots(config, matrices, request, slot_bytes, slots / 2)?;
        let pool = Pool::new(request, slot_bytes);
        plan.move_to(&pool.shared_by([&plan].into_iter()).ok()?);
        Some(plan)
    }

    /// Plans for a model in a pool whose slots were chosen for other models. By default its context may take
    /// `pages_max` slots and a sweep no more than `rows_most` rows.
    ///
    /// # Errors
    /// The model cannot live with such slots.
    pub fn in_slots(
        config: &Config,
        matrices: &MatrixPlan,
        request: &Request,
        rows_most: usize,
        (slot_bytes, pages_max): (usize, usize),
    ) -> Result<Plan> {
        let rows = Own::rows_within(config, matrices, request, rows_most);
        let own = Own::new(config, matrices, request, rows);
        let least = tile::slot_bytes_min(&matrices.matrices);
        let fits = least <= slot_bytes && kv::layout(config, slot_bytes, 1).page_positions > 0;
        let plan = match fits {
            true => own.in_slots(config, matrices, request, slot_bytes, pages_max),
            false => None,
        };
        plan.ok_or_else(|| {
            Error::new(
                Kind::Budget,
                format!(
                    "the arena's slots of {} KiB are too small for this model, which needs {} KiB",
                    slot_bytes >> 10,
                    least.max(kv::page_bytes_min(config)) >> 10
                ),
                "name the model among those that are loaded at the start: slots are chosen for these",
            )
        })
    }

    /// Puts the plan into a pool, from now on.
    pub fn move_to(&mut self, pool: &Pool) {
        self.memory = pool.memory;
        (self.slots, self.window) = (pool.slots, pool.window);
        self.lines.truncate(self.own_lines);
        self.gpu_lines.truncate(self.gpu_own_lines);
        let shares = pool.shares(&[self]);
        let [lines, gpu_lines] = [0, 1].map(|memory| {
            let of_all = shares.iter().map(|share| &share[memory]);
            of_all.flatten().cloned().collect()
        });
        (self.lines, self.gpu_lines) = (lines, gpu_lines);
        self.residency.set_window(pool.window);
        self.residency.set_capacity(pool.slots as u32 - 1);
        if let Some(gpu) = &pool.gpu {
            (self.gpu_memory, self.gpu_slots, self.gpu_window) =
                (Some(gpu.memory), gpu.slots, gpu.window);
            self.residency.set_device_window(gpu.window);
            self.residency.set_device_capacity(gpu.slots as u32);
        }
    }

    /// Bytes that the model takes of a GPU's own memory outside its pool.
    pub fn gpu_own_bytes(&self) -> u64 {
        self.gpu_own_lines().iter().map(|l| l.bytes).sum()
    }

    /// The lines of the GPU's own memory that are the model's, slots aside.
    pub fn gpu_own_lines(&self) -> &[Line] {
        &self.gpu_lines[..self.gpu_own_lines]
    }

    /// Bytes that the model takes outside the pool.
    pub fn own_bytes(&self) -> u64 {
        let own: u64 = self.own_lines().iter().map(|l| l.bytes).sum();
        own + PAGE_BYTES as u64
    }

    /// The lines of the budget that are the model's own, slots aside.
    pub fn own_lines(&self) -> &[Line] {
        &self.lines[..self.own_lines]
    }

    /// Reads in flight at most.
    pub fn depth(&self) -> usize {
        pool::depth(self.window)
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
        let residency = self.residency_with(pages);
        let streamed = residency.streamed();
        streamed
            .map(|t| self.tiles[t as usize].read_bytes() as u64)
            .sum()
    }

    /// Bytes copied to a GPU's own memory in every sweep meanwhile.
    pub fn copied_bytes(&self, pages: usize) -> u64 {
        let residency = self.residency_with(pages);
        let copied = residency.copied().filter(|_| self.gpu_memory.is_some());
        copied
            .map(|t| u64::from(self.tiles[t as usize].bytes))
            .sum()
    }

    /// The policy while KV pages take `pages` slots.
    fn residency_with(&self, pages: usize) -> Residency {
        let (mut residency, pages) = (self.residency.clone(), pages as u32);
        match self.gpu_memory {
            Some(_) => residency.set_device_capacity(residency.device_capacity() - pages),
            None => residency.set_capacity(residency.capacity() - pages),
        }
        residency
    }
}

impl Own {
    /// Drafts of a sweep.
    fn drafts(config: &Config, request: &Request) -> usize {
        request.drafts.unwrap_or_else(|| {
            let row_bytes = (config.vocab * size_of::<f32>()) as u64;
            let most = match request.drafted {
                true => DRAFTS_OF_MODEL,
                false => DRAFTS,
            };
            most.min((request.memory / DRAFTS_SHARE / row_bytes) as usize)
        })
    }

    fn limits(config: &Config, request: &Request, rows: usize) -> BatchLimits {
        BatchLimits {
            rows,
            logits_rows: (request.logits_rows + Own::drafts(config, request)).min(rows),
            activations: request.activations,
        }
    }

    /// How many rows a sweep has: as asked for, or no more than `most` and than the budgets are large for.
    fn rows_within(
        config: &Config,
        matrices: &MatrixPlan,
        request: &Request,
        most: usize,
    ) -> usize {
        let allowed = |rows: usize| {
            let limits = Own::limits(config, request, rows);
            let (vectors, buffers, logits) = Model::carved_bytes(config, matrices, limits);
            match request.gpu.and_then(Placement::gpu_memory) {
                Some(own) => {
                    let (_, front) = Model::memory_bytes(config, matrices, limits);
                    let beside = (front - vectors - logits) as u64;
                    buffers as u64 <= own / BUFFERS_SHARE
                        && beside <= request.memory / BUFFERS_SHARE_BESIDE_GPU
                }
                None => buffers as u64 <= request.memory / BUFFERS_SHARE,
            }
        };
        let mut tried = ROWS_TRIED.into_iter().filter(|&rows| rows <= most);
        let found = request.rows.or_else(|| tried.find(|&rows| allowed(rows)));
        found.unwrap_or(1)
    }

    fn new(config: &Config, matrices: &MatrixPlan, request: &Request, rows: usize) -> Own {
        let drafts = Own::drafts(config, request);
        let limits = Own::limits(config, request, rows);
        let (vectors, buffers, logits) = Model::carved_bytes(config, matrices, limits);
        let row_bytes_max = matrices.matrices.iter().map(|m| m.row_bytes()).max();

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
        // A session's tokens are kept beside its pages, to know a prefix again.
        let session = Session::table_bytes(config.layers.len(), &layout_least, context_wanted)
            + context_wanted * size_of::<u32>();
        let tables =
            Store::table_bytes(&matrices.matrices, tiles_most) + request.sessions * session;
        let line = |what, bytes: usize| Line {
            what,
            bytes: bytes as u64,
        };
        let mut lines = vec![
            line("tokenizer", request.tokenizer_bytes),
            line("norms and biases", vectors),
            line("buffers of a sweep", buffers),
            line(
                "logits and sampling",
                logits + SamplerScratch::bytes(config.vocab),
            ),
            line("tables", tables),
        ];
        let fixed_bytes = (vectors + buffers + logits).next_multiple_of(PAGE_BYTES);
        let gpu = request
            .gpu
            .map(|_| gpu_sizes(config, matrices, limits, request.sessions, context_wanted));
        let mut gpu_lines = Vec::new();
        if let (Some(placement), Some(sizes)) = (request.gpu, gpu) {
            // Buffers that only the GPU touches take addresses here, and no memory.
            let (all, front) = Model::memory_bytes(config, matrices, limits);
            let spared = fixed_bytes.saturating_sub(front + HUGE_PAGE_BYTES);
            lines[BUFFERS_LINE].bytes -= spared as u64;
            lines.push(line("tables for the GPU", sizes.tables_bytes()));
            let of_gpu = [
                line("norms, buffers, logits on the GPU", cuda::allocated(all)),
                line(
                    "quantized rows and attention on the GPU",
                    sizes.device_bytes(),
                ),
            ];
            match placement {
                Placement::Direct { .. } => lines.extend(of_gpu),
                Placement::Staged { .. } => {
                    lines.push(line(
                        "tables of what the GPU has",
                        Store::device_table_bytes(tiles_most),
                    ));
                    gpu_lines.extend(of_gpu);
                }
            }
        }
        Own {
            limits,
            drafts,
            lines,
            gpu_lines,
            gpu,
            fixed_bytes,
            row_bytes_max: row_bytes_max.unwrap_or(0),
            context_wanted,
        }
    }

    fn bytes(&self) -> u64 {
        self.lines.iter().map(|l| l.bytes).sum::<u64>() + PAGE_BYTES as u64
    }

    fn gpu_bytes(&self) -> u64 {
        self.gpu_lines.iter().map(|l| l.bytes).sum()
    }

    /// The model's plan with slots of `slot_bytes`; none if no page fits in one.
    fn in_slots(
        self,
        config: &Config,
        matrices: &MatrixPlan,
        request: &Request,
        slot_bytes: usize,
        pages_max: usize,
    ) -> Option<Plan> {
        let (tiles, _) = tile::cut(&matrices.matrices, slot_bytes);
        let uses = tile_uses(&matrices.matrices, &tiles, request.resident);
        let pages = |context: usize| {
            let layout = kv::layout(config, slot_bytes, context);
            if layout.page_positions == 0 {
                return None;
            }
            let per_session: usize = config
                .layers
                .iter()
                .map(|spec| kv::pages_max(spec, &layout, context, self.limits.rows))
                .sum();
            Some((layout, per_session))
        };
        let mut context = self.context_wanted;
        let (mut layout, mut per_session) = pages(context)?;
        // A context that was not asked for takes no more than it may.
        while request.context.is_none() && per_session > pages_max && context > CONTEXT_LEAST {
            context /= 2;
            (layout, per_session) = pages(context)?;
        }
        // Sessions are seldom all full: of many, as many may be as take what one may, and one always.
        let sessions_full = (pages_max / per_session.max(1)).max(1);
        let pages_full = sessions_full.min(request.sessions) * per_session;
        let tiles_every_sweep = uses.iter().filter(|&&u| u >= 1.0).count();
        Some(Plan {
            memory: request.memory,
            own_lines: self.lines.len(),
            lines: self.lines,
            gpu_memory: None,
            gpu_own_lines: self.gpu_lines.len(),
            gpu_lines: self.gpu_lines,
            gpu: self.gpu,
            context,
            limits: self.limits,
            drafts: self.drafts,
            slot_bytes,
            slots: 0,
            pages_full,
            layout,
            window: 0,
            gpu_slots: 0,
            gpu_window: 0,
            fixed_bytes: self.fixed_bytes,
            row_bytes_max: self.row_bytes_max,
            tiles_every_sweep,
            tiles_resident: if request.resident {
                tiles_every_sweep
            } else {
                0
            },
            residency: Residency::new(&uses, 0, 0),
            tiles,
        })
    }
}

/// The least budget above `bytes` that fits, in MiB: planning is cheap enough to search for it.
pub(super) fn least_mib(bytes: u64, fits: impl Fn(u64) -> bool) -> u64 {
    let fits = |mib: u64| fits(mib << 20);
    let (mut too_little, mut enough) = (bytes >> 20, (bytes >> 20).max(1));
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
    enough
}

/// What a GPU's own memory is made for.
fn gpu_sizes(
    config: &Config,
    matrices: &MatrixPlan,
    limits: BatchLimits,
    sessions: usize,
    context: usize,
) -> Sizes {
    let all = matrices.matrices.iter();
    Sizes {
        rows: limits.rows,
        cols: all.clone().map(|m| m.cols).max().unwrap_or(0),
        kinds: all.fold(Kinds::NONE, |kinds, m| kinds | Kinds::of(m.qtype)),
        heads: config.heads,
        head_dim: config.head_dim,
        context,
        sessions,
    }
}
