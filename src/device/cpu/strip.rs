//! One packed strip of 16 weight rows against one panel of R activation rows.
//!
//! The arithmetic of an output, whatever R is: the weights' integers are dotted
//! exactly with the activations' over 32 values (times their integer scales,
//! over 256); then one chain of f32 fused multiply-adds runs over the blocks in
//! their order: for each block of 32 first the scaled dot product, then the
//! minimum; for each block of 256 the other way round.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `StripFn`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Lanes and rows of several arrays run together.

use super::activations::{BLOCK_32_BYTES, BLOCK_256_BYTES, FINE_BITS};
use super::codec_32::Codec32;
use super::codec_256::Codec256;
use super::vector::Vector;

/// A kernel: (packed strip, cols, panel, first output, f32s from one batch row's output to the next, rows in the strip).
pub(super) type StripFn = unsafe fn(*const u8, usize, *const u8, *mut f32, usize, usize);

/// The sums of R batch rows, each of 16 weight rows, between two runs of columns.
pub(super) type Sums<const R: usize> = [[f32; 16]; R];

/// The packed strip and the panel from some column on.
pub(super) type Place = (*const u8, *const u8);

/// Columns that one part of a vector takes before the next part takes the same ones, where a vector
/// has parts: their weights and activations stay in the first cache meanwhile.
pub(super) const RUN_COLS: usize = 512;

/// Stores `sums[r]` for each batch row r; only `rows` lanes of it.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn store<const R: usize>(
    sums: &Sums<R>,
    out: *mut f32,
    stride: usize,
    rows: usize,
) {
    for r in 0..R {
        let out = out.add(r * stride);
        if rows == 16 {
            out.copy_from_nonoverlapping(sums[r].as_ptr(), 16);
        } else {
            out.copy_from_nonoverlapping(sums[r].as_ptr(), rows);
        }
    }
}

/// The sums as vectors.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
unsafe fn vectors<V: Vector, const R: usize>(sums: &Sums<R>) -> [V::F; R] {
    let mut acc = [V::splat_f(0.0); R];
    for r in 0..R {
        acc[r] = V::load_f(sums[r].as_ptr());
    }
    acc
}

/// Puts vectors back into the sums.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
unsafe fn put_back<V: Vector, const R: usize>(acc: [V::F; R], sums: &mut Sums<R>) {
    for r in 0..R {
        V::store_f(acc[r], sums[r].as_mut_ptr());
    }
}

/// How far ahead of their use weights are asked for: what memory delivers in its latency, and more.
/// Behind the end of a strip that is the start of the next one, mostly.
const PREFETCH_BYTES: usize = 4096;

/// Asks for the `bytes` bytes that lie `PREFETCH_BYTES` behind `p`.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
unsafe fn prefetch<V: Vector>(p: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        V::prefetch(p.wrapping_add(PREFETCH_BYTES + 64 * line));
    }
}

/// Blocks of 32 values.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn blocks_32<V: Vector, C: Codec32<V>, const R: usize>(
    (mut p, mut panel): Place,
    cols: usize,
    sums: &mut Sums<R>,
) -> Place {
    let mut acc = vectors::<V, R>(sums);
    for _ in 0..cols / 32 {
        prefetch::<V>(p, C::BYTES);
        let q = panel.cast::<i8>();
        let minus_sums = panel.add(72 * R).cast::<i32>();
        let mut fine = [V::splat(0); R];
        if C::OFFSET != 0 {
            for r in 0..R {
                let minus_sum = V::splat(minus_sums.add(r).read_unaligned());
                fine[r] = V::shl(minus_sum, C::OFFSET.ilog2());
            }
        }
        let (scale, min) = (C::scale(p), C::min(p));
        if V::WEIGHTS_FIRST {
            let (mut low, mut high) = ([V::splat(0); 4], [V::splat(0); 4]);
            for j in 0..4 {
                (low[j], high[j]) = C::weights(p, j);
            }
            for r in 0..R {
                let q = q.add(32 * r);
                let coarse = V::dot_16(V::dot_16(V::splat(0), low, q), high, q.add(16));
                let q = q.add(32 * R);
                let fine = V::dot_16(V::dot_16(fine[r], low, q), high, q.add(16));
                acc[r] = add_block::<V, C, R>(acc[r], [coarse, fine], [scale, min], panel, r);
            }
        } else {
            let mut coarse = [V::splat(0); R];
            for j in 0..4 {
                let (low, high) = C::weights(p, j);
                for r in 0..R {
                    let q = q.add(32 * r + 4 * j);
                    coarse[r] = C::dot(C::dot(coarse[r], low, q), high, q.add(16));
                    let q = q.add(32 * R);
                    fine[r] = C::dot(C::dot(fine[r], low, q), high, q.add(16));
                }
            }
            for r in 0..R {
                let dots = [coarse[r], fine[r]];
                acc[r] = add_block::<V, C, R>(acc[r], dots, [scale, min], panel, r);
            }
        }
        p = p.add(C::BYTES);
        panel = panel.add(BLOCK_32_BYTES * R);
    }
    put_back::<V, R>(acc, sums);
    (p, panel)
}

