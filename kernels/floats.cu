// Rows of plain activations times a matrix of floats: F32, F16 or BF16.
//
// One fused multiply-add per value in the columns' order, as on the CPU; so a lane is a weight row,
// and 32 rows are staged in shared memory, 64 columns at a time, where each warp takes them for 8
// rows of the batch. Weights of these types are rare, and large ones rarer: this is not made to be
// the fastest way.
//
// Grid: (32 rows of a tile, tile, 8 rows of the batch for each warp). Block: 32 threads for each 8 rows.
#include "weights.h"

namespace floats {
constexpr u32 ROWS = 32, COLS = 64, BATCH = 8;

template <class W> DEVICE void run(const Tile *tiles, u32 cols, const float *x, u32 batch) {
    constexpr u32 BYTES = COLS * W::BYTES, SIXTEENS = sixteens_of(BYTES);
    __shared__ Sixteen staged[2][ROWS][SIXTEENS];
    const Tile tile = tiles[block_y()];
    u32 first = block_x() * ROWS;
    if (first >= tile.rows) return;
    u32 rows = smaller(ROWS, tile.rows - first);
    u32 row_bytes = cols * W::BYTES, parts = (cols + COLS - 1) / COLS;
    u32 first_batch = (block_z() * (threads() / LANES) + warp()) * BATCH;
    u32 count = first_batch < batch ? smaller(BATCH, batch - first_batch) : 0;

    auto stage_part = [&](u32 part) {
        u32 begin = part * BYTES, bytes = smaller(BYTES, row_bytes - begin);
        const u8 *from = tile.data + u64(first) * row_bytes + begin;
        for (u32 row = thread() / 8; row < rows; row += threads() / 8)
            stage<8, BYTES>(staged[part % 2][row], from + u64(row) * row_bytes, bytes, thread() % 8);
        copies_end();
    };
    float sums[BATCH] = {};
    stage_part(0);
    for (u32 part = 0; part < parts; part++) {
        if (part + 1 < parts) {
            stage_part(part + 1);
            copies_done<1>();
        } else {
            copies_done<0>();
        }
        block_sync();
        if (lane() < rows) {
            const u8 *from = tile.data + u64(first + lane()) * row_bytes + part * BYTES;
            Bytes at = staged_bytes(staged[part % 2][lane()], from);
            u32 some = smaller(COLS, cols - part * COLS);
            for (u32 col = 0; col < some; col++) {
                float w = W::value(at + col * W::BYTES);
#pragma unroll
                for (u32 i = 0; i < BATCH; i++)
                    if (i < count) sums[i] = fused(w, x[u64(first_batch + i) * cols + part * COLS + col], sums[i]);
            }
        }
        block_sync();
    }
    if (lane() >= rows) return;
#pragma unroll
    for (u32 i = 0; i < BATCH; i++)
        if (i < count) tile.out[u64(first_batch + i) * tile.stride + first + lane()] = sums[i];
}
} // namespace floats

#define FLOATS(W, name)                                                                                               \
    KERNEL(256)                                                                                                       \
    floats_##name(const Tile *tiles, u32 cols, const float *x, u32 batch) { floats::run<W>(tiles, cols, x, batch); }
FLOAT_TYPES(FLOATS)
#undef FLOATS
