// Two to eight rows of activations times the rows of a matrix: what several sessions decode at once.
//
// Like matvec it has to keep up with the memory that the weights come from, so they are copied into
// shared memory as they lie, 256 columns a part, one part ahead, and the activations beside them, which
// four warps share. Each warp takes 16 weight rows, decodes them straight into what its lanes give to
// the tensor cores, and chains its sums in registers, two runs at a time.
//
// Grid: (64 rows of a tile, tile). Block: 128 threads.
#include "fragments.h"

namespace matpanel {
constexpr u32 WARPS = 4, ROWS = 16, COLS = 256, RUNS = COLS / RUN, TOGETHER = 2;

template <class W> struct Shape {
    static constexpr u32 BYTES = COLS / W::VALUES * W::BYTES;
    static constexpr u32 BLOCKS = COLS / W::VALUES;
};

// A part of 64 rows as they lie, and of the one panel of activations.
template <class W> struct Part {
    Sixteen rows[WARPS * ROWS][sixteens_of(Shape<W>::BYTES)];
    Sixteen q[RUNS * PARTS * PANEL * RUN / 16];
    Sixteen scales[Shape<W>::BLOCKS * PANEL * 4 / 16];
    // As floats of blocks of 32, or as 16 halves of a word of blocks of 256.
    Sixteen sums[W::MIN ? RUNS * PANEL * 4 / 16 : 1];
};

// Copies what is contiguous from `begin` on: `bytes` of it, a multiple of 16.
template <u32 count> DEVICE void copy(Sixteen (&to)[count], const void *from, u32 begin, u32 bytes) {
    const Sixteen *sixteens = reinterpret_cast<const Sixteen *>(static_cast<const u8 *>(from) + begin);
#pragma unroll
    for (u32 i = 0; i < count; i += WARPS * LANES)
        if (16 * (i + thread()) < bytes) copy_async(&to[i + thread()], &sixteens[i + thread()]);
}

template <class W>
DEVICE void stage_part(Part<W> &to, const u8 *data, u32 rows, u32 row_bytes, const Activations &x, u32 part, u32 runs) {
    u32 begin = part * Shape<W>::BYTES, bytes = smaller(Shape<W>::BYTES, row_bytes - begin);
    // Eight lanes a row; rows past the last repeat it.
#pragma unroll
    for (u32 i = 0; i < WARPS * ROWS; i += WARPS * LANES / 8) {
        u32 row = i + thread() / 8;
        const u8 *from = data + u64(smaller(row, rows - 1)) * row_bytes + begin;
        stage<8, Shape<W>::BYTES>(to.rows[row], from, bytes, thread() % 8);
    }
    u32 some = smaller(RUNS, runs - part * RUNS), blocks = some / (W::VALUES / RUN);
    copy(to.q, x.q, part * sizeof(to.q), some * PARTS * PANEL * RUN);
    copy(to.scales, x.scales, part * sizeof(to.scales), blocks * PANEL * 4);
    if constexpr (W::MIN) copy(to.sums, x.sums, part * sizeof(to.sums), some * PANEL * 4);
    copies_end();
}

// What two rows have of a block.
template <class W> DEVICE Factors factors_of(const Bytes (&rows)[2]) {
    Factors f;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        f.d.of[i] = W::d(rows[i]);
        f.m.of[i] = W::m(rows[i]);
    }
    return f;
}
// The scales of a run of two rows; or their minimums of 16 values each, as bytes 4 (lane % 4)... of 16.
template <class W> DEVICE Scales<W> scales_of(const Bytes (&rows)[2], u32 group) {
    Scales<W> scales;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        Run r{};
        W::scales(rows[i], group, r);
#pragma unroll
        for (u32 s = 0; s < W::SCALES; s++) scales.of[s].of[i] = r.scale[s];
    }
    return scales;
}
template <class W> DEVICE Two<u32> minimums_of(const Bytes (&rows)[2]) {
    Two<u32> mins;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        Run a{}, b{};
        W::scales(rows[i], lane() % 4 * 2, a);
        W::scales(rows[i], lane() % 4 * 2 + 1, b);
        constexpr u32 second = W::SCALES - 1;
        mins.of[i] = u32(a.min[0] | a.min[second] << 8 | b.min[0] << 16 | b.min[second] << 24);
    }
    return mins;
}

