// Attention of a few queries over the pages of one key-value head, split over the context.
//
// A split is 256 aligned absolute positions, in blocks of 16, with an online softmax from block to
// block (Milakov and Gimelshein, 2018): the CPU's arithmetic, bit for bit, as long as a query's
// positions lie within one split. What several splits found is put together in their order by
// join_quantize, so the order follows from positions alone, never from pages or the batch; there it
// rounds otherwise than the CPU, which has one softmax over all blocks.
//
// The queries of a block share what they load: heads of one group, of neighbouring rows of a session.
//
// Grid: (split of the unit, key-value head and 8 heads of its group, unit). Block: 256 threads.
#include "attention.h"

namespace attention {
constexpr u32 THREADS = SPLIT, BLOCK = 16, BLOCKS = SPLIT / BLOCK;

// What the threads of a block share for at most Q queries, as words behind each other.
template <u32 Q> struct Places {
    // The weights of a position stand together. What is between them keeps the lanes of a warp off each other's banks.
    static constexpr u32 STRIDE = Q + (Q > 4 ? 4 : 0);
    static constexpr u32 weight(u32 position) { return position * STRIDE + position / 8 * 4; }
    // So do a dimension's queries, as many dimensions at a time as there is room for.
    static constexpr u32 DIMS = 2048 / Q, QUERIES_STRIDE = Q + (Q > 8 ? 4 : 0);
    static constexpr u32 QUERIES_AT = weight(SPLIT), END = QUERIES_AT + DIMS * QUERIES_STRIDE;
    // Where queries stood stand then, for each block and query: the largest score, that of this and all earlier
    // blocks, and what sums of earlier ones are multiplied with.
    static constexpr u32 LARGEST = QUERIES_AT, RUNNING = LARGEST + BLOCKS * Q, RESCALE = RUNNING + BLOCKS * Q;
    static_assert(RESCALE + BLOCKS * Q <= END && END % 4 == 0);
};

// Where there is room, values are copied step by step into stages in turn, some steps ahead of those that they are used
// in: so many positions, and dimensions of them.
constexpr u32 POSITIONS = 32, PIECE = 128, STAGE = POSITIONS * PIECE / 2;
template <u32 Q> constexpr u32 STAGES = Q > 8 ? 0 : Q > 4 ? 3 : 4;

// Positions within the split that any query sees, and those that all see that see any; and the blocks that have these.
struct Seen {
    u32 any_from, any_to, all_from, all_to, first_block, end_block;

    // Whether all queries see the same of these positions.
    DEVICE_MEMBER bool alike(u32 from, u32 to) const {
        return all_from <= larger(from, any_from) && all_to >= smaller(to, any_to);
    }
    DEVICE_MEMBER bool has(u32 block) const { return block >= first_block && block < end_block; }
};

struct Memory {
    alignas(16) float words[larger(Places<32>::END,
                                   larger(Places<4>::END + STAGES<4> * STAGE, Places<8>::END + STAGES<8> * STAGE))];
    // Where the keys of each block of positions are.
    const u16 *keys[BLOCKS];
    // Positions that each query sees, the sum of its weights, and what its sums are multiplied with.
    alignas(16) u32 from[QUERIES], to[QUERIES];
    float sum[QUERIES], factor[QUERIES];
    // Where its sums go, if it sees any; and whether these are all that its row has.
    float *out[QUERIES];
    bool alone[QUERIES];
    Seen seen;
};

DEVICE Four &four(float *at) { return *reinterpret_cast<Four *>(at); }

// The largest of each of N <= 16 values over 16 neighbouring lanes: of value i in the lanes from 16 / N * i on. Each
// exchange halves what is left of them.
template <u32 N> DEVICE float largest_of(float (&a)[N]) {
    u32 left = N;
#pragma unroll
    for (u32 mask = 8; mask > 0; mask /= 2) {
        if (left == 1) {
            a[0] = larger(a[0], float_xor(a[0], mask));
            continue;
        }
        left /= 2;
        const bool upper = lane() & mask;
#pragma unroll
        for (u32 i = 0; i < left; i++) {
            const float low = a[i], high = a[i + left];
            a[i] = larger(upper ? high : low, float_xor(upper ? low : high, mask));
        }
    }
    return a[0];
}

// What a block of threads is asked for.
struct Task {
    AttentionShape shape;
    AttentionUnit unit;
    u32 kv_head, first_head, unit_heads, split;

