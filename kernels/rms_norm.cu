// x = x / rms(x) * weight for each group of n values: a head of a row.
//
// Grid: (groups). Block: 128 threads.
#include "norm.h"

KERNEL(128) rms_norm(float *x, const float *weight, u32 n, float eps) {
    __shared__ norm::Memory memory;
    x += u64(block_x()) * n;
    float factor = norm::factor(memory, n, eps, [&](u32 i) { return x[i]; });
    for (u32 i = thread(); i < n; i += threads()) x[i] = x[i] * factor * weight[i];
}
