// Rotates every head of x (rows x heads x head_dim) by its row's angles; cos and sin are rows x n.
// The first 2n dimensions rotate: 2i with 2i + 1 (`adjacent`), or i with i + n.
//
// Grid: (256 pairs of a row, row). Block: 256 threads.
#include "device.h"

KERNEL(256) rope(float *x, const float *cos, const float *sin, u32 row_values, u32 head_dim, u32 n, u32 adjacent) {
    u32 pair = block_x() * 256 + thread();
    if (pair >= row_values / head_dim * n) return;
    u32 head = pair / n, i = pair % n;
    float *at = x + u64(block_y()) * row_values + head * head_dim;
    float *a = at + (adjacent != 0 ? 2 * i : i), *b = at + (adjacent != 0 ? 2 * i + 1 : n + i);
    float c = cos[u64(block_y()) * n + i], s = sin[u64(block_y()) * n + i];
    float rotated = *a * c - *b * s;
    *b = *a * s + *b * c;
    *a = rotated;
}
