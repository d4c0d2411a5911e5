// gate = silu(gate) * up, or gelu(gate) * up with the tanh approximation of gelu.
//
// Grid: (256 values). Block: 256 threads.
#include "device.h"

KERNEL(256) silu_mul(float *gate, const float *up, u64 n) {
    u64 i = u64(block_x()) * 256 + thread();
    if (i >= n) return;
    float x = gate[i];
    gate[i] = divide(x, 1.0f + exponential(0.0f - x)) * up[i];
}

KERNEL(256) gelu_tanh_mul(float *gate, const float *up, u64 n) {
    u64 i = u64(block_x()) * 256 + thread();
    if (i >= n) return;
    float x = gate[i];
    float inner = x * 0.7978846f * fused(x * x, 0.044715f, 1.0f);
    gate[i] = x * 0.5f * (1.0f + hyperbolic_tangent(inner)) * up[i];
}