    DEVICE_MEMBER u32 count() const { return unit.rows * unit_heads; }
    DEVICE_MEMBER u32 row(u32 query) const { return unit.first_row + query / unit_heads; }
    DEVICE_MEMBER u32 head(u32 query) const { return first_head + query % unit_heads; }
};

// Fills in what all threads have to know of the queries and the pages.
template <u32 Q>
DEVICE Seen prepare(Memory &memory, const Task &task, const AttentionRow *rows, float *out, float *partial) {
    const KvLayout &layout = task.shape.layout;
    const u32 begin = task.split * SPLIT, end = begin + SPLIT;
    Seen seen = {SPLIT, 0, 0, SPLIT, 0, 0};
#pragma unroll 1
    for (u32 i = 0; i < task.unit.rows; i++) {
        const AttentionRow &row = rows[task.unit.first_row + i];
        const u32 from = larger(row.start, begin), to = smaller(row.position + 1, end);
        if (from >= to) continue;
        seen.any_from = smaller(seen.any_from, from - begin), seen.all_from = larger(seen.all_from, from - begin);
        seen.any_to = larger(seen.any_to, to - begin), seen.all_to = smaller(seen.all_to, to - begin);
    }
    seen.first_block = seen.any_from / BLOCK;
    seen.end_block = (seen.any_to + BLOCK - 1) / BLOCK;
    // The pages by other warps than the queries, so that they wait at the same time.
    const u32 block = thread() - THREADS / 2;
    if (block < BLOCKS && seen.has(block)) {
        const u32 position = begin + block * BLOCK, page = position / layout.page_positions;
        memory.keys[block] = key_of(layout, global(rows[task.unit.first_row].pages)[page], task.kv_head,
                                    position - page * layout.page_positions);
    }
    if (thread() < Q) {
        u32 from = 0, to = 0;
        if (thread() < task.count()) {
            const u32 index = task.row(thread()), head = task.head(thread());
            const AttentionRow &row = rows[index];
            from = larger(row.start, begin), to = smaller(row.position + 1, end);
            const bool alone = splits(row) == 1;
            memory.alone[thread()] = alone;
            memory.out[thread()] = alone ? out + u64(index * task.shape.heads + head) * layout.head_dim
                                         : partial_of(partial, task.shape, index, head) +
                                               (task.split - first_split(row)) * (layout.head_dim + BEHIND_SUMS);
        }
        if (from >= to) memory.out[thread()] = nullptr;
        memory.from[thread()] = from < to ? from - begin : 0;
        memory.to[thread()] = from < to ? to - begin : 0;
    }
    if (thread() == 0) memory.seen = seen;
    return seen;
}

// The query that this thread shows to the others; none if there are fewer.
template <u32 Q> DEVICE const float *shown_query(const Task &task, const float *q) {
    const u32 query = thread() % Q;
    if (query >= task.count()) return nullptr;
    return q + u64(task.row(query) * task.shape.heads + task.head(query)) * task.shape.layout.head_dim;
}
// Writes the queries' dimensions from `first` on where all threads find them.
template <u32 Q> DEVICE void show_queries(Memory &memory, const float *mine, u32 head_dim, u32 first) {
    using P = Places<Q>;
    if (!mine) return;
    const u32 dims = smaller(P::DIMS, head_dim - first);
#pragma unroll 1
    for (u32 d = thread() / Q * 4; d < dims; d += THREADS / Q * 4) {
        const Four some = *reinterpret_cast<const Four *>(mine + first + d);
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            memory.words[P::QUERIES_AT + (d + i) * P::QUERIES_STRIDE + thread() % Q] = some.of[i];
    }
}

// Of two lanes that have the even and the odd dimensions' scores of N queries at neighbouring positions, one puts both
// together for the first half of the positions, and one for the second.
template <u32 Q, u32 N, u32 M>
DEVICE void put_scores(Memory &memory, const Task &task, const float (&scores)[N][M], u32 position, u32 query) {
    const bool odd = lane() % 2;
#pragma unroll
    for (u32 p = 0; p < M / 2; p++) {
        float *const to = memory.words + Places<Q>::weight(position + odd * M / 2 + p) + query;
#pragma unroll
        for (u32 i = 0; i < N; i += 4) {
            Four some;
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const float first = scores[i + j][p], second = scores[i + j][p + M / 2];
                some.of[j] = ((odd ? second : first) + float_xor(odd ? first : second, 1)) * task.shape.scale;
            }
            four(to + i) = some;
        }
    }
}

