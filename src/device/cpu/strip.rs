//! One packed strip of 16 weight rows against one panel of R activation rows.
//!
//! The arithmetic of an output, whatever R is: the weights' integers are dotted
//! exactly with the activations' over 32 values (times their integer scales,
//! over 256), for which the dot products of the activations' parts are put
//! together (`precision`); then one chain of f32 fused multiply-adds runs over the blocks in
//! their order: for each block of 32 first the scaled dot product, then the
//! minimum; for each block of 256 the other way round.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `StripFn`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Lanes and rows of several arrays run together.

use super::activations::{MINUS_SUMS_OFFSET, block_32_bytes, block_256_bytes, run_bytes};
use super::codec_32::Codec32;
use super::codec_256::Codec256;
use super::groups_first;
use super::precision::{BITS_8, FINE_BITS, SECOND, shape};
use super::vector::Vector;
use super::weights_first;

/// A kernel: (packed strip, cols, panel, first output, f32s from one batch row's 16 outputs to the next,
/// whether the outputs hold the sums of the columns before).
pub(super) type StripFn = unsafe fn(*const u8, usize, *const u8, *mut f32, usize, bool);

/// The sums of R batch rows, each of 16 weight rows, between two runs of columns.
pub(super) type Sums<const R: usize> = [[f32; 16]; R];

/// The packed strip and the panel from some column on.
pub(super) type Place = (*const u8, *const u8);

/// Columns that one part of a vector takes before the next part takes the same ones, where a vector
/// has parts: their weights and activations stay in the first cache meanwhile.
pub(super) const RUN_COLS: usize = 512;

/// The sums that an earlier call stored.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn load<const R: usize>(out: *const f32, stride: usize) -> Sums<R> {
    let mut sums = [[0.0; 16]; R];
    for r in 0..R {
        sums[r] = out.add(r * stride).cast::<[f32; 16]>().read_unaligned();
    }
    sums
}

/// Stores `sums[r]` for each batch row r.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn store<const R: usize>(sums: &Sums<R>, out: *mut f32, stride: usize) {
    for r in 0..R {
        out.add(r * stride)
            .cast::<[f32; 16]>()
            .write_unaligned(sums[r]);
    }
}

/// The sums as vectors.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn vectors<V: Vector, const R: usize>(sums: &Sums<R>) -> [V::F; R] {
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
pub(super) unsafe fn put_back<V: Vector, const R: usize>(acc: [V::F; R], sums: &mut Sums<R>) {
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
pub(super) unsafe fn prefetch<V: Vector>(p: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        V::prefetch(p.wrapping_add(PREFETCH_BYTES + 64 * line));
    }
}

/// Dot products with the parts of R rows: the only one of each row, or coarse and fine of a single row,
/// or x, y and z of each two rows. Groups and parts that a panel does not have are not used.
pub(super) type Parts<V, const R: usize> = [[<V as Vector>::I; 3]; R];

/// The dot products of R rows from those of their parts.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn whole<V: Vector, const R: usize, const BITS: u32>(
    parts: &Parts<V, R>,
) -> [V::I; R] {
    let mut dots = [V::splat(0); R];
    if BITS == BITS_8 {
        for r in 0..R {
            dots[r] = parts[r][0];
        }
        return dots;
    }
    if R == 1 {
        dots[0] = V::add_i(V::shl(parts[0][0], FINE_BITS), parts[0][1]);
        return dots;
    }
    for pair in 0..R / 2 {
        let [x, y, z] = parts[pair];
        if V::WEIGHTS_FIRST {
            dots[2 * pair] = V::add_product(z, x, V::splat(1 << FINE_BITS));
            dots[2 * pair + 1] = V::add_product(z, y, V::splat(SECOND));
            continue;
        }
        dots[2 * pair] = V::add_i(V::shl(x, FINE_BITS), z);
        // 15 y + z.
        dots[2 * pair + 1] = V::add_i(V::shl(y, FINE_BITS), V::sub_i(z, y));
    }
    dots
}

/// What minus sums come to for weights that are too large by `offset`, a power of two.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn of_offset<V: Vector>(minus_sums: V::I, offset: i32) -> V::I {
    match offset / MINUS_SUMS_OFFSET {
        1 => minus_sums,
        times => V::shl(minus_sums, times.ilog2()),
    }
}

