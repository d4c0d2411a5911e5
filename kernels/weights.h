// The weight types: how 32 values of a row become signed bytes and integer scales, or one a float.
//
// Layouts: ggml's, as src/format/quant.rs describes them. Rows begin at any byte, so bytes are
// picked out of aligned words. A value is d * scale * w - dmin * min (blocks of 256) or d * w + m.
#pragma once
#include "device.h"

// A run of whole rows of one matrix where it lies in memory; a launch takes a table of them.
struct Tile {
    const u8 *data;
    // The first row's output for the first row of the batch; the next batch row's is `stride` further.
    float *out;
    u32 rows;
    u32 stride;
    // Rows of the tiles before it in the table.
    u32 first;
};

// Bytes at any place of aligned words. Behind the last of them there is one more word, which may be loaded: so the four
// bytes at any place are of two words, and those of neighbours share one.
struct Bytes {
    const u32 *words;
    // Bytes of the words that come before.
    u32 lead;

    DEVICE_MEMBER Bytes operator+(u32 n) const { return Bytes{words + n / 4, lead + n % 4}; }
    // Four of them, shifted right by up to 7 bits: what comes in at the top is of the byte behind them.
    DEVICE_MEMBER u32 four(u32 shift = 0) const {
        return shift_pair(words[lead / 4], words[lead / 4 + 1], 8 * lead + shift);
    }
    DEVICE_MEMBER u32 one() const { return words[lead / 4] >> 8 * (lead % 4) & 0xff; }
    DEVICE_MEMBER float half() const { return from_half(four() & 0xffff); }
};

// Sixteens that hold `bytes` bytes from anywhere, and the word behind them.
constexpr u32 sixteens_of(u32 bytes) { return (15 + bytes + 4 + 15) / 16; }

// The same for one of 8 rows that a warp reads 16 bytes each of: an odd number, so that these are in different banks.
constexpr u32 odd_sixteens_of(u32 bytes) { return sixteens_of(bytes) | 1; }

// Copies bytes from anywhere, at most `bytes_max`, into shared memory, where they begin as far behind a multiple of 16:
// by `count` threads, of which this is `number`, and some time before copies_done() says so.
template <u32 count, u32 bytes_max> DEVICE void stage(Sixteen *to, const u8 *from, u32 bytes, u32 number) {
    const Sixteen *aligned = reinterpret_cast<const Sixteen *>(u64(from) & ~u64(15));
    u32 end = u32(u64(from) % 16) + bytes;
#pragma unroll
    for (u32 first = 0; first < (15 + bytes_max + 15) / 16; first += count)
        if (16 * (first + number) < end) copy_async(&to[first + number], &aligned[first + number]);
}
// Where a warp copies parts of rows from: eight lanes a row, of every fourth row one.
struct Rows {
    static constexpr u32 COUNT = 8, STEP = LANES / COUNT;
    // The lane's 16 bytes from the multiple of 16 on that its first row begins behind, and how far behind; how many of
    // its rows are there, and bytes from one to the next.
    const Sixteen *aligned;
    u32 lead, left, row_bytes;

    DEVICE_MEMBER Rows(const u8 *data, u32 rows, u32 row_bytes) : row_bytes(row_bytes) {
        const u32 row = lane() / COUNT;
        const u64 from = u64(data) + row * row_bytes;
        aligned = reinterpret_cast<const Sixteen *>(from & ~u64(15)) + lane() % COUNT;
        lead = u32(from % 16);
        left = larger(rows, row) - row;
    }
    // Copies `bytes` of each row from `begin` on, at most `bytes_max`, as `stage` does.
    template <u32 bytes_max, u32 rows, u32 sixteens>
    DEVICE_MEMBER void stage(Sixteen (&to)[rows][sixteens], u32 begin, u32 bytes) const {
        const u32 row = lane() / COUNT, number = lane() % COUNT;
#pragma unroll
        for (u32 i = 0; i < rows; i += STEP) {
            const u32 from = lead + begin + i * row_bytes, end = i < left ? from % 16 + bytes : 0;
#pragma unroll
            for (u32 j = 0; j < (15 + bytes_max + 15) / 16; j += COUNT)
                if (16 * (j + number) < end) copy_async(&to[i + row][j + number], &aligned[from / 16 + j]);
        }
    }
};
// The same bytes in shared memory.
DEVICE Bytes staged_bytes(const Sixteen *staged, const u8 *from) { return Bytes{staged->word, u32(u64(from) % 16)}; }

// 32 values of one row.
struct Run {
    // Values 4i..4i+4 as bytes, which are the type's OFFSET too large (and signed where that is 0).
    u32 w[8];
    // The integer scales and minimums of 16 values each; types with one for all 32 have it in [0].
    i32 scale[2];
    i32 min[2];
};

