// Attention of a few queries over the pages of one key-value head, split over the context.
//
// A split is 256 aligned absolute positions, in blocks of 16, with an online softmax from block to
// block (Milakov and Gimelshein, 2018): the CPU's arithmetic, bit for bit, as long as a query's
// positions lie within one split. What several splits found is put together in their order by
// join_quantize, so the order follows from positions alone, never from pages or the batch; there it
// rounds otherwise than the CPU, which has one softmax over all blocks.
//
// The eight queries of a block share what they load: heads of one group, of neighbouring rows of a
// session.
//
// Grid: (split of the unit, key-value head and 8 heads of its group, unit). Block: 256 threads.
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

// Neighbouring rows of one session, `rows` x 8 heads at most 8 queries.
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
constexpr u32 SPLIT = 256, QUERIES = 8, BEHIND_SUMS = 2;

namespace attention {
// The splits of a row, the first one and how many.
DEVICE u32 first_split(const AttentionRow &row) { return row.start / SPLIT; }
DEVICE u32 splits(const AttentionRow &row) { return row.position / SPLIT - row.start / SPLIT + 1; }

// Where a query's share of `partial` begins; further splits follow.
template <class P> DEVICE P *partial_of(P *partial, const AttentionShape &shape, u32 row, u32 head) {
    return partial + u64(row * shape.heads + head) * shape.splits_max * (shape.layout.head_dim + BEHIND_SUMS);
}
} // namespace attention

