// x *= factor.
//
// Grid: (256 values). Block: 256 threads.
#include "device.h"

KERNEL(256) scale(float *x, u64 n, float factor) {
    u64 i = u64(block_x()) * 256 + thread();
    if (i < n) x[i] = x[i] * factor;
}