/// `acc` of row `r` + a block: its coarse and fine dot products, with the weights' scale and minimum.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
unsafe fn add_block<V: Vector, C: Codec32<V>, const R: usize>(
    acc: V::F,
    [coarse, fine]: [V::I; 2],
    [scale, min]: [V::F; 2],
    panel: *const u8,
    r: usize,
) -> V::F {
    let scales = panel.add(64 * R).cast::<f32>();
    let scaled_sums = panel.add(68 * R).cast::<f32>();
    let dot = V::add_i(V::shl(coarse, FINE_BITS), fine);
    let scale = V::mul(scale, V::splat_f(scales.add(r).read_unaligned()));
    let acc = V::fma(V::to_f(dot), scale, acc);
    if !C::MIN {
        return acc;
    }
    V::fma(min, V::splat_f(scaled_sums.add(r).read_unaligned()), acc)
}

/// Blocks of 256 values.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn blocks_256<V: Vector, C: Codec256<V>, const R: usize>(
    (mut p, mut panel): Place,
    cols: usize,
    sums: &mut Sums<R>,
) -> Place {
    let mut acc = vectors::<V, R>(sums);
    for _ in 0..cols / 256 {
        let q = panel.cast::<i8>();
        let act_scales = panel.add(512 * R).cast::<f32>();
        let sums = match C::SUB_VALUES {
            32 => panel.add(516 * R),
            _ => panel.add(548 * R),
        };
        // Pairs of sums per row: one for each pair of sub-blocks.
        let pairs = 128 / C::SUB_VALUES;

        let integers = C::scales(p);
        let min_scale = C::min_scale(p);
        let mut dots = [V::splat(0); R];
        for r in 0..R {
            let (mut coarse, mut fine) = (V::splat(0), V::splat(0));
            for i in 0..pairs {
                let sums = sums.add(4 * (2 * r * pairs + i)).cast::<i16>();
                coarse = V::dot_pairs(coarse, integers.pairs[i], sums);
                fine = V::dot_pairs(fine, integers.pairs[i], sums.add(2 * pairs));
            }
            let from_sums = V::add_i(V::shl(coarse, FINE_BITS), fine);
            if C::OFFSET == 0 {
                let minus = V::splat_f(-act_scales.add(r).read_unaligned());
                acc[r] = V::fma(V::to_f(from_sums), V::mul(min_scale, minus), acc[r]);
            } else {
                dots[r] = V::sub_i(dots[r], V::shl(from_sums, C::OFFSET.ilog2()));
            }
        }
        for outer in 0..8 / C::INNER {
            let share = C::BYTES / (8 / C::INNER);
            prefetch::<V>(p.add(outer * share), share);
            let q = q.add(outer * C::INNER * 64 * R);
            run::<V, C, R>(p, &integers.scales, q, outer, 0, &mut dots);
            run::<V, C, R>(p, &integers.scales, q, outer, 1, &mut dots);
            if C::INNER == 4 {
                run::<V, C, R>(p, &integers.scales, q, outer, 2, &mut dots);
                run::<V, C, R>(p, &integers.scales, q, outer, 3, &mut dots);
            }
        }
        let scale = C::scale(p);
        for r in 0..R {
            let scale = V::mul(scale, V::splat_f(act_scales.add(r).read_unaligned()));
            acc[r] = V::fma(V::to_f(dots[r]), scale, acc[r]);
        }
        p = p.add(C::BYTES);
        panel = panel.add(BLOCK_256_BYTES * R);
    }
    put_back::<V, R>(acc, sums);
    (p, panel)
}

/// `p`, of which the compiler forgets what it has loaded from there. Otherwise it would keep
/// dwords that several runs share, in registers that it does not have.
#[inline(always)]
fn forget(mut p: *const u8) -> *const u8 {
    // SAFETY: no instruction at all.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) p, options(pure, readonly, nostack, preserves_flags));
    }
    p
}

