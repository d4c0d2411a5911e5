// The factor of a norm, for the kernels that have one in them.
#pragma once
#include "rows.h"

namespace norm {
constexpr u32 CHAINS = 16;

// What the threads of a block share for it, at most so many of them.
template <u32 THREADS> struct Memory {
    // The values of a chain stand together, at whole fours. What is behind them keeps lanes off each other's banks.
    alignas(16) float chains[CHAINS][THREADS * 8 / CHAINS + 4];
    float factor;
};

// Fours of a chain that are loaded before the first of them is needed.
constexpr u32 TOGETHER = 4;
// Fours that a thread has of a piece of a row: that of its number, and one behind those of all threads.
constexpr u32 OF_THREAD = 2;
DEVICE u32 column_of(u32 begin, u32 i) { return begin + 4 * (i * threads() + thread()); }

// 1 / rms of the n values that `value(column, i)` tells of in fours, zeros behind the last one, once for each four of
// the row, of which i is the thread's how many-th; all threads of the block call this together.
//
// The squares are summed in 16 chains, chain i over the values i, i + 16 and so on, which are then
// folded: the CPU's order.
template <u32 THREADS, class Value> DEVICE float factor(Memory<THREADS> &memory, u32 n, float eps, Value value) {
    float squares = 0.0f;
    for (u32 begin = 0; begin < n; begin += 4 * OF_THREAD * threads()) {
        // What stands there of another piece, or another factor, may still be read.
        block_sync();
        // Zeros behind the last one change nothing.
        constexpr u32 ROUND = 4 * CHAINS * TOGETHER;
        const u32 count = (smaller(4 * OF_THREAD * threads(), n - begin) + ROUND - 1) / ROUND * ROUND;
        Four x[OF_THREAD];
#pragma unroll
        for (u32 i = 0; i < OF_THREAD; i++) x[i] = value(column_of(begin, i), i);
#pragma unroll
        for (u32 i = 0; i < OF_THREAD; i++) {
            const u32 column = column_of(0, i);
            if (column >= count) continue;
#pragma unroll
            for (u32 j = 0; j < 4; j++) memory.chains[column % CHAINS + j][column / CHAINS] = x[i].of[j];
        }
        block_sync();
        if (thread() < CHAINS) {
            const Four *chain = reinterpret_cast<const Four *>(memory.chains[thread()]);
            const u32 fours = count / CHAINS / 4;
            Four next[TOGETHER];
#pragma unroll
            for (u32 i = 0; i < TOGETHER; i++) next[i] = chain[i];
#pragma unroll 1
            for (u32 first = 0; first < fours; first += TOGETHER) {
                Four some[TOGETHER];
#pragma unroll
                for (u32 i = 0; i < TOGETHER; i++) {
                    some[i] = next[i];
                    // Behind the last ones the last ones once more, for nothing.
                    next[i] = chain[smaller(first + TOGETHER, fours - TOGETHER) + i];
#pragma unroll
                    for (u32 j = 0; j < 4; j++) loaded_here(next[i].of[j]);
                }
#pragma unroll
                for (u32 i = 0; i < 4 * TOGETHER; i++)
                    squares = fused(some[i / 4].of[i % 4], some[i / 4].of[i % 4], squares);
            }
        }
    }
    // Others do what the first warp does, too, while they wait: so it has been read from memory when that one gets
    // there.
    const float sum = fold_16(squares);
    // Where the sum overflows, all values would become zeros, which look like sound ones: infinity times zero does not.
    const float factor = divide(1.0f, square_root(divide(sum, float(n)) + eps)) + 0.0f * sum;
    if (thread() == 0) memory.factor = factor;
    block_sync();
    return memory.factor;
}
} // namespace norm
