// Rows of floats to the integers of activations.h, by kernels that have the floats at hand.
//
// The scale of a block is its largest magnitude / Q_MAX; values go to the nearest integer, halves to
// even, as on the CPU. Rows that fill the last panel up are zeros.
#pragma once
#include "activations.h"
#include "rows.h"

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
// For neighbouring lanes that ask for the same: one divides, the other divides the other way round.
DEVICE Scale scale_of(float largest) {
    const bool nothing = largest < NOTHING, odd = lane() % 2;
    const float mine = divide(odd ? largest : Q_MAX, odd ? Q_MAX : largest), other = float_xor(mine, 1);
    return Scale{nothing ? 0.0f : odd ? other : mine, nothing ? 0.0f : odd ? mine : other};
}

// Writes this lane's four neighbours of a run, as halves or in parts, and returns the sum of their integers.
DEVICE i32 put(i8 *run, u32 panel, u32 row, bool halves, const Four &x, float factor) {
    i32 q[4], sum = 0, parts[4][PARTS];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        q[i] = nearest(x.of[i] * factor);
        sum += q[i];
    }
    const u32 place = row * RUN + place_in_run(4 * lane() % RUN);
    if (halves) {
        auto two = [&](u32 i) { return to_half(float(q[i])) | u32(to_half(float(q[i + 1]))) << 16; };
        *reinterpret_cast<u64 *>(run + 2 * place) = two(0) | u64(two(2)) << 32;
        return sum;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) split(q[i], parts[i]);
    u8 *to = reinterpret_cast<u8 *>(run) + place;
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        const u32 low = pick_bytes(u32(parts[0][part]), u32(parts[1][part]), 0x0040);
        const u32 high = pick_bytes(u32(parts[2][part]), u32(parts[3][part]), 0x0040);
        *reinterpret_cast<u32 *>(to + part * panel * RUN) = pick_bytes(low, high, 0x5410);
    }
    return sum;
}

// This thread's four columns of a row, from `column` on, and what stands there: nothing behind the row's end. All
// threads of a block call this together; from one thread to the next, columns go up by four, and two warps have a block
// of 256 columns.
DEVICE void columns(Memory &memory, const QuantizedRows &to, u32 row, u32 column, Four x) {
    const bool within = column < to.cols;
    if (row >= to.rows) x = Four{};
    if (row < to.rows && to.plain) store_four(to.plain + u64(row) * to.cols, column, to.cols, x);
    // Magnitudes are in the order of their bits, what is no number behind all that are: so nothing hides it, and the
    // block's scale tells of it whatever the integers are.
    u32 largest = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) largest = larger(largest, bits_of(magnitude(x.of[i])));
    largest = max_lanes<8>(largest);
    const u32 panel = to.panel, in_panel = panel == 1 ? 0 : row % PANEL;
    const u32 run = (panel == 1 ? row : row / PANEL) * (to.cols / RUN) + column / RUN;
    if (to.of_32.q) {
        const Scale s = scale_of(from_bits(largest));
        i32 sum = 0;
        i8 *to_run = to.of_32.q + u64(run) * PARTS * panel * RUN;
        if (within) sum = put(to_run, panel, in_panel, to.rows > PANEL, x, s.factor);
        sum = sum_lanes<8>(sum);
        if (within && lane() % 8 == 0) {
            to.of_32.scales[run * panel + in_panel] = s.scale;
            static_cast<float *>(to.of_32.sums)[run * panel + in_panel] = s.scale * float(sum);
        }
    }
    if (!to.of_256.q) return;
    largest = larger(largest, lane_xor(largest, 8));
    largest = larger(largest, lane_xor(largest, 16));
    if (lane() == 0) memory.largest[warp()] = largest;
    block_sync();
    largest = larger(largest, memory.largest[warp() ^ 1]);
    // What comes next may write there again.
    block_sync();
    const Scale s = scale_of(from_bits(largest));
    if (!within) return;
    constexpr u32 RUNS = 256 / RUN;
    i8 *to_run = to.of_256.q + u64(run) * PARTS * panel * RUN;
    const i32 sum = sum_lanes<4>(put(to_run, panel, in_panel, false, x, s.factor));
    const u32 place = run / RUNS * panel + in_panel;
    if (column % 256 == 0) to.of_256.scales[place] = s.scale;
    if (lane() % 4 == 0) static_cast<i16 *>(to.of_256.sums)[place * 16 + column % 256 / 16] = i16(sum);
}
} // namespace quantize
