//! Single rows of a matrix (embeddings), from a tile in memory or straight from the disk.
//!
//! Where weights are verified, the strip that holds a row is read for it: that is what there are checksums of, and 16
//! rows cost hardly more than one.

use std::ptr::NonNull;
use std::time::Instant;

use super::reads::{ROW_TOKEN, WRONG_BYTES, pause_before, queue_full};
use super::{Next, Partial, Phase, ROWS_SLOT, Store};
use crate::arena::PAGE_BYTES;
use crate::error::Result;
use crate::format::tile::STRIP_ROWS;
use crate::io::{Completion, FileId, Read};
use crate::trace::What;

/// The bytes of one row of a matrix, as found.
#[derive(Debug, Clone, Copy)]
pub enum RowBytes<'a> {
    /// As in the file.
    Plain(&'a [u8]),
    /// One row of a packed strip.
    Packed {
        /// The strip's bytes.
        strip: &'a [u8],
        /// Which of its rows.
        lane: usize,
    },
    /// In a device's own memory, as in the file.
    OnDevice(NonNull<u8>),
}

/// The most rows read at a time.
pub(super) const ROWS_MAX: usize = 32;

/// A row, or its strip, on its way into its piece of the rows' slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowRead {
    matrix: u32,
    /// The first row that is read, and how many are.
    first: u32,
    count: u32,
    /// Bytes of a piece; the row's is the one of its place in the table.
    piece_bytes: u32,
    /// How far it has come.
    read: Partial,
    /// It was read already and did not agree with its checksum.
    doubted: bool,
}

impl RowRead {
    pub(super) const NONE: RowRead = RowRead {
        matrix: 0,
        first: 0,
        count: 0,
        piece_bytes: 0,
        read: Partial::NONE,
        doubted: false,
    };
}

