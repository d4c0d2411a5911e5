//! Keys, values and attention as launches: which rows and heads a block takes, and their tables.
#![allow(unsafe_code)]

use super::driver::{Arg, Args};
use super::ops::{QuantizedRows, parts_of_rows};
use super::queue::table_bytes;
use super::{Cuda, SPLIT, padded};
use crate::device::cpu::{
    AttentionRow, AttentionShape, Heads, Kinds, KvLayout, KvPlace, RopePairing,
};
use crate::error::Result;

/// Heads, and queries, that a block of attention takes at most.
const HEADS: usize = 8;
const QUERIES: usize = 32;
/// Queries that it takes where that gives too few blocks for all multiprocessors: of so many there are enough, on a GPU of
/// its own or on one that shares the processor's memory and has few.
const FEW_QUERIES: usize = 8;
const ENOUGH_BLOCKS: [usize; 2] = [512, 64];

/// Threads that take a head before attention, at most.
const HEAD_THREADS_MAX: usize = 256;

/// `KvLayout` of `pages.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Layout {
    kv_heads: u32,
    head_dim: u32,
    page_positions: u32,
}
// SAFETY: three words.
unsafe impl Arg for Layout {}

/// `Heads` of `place_heads.cu`: addresses.
#[repr(C)]
#[derive(Clone, Copy)]
struct HeadsAt {
    /// Queries, keys and values.
    rows: [u64; 3],
    biases: [u64; 3],
    norms: [u64; 2],
    cos: u64,
    sin: u64,
    places: u64,
}
// SAFETY: pointers.
unsafe impl Arg for HeadsAt {}

/// `KvPlace` of `pages.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    page: u64,
    index: u64,
}

/// `AttentionRow` of `attention.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Row {
    pages: u64,
    start: u32,
    position: u32,
}

/// `AttentionUnit` of `attention.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Unit {
    first_row: u32,
    rows: u32,
}

/// `AttentionShape` of `attention.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    layout: Layout,
    heads: u32,
    unit_heads: u32,
    scale: f32,
    softcap: f32,
    splits_max: u32,
}
// SAFETY: eight words.
unsafe impl Arg for Shape {}

/// Places in a session's table of so many pages.
pub(super) const fn page_places(pages: usize) -> usize {
    pages.next_multiple_of(32)
}

/// Bytes of the tables that `rows` rows of attention, or of new keys and values, take beside the pages'.
pub(super) const fn row_tables_bytes(rows: usize) -> usize {
    table_bytes::<Row>(rows) + table_bytes::<Unit>(rows) + table_bytes::<Place>(rows)
}

impl Cuda {
    /// See [`Cpu::place_heads`](crate::device::cpu::Cpu::place_heads).
    ///
    /// # Safety
    /// As for the CPU, until [`Cuda::finish`].
    pub unsafe fn place_heads(&self, heads: Heads<'_>, layout: &KvLayout, places: &[KvPlace]) {
        if places.is_empty() {
            return;
        }
        let (q_heads, pairs) = heads.shape(layout, places.len());
        let at = |values: &[f32]| self.at(values.as_ptr());
        let rows = [&*heads.q, heads.k, heads.v];
        self.attempt(|| {
            let table = {
                let mut queue = self.own.queue.borrow_mut();
                queue.begin(self.driver.as_ref(), table_bytes::<Place>(places.len()))?;
                self.at(queue.put(places.iter().map(|place| Place {
                    page: self.at(place.page),
                    index: place.index as u64,
                })))
            };
            let heads_at = HeadsAt {
                rows: rows.map(at),
                biases: heads.biases.map_or([0; 3], |biases| biases.map(at)),
                norms: heads.norms.map_or([0; 2], |norms| norms.map(at)),
                cos: at(heads.cos),
                sin: at(heads.sin),
                places: table,
            };
            let args = Args::new()
                .with(heads_at)
                .with(self::layout(layout))
                .with(q_heads as u32)
                .with(pairs as u32)
                .with(u32::from(heads.pairing == RopePairing::Adjacent))
                .with(heads.eps);
            let grid = [q_heads + 2 * layout.kv_heads, places.len(), 1];
            let threads = layout.head_dim.next_multiple_of(32).min(HEAD_THREADS_MAX);
            self.launch(self.kernels.place_heads, grid, threads as u32, args)
        });
    }

    /// See [`Cpu::attention_quantize`](crate::device::cpu::Cpu::attention_quantize); the rows' queries lie one behind the
    /// other, too. Rows of one session stand in the order of their positions.
    ///
    /// # Safety
    /// As for the CPU, until [`Cuda::finish`].
    pub unsafe fn attention_quantize(
        &self,
        rows: &[AttentionRow],
        shape: &AttentionShape,
        kinds: Kinds,
    ) {
        let Some(first) = rows.first() else { return };
        let (AttentionShape { layout, heads, .. }, values) = (shape, shape.row_values());
        for (i, row) in rows.iter().enumerate() {
            let expected = (
                first.q.wrapping_add(i * values),
                first.out.wrapping_add(i * values),
            );
            assert!((row.q, row.out) == expected, "queries or outputs have gaps");
        }
        let splits_max = rows.iter().map(|row| splits(row, row)).max().unwrap_or(1);
        let group = *heads / layout.kv_heads;
        let shape = Shape {
            layout: self::layout(layout),
            heads: *heads as u32,
            unit_heads: group.min(HEADS) as u32,
            scale: shape.scale,
            softcap: shape.softcap.unwrap_or(0.0),
            splits_max: splits_max as u32,
        };
        // Where rows have several splits, no more rows at a time than there is memory for.
        let row_values = heads * splits_max * (layout.head_dim + 2);
        let at_once = match splits_max {
            1 => rows.len(),
            _ => (self.own.sizes.partial_values() / row_values).max(1),
        };
        let mut to = self.room_for((rows.len(), values), kinds);
        for some in rows.chunks(at_once) {
            self.attempt(|| self.attend(some, layout, shape, to));
            to.first += some.len() as u32;
        }
    }

