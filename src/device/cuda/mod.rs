//! The CUDA device: the CPU's ops as kernels on a GPU, on memory where it lies.
//!
//! # Placement
//!
//! Slots and buffers are registered with the driver, so the GPU computes on tiles where reads land and
//! on the buffers that the processor sees too (`Direct`). On a Jetson that is the same DRAM. Ops take the
//! processor's pointers and hand the GPU's to the kernels; they differ by a constant in each mapping.
//!
//! # Order and fences
//!
//! Ops return when they are launched. The processor may touch what they use only after
//! [`Cuda::finish`]. Products are different where tiles stream: [`Cuda::matmul`] comes back only when the
//! kernels have read them, so that their slots may be read into again. Tiles that stay are read later, and the store
//! waits ([`Cuda::fence`]) should it give one up in the middle of a sweep all the same. (Slots of the GPU's own are the store's to
//! fence: it sets marks.) `queue` bounds how far ahead the processor runs.
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
mod copies;
pub mod driver;
mod measure;
mod memory;
#[cfg(feature = "cuda")]
mod nvidia;
mod ops;
mod queue;

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::arena::{PAGE_BYTES, Plain, Reservation, Slots, Span};
use crate::device::cpu::Kinds;
use crate::error::{Error, Result};
use crate::format::quant::QuantType;
use crate::store::{Copies, Fence};
use copies::TileCopies;
use driver::{Args, Driver, Facts, KernelId, Stream};
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
/// Positions in a split (`kernels/attend.cu`).
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

    fn tables_bytes(&self) -> usize {
        let pages = self.sessions * self.context.div_ceil(PAGE_POSITIONS_MIN);
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

    /// Bytes of a device's own memory.
    pub fn bytes(&self) -> usize {
        Reservation::carved_size::<u8>(self.quantized_bytes())
            + Reservation::carved_size::<u8>(self.tables_bytes())
            + Reservation::carved_size::<f32>(self.partial_values()).next_multiple_of(PAGE_BYTES)
    }
}

/// What the device has for itself.
struct Own {
    sizes: Sizes,
    /// Quantized rows.
    activations: Span<u8>,
    /// What the splits of attention find.
    partial: Span<f32>,
    queue: RefCell<Queue>,
}

impl Own {
    fn new(sizes: Sizes) -> Result<Own> {
        let mut memory = Reservation::new(sizes.bytes())?;
        Ok(Own {
            sizes,
            activations: memory.carve(sizes.quantized_bytes())?,
            queue: RefCell::new(Queue::new(memory.carve(sizes.tables_bytes())?)),
            partial: memory.carve(sizes.partial_values())?,
        })
    }
}

/// A GPU that computes in the processor's memory, or in its own.
///
/// One thread at a time gives it work.
pub struct Cuda {
    driver: Arc<dyn Driver>,
    kernels: Kernels,
    /// All that kernels may work on, in the order of addresses here.
    seen: Vec<Seen>,
    /// Memory of the processor's that the driver knows.
    registered: Vec<Registered>,
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
        let mut cuda = Cuda {
            driver,
            kernels,
            seen: Vec::new(),
            registered: Vec::new(),
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

    /// Makes the device's own memory large enough for `sizes`, and has it see `buffers` and the slots that reads land
    /// in, and nothing else of the processor's memory. An error is told by the next [`finish`](Self::finish). Allocates.
    ///
    /// # Safety
    /// The memory stays mapped until the device is dropped or told of other memory; so does, until this returns, what
    /// it was told of before. Pages that were given back to the system since are in no range that is told again.
    pub unsafe fn fit(
        &mut self,
        sizes: Sizes,
        mut buffers: Vec<(NonNull<u8>, usize)>,
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
        buffers.push(self.own.partial.mapping());
        let of_processor =
            |base, bytes, list: &[(NonNull<u8>, usize)]| list.contains(&(base, bytes));
        let gone = |r: &Registered| {
            !of_processor(r.base, r.bytes, &buffers) && !of_processor(r.base, r.bytes, &slots)
        };
        let goes: Vec<Registered> = self.registered.extract_if(.., |r| gone(r)).collect();
        let of_gone = |seen: &Seen| goes.iter().any(|r| r.base == seen.base);
        self.seen.retain(|seen| !of_gone(seen));
        drop(goes);
        drop(before);
        // SAFETY: the caller vouches for it.
        let shown = unsafe {
            self.show(&buffers, true)
                .and(self.show(&slots, !self.is_staged()))
        };
        self.attempt(|| shown);
    }

    /// Registers memory that is not yet, and has kernels see it if they are to.
    ///
    /// # Safety
    /// As of [`fit`](Self::fit).
    unsafe fn show(&mut self, memory: &[(NonNull<u8>, usize)], to_kernels: bool) -> Result<()> {
        for &(base, bytes) in memory {
            if self
                .registered
                .iter()
                .any(|r| (r.base, r.bytes) == (base, bytes))
            {
                continue;
            }
            // SAFETY: the caller vouches for it.
            let registered = unsafe { Registered::new(&self.driver, (base, bytes))? };
            if to_kernels {
                self.see(match self.is_staged() {
                    true => Seen::image(&registered)?,
                    false => Seen::shared(&registered),
                });
            }
            self.registered.push(registered);
        }
        Ok(())
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

    /// Copies between memory of the processor's and its image, if it has one.
    fn transfer<T: Plain>(&self, memory: &[T], to_from: impl Fn(u64, u64) -> (u64, u64)) {
        if !self.is_staged() || memory.is_empty() {
            return;
        }
        let here = memory.as_ptr().expose_provenance() as u64;
        let (to, from) = to_from(self.at(memory.as_ptr()), here);
        self.attempt(|| {
            // SAFETY: both are as large; the memory is registered, and nobody touches it until the device is finished.
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
        if self.is_staged() {
            self.send_tables()?;
        }
        let grid = grid.map(|n| u32::try_from(n).expect("a grid of a sweep"));
        // SAFETY: each op gives its kernel what it takes, within the arena; the caller of the op vouches for the rest.
        unsafe { self.driver.launch(kernel, grid, threads, &args) }
    }

    /// Copies the tables of the op that was begun to their image.
    fn send_tables(&self) -> Result<()> {
        let mut queue = self.own.queue.borrow_mut();
        let tables = queue.written();
        if tables.is_empty() {
            return Ok(());
        }
        let here = tables.as_ptr().expose_provenance() as u64;
        let image = self.at(tables.as_ptr());
        // SAFETY: as large; the queue writes there again only after the op is done.
        unsafe { self.driver.copy(Stream::Compute, image, here, tables.len()) }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        self.attempt(|| queue::finish(self.driver.as_ref(), Stream::Tiles));
        if let Err(error) = self.finish(&mut || ()) {
            log::debug!("closing the device: {error}");
        }
        // Registered memory and images go with the fields, and nothing is running.
    }
}
