//! The CUDA device: the CPU's ops as kernels on a GPU, on memory where it lies.
//!
//! # Placement
//!
//! Where the GPU shares the processor's DRAM, slots are registered with the driver, and it computes on tiles and pages
//! where reads land (`Direct`); else in slots of its own (`Staged`). On Orin the GPU does not cache registered memory:
//! nothing is lost with weights, which are read once, but much with rows that are read again and again. So buffers lie
//! in memory that is allocated from the driver on either. The processor has addresses for them, and memory for the few
//! that it writes or reads too: embeddings, angles, likely tokens, logits ([`Buffers`]). Tables of launches go to the GPU's
//! memory in batches, with the launches (`batches`). Ops take the processor's pointers and hand the GPU's to the kernels;
//! they differ by a constant in each mapping.
//!
//! # Order and fences
//!
//! Ops return when they are about to be launched. The processor may touch what they use only after [`Cuda::finish`]. Products are
//! different where tiles stream: [`Cuda::matmul`] comes back only when the kernels have read them, so that their slots
//! may be read into again. Tiles that stay are read later, and should the store give one up in the middle of a sweep all
//! the same, it waits ([`Cuda::fence`]). (Slots of the GPU's own are the store's to fence: it sets marks.) `queue` bounds
//! how far ahead the processor runs.
//!
//! # Errors
//!
//! The first error of the driver is kept, later ops do nothing, and `finish` tells of it: so ops have
//! no results to look at, and a sweep fails as a whole.
//!
//! # Agreement
//!
//! Every kernel is the CPU's op bit for bit (`tests/kernels.rs`), except attention over more than 256
//! positions, where several softmaxes are put together in the order of their positions: that rounds
//! otherwise, so a greedy token can differ from the CPU's where two logits are that close. It never
//! depends on the batch or the budget.
#![allow(unsafe_code)]

mod attention;
mod batches;
mod copies;
pub mod driver;
#[cfg(feature = "cuda")]
mod graphs;
mod measure;
mod memory;
#[cfg(feature = "cuda")]
mod nvidia;
mod ops;
mod queue;

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::arena::{PAGE_BYTES, Plain, Reservation, Slots};
use crate::device::cpu::Kinds;
use crate::error::{Error, Result};
use crate::format::quant::QuantType;
use crate::store::{Copies, Fence};
use batches::Batches;
use copies::TileCopies;
use driver::{Args, Driver, Facts, KernelId, Stream};
pub use memory::Buffers;
use memory::{Allocation, Registered, Seen};
use ops::Kernels;
use queue::{Queue, table_bytes};

/// Opens the GPU's driver.
///
/// # Errors
/// This program was built without it, or there is no GPU that can be used; the error says why.
pub fn open() -> Result<Arc<dyn Driver>> {
    #[cfg(feature = "cuda")]
    return Ok(Arc::new(nvidia::Nvidia::open()?));
    #[cfg(not(feature = "cuda"))]
    Err(Error::new(
        crate::error::Kind::Unsupported,
        "this program was built without CUDA",
        "build it with --features cuda, or use --device cpu",
    ))
}

/// What the device's own memory is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sizes {
    /// Rows in a sweep at most.
    pub rows: usize,
    /// The widest row that is quantized.
    pub cols: usize,
    /// What rows are quantized into.
    pub kinds: Kinds,
    /// Query heads of a row.
    pub heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Positions of a session at most.
    pub context: usize,
    /// Sessions in a batch at most.
    pub sessions: usize,
}

/// Rows that a panel of quantized rows has, unless it is a single one.
const PANEL_ROWS: usize = 8;
/// Tiles that one launch takes at most.
const TILES_MAX: usize = 1024;
/// f32s for what the splits of attention find; more rows than fit are taken in turns.
const PARTIAL_VALUES: usize = 1 << 20;
/// Positions in a split (`kernels/attention.h`).
const SPLIT: usize = 256;
/// Positions of a page at least.
const PAGE_POSITIONS_MIN: usize = 16;

