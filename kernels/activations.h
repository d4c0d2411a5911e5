// Quantized rows of activations: the one place that knows how many bits they have.
//
// A value is an integer of PARTS int8 parts, each worth 2^FINE_BITS of the next, times its block's
// scale: as on the CPU (src/device/cpu/precision.rs says why there are two). Rows stand in panels
// of 1 (a single row) or 8; a run of 32 columns of a panel is
//     [part][row of the panel][32 bytes]
// and the 32 bytes hold the values 0..4, 16..20, 4..8, 20..24, 8..12, 24..28, 12..16, 28..32: what
// one lane of mma.m16n8k32 takes is then 8 bytes, and what a warp takes is 256 in a row. Integers in
// blocks of 32 of more rows than a panel are halves, whole ones: a run of such a panel is
//     [row of the panel][32 halves]
// with the values in the same order.
#pragma once
#include "device.h"

constexpr u32 PARTS = 2;
constexpr u32 FINE_BITS = 4;
// The largest integer, the CPU's: the sum over 256 values with weights of any type stays within 32 bits.
constexpr float Q_MAX = 1768.0f;
// Columns of a run.
constexpr u32 RUN = 32;
// Rows of a panel of several rows: what mma takes.
constexpr u32 PANEL = 8;

// Rows quantized for weights in blocks of 32 or 256 values, with pointers to:
struct Activations {
    // The integers' parts, or the integers as halves, as above.
    const i8 *q;
    // [panel][block][row of the panel]: the blocks' scales.
    const float *scales;
    // Blocks of 32: the scale times the sum of the integers, as float [panel][block][row].
    // Blocks of 256: the sums of 16 integers each, as i16 [panel][block][row][16].
    const void *sums;
};

// An integer as its parts, the one that is worth most first.
DEVICE void split(i32 q, i32 (&parts)[PARTS]) {
#pragma unroll
    for (u32 part = 0; part + 1 < PARTS; part++) {
        u32 bits = FINE_BITS * (PARTS - 1 - part);
        parts[part] = nearest(float(q) * (1.0f / float(1 << bits)));
        q -= parts[part] * (1 << bits);
    }
    parts[PARTS - 1] = q;
}

// Where in a run's 32 bytes value i stands.
DEVICE u32 place_in_run(u32 i) { return i % 16 / 4 * 8 + i / 16 * 4 + i % 4; }
