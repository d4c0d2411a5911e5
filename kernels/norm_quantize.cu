// The residual stream before a product: x += y where there is a y, in its own norm if that has weights;
// then x / rms(x) * weight, quantized.
//
// Grid: (rows of all panels). Block: pairs of warps, one for each 512 columns at best.
#include "norm.h"
#include "quantize.h"

KERNEL(1024)
norm_quantize(float *x, const float *y, const float *y_weight, const float *weight, float eps, QuantizedRows to) {
    using norm::OF_THREAD;
    __shared__ norm::Memory<1024> memory;
    __shared__ quantize::Memory largest;
    const u32 row = block_x(), n = to.cols, piece = 4 * OF_THREAD * threads();
    const u64 at = u64(row) * n;
    // What this thread has of the first piece of the row, mostly all there is, is loaded once, all of it before the
    // first is needed.
    Four kept[OF_THREAD] = {}, weights[OF_THREAD] = {}, added[OF_THREAD] = {};
    float factor = 0.0f;
    if (row < to.rows) {
#pragma unroll
        for (u32 i = 0; i < OF_THREAD; i++) {
            const u32 column = norm::column_of(0, i);
            kept[i] = load_four(x + at, column, n);
            if (y) added[i] = load_four(y + at, column, n);
            weights[i] = load_four(weight, column, n);
        }
        float y_factor = 0.0f;
        if (y_weight) {
            y_factor = norm::factor(memory, n, eps, [&](u32 column, u32 i) {
                Four value = added[i];
                if (column >= piece) value = load_four(y + at, column, n);
                return value;
            });
        }
        factor = norm::factor(memory, n, eps, [&](u32 column, u32 i) {
            Four value = kept[i], more = added[i];
            if (column >= piece) {
                value = load_four(x + at, column, n);
                if (y) more = load_four(y + at, column, n);
            }
            if (y_weight) {
                const Four of_more = load_four(y_weight, column, n);
#pragma unroll
                for (u32 j = 0; j < 4; j++) more.of[j] = more.of[j] * y_factor * of_more.of[j];
            }
            if (y) {
#pragma unroll
                for (u32 j = 0; j < 4; j++) value.of[j] = value.of[j] + more.of[j];
                store_four(x + at, column, n, value);
            }
            if (column < piece) kept[i] = value;
            return value;
        });
    }
    // A loop that stays one: this is read from memory for each launch, which takes longer than running it.
#pragma unroll 1
    for (u32 begin = 0; begin < n; begin += 4 * threads()) {
        const u32 column = norm::column_of(begin, 0);
        Four value = kept[0], of_value = weights[0];
        if (begin >= piece && row < to.rows) {
            value = load_four(x + at, column, n);
            of_value = load_four(weight, column, n);
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++) value.of[j] = value.of[j] * factor * of_value.of[j];
        quantize::columns(largest, to, row, column, value);
        // The next one comes to the front.
#pragma unroll
        for (u32 i = 0; i + 1 < OF_THREAD; i++) kept[i] = kept[i + 1], weights[i] = weights[i + 1];
    }
}
