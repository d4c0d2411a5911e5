// What the quantized products share: which sums over a block are exact, and the chain behind them.
//
// The contract, the CPU's (src/device/cpu/strip.rs): integers are summed exactly over a block, in any
// order; then one chain of fused multiply-adds runs over the blocks in theirs, for blocks of 32 first
// the product and then the minimum, for blocks of 256 the other way round. So every output is the
// CPU's bit for bit, whatever the batch, and however columns are spread over lanes.
#pragma once
#include "activations.h"
#include "weights.h"

// One step of the chain: sum = a * b + sum.
struct alignas(8) Step {
    float a;
    float b;
};

// Has steps computed before what comes next.
template <u32 count> DEVICE void settle(Step (&steps)[count]) {
#pragma unroll
    for (u32 i = 0; i < count; i++) {
        settle(steps[i].a);
        settle(steps[i].b);
    }
}

// Steps of one block, in order: two where the type has minimums.
template <class W> constexpr u32 STEPS = W::MIN ? 2 : 1;

// The steps of a block of 32: (the exact dot product, the weights' d and m, the activations' scale and scaled sum).
template <class W> DEVICE void steps_32(Step *steps, i32 dot, float d, float m, float scale, float scaled_sum) {
    steps[0] = Step{float(dot), d * scale};
    if constexpr (W::MIN) steps[1] = Step{m, scaled_sum};
}
// The steps of a block of 256: `min` is the exact sum of the minimums times the activations.
template <class W> DEVICE void steps_256(Step *steps, i32 dot, i32 min, float d, float m, float scale) {
    if constexpr (W::MIN) steps[0] = Step{float(min), m * -scale};
    steps[STEPS<W> - 1] = Step{float(dot), d * scale};
}