/// What the dot products with the parts of a 32-block begin at, for weights that are too large by
/// `offset`, or 0.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
unsafe fn first_parts<V: Vector, const R: usize, const BITS: u32>(
    panel: *const u8,
    offset: i32,
) -> Parts<V, R> {
    let mut parts: Parts<V, R> = [[V::splat(0); 3]; R];
    if offset == 0 {
        return parts;
    }
    let minus_sums = panel.add(run_bytes(R, BITS) + 8 * R).cast::<i32>();
    let (groups, parts_each) = shape(R, BITS);
    for group in 0..groups {
        for part in 0..parts_each {
            let minus_sum = minus_sums.add(group * parts_each + part);
            let first = V::splat(minus_sum.read_unaligned());
            parts[group][part] = of_offset::<V>(first, offset);
        }
    }
    parts
}

/// Values 4j..4j+4 and 16+4j..16+4j+4 of a block of 32: their dot products onto `parts`.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
unsafe fn dwords_of_32<V: Vector, C: Codec32<V>, const R: usize, const BITS: u32>(
    p: *const u8,
    q: *const i8,
    j: usize,
    parts: &mut Parts<V, R>,
) {
    let (groups, parts_each) = shape(R, BITS);
    let (low, high) = C::weights(p, j);
    for group in 0..groups {
        for part in 0..parts_each {
            let q = q.add(32 * (group * parts_each + part) + 4 * j);
            let dot = C::dot(parts[group][part], low, q);
            parts[group][part] = C::dot(dot, high, q.add(16));
        }
    }
}

/// Blocks of 32 values.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn blocks_32<V: Vector, C: Codec32<V>, const R: usize, const BITS: u32>(
    (mut p, mut panel): Place,
    cols: usize,
    sums: &mut Sums<R>,
) -> Place {
    if V::MANY_REGISTERS {
        return groups_first::blocks_32::<V, C, R, BITS>((p, panel), cols, sums);
    }
    let mut acc = vectors::<V, R>(sums);
    for _ in 0..cols / 32 {
        prefetch::<V>(p, C::BYTES);
        let dots = if V::WEIGHTS_FIRST {
            weights_first::dots_of_32::<V, C, R, BITS>(p, panel)
        } else {
            let q = panel.cast::<i8>();
            let mut dots = first_parts::<V, R, BITS>(panel, C::OFFSET);
            // Written out, for the compiler to do so too.
            dwords_of_32::<V, C, R, BITS>(p, q, 0, &mut dots);
            dwords_of_32::<V, C, R, BITS>(p, q, 1, &mut dots);
            dwords_of_32::<V, C, R, BITS>(p, q, 2, &mut dots);
            dwords_of_32::<V, C, R, BITS>(p, q, 3, &mut dots);
            whole::<V, R, BITS>(&dots)
        };
        let act_scales = panel.add(run_bytes(R, BITS)).cast::<f32>();
        let scaled_sums = panel.add(run_bytes(R, BITS) + 4 * R).cast::<f32>();
        let (scale, min) = (C::scale(p), C::min(p));
        for r in 0..R {
            let act_scale = V::splat_f(act_scales.add(r).read_unaligned());
            acc[r] = V::fma(V::to_f(dots[r]), V::mul(scale, act_scale), acc[r]);
            if C::MIN {
                let scaled_sum = V::splat_f(scaled_sums.add(r).read_unaligned());
                acc[r] = V::fma(min, scaled_sum, acc[r]);
            }
        }
        p = p.add(C::BYTES);
        panel = panel.add(block_32_bytes(R, BITS));
    }
    put_back::<V, R>(acc, sums);
    (p, panel)
}