// The online softmax: from scores to weights, where they stand. A thread is a position. All see the scores already, and
// only some of them the weights' sums when this returns.
template <u32 Q> DEVICE void soften(Memory &memory, const Task &task, const Seen &seen) {
    using P = Places<Q>;
    constexpr u32 AT_ONCE = smaller(Q, 16u);
    const float never = from_bits(0xff800000);
    float *const weights = memory.words, *const mine = weights + P::weight(thread());
    float *const largest = memory.words + P::LARGEST, *const running = memory.words + P::RUNNING;
    float *const rescale = memory.words + P::RESCALE;
    const u32 my_block = thread() / BLOCK;
    if (task.shape.softcap != 0.0f) {
#pragma unroll 1
        for (u32 i = 0; i < Q; i++)
            mine[i] = hyperbolic_tangent(divide(mine[i], task.shape.softcap)) * task.shape.softcap;
    }
    // Bit i: whether query i sees this position.
    u32 sees = thread() >= seen.all_from && thread() < seen.all_to ? 0xffffffff : 0;
    if (sees == 0 && thread() >= seen.any_from && thread() < seen.any_to) {
#pragma unroll 1
        for (u32 i = 0; i < Q; i++) sees |= u32(thread() >= memory.from[i] && thread() < memory.to[i]) << i;
    }
    // The largest score of each block.
#pragma unroll
    for (u32 first = 0; first < Q; first += AT_ONCE) {
        float some[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i += 4) {
            const Four scores = four(mine + first + i);
#pragma unroll
            for (u32 j = 0; j < 4; j++) some[i + j] = sees >> (first + i + j) & 1 ? scores.of[j] : never;
        }
        const float found = largest_of(some);
        constexpr u32 SAME = 16 / AT_ONCE;
        if (lane() % SAME == 0) largest[my_block * Q + first + lane() % 16 / SAME] = found;
    }
    block_sync();
    for (u32 i = thread(); i < BLOCKS * Q; i += THREADS) {
        const u32 block = i / Q, query = i % Q;
        float before = never;
#pragma unroll 4
        for (u32 b = 0; b < block; b++) before = larger(largest[b * Q + query], before);
        const float now = larger(largest[i], before);
        running[i] = now;
        rescale[i] = now != before ? exponential(before - now) : 1.0f;
    }
    block_sync();
#pragma unroll
    for (u32 i = 0; i < Q; i += 4) {
        const Four until = four(running + my_block * Q + i);
        Four weight = four(mine + i);
#pragma unroll
        for (u32 j = 0; j < 4; j++) weight.of[j] = sees >> (i + j) & 1 ? exponential(weight.of[j] - until.of[j]) : 0.0f;
        four(mine + i) = weight;
    }
    block_sync();
    // The sums of the weights, 16 lanes a query, by the threads that have the least to do with values. Blocks that a
    // query does not see leave its sum as it is.
    for (u32 i = THREADS - 1 - thread(); i < BLOCK * Q; i += THREADS) {
        const u32 query = i / BLOCK;
        float sum = 0.0f;
#pragma unroll 4
        for (u32 block = 0; block < BLOCKS; block++)
            sum = fused(sum, rescale[block * Q + query], weights[P::weight(block * BLOCK + i % BLOCK) + query]);
        sum = fold_16(sum);
        if (i % BLOCK == 0) {
            memory.sum[query] = sum;
            memory.factor[query] = memory.alone[query] ? divide(1.0f, sum) : 1.0f;
        }
    }
}

