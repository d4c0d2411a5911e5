// The K likeliest tokens of each row of logits, likeliest first and of equals the lowest id first: all that most
// samplers look at, so that logits need not travel.
//
// The order is the sampler's (src/text/sampler.rs): the two zeros are equal, and what is not a number, or minus
// infinity, is never among them. Where there are fewer tokens the rest is token 0 with minus infinity.
//
// A row's tokens are dealt out to GROUPS groups, so that likely tokens that stand together go to different ones. The
// first kernel reads the logits once and finds the likeliest of each group, its leader. A token whose group's leader is
// not among the K likeliest leaders has K tokens before it: so the second kernel looks only at the K groups that those
// lead, a few percent of the row, and only at what is not behind the last of them.
#include "device.h"

namespace likeliest {
constexpr u32 K = 64, GROUPS = 2048;
// Threads of a block of the first kernel, which have a group each, and warps of one of the second.
constexpr u32 LEADERS = 64, WARPS = GROUPS / K;
// Logits that a thread of either loads before it needs the first.
constexpr u32 TOGETHER = 16, OF_GROUP = 4;

struct Likely {
    float logit;
    u32 id;
};

DEVICE float never() { return from_bits(0xff800000); }

// A token as a number that is larger the likelier it is. No two tokens have the same, and none has 0.
DEVICE u64 key_of(float logit, u32 id) {
    const u32 bits = logit == 0.0f ? 0 : bits_of(logit);
    const u32 ordered = bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
    return u64(ordered) << 32 | ~id;
}
DEVICE u32 id_of(u64 key) { return ~u32(key); }
DEVICE float logit_of(u64 key) {
    const u32 ordered = u32(key >> 32);
    return from_bits(ordered ^ (ordered >> 31 ? 0x80000000 : 0xffffffff));
}

// The functions below are for a whole warp, and lists are of K keys: a pair for each lane. Loops stay loops: this runs
// once a sweep, so that reading it takes longer than running it if it is long.
static_assert(K == 2 * LANES);

// Puts keys that are `stride` apart in order: the larger one first, but last in every other run of `run` keys.
DEVICE void order_pairs(u64 *list, u32 stride, u32 run) {
    const u32 first = 2 * lane() - lane() % stride, second = first + stride;
    const u64 a = list[first], b = list[second];
    if ((a < b) == !(first & run)) {
        list[first] = b;
        list[second] = a;
    }
    warp_sync();
}
// Sorts a list, which falls then: longer and longer runs of it, each put together of one that falls and one that rises.
DEVICE void sort(u64 *list) {
#pragma unroll 1
    for (u32 run = 2; run <= K; run *= 2)
#pragma unroll 1
        for (u32 stride = run / 2; stride > 0; stride /= 2) order_pairs(list, stride, run);
}
// Has the K largest keys of two sorted lists be in the first, sorted.
DEVICE void merge(u64 *list, const u64 *other) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 at = i * LANES + lane();
        list[at] = larger(list[at], other[K - 1 - at]);
    }
    warp_sync();
#pragma unroll
    for (u32 stride = K / 2; stride > 0; stride /= 2) order_pairs(list, stride, K);
}
// Has the K largest keys of all warps' sorted lists be in the first warp's. All threads of the block call this.
DEVICE void merge_all(u64 (*lists)[K]) {
#pragma unroll 1
    for (u32 half = WARPS / 2; half > 0; half /= 2) {
        block_sync();
        if (warp() < half) merge(lists[warp()], lists[warp() + half]);
    }
    block_sync();
}
// Puts a key into its place in a sorted list of which each lane holds a pair; the last of all leaves.
DEVICE void insert(u64 &first, u64 &second, u64 key) {
    const u64 before = lane_at(second, lane() - 1);
    second = larger(second, smaller(first, key));
    first = larger(first, lane() == 0 ? key : smaller(before, key));
}
} // namespace likeliest

// Grid: (64 groups, row). Block: 64 threads. Leaders are rows x 2048 keys.
KERNEL(likeliest::LEADERS) leaders(const float *logits, u32 vocab, u64 *out) {
    using namespace likeliest;
    const u32 group = block_x() * LEADERS + thread();
    logits += u64(block_y()) * vocab;
    float best = never();
    u32 best_id = 0;
    for (u32 first = group; first < vocab; first += TOGETHER * GROUPS) {
        float some[TOGETHER];
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            const u32 id = first + i * GROUPS;
            some[i] = id < vocab ? logits[id] : never();
        }
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            if (some[i] > best) {
                best = some[i];
                best_id = first + i * GROUPS;
            }
        }
    }
    out[u64(block_y()) * GROUPS + group] = best > never() ? key_of(best, best_id) : 0;
}

// Grid: (1, row). Block: 1024 threads. Out is rows x 64.
KERNEL(likeliest::WARPS *LANES) top_k(const float *logits, u32 vocab, const u64 *leaders, likeliest::Likely *out) {
    using namespace likeliest;
    __shared__ u64 lists[WARPS][K];
    u64 *const list = lists[warp()];
    logits += u64(block_y()) * vocab;
    leaders += u64(block_y()) * GROUPS;
#pragma unroll
    for (u32 i = 0; i < 2; i++) list[i * LANES + lane()] = leaders[warp() * K + i * LANES + lane()];
    warp_sync();
    sort(list);
    merge_all(lists);
    // This warp's groups. Only keys above `below` can be of the K largest.
    constexpr u32 CHOSEN = K / WARPS, LOADED = CHOSEN * OF_GROUP;
    static_assert(CHOSEN == 2);
    const u64 chosen[CHOSEN] = {lists[0][warp()], lists[0][WARPS + warp()]};
    u64 below = lists[0][K - 1];
    below -= below > 0;
    block_sync();

    // The largest keys that this warp finds: a list of which each lane holds a pair.
    u64 upper = 0, lower = 0;
    for (u32 skipped = 0; skipped < vocab; skipped += OF_GROUP * LANES * GROUPS) {
        auto id_of_load = [&](u32 i) {
            const u32 group = id_of(i < OF_GROUP ? chosen[0] : chosen[1]) % GROUPS;
            return skipped + (i % OF_GROUP * LANES + lane()) * GROUPS + group;
        };
        float some[LOADED];
#pragma unroll
        for (u32 i = 0; i < LOADED; i++) {
            const u32 id = id_of_load(i);
            some[i] = chosen[i / OF_GROUP] && id < vocab ? logits[id] : never();
        }
#pragma unroll 1
        for (u32 i = 0; i < LOADED; i++) {
            const u64 key = some[0] > never() ? key_of(some[0], id_of_load(i)) : 0;
            u32 which = lanes_where(key > below);
            for (; which; which &= which - 1) {
                insert(upper, lower, lane_at(key, ones((which & -which) - 1)));
                below = larger(below, lane_at(lower, LANES - 1));
            }
            // The next one comes to the front.
#pragma unroll
            for (u32 j = 0; j + 1 < LOADED; j++) some[j] = some[j + 1];
        }
    }
    list[2 * lane()] = upper;
    list[2 * lane() + 1] = lower;
    merge_all(lists);
    if (thread() < K) {
        const u64 key = lists[0][thread()];
        out[u64(block_y()) * K + thread()] = key ? Likely{logit_of(key), id_of(key)} : Likely{never(), 0};
    }
}
