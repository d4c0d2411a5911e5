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
};

// Bytes at any place of aligned words.
struct Bytes {
    const u32 *words;
    u32 at;

    DEVICE_MEMBER Bytes operator+(u32 n) const { return Bytes{words, at + n}; }
    // The next word is touched only where some of it is needed: there may be none.
    DEVICE_MEMBER u32 four() const { return shift_pair(words[at / 4], words[at / 4 + (at % 4 != 0)], at % 4 * 8); }
    DEVICE_MEMBER u32 one() const { return words[at / 4] >> at % 4 * 8 & 0xff; }
    DEVICE_MEMBER u32 two() const {
        return shift_pair(words[at / 4], words[at / 4 + (at % 4 == 3)], at % 4 * 8) & 0xffff;
    }
    DEVICE_MEMBER float half() const { return from_half(two()); }
};

// Bytes from any address on, as aligned words.
DEVICE Bytes bytes_at(const u8 *p) {
    u32 lead = u32(u64(p) % 4);
    return Bytes{reinterpret_cast<const u32 *>(p - lead), lead};
}

// 32 values of one row.
struct Run {
    // Values 4i..4i+4 as signed bytes.
    u32 w[8];
    // The integer scales and minimums of 16 values each; types with one for all 32 have it in [0].
    i32 scale[2];
    i32 min[2];
};

// Each byte less `offset`, for bytes below 128.
DEVICE u32 minus(u32 bytes, u32 offset) { return ((bytes | 0x80808080u) - offset * 0x01010101u) ^ 0x80808080u; }

// 16 bytes of nibbles: the low ones are values 0..16.
DEVICE void nibbles(Bytes b, u32 (&w)[8]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 x = (b + 4 * i).four();
        w[i] = x & 0x0f0f0f0f;
        w[i + 4] = x >> 4 & 0x0f0f0f0f;
    }
}
// Bit i of `bits` becomes bit 4 of value i.
DEVICE void fifth_bits(u32 bits, u32 (&w)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) w[i] |= (bits >> 4 * i & 15) * 0x02040810u & 0x10101010;
}
DEVICE void all_minus(u32 offset, u32 (&w)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) w[i] = minus(w[i], offset);
}
// `bits` of each of 32 bytes, from bit `shift` on.
template <u32 mask> DEVICE void fields(Bytes b, u32 shift, u32 (&w)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) w[i] = (b + 4 * i).four() >> shift & mask * 0x01010101u;
}
// Adds bit `group` of each of 32 bytes as bit `to` of each value.
template <u32 to> DEVICE void high_bit(Bytes b, u32 group, u32 (&w)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) w[i] |= ((b + 4 * i).four() >> group & 0x01010101u) << to;
}

// What the types with blocks of 32 values share: no integer scales.
struct Block32 {
    static constexpr u32 VALUES = 32, SCALES = 0;
};

struct Q4_0 : Block32 {
    static constexpr u32 BYTES = 18;
    static constexpr bool MIN = false;
    DEVICE Run run(Bytes b, u32) {
        Run r{};
        nibbles(b + 2, r.w);
        all_minus(8, r.w);
        return r;
    }
    DEVICE float d(Bytes b) { return b.half(); }
    DEVICE float m(Bytes) { return 0.0f; }
};

struct Q4_1 : Block32 {
    static constexpr u32 BYTES = 20;
    static constexpr bool MIN = true;
    DEVICE Run run(Bytes b, u32) {
        Run r{};
        nibbles(b + 4, r.w);
        return r;
    }
    DEVICE float d(Bytes b) { return b.half(); }
    DEVICE float m(Bytes b) { return (b + 2).half(); }
};

struct Q5_0 : Block32 {
    static constexpr u32 BYTES = 22;
    static constexpr bool MIN = false;
    DEVICE Run run(Bytes b, u32) {
        Run r{};
        nibbles(b + 6, r.w);
        fifth_bits((b + 2).four(), r.w);
        all_minus(16, r.w);
        return r;
    }
    DEVICE float d(Bytes b) { return b.half(); }
    DEVICE float m(Bytes) { return 0.0f; }
};

struct Q5_1 : Block32 {
    static constexpr u32 BYTES = 24;
    static constexpr bool MIN = true;
    DEVICE Run run(Bytes b, u32) {
        Run r{};
        nibbles(b + 8, r.w);
        fifth_bits((b + 4).four(), r.w);
        return r;
    }
    DEVICE float d(Bytes b) { return b.half(); }
    DEVICE float m(Bytes b) { return (b + 2).half(); }
};

struct Q8_0 : Block32 {
    static constexpr u32 BYTES = 34;
    static constexpr bool MIN = false;
    DEVICE Run run(Bytes b, u32) {
        Run r{};
#pragma unroll
        for (u32 i = 0; i < 8; i++) r.w[i] = (b + 2 + 4 * i).four();
        return r;
    }
    DEVICE float d(Bytes b) { return b.half(); }
    DEVICE float m(Bytes) { return 0.0f; }
};

