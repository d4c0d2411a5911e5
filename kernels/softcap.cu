// x = cap * tanh(x / cap).
//
// Grid: (256 values). Block: 256 threads.
#include "device.h"

KERNEL(256) softcap(float *x, u64 n, float cap) {
    u64 i = u64(block_x()) * 256 + thread();
    // The cap of what is not finite would look sound: zero times it does not.
    if (i < n) x[i] = fused(x[i], 0.0f, hyperbolic_tangent(divide(x[i], cap)) * cap);
}
