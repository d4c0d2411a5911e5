//! Multiplying rows of activations with tiles: which thread does what, in which order.
#![allow(unsafe_code)]

use super::Cpu;
use super::activations::{Activations, Kinds, PANEL_ROWS, panels};
use super::kernels::Kernels;
use super::pack::STRIP_ROWS;
use crate::error::{Error, Kind, Result};
use crate::format::quant::QuantType;

/// A tile to multiply with: a run of whole rows of a weight matrix.
///
/// Tiles of a matrix start at a multiple of 16 rows and hold a multiple of 16
/// rows, except at the matrix's end.
#[derive(Debug, Clone, Copy)]
pub struct TileView {
    /// The caller's number for it.
    pub id: u32,
    /// The first row's first byte. Any alignment.
    pub data: *mut u8,
    /// How the weights are stored.
    pub qtype: QuantType,
    /// Values per row.
    pub cols: usize,
    /// Rows in the tile.
    pub rows: usize,
    /// The tile has been packed by an earlier `matmul` with `keep`.
    pub packed: bool,
    /// The tile stays in its slot: pack it there, unless it is packed already. The caller then
    /// marks the tile as packed. Its whole strips are no longer in GGUF layout (`unpack_row`);
    /// a last strip of fewer than 16 rows stays as it is.
    pub keep: bool,
    /// The first output: batch row 0, tile row 0.
    pub out: *mut f32,
    /// f32s from one batch row's output to the next one's.
    pub out_stride: usize,
}

/// Looks at a strip (tile's id, strip's number in it, its bytes) as the file has it, before it is packed; called by
/// whichever worker is about to use it, so the bytes are in its cache anyway.
pub type Inspect<'a> = dyn Fn(u32, usize, &[u8]) + Sync + 'a;

impl TileView {
    fn strips(&self) -> usize {
        self.rows.div_ceil(STRIP_ROWS)
    }

    fn row_bytes(&self) -> usize {
        self.qtype.row_bytes(self.cols)
    }
}

/// A pointer that the caller of an op lets all workers use, each on its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub T);

// SAFETY: ops hand out disjoint parts to the workers.
unsafe impl<T> Sync for Shared<T> {}

/// One strip of scratch for each worker.
pub(super) struct Scratch {
    base: *mut u8,
    layout: std::alloc::Layout,
    strip_bytes: usize,
}

// SAFETY: the memory is owned; each worker uses its own part.
unsafe impl Send for Scratch {}

impl Scratch {
    /// Bytes of one worker's part, in whole pages so that workers share no cache line.
    const fn strip_bytes(row_bytes_max: usize) -> usize {
        (STRIP_ROWS * row_bytes_max).next_multiple_of(4096)
    }

    pub(super) const fn bytes(threads: usize, row_bytes_max: usize) -> usize {
        threads * Scratch::strip_bytes(row_bytes_max)
    }

    pub(super) fn new(threads: usize, row_bytes_max: usize) -> Scratch {
        let strip_bytes = Scratch::strip_bytes(row_bytes_max.max(1));
        let layout = std::alloc::Layout::from_size_align(threads * strip_bytes, 4096)
            .expect("some rows of weights are less than all memory");
        // SAFETY: the size is not zero.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        if base.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Scratch {
            base,
            layout,
            strip_bytes,
        }
    }

    /// Worker's own part, which holds a strip of `bytes`.
    fn of(&self, worker: usize, bytes: usize) -> *mut u8 {
        assert!(
            bytes <= self.strip_bytes,
            "a strip of {bytes} bytes does not fit scratch of {}",
            self.strip_bytes
        );
        // SAFETY: there are as many parts as workers.
        unsafe { self.base.add(worker * self.strip_bytes) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.base, self.layout) }
    }
}

