// Decodes rows of an embedding table, which lie anywhere: out is rows x cols floats. Null rows are left as they are.
//
// Grid: (64 runs of 32 columns, row). Block: 64 threads.
#include "weights.h"

namespace embed {
constexpr u32 RUNS = 64;

// The block's bytes of its row in shared memory.
template <u32 part_bytes> DEVICE Bytes staged(const u8 *row, u32 row_bytes) {
    __shared__ Sixteen memory[sixteens_of(part_bytes)];
    u32 begin = block_x() * part_bytes;
    stage<RUNS, part_bytes>(memory, row + begin, smaller(part_bytes, row_bytes - begin), thread());
    copies_end();
    copies_done<0>();
    block_sync();
    return staged_bytes(memory, row + begin);
}

template <class W> DEVICE void run(const u8 *const *rows, u32 cols, float *out) {
    if (!rows[block_y()]) return;
    constexpr u32 BYTES = RUNS * 32 / W::VALUES * W::BYTES;
    Bytes bytes = staged<BYTES>(rows[block_y()], cols / W::VALUES * W::BYTES);
    u32 run = block_x() * RUNS + thread();
    if (run >= cols / 32) return;
    Bytes at = bytes + thread() / (W::VALUES / 32) * W::BYTES;
    Run weights = run_of<W>(at, run % (W::VALUES / 32));
    float d = W::d(at), m = W::m(at);
    out += u64(block_y()) * cols + 32 * run;
#pragma unroll
    for (u32 i = 0; i < 32; i++) {
        float w = float(i32(i8(weights.w[i / 4] >> i % 4 * 8)) - i32(W::OFFSET));
        // Rounded as ggml does, and src/format/quant.rs with it.
        if constexpr (W::SCALES == 0) {
            out[i] = W::MIN ? w * d + m : w * d;
        } else {
            u32 part = W::SCALES == 2 ? i / 16 : 0;
            float scaled = d * float(weights.scale[part]) * w;
            out[i] = W::MIN ? scaled - m * float(weights.min[part]) : scaled;
        }
    }
}
template <class W> DEVICE void run_floats(const u8 *const *rows, u32 cols, float *out) {
    if (!rows[block_y()]) return;
    Bytes bytes = staged<RUNS * 32 * W::BYTES>(rows[block_y()], cols * W::BYTES);
    u32 begin = block_x() * RUNS * 32, count = smaller(RUNS * 32, cols - begin);
    out += u64(block_y()) * cols + begin;
    for (u32 i = thread(); i < count; i += RUNS) out[i] = W::value(bytes + i * W::BYTES);
}
} // namespace embed

#define EMBED(W, name)                                                                                                \
    KERNEL(64) embed_##name(const u8 *const *rows, u32 cols, float *out) { embed::run<W>(rows, cols, out); }
QUANTIZED_TYPES(EMBED)
#undef EMBED
#define EMBED(W, name)                                                                                                \
    KERNEL(64) embed_##name(const u8 *const *rows, u32 cols, float *out) { embed::run_floats<W>(rows, cols, out); }
FLOAT_TYPES(EMBED)
#undef EMBED