// Some queries' sums of some dimensions of values.
template <u32 Q, u32 SUMMED, u32 WIDE> struct Sums {
    float of[SUMMED][WIDE] = {};

    // Adds N positions from `at` on, all of one block.
    template <u32 N> DEVICE_MEMBER void add(const Memory &memory, const Seen &seen, u32 first_query, u32 at,
                                            Pairs<WIDE / 2> (&values)[N]) {
        using P = Places<Q>;
        const float *const weights = memory.words + P::weight(at) + first_query;
        if (at % BLOCK == 0) {
#pragma unroll
            for (u32 i = 0; i < SUMMED; i++) {
                const float factor = memory.words[P::RESCALE + at / BLOCK * Q + first_query + i];
#pragma unroll
                for (u32 d = 0; d < WIDE; d++) of[i][d] *= factor;
            }
        }
        if (seen.alike(at, at + N)) {
            if (at < seen.any_from || at + N > seen.any_to) {
                // Minus zero times no weight, added to whatever it may be, leaves it as it is.
#pragma unroll
                for (u32 j = 0; j < N; j++) {
                    const bool some = at + j >= seen.any_from && at + j < seen.any_to;
#pragma unroll
                    for (u32 d = 0; d < WIDE / 2; d++) values[j].pair[d] = some ? values[j].pair[d] : 0x80008000;
                }
            }
#pragma unroll
            for (u32 j = 0; j < N; j++) {
#pragma unroll
                for (u32 i = 0; i < SUMMED; i++) add_one(i, values[j], weights[P::weight(j) + i]);
            }
            return;
        }
        // Rows see different positions of these.
#pragma unroll
        for (u32 i = 0; i < SUMMED; i++) {
            const u32 from = memory.from[first_query + i], to = memory.to[first_query + i];
#pragma unroll
            for (u32 j = 0; j < N; j++)
                if (at + j >= from && at + j < to) add_one(i, values[j], weights[P::weight(j) + i]);
        }
    }

    // Puts them where they belong, dimensions from d on.
    DEVICE_MEMBER void put(const Memory &memory, u32 head_dim, u32 first_query, u32 d) const {
#pragma unroll
        for (u32 i = 0; i < SUMMED; i++) {
            const u32 query = first_query + i;
            float *const to = memory.out[query];
            if (!to) continue;
#pragma unroll
            for (u32 k = 0; k < WIDE; k++) to[d + k] = of[i][k] * memory.factor[query];
            if (d > 0 || memory.alone[query]) continue;
            to[head_dim] = memory.words[Places<Q>::RUNNING + (BLOCKS - 1) * Q + query];
            to[head_dim + 1] = memory.sum[query];
        }
    }

  private:
    DEVICE_MEMBER void add_one(u32 i, const Pairs<WIDE / 2> &values, float weight) {
#pragma unroll
        for (u32 d = 0; d < WIDE; d++)
            of[i][d] = fused(from_half(values.pair[d / 2] >> 16 * (d % 2)), weight, of[i][d]);
    }
};

// A few queries: what takes long is waiting, so all is loaded well ahead.
template <u32 Q> DEVICE void attend_few(Memory &memory, const Task &task, const AttentionRow *rows, const float *q,
                                        float *out, float *partial) {
    using P = Places<Q>;
    // A thread's scores are of all queries, and of the even or the odd dimensions of two positions, of which so many
    // are loaded before the first is used; its sums are of some queries and two dimensions.
    constexpr u32 AHEAD = 64, SURE = 8, SUMMED = 2, WIDE = 2;
    const u32 head_dim = task.shape.layout.head_dim, odd = lane() % 2;
    const Seen seen = prepare<Q>(memory, task, rows, out, partial);
    const float *const mine = shown_query<Q>(task, q);
    show_queries<Q>(memory, mine, head_dim, 0);
    block_sync();

    const u32 values_behind = task.shape.layout.kv_heads * task.shape.layout.page_positions * head_dim;
    const u32 first_position = seen.any_from / POSITIONS * POSITIONS;
    float *const stages = memory.words + P::END;
    // The values that are copied next, and the steps so far.
    u32 copied_piece = 0, copied_from = first_position, copies = 0;
    auto copy = [&]() INLINED {
        Sixteen *const to = reinterpret_cast<Sixteen *>(stages + copies % STAGES<Q> * STAGE) + thread();
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 part = i * THREADS + thread(), position = copied_from + part / 16;
            const u32 d = copied_piece + part % 16 * 8;
            if (seen.has(position / BLOCK) && d < head_dim)
                copy_async(to + i * THREADS,
                           reinterpret_cast<const Sixteen *>(memory.keys[position / BLOCK] + values_behind +
                                                             position % BLOCK * head_dim + d));
        }
        copies_end();
        copies++;
        copied_from += POSITIONS;
        if (copied_from < seen.any_to) return;
        copied_from = first_position;
        copied_piece += PIECE;
    };

    const bool any = seen.has(thread() / BLOCK);
    const u16 *const of_block = any ? memory.keys[thread() / BLOCK] : nullptr;
    const u16 *const keys = global(of_block) + 16 * odd + thread() / 2 * 2 % BLOCK;
    float scores[Q][2] = {};
