//! Executes the residency policy: slots, reads in flight, tiles in use.
//!
//! A sweep asks for one range of tiles after the other ([`Store::begin`],
//! then [`Store::acquire`] and [`Store::release`] until it is done). The store
//! hands out tiles as they are in memory, in any order, and keeps reads in
//! flight for what comes next in the cyclic order of the sweep, past the end
//! of this sweep into the next one.
//!
//! Two invariants, asserted here: *a slot being read is never handed out*, and
//! *a slot handed out is never read into*.
//!
//! The device shows what it is about to use to the checksums ([`Store::sums`]).
//! A tile that did not agree is handed out once more after another read, so its
//! results are overwritten before anyone uses them. A read that fails matters
//! only if the pass at hand needs its tile; ahead of that it is forgotten, and
//! the tile read when its turn comes.
#![allow(unsafe_code)]

mod idle;
pub mod integrity;
mod models;
mod order;
mod pages;
mod partial;
mod reads;
mod resize;
mod rows;
pub mod sidecar;
mod staging;
mod sums;

use std::ops::Range;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use crate::arena::{SlotId, Slots};
use crate::error::{Error, Result};
use crate::format::tile::{Matrix, Tile};
use crate::io::{Completion, Io};
use crate::residency::Residency;
use crate::trace::{Trace, What};

pub use idle::DiskSample;
use integrity::Integrity;
pub use integrity::Sums;
use models::Member;
pub use models::{ModelId, Weights};
use order::Order;
use partial::{Next, Partial};
pub use resize::Moved;
pub use rows::RowBytes;
use rows::{ROWS_MAX, RowRead};
use staging::Staging;
pub use staging::{COPIES_MAX, Copies, MARKS_MAX};

/// Waits for a device that computes in the store's slots, and is behind.
pub type Fence = Box<dyn FnMut() -> Result<()> + Send>;

/// Completions reaped at a time.
const REAP_MAX: usize = 32;
/// The slot that single rows are read into.
const ROWS_SLOT: SlotId = 0;

/// Where a tile is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// On disk only.
    Absent,
    /// A read into its slot is in flight.
    Reading,
    /// In its slot, free to be handed out or given up.
    Ready,
    /// In its slot and handed out.
    InUse,
}

#[derive(Debug, Clone, Copy)]
struct TileState {
    phase: Phase,
    /// Its slot, unless absent.
    slot: SlotId,
    /// Its rows lie in the kernels' packed order (only kept tiles do); if kept tiles stay plain, they were inspected.
    packed: bool,
    /// It did not agree with its checksums when it was last handed out.
    doubted: bool,
    /// How far it has come, while reading.
    read: Partial,
    /// The pass in which it was last handed out.
    pass: u32,
}

impl TileState {
    const ABSENT: TileState = TileState {
        phase: Phase::Absent,
        slot: 0,
        packed: false,
        doubted: false,
        read: Partial::NONE,
        pass: 0,
    };
}

/// A tile in memory, handed to the device.
#[derive(Debug, Clone, Copy)]
pub struct TileMemory {
    /// Its first row.
    pub data: NonNull<u8>,
    /// Whether its rows lie in packed order already; if kept tiles stay plain, whether they were inspected.
    pub packed: bool,
    /// Whether it stays, so that packing it in place pays.
    pub keep: bool,
}

/// What the store has done since it was made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Bytes that arrived from disk.
    pub read_bytes: u64,
    /// Reads that finished.
    pub reads: u64,
    /// Tiles that did not agree with their checksums and were read again.
    pub doubted: u64,
    /// Bytes that went into the device's own memory.
    pub copied_bytes: u64,
    /// Time in which the caller waited for a read with nothing to compute.
    pub stalled: Duration,
}

/// The tiles of all models, the slots they share with KV pages, and the reads in flight.
///
/// Matrices, tiles and files of all models are in one table each, a model's one after the other.
pub struct Store {
    models: Vec<Member>,
    /// How many models there were so far.
    models_ever: u32,
    /// The model in its sweep.
    sweeping: usize,
    matrices: Vec<Matrix>,
    tiles: Vec<Tile>,
    ranges: Vec<Range<u32>>,
    paths: Vec<PathBuf>,
    states: Vec<TileState>,
    residency: Residency,
    /// The memory of a device that has its own.
    staging: Option<Staging>,
    // The order of these two fields matters: dropping the I/O waits for its reads, and only then may slots go.
    io: Box<dyn Io>,
    slots: Slots,
    /// The first so many slots are in use; the others are not while the budget is smaller than the arena.
    in_use: u32,
    free: Vec<SlotId>,
    /// The begun range, and how many of its tiles were not handed out yet.
    current: Range<u32>,
    waiting: u32,
    acquired: Vec<u32>,
    /// Which tiles are used next, and how many of them were considered for reading.
    order: Order,
    /// A read ahead has failed since tiles were last considered from the current range on.
    ahead_failed: bool,
    /// Reads ahead in flight at most, if fewer than the I/O's depth.
    reads_max: usize,
    /// The device does not pack kept tiles.
    plain: bool,
    /// Waits until the device has read all tiles that it was given, if it reads kept ones later than they are released.
    fence: Option<Fence>,
    pass: u32,
    row_reads: [RowRead; ROWS_MAX],
    rows_pending: usize,
    /// Why a row of the batch could not be read.
    rows_failed: Option<Error>,
    done: [Completion; REAP_MAX],
    counters: Counters,
    /// [`Counters::read_bytes`], for another thread to watch.
    arrived_bytes: Arc<AtomicU64>,
    /// An error met while the device computed; the next `acquire` reports it.
    feed_error: Option<Error>,
    trace: Trace,
}

