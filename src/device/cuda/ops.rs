//! The ops as launches: grids, arguments and tables. The kernels (`kernels/`) say what they compute.
#![allow(unsafe_code)]

use super::driver::{Arg, Args, Driver, KernelId, MATMUL_SHARED_BYTES, Stream};
use super::queue::table_bytes;
use super::{Cuda, PANEL_ROWS, QUANTIZED, Quantized, TILES_MAX, padded};
use crate::device::cpu::{Activation, Added, Inspect, Kinds, Residual, TileView};
use crate::device::{LIKELIEST, Likely};
use crate::error::{Error, Kind, Result};
use crate::format::quant::QuantType;
use crate::format::tile::STRIP_ROWS;

/// Rows of a batch that a warp of `floats` takes, and how many of them a block has.
const FLOATS_ROWS: usize = 8;
const FLOATS_WARPS_MAX: usize = 8;
/// Rows of weights that a block of `matmul` takes, and rows of a batch; where blocks of values are of 256, a pair of warps
/// takes these rows of a batch, and a block has so many pairs.
const MATMUL_ROWS: usize = 128;
const MATMUL_BATCH: usize = 128;
const MATMUL_256_BATCH: usize = 64;
const MATMUL_256_PAIRS_MAX: usize = 4;
/// Groups that the tokens of a row are dealt out to (`kernels/top_k.cu`), and how many of them a block leads.
const GROUPS: usize = 2048;
const LEADERS: usize = 64;

/// `Tile` of `weights.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tile {
    data: u64,
    out: u64,
    rows: u32,
    stride: u32,
    first: u32,
}

/// `Activations` of `activations.h`, and `QuantizedBlocks` of `quantize.h`: addresses.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Blocks {
    q: u64,
    scales: u64,
    sums: u64,
}
// SAFETY: three pointers.
unsafe impl Arg for Blocks {}

/// `QuantizedRows` of `quantize.h`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct QuantizedRows {
    blocks: [Blocks; 2],
    plain: u64,
    pub(super) rows: u32,
    pub(super) first: u32,
    pub(super) cols: u32,
    panel: u32,
}
// SAFETY: as there, without padding.
unsafe impl Arg for QuantizedRows {}

/// Columns of a row that two warps quantize at a time, and what their number is a multiple of.
const QUANTIZED_COLS: usize = 256;
const COLS_STEP: usize = 4;
/// Such pairs of warps that a block norms a row with at most. A thread keeps what two of them take in registers; where
/// rows are many, smaller blocks that read more again are sooner done with all.
const NORM_PAIRS_MAX: usize = 16;
const NORM_KEPT: usize = 2;
const NORM_MANY_ROWS: usize = 256;
/// Such pairs that quantize parts of several rows, as a block.
const PART_PAIRS: usize = 2;

/// Bytes of the table of `tiles` tiles.
pub(super) const fn tile_tables_bytes(tiles: usize) -> usize {
    table_bytes::<Tile>(tiles)
}

/// Every kernel that is launched.
pub(super) struct Kernels {
    /// For each type: for one row, for a panel, and for more (the same for floats).
    products: [[KernelId; 3]; QuantType::ALL.len()],
    /// For each type.
    embed: [KernelId; QuantType::ALL.len()],
    norm_quantize: KernelId,
    silu_quantize: KernelId,
    gelu_tanh_quantize: KernelId,
    scale: KernelId,
    softcap: KernelId,
    leaders: KernelId,
    top_k: KernelId,
    pub(super) place_heads: KernelId,
    pub(super) attend: KernelId,
    pub(super) join_quantize: KernelId,
    pub(super) read: KernelId,
}

impl Kernels {
    pub(super) fn load(driver: &dyn Driver) -> Result<Kernels> {
        let kernel = |name: &str| driver.kernel(name);
        let mut products = [[KernelId(0); 3]; QuantType::ALL.len()];
        let mut embed = [KernelId(0); QuantType::ALL.len()];
        for qtype in QuantType::ALL {
            let name = qtype.name().to_lowercase();
            embed[qtype as usize] = kernel(&format!("embed_{name}"))?;
            products[qtype as usize] = match Kinds::of(qtype) {
                Kinds::F32 => [kernel(&format!("floats_{name}"))?; 3],
                _ => [
                    kernel(&format!("matvec_{name}"))?,
                    kernel(&format!("matpanel_{name}"))?,
                    kernel(&format!("matmul_{name}"))?,
                ],
            };
        }
        Ok(Kernels {
            products,
            embed,
            norm_quantize: kernel("norm_quantize")?,
            silu_quantize: kernel("silu_quantize")?,
            gelu_tanh_quantize: kernel("gelu_tanh_quantize")?,
            scale: kernel("scale")?,
            softcap: kernel("softcap")?,
            leaders: kernel("leaders")?,
            top_k: kernel("top_k")?,
            place_heads: kernel("place_heads")?,
            attend: kernel("attend")?,
            join_quantize: kernel("join_quantize")?,
            read: kernel("read_memory")?,
        })
    }
}

