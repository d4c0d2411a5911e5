// One row of activations times the rows of a matrix, whose tiles lie anywhere.
//
// A warp takes 8 weight rows through the whole width, 1024 columns at a time: it copies them into
// shared memory as they lie, 16 bytes a lane, one step ahead of the sums; each lane dots one run of 32
// columns; then a lane for each row chains the blocks' sums in their order.
//
// Grid: (16 rows of a tile, tile). Block: 64 threads.
#include "dots.h"

namespace matvec {
constexpr u32 WARPS = 2, ROWS = 8, COLS = LANES * RUN;

template <class W> struct Shape {
    // Bytes of a row's part that is staged at once.
    static constexpr u32 BYTES = COLS / W::VALUES * W::BYTES;
    // It begins anywhere in the first 16 bytes.
    static constexpr u32 SIXTEENS = (BYTES + 15 + 15) / 16;
    static constexpr u32 BLOCKS = COLS / W::VALUES;
};

// Where a row's part number `part` begins, and its bytes.
template <class W> DEVICE const u8 *part_of(const Tile &tile, u32 row, u32 row_bytes, u32 part, u32 &bytes) {
    u32 begin = part * Shape<W>::BYTES;
    bytes = smaller(Shape<W>::BYTES, row_bytes - begin);
    return tile.data + u64(row) * row_bytes + begin;
}

template <class W>
DEVICE void stage(Sixteen (*to)[Shape<W>::SIXTEENS], const Tile &tile, u32 first, u32 rows, u32 row_bytes, u32 part) {
    for (u32 row = 0; row < rows; row++) {
        u32 bytes;
        const u8 *from = part_of<W>(tile, first + row, row_bytes, part, bytes);
        u32 lead = u32(u64(from) % 16);
        const Sixteen *aligned = reinterpret_cast<const Sixteen *>(from - lead);
        for (u32 i = lane(); 16 * i < lead + bytes; i += LANES) copy_async(&to[row][i], &aligned[i]);
    }
    copies_end();
}

// The activations of this lane's run.
struct Values {
    u32 q[PARTS][8];

    // The exact dot product with the integers of weights [8 from .. 8 to] in halves of 16.
    template <u32 half> DEVICE_MEMBER i32 dot(const u32 (&w)[8]) const {
        i32 sum = 0;
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            sum *= 1 << FINE_BITS;
#pragma unroll
            for (u32 i = 0; i < 4; i++) sum = dot_4(w[4 * half + i], q[part][2 * i + half], sum);
        }
        return sum;
    }
};

template <class W> DEVICE void run(const Tile *tiles, u32 cols, Activations x) {
    using S = Shape<W>;
    __shared__ Sixteen staged[WARPS][2][ROWS][S::SIXTEENS];
    __shared__ Step steps[WARPS][ROWS][S::BLOCKS * STEPS<W>];
    const Tile tile = tiles[block_y()];
    u32 first = (block_x() * WARPS + warp()) * ROWS;
    if (first >= tile.rows) return;
    u32 rows = smaller(ROWS, tile.rows - first);
    u32 runs = cols / RUN, row_bytes = cols / W::VALUES * W::BYTES;
    u32 parts = (runs + LANES - 1) / LANES;
    auto &my_stage = staged[warp()];
    auto &my_steps = steps[warp()];

    float sum = 0.0f;
    stage<W>(my_stage[0], tile, first, rows, row_bytes, 0);
    for (u32 part = 0; part < parts; part++) {
        if (part + 1 < parts) {
            stage<W>(my_stage[(part + 1) % 2], tile, first, rows, row_bytes, part + 1);
            copies_done<1>();
        } else {
            copies_done<0>();
        }
        warp_sync();
        u32 my_run = part * LANES + lane();
        bool some = my_run < runs;
        Values values{};
        if (some) {
            const Sixteen *from = reinterpret_cast<const Sixteen *>(x.q) + u64(my_run) * PARTS * 2;
#pragma unroll
            for (u32 i = 0; i < PARTS * 8; i++) values.q[i / 8][i % 8] = from[i / 4].word[i % 4];
        }
        u32 block = my_run / (W::VALUES / RUN), group = my_run % (W::VALUES / RUN);
        float scale = some ? x.scales[block] : 0.0f;
        [[maybe_unused]] i32 sums[2] = {0, 0};
        [[maybe_unused]] float scaled_sum = 0.0f;
        if constexpr (W::MIN) {
            if (some && W::SCALES == 0) scaled_sum = static_cast<const float *>(x.sums)[block];
            if (some && W::SCALES > 0) {
                sums[0] = static_cast<const i16 *>(x.sums)[16 * block + 2 * group];
                sums[1] = static_cast<const i16 *>(x.sums)[16 * block + 2 * group + 1];
            }
        }
        u32 my_block = lane() / (W::VALUES / RUN);
        for (u32 row = 0; row < rows; row++) {
            u32 bytes;
            u32 lead = u32(u64(part_of<W>(tile, first + row, row_bytes, part, bytes)) % 16);
            Bytes at{&my_stage[part % 2][row][0].word[0], lead + my_block * W::BYTES};
            Run weights{};
            if (some) weights = W::run(at, group);
            i32 dot_0 = values.template dot<0>(weights.w), dot_1 = values.template dot<1>(weights.w);
            Step *to = &my_steps[row][my_block * STEPS<W>];
            if constexpr (W::SCALES == 0) {
                if (some) steps_32<W>(to, dot_0 + dot_1, W::d(at), W::m(at), scale, scaled_sum);
            } else {
                constexpr u32 second = W::SCALES - 1;
                i32 dot = dot_0 * weights.scale[0] + dot_1 * weights.scale[second];
                i32 min = sums[0] * weights.min[0] + sums[1] * weights.min[second];
                dot = sum_lanes<8>(dot);
                if constexpr (W::MIN) min = sum_lanes<8>(min);
                if (some && group == 0) steps_256<W>(to, dot, min, W::d(at), W::m(at), scale);
            }
        }
        warp_sync();
        if (lane() < rows) {
            u32 count = smaller(S::BLOCKS, cols / W::VALUES - part * S::BLOCKS) * STEPS<W>;
            for (u32 i = 0; i < count; i++) sum = fused(my_steps[lane()][i].a, my_steps[lane()][i].b, sum);
        }
        // The steps, and the staged bytes that the next copies go over, have been used.
        warp_sync();
    }
    if (lane() < rows) tile.out[first + lane()] = sum;
}
} // namespace matvec

#define MATVEC(W, name)                                                                                               \
    KERNEL(64) matvec_##name(const Tile *tiles, u32 cols, Activations x) { matvec::run<W>(tiles, cols, x); }
QUANTIZED_TYPES(MATVEC)
#undef MATVEC