impl Store {
    /// A store over `slots` without any model.
    ///
    /// The first `in_use` slots are in use; the others may be some time ([`resize`](Self::resize)). `window` is how many
    /// slots streamed tiles pass through. One slot is taken for reads of single rows.
    pub fn empty(slots: Slots, in_use: u32, io: Box<dyn Io>, window: u32) -> Self {
        assert!(in_use > ROWS_SLOT, "the planner gives at least one slot");
        let free: Vec<SlotId> = (ROWS_SLOT + 1..in_use).rev().collect();
        Store {
            models: Vec::new(),
            models_ever: 0,
            sweeping: 0,
            states: Vec::new(),
            acquired: Vec::new(),
            matrices: Vec::new(),
            tiles: Vec::new(),
            ranges: Vec::new(),
            paths: Vec::new(),
            residency: Residency::empty(free.len() as u32, window),
            staging: None,
            io,
            slots,
            in_use,
            free,
            current: 0..0,
            waiting: 0,
            order: Order::default(),
            ahead_failed: false,
            reads_max: usize::MAX,
            plain: false,
            fence: None,
            pass: 0,
            row_reads: [RowRead::NONE; ROWS_MAX],
            rows_pending: 0,
            rows_failed: None,
            done: [Completion::NONE; REAP_MAX],
            counters: Counters::default(),
            arrived_bytes: Arc::default(),
            feed_error: None,
            trace: Trace::default(),
        }
    }

    /// A store over `slots` for the tiles that [`cut`](crate::format::tile::cut) made of `matrices`, of one model.
    ///
    /// `paths` are the model's files; the rest is as for [`empty`](Self::empty).
    pub fn new(
        matrices: Vec<Matrix>,
        (tiles, ranges): (Vec<Tile>, Vec<Range<u32>>),
        paths: Vec<PathBuf>,
        slots: Slots,
        io: Box<dyn Io>,
        window: u32,
    ) -> Self {
        let in_use = slots.count();
        let mut store = Store::empty(slots, in_use, io, window);
        let weights = Weights {
            matrices,
            tiles,
            ranges,
            paths,
            integrity: Integrity::default(),
            resident: false,
        };
        store.push(weights, 1.0);
        store
    }

    /// The same store, which from now on verifies what it reads of its first model.
    pub fn with_integrity(mut self, integrity: Integrity) -> Self {
        self.models[0].integrity = integrity;
        self
    }

    /// Whether the device leaves kept tiles as the file has them; said before any is handed out.
    pub fn set_plain(&mut self, plain: bool) {
        self.plain = plain;
    }

    /// Has the store wait with `fence` before a slot that the device may still read is read into again. Tiles that do not
    /// stay are done with when they are released; those that stay may be read until the sweep ends.
    pub fn set_fence(&mut self, fence: Fence) {
        self.fence = Some(fence);
    }

    /// Waits until no kept tile is read any more.
    fn wait_for_readers(&mut self) -> Result<()> {
        self.fence.as_mut().map_or(Ok(()), |fence| fence())
    }

    /// Bytes of the tables that a store keeps for matrices cut into `tiles` tiles.
    pub fn table_bytes(matrices: &[Matrix], tiles: usize) -> usize {
        // Tile, state, acquired list, and the policy's queue, ranks and rates; checksums.
        tiles * (size_of::<Tile>() + size_of::<TileState>() + 4 * size_of::<u32>())
            + Sums::table_bytes(matrices, tiles)
    }

    /// The checksums of the model in its sweep, which whoever computes shows each strip to before it is used.
    pub fn sums(&self) -> Arc<Sums> {
        Arc::clone(self.models[self.sweeping].integrity.sums())
    }

    /// The matrices of all models, each in the order of its sweep.
    pub fn matrices(&self) -> &[Matrix] {
        &self.matrices
    }

    /// The tiles of a matrix of the model in its sweep.
    pub fn tiles_of(&self, matrix: usize) -> Range<u32> {
        self.ranges[self.first_matrix() + matrix].clone()
    }