KERNEL(256)
attend(AttentionShape shape, const AttentionUnit *units, const AttentionRow *rows, const float *q, float *out,
       float *partial) {
    alignas(16) __shared__ float queries[QUERIES][256];
    alignas(16) __shared__ float weights[QUERIES][SPLIT];
    __shared__ float rescale[QUERIES][SPLIT / 16];
    __shared__ float largest_of[QUERIES], sum_of[QUERIES];
    __shared__ u32 from_of[QUERIES], to_of[QUERIES];
    const u32 head_dim = shape.layout.head_dim, page_positions = shape.layout.page_positions;
    const u32 group = shape.heads / shape.layout.kv_heads;
    const u32 parts = (group + shape.unit_heads - 1) / shape.unit_heads;
    const u32 kv_head = block_y() / parts, first_head = kv_head * group + block_y() % parts * shape.unit_heads;
    const u32 unit_heads = smaller(shape.unit_heads, group - block_y() % parts * shape.unit_heads);
    const AttentionUnit unit = units[block_z()];
    const u32 count = unit.rows * unit_heads;
    // Rows of a unit stand in the order of their positions.
    const u32 split = attention::first_split(rows[unit.first_row]) + block_x();
    const u32 begin = split * SPLIT;
    if (begin > rows[unit.first_row + unit.rows - 1].position) return;

    if (thread() < count) {
        const AttentionRow &row = rows[unit.first_row + thread() / unit_heads];
        u32 from = larger(row.start, begin), to = smaller(row.position + 1, begin + SPLIT);
        from_of[thread()] = from < to ? from - begin : 0;
        to_of[thread()] = from < to ? to - begin : 0;
    }
    block_sync();
    // Positions that any query sees.
    u32 any_from = SPLIT, any_to = 0;
    for (u32 i = 0; i < count; i++) {
        if (from_of[i] == to_of[i]) continue;
        any_from = smaller(any_from, from_of[i]);
        any_to = larger(any_to, to_of[i]);
    }
    const u16 *const *pages = rows[unit.first_row].pages;

    // Scores: a thread is a position. Even and odd dimensions run in two chains. Sixteen dimensions are loaded before
    // they are used, for latency is what this takes.
    const u32 position = begin + thread();
    const bool any = thread() >= any_from && thread() < any_to;
    const u16 *key = nullptr;
    if (any) key = key_of(shape.layout, pages[position / page_positions], kv_head, position % page_positions);
    float scores[QUERIES][2] = {};
    for (u32 piece = 0; piece < head_dim; piece += 256) {
        u32 dims = smaller(256u, head_dim - piece);
        for (u32 i = thread(); i < count * dims; i += 256) {
            u32 query = i / dims, row = unit.first_row + query / unit_heads, head = first_head + query % unit_heads;
            queries[query][i % dims] = q[u64(row * shape.heads + head) * head_dim + piece + i % dims];
        }
        block_sync();
        if (any) {
            for (u32 first = 0; first < dims; first += 16) {
                float keys[16];
#pragma unroll
                for (u32 d = 0; d < 16; d++) keys[d] = from_half(key[16 * (piece + first + d)]);
#pragma unroll
                for (u32 i = 0; i < QUERIES; i++) {
                    if (i < count) {
#pragma unroll
                        for (u32 d = 0; d < 16; d++)
                            scores[i][d % 2] = fused(keys[d], queries[i][first + d], scores[i][d % 2]);
                    }
                }
            }
        }
        block_sync();
    }
#pragma unroll
    for (u32 i = 0; i < QUERIES; i++) {
        if (i < count) {
            float score = (scores[i][0] + scores[i][1]) * shape.scale;
            if (shape.softcap != 0.0f) score = hyperbolic_tangent(divide(score, shape.softcap)) * shape.softcap;
            weights[i][thread()] = score;
        }
    }
    block_sync();

    // The online softmax: 16 lanes take a query through its blocks.
    if (thread() < 16 * QUERIES) {
        u32 query = thread() / 16, l = thread() % 16;
        bool some = query < count;
        u32 from = some ? from_of[query] : 0, to = some ? to_of[query] : 0;
        float largest = from_bits(0xff800000), sum = 0.0f;
        // All lanes of a warp stay together for the exchanges.
        for (u32 block = 0; block < SPLIT / 16; block++) {
            u32 at = 16 * block + l;
            bool seen = at >= from && at < to;
            bool any = 16 * block < to && 16 * block + 16 > from;
            float score = seen ? weights[query][at] : from_bits(0xff800000);
            float new_largest = larger(max_lanes<16>(score), largest);
            float weight = seen ? exponential(score - new_largest) : 0.0f;
            float factor = new_largest != largest ? exponential(largest - new_largest) : 1.0f;
            if (any) {
                sum = fused(sum, factor, weight);
                largest = new_largest;
                weights[query][at] = weight;
                if (l == 0) rescale[query][block] = factor;
            }
        }
        sum = fold_16(sum);
        if (some && l == 0) {
            largest_of[query] = largest;
            sum_of[query] = sum;
        }
    }
    block_sync();

    // Values: a thread is a dimension, for some of the queries. Pages hold whole blocks, so a block's values are loaded
    // before any is used, whoever sees them.
    const u32 wide = smaller(head_dim, 256u), together = 256 / wide, first_query = thread() / wide;
    if (first_query >= together) return;
    for (u32 d = thread() - first_query * wide; d < head_dim; d += wide) {
        float sums[QUERIES] = {};
        for (u32 at = any_from / 16 * 16; at < any_to; at += 16) {
            const u32 p = begin + at;
            const u16 *value = value_of(shape.layout, pages[p / page_positions], kv_head, p % page_positions) + d;
            float values[16];
#pragma unroll
            for (u32 i = 0; i < 16; i++) values[i] = from_half(value[i * head_dim]);
#pragma unroll
            for (u32 i = 0; i < QUERIES; i++) {
                const u32 query = first_query + i * together;
                if (query < count) {
                    const u32 from = larger(from_of[query], at), to = smaller(to_of[query], at + 16);
                    if (from < to) {
                        // Bit i: whether the query sees position at + i.
                        const u32 seen = (1u << (to - at)) - (1u << (from - at));
                        sums[i] *= rescale[query][at / 16];
#pragma unroll
                        for (u32 j = 0; j < 16; j++) {
                            const float sum = fused(values[j], weights[query][at + j], sums[i]);
                            sums[i] = seen >> j & 1 ? sum : sums[i];
                        }
                    }
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < QUERIES; i++) {
            u32 query = first_query + i * together;
            if (query >= count || from_of[query] == to_of[query]) continue;
            u32 row = unit.first_row + query / unit_heads, head = first_head + query % unit_heads;
            if (attention::splits(rows[row]) == 1) {
                out[u64(row * shape.heads + head) * head_dim + d] = sums[i] * divide(1.0f, sum_of[query]);
                continue;
            }
            float *to = attention::partial_of(partial, shape, row, head) +
                        (split - attention::first_split(rows[row])) * (head_dim + BEHIND_SUMS);
            to[d] = sums[i];
            if (d == 0) {
                to[head_dim] = largest_of[query];
                to[head_dim + 1] = sum_of[query];
            }
        }
    }
}

// Puts the splits of each query together and quantizes the rows. Rows of one split are done already.
//
// Grid: (256 columns, rows from `to.first` on, those of the last panel with the last ones). Block: 256 threads.
KERNEL(256)
join_quantize(AttentionShape shape, const AttentionRow *rows, const float *out, const float *partial,
              QuantizedRows to) {
    __shared__ quantize::Memory memory;
    const u32 head_dim = shape.layout.head_dim, row = block_y();
    quantize::column(memory, to, to.first + row, block_x() * 256 + thread(), [&](u32 column) {
        const u32 splits = attention::splits(rows[row]);
        if (splits == 1) return out[u64(row) * to.cols + column];
        const u32 d = column % head_dim;
        const float *found = attention::partial_of(partial, shape, row, column / head_dim);
        float largest = from_bits(0xff800000);
        for (u32 split = 0; split < splits; split++)
            largest = larger(largest, found[split * (head_dim + BEHIND_SUMS) + head_dim]);
        float sum = 0.0f, value = 0.0f;
        for (u32 split = 0; split < splits; split++) {
            const float *of = found + split * (head_dim + BEHIND_SUMS);
            float weight = exponential(of[head_dim] - largest);
            sum = fused(of[head_dim + 1], weight, sum);
            value = fused(of[d], weight, value);
        }
        return value * divide(1.0f, sum);
    });
}
