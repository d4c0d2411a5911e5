// The residual stream before a product: x += y where there is a y, in its own norm if that has weights;
// then x / rms(x) * weight, quantized.
//
// Grid: (rows of all panels). Block: 256 threads, or a few times as many where rows are wide.
#include "norm.h"
#include "quantize.h"

KERNEL(1024)
norm_quantize(float *x, const float *y, const float *y_weight, const float *weight, float eps, QuantizedRows to) {
    __shared__ norm::Memory memory;
    __shared__ quantize::Memory largest;
    const u32 row = block_x(), n = to.cols;
    const u64 at = u64(row) * n;
    float factor = 0.0f;
    if (row < to.rows) {
        float y_factor = 0.0f;
        if (y_weight) y_factor = norm::factor(memory, n, eps, [&](u32 i) { return y[at + i]; });
        factor = norm::factor(memory, n, eps, [&](u32 i) {
            float value = x[at + i];
            if (y) {
                value = value + (y_weight ? y[at + i] * y_factor * y_weight[i] : y[at + i]);
                x[at + i] = value;
            }
            return value;
        });
    }
    for (u32 first = 0; first < n; first += threads())
        quantize::column(largest, to, row, first + thread(), [&](u32 i) { return x[at + i] * factor * weight[i]; });
}
