// Rows of floats to the integers of activations.h, by kernels that have the floats at hand.
//
// The scale of a block is its largest magnitude / Q_MAX; values go to the nearest integer, halves to
// even, as on the CPU. Rows that fill the last panel up are zeros.
#pragma once
#include "activations.h"

// Rows in blocks of 32 or 256 values, as `Activations` says of them.
struct QuantizedBlocks {
    i8 *q;
    float *scales;
    void *sums;
};

// Where rows go: those of these three that are wanted; the others are null.
struct QuantizedRows {
    QuantizedBlocks of_32, of_256;
    // rows x cols: as they are.
    float *plain;
    u32 rows;
    // The row that a launch begins with: others may have taken those before.
    u32 first;
    u32 cols;
    // Rows of a panel, 1 or 8.
    u32 panel;
};

namespace quantize {
// What blocks of threads take of a row at a time: one column each.
constexpr u32 COLUMNS = 256;
// Blocks of nothing larger than this count as zero: the factor of smaller ones would not be finite.
constexpr float NOTHING = 1e-30f;

// What the threads of a block share: the largest magnitude of each warp, as bits.
struct Memory {
    u32 largest[32];
};

struct Scale {
    // What values are multiplied with to become integers, and what undoes it.
    float factor, scale;
};
DEVICE Scale scale_of(float largest) {
    bool nothing = largest < NOTHING;
    return Scale{nothing ? 0.0f : divide(Q_MAX, largest), nothing ? 0.0f : divide(largest, Q_MAX)};
}

// Writes this lane's value of a run, and returns its integer.
DEVICE i32 put(i8 *run, u32 panel, u32 row, float value, float factor) {
    i32 q = nearest(value * factor), parts[PARTS];
    split(q, parts);
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) run[(part * panel + row) * RUN + place_in_run(lane())] = i8(parts[part]);
    return q;
}

// This thread's column of a row: `value` tells what stands there. All threads of a block call this together; from one
// thread to the next, columns go up by one, and 256 threads have the columns of a block of 256.
template <class Value>
DEVICE void column(Memory &memory, const QuantizedRows &to, u32 row, u32 column, Value value) {
    const bool within = column < to.cols, some = within && row < to.rows;
    const float x = some ? value(column) : 0.0f;
    if (some && to.plain) to.plain[u64(row) * to.cols + column] = x;
    // Magnitudes are in the order of their bits, what is no number behind all that are: so nothing hides it, and the
    // block's scale tells of it whatever the integers are.
    u32 largest = max_lanes<LANES>(bits_of(magnitude(x)));
    const u32 panel = to.panel, in_panel = row % panel, runs = to.cols / RUN, run = row / panel * runs + column / RUN;
    if (within && to.of_32.q) {
        Scale s = scale_of(from_bits(largest));
        i32 sum = sum_lanes<32>(put(to.of_32.q + u64(run) * PARTS * panel * RUN, panel, in_panel, x, s.factor));
        if (lane() == 0) {
            to.of_32.scales[run * panel + in_panel] = s.scale;
            static_cast<float *>(to.of_32.sums)[run * panel + in_panel] = s.scale * float(sum);
        }
    }
    if (!to.of_256.q) return;
    constexpr u32 WARPS = COLUMNS / LANES;
    if (lane() == 0) memory.largest[warp()] = largest;
    block_sync();
#pragma unroll
    for (u32 i = 0; i < WARPS; i++) largest = larger(largest, memory.largest[warp() / WARPS * WARPS + i]);
    // What comes next may write there again.
    block_sync();
    if (!within) return;
    Scale s = scale_of(from_bits(largest));
    i32 sum = sum_lanes<16>(put(to.of_256.q + u64(run) * PARTS * panel * RUN, panel, in_panel, x, s.factor));
    u32 place = run / WARPS * panel + in_panel;
    if (column % COLUMNS == 0) to.of_256.scales[place] = s.scale;
    if (lane() % 16 == 0) static_cast<i16 *>(to.of_256.sums)[place * 16 + column % COLUMNS / 16] = i16(sum);
}
} // namespace quantize
