// Two to eight rows of activations times the rows of a matrix: what several sessions decode at once.
//
// Like matvec it has to keep up with the memory that the weights come from, and most of what it does is to
// wait. A block takes 32 weight rows, and its warps take turns at pieces of 128 columns (256 where blocks
// are as wide): each copies its pieces into shared memory as they lie, some turns ahead, decodes them
// straight into what its lanes give to the tensor cores, and has the steps of its blocks ready when the sums
// come from the warp that has the piece before; these it chains on and hands to the next.
//
// Grid: (32 rows of a tile, tile). Block: 128 threads.
#include "fragments.h"

namespace matpanel {
constexpr u32 WARPS = 4, TILES = 2, ROWS = 16 * TILES;
// Shared memory of a block.
constexpr u32 BYTES_MAX = 48 << 10;

template <class W> struct Shape {
    // Runs, blocks and a row's bytes of a piece.
    static constexpr u32 RUNS = W::SCALES == 0 ? 4 : 8;
    static constexpr u32 BLOCKS = RUNS * RUN / W::VALUES, BYTES = BLOCKS * W::BYTES;
};

// A piece of the rows as they lie.
template <class W> struct Piece {
    Sixteen rows[ROWS][odd_sixteens_of(Shape<W>::BYTES)];
};
// Sums on their way from a warp to the next: of each lane, and of each 16 rows. One place is enough: a lane writes where
// it has read, and only then is it the next warp's turn. (compute-sanitizer's racecheck says otherwise: it seems not to see
// that a turn comes after all turns before it.)
struct Sent {
    Sixteen sums[TILES][LANES];
};
// As many pieces of each warp as there is room for, and use for.
template <class W> constexpr u32 ROOM = (BYTES_MAX - sizeof(Sent)) / sizeof(Piece<W>) / WARPS;
template <class W> constexpr u32 STAGES = ROOM<W> < 4 ? ROOM<W> : 4;

// A lane's activations of a piece; of the last run where there are no more.
template <class W> struct Inputs {
    Columns<W> columns[Shape<W>::RUNS];
    BlockColumns<W> block;

    DEVICE_MEMBER void load(const Activations &x, u32 piece, u32 runs) {
        constexpr u32 RUNS = Shape<W>::RUNS;
        const u32 begin = piece * RUNS;
        Activations from = x;
        from.q += u64(begin) * PARTS * PANEL * RUN;
        if constexpr (W::SCALES == 0) {
            from.scales += u64(begin) * PANEL;
            from.sums = static_cast<const float *>(from.sums) + u64(begin) * PANEL;
        }
        if (W::SCALES > 0 || begin + RUNS <= runs) {
#pragma unroll
            for (u32 run = 0; run < RUNS; run++) columns[run].load(from, run);
        } else {
#pragma unroll
            for (u32 run = 0; run < RUNS; run++) columns[run].load(from, smaller(run, runs - 1 - begin));
        }
        if constexpr (W::SCALES > 0) block.load(x, piece);
    }
};

// What two rows have of a block.
template <class W> DEVICE Factors factors_of(const Bytes (&rows)[2]) {
    Factors f;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        f.d.of[i] = W::d(rows[i]);
        f.m.of[i] = W::m(rows[i]);
    }
    return f;
}
// The scales of a run of two rows; or their minimums of 16 values each, as bytes 4 (lane % 4)... of 16.
template <class W> DEVICE Scales<W> scales_of(const Bytes (&rows)[2], u32 group) {
    Scales<W> scales;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        Run r{};
        W::scales(rows[i], group, r);
#pragma unroll
        for (u32 s = 0; s < W::SCALES; s++) scales.of[s].of[i] = r.scale[s];
    }
    return scales;
}
template <class W> DEVICE Two<u32> minimums_of(const Bytes (&rows)[2]) {
    Two<u32> mins;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        Run a{}, b{};
        W::scales(rows[i], lane() % 4 * 2, a);
        W::scales(rows[i], lane() % 4 * 2 + 1, b);
        constexpr u32 second = W::SCALES - 1;
        mins.of[i] = u32(a.min[0] | a.min[second] << 8 | b.min[0] << 16 | b.min[second] << 24);
    }
    return mins;
}

template <class W> DEVICE void chain(Sums<W> (&sums)[TILES], const BlockSteps<W> (&steps)[TILES]) {
#pragma unroll
    for (u32 t = 0; t < TILES; t++) sums[t].chain(steps[t]);
}

