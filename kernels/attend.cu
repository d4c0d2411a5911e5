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

constexpr u32 THREADS = SPLIT, BLOCK = 16, BLOCKS = SPLIT / BLOCK;
// Positions whose values are copied at a time, and dimensions of them.
constexpr u32 STEP = 32, PIECE = 128;

// How the threads of a block share the work for at most Q queries.
template <u32 Q> struct Tile {
    // A thread's scores: so many queries, and the even or the odd dimensions of so many neighbouring positions.
    static constexpr u32 SCORED = smaller(Q, 8u), POSITIONS = 2 * Q / SCORED;
    // Keys that are loaded before the first is used, as many as there are registers for: AHEAD times EACH dimensions.
    static constexpr u32 AHEAD = POSITIONS == 2 ? 8 : 1, EACH = POSITIONS == 2 ? 8 : 4;
    // A thread's sums: so many queries, and two dimensions.
    static constexpr u32 SUMMED = Q > 8 ? 8 : 2;
    // Copies of values under way at a time. Where there is no room for them other warps compute meanwhile.
    static constexpr u32 STAGES = Q > 8 ? 0 : Q > 4 ? 3 : 4;

    // A position's weights stand together. What is between them keeps the lanes of a warp off each other's banks.
    static constexpr u32 WEIGHTS_STRIDE = Q + (Q > 4 ? 4 : 0);
    static constexpr u32 weights_of(u32 position) { return position * WEIGHTS_STRIDE + position / 8 * 4; }
    // So do a dimension's queries, as many dimensions at a time as there is room for.
    static constexpr u32 QUERIES_STRIDE = Q + (Q > 8 ? 4 : 0), DIMS = 2048 / Q;
    static constexpr u32 QUERIES_AT = weights_of(SPLIT), VALUES_AT = QUERIES_AT + DIMS * QUERIES_STRIDE;
    static constexpr u32 WORDS = VALUES_AT + STAGES * STEP * PIECE / 2;
    // Where queries stood stand then, for each block and query: the largest score, that of this and all earlier
    // blocks, and what sums of earlier ones are multiplied with.
    static constexpr u32 LARGEST_AT = QUERIES_AT, RUNNING_AT = LARGEST_AT + BLOCKS * Q,
                         RESCALE_AT = RUNNING_AT + BLOCKS * Q;
    static_assert(RESCALE_AT + BLOCKS * Q <= VALUES_AT && VALUES_AT % 4 == 0);
};

// What the threads of a block share.
struct Memory {
    alignas(16) float words[larger(larger(Tile<4>::WORDS, Tile<8>::WORDS), Tile<32>::WORDS)];
    // Where the keys of each block of positions are.
    const u16 *keys[BLOCKS];
    // Positions that each query sees, the sum of its weights, and what its sums are multiplied with.
    u32 from[QUERIES], to[QUERIES];
    float sum[QUERIES], factor[QUERIES];
    // Where its sums go, if it sees any; and whether these are all that its row has.
    float *out[QUERIES];
    bool alone[QUERIES];
};

template <u32 n> struct alignas(4 * n) Pairs {
    u32 pair[n];
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
};

