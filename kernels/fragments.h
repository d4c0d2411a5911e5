// What the products by the tensor cores share: 16 weight rows times 8 rows of activations, spread over a warp.
//
// As PTX says of mma.m16n8k32, a lane has the weights of rows lane / 4 and lane / 4 + 8, of the batch
// row lane / 4, and four results: [i] is weight row lane / 4 + 8 (i / 2), batch row 2 (lane % 4) + i % 2.
#pragma once
#include "dots.h"

// A lane's weights of a run, or 16 times these: the first words of the pairs of both rows, then the second ones.
template <class W, bool SIXTEENFOLD = false> DEVICE Sixteen fragment_of(Bytes row, Bytes row_8, u32 group) {
    if constexpr (SIXTEENFOLD) {
        const Pair a = W::sixteenfold(row, lane() % 4), b = W::sixteenfold(row_8, lane() % 4);
        return Sixteen{{a.low, b.low, a.high, b.high}};
    }
    Pair a = W::pair(row, group, lane() % 4), b = W::pair(row_8, group, lane() % 4);
    return Sixteen{{minus<W::OFFSET>(a.low), minus<W::OFFSET>(b.low), minus<W::OFFSET>(a.high),
                    minus<W::OFFSET>(b.high)}};
}

// Two neighbours in memory, loaded at once.
template <class T> struct alignas(2 * sizeof(T)) Two {
    T of[2];
};

// A lane's activations of a run of a panel and, where blocks are of 32, what its two batch rows have of the block: at
// place panel * runs of a row + run.
template <class W> struct Columns {
    Two<u32> q[PARTS];
    Two<float> scale, scaled_sum;

    DEVICE_MEMBER void load(const Activations &x, u32 at) {
        const Two<u32> *from = reinterpret_cast<const Two<u32> *>(x.q) + u64(at) * PARTS * LANES + lane();
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) q[part] = from[part * LANES];
        const u32 place = at * (PANEL / 2) + lane() % 4;
        if constexpr (W::SCALES == 0) scale = reinterpret_cast<const Two<float> *>(x.scales)[place];
        if constexpr (W::SCALES == 0 && W::MIN) scaled_sum = static_cast<const Two<float> *>(x.sums)[place];
    }
};

// Where blocks are of 256: what a lane's two batch rows have of one and, for minimums, four sums of 16 of batch row
// lane / 4: at place panel * blocks of a row + block.
template <class W> struct BlockColumns {
    Two<float> scale;
    Two<u32> sums;

    DEVICE_MEMBER void load(const Activations &x, u32 at) {
        scale = reinterpret_cast<const Two<float> *>(x.scales)[at * (PANEL / 2) + lane() % 4];
        if constexpr (W::MIN) sums = static_cast<const Two<u32> *>(x.sums)[u64(at) * LANES + lane()];
    }
};

// What two weight rows, i and i + 8, have of a block; and of a run, where runs have scales.
struct Factors {
    Two<float> d, m;
};
template <class W> struct Scales {
    Two<i32> of[W::SCALES == 0 ? 1 : W::SCALES];
};

// A lane's exact products of a run, of 16 weight rows and a panel: for all 32 columns, for 16 each or, of 16 times the
// weights, for each part of the activations.
template <class W, bool SIXTEENFOLD = false> struct Products {
    static_assert(!SIXTEENFOLD || (PARTS == 2 && FINE_BITS == 4));
    i32 c[W::SCALES == 2 || SIXTEENFOLD ? 2 : 1][4];

    DEVICE_MEMBER void multiply(const Sixteen &weights, const Two<u32> (&q)[PARTS]) {
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) multiply_part(part, weights, q[part]);
    }
    // The same for a part of the activations, which come in their order.
    DEVICE_MEMBER void multiply_part(u32 part, const Sixteen &weights, const Two<u32> &q) {
        const u32(&a)[4] = weights.word;
        const u32(&b)[2] = q.of;
        if constexpr (SIXTEENFOLD) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) c[part][i] = 0;
            mma_32(c[part], a, b);
            return;
        }