impl Store {
    /// Calls `with(i, row)` for each of `rows` (row numbers of a matrix of the model in its sweep).
    ///
    /// Rows of tiles in memory, or in a device's own, are taken from there, the others are read: a few KiB each.
    ///
    /// # Errors
    /// A read failed for good, or a strip did not agree with its checksum twice.
    pub fn rows(
        &mut self,
        matrix: usize,
        rows: &[u32],
        mut with: impl FnMut(usize, RowBytes<'_>),
    ) -> Result<()> {
        let matrix = self.first_matrix() + matrix;
        let row_bytes = self.matrices[matrix].row_bytes();
        let strip_rows = match self.sums().verify() {
            true => STRIP_ROWS.min(self.matrices[matrix].rows),
            false => 1,
        };
        let piece_bytes = (strip_rows * row_bytes + PAGE_BYTES).next_multiple_of(PAGE_BYTES);
        let batch = (self.slots.slot_bytes() / piece_bytes).min(ROWS_MAX);
        assert!(batch > 0, "a slot holds a strip, so it holds a row");
        // What is left of a batch that failed does not matter any more.
        self.wait_for_rows()?;
        self.rows_failed = None;
        for (number, rows) in rows.chunks(batch).enumerate() {
            // First all the reads of the batch go out together, then the rows are used.
            let mut missing: u32 = 0;
            for (place, &row) in rows.iter().enumerate() {
                if let Some(data) = self.row_on_device(matrix, row) {
                    with(number * batch + place, RowBytes::OnDevice(data));
                } else if !self
                    .row_from_tile(matrix, row, |bytes| with(number * batch + place, bytes))?
                {
                    missing |= 1 << place;
                    let first = row as usize / strip_rows * strip_rows;
                    self.row_reads[place] = RowRead {
                        matrix: matrix as u32,
                        first: first as u32,
                        count: strip_rows.min(self.matrices[matrix].rows - first) as u32,
                        piece_bytes: piece_bytes as u32,
                        ..RowRead::NONE
                    };
                    self.submit_row(place)?;
                }
            }
            if missing != 0 {
                self.io.flush()?;
                let (start, begun) = (Instant::now(), self.trace.begin());
                self.wait_for_rows()?;
                self.counters.stalled += start.elapsed();
                self.trace.end(begun, What::Stall);
                if let Some(error) = self.rows_failed.take() {
                    self.forget_if_changed();
                    return Err(error);
                }
            }
            for (place, &row) in rows
                .iter()
                .enumerate()
                .filter(|(place, _)| missing >> place & 1 == 1)
            {
                let within = (row - self.row_reads[place].first) as usize;
                let bytes = &self.row_read(place)[within * row_bytes..][..row_bytes];
                with(number * batch + place, RowBytes::Plain(bytes));
            }
        }
        Ok(())
    }

    fn wait_for_rows(&mut self) -> Result<()> {
        while self.rows_pending > 0 {
            self.reap(true)?;
        }
        Ok(())
    }

    fn row_offset(&self, matrix: usize, row: u32) -> u64 {
        let matrix = &self.matrices[matrix];
        matrix.offset + u64::from(row) * matrix.row_bytes() as u64
    }

    /// Whether the strip that holds row `row` of a matrix agrees with its checksum, or nothing is verified.
    fn row_agrees(&self, matrix: usize, row: u32, strip: &[u8]) -> bool {
        let member = self.member_with(self.matrices[matrix].file);
        let matrix = matrix - member.matrices.start as usize;
        member.integrity.sums().row_agrees(matrix, row, strip)
    }

    /// What was read for the row at `place`, once it has arrived.
    fn row_read(&self, place: usize) -> &[u8] {
        let read = &self.row_reads[place];
        let matrix = read.matrix as usize;
        let lead = (self.row_offset(matrix, read.first) % PAGE_BYTES as u64) as usize;
        // SAFETY: the read of this piece was reaped and its bytes lie within the piece; the rows' slot is used for
        // nothing else.
        unsafe {
            let piece = self.slots.ptr(ROWS_SLOT).as_ptr();
            std::slice::from_raw_parts(
                piece.add(place * read.piece_bytes as usize + lead),
                read.count as usize * self.matrices[matrix].row_bytes(),
            )
        }
    }

    /// Where on the device a row is, if it has its tile.
    fn row_on_device(&self, matrix: usize, row: u32) -> Option<NonNull<u8>> {
        let range = self.ranges[matrix].clone();
        let tile = range.start
            + row
                / self.tiles[range.start as usize..range.end as usize]
                    .first()?
                    .rows;
        let what = &self.tiles[tile as usize];
        let within = (row - what.first_row) as usize * self.matrices[matrix].row_bytes();
        let slot = self.idle_on_device(tile)?;
        // SAFETY: the row is one of the tile's, which lies behind its lead in the slot.
        Some(unsafe { slot.add(what.lead() + within) })
    }

    /// Gives the row to `with` if its tile is in memory, and it is as it should be if nobody has seen to that yet. If it is
    /// not, the tile is read again.
    fn row_from_tile(
        &mut self,
        matrix: usize,
        row: u32,
        with: impl FnOnce(RowBytes<'_>),
    ) -> Result<bool> {
        let range = self.ranges[matrix].clone();
        if range.is_empty() {
            return Ok(false);
        }
        let tile = range.start + row / self.tiles[range.start as usize].rows;
        let state = self.states[tile as usize];
        if !matches!(state.phase, Phase::Ready | Phase::InUse) {
            return Ok(false);
        }
        let what = &self.tiles[tile as usize];
        let row_bytes = self.matrices[matrix].row_bytes();
        let within = (row - what.first_row) as usize;
        let strip_first = within / STRIP_ROWS * STRIP_ROWS;
        let strip_rows = STRIP_ROWS.min(what.rows as usize - strip_first);
        // SAFETY: the tile is in memory and nobody writes it: packing happens inside a matrix product, never while
        // the store is asked for rows.
        let data = unsafe {
            std::slice::from_raw_parts(
                self.slots.ptr(state.slot).add(what.lead()).as_ptr(),
                what.bytes as usize,
            )
        };
        let strip = &data[strip_first * row_bytes..][..strip_rows * row_bytes];
        let lane = within - strip_first;
        // The last strip of a matrix may be shorter; it stays in plain order.
        if state.packed && !self.plain && strip_rows == STRIP_ROWS {
            with(RowBytes::Packed { strip, lane });
        } else if state.packed || self.row_agrees(matrix, row, strip) {
            with(RowBytes::Plain(&strip[lane * row_bytes..][..row_bytes]));
        } else {
            if state.phase == Phase::Ready {
                self.doubt(tile, false)?;
            }
            return Ok(false);
        }
        Ok(true)
    }

    /// Submits the read of what is still missing for a row into its piece of the rows' slot.
    fn submit_row(&mut self, place: usize) -> Result<()> {
        while self.io.in_flight() >= self.io.depth() {
            self.reap(true)?;
        }
        let RowRead {
            matrix,
            first,
            count,
            piece_bytes,
            read,
            ..
        } = self.row_reads[place];
        let arrived = read.arrived();
        let row_bytes = self.matrices[matrix as usize].row_bytes() as u64;
        let offset = self.row_offset(matrix as usize, first);
        let start = offset / PAGE_BYTES as u64 * PAGE_BYTES as u64 + u64::from(arrived);
        let end = (offset + u64::from(count) * row_bytes).next_multiple_of(PAGE_BYTES as u64);
        // SAFETY: there are no more places than pieces in the slot, and arrived is less than a piece.
        let into = unsafe {
            self.slots
                .ptr(ROWS_SLOT)
                .add(place * piece_bytes as usize + arrived as usize)
        };
        let read = Read {
            file: FileId(self.matrices[matrix as usize].file),
            offset: start,
            len: (end - start) as u32,
            into,
            token: ROW_TOKEN | place as u64,
        };
        self.trace.submitted(read.token, What::Row(matrix));
        // SAFETY: the piece is this read's own until it is reaped: `rows` begins nothing new before all are.
        let submitted = unsafe { self.io.submit(read) };
        submitted.map_err(|_| queue_full())?;
        self.rows_pending += 1;
        Ok(())
    }

    /// Takes in the completion of a row's read.
    pub(super) fn row_done(&mut self, completion: &Completion) -> Result<()> {
        self.rows_pending -= 1;
        let place = (completion.token - ROW_TOKEN) as usize;
        let RowRead {
            matrix,
            first,
            count,
            doubted,
            ..
        } = self.row_reads[place];
        let (file, row_bytes) = {
            let matrix = &self.matrices[matrix as usize];
            (matrix.file, matrix.row_bytes())
        };
        let offset = self.row_offset(matrix as usize, first);
        let needed = (offset % PAGE_BYTES as u64) as usize + count as usize * row_bytes;
        self.count_read(file, completion.result.unwrap_or(0));
        let next = self.row_reads[place].read.take(completion.result, needed);
        let failed = match next {
            Next::GoOn | Next::GoOnLater => None,
            Next::Failed(why) => Some(why),
            Next::Done if self.row_agrees(matrix as usize, first, self.row_read(place)) => {
                return Ok(());
            }
            Next::Done => {
                if !doubted {
                    self.counters.doubted += 1;
                    self.warn_of_wrong(matrix as usize, file, offset);
                }
                let read = &mut self.row_reads[place];
                (read.read, read.doubted) = (Partial::NONE, true);
                doubted.then_some(WRONG_BYTES)
            }
        };
        if let Some(why) = failed {
            if self.rows_failed.is_none() {
                self.rows_failed = Some(self.read_error(matrix as usize, file, offset, why));
            }
            return Ok(());
        }
        pause_before(next);
        self.submit_row(place)?;
        self.io.flush()
    }
}