/// One run of 32 values: its dot products times its integer scales, onto `dots`.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
unsafe fn run<V: Vector, C: Codec256<V>, const R: usize>(
    p: *const u8,
    scales: &[V::I; 4],
    q: *const i8,
    outer: usize,
    inner: usize,
    dots: &mut [V::I; R],
) {
    let q = q.add(inner * 64 * R);
    let dwords = C::SUB_VALUES / 4;
    for part in 0..32 / C::SUB_VALUES {
        let dwords = part * dwords..(part + 1) * dwords;
        let mut sub = [V::splat(0); R];
        if V::WEIGHTS_FIRST {
            let mut weights = [[V::splat(0); 4]; 2];
            for i in 0..dwords.len() {
                weights[i / 4][i % 4] = C::weights(p, outer, inner, dwords.start + i);
            }
            for r in 0..R {
                for fine in 0..2 {
                    let q = q.add(32 * (r + fine * R) + 4 * dwords.start);
                    for i in 0..dwords.len() / 4 {
                        sub[r] = V::dot_16(sub[r], weights[i], q.add(16 * i));
                    }
                    if fine == 0 {
                        sub[r] = V::shl(sub[r], FINE_BITS);
                    }
                }
            }
        } else if R > 2 {
            // The coarse parts, then the fine ones: reading the weights twice costs less than
            // the registers for two sums of each row.
            for fine in 0..2 {
                let (p, q) = (forget(p), q.add(fine * 32 * R));
                for j in dwords.clone() {
                    let weights = C::weights(p, outer, inner, j);
                    for r in 0..R {
                        sub[r] = V::dot(sub[r], weights, q.add(32 * r + 4 * j));
                    }
                }
                for r in 0..R {
                    sub[r] = if fine == 0 {
                        V::shl(sub[r], FINE_BITS)
                    } else {
                        sub[r]
                    };
                }
            }
        } else {
            let mut coarse = [V::splat(0); R];
            for j in dwords {
                let weights = C::weights(p, outer, inner, j);
                for r in 0..R {
                    let q = q.add(32 * r + 4 * j);
                    coarse[r] = V::dot(coarse[r], weights, q);
                    sub[r] = V::dot(sub[r], weights, q.add(32 * R));
                }
            }
            for r in 0..R {
                sub[r] = V::add_i(V::shl(coarse[r], FINE_BITS), sub[r]);
            }
        }
        let index = (outer * C::INNER + inner) * (32 / C::SUB_VALUES) + part;
        let byte = V::shr(scales[index / 4], 8 * (index % 4) as u32);
        let mut scale = V::and(byte, V::splat(0xff));
        if C::SCALE_OFFSET != 0 {
            scale = V::add_i(scale, V::splat(-C::SCALE_OFFSET));
        }
        for r in 0..R {
            dots[r] = V::add_i(dots[r], V::mul_i(sub[r], scale));
        }
    }
}

/// How a dword becomes float weights.
pub(super) trait CodecFloat<V: Vector> {
    /// Values in a dword: 1 or 2.
    const VALUES: usize;
    /// The values of each row; the second one only where there are two.
    ///
    /// # Safety
    /// The caller is compiled for `V`.
    unsafe fn weights(x: V::I) -> [V::F; 2];
}

/// Plain f32.
pub(super) struct F32;
/// IEEE half precision.
pub(super) struct F16;
/// The upper half of an f32.
pub(super) struct BF16;

impl<V: Vector> CodecFloat<V> for F32 {
    const VALUES: usize = 1;
    #[inline(always)]
    unsafe fn weights(x: V::I) -> [V::F; 2] {
        [V::from_bits(x); 2]
    }
}

impl<V: Vector> CodecFloat<V> for F16 {
    const VALUES: usize = 2;
    #[inline(always)]
    unsafe fn weights(x: V::I) -> [V::F; 2] {
        [V::low_half(x), V::high_half(x)]
    }
}

impl<V: Vector> CodecFloat<V> for BF16 {
    const VALUES: usize = 2;
    #[inline(always)]
    unsafe fn weights(x: V::I) -> [V::F; 2] {
        let high = V::and(x, V::splat(0xffff_0000_u32 as i32));
        [V::from_bits(V::shl(x, 16)), V::from_bits(high)]
    }
}

/// Float weights: one fused multiply-add per value, in order.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn floats<V: Vector, C: CodecFloat<V>, const R: usize>(
    (mut p, panel): Place,
    cols: usize,
    sums: &mut Sums<R>,
) -> Place {
    let mut x = panel.cast::<f32>();
    let mut acc = vectors::<V, R>(sums);
    for _ in 0..cols / C::VALUES {
        let weights = C::weights(V::load(p));
        for weight in &weights[..C::VALUES] {
            for r in 0..R {
                acc[r] = V::fma(*weight, V::splat_f(x.add(r).read_unaligned()), acc[r]);
            }
            x = x.add(R);
        }
        p = p.add(64);
    }
    put_back::<V, R>(acc, sums);
    (p, x.cast())
}
