// Several rows of activations times the rows of a matrix, by the tensor cores' int8 products.
//
// A block takes 32 weight rows and up to 512 rows of the batch, so each weight byte is read once for
// all of them: 256 columns at a time are copied into shared memory as they lie, one step ahead,
// decoded there into signed bytes, and multiplied with panels of 8 batch rows. Warp pairs take 64
// batch rows each; within a pair each warp takes 16 weight rows.
//
// The integer products are exact and the chain behind them is matvec's (dots.h).
//
// Grid: (32 rows of a tile, tile, 512 rows of the batch). Block: 64 threads for each 64 rows of the batch.
#include "dots.h"

namespace matmul {
constexpr u32 ROWS = 32, COLS = 256, RUNS = COLS / RUN, PANELS = 8, WARP_PAIRS = 8;
// A row of decoded weights, and what keeps four of them in different banks.
constexpr u32 DECODED_WORDS = (COLS + 32) / 4;

template <class W> struct Shape {
    static constexpr u32 BYTES = COLS / W::VALUES * W::BYTES;
    static constexpr u32 SIXTEENS = sixteens_of(BYTES);
    static constexpr u32 BLOCKS = COLS / W::VALUES;
    static constexpr u32 SCALES = W::SCALES == 0 ? 1 : RUNS * W::SCALES;
};

// Decoded weights, and their scales and minimums: of each run where there are integer ones.
template <class W> struct Decoded {
    u32 w[ROWS][DECODED_WORDS];
    float d[ROWS][Shape<W>::BLOCKS];
    float m[ROWS][W::MIN ? Shape<W>::BLOCKS : 1];
    i32 scale[ROWS][Shape<W>::SCALES];
    i32 min[ROWS][W::MIN ? Shape<W>::SCALES : 1];
};

template <class W>
DEVICE void stage_part(Sixteen (*to)[Shape<W>::SIXTEENS], const Tile &tile, u32 first, u32 rows, u32 row_bytes, u32 part) {
    u32 begin = part * Shape<W>::BYTES;
    u32 bytes = smaller(Shape<W>::BYTES, row_bytes - begin);
    // Eight lanes a row.
    for (u32 row = thread() / 8; row < rows; row += threads() / 8)
        stage<8, Shape<W>::BYTES>(to[row], tile.data + u64(first + row) * row_bytes + begin, bytes, thread() % 8);
    copies_end();
}

template <class W>
DEVICE void decode(Decoded<W> &to, Sixteen (*staged)[Shape<W>::SIXTEENS], const Tile &tile, u32 first, u32 rows,
                   u32 row_bytes, u32 part, u32 runs) {
    for (u32 i = thread(); i < ROWS * RUNS; i += threads()) {
        u32 row = i / RUNS, run = i % RUNS;
        if (row >= rows || run >= runs) continue;
        u32 block = run / (W::VALUES / RUN), group = run % (W::VALUES / RUN);
        const u8 *from = tile.data + u64(first + row) * row_bytes + part * Shape<W>::BYTES;
        Bytes at = staged_bytes(staged[row], from) + block * W::BYTES;
        Run weights = run_of<W>(at, group);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            to.w[row][8 * run + 2 * j] = minus<W::OFFSET>(weights.w[j]);
            to.w[row][8 * run + 2 * j + 1] = minus<W::OFFSET>(weights.w[j + 4]);
        }
        if (group == 0) {
            to.d[row][block] = W::d(at);
            if constexpr (W::MIN) to.m[row][block] = W::m(at);
        }
#pragma unroll
        for (u32 j = 0; j < W::SCALES; j++) {
            to.scale[row][run * W::SCALES + j] = weights.scale[j];
            if constexpr (W::MIN) to.min[row][run * W::SCALES + j] = weights.min[j];
        }
    }
}