template <u32 Q> DEVICE void attend(Memory &memory, const Task &task, const AttentionRow *rows, const float *q,
                                    float *out, float *partial) {
    using T = Tile<Q>;
    const AttentionShape &shape = task.shape;
    const u32 head_dim = shape.layout.head_dim, page_positions = shape.layout.page_positions;
    const u32 count = task.unit.rows * task.unit_heads, begin = task.split * SPLIT;
    // Positions within the split that any query sees, and those that all see that see any.
    u32 any_from = SPLIT, any_to = 0, all_from = 0, all_to = SPLIT;
#pragma unroll 2
    for (u32 i = 0; i < task.unit.rows; i++) {
        const AttentionRow &row = rows[task.unit.first_row + i];
        const u32 from = larger(row.start, begin), to = smaller(row.position + 1, begin + SPLIT);
        if (from >= to) continue;
        any_from = smaller(any_from, from - begin), all_from = larger(all_from, from - begin);
        any_to = larger(any_to, to - begin), all_to = smaller(all_to, to - begin);
    }
    const u32 first_block = any_from / BLOCK, end_block = (any_to + BLOCK - 1) / BLOCK;
    if (thread() < Q) {
        u32 from = 0, to = 0;
        if (thread() < count) {
            const u32 index = task.unit.first_row + thread() / task.unit_heads,
                      head = task.first_head + thread() % task.unit_heads;
            const AttentionRow &row = rows[index];
            from = larger(row.start, begin), to = smaller(row.position + 1, begin + SPLIT);
            const bool alone = splits(row) == 1;
            memory.alone[thread()] = alone;
            memory.out[thread()] = alone ? out + u64(index * shape.heads + head) * head_dim
                                         : partial_of(partial, shape, index, head) +
                                               (task.split - first_split(row)) * (head_dim + BEHIND_SUMS);
        }
        if (from >= to) memory.out[thread()] = nullptr;
        memory.from[thread()] = from < to ? from - begin : 0;
        memory.to[thread()] = from < to ? to - begin : 0;
    }
    if (thread() >= first_block && thread() < end_block) {
        const u32 position = begin + thread() * BLOCK;
        const u16 *page = global(rows[task.unit.first_row].pages)[position / page_positions];
        memory.keys[thread()] = key_of(shape.layout, page, task.kv_head, position % page_positions);
    }

    // Values are copied for each step and piece of dimensions, some steps ahead of those that they are used in.
    const u32 values_behind = shape.layout.kv_heads * page_positions * head_dim;
    u32 *const stages = reinterpret_cast<u32 *>(memory.words + T::VALUES_AT);
    u32 copy_piece = 0, copy_at = any_from / STEP * STEP, copy_stage = 0;
    auto copy_next = [&] {
        const u32 parts = smaller(PIECE, head_dim - copy_piece) / 8, block = (copy_at + thread() / 8) / BLOCK;
        if (copy_piece < head_dim && block >= first_block && block < end_block) {
            const u16 *from = memory.keys[block] + values_behind + thread() / 8 % BLOCK * head_dim + copy_piece;
            u32 *to = stages + copy_stage * (STEP * PIECE / 2) + thread() / 8 * parts * 4;
#pragma unroll
            for (u32 part = thread() % 8; part < PIECE / 8; part += 8) {
                if (part < parts)
                    copy_async(reinterpret_cast<Sixteen *>(to) + part, reinterpret_cast<const Sixteen *>(from) + part);
            }
        }
        copies_end();
        copy_stage = (copy_stage + 1) % larger(T::STAGES, 1u);
        copy_at += STEP;
        if (copy_at < any_to) return;
        copy_at = any_from / STEP * STEP;
        copy_piece += PIECE;
    };

    // Scores. Even and odd dimensions run in two chains, which neighbouring lanes have.
    float *const queries = memory.words + T::QUERIES_AT;
    const u32 octets = THREADS / (Q / T::SCORED) / 2, odd = lane() % 2;
    const u32 first_position = thread() / 2 % octets * T::POSITIONS, first_scored = thread() / 2 / octets * T::SCORED;
    const bool any = first_position / BLOCK >= first_block && first_position / BLOCK < end_block;
    float scores[T::SCORED][T::POSITIONS] = {};
    for (u32 piece = 0; piece < head_dim; piece += T::DIMS) {
        const u32 dims = smaller(T::DIMS, head_dim - piece), query = thread() % Q;
        if (query < count) {
            const u32 row = task.unit.first_row + query / task.unit_heads,
                      head = task.first_head + query % task.unit_heads;
            const float *from = q + u64(row * shape.heads + head) * head_dim + piece;
#pragma unroll 1
            for (u32 d = thread() / Q * 4; d < dims; d += THREADS / Q * 4) {
                const Four some = *reinterpret_cast<const Four *>(from + d);
#pragma unroll
                for (u32 i = 0; i < 4; i++) queries[(d + i) * T::QUERIES_STRIDE + query] = some.of[i];
            }
        }
        block_sync();
        using Keys = Pairs<T::POSITIONS / 2>;
        const u16 *const keys_of_block = any ? memory.keys[first_position / BLOCK] : nullptr;
        const u16 *const keys = global(keys_of_block) + 16 * (piece + odd) + first_position % BLOCK;
        for (u32 first = 0; first < dims; first += 2 * T::EACH * T::AHEAD) {
            Keys some[T::AHEAD][T::EACH];
#pragma unroll
            for (u32 a = 0; a < T::AHEAD; a++) {
                if (any && first + 2 * T::EACH * a < dims) {
#pragma unroll
                    for (u32 d = 0; d < T::EACH; d++)
                        some[a][d] = *reinterpret_cast<const Keys *>(keys + 16 * (first + 2 * T::EACH * a + 2 * d));
                }
            }
            // The first values come in meanwhile.
            if (T::STAGES > 0 && piece + first == 0) {
                for (u32 i = 0; i + 1 < T::STAGES; i++) copy_next();
            }
#pragma unroll
            for (u32 a = 0; a < T::AHEAD; a++) {
                if (any && first + 2 * T::EACH * a < dims) {
#pragma unroll
                    for (u32 d = 0; d < T::EACH; d++) {
                        float *const of =
                            queries + (first + 2 * T::EACH * a + 2 * d + odd) * T::QUERIES_STRIDE + first_scored;
#pragma unroll
                        for (u32 i = 0; i < T::SCORED; i += 4) {
                            const Four four_queries = four(of + i);
#pragma unroll
                            for (u32 p = 0; p < T::POSITIONS; p++) {
                                const float key = from_half(some[a][d].pair[p / 2] >> 16 * (p % 2));
#pragma unroll
                                for (u32 j = 0; j < 4; j++)
                                    scores[i + j][p] = fused(key, four_queries.of[j], scores[i + j][p]);
                            }
                        }
                    }
                }
            }
        }
        block_sync();
    }
    // Of the two lanes, one puts the even and odd dimensions of the first positions together and one those of the
    // others.
    float *const weights = memory.words;
#pragma unroll
    for (u32 p = 0; p < T::POSITIONS / 2; p++) {
        float *const to = weights + T::weights_of(first_position + odd * T::POSITIONS / 2 + p) + first_scored;
#pragma unroll
        for (u32 i = 0; i < T::SCORED; i += 4) {
            Four some;
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const float first = scores[i + j][p], second = scores[i + j][p + T::POSITIONS / 2];
                some.of[j] = ((odd ? second : first) + float_xor(odd ? first : second, 1)) * shape.scale;
            }
            four(to + i) = some;
        }
    }
    block_sync();

    // The online softmax: a thread is a position. First the largest score of each block.
    float *const mine = weights + T::weights_of(thread()), *const largest = memory.words + T::LARGEST_AT,
                 *const running = memory.words + T::RUNNING_AT, *const rescale = memory.words + T::RESCALE_AT;
    const u32 my_block = thread() / BLOCK;
    if (shape.softcap != 0.0f) {
#pragma unroll 1
        for (u32 i = 0; i < count; i++) mine[i] = hyperbolic_tangent(divide(mine[i], shape.softcap)) * shape.softcap;
    }
    constexpr u32 AT_ONCE = smaller(Q, 16u);
    // Bit i: whether query i sees this position.
    u32 seen = 0;
