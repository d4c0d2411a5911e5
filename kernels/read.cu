// Reads memory as fast as it can be read: what products are measured against.
//
// Each block reads every `blocks`-th piece of 16 KiB and leaves the exclusive or of all its words, so
// that nothing of it can be left out.
//
// Grid: (any number of blocks). Block: 256 threads.
#include "device.h"

KERNEL(256) read_memory(const Sixteen *from, u64 count, u32 blocks, u32 *out) {
    constexpr u32 PIECE = 1024;
    __shared__ u32 words[256 / LANES];
    u32 all = 0;
    for (u64 first = u64(block_x()) * PIECE; first < count; first += u64(blocks) * PIECE) {
#pragma unroll
        for (u32 i = 0; i < PIECE / 256; i++) {
            u64 at = first + i * 256 + thread();
            if (at < count) {
                const Sixteen some = from[at];
                all ^= some.word[0] ^ some.word[1] ^ some.word[2] ^ some.word[3];
            }
        }
    }
#pragma unroll
    for (u32 mask = LANES / 2; mask > 0; mask /= 2) all ^= lane_xor(all, mask);
    if (lane() == 0) words[warp()] = all;
    block_sync();
    if (thread() == 0) {
        for (u32 i = 1; i < 256 / LANES; i++) all ^= words[i];
        out[block_x()] = all;
    }
}
