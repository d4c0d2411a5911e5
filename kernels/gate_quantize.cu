// silu(gate) * up, or gelu(gate) * up with the tanh approximation of gelu, quantized.
//
// Grid: (128 columns a warp, rows of all panels). Block: pairs of warps.
#include "quantize.h"

namespace gate {
template <class Activation>
DEVICE void quantize(const float *gate, const float *up, const QuantizedRows &to, Activation activation) {
    __shared__ quantize::Memory memory;
    const u32 row = block_y(), column = 4 * (block_x() * threads() + thread());
    Four x = {};
    if (row < to.rows) {
        const u64 at = u64(row) * to.cols;
        x = load_four(gate + at, column, to.cols);
        const Four y = load_four(up + at, column, to.cols);
#pragma unroll
        for (u32 i = 0; i < 4; i++) x.of[i] = activation(x.of[i]) * y.of[i];
    }
    quantize::columns(memory, to, row, column, x);
}
} // namespace gate

KERNEL(256) silu_quantize(const float *gate, const float *up, QuantizedRows to) {
    gate::quantize(gate, up, to, [](float x) { return divide(x, 1.0f + exponential(0.0f - x)); });
}

KERNEL(256) gelu_tanh_quantize(const float *gate, const float *up, QuantizedRows to) {
    gate::quantize(gate, up, to, [](float x) {
        float inner = x * 0.7978846f * fused(x * x, 0.044715f, 1.0f);
        return x * 0.5f * (1.0f + hyperbolic_tangent(inner));
    });
}