/// Blocks of 256 values.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn blocks_256<V: Vector, C: Codec256<V>, const R: usize, const BITS: u32>(
    (mut p, mut panel): Place,
    cols: usize,
    sums: &mut Sums<R>,
) -> Place {
    if V::MANY_REGISTERS {
        return groups_first::blocks_256::<V, C, R, BITS>((p, panel), cols, sums);
    }
    let mut acc = vectors::<V, R>(sums);
    for _ in 0..cols / 256 {
        let q = panel.cast::<i8>();
        let meta = panel.add(8 * run_bytes(R, BITS));
        let act_scales = meta.cast::<f32>();
        // Pairs of sums: (where a row's are, how many, how often the same integers go with them).
        let (act_sums, pairs, times) = match C::SUB_VALUES {
            32 => (meta.add(4 * R), 4, 2),
            _ => (meta.add(36 * R), 8, 1),
        };
        let integers = C::scales(p);
        let min_scale = C::min_scale(p);
        let mut dots = [V::splat(0); R];
        for r in 0..R {
            if V::WEIGHTS_FIRST && weights_first::takes_offset_off(R, C::OFFSET) {
                break;
            }
            let act_sums = act_sums.add(32 * r).cast::<i16>();
            let from_sums = V::dot_sums(&integers.pairs, pairs, times, act_sums);
            if C::OFFSET == 0 {
                let minus = V::splat_f(-act_scales.add(r).read_unaligned());
                acc[r] = V::fma(V::to_f(from_sums), V::mul(min_scale, minus), acc[r]);
            } else {
                dots[r] = V::sub_i(dots[r], V::shl(from_sums, C::OFFSET.ilog2()));
            }
        }
        if V::WEIGHTS_FIRST {
            let of_runs = weights_first::dots_of_256::<V, C, R, BITS>(p, &integers, q);
            for r in 0..R {
                dots[r] = V::add_i(dots[r], of_runs[r]);
            }
        } else {
            for outer in 0..8 / C::INNER {
                let share = C::BYTES / (8 / C::INNER);
                prefetch::<V>(p.add(outer * share), share);
                let q = q.add(outer * C::INNER * run_bytes(R, BITS));
                run::<V, C, R, BITS>(p, &integers.scales, q, outer, 0, &mut dots);
                run::<V, C, R, BITS>(p, &integers.scales, q, outer, 1, &mut dots);
                if C::INNER == 4 {
                    run::<V, C, R, BITS>(p, &integers.scales, q, outer, 2, &mut dots);
                    run::<V, C, R, BITS>(p, &integers.scales, q, outer, 3, &mut dots);
                }
            }
        }
        let scale = C::scale(p);
        for r in 0..R {
            let scale = V::mul(scale, V::splat_f(act_scales.add(r).read_unaligned()));
            acc[r] = V::fma(V::to_f(dots[r]), scale, acc[r]);
        }
        p = p.add(C::BYTES);
        panel = panel.add(block_256_bytes(R, BITS));
    }
    put_back::<V, R>(acc, sums);
    (p, panel)
}

/// `p`, of which the compiler forgets what it has loaded from there. Otherwise it would keep
/// dwords that several runs share, in registers that it does not have.
#[inline(always)]
pub(super) fn forget(mut p: *const u8) -> *const u8 {
    // SAFETY: no instruction at all. Not `pure`, or the compiler would make one of several.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) p, options(readonly, nostack, preserves_flags));
    }
    p
}

/// One run of 32 values: its dot products times its integer scales, onto `dots`.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
unsafe fn run<V: Vector, C: Codec256<V>, const R: usize, const BITS: u32>(
    p: *const u8,
    scales: &[V::I; 4],
    q: *const i8,
    outer: usize,
    inner: usize,
    dots: &mut [V::I; R],
) {
    let q = q.add(inner * run_bytes(R, BITS));
    let p = if R > 2 { forget(p) } else { p };
    let dwords = C::SUB_VALUES / 4;
    let (groups, parts_each) = shape(R, BITS);
    for sub in 0..32 / C::SUB_VALUES {
        let dwords = sub * dwords..(sub + 1) * dwords;
        let mut parts: Parts<V, R> = [[V::splat(0); 3]; R];
        for j in dwords {
            let weights = C::weights(p, outer, inner, j);
            for group in 0..groups {
                for part in 0..parts_each {
                    let q = q.add(32 * (group * parts_each + part) + 4 * j);
                    parts[group][part] = V::dot(parts[group][part], weights, q);
                }
            }
        }
        let index = (outer * C::INNER + inner) * (32 / C::SUB_VALUES) + sub;
        let scale = sub_scale::<V, C>(scales, index);
        let subs = whole::<V, R, BITS>(&parts);
        for r in 0..R {
            dots[r] = V::add_i(dots[r], V::mul_i(subs[r], scale));
        }
    }
}

/// The integer scale of sub-block `index` of each row.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn sub_scale<V: Vector, C: Codec256<V>>(
    scales: &[V::I; 4],
    index: usize,
) -> V::I {
    let byte = V::shr(scales[index / 4], 8 * (index % 4) as u32);
    let scale = V::and(byte, V::splat(0xff));
    if C::SCALE_OFFSET == 0 {
        return scale;
    }
    V::add_i(scale, V::splat(-C::SCALE_OFFSET))
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

/// Float weights: one fused multiply-add per value, in order. Nothing is rounded to `BITS`.
///
/// # Safety
/// As for [`StripFn`].
#[inline(always)]
pub(super) unsafe fn floats<V: Vector, C: CodecFloat<V>, const R: usize, const BITS: u32>(
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