/// The grid and the threads of a block for a kernel that quantizes rows in parts. One row has few parts, which go to as
/// many blocks.
pub(super) fn parts_of_rows(rows: usize, cols: usize) -> ([usize; 3], u32) {
    let pairs = if rows == 1 { 1 } else { PART_PAIRS };
    let grid = [cols.div_ceil(QUANTIZED_COLS * pairs), rows, 1];
    (grid, 64 * pairs as u32)
}

impl Cuda {
    /// An op without tables.
    pub(super) fn op(&self, kernel: KernelId, grid: [usize; 3], threads: u32, args: Args) {
        self.attempt(|| {
            self.own.queue.borrow_mut().begin(self.driver.as_ref(), 0)?;
            self.launch(kernel, grid, threads, args)
        });
    }

    /// An op on single values.
    fn each(&self, kernel: KernelId, n: usize, args: Args) {
        self.op(kernel, [n.div_ceil(256), 1, 1], 256, args);
    }

    /// `to = from`.
    pub fn copy(&self, from: &[f32], to: &mut [f32]) {
        assert_eq!(from.len(), to.len());
        let (from, to, bytes) = (self.at(from.as_ptr()), self.at(to.as_ptr()), 4 * to.len());
        self.attempt(|| {
            self.own.queue.borrow_mut().begin(self.driver.as_ref(), 0)?;
            // SAFETY: both are memory that the GPU sees, and slices do not overlap.
            unsafe { self.driver.copy(Stream::Compute, to, from, bytes) }
        });
    }

    /// See [`Device::embed`](crate::device::Device::embed).
    ///
    /// # Safety
    /// As there.
    pub unsafe fn embed(&self, rows: &[*const u8], qtype: QuantType, out: &mut [f32]) {
        if rows.iter().all(|row| row.is_null()) {
            return;
        }
        let cols = out.len() / rows.len();
        let address = |&row: &*const u8| if row.is_null() { 0 } else { self.at(row) };
        self.attempt(|| {
            let table = {
                let mut queue = self.own.queue.borrow_mut();
                queue.begin(self.driver.as_ref(), table_bytes::<u64>(rows.len()))?;
                self.at(queue.put(rows.iter().map(address)))
            };
            let args = Args::new()
                .with(table)
                .with(cols as u32)
                .with(self.at(out.as_ptr()));
            let grid = [cols.div_ceil(32 * 64), rows.len(), 1];
            self.launch(self.kernels.embed[qtype as usize], grid, 64, args)
        });
    }

    /// Where the blocks stand that were, or are about to be, quantized.
    fn blocks(&self, blocks: super::Blocks) -> Blocks {
        let memory = self.own.activations();
        Blocks {
            q: memory + blocks.q as u64,
            scales: memory + blocks.scales as u64,
            sums: memory + blocks.sums as u64,
        }
    }

    /// Memory for rows that an op quantizes, which the next products take.
    pub(super) fn room_for(&self, (rows, cols): (usize, usize), kinds: Kinds) -> QuantizedRows {
        if !cols.is_multiple_of(COLS_STEP) {
            self.attempt(|| {
                Err(Error::new(
                    Kind::Unsupported,
                    format!("rows of {cols} values on a GPU"),
                    "use --device cpu",
                ))
            });
        }
        let quantized = Quantized::new(rows, cols, kinds);
        assert!(
            quantized.end <= self.own.sizes.quantized_bytes(),
            "more rows than there is memory for"
        );
        self.quantized.set(quantized);
        let of = |blocks: Option<_>| blocks.map_or(Blocks::default(), |b| self.blocks(b));
        QuantizedRows {
            blocks: quantized.blocks.map(of),
            plain: self.plain(quantized).unwrap_or(0),
            rows: rows as u32,
            first: 0,
            cols: cols as u32,
            panel: if rows == 1 { 1 } else { PANEL_ROWS as u32 },
        }
    }

