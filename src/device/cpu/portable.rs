//! The vector in plain Rust, for any processor.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // Lanes of several arrays run together.

use super::vector::Vector;
use half::f16;

/// Arrays of 16.
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// `f` of each lane number.
#[inline(always)]
fn each<T: Copy + Default>(f: impl Fn(usize) -> T) -> [T; 16] {
    let mut out = [T::default(); 16];
    for lane in 0..16 {
        out[lane] = f(lane);
    }
    out
}

// SAFETY (of every block below): the caller vouches for the pointers, as `Vector` says.
impl Vector for Portable {
    type I = [i32; 16];
    type F = [f32; 16];

    const SIGNED_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
    #[inline(always)]
    unsafe fn load(p: *const u8) -> [i32; 16] {
        // SAFETY: see above.
        unsafe { p.cast::<[i32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_columns(p: *const u8, stride: usize) -> [[i32; 16]; 4] {
        let mut columns = [[0; 16]; 4];
        for row in 0..16 {
            // SAFETY: see above.
            let dwords = unsafe { p.add(row * stride).cast::<[i32; 4]>().read_unaligned() };
            for i in 0..4 {
                columns[i][row] = dwords[i];
            }
        }
        columns
    }
    #[inline(always)]
    unsafe fn store(a: [i32; 16], p: *mut u8) {
        // SAFETY: see above.
        unsafe { p.cast::<[i32; 16]>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> [i32; 16] {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn and(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        each(|l| a[l] & b[l])
    }
    #[inline(always)]
    unsafe fn or(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        each(|l| a[l] | b[l])
    }
    #[inline(always)]
    unsafe fn xor(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        each(|l| a[l] ^ b[l])
    }
    #[inline(always)]
    unsafe fn shl(a: [i32; 16], n: u32) -> [i32; 16] {
        each(|l| a[l] << n)
    }
    #[inline(always)]
    unsafe fn shr(a: [i32; 16], n: u32) -> [i32; 16] {
        each(|l| (a[l] as u32 >> n) as i32)
    }
    #[inline(always)]
    unsafe fn add_i(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        each(|l| a[l].wrapping_add(b[l]))
    }
    #[inline(always)]
    unsafe fn sub_i(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        each(|l| a[l].wrapping_sub(b[l]))
    }
    #[inline(always)]
    unsafe fn max_i(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        each(|l| a[l].max(b[l]))
    }
    #[inline(always)]
    unsafe fn mul_i(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        each(|l| a[l].wrapping_mul(b[l]))
    }
    #[inline(always)]
    unsafe fn add_pairs(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        each(|l| {
            let low = a[l].wrapping_add(b[l]) & 0xffff;
            low | ((a[l] & !0xffff).wrapping_add(b[l] & !0xffff))
        })
    }
    #[inline(always)]
    unsafe fn dot(acc: [i32; 16], weights: [i32; 16], a: *const i8) -> [i32; 16] {
        // SAFETY: see above. The bytes are at most 127, so signed and unsigned are the same.
        unsafe { Self::dot_signed(acc, weights, a) }
    }
    #[inline(always)]
    unsafe fn signed(weights: [i32; 16]) -> [i32; 16] {
        weights
    }
    #[inline(never)] // Long without the instruction.
    unsafe fn dot_signed(acc: [i32; 16], weights: [i32; 16], a: *const i8) -> [i32; 16] {
        // SAFETY: see above.
        let a = unsafe { a.cast::<[i8; 4]>().read_unaligned() }.map(i32::from);
        each(|l| {
            let w = weights[l].to_le_bytes();
            (0..4).fold(acc[l], |sum, i| {
                sum.wrapping_add(i32::from(w[i] as i8) * a[i])
            })
        })
    }
    #[inline(never)] // Long without the instruction.
    unsafe fn dot_pairs(acc: [i32; 16], weights: [i32; 16], a: *const i16) -> [i32; 16] {
        // SAFETY: see above.
        let a = unsafe { a.cast::<[i16; 2]>().read_unaligned() }.map(i32::from);
        each(|l| {
            let (low, high) = (i32::from(weights[l] as i16), weights[l] >> 16);
            acc[l].wrapping_add(low * a[0]).wrapping_add(high * a[1])
        })
    }
    #[inline(always)]
    unsafe fn store_bytes(a: [i32; 16], p: *mut i8) {
        // SAFETY: see above.
        unsafe { p.cast::<[i8; 16]>().write_unaligned(a.map(|x| x as i8)) }
    }
    #[inline(always)]
    unsafe fn to_f(a: [i32; 16]) -> [f32; 16] {
        each(|l| a[l] as f32)
    }
    #[inline(always)]
    unsafe fn round(a: [f32; 16]) -> [i32; 16] {
        each(|l| a[l].round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn from_bits(a: [i32; 16]) -> [f32; 16] {
        each(|l| f32::from_bits(a[l] as u32))
    }
    #[inline(always)]
    unsafe fn to_bits(a: [f32; 16]) -> [i32; 16] {
        each(|l| a[l].to_bits() as i32)
    }
    #[inline(always)]
    unsafe fn load_f(p: *const f32) -> [f32; 16] {
        // SAFETY: see above.
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_f(a: [f32; 16], p: *mut f32) {
        // SAFETY: see above.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(a) }
    }
    #[inline(never)] // Long without the instruction.
    unsafe fn load_half(p: *const u8) -> [f32; 16] {
        // SAFETY: see above.
        let bits = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(never)] // Long without the instruction.
    unsafe fn store_half(a: [f32; 16], p: *mut u8) {
        // SAFETY: see above.
        unsafe {
            p.cast::<[u16; 16]>()
                .write_unaligned(a.map(|x| f16::from_f32(x).to_bits()))
        }
    }
    #[inline(never)] // Long without the instruction.
    unsafe fn low_half(a: [i32; 16]) -> [f32; 16] {
        each(|l| f16::from_bits(a[l] as u16).to_f32())
    }
    #[inline(never)] // Long without the instruction.
    unsafe fn high_half(a: [i32; 16]) -> [f32; 16] {
        each(|l| f16::from_bits((a[l] >> 16) as u16).to_f32())
    }
    #[inline(always)]
    unsafe fn splat_f(x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|l| a[l] + b[l])
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|l| a[l] - b[l])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|l| a[l] * b[l])
    }
    #[inline(always)]
    unsafe fn div(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|l| a[l] / b[l])
    }
    #[inline(never)] // Long without the instruction.
    unsafe fn fma(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        each(|l| a[l].mul_add(b[l], c[l]))
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|l| if a[l] > b[l] { a[l] } else { b[l] })
    }
    #[inline(always)]
    unsafe fn min(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|l| if a[l] < b[l] { a[l] } else { b[l] })
    }
    #[inline(always)]
    unsafe fn select_range(from: usize, to: usize, a: [f32; 16], other: [f32; 16]) -> [f32; 16] {
        each(|l| {
            if (from..to).contains(&l) {
                a[l]
            } else {
                other[l]
            }
        })
    }
}

super::kernels::kernels!(Portable);