template <class W> DEVICE void run(const Tile *tiles, u32 cols, Activations x, u32 batch) {
    using S = Shape<W>;
    __shared__ Part<W> staged[2];
    const Tile tile = tiles[block_y()];
    const u32 first = block_x() * WARPS * ROWS;
    if (first >= tile.rows) return;
    const u32 rows = smaller(WARPS * ROWS, tile.rows - first);
    const u32 runs = cols / RUN, row_bytes = cols / W::VALUES * W::BYTES, parts = (runs + RUNS - 1) / RUNS;
    const u8 *data = tile.data + u64(first) * row_bytes;
    const u32 my_row = warp() * ROWS + lane() / 4;

    Sums<W> sums;
    stage_part<W>(staged[0], data, rows, row_bytes, x, 0, runs);
    for (u32 part = 0; part < parts; part++) {
        if (part + 1 < parts) {
            stage_part<W>(staged[(part + 1) % 2], data, rows, row_bytes, x, part + 1, runs);
            copies_done<1>();
        } else {
            copies_done<0>();
        }
        block_sync();
        const Part<W> &now = staged[part % 2];
        const Activations panel{reinterpret_cast<const i8 *>(now.q), reinterpret_cast<const float *>(now.scales),
                                now.sums};
        Bytes at[2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 row = my_row + 8 * i;
            at[i] = staged_bytes(now.rows[row], data + part * S::BYTES + row * row_bytes);
        }
        if constexpr (W::SCALES == 0) {
            const u32 some = smaller(RUNS, runs - part * RUNS);
            for (u32 run = 0; run < some; run += TOGETHER) {
                Products<W> products[TOGETHER];
                Factors factors[TOGETHER];
                Columns<W> columns[TOGETHER];
#pragma unroll
                for (u32 j = 0; j < TOGETHER; j++) {
                    const Bytes blocks[2] = {at[0] + (run + j) * W::BYTES, at[1] + (run + j) * W::BYTES};
                    columns[j].load(panel, run + j);
                    products[j].multiply(fragment_of<W>(blocks[0], blocks[1], 0), columns[j].q);
                    factors[j] = factors_of<W>(blocks);
                }
#pragma unroll
                for (u32 j = 0; j < TOGETHER; j++) {
                    // The last one may not be there.
                    if (run + j < some)
                        sums.block_32(products[j], factors[j], columns[j].scale, columns[j].scaled_sum);
                }
            }
        } else {
            i32 dots[4] = {};
#pragma unroll
            for (u32 run = 0; run < RUNS; run++) {
                Columns<W> columns;
                columns.load(panel, run);
                Products<W> products;
                products.multiply(fragment_of<W>(at[0], at[1], run), columns.q);
                products.add_to(dots, scales_of<W>(at, run));
            }
            BlockColumns<W> block;
            block.load(panel, 0);
            sums.block_256(dots, factors_of<W>(at), block, minimums_of<W>(at));
        }
        // What was staged has been used.
        block_sync();
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 row = first + my_row + i / 2 * 8, batch_row = 2 * (lane() % 4) + i % 2;
        if (row < tile.rows && batch_row < batch) tile.out[u64(batch_row) * tile.stride + row] = sums.of[i];
    }
}
} // namespace matpanel

#define MATPANEL(W, name)                                                                                             \
    KERNEL(128)                                                                                                       \
    matpanel_##name(const Tile *tiles, u32 cols, Activations x, u32 batch) { matpanel::run<W>(tiles, cols, x, batch); }
QUANTIZED_TYPES(MATPANEL)
#undef MATPANEL