#pragma unroll
        for (u32 i = 0; i < sizeof(c) / 4; i++)
            c[i / 4][i % 4] = part == 0 ? 0 : c[i / 4][i % 4] * (1 << FINE_BITS);
        if constexpr (W::SCALES == 2) {
            mma_16(c[0], a[0], a[1], b[0]);
            mma_16(c[1], a[2], a[3], b[1]);
        } else {
            mma_32(c[0], a, b);
        }
    }
    // One of those for all 32 columns.
    DEVICE_MEMBER i32 whole(u32 i) const {
        if constexpr (SIXTEENFOLD) return c[0][i] + (c[1][i] >> FINE_BITS);
        return c[0][i];
    }
    // Adds them, scaled, to those of a block of 256.
    DEVICE_MEMBER void add_to(i32 (&dots)[4], const Scales<W> &scales) const {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
#pragma unroll
            for (u32 s = 0; s < W::SCALES; s++) dots[i] += c[s][i] * scales.of[s].of[i / 2];
        }
    }
};

// What the minimums of a block of 256 add up to, by the tensor cores too, the sums of the activations as two signed
// bytes: `mins` has 4 bytes of the minimums of 16 values each, of both rows.
DEVICE void multiply_minimums(i32 (&min)[4], Two<u32> mins, Two<u32> sums) {
    u32 high[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++)
        // The nearest multiples of 256: half of it is added to two sums, without a carry from one to the other.
        high[i] = ((sums.of[i] & 0x7fff7fff) + 0x00800080) ^ (sums.of[i] & 0x80008000);
    mma_16(min, mins.of[0], mins.of[1], pick_bytes(high[0], high[1], 0x7531));
#pragma unroll
    for (u32 i = 0; i < 4; i++) min[i] *= 256;
    mma_16(min, mins.of[0], mins.of[1], pick_bytes(sums.of[0], sums.of[1], 0x6420));
}

// A lane's steps of a block, for 16 weight rows and a panel.
template <class W> struct BlockSteps {
    Step of[4][STEPS<W>];

    template <bool SIXTEENFOLD>
    DEVICE_MEMBER void block_32(const Products<W, SIXTEENFOLD> &products, const Factors &f, Two<float> scale,
                                Two<float> scaled_sum) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            steps_32<W>(of[i], products.whole(i), f.d.of[i / 2], f.m.of[i / 2], scale.of[i % 2], scaled_sum.of[i % 2]);
    }
    DEVICE_MEMBER void block_256(const i32 (&dots)[4], const Factors &f, const BlockColumns<W> &x, Two<u32> mins) {
        i32 min[4] = {};
        if constexpr (W::MIN) multiply_minimums(min, mins, x.sums);
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            steps_256<W>(of[i], dots[i], min[i], f.d.of[i / 2], f.m.of[i / 2], x.scale.of[i % 2]);
    }
};

// A lane's sums of 16 weight rows and a panel.
template <class W> struct Sums {
    float of[4] = {};

    DEVICE_MEMBER void block_32(const Products<W> &products, const Factors &f, Two<float> scale,
                                Two<float> scaled_sum) {
        BlockSteps<W> steps;
        steps.block_32(products, f, scale, scaled_sum);
        chain(steps);
    }
    DEVICE_MEMBER void block_256(const i32 (&dots)[4], const Factors &f, const BlockColumns<W> &x, Two<u32> mins) {
        BlockSteps<W> steps;
        steps.block_256(dots, f, x, mins);
        chain(steps);
    }
    DEVICE_MEMBER void chain(const BlockSteps<W> &steps) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
#pragma unroll
            for (u32 s = 0; s < STEPS<W>; s++) of[i] = fused(steps.of[i][s].a, steps.of[i][s].b, of[i]);
        }
    }
};
