// Pages of keys and values: the layout that the CPU has too (src/device/cpu/kv.rs).
#pragma once
#include "device.h"

struct KvLayout {
    u32 kv_heads;
    // A multiple of 16.
    u32 head_dim;
    // Positions in one page, a multiple of 16.
    u32 page_positions;
};

// Where a new position goes.
struct KvPlace {
    u16 *page;
    u64 index;
};

// The key's dimension 0 of a position within a page; dimensions are 16 apart.
template <class P> DEVICE P *key_of(const KvLayout &layout, P *page, u32 head, u32 index) {
    return page + (head * layout.page_positions + index / 16 * 16) * layout.head_dim + index % 16;
}
// The value's dimension 0.
template <class P> DEVICE P *value_of(const KvLayout &layout, P *page, u32 head, u32 index) {
    return page + ((layout.kv_heads + head) * layout.page_positions + index) * layout.head_dim;
}
