// Many rows of activations times the rows of a matrix with blocks of 32, by the tensor cores' products of halves.
//
// A block takes 128 weight rows and up to 128 rows of the batch, so that each byte that comes from far serves many
// products. While one run of columns is multiplied, the activations of the next one are copied, and its weights decoded
// into what the lanes of mma take, in memory that the run before has left. Weights are copied as they lie, some runs
// together, since the pieces of 16 bytes that they come in are cut otherwise than blocks. A warp takes 32 weight rows
// and 64 rows of the batch: more sums would leave no registers for a second block on the same processor, which
// multiplies while the first one waits.
//
// Halves have all the integers of weights and activations (up to 2048), and the sums of their products over a run stay
// below 2^24: so they are exact as floats, which the chain behind them takes as they are (dots.h). Products of signed
// bytes would be twice as fast, but an integer of activations takes two of them, and making a float of the integers
// that they give is most of what a product costs then.
//
// Tiles are taken for one matrix, so that blocks have all the rows that they may.
//
// Grid: (128 rows of all tiles, 1, 128 rows of the batch). Block: 256 threads, and SHARED_BYTES that the launch gives.
#include "fragments.h"

namespace matmul {
// A block's warps, and those of them that have different rows of weights.
constexpr u32 WARPS = 8, ROW_WARPS = 4;
// Fragments of 16 rows and panels of a warp; panels whose products are begun before those of others are taken up.
constexpr u32 FRAGMENTS = 2, PANELS = 8, TOGETHER = 2;
constexpr u32 ROWS = ROW_WARPS * FRAGMENTS * 16, BLOCK_PANELS = WARPS / ROW_WARPS * PANELS;
static_assert(ROWS == 16 * WARPS, "each warp decodes 16 rows");
// What two blocks on a processor of Orin's can have.
constexpr u32 SHARED_BYTES = 80 << 10;

// Runs whose weights are staged together.
template <class W> constexpr u32 STAGED = W::BYTES > 22 ? 4 : 8;
template <class W> constexpr u32 STAGED_BYTES = STAGED<W> * W::BYTES;

// Where a block's rows begin, and their outputs for the first row of the batch, the next of which is `stride` further.
struct Rows {
    u32 count;
    u64 data[ROWS];
    float *out[ROWS];
    u32 stride[ROWS];
};
// Weights of a run: 16 rows together, for the first 16 columns of each and the others, and what belongs to the blocks
// of each pair of rows i, i + 8.
template <class W> struct Weights {
    Sixteen w[ROWS / 16][2][LANES];
    Two<float> d[ROWS / 2];
    Two<float> m[W::MIN ? ROWS / 2 : 2];
};
// Activations of a run, as they lie.
template <class W> struct Batch {
    Sixteen q[BLOCK_PANELS][LANES];
    Two<float> scales[BLOCK_PANELS][PANEL / 2];
    Two<float> scaled_sums[W::MIN ? BLOCK_PANELS : 1][PANEL / 2];
};
template <class W> struct Memory {
    Rows rows;
    Sixteen staged[ROWS][sixteens_of(STAGED_BYTES<W>)];
    // Of runs of even and of odd numbers.
    Weights<W> weights[2];
    Batch<W> batch[2];
};

// Finds the rows from `first` on of tiles that are taken for one matrix.
template <class W> DEVICE void find_rows(Rows &to, const Tile *tiles, u32 count, u32 first, u32 runs) {
    const u32 rows = smaller(ROWS, tiles[count - 1].first + tiles[count - 1].rows - first);
    if (thread() == 0) to.count = rows;
    for (u32 i = thread(); i < count; i += WARPS * LANES) {
        const Tile &tile = tiles[i];
        const u32 end = smaller(tile.first + tile.rows, first + rows);
        for (u32 row = larger(tile.first, first); row < end; row++) {
            to.data[row - first] = u64(tile.data) + u64(row - tile.first) * runs * W::BYTES;
            to.out[row - first] = tile.out + (row - tile.first);
            to.stride[row - first] = tile.stride;
        }
    }
}

// Begins to copy the weights of some runs, from a multiple of STAGED on.
template <class W> DEVICE void stage_weights(Memory<W> &memory, u32 runs, u32 run) {
    const u32 begin = run * W::BYTES, bytes = smaller(STAGED_BYTES<W>, runs * W::BYTES - begin);
    // Eight lanes a row.
    for (u32 row = thread() / 8; row < memory.rows.count; row += WARPS * LANES / 8) {
        const u8 *from = reinterpret_cast<const u8 *>(memory.rows.data[row] + begin);
        stage<8, STAGED_BYTES<W>>(memory.staged[row], from, bytes, thread() % 8);
    }
}

// What a lane copies of the batch: of each of its warp's panels, 16 bytes of a run.
struct Share {
    static constexpr u32 COUNT = BLOCK_PANELS / WARPS;
    // Where in memory, in units of as much.
    u32 at[COUNT];

