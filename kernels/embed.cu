// Decodes rows of an embedding table, which lie anywhere: out is rows x cols floats. Null rows are left as they are.
//
// Grid: (64 runs of 32 columns, row). Block: 64 threads.
#include "weights.h"

namespace embed {
template <class W> DEVICE void run(const u8 *const *rows, u32 cols, float *out) {
    u32 run = block_x() * 64 + thread();
    if (run >= cols / 32 || !rows[block_y()]) return;
    Bytes at = bytes_at(rows[block_y()] + u64(run / (W::VALUES / 32)) * W::BYTES);
    Run weights = W::run(at, run % (W::VALUES / 32));
    float d = W::d(at), m = W::m(at);
    out += u64(block_y()) * cols + 32 * run;
#pragma unroll
    for (u32 i = 0; i < 32; i++) {
        float w = float(i32(i8(weights.w[i / 4] >> i % 4 * 8)));
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
    Bytes at = bytes_at(rows[block_y()]);
    u32 first = (block_x() * 64 + thread()) * 32;
    for (u32 i = first; i < first + 32 && i < cols; i++) out[u64(block_y()) * cols + i] = W::value(at + i * W::BYTES);
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