struct Q2_K {
    static constexpr u32 VALUES = 256, BYTES = 84, SCALES = 2;
    static constexpr bool MIN = true;
    DEVICE Run run(Bytes b, u32 group) {
        Run r{};
        fields<3>(b + 16 + 32 * (group / 4), 2 * (group % 4), r.w);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 both = (b + 2 * group + i).one();
            r.scale[i] = i32(both & 15);
            r.min[i] = i32(both >> 4);
        }
        return r;
    }
    DEVICE float d(Bytes b) { return (b + 80).half(); }
    DEVICE float m(Bytes b) { return (b + 82).half(); }
};

struct Q3_K {
    static constexpr u32 VALUES = 256, BYTES = 110, SCALES = 2;
    static constexpr bool MIN = false;
    DEVICE Run run(Bytes b, u32 group) {
        Run r{};
        fields<3>(b + 32 + 32 * (group / 4), 2 * (group % 4), r.w);
        high_bit<2>(b, group, r.w);
        all_minus(4, r.w);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 j = 2 * group + i;
            u32 low = (b + 96 + j % 8).one() >> 4 * (j / 8) & 15;
            u32 high = (b + 104 + j % 4).one() >> 2 * (j / 4) & 3;
            r.scale[i] = i32(low | high << 4) - 32;
        }
        return r;
    }
    DEVICE float d(Bytes b) { return (b + 108).half(); }
    DEVICE float m(Bytes) { return 0.0f; }
};

// The scale and minimum of 6 bits of Q4_K and Q5_K, from 12 bytes.
DEVICE void six_bits(Bytes b, u32 group, Run &r) {
    u32 scale = (b + group).one(), min = (b + group + 4).one();
    if (group < 4) {
        r.scale[0] = i32(scale & 63);
        r.min[0] = i32(min & 63);
    } else {
        r.scale[0] = i32((min & 15) | (b + (group - 4)).one() >> 6 << 4);
        r.min[0] = i32(min >> 4 | scale >> 6 << 4);
    }
}

struct Q4_K {
    static constexpr u32 VALUES = 256, BYTES = 144, SCALES = 1;
    static constexpr bool MIN = true;
    DEVICE Run run(Bytes b, u32 group) {
        Run r{};
        fields<15>(b + 16 + 32 * (group / 2), 4 * (group % 2), r.w);
        six_bits(b + 4, group, r);
        return r;
    }
    DEVICE float d(Bytes b) { return b.half(); }
    DEVICE float m(Bytes b) { return (b + 2).half(); }
};

struct Q5_K {
    static constexpr u32 VALUES = 256, BYTES = 176, SCALES = 1;
    static constexpr bool MIN = true;
    DEVICE Run run(Bytes b, u32 group) {
        Run r{};
        fields<15>(b + 48 + 32 * (group / 2), 4 * (group % 2), r.w);
        high_bit<4>(b + 16, group, r.w);
        six_bits(b + 4, group, r);
        return r;
    }
    DEVICE float d(Bytes b) { return b.half(); }
    DEVICE float m(Bytes b) { return (b + 2).half(); }
};

struct Q6_K {
    static constexpr u32 VALUES = 256, BYTES = 210, SCALES = 2;
    static constexpr bool MIN = false;
    DEVICE Run run(Bytes b, u32 group) {
        Run r{};
        u32 half = group / 4, quarter = group % 4;
        fields<15>(b + 64 * half + 32 * (quarter % 2), 4 * (quarter / 2), r.w);
        u32 high[8];
        fields<3>(b + 128 + 32 * half, 2 * quarter, high);
#pragma unroll
        for (u32 i = 0; i < 8; i++) r.w[i] |= high[i] << 4;
        all_minus(32, r.w);
#pragma unroll
        for (u32 i = 0; i < 2; i++) r.scale[i] = i32(i8((b + 192 + 2 * group + i).one()));
        return r;
    }
    DEVICE float d(Bytes b) { return (b + 208).half(); }
    DEVICE float m(Bytes) { return 0.0f; }
};

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
    DEVICE float value(Bytes b) { return from_bits(b.two() << 16); }
};

// Calls `each` with every type of integers, and its name in the kernels' names.
#define QUANTIZED_TYPES(each)                                                                                         \
    each(Q4_0, q4_0) each(Q4_1, q4_1) each(Q5_0, q5_0) each(Q5_1, q5_1) each(Q8_0, q8_0) each(Q2_K, q2_k)             \
        each(Q3_K, q3_k) each(Q4_K, q4_k) each(Q5_K, q5_k) each(Q6_K, q6_k)
#define FLOAT_TYPES(each) each(F32, f32) each(F16, f16) each(BF16, bf16)