// The chain's next steps of 16 weight rows x 8 batch rows, as mma spreads them: [i] is weight row
// lane / 4 + 8 (i / 2), batch row 2 (lane % 4) + i % 2. `run` counts from the row's beginning.
template <class W>
DEVICE void panel_steps(float (&sum)[4], const Decoded<W> &decoded, const Activations &x, u32 panel, u32 first_run,
                        u32 runs, u32 row_runs) {
    u32 row = warp() % 2 * 16 + lane() / 4, column = lane() % 4;
    const u64 *q = reinterpret_cast<const u64 *>(x.q) + u64(panel * row_runs + first_run) * PARTS * LANES + lane();
    u32 row_blocks = row_runs / (W::VALUES / RUN), first_block = first_run / (W::VALUES / RUN);
    const float *scales = x.scales + u64(panel * row_blocks + first_block) * PANEL + 2 * column;
    [[maybe_unused]] i32 dots[4] = {0, 0, 0, 0};
    for (u32 run = 0; run < runs; run++) {
        const u32 *w = &decoded.w[row][8 * run + 2 * column];
        u32 a[4] = {w[0], w[8 * DECODED_WORDS], w[1], w[8 * DECODED_WORDS + 1]};
        i32 c[4] = {0, 0, 0, 0};
        [[maybe_unused]] i32 c_1[4] = {0, 0, 0, 0};
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            u64 both = q[(run * PARTS + part) * LANES];
            u32 b[2] = {u32(both), u32(both >> 32)};
#pragma unroll
            for (u32 i = 0; i < 4; i++) c[i] *= 1 << FINE_BITS;
            if constexpr (W::SCALES == 2) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) c_1[i] *= 1 << FINE_BITS;
                mma_16(c, a[0], a[1], b[0]);
                mma_16(c_1, a[2], a[3], b[1]);
            } else {
                mma_32(c, a, b);
            }
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 r = row + 8 * (i / 2);
            if constexpr (W::SCALES == 0) {
                Step steps[STEPS<W>];
                float scaled_sum = 0.0f, m = 0.0f;
                if constexpr (W::MIN) {
                    scaled_sum = static_cast<const float *>(x.sums)[&scales[run * PANEL + i % 2] - x.scales];
                    m = decoded.m[r][run];
                }
                steps_32<W>(steps, c[i], decoded.d[r][run], m, scales[run * PANEL + i % 2], scaled_sum);
#pragma unroll
                for (u32 s = 0; s < STEPS<W>; s++) sum[i] = fused(steps[s].a, steps[s].b, sum[i]);
            } else {
                dots[i] += c[i] * decoded.scale[r][run * W::SCALES];
                if constexpr (W::SCALES == 2) dots[i] += c_1[i] * decoded.scale[r][run * 2 + 1];
            }
        }
    }
    if constexpr (W::SCALES > 0) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 r = row + 8 * (i / 2);
            i32 min = 0;
            float m = 0.0f;
            if constexpr (W::MIN) {
                const i16 *sums =
                    static_cast<const i16 *>(x.sums) + 16 * u64(&scales[i % 2] - x.scales);
                m = decoded.m[r][0];
                for (u32 j = 0; j < 16; j++) min += sums[j] * decoded.min[r][j / (2 / W::SCALES)];
            }
            Step steps[STEPS<W>];
            steps_256<W>(steps, dots[i], min, decoded.d[r][0], m, scales[i % 2]);
#pragma unroll
            for (u32 s = 0; s < STEPS<W>; s++) sum[i] = fused(steps[s].a, steps[s].b, sum[i]);
        }
    }
}

template <class W> DEVICE void run(const Tile *tiles, u32 cols, Activations x, u32 batch) {
    using S = Shape<W>;
    __shared__ Sixteen staged[2][ROWS][S::SIXTEENS];
    __shared__ Decoded<W> decoded;
    const Tile tile = tiles[block_y()];
    u32 first = block_x() * ROWS;
    if (first >= tile.rows) return;
    u32 rows = smaller(ROWS, tile.rows - first);
    u32 runs = cols / RUN, row_bytes = cols / W::VALUES * W::BYTES;
    u32 parts = (runs + RUNS - 1) / RUNS;
    u32 panels = (batch + PANEL - 1) / PANEL;
    u32 first_panel = (block_z() * WARP_PAIRS + warp() / 2) * PANELS;

    float sums[PANELS][4] = {};
    stage_part<W>(staged[0], tile, first, rows, row_bytes, 0);
    for (u32 part = 0; part < parts; part++) {
        if (part + 1 < parts) {
            stage_part<W>(staged[(part + 1) % 2], tile, first, rows, row_bytes, part + 1);
            copies_done<1>();
        } else {
            copies_done<0>();
        }
        block_sync();
        u32 some = smaller(RUNS, runs - part * RUNS);
        decode<W>(decoded, staged[part % 2], tile, first, rows, row_bytes, part, some);
        block_sync();
#pragma unroll
        for (u32 panel = 0; panel < PANELS; panel++)
            if (first_panel + panel < panels)
                panel_steps<W>(sums[panel], decoded, x, first_panel + panel, part * RUNS, some, runs);
    }
#pragma unroll
    for (u32 panel = 0; panel < PANELS; panel++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 row = first + warp() % 2 * 16 + lane() / 4 + 8 * (i / 2);
            u32 batch_row = (first_panel + panel) * PANEL + 2 * (lane() % 4) + i % 2;
            if (row < tile.rows && batch_row < batch) tile.out[u64(batch_row) * tile.stride + row] = sums[panel][i];
        }
    }
}
} // namespace matmul

#define MATMUL(W, name)                                                                                               \
    KERNEL(512)                                                                                                       \
    matmul_##name(const Tile *tiles, u32 cols, Activations x, u32 batch) { matmul::run<W>(tiles, cols, x, batch); }
QUANTIZED_TYPES(MATMUL)
#undef MATMUL
