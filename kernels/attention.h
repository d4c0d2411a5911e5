// What attention is asked for, and where what it finds in the splits of a row stands meanwhile.
#pragma once
#include "pages.h"
#include "quantize.h"

// One row's queries: heads x head_dim.
struct AttentionRow {
    // Where its session's pages of this layer are; none where nothing is attended to.
    const u16 *const *pages;
    // The first and the last position it attends to.
    u32 start;
    u32 position;
};

// Neighbouring rows of one session, with at most 32 queries in all.
struct AttentionUnit {
    u32 first_row;
    u32 rows;
};

struct AttentionShape {
    KvLayout layout;
    u32 heads;
    // Heads of a group that a block takes: at most 8.
    u32 unit_heads;
    float scale;
    // 0 where there is none.
    float softcap;
    // Splits that there is room for in `partial`.
    u32 splits_max;
};

// What a query found in a split is head_dim sums, then the largest score and the sum of the weights.
constexpr u32 SPLIT = 256, QUERIES = 32, BEHIND_SUMS = 2;

namespace attention {
// The splits of a row, the first one and how many.
DEVICE u32 first_split(const AttentionRow &row) { return row.start / SPLIT; }
DEVICE u32 splits(const AttentionRow &row) { return row.position / SPLIT - row.start / SPLIT + 1; }

// Where a query's share of `partial` begins; further splits follow.
template <class P> DEVICE P *partial_of(P *partial, const AttentionShape &shape, u32 row, u32 head) {
    return partial + u64(row * shape.heads + head) * shape.splits_max * (shape.layout.head_dim + BEHIND_SUMS);
}

// Neighbouring pairs of halves, or other words, that are loaded at once.
template <u32 n> struct alignas(4 * n) Pairs {
    u32 pair[n];
};
} // namespace attention
