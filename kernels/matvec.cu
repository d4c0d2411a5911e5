// One row of activations times the rows of a matrix, whose tiles lie anywhere.
//
// A block takes 8 weight rows, and each of its warps 1024 columns of them a round, all warps at the same
// time, as what takes longest is to wait: a warp copies the rows' bytes into shared memory as they lie,
// while each lane loads the activations of one run of 32 columns, dots them and begins its next copies.
// Then the first warp, a lane for each row, chains the sums of all warps' blocks in their order.
//
// Grid: (8 rows of a tile, tile). Block: 128 threads.
#include "dots.h"

namespace matvec {
constexpr u32 WARPS = 4, ROWS = 8, COLS = LANES * RUN, TOGETHER = 4;
// Sixteens of a run of activations.
constexpr u32 CHUNKS = PARTS * RUN / 16;

template <class W> struct Shape {
    // Bytes of a row's part.
    static constexpr u32 BYTES = COLS / W::VALUES * W::BYTES;
    static constexpr u32 BLOCKS = COLS / W::VALUES;
};

// What a warp has of a part: the rows as they lie.
template <class W> struct Part {
    Sixteen rows[ROWS][sixteens_of(Shape<W>::BYTES)];
};
// A row's steps, and 16 bytes that keep the rows in different banks for the lanes that chain them.
template <class W> struct alignas(16) Steps {
    Step step[WARPS * Shape<W>::BLOCKS * STEPS<W> + 2];
};

// Puts the steps of a block where they are chained from.
template <u32 count> DEVICE void put(Step *to, const Step (&steps)[count]) {
#pragma unroll
    for (u32 i = 0; i < count; i++) to[i] = steps[i];
}

// Rows of a part, eight lanes a row; rows past the last repeat it.
template <class W> DEVICE void stage_part(Part<W> &to, const u8 *data, u32 rows, u32 row_bytes, u32 bytes) {
#pragma unroll
    for (u32 i = 0; i < ROWS; i += LANES / 8) {
        const u32 row = i + lane() / 8;
        stage<8, Shape<W>::BYTES>(to.rows[row], data + smaller(row, rows - 1) * row_bytes, bytes, lane() % 8);
    }
    copies_end();
}

// The activations of a lane's run, or of the last one where there are no more columns.
struct Values {
    u32 q[PARTS][8];

    DEVICE_MEMBER Values(const Activations &x, u32 run, u32 runs) {
        const Sixteen *chunks = reinterpret_cast<const Sixteen *>(x.q) + u64(smaller(run, runs - 1)) * CHUNKS;
#pragma unroll
        for (u32 i = 0; i < CHUNKS; i++) {
            const Sixteen some = chunks[i];
#pragma unroll
            for (u32 j = 0; j < 4; j++) q[i / 2][i % 2 * 4 + j] = some.word[j];
        }
    }
    // start + the exact dot product with the integers of words [first, end) of a run.
    template <u32 first, u32 end> DEVICE_MEMBER i32 dot(const u32 (&w)[8], i32 start) const {
        i32 sum = 0;
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            sum *= 1 << FINE_BITS;
            if (part + 1 == PARTS) sum += start;
#pragma unroll
            for (u32 i = first; i < end; i++) sum = dot_4(w[i], q[part][i % 4 * 2 + i / 4], sum);
        }
        return sum;
    }
    // What the offset of the weights adds to that.
    template <class W, u32 first, u32 end> DEVICE_MEMBER i32 offset() const {
        if constexpr (W::OFFSET == 0) return 0;
        constexpr u32 ONES = 0x01010101;
        return dot<first, end>({ONES, ONES, ONES, ONES, ONES, ONES, ONES, ONES}, 0) * -i32(W::OFFSET);
    }
};

// The scale of a lane's block and the sums of its run; nothing where there are no more columns.
template <class W> struct Scales {
    float scale = 0.0f;
    float scaled_sum = 0.0f;
    i32 sums[2] = {0, 0};

    DEVICE_MEMBER Scales(const Activations &x, u32 run, u32 runs) {
        if (run >= runs) return;
        u32 block = run / (W::VALUES / RUN);
        scale = x.scales[block];
        if constexpr (W::MIN && W::SCALES == 0) scaled_sum = static_cast<const float *>(x.sums)[block];
        if constexpr (W::MIN && W::SCALES > 0) {
            sums[0] = static_cast<const i16 *>(x.sums)[2 * run];
            sums[1] = static_cast<const i16 *>(x.sums)[2 * run + 1];
        }
    }
};