/// Bytes of weights in a unit of work, so that taking one costs little beside it.
const UNIT_BYTES: usize = 32 << 10;
/// The same for more than one panel of rows, of weights in `CHUNK_COLS` columns: what stays in a
/// core's own cache, beside a panel's part, while all panels pass. Panels of many rows come from memory
/// that all cores share, so the more strips they meet there, the better.
const UNIT_BYTES_MANY_ROWS: usize = 256 << 10;
/// Columns that all panels and all strips of a unit take before the next ones, so that all panels are
/// read once per unit. With 1024 a panel's part would stay in the first cache while the strips pass,
/// but the sums that go to the outputs and come back cost more: 7% of the products' time.
pub(super) const CHUNK_COLS: usize = 4096;

impl Cpu {
    /// Whether a matrix of this type and width can be multiplied with; the error says why not.
    pub fn check_matrix(qtype: QuantType, cols: usize) -> Result<()> {
        let multiple = match qtype {
            QuantType::F16 | QuantType::BF16 => 2,
            _ => qtype.block_values(),
        };
        if cols.is_multiple_of(multiple) {
            return Ok(());
        }
        let what = format!("rows of {cols} {} values are not supported", qtype.name());
        Err(Error::new(
            Kind::Unsupported,
            what,
            format!("use a model whose rows are multiples of {multiple}"),
        ))
    }

    /// Multiplies every row of `x` with every tile: `out[row][i] = dot(tile row i, x row)`.
    ///
    /// `x` has been quantized into the kinds of all tiles ([`Kinds::of`]). `inspect` sees each strip
    /// that is not packed yet. `poll` is called on this thread at least once, so that reads in flight
    /// are served.
    ///
    /// # Safety
    /// Tiles' data and outputs are valid, disjoint, and used by nobody else meanwhile.
    pub unsafe fn matmul(
        &self,
        tiles: &[TileView],
        x: &Activations,
        inspect: &Inspect<'_>,
        poll: &mut dyn FnMut(),
    ) {
        if x.rows() == 0 {
            return;
        }
        let mut strips = 0;
        let mut bytes = 0;
        for tile in tiles {
            assert_eq!(
                tile.cols,
                x.cols(),
                "a tile and the activations differ in width"
            );
            assert!(
                x.kinds().contains(Kinds::of(tile.qtype)),
                "the activations lack a kind"
            );
            assert!(
                STRIP_ROWS * tile.row_bytes() <= self.scratch.strip_bytes,
                "a row is too long"
            );
            strips += tile.strips();
            bytes += tile.rows * tile.row_bytes();
        }
        if strips == 0 {
            return;
        }
        let many = x.rows() > PANEL_ROWS;
        let unit_bytes = if many {
            UNIT_BYTES_MANY_ROWS * x.cols().div_ceil(CHUNK_COLS)
        } else {
            UNIT_BYTES
        };
        // No unit is smaller than a strip.
        let run =
            (unit_bytes * strips / bytes.max(1)).clamp(1, strips.div_ceil(4 * self.threads()));
        let units = Units::new(strips, run, if many { self.threads() } else { 1 });
        let job = Job {
            kernels: self.kernels,
            scratch: &self.scratch,
            tiles,
            x,
            inspect,
        };
        let between = Shared(std::cell::Cell::new(Some(&mut *poll)));
        self.pool.run(units.count(), &|worker, unit| {
            let between = &between;
            let strips = units.strips(unit);
            // SAFETY: each unit is a run of strips of its own; the caller vouches for the tiles.
            unsafe { job.strips(strips.start, strips.len(), worker) };
            // Only this thread is worker 0.
            if worker == 0
                && let Some(call) = between.0.take()
            {
                call();
                between.0.set(Some(call));
            }
        });
        // The others may have been faster and have left nothing to do between.
        poll();
    }
}

