// What the kernels need of a compiler: clang without a CUDA SDK, nvcc, or a C++ compiler for the host.
//
// The host's half of it is host/shim.h, which runs a block's threads with real barriers. Whatever
// rounds is spelt out: no compiler may fuse a product with a sum (-ffp-contract=off, -fmad=false),
// so that a kernel rounds as the CPU's does.
#pragma once

using u8 = unsigned char;
using i8 = signed char;
using u16 = unsigned short;
using i16 = short;
using u32 = unsigned int;
using i32 = int;
using u64 = unsigned long long;

// For a lambda that is called in several places: what it shares with the function around it stays in registers.
#define INLINED __attribute__((always_inline))

// What one asynchronous copy moves.
struct alignas(16) Sixteen {
    u32 word[4];
};

#ifdef AIRSTREAM_HOST
#include "host/shim.h"
#else

#ifndef __NVCC__
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))
#endif
#define DEVICE_MEMBER __device__ inline __attribute__((always_inline))
#define DEVICE static DEVICE_MEMBER
// A kernel for blocks of at most so many threads; and with registers for so many blocks at a time.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)

#define SPECIAL_REGISTER(function, name)                                                                              \
    DEVICE u32 function() {                                                                                           \
        u32 value;                                                                                                    \
        asm("mov.u32 %0, %" name ";" : "=r"(value));                                                                  \
        return value;                                                                                                 \
    }
// Shared memory that a launch gives each block, beside what its kernel has by itself.
extern __shared__ Sixteen launch_memory[];

SPECIAL_REGISTER(thread, "%tid.x")
SPECIAL_REGISTER(threads, "%ntid.x")
SPECIAL_REGISTER(block_x, "%ctaid.x")
SPECIAL_REGISTER(block_y, "%ctaid.y")
SPECIAL_REGISTER(block_z, "%ctaid.z")
#undef SPECIAL_REGISTER

// Every thread of the block arrives here before any goes on, and sees what the others wrote.
DEVICE void block_sync() { asm volatile("bar.sync 0;" ::: "memory"); }
// The same for a warp.
DEVICE void warp_sync() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
// Two sides of barrier `id`, above 0, where `count` threads arrive: those that pass what they wrote to the others go on
// at once, and these wait for all.
DEVICE void pass_to(u32 id, u32 count) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory"); }
DEVICE void wait_for(u32 id, u32 count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
// The value of the lane whose number differs in the bits of `mask`.
DEVICE u32 lane_xor(u32 value, u32 mask) {
    u32 other;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(other) : "r"(value), "r"(mask));
    return other;
}
// The value of lane `from` % 32.
DEVICE u32 lane_at(u32 value, u32 from) {
    u32 other;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(other) : "r"(value), "r"(from));
    return other;
}
// A bit for each lane of the warp: whether it is so there.
DEVICE u32 lanes_where(bool so) {
    u32 lanes;
    asm volatile("{.reg .pred so; setp.ne.u32 so, %1, 0; vote.sync.ballot.b32 %0, so, 0xffffffff;}"
                 : "=r"(lanes)
                 : "r"(u32(so)));
    return lanes;
}
// How many bits are set.
DEVICE u32 ones(u32 bits) {
    u32 count;
    asm("popc.b32 %0, %1;" : "=r"(count) : "r"(bits));
    return count;
}

// Where something is in shared memory: by a cast that the compiler sees through, where PTX's cvta takes instructions.
DEVICE u32 shared_address(void *shared) {
#ifdef __NVCC__
    return u32(__cvta_generic_to_shared(shared));
#else
    return u32(u64((__attribute__((address_space(3))) void *)shared));
#endif
}
// The same pointer, to what is not in shared memory: of one that came out of memory the compiler cannot know that.
template <class T> DEVICE T *global(T *pointer) {
#ifdef __NVCC__
    return pointer;
#else
    return (T *)(__attribute__((address_space(1))) T *)u64(pointer);
#endif
}
// Copies 16 bytes to shared memory some time before `copies_done` says so. Both addresses are aligned to 16.
DEVICE void copy_async(Sixteen *to, const Sixteen *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Ends a group of copies of this thread.
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups of copies are not done.
template <u32 pending> DEVICE void copies_done() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// A value that was loaded may not be loaded later instead, where it is used.
DEVICE void loaded_here(float &value) { asm volatile("" : "+f"(value)); }

// acc + the dot product of 4 signed bytes.
DEVICE i32 dot_4(u32 a, u32 b, i32 acc) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(acc) : "r"(a), "r"(b));
    return acc;
}
// c + A B for 16 x 32 and 32 x 8 signed bytes, spread over a warp as PTX says of mma.m16n8k32.
DEVICE void mma_32(i32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for 16 x 16 and 16 x 8: mma.m16n8k16.
DEVICE void mma_16(i32 (&c)[4], u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(b));
}
// c + A B for 16 x 16 and 16 x 8 halves, two to a register: mma.m16n8k16. Exact where all that is added are integers
// whose magnitudes add up to less than 2^24.
DEVICE void mma_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The sums of two halves each.
DEVICE u32 add_halves(u32 a, u32 b) {
    u32 out;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}
