// out = x / rms(x) * weight for each group of n values: a row, or a head of a row. `out` may be `x`.
//
// The squares are summed in 16 chains, chain i over the values i, i + 16 and so on, which are then
// folded: the CPU's order.
//
// Grid: (groups). Block: 128 threads.
#include "device.h"

KERNEL(128) rms_norm(const float *x, const float *weight, float *out, u32 n, float eps) {
    constexpr u32 PIECE = 2048;
    __shared__ float values[PIECE];
    __shared__ float shared_factor;
    x += u64(block_x()) * n;
    out += u64(block_x()) * n;
    float squares = 0.0f;
    for (u32 first = 0; first < n; first += PIECE) {
        u32 count = smaller(PIECE, n - first);
        for (u32 i = thread(); i < count; i += threads()) values[i] = x[first + i];
        block_sync();
        if (thread() < 16)
            for (u32 i = thread(); i < count; i += 16) squares = fused(values[i], values[i], squares);
        block_sync();
    }
    if (warp() == 0) {
        float sum = fold_16(squares);
        if (thread() == 0) shared_factor = divide(1.0f, square_root(divide(sum, float(n)) + eps));
    }
    block_sync();
    float factor = shared_factor;
    for (u32 i = thread(); i < n; i += threads()) out[i] = x[i] * factor * weight[i];
}