/// Slots are registered with the driver in pieces of at most so many bytes. On a Jetson the driver refuses one that is
/// larger than what is free at the moment, even if its pages are there already; and slots whose pages are there leave
/// little free.
pub const PIECE_BYTES_MAX: usize = 64 << 20;

/// The kinds for blocks of 32 and of 256, and the values in a block.
const QUANTIZED: [(Kinds, usize); 2] = [
    (Kinds::of(QuantType::Q4_0), 32),
    (Kinds::of(QuantType::Q4_K), 256),
];

/// Where in the memory for them rows stand that are quantized into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Blocks {
    q: usize,
    scales: usize,
    sums: usize,
    end: usize,
}

impl Blocks {
    /// For rows in blocks of `block` values, from byte `start` on.
    const fn new(start: usize, rows: usize, cols: usize, block: usize) -> Blocks {
        let rows = padded(rows);
        let q = start;
        let scales = q + (2 * rows * cols).next_multiple_of(64);
        let sums = scales + (4 * rows * (cols / block)).next_multiple_of(64);
        let end = sums + (4 * rows * (cols / 32)).next_multiple_of(64);
        Blocks {
            q,
            scales,
            sums,
            end,
        }
    }
}

/// Rows with those that fill the last panel up.
const fn padded(rows: usize) -> usize {
    if rows <= 1 {
        rows
    } else {
        rows.next_multiple_of(PANEL_ROWS)
    }
}

/// What the last quantization made: so many rows, and where each kind stands that was wanted.
#[derive(Debug, Clone, Copy, Default)]
struct Quantized {
    rows: usize,
    cols: usize,
    /// In the order of `QUANTIZED`.
    blocks: [Option<Blocks>; 2],
    /// Rows as they are.
    plain: Option<usize>,
    end: usize,
}

impl Quantized {
    fn new(rows: usize, cols: usize, kinds: Kinds) -> Quantized {
        let mut quantized = Quantized {
            rows,
            cols,
            ..Quantized::default()
        };
        for (i, (kind, block)) in QUANTIZED.into_iter().enumerate() {
            if kinds.contains(kind) {
                let blocks = Blocks::new(quantized.end, rows, cols, block);
                (quantized.blocks[i], quantized.end) = (Some(blocks), blocks.end);
            }
        }
        if kinds.contains(Kinds::F32) {
            quantized.plain = Some(quantized.end);
            quantized.end += (4 * rows * cols).next_multiple_of(64);
        }
        quantized
    }
}

impl Sizes {
    fn quantized_bytes(&self) -> usize {
        Quantized::new(self.rows, self.cols, self.kinds).end
    }

    fn table_bytes(&self) -> usize {
        let pages = attention::page_places(self.context.div_ceil(PAGE_POSITIONS_MIN));
        let pages = self.sessions * pages;
        let attention = table_bytes::<u64>(pages) + attention::row_tables_bytes(self.rows);
        2 * attention
            .max(ops::tile_tables_bytes(TILES_MAX))
            .next_multiple_of(64)
    }

    /// f32s for what the splits of one row find, and for several where there is room.
    fn partial_values(&self) -> usize {
        let splits = self.context.div_ceil(SPLIT) + 1;
        PARTIAL_VALUES.max(self.heads * splits * (self.head_dim + 2))
    }

    /// What is enough for both.
    pub fn max(self, other: Sizes) -> Sizes {
        Sizes {
            rows: self.rows.max(other.rows),
            cols: self.cols.max(other.cols),
            kinds: self.kinds | other.kinds,
            heads: self.heads.max(other.heads),
            head_dim: self.head_dim.max(other.head_dim),
            context: self.context.max(other.context),
            sessions: self.sessions.max(other.sessions),
        }
    }

    /// Where in the device's memory for itself stands what the splits of attention find.
    fn partial_start(&self) -> usize {
        self.quantized_bytes().next_multiple_of(256)
    }

    /// Where in it stand the tables.
    fn tables_start(&self) -> usize {
        (self.partial_start() + 4 * self.partial_values()).next_multiple_of(256)
    }

