// Many rows of activations times the rows of a matrix with blocks of 256, by the tensor cores' int8 products.
//
// A block takes 64 weight rows and up to 256 rows of the batch: a block of columns at a time is copied
// into shared memory as it lies, while the one before is multiplied, and decoded there into what the
// lanes of mma take. A second block on the same processor multiplies while the first one decodes. Warp
// pairs take 64 batch rows each; within a pair each warp takes 32 weight rows, so that activations
// serve two products. It goes through one panel of 8 batch rows at a time. Activations come from memory
// a run ahead: as soon as the tensor cores have taken one, before its products are added up.
//
// The integer products are exact and the chain behind them is matvec's (dots.h).
//
// Grid: (64 rows of a tile, tile, 256 rows of the batch). Block: 64 threads for each 64 rows of the batch.
#include "fragments.h"

namespace matmul_256 {
constexpr u32 FRAGMENTS = 2, ROWS = 2 * 16 * FRAGMENTS, RUNS = 256 / RUN, WARP_PAIRS = 4;
constexpr u32 PANELS = 8;

// Decoded weights, 16 rows and a run together, and what belongs to the block and its runs, for rows i and i + 8 each.
template <class W> struct Decoded {
    Sixteen w[ROWS / 16][RUNS][LANES];
    Factors factors[ROWS / 2];
    Scales<W> scales[RUNS][ROWS / 2];
    // The minimums of 16 values each, as bytes.
    alignas(16) u8 mins[W::MIN ? ROWS : 1][2 * RUNS];
};

template <class W>
DEVICE void stage_part(Sixteen (*to)[sixteens_of(W::BYTES)], const u8 *data, u32 rows, u32 row_bytes, u32 part) {
    // Eight lanes a row.
    for (u32 row = thread() / 8; row < rows; row += threads() / 8)
        stage<8, W::BYTES>(to[row], data + u64(row) * row_bytes + part * W::BYTES, W::BYTES, thread() % 8);
    copies_end();
}

// Decodes what was staged: rows that there are not, too.
template <class W>
DEVICE void decode(Decoded<W> &to, Sixteen (*staged)[sixteens_of(W::BYTES)], const u8 *data, u32 row_bytes) {
    for (u32 i = thread() / LANES; i < ROWS / 16 * RUNS; i += threads() / LANES) {
        u32 sixteen = i / RUNS, run = i % RUNS;
        u32 row = 16 * sixteen + lane() / 4;
        Bytes at = staged_bytes(staged[row], data + row * row_bytes);
        Bytes at_8 = staged_bytes(staged[row + 8], data + (row + 8) * row_bytes);
        to.w[sixteen][run][lane()] = fragment_of<W>(at, at_8, run);
        // Of the four lanes of both rows, two have the rest to do.
        u32 second = lane() % 4, pair = 8 * sixteen + lane() / 4;
        if (second > 1) continue;
        if (second == 1) at = at_8;
        if (run == 0) {
            to.factors[pair].d.of[second] = W::d(at);
            to.factors[pair].m.of[second] = W::m(at);
        }
        Run r{};
        W::scales(at, run, r);
#pragma unroll
        for (u32 j = 0; j < W::SCALES; j++) to.scales[run][pair].of[j].of[second] = r.scale[j];
        if constexpr (W::MIN) {
            to.mins[row + 8 * second][2 * run] = u8(r.min[0]);
            to.mins[row + 8 * second][2 * run + 1] = u8(r.min[W::SCALES - 1]);
        }
    }
}

template <class W> DEVICE void run(const Tile *tiles, u32 cols, Activations x, u32 batch) {
    __shared__ Sixteen staged[ROWS][sixteens_of(W::BYTES)];
    __shared__ Decoded<W> decoded;
    const Tile &tile = tiles[block_y()];
    const u32 first = block_x() * ROWS;
    if (first >= tile.rows) return;
    const u32 runs = cols / RUN, parts = cols / W::VALUES, row_bytes = parts * W::BYTES;
    // Taken from the table again for each part, which costs less than registers to keep it in.
    auto data = [&] { return tile.data + u64(first) * row_bytes; };
    const u32 panels = (batch + PANEL - 1) / PANEL, first_panel = (block_z() * WARP_PAIRS + warp() / 2) * PANELS;
    const u32 my_panels = first_panel < panels ? smaller(PANELS, panels - first_panel) : 0;
    const u32 my_fragment = warp() % 2 * FRAGMENTS;

    Sums<W> sums[PANELS][FRAGMENTS];
    Columns<W> columns;
    // The place of the columns loaded.
    const u32 begin = smaller(first_panel, panels - 1) * runs;
    u32 at = begin;
    columns.load(x, at);
    stage_part<W>(staged, data(), smaller(ROWS, tile.rows - first), row_bytes, 0);
    for (u32 part = 0; part < parts; part++) {
        copies_done<0>();
        block_sync();
        decode<W>(decoded, staged, data() + part * W::BYTES, row_bytes);
        block_sync();
        if (part + 1 < parts) stage_part<W>(staged, data(), smaller(ROWS, tile.rows - first), row_bytes, part + 1);
        const u32 next_run = smaller((part + 1) * RUNS, runs - 1);
#pragma unroll
        for (u32 panel = 0; panel < PANELS; panel++) {
            if (panel < my_panels) {
                i32 dots[FRAGMENTS][4] = {};
                // Behind the last run comes the first one of the next panel, or of the next part.
                const u32 then = panel + 1 < my_panels ? at + runs : begin + next_run, block_at = at / RUNS;
                for (u32 run = 0; run < RUNS; run++) {
                    Products<W> products[FRAGMENTS];
#pragma unroll
                    for (u32 f = 0; f < FRAGMENTS; f++)
                        products[f].multiply(decoded.w[my_fragment + f][run][lane()], columns.q);
                    at = run + 1 < RUNS ? at + 1 : then;
                    columns.load(x, at);
#pragma unroll
                    for (u32 f = 0; f < FRAGMENTS; f++)
                        products[f].add_to(dots[f], decoded.scales[run][8 * (my_fragment + f) + lane() / 4]);
                }
                BlockColumns<W> block;
                block.load(x, block_at);
#pragma unroll
                for (u32 f = 0; f < FRAGMENTS; f++) {
                    const u32 row = 16 * (my_fragment + f) + lane() / 4;
                    Two<u32> mins{};
                    if constexpr (W::MIN) {
#pragma unroll
                        for (u32 i = 0; i < 2; i++)
                            mins.of[i] = reinterpret_cast<const u32 *>(decoded.mins[row + 8 * i])[lane() % 4];
                    }
                    sums[panel][f].block_256(dots[f], decoded.factors[8 * (my_fragment + f) + lane() / 4], block, mins);
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
} // namespace matmul_256

#define MATMUL(W, name)                                                                                               \
    KERNEL(256, 2)                                                                                                    \
    matmul_##name(const Tile *tiles, u32 cols, Activations x, u32 batch) { matmul_256::run<W>(tiles, cols, x, batch); }
TYPES_OF_256(MATMUL)
#undef MATMUL
