// The host's half of device.h: the threads of a block are fibers that switch where they wait for each
// other, so barriers and exchanges between lanes are real, and what runs in between is in an order of
// the caller's choice. Tests alone use it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __shared__ static
#define DEVICE_MEMBER inline
#define DEVICE [[maybe_unused]] static DEVICE_MEMBER
#define KERNEL(...) extern "C" void

namespace shim {
// Where the running fiber is.
struct Place {
    u32 thread, threads, block[3];
};
extern Place place;

// What a lane shows to the other lanes of its warp.
struct Words {
    u32 word[6];
};
void block_sync();
void warp_sync();
void pass_to(u32 id, u32 count);
void wait_for(u32 id, u32 count);
// Waits for the whole warp; what each lane showed.
const Words *exchange(const Words &mine);
void copy_async(Sixteen *to, const Sixteen *from);
void copies_end();
void copies_done(u32 pending);
float from_rare_half(u32 bits);
u16 to_rare_half(float a);
// Most halves are zeros, or a float's bits but for where the exponent begins.
inline float from_half(u32 bits) {
    const u32 size = bits & 0x7fff, word = (bits & 0x8000) << 16 | (size == 0 ? 0 : (size << 13) + (112 << 23));
    float value;
    std::memcpy(&value, &word, 4);
    return size == 0 || (bits >> 10 & 31) % 31 != 0 ? value : from_rare_half(bits);
}
inline u16 to_half(float a) {
    u32 word;
    std::memcpy(&word, &a, 4);
    // From the smallest normal half to the largest there is, rounded to the nearest, halves to even.
    const u32 size = word & 0x7fffffff, sign = word >> 16 & 0x8000;
    if (size >= 0x38800000 && size < 0x477ff000) return u16(sign | (size + 0xfff + (size >> 13 & 1) - (112 << 23)) >> 13);
    return size == 0 ? u16(sign) : to_rare_half(a);
}

// Byte i of a word.
inline i32 byte(u32 word, u32 i) { return i8(word >> 8 * i); }
} // namespace shim

// As much as any launch gives.
alignas(16) inline Sixteen launch_memory[(80 << 10) / 16];

DEVICE u32 thread() { return shim::place.thread; }
DEVICE u32 threads() { return shim::place.threads; }
DEVICE u32 block_x() { return shim::place.block[0]; }
DEVICE u32 block_y() { return shim::place.block[1]; }
DEVICE u32 block_z() { return shim::place.block[2]; }

DEVICE void block_sync() { shim::block_sync(); }
DEVICE void warp_sync() { shim::warp_sync(); }
DEVICE void pass_to(u32 id, u32 count) { shim::pass_to(id, count); }
DEVICE void wait_for(u32 id, u32 count) { shim::wait_for(id, count); }
DEVICE u32 lane_xor(u32 value, u32 mask) { return shim::exchange({{value}})[(thread() ^ mask) % 32].word[0]; }
DEVICE u32 lane_at(u32 value, u32 from) { return shim::exchange({{value}})[from % 32].word[0]; }
DEVICE u32 lanes_where(bool so) {
    const shim::Words *all = shim::exchange({{so}});
    u32 lanes = 0;
    for (u32 i = 0; i < 32; i++) lanes |= all[i].word[0] << i;
    return lanes;
}
DEVICE u32 ones(u32 bits) { return u32(__builtin_popcount(bits)); }
template <class T> DEVICE T *global(T *pointer) { return pointer; }
DEVICE void loaded_here(float &) {}
DEVICE void copy_async(Sixteen *to, const Sixteen *from) { shim::copy_async(to, from); }
DEVICE void copies_end() { shim::copies_end(); }
template <u32 pending> DEVICE void copies_done() { shim::copies_done(pending); }

