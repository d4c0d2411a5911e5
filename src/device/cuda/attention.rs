//! Keys, values and attention as launches: which rows and heads a block takes, and their tables.
#![allow(unsafe_code)]

use super::driver::{Arg, Args};
use super::queue::table_bytes;
use super::{Cuda, SPLIT};
use crate::device::cpu::{AttentionRow, KvLayout, KvRow};
use crate::error::Result;

/// Heads, and queries, that a block of attention takes at most.
const QUERIES: usize = 8;

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

/// `KvPlace` of `pages.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    page: u64,
    index: u64,
}

/// `AttentionRow` of `attend.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Row {
    pages: u64,
    start: u32,
    position: u32,
}

/// `AttentionUnit` of `attend.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Unit {
    first_row: u32,
    rows: u32,
}

/// `AttentionShape` of `attend.cu`.
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

/// Bytes of the tables that `rows` rows of attention, or of new keys and values, take beside the pages'.
pub(super) const fn row_tables_bytes(rows: usize) -> usize {
    table_bytes::<Row>(rows) + table_bytes::<Unit>(rows) + table_bytes::<Place>(rows)
}

impl Cuda {
    /// See [`Cpu::kv_append`](crate::device::cpu::Cpu::kv_append); the rows' keys lie one behind the other, and so do
    /// their values.
    ///
    /// # Safety
    /// As for the CPU, until [`Cuda::finish`].
    pub unsafe fn kv_append(&self, layout: &KvLayout, rows: &[KvRow]) {
        let Some(first) = rows.first() else { return };
        let values = layout.kv_heads * layout.head_dim;
        for (i, row) in rows.iter().enumerate() {
            let expected = (
                first.k.wrapping_add(i * values),
                first.v.wrapping_add(i * values),
            );
            assert!((row.k, row.v) == expected, "keys or values have gaps");
        }
        self.attempt(|| {
            let places = {
                let mut queue = self.own.queue.borrow_mut();
                queue.begin(self.driver.as_ref(), table_bytes::<Place>(rows.len()))?;
                self.at(queue.put(rows.iter().map(|row| Place {
                    page: self.at(row.page),
                    index: row.index as u64,
                })))
            };
            let args = Args::new()
                .with(self::layout(layout))
                .with(places)
                .with(self.at(first.k))
                .with(self.at(first.v));
            self.launch(
                self.kernels.kv_append,
                [values.div_ceil(256), rows.len(), 1],
                256,
                args,
            )
        });
    }

    /// See [`Cpu::attention`](crate::device::cpu::Cpu::attention); the rows' queries lie one behind the other, and so
    /// do their outputs. Rows of one session stand in the order of their positions.
    ///
    /// # Safety
    /// As for the CPU, until [`Cuda::finish`].
    pub unsafe fn attention(
        &self,
        rows: &[AttentionRow],
        layout: &KvLayout,
        heads: usize,
        scale: f32,
        softcap: Option<f32>,
    ) {
        let Some(first) = rows.first() else { return };
        let values = heads * layout.head_dim;
        for (i, row) in rows.iter().enumerate() {
            let expected = (
                first.q.wrapping_add(i * values),
                first.out.wrapping_add(i * values),
            );
            assert!((row.q, row.out) == expected, "queries or outputs have gaps");
        }
        let splits_max = rows.iter().map(|row| splits(row, row)).max().unwrap_or(1);
        let group = heads / layout.kv_heads;
        let shape = Shape {
            layout: self::layout(layout),
            heads: heads as u32,
            unit_heads: group.min(QUERIES) as u32,
            scale,
            softcap: softcap.unwrap_or(0.0),
            splits_max: splits_max as u32,
        };
        // Where rows have several splits, no more rows at a time than there is memory for.
        let row_values = heads * splits_max * (layout.head_dim + 2);
        let at_once = match splits_max {
            1 => rows.len(),
            _ => (self.own.sizes.partial_values() / row_values).max(1),
        };
        for some in rows.chunks(at_once) {
            self.attempt(|| self.attend(some, layout, shape));
        }
    }

    fn attend(&self, rows: &[AttentionRow], layout: &KvLayout, shape: Shape) -> Result<()> {
        let unit_rows = QUERIES / shape.unit_heads as usize;
        let sessions = || rows.chunk_by(|a, b| a.pages == b.pages);
        let pages_of = |session: &[AttentionRow]| {
            let last = session.iter().map(|row| row.position).max().unwrap_or(0);
            last as usize / layout.page_positions + 1
        };
        let units = sessions()
            .map(|s| s.len().div_ceil(unit_rows))
            .sum::<usize>();
        let pages_bytes: usize = sessions().map(|s| table_bytes::<u64>(pages_of(s))).sum();

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
                let page = |page| {
                    // SAFETY: the caller of the op vouches for the table up to the last position.
                    let page = unsafe { *session[0].pages.add(page) };
                    if page.is_null() { 0 } else { self.at(page) }
                };
                let pages = self.at(queue.put((0..pages_of(session)).map(page)));
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
        let parts = (shape.heads / shape.layout.kv_heads).div_ceil(shape.unit_heads);
        let out = self.at(rows[0].out);
        let partial = self.own.partial();
        let args = Args::new()
            .with(shape)
            .with(unit_table)
            .with(row_table)
            .with(self.at(rows[0].q))
            .with(out)
            .with(partial);
        let grid = [splits_max, (shape.layout.kv_heads * parts) as usize, units];
        self.launch(self.kernels.attend, grid, 256, args)?;
        if shape.splits_max > 1 {
            let args = Args::new()
                .with(shape)
                .with(row_table)
                .with(out)
                .with(partial);
            self.launch(
                self.kernels.attend_join,
                [shape.heads as usize, rows.len(), 1],
                128,
                args,
            )?;
        }
        Ok(())
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