    /// Bytes that a device takes of the GPU's memory for itself.
    pub fn device_bytes(&self) -> usize {
        allocated(self.tables_start() + self.table_bytes())
    }

    /// Bytes of the processor's memory that it takes.
    pub fn tables_bytes(&self) -> usize {
        self.table_bytes().next_multiple_of(PAGE_BYTES)
    }
}

/// Bytes that the GPU's memory has less for an allocation of `bytes`: it is given out in whole pieces of 2 MiB.
pub const fn allocated(bytes: usize) -> usize {
    bytes.next_multiple_of(2 << 20)
}

/// What the device has for itself.
struct Own {
    sizes: Sizes,
    /// Quantized rows, what the splits of attention find, tables; none until it is taken.
    memory: Option<Allocation>,
    queue: RefCell<Queue>,
}

impl Own {
    fn new(sizes: Sizes) -> Result<Own> {
        let mut tables = Reservation::new(sizes.tables_bytes())?;
        Ok(Own {
            sizes,
            memory: None,
            queue: RefCell::new(Queue::new(tables.carve(sizes.table_bytes())?)),
        })
    }

    /// Where quantized rows stand for kernels.
    fn activations(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.address)
    }

    /// Where tables stand for them.
    fn tables(&self) -> u64 {
        self.activations() + self.sizes.tables_start() as u64
    }

    /// Where for them stands what the splits of attention find.
    fn partial(&self) -> u64 {
        self.activations() + self.sizes.partial_start() as u64
    }
}

/// A GPU that computes in the processor's memory, or in its own.
///
/// One thread at a time gives it work.
pub struct Cuda {
    /// What gives launches to the driver, and the same as a driver.
    batches: Arc<Batches>,
    driver: Arc<dyn Driver>,
    kernels: Kernels,
    /// All that kernels may work on, in the order of addresses here.
    seen: Vec<Seen>,
    /// Slots that tiles are copied from, if kernels do not work there.
    pinned: Vec<Registered>,
    own: Own,
    quantized: Cell<Quantized>,
    failed: RefCell<Option<Error>>,
}

// SAFETY: the pointers are addresses to compare others with, and to unregister.
unsafe impl Send for Cuda {}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda")
            .field("facts", self.facts())
            .finish_non_exhaustive()
    }
}