    /// Where the rows stand as they are, if they do.
    fn plain(&self, quantized: Quantized) -> Option<u64> {
        quantized.plain.map(|at| self.own.activations() + at as u64)
    }

    /// See [`Cpu::norm_quantize`](crate::device::cpu::Cpu::norm_quantize).
    pub fn norm_quantize(&self, residual: Residual<'_>, kinds: Kinds) {
        let (rows, dim) = residual.shape();
        let (y, y_weight) = match residual.added {
            None => (0, 0),
            Some(Added { y, weight }) => (
                self.at(y.as_ptr()),
                weight.map_or(0, |weight| self.at(weight.as_ptr())),
            ),
        };
        let args = Args::new()
            .with(self.at(residual.x.as_ptr()))
            .with(y)
            .with(y_weight)
            .with(self.at(residual.weight.as_ptr()))
            .with(residual.eps)
            .with(self.room_for((rows, dim), kinds));
        let kept = match rows < NORM_MANY_ROWS {
            true => NORM_KEPT,
            false => 2 * NORM_KEPT,
        };
        let pairs = dim.div_ceil(kept * QUANTIZED_COLS).clamp(1, NORM_PAIRS_MAX);
        let grid = [padded(rows), 1, 1];
        self.op(self.kernels.norm_quantize, grid, 64 * pairs as u32, args);
    }

    /// See [`Cpu::gate_quantize`](crate::device::cpu::Cpu::gate_quantize).
    pub fn gate_quantize(
        &self,
        activation: Activation,
        (gate, up): (&[f32], &[f32]),
        cols: usize,
        kinds: Kinds,
    ) {
        assert!(gate.len() == up.len() && gate.len().is_multiple_of(cols));
        let rows = gate.len() / cols;
        let args = Args::new()
            .with(self.at(gate.as_ptr()))
            .with(self.at(up.as_ptr()))
            .with(self.room_for((rows, cols), kinds));
        let kernel = match activation {
            Activation::Silu => self.kernels.silu_quantize,
            Activation::GeluTanh => self.kernels.gelu_tanh_quantize,
        };
        let (grid, threads) = parts_of_rows(padded(rows), cols);
        self.op(kernel, grid, threads, args);
    }

    /// See [`Cpu::matmul`](crate::device::cpu::Cpu::matmul), with the rows that were quantized last. Tiles are never
    /// packed: `packed` says that they were inspected. Comes back at once if all tiles stay and were inspected before,
    /// else when they are done with, calling `poll` meanwhile.
    ///
    /// # Safety
    /// Tiles' data and outputs are valid, disjoint, and used by nobody else until they are done with.
    pub unsafe fn matmul(&self, tiles: &[TileView], inspect: &Inspect<'_>, poll: &mut dyn FnMut()) {
        poll();
        self.attempt(|| {
            let mut queue = self.own.queue.borrow_mut();
            queue.make_room(self.driver.as_ref(), poll)
        });
        for tile in tiles.iter().filter(|tile| !tile.packed) {
            let row_bytes = tile.qtype.row_bytes(tile.cols);
            for (strip, first) in (0..tile.rows).step_by(STRIP_ROWS).enumerate() {
                let rows = STRIP_ROWS.min(tile.rows - first);
                // SAFETY: the strip is within the tile, which nobody writes.
                let bytes = unsafe {
                    let data = tile.data.add(first * row_bytes).cast_const();
                    std::slice::from_raw_parts(data, rows * row_bytes)
                };
                inspect(tile.id, strip, bytes);
            }
        }
        for qtype in QuantType::ALL {
            let mut rest = tiles;
            while let Some(first) = rest.iter().position(|tile| tile.qtype == qtype) {
                let end = (first + TILES_MAX).min(rest.len());
                self.attempt(|| self.multiply(qtype, &rest[first..end]));
                rest = &rest[end..];
            }
        }
        // A tile that was inspected just now may not agree with its checksum, and is read again then.
        if tiles.iter().any(|tile| !tile.keep || !tile.packed) {
            self.attempt(|| {
                self.own
                    .queue
                    .borrow_mut()
                    .finish(self.driver.as_ref(), poll)
            });
        }
        poll();
    }