    fn attend(
        &self,
        rows: &[AttentionRow],
        layout: &KvLayout,
        shape: Shape,
        to: QuantizedRows,
    ) -> Result<()> {
        let parts = (shape.heads / shape.layout.kv_heads).div_ceil(shape.unit_heads);
        let blocks_y = (shape.layout.kv_heads * parts) as usize;
        let few_rows = FEW_QUERIES / shape.unit_heads as usize;
        let row_splits = rows.iter().map(|row| splits(row, row)).max().unwrap_or(1);
        let few_blocks = rows.len().div_ceil(few_rows) * blocks_y * row_splits;
        let enough = ENOUGH_BLOCKS[usize::from(self.facts().integrated)];
        let unit_rows = match few_blocks < enough {
            true => few_rows,
            false => QUERIES / shape.unit_heads as usize,
        };
        let sessions = || rows.chunk_by(|a, b| a.pages == b.pages);
        let pages_of = |session: &[AttentionRow]| {
            let last = session.iter().map(|row| row.position).max().unwrap_or(0);
            last as usize / layout.page_positions + 1
        };
        // Tables grow now and then, not with every page: those behind them stay where they are from sweep to sweep.
        let places_of = |session: &[AttentionRow]| page_places(pages_of(session));
        let units = sessions()
            .map(|s| s.len().div_ceil(unit_rows))
            .sum::<usize>();
        let pages_bytes: usize = sessions().map(|s| table_bytes::<u64>(places_of(s))).sum();

        let (row_table, unit_table) = {
            let mut queue = self.own.queue.borrow_mut();
            queue.begin(
                self.driver.as_ref(),
                pages_bytes + row_tables_bytes(rows.len()),
            )?;
            let (row_table, unit_table) =
                (queue.table::<Row>(rows.len()), queue.table::<Unit>(units));
            let (mut next_row, mut next_unit) = (0, 0);
            for session in sessions() {
                let count = pages_of(session);
                let page = |page| {
                    if page >= count {
                        return 0;
                    }
                    // SAFETY: the caller of the op vouches for the table up to the last position.
                    let page = unsafe { *session[0].pages.add(page) };
                    if page.is_null() { 0 } else { self.at(page) }
                };
                let pages = self.at(queue.put((0..places_of(session)).map(page)));
                for unit in session.chunks(unit_rows) {
                    let of_unit = Unit {
                        first_row: next_row as u32,
                        rows: unit.len() as u32,
                    };
                    // SAFETY: the tables have room for all rows and units.
                    unsafe { unit_table.add(next_unit).write(of_unit) };
                    next_unit += 1;
                    for row in unit {
                        let (start, position) = (row.start, row.position);
                        let row = Row {
                            pages,
                            start,
                            position,
                        };
                        // SAFETY: as above.
                        unsafe { row_table.add(next_row).write(row) };
                        next_row += 1;
                    }
                }
            }
            (self.at(row_table), self.at(unit_table))
        };
        let of_units = sessions().flat_map(|session| session.chunks(unit_rows));
        let splits_max = of_units
            .map(|unit| splits(&unit[0], &unit[unit.len() - 1]))
            .max()
            .unwrap_or(1);
        let out = self.at(rows[0].out);
        let partial = self.own.partial();
        let args = Args::new()
            .with(shape)
            .with(unit_table)
            .with(row_table)
            .with(self.at(rows[0].q))
            .with(out)
            .with(partial);
        let grid = [splits_max, blocks_y, units];
        self.launch(self.kernels.attend, grid, 256, args)?;
        let args = Args::new()
            .with(shape)
            .with(row_table)
            .with(out)
            .with(partial)
            .with(to);
        // With the last rows go those that fill the last panel up.
        let (end, all) = (to.first as usize + rows.len(), to.rows as usize);
        let filling = if end == all { padded(all) - all } else { 0 };
        let (grid, threads) = parts_of_rows(rows.len() + filling, to.cols as usize);
        self.launch(self.kernels.join_quantize, grid, threads, args)
    }
}

/// Splits from the first position of `first` to the last one of `last`.
fn splits(first: &AttentionRow, last: &AttentionRow) -> usize {
    last.position as usize / SPLIT - first.start as usize / SPLIT + 1
}

fn layout(layout: &KvLayout) -> Layout {
    Layout {
        kv_heads: layout.kv_heads as u32,
        head_dim: layout.head_dim as u32,
        page_positions: layout.page_positions as u32,
    }
}