    // Panels past the last of the batch repeat it.
    DEVICE_MEMBER Share(u32 first_panel, u32 panels, u32 runs) {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++)
            at[i] = smaller(first_panel + warp() + i * WARPS, panels - 1) * runs * LANES + lane();
    }

    // Begins to copy a run, the next one the next time.
    template <class W> DEVICE_MEMBER void stage(Batch<W> &to, const Activations &x) {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) {
            const u32 panel = warp() + i * WARPS;
            copy_async(&to.q[panel][lane()], reinterpret_cast<const Sixteen *>(x.q) + at[i]);
            // Two lanes have what belongs to the blocks too.
            if (lane() < 2) {
                const u32 from = at[i] / 16 + lane();
                copy_async(reinterpret_cast<Sixteen *>(to.scales[panel]) + lane(),
                           reinterpret_cast<const Sixteen *>(x.scales) + from);
                if constexpr (W::MIN)
                    copy_async(reinterpret_cast<Sixteen *>(to.scaled_sums[panel]) + lane(),
                               static_cast<const Sixteen *>(x.sums) + from);
            }
            at[i] += LANES;
        }
    }
};

// Four weights, from bytes as weights.h has them: these are put into the last places of halves from 1024 on.
template <class W> DEVICE Two<u32> halves(u32 bytes) {
    bytes ^= 0x80808080;
    constexpr u32 LESS = 0xe400e400 | (128 + W::OFFSET) * 0x00010001;
    return Two<u32>{{add_halves(pick_bytes(bytes, 0x64646464, 0x4140), LESS),
                     add_halves(pick_bytes(bytes, 0x64646464, 0x4342), LESS)}};
}

// Decodes a run that was staged, each warp 16 rows: those that there are not, too. `leads` is where the lane's two rows
// begin, as far as it matters.
template <class W> DEVICE void decode(Memory<W> &memory, const u32 (&leads)[2], u32 run) {
    Weights<W> &to = memory.weights[run % 2];
    const u32 part = run / STAGED<W> * STAGED_BYTES<W>, begin = run % STAGED<W> * W::BYTES;
    Bytes blocks[2];
    Two<u32> low[2], high[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 row = 16 * warp() + 8 * i + lane() / 4, at = (leads[i] + part) % 16 + begin;
        blocks[i] = Bytes{&memory.staged[row]->word[at / 4], at % 4};
        const Pair pair = W::pair(blocks[i], 0, lane() % 4);
        low[i] = halves<W>(pair.low);
        high[i] = halves<W>(pair.high);
    }
    to.w[warp()][0][lane()] = Sixteen{{low[0].of[0], low[1].of[0], low[0].of[1], low[1].of[1]}};
    to.w[warp()][1][lane()] = Sixteen{{high[0].of[0], high[1].of[0], high[0].of[1], high[1].of[1]}};
    // Of the four lanes of both rows, two have the rest to do.
    const u32 second = lane() % 4, pair = 8 * warp() + lane() / 4;
    const Bytes block = second == 1 ? blocks[1] : blocks[0];
    const float d = W::d(block), m = W::m(block);
    if (second < 2) {
        to.d[pair].of[second] = d;
        if constexpr (W::MIN) to.m[pair].of[second] = m;
    }
}