    /// Multiplies with those of `tiles` that are of `qtype`: at most `TILES_MAX`.
    fn multiply(&self, qtype: QuantType, tiles: &[TileView]) -> Result<()> {
        let x = self.quantized.get();
        let of_type = || tiles.iter().filter(|tile| tile.qtype == qtype);
        let (count, rows_max) = of_type().fold((0, 0), |(n, max), t| (n + 1, t.rows.max(max)));
        assert!(
            of_type().all(|tile| tile.cols == x.cols),
            "a tile and the rows differ in width"
        );
        let table = {
            let mut queue = self.own.queue.borrow_mut();
            queue.begin(self.driver.as_ref(), tile_tables_bytes(count))?;
            let (mut of_type, mut first) = (of_type(), 0);
            let entry = |_| {
                let tile = of_type.next().expect("counted");
                let entry = Tile {
                    data: self.at(tile.data),
                    out: self.at(tile.out),
                    rows: tile.rows as u32,
                    stride: tile.out_stride as u32,
                    first,
                };
                first += entry.rows;
                entry
            };
            self.at(queue.put((0..count).map(entry)))
        };
        let args = Args::new().with(table).with(x.cols as u32);
        let kernels = self.kernels.products[qtype as usize];
        let kind = Kinds::of(qtype);
        const UNFIT: &str = "the rows were quantized for this weight type";
        if kind == Kinds::F32 {
            let plain = self.plain(x).expect(UNFIT);
            let warps = x.rows.div_ceil(FLOATS_ROWS).min(FLOATS_WARPS_MAX);
            let grid = [
                rows_max.div_ceil(32),
                count,
                x.rows.div_ceil(FLOATS_ROWS * warps),
            ];
            return self.launch(
                kernels[0],
                grid,
                32 * warps as u32,
                args.with(plain).with(x.rows as u32),
            );
        }
        let place = QUANTIZED.iter().position(|&(of, _)| of == kind);
        let blocks = place.and_then(|i| x.blocks[i]).expect(UNFIT);
        let args = args.with(self.blocks(blocks));
        if x.rows == 1 {
            return self.launch(kernels[0], [rows_max.div_ceil(8), count, 1], 128, args);
        }
        let args = args.with(x.rows as u32);
        let strips = rows_max.div_ceil(64);
        if x.rows <= PANEL_ROWS {
            return self.launch(kernels[1], [rows_max.div_ceil(32), count, 1], 128, args);
        }
        if kind == Kinds::BLOCKS_32 {
            let rows: usize = of_type().map(|tile| tile.rows).sum();
            let grid = [rows.div_ceil(MATMUL_ROWS), 1, x.rows.div_ceil(MATMUL_BATCH)];
            let args = args.with(count as u32).with_shared(MATMUL_SHARED_BYTES);
            return self.launch(kernels[2], grid, 256, args);
        }
        let pairs = x.rows.div_ceil(MATMUL_256_BATCH).min(MATMUL_256_PAIRS_MAX);
        let batches = x.rows.div_ceil(MATMUL_256_BATCH * MATMUL_256_PAIRS_MAX);
        self.launch(
            kernels[2],
            [strips, count, batches],
            64 * pairs as u32,
            args,
        )
    }

    /// `x *= factor`.
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        let args = Args::new().with(self.at(x.as_ptr())).with(x.len() as u64);
        self.each(self.kernels.scale, x.len(), args.with(factor));
    }

    /// `x = cap * tanh(x / cap)`.
    pub fn softcap(&self, x: &mut [f32], cap: f32) {
        let args = Args::new().with(self.at(x.as_ptr())).with(x.len() as u64);
        self.each(self.kernels.softcap, x.len(), args.with(cap));
    }

    /// See [`Device::likeliest`](crate::device::Device::likeliest).
    pub fn likeliest(&self, logits: &[f32], vocab: usize, out: &mut [Likely]) {
        assert_eq!(logits.len() / vocab * LIKELIEST, out.len());
        // What the splits of attention have found is of no use any more.
        let leaders = self.own.partial();
        let at_once = 4 * self.own.sizes.partial_values() / (GROUPS * size_of::<u64>());
        let rows_of_both = logits
            .chunks(at_once * vocab)
            .zip(out.chunks(at_once * LIKELIEST));
        for (logits, out) in rows_of_both {
            let rows = logits.len() / vocab;
            let args = Args::new()
                .with(self.at(logits.as_ptr()))
                .with(vocab as u32)
                .with(leaders);
            let grid = [GROUPS / LEADERS, rows, 1];
            self.op(self.kernels.leaders, grid, LEADERS as u32, args.clone());
            let threads = GROUPS / LIKELIEST * 32;
            let args = args.with(self.at(out.as_ptr()));
            self.op(self.kernels.top_k, [1, rows, 1], threads as u32, args);
        }
    }
}