template <class W> DEVICE void run(const Tile *tiles, u32 cols, Activations x, u32 batch) {
    using S = Shape<W>;
    __shared__ Piece<W> staged[WARPS][STAGES<W>];
    __shared__ Sent sent;
    const u32 runs = cols / RUN, row_bytes = cols / W::VALUES * W::BYTES, pieces = (runs + S::RUNS - 1) / S::RUNS;
    Inputs<W> in;
    if (warp() < pieces) in.load(x, warp(), runs);
    const Tile tile = tiles[block_y()];
    const u32 first = block_x() * ROWS;
    if (first >= tile.rows) return;
    const u32 rows = smaller(ROWS, tile.rows - first);
    const u8 *data = tile.data + u64(first) * row_bytes;
    const Rows source(data, rows, row_bytes);

    auto stage_piece = [&](u32 piece, u32 slot) {
        if (piece < pieces) {
            const u32 begin = piece * S::BYTES;
            source.stage<S::BYTES>(staged[warp()][slot].rows, begin, smaller(S::BYTES, row_bytes - begin));
        }
        copies_end();
    };
#pragma unroll
    for (u32 slot = 0; slot < STAGES<W>; slot++) stage_piece(slot * WARPS + warp(), slot);
    for (u32 piece = warp(), slot = 0; piece < pieces; piece += WARPS, slot = slot + 1 < STAGES<W> ? slot + 1 : 0) {
        copies_done<STAGES<W> - 1>();
        warp_sync();
        const Piece<W> &now = staged[warp()][slot];
        // Of the addresses only what the rows are aligned to, which is the same for all lanes, differs.
        const u32 begin = u32(u64(data)) + piece * (S::BYTES % 16);
        auto bytes_of = [&](u32 row) {
            return Bytes{now.rows[row + lane() / 4]->word, (begin + (row + lane() / 4) * row_bytes) % 16};
        };
        BlockSteps<W> steps[S::BLOCKS][TILES];
#pragma unroll
        for (u32 t = 0; t < TILES; t++) {
            const Bytes at[2] = {bytes_of(16 * t), bytes_of(16 * t + 8)};
            if constexpr (W::SCALES == 0) {
                Sixteen weights[S::RUNS];
                Products<W, W::NIBBLES> products[S::RUNS];
#pragma unroll
                for (u32 run = 0; run < S::RUNS; run++)
                    weights[run] = fragment_of<W, W::NIBBLES>(at[0] + run * W::BYTES, at[1] + run * W::BYTES, 0);
#pragma unroll
                for (u32 part = 0; part < PARTS; part++) {
#pragma unroll
                    for (u32 run = 0; run < S::RUNS; run++)
                        products[run].multiply_part(part, weights[run], in.columns[run].q[part]);
                }
#pragma unroll
                for (u32 run = 0; run < S::RUNS; run++) {
                    const Bytes blocks[2] = {at[0] + run * W::BYTES, at[1] + run * W::BYTES};
                    steps[run][t].block_32(products[run], factors_of<W>(blocks), in.columns[run].scale,
                                           in.columns[run].scaled_sum);
                }
            } else {
                i32 dots[4] = {};
#pragma unroll
                for (u32 run = 0; run < S::RUNS; run++) {
                    Products<W> products;
                    products.multiply(fragment_of<W>(at[0], at[1], run), in.columns[run].q);
                    products.add_to(dots, scales_of<W>(at, run));
                }
                steps[0][t].block_256(dots, factors_of<W>(at), in.block, minimums_of<W>(at));
            }
        }
        // The sums wait for nothing but their own chain.
#pragma unroll
        for (u32 block = 0; block < S::BLOCKS; block++) {
#pragma unroll
            for (u32 i = 0; i < 4 * TILES; i++) settle(steps[block][i / 4].of[i % 4]);
        }
        // What was staged has been used.
        warp_sync();
        stage_piece(piece + STAGES<W> * WARPS, slot);
        if (piece + WARPS < pieces) in.load(x, piece + WARPS, runs);

        Sums<W> sums[TILES];
        if (piece > 0) {
            wait_for(1 + warp(), 2 * LANES);
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
                const Sixteen bits = sent.sums[t][lane()];
#pragma unroll
                for (u32 i = 0; i < 4; i++) sums[t].of[i] = from_bits(bits.word[i]);
            }
        }
        const u32 blocks = runs * RUN / W::VALUES - piece * S::BLOCKS;
        if (blocks >= S::BLOCKS) {
#pragma unroll
            for (u32 block = 0; block < S::BLOCKS; block++) chain(sums, steps[block]);
        } else {
#pragma unroll
            for (u32 block = 0; block < S::BLOCKS; block++)
                if (block < blocks) chain(sums, steps[block]);
        }
        if (piece + 1 < pieces) {
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
                const float(&of)[4] = sums[t].of;
                sent.sums[t][lane()] = Sixteen{{bits_of(of[0]), bits_of(of[1]), bits_of(of[2]), bits_of(of[3])}};
            }
            pass_to(1 + (warp() + 1) % WARPS, 2 * LANES);
        } else {
#pragma unroll
            for (u32 i = 0; i < 4 * TILES; i++) {
                const u32 row = first + lane() / 4 + i / 2 * 8, batch_row = 2 * (lane() % 4) + i % 2;
                if (row < tile.rows && batch_row < batch)
                    tile.out[u64(batch_row) * tile.stride + row] = sums[i / 4].of[i % 4];
            }
        }
    }
}
} // namespace matpanel

#define MATPANEL(W, name)                                                                                             \
    KERNEL(128)                                                                                                       \
    matpanel_##name(const Tile *tiles, u32 cols, Activations x, u32 batch) { matpanel::run<W>(tiles, cols, x, batch); }
QUANTIZED_TYPES(MATPANEL)
#undef MATPANEL
