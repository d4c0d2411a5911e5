//! The ops of the device other than the matrices: what is split over the threads, and how.
#![allow(unsafe_code)]

use super::Cpu;
use super::attend::{self, QUERIES_MAX, Query};
use super::kv::{AttentionRow, AttentionShape, KvLayout};
use super::matmul::Shared;
use super::small_ops::UnaryFn;

/// f32s of a small op that one thread does faster than two threads that must agree first.
const SPLIT_VALUES: usize = 8 << 10;

impl Cpu {
    /// Calls `work(first, count)` for runs that cover `count` items of `values` f32s each; over the
    /// pool where that pays.
    pub(super) fn split(&self, count: usize, values: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        let run = (SPLIT_VALUES / 4 / values.max(1)).max(1);
        if count * values < SPLIT_VALUES || count <= run {
            return work(0, count);
        }
        self.pool.run(count.div_ceil(run), &|_, unit| {
            work(unit * run, run.min(count - unit * run))
        });
    }

    /// `x *= factor`.
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        self.unary(self.kernels.scale, x, factor);
    }

    /// `x = cap * tanh(x / cap)`.
    pub fn softcap(&self, x: &mut [f32], cap: f32) {
        self.unary(self.kernels.softcap, x, cap);
    }

    fn unary(&self, kernel: UnaryFn, x: &mut [f32], c: f32) {
        const PIECE: usize = 1024;
        let (len, x) = (x.len(), Shared(x.as_mut_ptr()));
        self.split(len.div_ceil(PIECE), PIECE, &|first, count| {
            let x = &x;
            let (start, end) = (first * PIECE, ((first + count) * PIECE).min(len));
            // SAFETY: the runs are within x and do not overlap.
            unsafe { kernel(x.0.add(start), end - start, c) };
        });
    }

    /// Attention of every row over its pages: softmax of `scale * q.k` (softly capped, if
    /// `softcap` says so) times the values.
    ///
    /// # Safety
    /// Pointers are valid for the layout's sizes and outputs are disjoint. For neighbouring rows
    /// that share `pages`: all positions from the smallest `start` to the largest `position` have
    /// been appended.
    pub unsafe fn attention(&self, rows: &[AttentionRow], shape: &AttentionShape) {
        let kernels = self.kernels;
        let AttentionShape {
            ref layout,
            heads,
            scale,
            softcap,
        } = *shape;
        let KvLayout {
            kv_heads,
            head_dim,
            page_positions,
        } = *layout;
        assert!(
            head_dim.is_multiple_of(16)
                && page_positions.is_multiple_of(16)
                && heads.is_multiple_of(kv_heads)
        );
        // A unit is some heads that share a key-value head, for some rows: many queries use what
        // has been loaded, as long as there are units for all threads.
        let group = heads / kv_heads;
        let mut unit_heads = group.min(QUERIES_MAX);
        while unit_heads > 1 && rows.len() * kv_heads * group.div_ceil(unit_heads) < self.threads()
        {
            unit_heads = unit_heads.div_ceil(2);
        }
        let parts = group.div_ceil(unit_heads);
        let unit_rows =
            (QUERIES_MAX / unit_heads).clamp(1, rows.len().div_ceil(2 * self.threads()).max(1));
        let rows = Shared(rows);
        let shares = self.threads();
        self.pool.run(
            rows.0.len().div_ceil(unit_rows).next_multiple_of(shares) * kv_heads * parts,
            &|_, unit| {
                let rows = &rows;
                let (place, head) = (unit / (kv_heads * parts), unit % (kv_heads * parts));
                // Later rows of a prompt attend to more positions: of each few neighbouring chunks of rows
                // every worker has one, and the long ones come first, so that nobody waits for them.
                let chunks = rows.0.len().div_ceil(unit_rows);
                let each = chunks.div_ceil(shares);
                let before = place % each * shares + place / each;
                if before >= chunks {
                    return;
                }
                let chunk = chunks - 1 - before;
                let (kv_head, part) = (head / parts, head % parts);
                let first_head = kv_head * group + part * unit_heads;
                let unit_heads = unit_heads.min(group - part * unit_heads);
                let rows = &rows.0[chunk * unit_rows..rows.0.len().min((chunk + 1) * unit_rows)];
                let empty = Query {
                    q: std::ptr::null(),
                    out: std::ptr::null_mut(),
                    start: 0,
                    end: 0,
                };
                for rows in rows.chunk_by(|a, b| a.pages == b.pages) {
                    let mut queries = [empty; QUERIES_MAX];
                    let count = rows.len() * unit_heads;
                    for (i, query) in queries[..count].iter_mut().enumerate() {
                        let (row, offset) = (
                            &rows[i / unit_heads],
                            (first_head + i % unit_heads) * head_dim,
                        );
                        let (start, end) = (row.start as usize, row.position as usize + 1);
                        // SAFETY: the head is within the row's query and output.
                        *query = unsafe {
                            Query {
                                q: row.q.add(offset),
                                out: row.out.add(offset),
                                start,
                                end,
                            }
                        };
                    }
                    let shared = attend::Shared {
                        pages: rows[0].pages,
                        layout,
                        kv_head,
                        scale,
                        softcap,
                    };
                    // SAFETY: the processor has the kernels; the caller vouches for the rows.
                    unsafe { (kernels.attend)(&queries[..count], &shared) };
                }
            },
        );
    }
}