/// Which strips a unit of work takes.
///
/// With many rows a strip takes long, and whoever is done first would wait for the other's last unit: there
/// the units of each worker's share become smaller towards its end, each at most half of what is left.
#[derive(Debug, Clone, Copy)]
struct Units {
    strips: usize,
    /// Strips of a unit, at most.
    run: usize,
    /// Runs of strips that are divided each by itself, one for each worker; with 1 all units have `run` strips.
    shares: usize,
}

impl Units {
    fn new(strips: usize, run: usize, shares: usize) -> Units {
        Units {
            strips,
            run,
            shares,
        }
    }

    /// Units of each share; the last ones may be empty.
    fn each(&self) -> usize {
        let mut left = self.strips.div_ceil(self.shares);
        if self.shares == 1 {
            return left.div_ceil(self.run);
        }
        let whole = left.saturating_sub(2 * self.run) / self.run;
        left -= whole * self.run;
        let mut units = whole;
        while left > 0 {
            left -= self.next(left);
            units += 1;
        }
        units
    }

    /// Strips of the next unit when `left` strips of its share are left.
    fn next(&self, left: usize) -> usize {
        left.div_ceil(2).min(self.run)
    }

    fn count(&self) -> usize {
        self.shares * self.each()
    }

    fn strips(&self, unit: usize) -> std::ops::Range<usize> {
        if self.shares == 1 {
            let first = unit * self.run;
            return first..self.strips.min(first + self.run);
        }
        let (share, unit) = (unit / self.each(), unit % self.each());
        let bound = |share: usize| share * self.strips / self.shares;
        let (mut first, end) = (bound(share), bound(share + 1));
        let whole = (end - first).saturating_sub(2 * self.run) / self.run;
        first += whole.min(unit) * self.run;
        let mut count = self.next(end - first);
        for _ in whole..unit {
            first += count;
            count = self.next(end - first);
        }
        first..first + count
    }
}

/// A multiplication that the workers share.
struct Job<'a> {
    kernels: &'static Kernels,
    scratch: &'a Scratch,
    tiles: &'a [TileView],
    x: &'a Activations,
    inspect: &'a Inspect<'a>,
}