#pragma unroll 1
    for (u32 first = 0; first < head_dim; first += 2 * AHEAD) {
        u32 ahead[AHEAD];
#pragma unroll
        for (u32 d = 0; d < AHEAD; d++)
            if (any && first + d / SURE * SURE * 2 < head_dim)
                ahead[d] = *reinterpret_cast<const u32 *>(keys + 16 * (first + 2 * d));
        if (first == 0) {
            // The first values come in meanwhile.
#pragma unroll 1
            for (u32 i = 0; i + 1 < STAGES<Q>; i++) copy();
        } else if (first % P::DIMS == 0) {
            block_sync();
            show_queries<Q>(memory, mine, head_dim, first);
            block_sync();
        }
        const float *const queries = memory.words + P::QUERIES_AT + (first % P::DIMS + odd) * P::QUERIES_STRIDE;
#pragma unroll
        for (u32 d = 0; d < AHEAD; d++) {
            if (!any || first + d / SURE * SURE * 2 >= head_dim) continue;
#pragma unroll
            for (u32 i = 0; i < Q; i++) {
                const float query = queries[2 * d * P::QUERIES_STRIDE + i];
                scores[i][0] = fused(from_half(ahead[d]), query, scores[i][0]);
                scores[i][1] = fused(from_half(ahead[d] >> 16), query, scores[i][1]);
            }
        }
    }
    put_scores<Q>(memory, task, scores, thread() / 2 * 2, 0);
    block_sync();
    soften<Q>(memory, task, seen);

    const u32 first_query = thread() / (PIECE / WIDE) * SUMMED, run = thread() % (PIECE / WIDE);
    u32 step = 0;
#pragma unroll 1
    for (u32 piece = 0; piece < head_dim; piece += PIECE) {
        const bool busy = first_query < Q && piece + run * WIDE < head_dim;
        Sums<Q, SUMMED, WIDE> sums;
#pragma unroll 1
        for (u32 from = first_position; from < seen.any_to; from += POSITIONS, step++) {
            copies_done<STAGES<Q> - 2>();
            // All are done with the last step's then, too.
            block_sync();
            copy();
            const u32 *stage = reinterpret_cast<const u32 *>(stages + step % STAGES<Q> * STAGE) + run;
#pragma unroll 1
            for (u32 at = from; at < from + POSITIONS; at += BLOCK, stage += BLOCK * PIECE / 2) {
                if (!busy || !seen.has(at / BLOCK)) continue;
                Pairs<WIDE / 2> values[BLOCK];
#pragma unroll
                for (u32 i = 0; i < BLOCK; i++) values[i].pair[0] = stage[i * (PIECE / 2)];
                sums.add(memory, seen, first_query, at, values);
            }
        }
        if (busy) sums.put(memory, head_dim, first_query, piece + run * WIDE);
    }
}