// Each byte less `offset`, for bytes below 128.
template <u32 offset> DEVICE u32 minus(u32 bytes) {
    if constexpr (offset == 0) return bytes;
    return ((bytes | 0x80808080u) - offset * 0x01010101u) ^ 0x80808080u;
}

// Values 4i..4i+4 and 16+4i..16+4i+4 of a run.
struct Pair {
    u32 low, high;
};
// 16 bytes of nibbles: the low ones are values 0..16.
DEVICE Pair nibbles(Bytes b, u32 i) {
    u32 both = (b + 4 * i).four();
    return Pair{both & 0x0f0f0f0f, both >> 4 & 0x0f0f0f0f};
}
// Adds bit i of 32 as bit 4 of value i.
DEVICE Pair fifth_bits(Pair p, u32 bits, u32 i) {
    bits >>= 4 * i;
    u32 low = (bits & 15) * 0x02040810u & 0x10101010, high = (bits >> 16 & 15) * 0x02040810u & 0x10101010;
    return Pair{p.low | low, p.high | high};
}
// Some bits of each of 32 bytes, from bit `shift` on, as bits `to` and up.
template <u32 mask, u32 to = 0> DEVICE Pair fields(Bytes b, u32 shift, u32 i) {
    constexpr u32 all = mask * 0x01010101u;
    return Pair{((b + 4 * i).four(shift) & all) << to, ((b + 16 + 4 * i).four(shift) & all) << to};
}
DEVICE Pair operator|(Pair a, Pair b) { return Pair{a.low | b.low, a.high | b.high}; }

// What the types with blocks of 32 values share: no integer scales. Blocks begin with d, then m where there is one.
struct Block32 {
    static constexpr u32 VALUES = 32, SCALES = 0;
    static constexpr bool NIBBLES = false;
    DEVICE void scales(Bytes, u32, Run &) {}
    DEVICE float d(Bytes b) { return b.half(); }
    DEVICE float m(Bytes b) { return (b + 2).half(); }
};

struct Q4_0 : Block32 {
    static constexpr u32 BYTES = 18, OFFSET = 8;
    static constexpr bool MIN = false;
    // So they can be had 16 times as large in fewer instructions.
    static constexpr bool NIBBLES = true;
    DEVICE Pair pair(Bytes b, u32, u32 i) { return nibbles(b + 2, i); }
    // 16 times the values, as signed bytes.
    DEVICE Pair sixteenfold(Bytes b, u32 i) {
        const u32 both = (b + 2 + 4 * i).four();
        return Pair{mask_flip(both << 4, 0xf0f0f0f0, 0x80808080), mask_flip(both, 0xf0f0f0f0, 0x80808080)};
    }
};

struct Q4_1 : Block32 {
    static constexpr u32 BYTES = 20, OFFSET = 0;
    static constexpr bool MIN = true;
    DEVICE Pair pair(Bytes b, u32, u32 i) { return nibbles(b + 4, i); }
};

struct Q5_0 : Block32 {
    static constexpr u32 BYTES = 22, OFFSET = 16;
    static constexpr bool MIN = false;
    DEVICE Pair pair(Bytes b, u32, u32 i) { return fifth_bits(nibbles(b + 6, i), (b + 2).four(), i); }
};

struct Q5_1 : Block32 {
    static constexpr u32 BYTES = 24, OFFSET = 0;
    static constexpr bool MIN = true;
    DEVICE Pair pair(Bytes b, u32, u32 i) { return fifth_bits(nibbles(b + 8, i), (b + 4).four(), i); }
};

struct Q8_0 : Block32 {
    static constexpr u32 BYTES = 34, OFFSET = 0;
    static constexpr bool MIN = false;
    DEVICE Pair pair(Bytes b, u32, u32 i) { return Pair{(b + 2 + 4 * i).four(), (b + 18 + 4 * i).four()}; }
};

struct Q2_K {
    static constexpr u32 VALUES = 256, BYTES = 84, SCALES = 2, OFFSET = 0;
    static constexpr bool NIBBLES = false, MIN = true;
    DEVICE Pair pair(Bytes b, u32 group, u32 i) {
        return fields<3>(b + 16 + 32 * (group / 4), 2 * (group % 4), i);
    }
    DEVICE void scales(Bytes b, u32 group, Run &r) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 both = (b + 2 * group + i).one();
            r.scale[i] = i32(both & 15);
            r.min[i] = i32(both >> 4);
        }
    }
    DEVICE float d(Bytes b) { return (b + 80).half(); }
    DEVICE float m(Bytes b) { return (b + 82).half(); }
};