template <class W> DEVICE void run(const Tile *tiles, u32 cols, Activations x) {
    using S = Shape<W>;
    __shared__ Part<W> staged[WARPS];
    __shared__ Steps<W> steps[ROWS];
    const u32 runs = cols / RUN, row_bytes = cols / W::VALUES * W::BYTES, parts = (runs + LANES - 1) / LANES;
    Values values(x, warp() * LANES + lane(), runs);
    Scales<W> scales(x, warp() * LANES + lane(), runs);
    const Tile tile = tiles[block_y()];
    const u32 first = block_x() * ROWS;
    if (first >= tile.rows) return;
    const u32 rows = smaller(ROWS, tile.rows - first);
    const u8 *data = tile.data + u64(first) * row_bytes;
    Part<W> &now = staged[warp()];

    auto stage_next = [&](u32 part) {
        if (part >= parts) return;
        stage_part<W>(now, data + part * S::BYTES, rows, row_bytes,
                      smaller(S::BYTES, row_bytes - part * S::BYTES));
    };
    float sum = 0.0f;
    stage_next(warp());
    for (u32 round = 0; round < parts; round += WARPS) {
        const u32 part = round + warp();
        copies_done<0>();
        // The copies are there, and the last round's steps have been chained.
        if (round == 0)
            warp_sync();
        else
            block_sync();
        if (part < parts) {
            constexpr u32 middle = W::SCALES == 0 ? 8 : 4;
            const i32 offsets[2] = {values.template offset<W, 0, middle>(), values.template offset<W, middle, 8>()};
            const u32 my_block = lane() / (W::VALUES / RUN), group = lane() % (W::VALUES / RUN);
            const bool some = part * LANES + lane() < runs;
            auto steps_of = [&](u32 row) { return &steps[row].step[(warp() * S::BLOCKS + my_block) * STEPS<W>]; };
            if (!some) {
                // Steps beyond the last column add nothing; a sum that began with 0 is never the -0 that they would
                // change.
                for (u32 row = 0; row < ROWS; row++)
                    for (u32 i = 0; i < STEPS<W>; i++) steps_of(row)[i] = Step{0.0f, 0.0f};
            }
            // Of the addresses only what the rows are aligned to, which is the same for all lanes, differs.
            const u32 begin = u32(u64(data)) + part * (S::BYTES % 16);
            auto bytes_of = [&](u32 row) {
                return Bytes{now.rows[row]->word, (begin + row * row_bytes) % 16 + my_block * W::BYTES};
            };
            if constexpr (W::SCALES == 0) {
                // Some rows at once, stored behind their loads, which would wait for the stores else.
#pragma unroll
                for (u32 row = 0; row < ROWS; row += TOGETHER) {
                    Step of[TOGETHER][STEPS<W>];
#pragma unroll
                    for (u32 i = 0; i < TOGETHER; i++) {
                        Bytes at = bytes_of(row + i);
                        const i32 dot = values.dot<0, 8>(run_of<W>(at, 0).w, offsets[0]);
                        steps_32<W>(of[i], dot, W::d(at), W::m(at), scales.scale, scales.scaled_sum);
                    }
#pragma unroll
                    for (u32 i = 0; i < TOGETHER; i++)
                        if (some) put(steps_of(row + i), of[i]);
                }
            } else {
                // Eight lanes have a block: together they have eight rows' sums of it, of which each lane ends with
                // one.
                i32 dots[ROWS], mins[ROWS];
#pragma unroll
                for (u32 row = 0; row < ROWS; row++) {
                    constexpr u32 second = W::SCALES - 1;
                    const Run weights = run_of<W>(bytes_of(row), group);
                    dots[row] = values.dot<0, 4>(weights.w, offsets[0]) * weights.scale[0] +
                                values.dot<4, 8>(weights.w, offsets[1]) * weights.scale[second];
                    mins[row] = scales.sums[0] * weights.min[0] + scales.sums[1] * weights.min[second];
                }
                const i32 dot = sum_8_lanes(dots), min = W::MIN ? sum_8_lanes(mins) : 0;
                Bytes at = bytes_of(group);
                Step of[STEPS<W>];
                steps_256<W>(of, dot, min, W::d(at), W::m(at), scales.scale);
                if (some) put(steps_of(group), of);
            }
            // What was staged has been used.
            warp_sync();
            stage_next(part + WARPS);
            if (part + WARPS < parts) {
                values = Values(x, (part + WARPS) * LANES + lane(), runs);
                scales = Scales<W>(x, (part + WARPS) * LANES + lane(), runs);
            }
        }
        block_sync();
        if (thread() < ROWS) {
            const u32 count = smaller(WARPS, parts - round);
            for (u32 w = 0; w < count; w++) {
                const Step *step = &steps[thread()].step[w * S::BLOCKS * STEPS<W>];
#pragma unroll
                for (u32 i = 0; i < S::BLOCKS * STEPS<W>; i++) sum = fused(step[i].a, step[i].b, sum);
            }
        }
    }
    if (thread() < rows) tile.out[first + thread()] = sum;
}
} // namespace matvec

#define MATVEC(W, name)                                                                                               \
    KERNEL(128, W::SCALES == 0 ? 6 : 4)                                                                               \
    matvec_##name(const Tile *tiles, u32 cols, Activations x) { matvec::run<W>(tiles, cols, x); }
QUANTIZED_TYPES(MATVEC)
#undef MATVEC
