// The k largest of a row's values, in order; of equal ones the first: argmax, with k = 1.
//
// A block sorts 2048 of them, as keys that order as values do and, where these are equal, against
// their places. One launch over the values leaves k keys of each 2048; launches over keys follow until
// one block has seen them all.
//
// Grid: (2048 values or keys of a row, row). Block: 512 threads.
#include "device.h"

namespace top_k {
constexpr u32 COUNT = 2048, THREADS = 512;

// Larger for a larger value; NaN counts as the smallest.
DEVICE u32 ordered(float x) {
    u32 bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0;
    // Zeros are equal.
    if (bits == 0x80000000u) bits = 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Sorts `keys`, the largest first, by a bitonic network.
DEVICE void sort(u64 *keys) {
    for (u32 size = 2; size <= COUNT; size *= 2) {
        for (u32 step = size / 2; step > 0; step /= 2) {
            block_sync();
            for (u32 i = thread(); i < COUNT / 2; i += THREADS) {
                u32 a = i / step * step * 2 + i % step, b = a + step;
                bool descending = (a & size) == 0;
                if ((keys[a] < keys[b]) == descending) {
                    u64 key = keys[a];
                    keys[a] = keys[b];
                    keys[b] = key;
                }
            }
        }
    }
    block_sync();
}

// Writes the first `k` of this block's keys behind those of the row's blocks before.
DEVICE void put(const u64 *keys, u64 *out, u32 blocks, u32 k) {
    for (u32 i = thread(); i < k; i += THREADS) out[(u64(block_y()) * blocks + block_x()) * k + i] = keys[i];
}
} // namespace top_k

// Keys of a row's values: (ordered value, ~index); a key of 0 is none. out: rows x blocks x k.
KERNEL(512) top_k_values(const float *x, u32 n, u32 k, u32 blocks, u64 *out) {
    __shared__ u64 keys[top_k::COUNT];
    for (u32 i = thread(); i < top_k::COUNT; i += top_k::THREADS) {
        u32 at = block_x() * top_k::COUNT + i;
        keys[i] = at < n ? u64(top_k::ordered(x[u64(block_y()) * n + at])) << 32 | (0xffffffffu - at) : 0;
    }
    top_k::sort(keys);
    top_k::put(keys, out, blocks, k);
}

// The same of n keys of each row.
KERNEL(512) top_k_keys(const u64 *from, u32 n, u32 k, u32 blocks, u64 *out) {
    __shared__ u64 keys[top_k::COUNT];
    for (u32 i = thread(); i < top_k::COUNT; i += top_k::THREADS) {
        u32 at = block_x() * top_k::COUNT + i;
        keys[i] = at < n ? from[u64(block_y()) * n + at] : 0;
    }
    top_k::sort(keys);
    top_k::put(keys, out, blocks, k);
}