impl Cuda {
    /// A device that sees no memory but its own yet. Everything is loaded and has run once when this returns.
    ///
    /// # Errors
    /// The driver refuses memory or kernels.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Cuda> {
        let kernels = Kernels::load(driver.as_ref())?;
        let batches = Arc::new(Batches::new(driver));
        let mut cuda = Cuda {
            driver: Arc::clone(&batches) as Arc<dyn Driver>,
            batches,
            kernels,
            seen: Vec::new(),
            pinned: Vec::new(),
            own: Own::new(Sizes::default())?,
            quantized: Cell::default(),
            failed: RefCell::default(),
        };
        // SAFETY: no memory but the device's own.
        unsafe { cuda.fit(Sizes::default(), Vec::new(), Vec::new()) };
        // The first launch of all sets things up in the driver.
        cuda.read(16);
        cuda.finish(&mut || ())?;
        Ok(cuda)
    }

    /// Whether tiles and pages are copied into memory of its own.
    pub fn is_staged(&self) -> bool {
        !self.facts().integrated
    }

    /// Takes slots for tiles and pages in the GPU's own memory, and what the store copies tiles there with.
    ///
    /// # Errors
    /// There is not so much of it.
    pub fn take_slots(
        &mut self,
        slot_bytes: usize,
        count: u32,
    ) -> Result<(Slots, Box<dyn Copies>)> {
        let bytes = slot_bytes * count as usize;
        let memory = Allocation::new(&self.driver, bytes)?;
        self.see(Seen::own(&memory, bytes));
        // SAFETY: the allocation is theirs alone, and lives as long as the slots.
        let slots = unsafe { Slots::of(memory.base(), slot_bytes, count, Arc::new(memory)) };
        Ok((slots, Box::new(TileCopies::new(&self.driver))))
    }

    /// Waits for all that the device was given to do, for a store in whose slots it computes.
    pub fn fence(&self) -> Fence {
        let driver = Arc::clone(&self.driver);
        Box::new(move || queue::finish(driver.as_ref(), Stream::Compute))
    }

    /// Makes the device's memory for itself large enough for `sizes`, and has it see `buffers` and the slots that reads
    /// land in, and nothing else that is the processor's. An error is told by the next [`finish`](Self::finish).
    /// Allocates.
    ///
    /// # Safety
    /// The memory stays mapped until the device is dropped or told of other memory; so does, until this returns, what
    /// it was told of before. Pages that were given back to the system since are in no range that is told again.
    pub unsafe fn fit(
        &mut self,
        sizes: Sizes,
        buffers: Vec<Buffers>,
        slots: Vec<(NonNull<u8>, usize)>,
    ) {
        // Nothing runs while memory comes and goes.
        self.attempt(|| queue::finish(self.driver.as_ref(), Stream::Tiles));
        if self.finish(&mut || ()).is_err() {
            return;
        }
        let grown = match sizes == self.own.sizes {
            true => Ok(None),
            false => Own::new(sizes).map(Some),
        };
        let before = match grown {
            Ok(grown) => grown.map(|own| std::mem::replace(&mut self.own, own)),
            Err(error) => return self.attempt(|| Err(error)),
        };
        let tables = self.own.queue.get_mut().memory();
        let stays = |memory: (NonNull<u8>, usize)| {
            let of_buffers = |b: &Buffers| (b.base, b.bytes) == memory;
            memory == tables || slots.contains(&memory) || buffers.iter().any(of_buffers)
        };
        self.seen.retain(|s| s.is_own() || stays((s.base, s.bytes)));
        self.pinned.retain(|r| stays((r.base, r.bytes)));
        drop(before);
        // SAFETY: the caller vouches for it; the tables are the device's own.
        let shown = unsafe { self.show(tables, &buffers, &slots) };
        self.attempt(|| shown);
    }

    /// Takes the memory that is lacking, and sees what is not seen yet.
    ///
    /// # Safety
    /// As of [`fit`](Self::fit).
    unsafe fn show(
        &mut self,
        tables: (NonNull<u8>, usize),
        buffers: &[Buffers],
        slots: &[(NonNull<u8>, usize)],
    ) -> Result<()> {
        if self.own.memory.is_none() {
            let bytes = self.own.sizes.device_bytes();
            self.own.memory = Some(Allocation::new(&self.driver, bytes)?);
        }
        for buffers in buffers {
            if !self.sees(buffers.base) {
                // SAFETY: the caller vouches for it.
                self.see(unsafe { Seen::image(&self.driver, buffers)? });
            }
        }
        for &(base, bytes) in slots.iter().chain([&tables]) {
            if self.sees(base) || self.pinned.iter().any(|r| r.base == base) {
                continue;
            }
            // SAFETY: the caller vouches for it.
            let registered = unsafe { Registered::new(&self.driver, (base, bytes))? };
            match self.is_staged() && base != tables.0 {
                true => self.pinned.push(registered),
                false if base == tables.0 => {
                    self.see(Seen::copied(registered, self.own.tables()));
                }
                false => self.see(Seen::shared(registered)),
            }
        }
        Ok(())
    }

    /// Whether kernels see the memory that begins here.
    fn sees(&self, base: NonNull<u8>) -> bool {
        self.seen.iter().any(|seen| seen.base == base)
    }

    fn see(&mut self, memory: Seen) {
        let place = self.seen.partition_point(|seen| seen.base < memory.base);
        self.seen.insert(place, memory);
    }

    /// What is known of the GPU.
    pub fn facts(&self) -> &Facts {
        self.driver.facts()
    }

    /// Waits until everything is done that was asked for; `poll` is called meanwhile.
    ///
    /// # Errors
    /// Something failed; the device does nothing any more.
    pub fn finish(&self, poll: &mut dyn FnMut()) -> Result<()> {
        self.attempt(|| {
            self.own
                .queue
                .borrow_mut()
                .finish(self.driver.as_ref(), poll)
        });
        self.failure().map_or(Ok(()), Err)
    }

    /// Why the device does nothing any more; none while it works.
    pub fn failure(&self) -> Option<Error> {
        self.failed.borrow().clone()
    }

    /// Has what the processor has written there be what ops see of it.
    pub fn upload<T: Plain>(&self, written: &[T]) {
        self.transfer(written, |image, here| (image, here));
    }

    /// Has what ops have made of it be there for the processor, after [`finish`](Self::finish).
    pub fn download<T: Plain>(&self, wanted: &mut [T]) {
        self.transfer(wanted, |image, here| (here, image));
    }

    /// Copies between the front of buffers and the GPU's memory.
    fn transfer<T: Plain>(&self, memory: &[T], to_from: impl Fn(u64, u64) -> (u64, u64)) {
        if memory.is_empty() {
            return;
        }
        let here = memory.as_ptr().expose_provenance() as u64;
        let (to, from) = to_from(self.at(memory.as_ptr()), here);
        self.attempt(|| {
            // SAFETY: both are as large; the front is registered, and nobody touches it until the device is finished.
            unsafe {
                self.driver
                    .copy(Stream::Compute, to, from, size_of_val(memory))
            }
        });
    }

    /// Copies a KV page, between sweeps.
    ///
    /// # Safety
    /// Both are pages of `bytes`, of which nobody writes the one or uses the other.
    pub unsafe fn copy_page(&self, from: *const u8, to: *mut u8, bytes: usize) {
        let (from, to) = (self.at(from), self.at(to.cast_const()));
        self.attempt(|| {
            self.own.queue.borrow_mut().begin(self.driver.as_ref(), 0)?;
            // SAFETY: the caller vouches for both.
            unsafe { self.driver.copy(Stream::Compute, to, from, bytes) }
        });
        // An error is told again by the next sweep.
        self.finish(&mut || ()).unwrap_or_default();
    }

    /// Does something with the driver, unless it has failed before.
    fn attempt(&self, work: impl FnOnce() -> Result<()>) {
        if self.failed.borrow().is_some() {
            return;
        }
        if let Err(error) = work() {
            *self.failed.borrow_mut() = Some(error);
        }
    }

    /// The GPU's address of something that it sees.
    fn at<T>(&self, place: *const T) -> u64 {
        let before = self
            .seen
            .partition_point(|seen| seen.base.addr().get() <= place.addr());
        let seen = before.checked_sub(1).map(|last| &self.seen[last]);
        let seen = seen.expect("memory that the GPU sees");
        let offset = place.addr() - seen.base.addr().get();
        assert!(offset < seen.bytes, "memory that the GPU sees");
        seen.address + offset as u64
    }

    /// Launches a kernel of the op that was begun.
    fn launch(&self, kernel: KernelId, grid: [usize; 3], threads: u32, args: Args) -> Result<()> {
        let grid = grid.map(|n| u32::try_from(n).expect("a grid of a sweep"));
        let new = self.own.queue.borrow_mut().new_tables();
        if let Some(new) = new {
            let here = self.own.queue.borrow().memory().0.as_ptr();
            let (to, from) = (self.own.tables(), here.expose_provenance() as u64);
            let start = new.start as u64;
            // SAFETY: as many bytes of either, and the queue sees to it that tables stay until they were read.
            unsafe { self.batches.stage(to + start, from + start, new.len())? };
        }
        // SAFETY: each op gives its kernel what it takes, within the arena; the caller of the op vouches for the rest.
        unsafe { self.driver.launch(kernel, grid, threads, &args) }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        self.attempt(|| queue::finish(self.driver.as_ref(), Stream::Tiles));
        if let Err(error) = self.finish(&mut || ()) {
            log::debug!("closing the device: {error}");
        }
        // Registered and allocated memory goes with the fields, and nothing is running.
    }
}
