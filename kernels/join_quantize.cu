// Puts the splits of each query together and quantizes the rows. Rows of one split are done already.
//
// Grid: (128 columns a warp, rows from `to.first` on, those of the last panel with the last ones). Block: pairs of
// warps.
#include "attention.h"

namespace attention {
// What the splits of a row have found of four columns, put together. A warp calls this, with neighbouring fours.
DEVICE Four join(const AttentionShape &shape, const float *partial, u32 row, u32 splits, u32 column) {
    // Splits whose sums are loaded before the first is needed; of four of them each of four lanes has the weight.
    constexpr u32 TOGETHER = 8;
    const u32 head_dim = shape.layout.head_dim, stride = head_dim + BEHIND_SUMS;
    const float *found = partial_of(partial, shape, row, column / head_dim);
    float largest = from_bits(0xff800000);
    for (u32 split = lane() % 4; split < splits; split += 4)
        largest = larger(largest, found[split * stride + head_dim]);
    largest = max_lanes<4>(largest);
    float sum = 0.0f;
    Four value = {};
    for (u32 first = 0; first < splits; first += TOGETHER) {
        Pairs<2> sums[TOGETHER][2];
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            const float *of = found + smaller(first + i, splits - 1) * stride + column % head_dim;
#pragma unroll
            for (u32 half = 0; half < 2; half++) sums[i][half] = reinterpret_cast<const Pairs<2> *>(of)[half];
        }
        float weights[TOGETHER / 4], weight_sums[TOGETHER / 4];
#pragma unroll
        for (u32 i = 0; i < TOGETHER / 4; i++) {
            const float *of = found + smaller(first + 4 * i + lane() % 4, splits - 1) * stride + head_dim;
            weights[i] = exponential(of[0] - largest);
            weight_sums[i] = of[1];
        }
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            const u32 from = lane() / 4 * 4 + i % 4;
            const float weight = from_bits(lane_at(bits_of(weights[i / 4]), from));
            const float weight_sum = from_bits(lane_at(bits_of(weight_sums[i / 4]), from));
            if (first + i >= splits) continue;
            sum = fused(weight_sum, weight, sum);
#pragma unroll
            for (u32 j = 0; j < 4; j++) value.of[j] = fused(from_bits(sums[i][j / 2].pair[j % 2]), weight, value.of[j]);
        }
    }
    const float factor = divide(1.0f, sum);
#pragma unroll
    for (u32 j = 0; j < 4; j++) value.of[j] *= factor;
    return value;
}
} // namespace attention

KERNEL(256)
join_quantize(AttentionShape shape, const AttentionRow *rows, const float *out, const float *partial,
              QuantizedRows to) {
    __shared__ quantize::Memory memory;
    const u32 row = block_y(), column = 4 * (block_x() * threads() + thread());
    Four value = {};
    if (to.first + row < to.rows) {
        const u32 splits = attention::splits(rows[row]);
        if (splits == 1) {
            value = load_four(out + u64(row) * to.cols, column, to.cols);
        } else {
            // Lanes without columns take others' and lead to nothing.
            value = attention::join(shape, partial, row, splits, smaller(column, to.cols - 4));
        }
    }
    quantize::columns(memory, to, to.first + row, column, value);
}