struct Q3_K {
    static constexpr u32 VALUES = 256, BYTES = 110, SCALES = 2, OFFSET = 4;
    static constexpr bool NIBBLES = false, MIN = false;
    DEVICE Pair pair(Bytes b, u32 group, u32 i) {
        return fields<3>(b + 32 + 32 * (group / 4), 2 * (group % 4), i) | fields<1, 2>(b, group, i);
    }
    DEVICE void scales(Bytes b, u32 group, Run &r) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 j = 2 * group + i;
            u32 low = (b + 96 + j % 8).one() >> 4 * (j / 8) & 15;
            u32 high = (b + 104 + j % 4).one() >> 2 * (j / 4) & 3;
            r.scale[i] = i32(low | high << 4) - 32;
        }
    }
    DEVICE float d(Bytes b) { return (b + 108).half(); }
    DEVICE float m(Bytes) { return 0.0f; }
};

// What Q4_K and Q5_K share: d, m, and 12 bytes with scales and minimums of 6 bits.
struct SixBits {
    static constexpr u32 VALUES = 256, SCALES = 1, OFFSET = 0;
    static constexpr bool NIBBLES = false, MIN = true;
    DEVICE void scales(Bytes b, u32 group, Run &r) {
        u32 at = 8 * (group % 4);
        u32 scale = (b + 4).four() >> at & 0xff, min = (b + 8).four() >> at & 0xff, low = (b + 12).four() >> at & 0xff;
        bool first = group < 4;
        r.scale[0] = i32(first ? scale & 63 : (low & 15) | scale >> 6 << 4);
        r.min[0] = i32(first ? min & 63 : low >> 4 | min >> 6 << 4);
    }
    DEVICE float d(Bytes b) { return b.half(); }
    DEVICE float m(Bytes b) { return (b + 2).half(); }
};

struct Q4_K : SixBits {
    static constexpr u32 BYTES = 144;
    DEVICE Pair pair(Bytes b, u32 group, u32 i) {
        return fields<15>(b + 16 + 32 * (group / 2), 4 * (group % 2), i);
    }
};

struct Q5_K : SixBits {
    static constexpr u32 BYTES = 176;
    DEVICE Pair pair(Bytes b, u32 group, u32 i) {
        return fields<15>(b + 48 + 32 * (group / 2), 4 * (group % 2), i) | fields<1, 4>(b + 16, group, i);
    }
};

struct Q6_K {
    static constexpr u32 VALUES = 256, BYTES = 210, SCALES = 2, OFFSET = 32;
    static constexpr bool NIBBLES = false, MIN = false;
    DEVICE Pair pair(Bytes b, u32 group, u32 i) {
        u32 half = group / 4, quarter = group % 4;
        return fields<15>(b + 64 * half + 32 * (quarter % 2), 4 * (quarter / 2), i) |
               fields<3, 4>(b + 128 + 32 * half, 2 * quarter, i);
    }
    DEVICE void scales(Bytes b, u32 group, Run &r) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) r.scale[i] = i32(i8((b + 192 + 2 * group + i).one()));
    }
    DEVICE float d(Bytes b) { return (b + 208).half(); }
    DEVICE float m(Bytes) { return 0.0f; }
};

// A whole run of a block: the values 32 group..32 group + 32.
template <class W> DEVICE Run run_of(Bytes block, u32 group) {
    Run r{};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        Pair p = W::pair(block, group, i);
        r.w[i] = p.low;
        r.w[i + 4] = p.high;
    }
    W::scales(block, group, r);
    return r;
}

// Types without integers: value i from some byte on.
struct F32 {
    static constexpr u32 BYTES = 4;
    DEVICE float value(Bytes b) { return from_bits(b.four()); }
};
struct F16 {
    static constexpr u32 BYTES = 2;
    DEVICE float value(Bytes b) { return b.half(); }
};
struct BF16 {
    static constexpr u32 BYTES = 2;
    DEVICE float value(Bytes b) { return from_bits(b.four() << 16); }
};

// Calls `each` with every type of integers, and its name in the kernels' names.
#define TYPES_OF_32(each) each(Q4_0, q4_0) each(Q4_1, q4_1) each(Q5_0, q5_0) each(Q5_1, q5_1) each(Q8_0, q8_0)
#define TYPES_OF_256(each) each(Q2_K, q2_k) each(Q3_K, q3_k) each(Q4_K, q4_k) each(Q5_K, q5_k) each(Q6_K, q6_k)
#define QUANTIZED_TYPES(each) TYPES_OF_32(each) TYPES_OF_256(each)
#define FLOAT_TYPES(each) each(F32, f32) each(F16, f16) each(BF16, bf16)