// The lower word of (high, low) shifted right by `bits` % 32.
DEVICE u32 shift_pair(u32 low, u32 high, u32 bits) {
    u32 out;
    asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(bits));
    return out;
}
// Four of the bytes of (high, low), as the selector's digits say: the lowest of `low` is 0, the highest of `high` 7.
DEVICE u32 pick_bytes(u32 low, u32 high, u32 selector) {
    u32 out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
    return out;
}

// Has the value computed by here, where the compiler would do it as late as it is needed: while others wait.
DEVICE void settle(float &a) { asm volatile("" : "+f"(a)); }
// (a & mask) ^ flip in one instruction, which the compiler makes two of where both are constants.
DEVICE u32 mask_flip(u32 a, u32 mask, u32 flip) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(a), "r"(mask), "r"(flip));
    return out;
}

DEVICE float fused(float a, float b, float c) {
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(a) : "f"(a), "f"(b), "f"(c));
    return a;
}
DEVICE float divide(float a, float b) {
    asm("div.rn.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
    return a;
}
DEVICE float square_root(float a) {
    asm("sqrt.rn.f32 %0, %1;" : "=f"(a) : "f"(a));
    return a;
}
// To the nearest integer, halves to even.
DEVICE i32 nearest(float a) {
    i32 out;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(out) : "f"(a));
    return out;
}
DEVICE float from_half(u32 bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(u16(bits)));
    return out;
}
DEVICE u16 to_half(float a) {
    u16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(a));
    return out;
}
DEVICE u32 bits_of(float a) {
    u32 out;
    asm("mov.b32 %0, %1;" : "=r"(out) : "f"(a));
    return out;
}
DEVICE float from_bits(u32 a) {
    float out;
    asm("mov.b32 %0, %1;" : "=f"(out) : "r"(a));
    return out;
}
#endif

constexpr u32 LANES = 32;

DEVICE u32 lane() { return thread() % LANES; }
DEVICE u32 warp() { return thread() / LANES; }
template <class T> DEVICE constexpr T smaller(T a, T b) { return a < b ? a : b; }
template <class T> DEVICE constexpr T larger(T a, T b) { return a > b ? a : b; }
DEVICE float magnitude(float a) { return from_bits(bits_of(a) & 0x7fffffff); }
DEVICE u64 lane_at(u64 value, u32 from) {
    const u32 low = lane_at(u32(value), from);
    return u64(lane_at(u32(value >> 32), from)) << 32 | low;
}
DEVICE float float_xor(float a, u32 mask) { return from_bits(lane_xor(bits_of(a), mask)); }
// The sum over `lanes` neighbouring lanes, exact and so in any order.
template <u32 lanes> DEVICE i32 sum_lanes(i32 a) {
#pragma unroll
    for (u32 mask = lanes / 2; mask > 0; mask /= 2) a += i32(lane_xor(u32(a), mask));
    return a;
}
// The sums of 8 values over 8 neighbouring lanes each: of value i in lane i. Each exchange halves what is left of them.
DEVICE i32 sum_8_lanes(i32 (&a)[8]) {
#pragma unroll
    for (u32 half = 4; half > 0; half /= 2) {
        bool upper = lane() & half;
#pragma unroll
        for (u32 i = 0; i < half; i++) {
            const i32 low = a[i], high = a[i + half];
            a[i] = (upper ? high : low) + i32(lane_xor(u32(upper ? low : high), half));
        }
    }
    return a[0];
}
// The largest value over `lanes` neighbouring lanes.
template <u32 lanes> DEVICE float max_lanes(float a) {
#pragma unroll
    for (u32 mask = lanes / 2; mask > 0; mask /= 2) a = larger(a, float_xor(a, mask));
    return a;
}
template <u32 lanes> DEVICE u32 max_lanes(u32 a) {
#pragma unroll
    for (u32 mask = lanes / 2; mask > 0; mask /= 2) a = larger(a, lane_xor(a, mask));
    return a;
}
// The sum over 16 neighbouring lanes, in halves: (0 + 8) + (4 + 12) and so on, the CPU's order.
DEVICE float fold_16(float a) {
#pragma unroll
    for (u32 mask = 8; mask > 0; mask /= 2) a = a + float_xor(a, mask);
    return a;
}

// e^x within 2 units in the last place, x clamped to -87..=88: the CPU's polynomial (vector.rs).
DEVICE float exponential(float x) {
    x = smaller(larger(x, -87.0f), 88.0f);
    i32 n = nearest(x * 1.44269504088896340736f);
    float r = fused(float(n), -0.6933594f, x);
    r = fused(float(n), 2.1219444e-4f, r);
    float e = 1.0f / 5040.0f;
    e = fused(e, r, 1.0f / 720.0f);
    e = fused(e, r, 1.0f / 120.0f);
    e = fused(e, r, 1.0f / 24.0f);
    e = fused(e, r, 1.0f / 6.0f);
    e = fused(e, r, 0.5f);
    e = fused(e, r, 1.0f);
    e = fused(e, r, 1.0f);
    return from_bits(bits_of(e) + (u32(n) << 23));
}
// 1 - 2 / (e^2x + 1).
DEVICE float hyperbolic_tangent(float x) { return 1.0f - divide(2.0f, exponential(x + x) + 1.0f); }
