// Writes keys and values of new positions into their pages as f16, in the CPU's layout:
// keys [kv_head][16 positions][head_dim][16], then values [kv_head][position][head_dim].
//
// Grid: (256 values of a row, row). Block: 256 threads.
#include "pages.h"

KERNEL(256) kv_append(KvLayout layout, const KvPlace *places, const float *k, const float *v) {
    u32 values = layout.kv_heads * layout.head_dim;
    u32 i = block_x() * 256 + thread();
    if (i >= values) return;
    const KvPlace place = places[block_y()];
    u32 head = i / layout.head_dim, d = i % layout.head_dim;
    u64 at = u64(block_y()) * values + i;
    key_of(layout, place.page, head, place.index)[16 * d] = to_half(k[at]);
    value_of(layout, place.page, head, place.index)[d] = to_half(v[at]);
}
