// Rows of floats to the integers of activations.h, in panels of `panel` rows (1 or 8).
//
// The scale of a block is its largest magnitude / Q_MAX; values go to the nearest integer, halves to
// even, as on the CPU. Rows that fill the last panel up are zeros.
//
// Grid: (4 blocks of columns, rows of all panels). Block: 128 threads, a warp for each block of columns.
#include "activations.h"

namespace quantize {
// Blocks of nothing larger than this count as zero: the factor of smaller ones would not be finite.
constexpr float NOTHING = 1e-30f;

// Writes value `i` of a run, and returns its integer.
DEVICE i32 put(i8 *run, u32 panel, u32 row, u32 i, float x, float factor) {
    i32 q = nearest(x * factor), parts[PARTS];
    split(q, parts);
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) run[(part * panel + row) * RUN + place_in_run(i)] = i8(parts[part]);
    return q;
}
} // namespace quantize

KERNEL(128)
quantize_32(const float *x, u32 rows, u32 cols, u32 panel, i8 *q, float *scales, float *sums) {
    u32 block = block_x() * 4 + warp(), blocks = cols / 32;
    if (block >= blocks) return;
    u32 row = block_y(), at = row / panel * blocks + block;
    float value = row < rows ? x[u64(row) * cols + 32 * block + lane()] : 0.0f;
    float largest = max_lanes<32>(magnitude(value));
    bool nothing = largest < quantize::NOTHING;
    float factor = nothing ? 0.0f : divide(Q_MAX, largest);
    float scale = nothing ? 0.0f : divide(largest, Q_MAX);
    i8 *run = q + u64(at) * PARTS * panel * RUN;
    i32 sum = sum_lanes<32>(quantize::put(run, panel, row % panel, lane(), value, factor));
    if (lane() == 0) {
        scales[at * panel + row % panel] = scale;
        sums[at * panel + row % panel] = scale * float(sum);
    }
}

KERNEL(128)
quantize_256(const float *x, u32 rows, u32 cols, u32 panel, i8 *q, float *scales, i16 *sums) {
    u32 block = block_x() * 4 + warp(), blocks = cols / 256;
    if (block >= blocks) return;
    u32 row = block_y(), at = row / panel * blocks + block;
    float values[8], largest = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        values[i] = row < rows ? x[u64(row) * cols + 256 * block + 32 * i + lane()] : 0.0f;
        largest = larger(largest, magnitude(values[i]));
    }
    largest = max_lanes<32>(largest);
    bool nothing = largest < quantize::NOTHING;
    float factor = nothing ? 0.0f : divide(Q_MAX, largest);
    u32 place = at * panel + row % panel;
    if (lane() == 0) scales[place] = nothing ? 0.0f : divide(largest, Q_MAX);
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        i8 *run = q + (u64(at) * 8 + i) * PARTS * panel * RUN;
        i32 sum = sum_lanes<16>(quantize::put(run, panel, row % panel, lane(), values[i], factor));
        if (lane() % 16 == 0) sums[place * 16 + 2 * i + lane() / 16] = i16(sum);
    }
}
