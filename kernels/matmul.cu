// Many rows of activations times the rows of a matrix, by the tensor cores' int8 products.
//
// A block takes 64 weight rows and up to 256 rows of the batch: 256 columns at a time are copied into
// shared memory as they lie, while the ones before are multiplied, and decoded there into what the
// lanes of mma take. A second block on the same processor multiplies while the first one decodes. Warp
// pairs take 64 batch rows each; within a pair each warp takes 32 weight rows, so that activations
// serve two products. It goes through two panels of 8 batch rows at a time, so that weights do too.
// Activations come from memory a run ahead: as soon as the tensor cores have taken one, before its
// products go into the chain.
//
// The integer products are exact and the chain behind them is matvec's (dots.h).
//
// Grid: (64 rows of a tile, tile, 256 rows of the batch). Block: 64 threads for each 64 rows of the batch.
#include "fragments.h"

namespace matmul {
constexpr u32 FRAGMENTS = 2, ROWS = 2 * 16 * FRAGMENTS, COLS = 256, RUNS = COLS / RUN, WARP_PAIRS = 4;
constexpr u32 PANELS = 8;

template <class W> struct Shape {
    static constexpr u32 BYTES = COLS / W::VALUES * W::BYTES;
    static constexpr u32 BLOCKS = COLS / W::VALUES;
    // Panels that a warp takes at a time: one where there is more to keep, for which two leave no registers.
    static constexpr u32 TOGETHER = W::SCALES == 0 && !W::MIN ? 2 : 1;
};

// Decoded weights, 16 rows and a run together, and what belongs to the blocks and runs of each pair of rows i, i + 8.
template <class W> struct Decoded {
    Sixteen w[ROWS / 16][RUNS][LANES];
    Factors factors[Shape<W>::BLOCKS][ROWS / 2];
    Scales<W> scales[W::SCALES > 0 ? RUNS : 1][ROWS / 2];
    // The minimums of 16 values each, as bytes.
    alignas(16) u8 mins[W::SCALES > 0 && W::MIN ? ROWS : 1][2 * RUNS];
};

template <class W>
DEVICE void stage_part(Sixteen (*to)[sixteens_of(Shape<W>::BYTES)], const u8 *data, u32 rows, u32 row_bytes, u32 part) {
    u32 begin = part * Shape<W>::BYTES, bytes = smaller(Shape<W>::BYTES, row_bytes - begin);
    // Eight lanes a row.
    for (u32 row = thread() / 8; row < rows; row += threads() / 8)
        stage<8, Shape<W>::BYTES>(to[row], data + u64(row) * row_bytes + begin, bytes, thread() % 8);
    copies_end();
}

// Decodes what was staged: rows and runs that there are not, too.
template <class W>
DEVICE void decode(Decoded<W> &to, Sixteen (*staged)[sixteens_of(Shape<W>::BYTES)], const u8 *data, u32 row_bytes) {
    for (u32 i = thread() / LANES; i < ROWS / 16 * RUNS; i += threads() / LANES) {
        u32 sixteen = i / RUNS, run = i % RUNS, block = run / (W::VALUES / RUN), group = run % (W::VALUES / RUN);
        u32 row = 16 * sixteen + lane() / 4;
        Bytes at = staged_bytes(staged[row], data + row * row_bytes) + block * W::BYTES;
        Bytes at_8 = staged_bytes(staged[row + 8], data + (row + 8) * row_bytes) + block * W::BYTES;
        to.w[sixteen][run][lane()] = fragment_of<W>(at, at_8, group);
        // Of the four lanes of both rows, two have the rest to do.
        u32 second = lane() % 4, pair = 8 * sixteen + lane() / 4;
        if (second > 1) continue;
        if (second == 1) at = at_8;
        if (group == 0) {
            to.factors[block][pair].d.of[second] = W::d(at);
            to.factors[block][pair].m.of[second] = W::m(at);
        }
        if constexpr (W::SCALES > 0) {
            Run r{};
            W::scales(at, group, r);
#pragma unroll
            for (u32 j = 0; j < W::SCALES; j++) to.scales[run][pair].of[j].of[second] = r.scale[j];
            if constexpr (W::MIN) {
                to.mins[row + 8 * second][2 * run] = u8(r.min[0]);
                to.mins[row + 8 * second][2 * run + 1] = u8(r.min[W::SCALES - 1]);
            }
        }
    }
}

template <class W> DEVICE void run(const Tile *tiles, u32 cols, Activations x, u32 batch) {
    using S = Shape<W>;
    constexpr u32 TOGETHER = S::TOGETHER;
    __shared__ Sixteen staged[ROWS][sixteens_of(S::BYTES)];
    __shared__ Decoded<W> decoded;
    const Tile &tile = tiles[block_y()];
    const u32 first = block_x() * ROWS;
    if (first >= tile.rows) return;
    const u32 runs = cols / RUN, row_bytes = cols / W::VALUES * W::BYTES, parts = (runs + RUNS - 1) / RUNS;
    // Taken from the table again for each part, which costs less than registers to keep it in.
    auto data = [&] { return tile.data + u64(first) * row_bytes; };
    const u32 panels = (batch + PANEL - 1) / PANEL, first_panel = (block_z() * WARP_PAIRS + warp() / 2) * PANELS;
    const u32 my_panels = first_panel < panels ? smaller(PANELS, panels - first_panel) : 0;
    const u32 my_fragment = warp() % 2 * FRAGMENTS;

    Sums<W> sums[PANELS][FRAGMENTS];
    Columns<W> columns[TOGETHER];
    // Places of the columns loaded: panels past the last of this warp repeat the one before.
    u32 at[TOGETHER];
    auto place = [&](u32 panel, u32 first_at, u32 (&at)[TOGETHER]) {
#pragma unroll
        for (u32 j = 0; j < TOGETHER; j++) at[j] = first_at + (panel + j < my_panels ? j * runs : 0);
    };
    const u32 begin = smaller(first_panel, panels - 1) * runs;
    place(0, begin, at);
#pragma unroll
    for (u32 j = 0; j < TOGETHER; j++) columns[j].load(x, at[j]);
    stage_part<W>(staged, data(), smaller(ROWS, tile.rows - first), row_bytes, 0);
    for (u32 part = 0; part < parts; part++) {
        copies_done<0>();
        block_sync();
        decode<W>(decoded, staged, data() + part * S::BYTES, row_bytes);
        block_sync();
        if (part + 1 < parts) stage_part<W>(staged, data(), smaller(ROWS, tile.rows - first), row_bytes, part + 1);
        const u32 first_run = part * RUNS, some = smaller(RUNS, runs - first_run);
        const u32 next_run = smaller(first_run + RUNS, runs - 1);
#pragma unroll
        for (u32 panel = 0; panel < PANELS; panel += TOGETHER) {
            if (panel < my_panels) {
                const bool last = panel + TOGETHER >= my_panels;
                [[maybe_unused]] i32 dots[TOGETHER][FRAGMENTS][4] = {};
                // Behind the last run comes the first one of the next panels, or of the next part.
                u32 then[TOGETHER], block_at[TOGETHER];
                place(last ? 0 : panel + TOGETHER, last ? begin + next_run : at[0] + TOGETHER * runs, then);
#pragma unroll
                for (u32 j = 0; j < TOGETHER; j++) block_at[j] = at[j] / RUNS;
                for (u32 run = 0; run < some; run++) {
                    Sixteen weights[FRAGMENTS];
#pragma unroll
                    for (u32 f = 0; f < FRAGMENTS; f++) weights[f] = decoded.w[my_fragment + f][run][lane()];
#pragma unroll
                    for (u32 j = 0; j < TOGETHER; j++) {
                        Products<W> products[FRAGMENTS];
#pragma unroll
                        for (u32 f = 0; f < FRAGMENTS; f++) products[f].multiply(weights[f], columns[j].q);
                        const Two<float> scale = columns[j].scale, scaled_sum = columns[j].scaled_sum;
                        at[j] = run + 1 < some ? at[j] + 1 : then[j];
                        columns[j].load(x, at[j]);
#pragma unroll
                        for (u32 f = 0; f < FRAGMENTS; f++) {
                            const u32 pair = 8 * (my_fragment + f) + lane() / 4;
                            if constexpr (W::SCALES == 0)
                                sums[panel + j][f].block_32(products[f], decoded.factors[run][pair], scale, scaled_sum);
                            else
                                products[f].add_to(dots[j][f], decoded.scales[run][pair]);
                        }
                    }
                }
                if constexpr (W::SCALES > 0) {
                    BlockColumns<W> block[TOGETHER];
#pragma unroll
                    for (u32 j = 0; j < TOGETHER; j++) block[j].load(x, block_at[j]);
#pragma unroll
                    for (u32 f = 0; f < FRAGMENTS; f++) {
                        const u32 row = 16 * (my_fragment + f) + lane() / 4;
                        Two<u32> mins{};
                        if constexpr (W::MIN) {
#pragma unroll
                            for (u32 i = 0; i < 2; i++)
                                mins.of[i] = reinterpret_cast<const u32 *>(decoded.mins[row + 8 * i])[lane() % 4];
                        }
                        const Factors factors = decoded.factors[0][8 * (my_fragment + f) + lane() / 4];
#pragma unroll
                        for (u32 j = 0; j < TOGETHER; j++)
                            sums[panel + j][f].block_256(dots[j][f], factors, block[j], mins);
                    }
                }
            }
        }
    }
#pragma unroll
    for (u32 panel = 0; panel < PANELS; panel++) {
#pragma unroll
        for (u32 i = 0; i < 4 * FRAGMENTS; i++) {
            u32 row = first + 16 * (my_fragment + i / 4) + lane() / 4 + i % 4 / 2 * 8;
            u32 batch_row = (first_panel + panel) * PANEL + 2 * (lane() % 4) + i % 2;
            if (row < tile.rows && batch_row < batch)
                tile.out[u64(batch_row) * tile.stride + row] = sums[panel][i / 4].of[i % 4];
        }
    }
}
} // namespace matmul

#define MATMUL(W, name)                                                                                               \
    KERNEL(256, 2)                                                                                                    \
    matmul_##name(const Tile *tiles, u32 cols, Activations x, u32 batch) { matmul::run<W>(tiles, cols, x, batch); }
QUANTIZED_TYPES(MATMUL)
#undef MATMUL