// SAFETY: the workers take disjoint strips, and each its own part of the scratch.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// `count` strips from strip `first` on, counted through all tiles.
    ///
    /// # Safety
    /// As for `Cpu::matmul`; nobody else works on these strips, or as this worker.
    unsafe fn strips(&self, mut first: usize, mut count: usize, worker: usize) {
        for tile in self.tiles {
            let strips = tile.strips();
            if first < strips {
                let end = strips.min(first + count);
                // SAFETY: the strips are within the tile.
                unsafe { self.strips_of(tile, first, end, worker) };
                count -= end - first;
                if count == 0 {
                    return;
                }
            }
            first = first.saturating_sub(strips);
        }
    }

    /// Strips `first..end` of a tile against all rows.
    ///
    /// # Safety
    /// As for `strips`.
    unsafe fn strips_of(&self, tile: &TileView, first: usize, end: usize, worker: usize) {
        let strip_bytes = STRIP_ROWS * tile.row_bytes();
        let scratch = self.scratch.of(worker, strip_bytes);
        // Strips up to here are packed in their slot, or shall be.
        let in_place = if tile.packed || tile.keep {
            end.min(tile.rows / STRIP_ROWS)
        } else {
            first
        };
        // SAFETY: the strips lie within the tile, scratch is this worker's, outputs are the strips'.
        unsafe {
            if !tile.packed {
                for strip in first..in_place {
                    self.pack(tile, strip, scratch);
                    let data = tile.data.add(strip * strip_bytes);
                    data.copy_from_nonoverlapping(scratch, strip_bytes);
                }
            }
            if first < in_place {
                self.multiply(tile, tile.data.add(first * strip_bytes), first, in_place);
            }
            for strip in first.max(in_place)..end {
                self.pack(tile, strip, scratch);
                self.multiply(tile, scratch, strip, strip + 1);
            }
        }
    }

    /// Packs one strip of a tile into `scratch`.
    ///
    /// # Safety
    /// The strip is within the tile and in GGUF layout; `scratch` holds a strip.
    unsafe fn pack(&self, tile: &TileView, strip: usize, scratch: *mut u8) {
        let row_bytes = tile.row_bytes();
        let rows = (tile.rows - strip * STRIP_ROWS).min(STRIP_ROWS);
        // SAFETY: as this function asks.
        unsafe {
            let data = tile.data.add(strip * STRIP_ROWS * row_bytes);
            let bytes = std::slice::from_raw_parts(data, rows * row_bytes);
            (self.inspect)(tile.id, strip, bytes);
            (self.kernels.pack_strip)(tile.qtype, row_bytes, rows, data, scratch);
        }
    }

    /// The packed strips `first..end` of a tile against all panels.
    ///
    /// # Safety
    /// `packed` holds the strips, one after the other; the tile's outputs are valid.
    unsafe fn multiply(&self, tile: &TileView, packed: *const u8, first: usize, end: usize) {
        let strip_bytes = STRIP_ROWS * tile.row_bytes();
        let kind = Kinds::of(tile.qtype);
        let kernels = self.kernels.strips[tile.qtype as usize][self.x.precision() as usize];
        let chunk = if self.x.rows() > PANEL_ROWS {
            CHUNK_COLS
        } else {
            tile.cols
        };
        for col in (0..tile.cols).step_by(chunk) {
            let cols = chunk.min(tile.cols - col);
            let packed = packed.wrapping_add(STRIP_ROWS * tile.qtype.row_bytes(col));
            for (first_row, width) in panels(self.x.rows()) {
                let kernel = kernels[width.ilog2() as usize];
                let panel = self.x.panel(kind, first_row, width, col);
                for strip in first..end {
                    let rows = (tile.rows - strip * STRIP_ROWS).min(STRIP_ROWS);
                    // SAFETY: the strip and the panel hold `cols` columns from here on, and earlier
                    // columns' sums are in the outputs; the caller vouches for the rest.
                    unsafe {
                        let packed = packed.add((strip - first) * strip_bytes);
                        let out = tile
                            .out
                            .add(first_row * tile.out_stride + strip * STRIP_ROWS);
                        if rows == STRIP_ROWS {
                            kernel(packed, cols, panel, out, tile.out_stride, col > 0);
                            continue;
                        }
                        // Kernels write 16 outputs of each batch row: here some are not the strip's.
                        let mut whole = [[0.0; STRIP_ROWS]; PANEL_ROWS];
                        let of_row = |row| {
                            std::slice::from_raw_parts_mut(out.add(row * tile.out_stride), rows)
                        };
                        for (row, whole) in whole[..width].iter_mut().enumerate() {
                            whole[..rows].copy_from_slice(of_row(row));
                        }
                        kernel(
                            packed,
                            cols,
                            panel,
                            whole.as_mut_ptr().cast(),
                            STRIP_ROWS,
                            col > 0,
                        );
                        for (row, whole) in whole[..width].iter().enumerate() {
                            of_row(row).copy_from_slice(&whole[..rows]);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_cover_all_strips_once_and_end_small() {
        for (strips, run, shares) in (1..200).flat_map(|strips| {
            (1..20).flat_map(move |run| (1..5).map(move |shares| (strips, run, shares)))
        }) {
            let units = Units::new(strips, run, shares);
            let mut next = 0;
            for share in 0..shares {
                let of_share = (share * units.each()..(share + 1) * units.each())
                    .map(|unit| units.strips(unit))
                    .filter(|strips| !strips.is_empty());
                let mut last = 0;
                for strips in of_share {
                    assert_eq!(strips.start, next);
                    assert!(strips.len() <= run);
                    (next, last) = (strips.end, strips.len());
                }
                assert!(shares == 1 || last <= 1);
            }
            assert_eq!(next, strips);
        }
    }
}
