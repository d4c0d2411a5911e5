// Rows of floats, four neighbours at a time. Rows are of whole fours, and aligned to them.
#pragma once
#include "device.h"

// What one load or store moves.
struct alignas(16) Four {
    float of[4];
};

// Those of a row of `n` from column `i` on; behind its end stand zeros.
DEVICE Four load_four(const float *row, u32 i, u32 n) {
    return i < n ? *reinterpret_cast<const Four *>(row + i) : Four{};
}
DEVICE void store_four(float *row, u32 i, u32 n, const Four &four) {
    if (i < n) *reinterpret_cast<Four *>(row + i) = four;
}

// Columns of a row that a warp takes at a time, a lane four of them.
constexpr u32 COLUMNS = 4 * LANES;
