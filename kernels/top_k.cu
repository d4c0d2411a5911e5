// The K likeliest tokens of each row of logits, likeliest first and of equals the lowest id first: all that most
// samplers look at, so that logits need not travel.
//
// The order is the sampler's (src/text/sampler.rs): the two zeros are equal, and what is not a number, or minus
// infinity, is never among them. Where there are fewer tokens the rest is token 0 with minus infinity.
//
// A row's tokens are dealt out to GROUPS groups, so that likely tokens that stand together go to different ones. The
// first kernel reads the logits once and finds the likeliest of each group, its leader; each of its blocks sorts its
// own, while there are many of them. A token whose group's leader is not among the K likeliest leaders has K tokens
// before it: so the second kernel looks only at the K groups that those lead, a few percent of the row, and only at
// what is not behind the last of them.
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

// The functions below are for a whole warp. Lists are of K keys that fall: a lane has the one of its number and the one
// LANES behind it. Loops stay loops where they may: this runs once a sweep, so that reading it takes longer than
// running it if it is long.
static_assert(K == 2 * LANES);
struct List {
    u64 key[2];
};

// Puts keys that are `stride` lanes apart in order: the larger one first, or last.
DEVICE u64 order_pair(u64 key, u32 stride, bool last) {
    const u64 other = lane_at(key, lane() ^ stride);
    return (key > other) == (((lane() & stride) != 0) == last) ? key : other;
}
// Sorts the keys of a warp so that they fall: longer and longer runs of it, each put together of one that falls and one
// that rises.
DEVICE u64 sort(u64 key) {
#pragma unroll 1
    for (u32 run = 2; run <= LANES; run *= 2)
#pragma unroll 1
        for (u32 stride = run / 2; stride > 0; stride /= 2) key = order_pair(key, stride, lane() & run);
    return key;
}
// Sorts keys that first rise and then fall, or the other way round, so that they fall.
DEVICE u64 sort_bitonic(u64 key) {
#pragma unroll
    for (u32 stride = LANES / 2; stride > 0; stride /= 2) key = order_pair(key, stride, false);
    return key;
}
// The K largest keys of two lists.
DEVICE List merge(const List &list, const u64 *other) {
    u64 largest[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) largest[i] = larger(list.key[i], other[K - 1 - i * LANES - lane()]);
    return List{{sort_bitonic(larger(largest[0], largest[1])), sort_bitonic(smaller(largest[0], largest[1]))}};
}
// Has the first list be of the K largest keys of all warps' lists. All threads of the block call this, and the lists
// are nobody's any more before.
DEVICE void merge_all(u64 (*lists)[K], List list) {
    u64 *const mine = lists[warp()] + lane();
#pragma unroll 1
    for (u32 half = WARPS / 2; half > 0; half /= 2) {
        if (warp() >= half && warp() < 2 * half) {
            mine[0] = list.key[0];
            mine[LANES] = list.key[1];
        }
        block_sync();
        if (warp() < half) list = merge(list, lists[warp() + half]);
    }
    if (warp() == 0) {
        mine[0] = list.key[0];
        mine[LANES] = list.key[1];
    }
    block_sync();
}
// Puts a key into its place in a list that lies otherwise, a pair of neighbours in a lane; the last of all leaves.
DEVICE void insert(u64 &first, u64 &second, u64 key) {
    const u64 before = lane_at(second, lane() - 1);
    second = larger(second, smaller(first, key));
    first = larger(first, lane() == 0 ? key : smaller(before, key));
}
} // namespace likeliest

// Grid: (64 groups, row). Block: 64 threads. Leaders are rows x 32 lists of 64 keys.
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
    // Two warps sort theirs, and one takes the larger ones of both then and the other the smaller ones.
    static_assert(LEADERS == K);
    __shared__ u64 sorted[K];
    u64 key = sort(best > never() ? key_of(best, best_id) : 0);
    sorted[thread()] = key;
    block_sync();
    const u64 other = sorted[K - 1 - thread()];
    key = sort_bitonic(warp() == 0 ? larger(key, other) : smaller(key, other));
    out[u64(block_y()) * GROUPS + group] = key;
}

// Grid: (1, row). Block: 1024 threads. Out is rows x 64.
KERNEL(likeliest::WARPS *LANES) top_k(const float *logits, u32 vocab, const u64 *leaders, likeliest::Likely *out) {
    using namespace likeliest;
    __shared__ u64 lists[WARPS][K];
    u64 *const list = lists[warp()];
    logits += u64(block_y()) * vocab;
    leaders += u64(block_y()) * GROUPS;
    merge_all(lists, List{{leaders[warp() * K + lane()], leaders[warp() * K + LANES + lane()]}});
    // This warp's groups. Only keys above `below` can be of the K largest.
    constexpr u32 CHOSEN = K / WARPS, LOADED = CHOSEN * OF_GROUP;
    static_assert(CHOSEN == 2);
    const u64 chosen[CHOSEN] = {lists[0][warp()], lists[0][WARPS + warp()]};
    u64 below = lists[0][K - 1];
    below -= below > 0;
    block_sync();

    // The largest keys that this warp finds: a list of which each lane holds a pair of neighbours.
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
    warp_sync();
    const List found = {{list[lane()], list[LANES + lane()]}};
    warp_sync();
    merge_all(lists, found);
    if (thread() < K) {
        const u64 key = lists[0][thread()];
        out[u64(block_y()) * K + thread()] = key ? Likely{logit_of(key), id_of(key)} : Likely{never(), 0};
    }
}
