// x += y; a shorter y, of `period` values, is repeated: a bias for every row.
//
// Grid: (256 values). Block: 256 threads.
#include "device.h"

KERNEL(256) add(float *x, const float *y, u64 n, u64 period) {
    u64 i = u64(block_x()) * 256 + thread();
    if (i < n) x[i] = x[i] + y[i % period];
}