#pragma unroll
    for (u32 first = 0; first < Q; first += AT_ONCE) {
        float some[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            const bool sees = thread() >= memory.from[first + i] && thread() < memory.to[first + i];
            some[i] = sees ? mine[first + i] : from_bits(0xff800000);
            seen |= u32(sees) << (first + i);
        }
        const float found = largest_of(some);
        constexpr u32 SAME = 16 / AT_ONCE;
        if (lane() % SAME == 0) largest[my_block * Q + first + lane() % 16 / SAME] = found;
    }
    block_sync();
    for (u32 i = thread(); i < BLOCKS * Q; i += THREADS) {
        const u32 block = i / Q, query = i % Q;
        float before = from_bits(0xff800000);
#pragma unroll
        for (u32 b = 0; b + 1 < BLOCKS; b++) {
            const float found = largest[b * Q + query];
            before = b < block ? larger(found, before) : before;
        }
        const float now = larger(largest[block * Q + query], before);
        running[i] = now;
        rescale[i] = now != before ? exponential(before - now) : 1.0f;
    }
    block_sync();
#pragma unroll
    for (u32 i = 0; i < Q; i++) mine[i] = seen >> i & 1 ? exponential(mine[i] - running[my_block * Q + i]) : 0.0f;
    block_sync();
    // The sums of the weights, by those that have the least to do with values: 16 lanes a query, which a block that a
    // query does not see leaves as they are.
    for (u32 i = THREADS - 1 - thread(); i < BLOCK * Q; i += THREADS) {
        const u32 query = i / BLOCK;
        float sum = 0.0f;
#pragma unroll
        for (u32 block = 0; block < BLOCKS; block++)
            sum = fused(sum, rescale[block * Q + query],
                        weights[T::weights_of(block * BLOCK + BLOCK - 1 - i % BLOCK) + query]);
        sum = fold_16(sum);
        if (i % BLOCK == 0) {
            memory.sum[query] = sum;
            memory.factor[query] = memory.alone[query] ? divide(1.0f, sum) : 1.0f;
        }
    }
    if (T::STAGES == 0) block_sync();

    // Values: a thread is two dimensions, for some of the queries.
    u32 stage = 0;
    for (u32 piece = 0; piece < head_dim; piece += PIECE) {
        const u32 width = smaller(PIECE, head_dim - piece), pairs = width / 2, pair = thread() % pairs;
        const u32 first_query = thread() / pairs * T::SUMMED;
        const bool busy = first_query < smaller(Q, count);
        float sums[T::SUMMED][2] = {};
        for (u32 step = any_from / STEP * STEP; step < any_to; step += STEP) {
            if constexpr (T::STAGES > 0) {
                copies_done<T::STAGES - 2>();
                block_sync();
                copy_next();
            }
#pragma unroll 1
            for (u32 at = step; at < step + STEP; at += BLOCK) {
                if (!busy || at + BLOCK <= any_from || at >= any_to) continue;
                const u32 *from, stride = T::STAGES > 0 ? pairs : head_dim / 2;
                if constexpr (T::STAGES > 0)
                    from = stages + stage * (STEP * PIECE / 2) + (at - step) * pairs + pair;
                else
                    from =
                        reinterpret_cast<const u32 *>(global(memory.keys[at / BLOCK]) + values_behind + piece) + pair;
                const float *const of = weights + T::weights_of(at) + first_query, *const factors = rescale +
                                                                                                    at / BLOCK * Q +
                                                                                                    first_query;
#pragma unroll
                for (u32 i = 0; i < T::SUMMED; i++) {
                    sums[i][0] *= factors[i];
                    sums[i][1] *= factors[i];
                }
                if (all_from > larger(at, any_from) || all_to < smaller(at + BLOCK, any_to)) {
                    // Rows see different positions of this block.
#pragma unroll 1
                    for (u32 j = 0; j < BLOCK; j++) {
                        const float low = from_half(from[j * stride]), high = from_half(from[j * stride] >> 16);
#pragma unroll
                        for (u32 i = 0; i < T::SUMMED; i++) {
                            const float weight = of[T::weights_of(j) + i];
                            if (at + j < memory.from[first_query + i] || at + j >= memory.to[first_query + i]) continue;
                            sums[i][0] = fused(low, weight, sums[i][0]);
                            sums[i][1] = fused(high, weight, sums[i][1]);
                        }
                    }
                    continue;
                }
                u32 values[BLOCK];
#pragma unroll
                for (u32 i = 0; i < BLOCK; i++) values[i] = from[i * stride];
                if (at < any_from || at + BLOCK > any_to) {
                    // Minus zero times no weight, added to whatever it may be, leaves it as it is.
#pragma unroll
                    for (u32 j = 0; j < BLOCK; j++)
                        values[j] = at + j >= any_from && at + j < any_to ? values[j] : 0x80008000;
                }
#pragma unroll
                for (u32 j = 0; j < BLOCK; j++) {
                    const float low = from_half(values[j]), high = from_half(values[j] >> 16);
#pragma unroll
                    for (u32 i = 0; i < T::SUMMED; i++) {
                        const float weight = of[T::weights_of(j) + i];
                        sums[i][0] = fused(low, weight, sums[i][0]);
                        sums[i][1] = fused(high, weight, sums[i][1]);
                    }
                }
            }
            if constexpr (T::STAGES > 0) stage = (stage + 1) % T::STAGES;
        }
#pragma unroll
        for (u32 i = 0; i < T::SUMMED; i++) {
            const u32 query = first_query + i, d = piece + 2 * pair;
            float *const to = busy ? memory.out[query] : nullptr;
            if (!to) continue;
            to[d] = sums[i][0] * memory.factor[query];
            to[d + 1] = sums[i][1] * memory.factor[query];
            if (d > 0 || memory.alone[query]) continue;
            to[head_dim] = running[(BLOCKS - 1) * Q + query];
            to[head_dim + 1] = memory.sum[query];
        }
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
    const u32 count = task.unit.rows * task.unit_heads;
    if (count <= 4)
        attention::attend<4>(memory, task, rows, q, out, partial);
    else if (count <= 8)
        attention::attend<8>(memory, task, rows, q, out, partial);
    else
        attention::attend<32>(memory, task, rows, q, out, partial);
}