DEVICE i32 dot_4(u32 a, u32 b, i32 acc) {
    for (u32 i = 0; i < 4; i++) acc += shim::byte(a, i) * shim::byte(b, i);
    return acc;
}
// c += A B over `columns` (16 or 32) columns, from the registers of all lanes: {a0..a3, b0, b1}. Register
// a[r / 8 + 2 (k / 16)], lane 4 (r % 8) + k % 16 / 4, byte k % 4 is A[r][k]; b[k / 16] of lane 4 n + k % 16 / 4 is
// B[k][n]; c[i] is row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2.
inline void mma(i32 (&c)[4], const shim::Words &mine, u32 columns) {
    const shim::Words *all = shim::exchange(mine);
    for (u32 i = 0; i < 4; i++) {
        u32 row = thread() % 32 / 4 + 8 * (i / 2), column = thread() % 4 * 2 + i % 2;
        for (u32 k = 0; k < columns; k++) {
            u32 a = all[row % 8 * 4 + k % 16 / 4].word[row / 8 + 2 * (k / 16)];
            u32 b = all[column * 4 + k % 16 / 4].word[4 + k / 16];
            c[i] += shim::byte(a, k % 4) * shim::byte(b, k % 4);
        }
    }
}
DEVICE void mma_32(i32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma(c, {{a[0], a[1], a[2], a[3], b[0], b[1]}}, 32);
}
DEVICE void mma_16(i32 (&c)[4], u32 a0, u32 a1, u32 b) { mma(c, {{a0, a1, 0, 0, b, 0}}, 16); }
// Register a[r / 8 + 2 (k / 8)], lane 4 (r % 8) + k % 8 / 2, half k % 2 is A[r][k], and so on.
DEVICE void mma_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const shim::Words *all = shim::exchange({{a[0], a[1], a[2], a[3], b0, b1}});
    const u32 row = thread() % 32 / 4, column = thread() % 4 * 2;
    float rows[2][16], columns[2][16];
    for (u32 i = 0; i < 2; i++) {
        for (u32 k = 0; k < 16; k++) {
            rows[i][k] = shim::from_half(all[row * 4 + k % 8 / 2].word[i + 2 * (k / 8)] >> k % 2 * 16 & 0xffff);
            columns[i][k] = shim::from_half(all[(column + i) * 4 + k % 8 / 2].word[4 + k / 8] >> k % 2 * 16 & 0xffff);
        }
    }
    for (u32 i = 0; i < 4; i++)
        for (u32 k = 0; k < 16; k++) c[i] += rows[i / 2][k] * columns[i % 2][k];
}
DEVICE u32 add_halves(u32 a, u32 b) {
    u32 low = shim::to_half(shim::from_half(a & 0xffff) + shim::from_half(b & 0xffff));
    return low | u32(shim::to_half(shim::from_half(a >> 16) + shim::from_half(b >> 16))) << 16;
}
DEVICE u32 shift_pair(u32 low, u32 high, u32 bits) { return u32((u64(high) << 32 | low) >> bits % 32); }
DEVICE u32 pick_bytes(u32 low, u32 high, u32 selector) {
    u64 both = u64(high) << 32 | low;
    u32 out = 0;
    for (u32 i = 0; i < 4; i++) out |= u32(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return out;
}

DEVICE void settle(float &) {}
DEVICE u32 mask_flip(u32 a, u32 mask, u32 flip) { return (a & mask) ^ flip; }

DEVICE float fused(float a, float b, float c) { return std::fmaf(a, b, c); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float square_root(float a) { return std::sqrt(a); }
DEVICE i32 nearest(float a) {
    if (std::isnan(a)) return 0;
    if (a >= 2147483648.0f) return INT32_MAX;
    return a < -2147483648.0f ? INT32_MIN : i32(std::nearbyintf(a));
}
DEVICE float from_half(u32 bits) { return shim::from_half(bits); }
DEVICE u16 to_half(float a) { return shim::to_half(a); }
DEVICE u32 bits_of(float a) {
    u32 out;
    std::memcpy(&out, &a, 4);
    return out;
}
DEVICE float from_bits(u32 a) {
    float out;
    std::memcpy(&out, &a, 4);
    return out;
}
