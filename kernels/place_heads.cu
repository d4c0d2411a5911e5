// Queries, keys and values as products give them, made ready for attention: biases are added, heads of
// queries and keys are normed and rotated; queries stay where they are, keys and values go to their
// pages as f16.
//
// Grid: (heads of queries, of keys, of values; row). Block: whole warps, with a thread for a dimension at best.
#include "norm.h"
#include "pages.h"

// What is null is not done.
struct Heads {
    // rows x heads x head_dim.
    float *q;
    // rows x kv_heads x head_dim.
    const float *k, *v;
    const float *q_bias, *k_bias, *v_bias;
    // head_dim each.
    const float *q_norm, *k_norm;
    // rows x pairs.
    const float *cos, *sin;
    const KvPlace *places;
};

// The first 2 x pairs dimensions of a head rotate: 2i with 2i + 1 (`adjacent`), or i with i + pairs.
KERNEL(256) place_heads(Heads all, KvLayout layout, u32 q_heads, u32 pairs, u32 adjacent, float eps) {
    __shared__ norm::Memory<256> memory;
    const u32 head_dim = layout.head_dim, row = block_y();
    const KvPlace place = all.places[row];
    const bool is_q = block_x() < q_heads, is_k = !is_q && block_x() < q_heads + layout.kv_heads;
    const u32 head = block_x() - (is_q ? 0 : is_k ? q_heads : q_heads + layout.kv_heads);
    const float *x = is_q ? all.q : is_k ? all.k : all.v, *bias = is_q ? all.q_bias : is_k ? all.k_bias : all.v_bias;
    const u64 at = (u64(row) * (is_q ? q_heads : layout.kv_heads) + head) * head_dim;
    auto biased = [&](u32 i) { return bias ? x[at + i] + bias[head * head_dim + i] : x[at + i]; };
    if (!is_q && !is_k) {
        u16 *value = value_of(layout, place.page, head, u32(place.index));
        for (u32 i = thread(); i < head_dim; i += threads()) value[i] = to_half(biased(i));
        return;
    }
    const float *weight = is_q ? all.q_norm : all.k_norm;
    auto four_biased = [&](u32 i, u32) {
        Four four = {};
#pragma unroll
        for (u32 j = 0; j < 4; j++)
            if (i + j < head_dim) four.of[j] = biased(i + j);
        return four;
    };
    const float factor = weight ? norm::factor(memory, head_dim, eps, four_biased) : 1.0f;
    auto normed = [&](u32 i) { return weight ? biased(i) * factor * weight[i] : biased(i); };
    auto put = [&](u32 i, float value) {
        if (is_q)
            all.q[at + i] = value;
        else
            key_of(layout, place.page, head, u32(place.index))[16 * i] = to_half(value);
    };
    // Each value is read and written by the same thread.
    for (u32 i = thread(); i < head_dim - pairs; i += threads()) {
        if (i >= pairs) {
            put(pairs + i, normed(pairs + i));
            continue;
        }
        const u32 first = adjacent != 0 ? 2 * i : i, second = adjacent != 0 ? 2 * i + 1 : pairs + i;
        float a = normed(first), b = normed(second);
        float c = all.cos[u64(row) * pairs + i], s = all.sin[u64(row) * pairs + i];
        put(first, a * c - b * s);
        put(second, a * s + b * c);
    }
}