    /// One tile; its matrix is one of [`matrices`](Self::matrices).
    pub fn tile(&self, tile: u32) -> &Tile {
        &self.tiles[tile as usize]
    }

    /// The policy as it stands.
    pub fn residency(&self) -> &Residency {
        &self.residency
    }

    /// Where what happens is recorded; off unless another trace is put there.
    pub fn trace(&mut self) -> &mut Trace {
        &mut self.trace
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes that arrived from disk so far, for another thread to watch a long sweep by.
    pub fn arrived_bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.arrived_bytes)
    }

    /// What performs the reads.
    pub fn io_description(&self) -> &str {
        self.io.describe()
    }

    /// Keeps at most so many reads ahead in flight, at least one, from now on.
    pub fn set_reads_max(&mut self, reads: usize) {
        self.reads_max = reads.max(1);
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.slots.slot_bytes()
    }

    /// Weight bytes in memory now, the device's own included.
    pub fn resident_bytes(&self) -> u64 {
        self.resident_bytes_in(0..self.tiles.len() as u32)
    }

    fn resident_bytes_in(&self, tiles: Range<u32>) -> u64 {
        let in_memory = |&tile: &u32| {
            let phase = self.states[tile as usize].phase;
            matches!(phase, Phase::Ready | Phase::InUse) || self.on_device(tile)
        };
        let resident = tiles.filter(in_memory);
        resident
            .map(|t| u64::from(self.tiles[t as usize].bytes))
            .sum()
    }

    /// Begins a pass over `tiles`: the next calls of [`acquire`](Self::acquire) hand out each of them once.
    pub fn begin(&mut self, tiles: Range<u32>) {
        assert!(
            self.waiting == 0 && self.acquired.is_empty(),
            "the pass before is not finished"
        );
        self.order.advance_to(tiles.start);
        if let Some(staging) = &mut self.staging {
            staging.order.advance_to(tiles.start);
        }
        self.current = tiles;
        self.waiting = self.current.len() as u32;
        self.pass = self.pass.wrapping_add(1);
        if self.ahead_failed && self.passed_by() {
            self.restart_ahead();
        }
    }

    /// Hands out tiles of the begun range that are in memory; blocks until there is one.
    ///
    /// Returns their number; 0 when all were handed out. They are listed by [`acquired`](Self::acquired) until
    /// [`release`](Self::release).
    ///
    /// # Errors
    /// A read failed for good: the error names file, offset and tensor. The pass is over then, and the next
    /// one may try again.
    pub fn acquire(&mut self) -> Result<usize> {
        assert!(
            self.acquired.is_empty(),
            "the tiles acquired before are not released"
        );
        if self.waiting == 0 {
            return Ok(0);
        }
        let result = self.acquire_some();
        self.end_pass_if_failed(result)
    }

    fn acquire_some(&mut self) -> Result<usize> {
        let mut waited: Option<(Instant, u64)> = None;
        loop {
            if let Some(error) = self.feed_error.take() {
                return Err(error);
            }
            self.poll()?;
            self.hand_out();
            if !self.acquired.is_empty() {
                self.waiting -= self.acquired.len() as u32;
                if let Some((since, begun)) = waited {
                    self.counters.stalled += since.elapsed();
                    self.trace.end(begun, What::Stall);
                }
                return Ok(self.acquired.len());
            }
            waited.get_or_insert_with(|| (Instant::now(), self.trace.begin()));
            if self.wait_for_device()? {
                continue;
            }
            if self.io.in_flight() == 0 {
                self.read_urgent()?;
            }
            self.reap(true)?;
        }
    }

    /// Hands out idle tiles of the current range, those that stream first.
    ///
    /// While any stream, no more than half of the window's number goes out at a time: the slots of streamed tiles
    /// are free again only when all are computed with, and the other half must keep the disk busy until then.
    fn hand_out(&mut self) {
        if self.staging.is_some() {
            return self.hand_out_on_device();
        }
        let streaming = self.residency.streams(self.sweeping);
        let tiles_max = match streaming {
            true => (self.residency.window() as usize / 2).max(1),
            false => usize::MAX,
        };
        for kept in [false, true] {
            for tile in self.current.clone() {
                let state = &mut self.states[tile as usize];
                if state.phase == Phase::Ready
                    && state.pass != self.pass
                    && self.residency.keeps(tile) == kept
                {
                    state.phase = Phase::InUse;
                    state.pass = self.pass;
                    self.acquired.push(tile);
                    if self.acquired.len() == tiles_max {
                        return;
                    }
                }
            }
        }
    }

    /// The tiles handed out by the last [`acquire`](Self::acquire).
    pub fn acquired(&self) -> &[u32] {
        &self.acquired
    }

    /// The memory of a tile that is handed out.
    pub fn memory(&self, tile: u32) -> TileMemory {
        let lead = self.tiles[tile as usize].lead();
        if let Some(slot) = self.device_memory(tile) {
            // It was inspected before it was copied, and a mark keeps its slot for as long as it is needed.
            return TileMemory {
                // SAFETY: lead is less than a page, and a slot is at least that.
                data: unsafe { slot.add(lead) },
                packed: true,
                keep: true,
            };
        }
        let state = &self.states[tile as usize];
        assert_eq!(state.phase, Phase::InUse, "tile {tile} is not handed out");
        // SAFETY: lead is less than a page, and a slot is at least that.
        let data = unsafe { self.slots.ptr(state.slot).add(lead) };
        TileMemory {
            data,
            packed: state.packed,
            keep: self.residency.keeps(tile),
        }
    }

    /// Takes the acquired tiles back after they were computed with; those with `keep` are packed now.
    ///
    /// Tiles that did not agree with their checksums are handed out again by the next [`acquire`](Self::acquire):
    /// what was computed with them does not count.
    ///
    /// # Errors
    /// A tile did not agree twice: the error names file, offset and tensor. The pass is over then.
    pub fn release(&mut self) -> Result<()> {
        let mut result = Ok(());
        for index in 0..self.acquired.len() {
            let tile = self.acquired[index];
            if self.staging.is_some() {
                self.release_on_device(tile);
                continue;
            }
            let keeps = self.residency.keeps(tile);
            let member = &self.models[self.sweeping];
            let sums = member.integrity.sums();
            let agrees = sums.tile_agrees(tile - member.tiles.start);
            let state = &mut self.states[tile as usize];
            debug_assert_eq!(state.phase, Phase::InUse);
            state.phase = Phase::Ready;
            if !agrees {
                result = result.and(self.doubt(tile, true));
                continue;
            }
            state.doubted = false;
            state.packed |= keeps;
            if !keeps {
                self.give_up(tile);
            }
        }
        self.acquired.clear();
        self.end_pass_if_failed(result)
    }

    /// After an error nothing more is handed out, and nothing is trusted that may be of another file.
    fn end_pass_if_failed<T>(&mut self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.waiting = 0;
            // What went wrong while the device computed was of this pass too.
            self.feed_error = None;
            self.restart_ahead();
            self.forget_if_changed();
        }
        result
    }

    /// Whether the pass at hand needs the tile and has not had it yet.
    fn waits_for(&self, tile: u32) -> bool {
        self.waiting > 0
            && self.current.contains(&tile)
            && self.states[tile as usize].pass != self.pass
    }

    /// Drops a tile that is in memory and not in use; its slot is free.
    fn give_up(&mut self, tile: u32) {
        let state = &mut self.states[tile as usize];
        assert_eq!(
            state.phase,
            Phase::Ready,
            "only an idle tile can be given up"
        );
        state.phase = Phase::Absent;
        state.packed = false;
        self.free.push(state.slot);
    }

    /// Whether a tile lies idle in memory that the plan does not keep and the pass at hand does not need.
    fn is_stale(&self, tile: u32) -> bool {
        let ready = self.states[tile as usize].phase == Phase::Ready;
        ready && !self.residency.keeps(tile) && !self.waits_for(tile)
    }

    /// Drops the idle tile outside the plan whose next use is furthest; false if there is none.
    fn give_up_furthest(&mut self) -> bool {
        let Some(tile) = self.furthest(|tile| self.is_stale(tile)) else {
            return false;
        };
        self.give_up(tile);
        self.restart_ahead();
        true
    }

    /// The tile whose next use is furthest of those that are `idle`.
    fn furthest(&self, idle: impl Fn(u32) -> bool) -> Option<u32> {
        let outside = (0..self.tiles.len() as u32).filter(|&tile| !self.order.contains(tile));
        // Tiles of the current range that were used in this pass are furthest of all, then the order backwards.
        let (len, current) = (self.order.len(), self.current.len() as u32);
        let ring = (1..=len).map(|back| self.order.at((current + len - back) % len));
        outside.chain(ring).find(|&tile| idle(tile))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.save_checksums();
    }
}

/// Uses per sweep of each tile: what the policy goes by, times the rate of sweeps. Of a model that has to stay in memory
/// (`resident`) no tile is worth less than others.
pub fn tile_uses(matrices: &[Matrix], tiles: &[Tile], resident: bool) -> Vec<f32> {
    use crate::format::tile::Use;
    let uses = |tile: &Tile| match matrices[tile.matrix as usize].used {
        _ if resident => 1.0,
        Use::EverySweep => 1.0,
        Use::ByRow => tile.rows as f32 / matrices[tile.matrix as usize].rows as f32 / 2.0,
    };
    tiles.iter().map(uses).collect()
}