// Many queries, which are multiplied with all that is loaded: a thread has as many of both as there are registers for.
template <u32 Q> DEVICE void attend_many(Memory &memory, const Task &task, const AttentionRow *rows, const float *q,
                                         float *out, float *partial) {
    using P = Places<Q>;
    // Scores of so many queries, and of the even or the odd dimensions of so many neighbouring positions; dimensions
    // are loaded so many ahead.
    constexpr u32 SCORED = 8, WITH = 8, BATCH = 4;
    static_assert(THREADS == 2 * (SPLIT / WITH) * (Q / SCORED));
    // Sums of so many queries and dimensions; values of so many positions are loaded while as many are used.
    constexpr u32 SUMMED = 8, WIDE = 2, LOADED = 8;
    static_assert(THREADS == PIECE / WIDE * (Q / SUMMED));
    const u32 head_dim = task.shape.layout.head_dim, odd = lane() % 2;
    prepare<Q>(memory, task, rows, out, partial);
    const float *const mine = shown_query<Q>(task, q);
    show_queries<Q>(memory, mine, head_dim, 0);
    block_sync();
    // There are no registers for it.
    const Seen &seen = memory.seen;
    {
        const u32 position = thread() / 2 % (SPLIT / WITH) * WITH, query = thread() / 2 / (SPLIT / WITH) * SCORED;
        const bool any = seen.has(position / BLOCK);
        const u16 *const of_block = any ? memory.keys[position / BLOCK] : nullptr;
        const u16 *const keys = global(of_block) + 16 * odd + position % BLOCK;
        using Keys = Pairs<WITH / 2>;
        Keys ahead[BATCH];
        auto load = [&](u32 i, u32 first) INLINED {
            if (any && first < head_dim) ahead[i] = *reinterpret_cast<const Keys *>(keys + 16 * (first + 2 * i));
        };
        float scores[SCORED][WITH] = {};
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) load(i, 0);
#pragma unroll 1
        for (u32 first = 0; first < head_dim; first += 2 * BATCH) {
            if (first > 0 && first % P::DIMS == 0) {
                block_sync();
                show_queries<Q>(memory, mine, head_dim, first);
                block_sync();
            }
            const float *const queries =
                memory.words + P::QUERIES_AT + (first % P::DIMS + odd) * P::QUERIES_STRIDE + query;
            if (!any) continue;
#pragma unroll
            for (u32 d = 0; d < BATCH; d++) {
                const Keys some = ahead[d];
                load(d, first + 2 * BATCH);
#pragma unroll
                for (u32 i = 0; i < SCORED; i++) {
#pragma unroll
                    for (u32 j = 0; j < WITH; j++)
                        scores[i][j] = fused(from_half(some.pair[j / 2] >> 16 * (j % 2)),
                                             queries[2 * d * P::QUERIES_STRIDE + i], scores[i][j]);
                }
            }
        }
        block_sync();
        put_scores<Q>(memory, task, scores, position, query);
    }
    block_sync();
    soften<Q>(memory, task, seen);
    block_sync();

    const u32 values_behind = task.shape.layout.kv_heads * task.shape.layout.page_positions * head_dim;
    const u32 first_query = thread() / (PIECE / WIDE) * SUMMED, run = thread() % (PIECE / WIDE);
    const u32 begin = seen.any_from / LOADED * LOADED;
#pragma unroll 1
    for (u32 d = run * WIDE; d < head_dim; d += PIECE) {
        using Values = Pairs<WIDE / 2>;
        auto load = [&](Values(&to)[LOADED], u32 at) INLINED {
            if (at >= seen.any_to) return;
            const u16 *const keys = memory.keys[at / BLOCK];
            const u16 *const from = global(keys) + values_behind + at % BLOCK * head_dim + d;
#pragma unroll
            for (u32 i = 0; i < LOADED; i++) to[i] = *reinterpret_cast<const Values *>(from + i * head_dim);
        };
        Sums<Q, SUMMED, WIDE> sums;
        Values some[LOADED], more[LOADED];
        load(some, begin);
#pragma unroll 1
        for (u32 at = begin; at < seen.any_to; at += 2 * LOADED) {
            load(more, at + LOADED);
            sums.add(memory, seen, first_query, at, some);
            load(some, at + 2 * LOADED);
            if (at + LOADED < seen.any_to) sums.add(memory, seen, first_query, at + LOADED, more);
        }
        sums.put(memory, head_dim, first_query, d);
    }
}
} // namespace attention

KERNEL(attention::THREADS, 2)
attend(AttentionShape shape, const AttentionUnit *units, const AttentionRow *rows, const float *q, float *out,
       float *partial) {
    __shared__ attention::Memory memory;
    const u32 group = shape.heads / shape.layout.kv_heads;
    const u32 parts = (group + shape.unit_heads - 1) / shape.unit_heads;
    attention::Task task;
    task.shape = shape;
    task.unit = units[block_z()];
    task.kv_head = block_y() / parts;
    task.first_head = task.kv_head * group + block_y() % parts * shape.unit_heads;
    task.unit_heads = smaller(shape.unit_heads, group - block_y() % parts * shape.unit_heads);
    // Rows of a unit stand in the order of their positions.
    task.split = attention::first_split(rows[task.unit.first_row]) + block_x();
    if (task.split * SPLIT > rows[task.unit.first_row + task.unit.rows - 1].position) return;
    if (task.count() <= 4)
        attention::attend_few<4>(memory, task, rows, q, out, partial);
    else if (task.count() <= 8)
        attention::attend_few<8>(memory, task, rows, q, out, partial);
    else
        attention::attend_many<32>(memory, task, rows, q, out, partial);
}
