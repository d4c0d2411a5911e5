// One row of activations times the rows of a matrix, whose tiles lie anywhere.
//
// A warp takes 8 weight rows through the whole width, 1024 columns at a time: it copies them, and the
// activations, into shared memory as they lie, 16 bytes a lane, one part ahead of the sums; each lane
// dots one run of 32 columns; then a lane for each row chains the blocks' sums in their order.
//
// Grid: (16 rows of a tile, tile). Block: 64 threads.
#include "dots.h"

namespace matvec {
constexpr u32 WARPS = 2, ROWS = 8, COLS = LANES * RUN;
// Sixteens of a run of activations.
constexpr u32 CHUNKS = PARTS * RUN / 16;

template <class W> struct Shape {
    // Bytes of a row's part.
    static constexpr u32 BYTES = COLS / W::VALUES * W::BYTES;
    static constexpr u32 BLOCKS = COLS / W::VALUES;
};

// What a warp has of a part: the rows as they lie, and the activations.
template <class W> struct Part {
    Sixteen rows[ROWS][sixteens_of(Shape<W>::BYTES)];
    Sixteen q[LANES * CHUNKS];
};
// A row's steps, and 16 bytes that keep the rows in different banks for the lanes that chain them.
template <class W> struct alignas(16) Steps {
    Step step[Shape<W>::BLOCKS * STEPS<W> + 2];
};

// Where chunk `i` of a lane's run of activations stands: turned by a place for every two lanes, so that eight lanes,
// whose runs are 64 bytes apart, find theirs in different banks.
DEVICE u32 place_of(u32 lane, u32 i) { return lane * CHUNKS + (i + lane / 2) % CHUNKS; }

// Rows of a part, and its columns' activations; rows past the last repeat it.
template <class W>
DEVICE void stage_part(Part<W> &to, const u8 *from, u32 rows, u32 row_bytes, u32 bytes, const i8 *q, u32 runs) {
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) {
        stage<LANES, Shape<W>::BYTES>(to.rows[row], from, bytes, lane());
        if (row + 1 < rows) from += row_bytes;
    }
    const Sixteen *chunks = reinterpret_cast<const Sixteen *>(q);
#pragma unroll
    for (u32 i = 0; i < CHUNKS; i++) {
        u32 chunk = i * LANES + lane();
        if (chunk < runs * CHUNKS) copy_async(&to.q[place_of(chunk / CHUNKS, chunk % CHUNKS)], &chunks[chunk]);
    }
    copies_end();
}

// The activations of a lane's run.
struct Values {
    u32 q[PARTS][8];

    DEVICE_MEMBER explicit Values(const Sixteen *chunks) {
#pragma unroll
        for (u32 i = 0; i < CHUNKS; i++) {
            const Sixteen some = chunks[place_of(lane(), i)];
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
    __shared__ Part<W> staged[WARPS][2];
    __shared__ Steps<W> steps[WARPS][ROWS];
    const Tile tile = tiles[block_y()];
    const u32 first = (block_x() * WARPS + warp()) * ROWS;
    if (first >= tile.rows) return;
    const u32 rows = smaller(ROWS, tile.rows - first);
    const u32 runs = cols / RUN, row_bytes = cols / W::VALUES * W::BYTES, parts = (runs + LANES - 1) / LANES;
    const u8 *data = tile.data + u64(first) * row_bytes;
    auto &my_steps = steps[warp()];

    auto stage_next = [&](u32 part) {
        u32 bytes = smaller(S::BYTES, row_bytes - part * S::BYTES), some = smaller(LANES, runs - part * LANES);
        stage_part<W>(staged[warp()][part % 2], data + part * S::BYTES, rows, row_bytes, bytes,
                      x.q + u64(part) * COLS * PARTS, some);
    };
    float sum = 0.0f;
    stage_next(0);
    Scales<W> next(x, lane(), runs);
    for (u32 part = 0; part < parts; part++) {
        const Scales<W> scales = next;
        if (part + 1 < parts) {
            stage_next(part + 1);
            next = Scales<W>(x, (part + 1) * LANES + lane(), runs);
            copies_done<1>();
        } else {
            copies_done<0>();
        }
        warp_sync();
        const Part<W> &now = staged[warp()][part % 2];
        const Values values(now.q);
        constexpr u32 middle = W::SCALES == 0 ? 8 : 4;
        const i32 offsets[2] = {values.offset<W, 0, middle>(), values.offset<W, middle, 8>()};
        const u32 my_block = lane() / (W::VALUES / RUN), group = lane() % (W::VALUES / RUN);
        const bool some = part * LANES + lane() < runs;
        if (!some) {
            // Steps beyond the last column add nothing; a sum that began with 0 is never the -0 that they would change.
            for (u32 row = 0; row < ROWS; row++)
                for (u32 i = 0; i < STEPS<W>; i++) my_steps[row].step[my_block * STEPS<W> + i] = Step{0.0f, 0.0f};
        }
        auto bytes_of = [&](u32 row) {
            return staged_bytes(now.rows[row], data + part * S::BYTES + row * row_bytes) + my_block * W::BYTES;
        };
        auto steps_of = [&](u32 row) { return &my_steps[row].step[my_block * STEPS<W>]; };
        if constexpr (W::SCALES == 0) {
#pragma unroll 2
            for (u32 row = 0; row < ROWS; row++) {
                Bytes at = bytes_of(row);
                const i32 dot = values.dot<0, 8>(run_of<W>(at, 0).w, offsets[0]);
                if (some) steps_32<W>(steps_of(row), dot, W::d(at), W::m(at), scales.scale, scales.scaled_sum);
            }
        } else {
            // Eight lanes have a block: together they have eight rows' sums of it, of which each lane ends with one.
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
            if (some) steps_256<W>(steps_of(group), dot, min, W::d(at), W::m(at), scales.scale);
        }
        warp_sync();
        if (lane() < ROWS) {
            const Step *step = my_steps[lane()].step;
#pragma unroll
            for (u32 i = 0; i < S::BLOCKS * STEPS<W>; i++) sum = fused(step[i].a, step[i].b, sum);
        }
        // The steps, and the staged bytes that the next copies go over, have been used.
        warp_sync();
    }
    if (lane() < rows) tile.out[first + lane()] = sum;
}
} // namespace matvec

#define MATVEC(W, name)                                                                                               \
    KERNEL(64) matvec_##name(const Tile *tiles, u32 cols, Activations x) { matvec::run<W>(tiles, cols, x); }
QUANTIZED_TYPES(MATVEC)
#undef MATVEC