namespace attention {
// What the splits of a row have found of four columns, put together. A warp calls this, with neighbouring fours.
DEVICE Four join(const AttentionShape &shape, const float *partial, u32 row, u32 splits, u32 column) {
    // Splits whose sums are loaded before the first is needed; of four of them each of four lanes has the weight.
    constexpr u32 TOGETHER = 8;
    const u32 head_dim = shape.layout.head_dim, stride = head_dim + BEHIND_SUMS;
    const float *found = partial_of(partial, shape, row, column / head_dim);
    float largest = from_bits(0xff800000);
    for (u32 split = lane() % 4; split < splits; split += 4)
        largest = larger(largest, found[split * stride + head_dim]);
    largest = max_lanes<4>(largest);
    float sum = 0.0f;
    Four value = {};
    for (u32 first = 0; first < splits; first += TOGETHER) {
        Pairs<2> sums[TOGETHER][2];
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            const float *of = found + smaller(first + i, splits - 1) * stride + column % head_dim;
#pragma unroll
            for (u32 half = 0; half < 2; half++) sums[i][half] = reinterpret_cast<const Pairs<2> *>(of)[half];
        }
        float weights[TOGETHER / 4], weight_sums[TOGETHER / 4];
#pragma unroll
        for (u32 i = 0; i < TOGETHER / 4; i++) {
            const float *of = found + smaller(first + 4 * i + lane() % 4, splits - 1) * stride + head_dim;
            weights[i] = exponential(of[0] - largest);
            weight_sums[i] = of[1];
        }
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            const u32 from = lane() / 4 * 4 + i % 4;
            const float weight = from_bits(lane_at(bits_of(weights[i / 4]), from));
            const float weight_sum = from_bits(lane_at(bits_of(weight_sums[i / 4]), from));
            if (first + i >= splits) continue;
            sum = fused(weight_sum, weight, sum);
#pragma unroll
            for (u32 j = 0; j < 4; j++) value.of[j] = fused(from_bits(sums[i][j / 2].pair[j % 2]), weight, value.of[j]);
        }
    }
    const float factor = divide(1.0f, sum);
#pragma unroll
    for (u32 j = 0; j < 4; j++) value.of[j] *= factor;
    return value;
}
} // namespace attention

// Puts the splits of each query together and quantizes the rows. Rows of one split are done already.
//
// Grid: (128 columns a warp, rows from `to.first` on, those of the last panel with the last ones). Block: pairs of
// warps.
KERNEL(256)
join_quantize(AttentionShape shape, const AttentionRow *rows, const float *out, const float *partial,
              QuantizedRows to) {
    __shared__ quantize::Memory memory;
    const u32 row = block_y(), column = 4 * (block_x() * threads() + thread());
    Four value = {};
    if (to.first + row < to.rows) {
        const u32 splits = attention::splits(rows[row]);
        if (splits == 1) {
            value = load_four(out + u64(row) * to.cols, column, to.cols);
        } else {
            // Lanes without columns take others' and lead to nothing.
            value = attention::join(shape, partial, row, splits, smaller(column, to.cols - 4));
        }
    }
    quantize::columns(memory, to, to.first + row, column, value);
}
