// The factor of a norm, for the kernels that have one in them.
#pragma once
#include "device.h"

namespace norm {
// What the threads of a block share for it.
struct Memory {
    static constexpr u32 PIECE = 2048;
    float values[PIECE];
    float factor;
};

// Values of a chain that are loaded before the first of them is needed.
constexpr u32 TOGETHER = 8;

// 1 / rms of the n values that `value` tells of, once each; all threads of the block call this together.
//
// The squares are summed in 16 chains, chain i over the values i, i + 16 and so on, which are then
// folded: the CPU's order.
template <class Value> DEVICE float factor(Memory &memory, u32 n, float eps, Value value) {
    float squares = 0.0f;
    for (u32 first = 0; first < n; first += Memory::PIECE) {
        u32 count = smaller(Memory::PIECE, n - first);
        for (u32 i = thread(); i < count; i += threads()) memory.values[i] = value(first + i);
        block_sync();
        for (u32 i = thread(); thread() < 16 && i < count; i += 16 * TOGETHER) {
            // Zeros behind the last one change nothing.
            float some[TOGETHER];
#pragma unroll
            for (u32 j = 0; j < TOGETHER; j++) some[j] = i + 16 * j < count ? memory.values[i + 16 * j] : 0.0f;
#pragma unroll
            for (u32 j = 0; j < TOGETHER; j++) squares = fused(some[j], some[j], squares);
        }
        block_sync();
    }
    if (warp() == 0) {
        float sum = fold_16(squares);
        // Where the sum overflows, all values would become zeros, which look like sound ones: infinity times zero does not.
        if (thread() == 0) memory.factor = divide(1.0f, square_root(divide(sum, float(n)) + eps)) + 0.0f * sum;
    }
    block_sync();
    return memory.factor;
}
} // namespace norm