// A lane's sums of its warp's rows.
template <class W> struct Sums {
    float of[PANELS][FRAGMENTS][4] = {};

    DEVICE_MEMBER void multiply(const Weights<W> &weights, const Batch<W> &batch) {
        const u32 fragment = warp() % ROW_WARPS * FRAGMENTS, first = warp() / ROW_WARPS * PANELS;
        Sixteen w[FRAGMENTS][2];
        Two<float> d[FRAGMENTS], m[FRAGMENTS]{};
#pragma unroll
        for (u32 f = 0; f < FRAGMENTS; f++) {
            const u32 pair = 8 * (fragment + f) + lane() / 4;
#pragma unroll
            for (u32 half = 0; half < 2; half++) w[f][half] = weights.w[fragment + f][half][lane()];
            d[f] = weights.d[pair];
            if constexpr (W::MIN) m[f] = weights.m[pair];
        }
#pragma unroll
        for (u32 panel = 0; panel < PANELS; panel += TOGETHER) {
            Sixteen q[TOGETHER];
            float dots[TOGETHER][FRAGMENTS][4] = {};
#pragma unroll
            for (u32 j = 0; j < TOGETHER; j++) q[j] = batch.q[first + panel + j][lane()];
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
#pragma unroll
                for (u32 j = 0; j < TOGETHER; j++) {
#pragma unroll
                    for (u32 f = 0; f < FRAGMENTS; f++)
                        mma_halves(dots[j][f], w[f][half].word, q[j].word[2 * half], q[j].word[2 * half + 1]);
                }
            }
#pragma unroll
            for (u32 j = 0; j < TOGETHER; j++) {
                const Two<float> scale = batch.scales[first + panel + j][lane() % 4];
                Two<float> scaled_sum{};
                if constexpr (W::MIN) scaled_sum = batch.scaled_sums[first + panel + j][lane() % 4];
#pragma unroll
                for (u32 f = 0; f < FRAGMENTS; f++) {
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        float &sum = of[panel + j][f][i];
                        sum = fused(dots[j][f][i], d[f].of[i / 2] * scale.of[i % 2], sum);
                        if constexpr (W::MIN) sum = fused(m[f].of[i / 2], scaled_sum.of[i % 2], sum);
                    }
                }
            }
        }
    }
};

template <class W> DEVICE void run(const Tile *tiles, u32 count, u32 cols, Activations x, u32 batch) {
    static_assert(sizeof(Memory<W>) <= SHARED_BYTES, "what the launch gives");
    Memory<W> &memory = *reinterpret_cast<Memory<W> *>(launch_memory);
    const u32 runs = cols / RUN, first = block_x() * ROWS;
    const u32 panels = (batch + PANEL - 1) / PANEL, first_panel = block_z() * BLOCK_PANELS;
    find_rows<W>(memory.rows, tiles, count, first, runs);
    block_sync();

    const u32 row = 16 * warp() + lane() / 4;
    const u32 leads[2] = {u32(memory.rows.data[row]), u32(memory.rows.data[row + 8])};

    Sums<W> sums;
    Share share(first_panel, panels, runs);
    stage_weights(memory, runs, 0);
    share.stage(memory.batch[0], x);
    copies_end();
    copies_done<0>();
    block_sync();
    decode(memory, leads, 0);
    for (u32 run = 0; run < runs; run++) {
        const u32 next = run + 1;
        // Where the next run's weights are not staged yet, they are decoded when they have come.
        const bool more = next < runs, staged = next % STAGED<W> != 0;
        copies_done<0>();
        block_sync();
        if (more) {
            share.stage(memory.batch[next % 2], x);
            if (!staged) stage_weights(memory, runs, next);
            copies_end();
            if (staged) decode(memory, leads, next);
        }
        sums.multiply(memory.weights[run % 2], memory.batch[run % 2]);
        if (more && !staged) {
            copies_done<0>();
            block_sync();
            decode(memory, leads, next);
        }
    }
#pragma unroll
    for (u32 panel = 0; panel < PANELS; panel++) {
#pragma unroll
        for (u32 i = 0; i < 4 * FRAGMENTS; i++) {
            const u32 row = 16 * (warp() % ROW_WARPS * FRAGMENTS + i / 4) + lane() / 4 + i % 4 / 2 * 8;
            const u32 its_panel = first_panel + warp() / ROW_WARPS * PANELS + panel;
            const u32 batch_row = its_panel * PANEL + 2 * (lane() % 4) + i % 2;
            if (row < memory.rows.count && batch_row < batch)
                memory.rows.out[row][u64(batch_row) * memory.rows.stride[row]] = sums.of[panel][i / 4][i % 4];
        }
    }
}
} // namespace matmul

#define MATMUL(W, name)                                                                                               \
    KERNEL(256, W::MIN ? 1 : 2)                                                                                       \
    matmul_##name(const Tile *tiles, u32 cols, Activations x, u32 batch, u32 count) {                                 \
        matmul::run<W>(tiles, count, cols, x, batch);                                                                 \
    }
TYPES_OF_32(MATMUL)
#undef MATMUL
