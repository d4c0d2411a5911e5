// silu(gate) * up, or gelu(gate) * up with the tanh approximation of gelu, quantized.
//
// Grid: (256 columns, rows of all panels). Block: 256 threads.
#include "quantize.h"

KERNEL(256) silu_quantize(const float *gate, const float *up, QuantizedRows to) {
    __shared__ quantize::Memory memory;
    const u32 row = block_y();
    quantize::column(memory, to, row, block_x() * 256 + thread(), [&](u32 i) {
        u64 at = u64(row) * to.cols + i;
        float x = gate[at];
        return divide(x, 1.0f + exponential(0.0f - x)) * up[at];
    });
}

KERNEL(256) gelu_tanh_quantize(const float *gate, const float *up, QuantizedRows to) {
    __shared__ quantize::Memory memory;
    const u32 row = block_y();
    quantize::column(memory, to, row, block_x() * 256 + thread(), [&](u32 i) {
        u64 at = u64(row) * to.cols + i;
        float x = gate[at];
        float inner = x * 0.7978846f * fused(x * x, 0.044715f, 1.0f);
        return x * 0.5f * (1.0f + hyperbolic_tangent(inner)) * up[at];
    });
}
