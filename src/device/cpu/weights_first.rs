//! The integer dot products of a block where its weights fit registers: each two parts of the
//! activations, which stand side by side, go through all of them in turn.
//!
//! That suits processors with 32 registers of 128 bits: a load brings what two accumulators take from
//! four vectors of weights, and instructions that multiply matrices take just such a load.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `StripFn`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Parts and lanes of several arrays run together.

use super::activations::run_bytes;
use super::codec_32::Codec32;
use super::codec_256::{Codec256, Scales};
use super::precision::{parts, shape};
use super::strip::{Parts, of_offset, prefetch, whole};
use super::vector::Vector;

/// Dot products with two parts at a time, of up to 12, as [`Vector::dot_two`] has them. The last part of
/// an odd number stands alone in the first vector. Those that a panel does not have are not used.
type Twos<V> = [[<V as Vector>::I; 2]; 6];

/// Whether a part of a run of `parts` parts stands alone: the last one of an odd number.
pub(super) const fn alone(parts: usize, part: usize) -> bool {
    part.is_multiple_of(2) && part + 1 == parts
}

/// Where columns 8 `i`..8 `i` + 8 of a part that is not alone stand in a run.
pub(super) const fn columns_at(part: usize, i: usize) -> usize {
    64 * (part / 2) + 16 * i + 8 * (part % 2)
}

/// Does something with each two parts of `$parts`, and with the last one of an odd number. Written out, as
/// the compiler would leave a loop of this length alone, and the sums in memory.
macro_rules! for_each_two {
    ($parts:expr, $index:ident => $two:expr, else $one:expr) => {
        for_each_two!(@ $parts, $index, $two, $one, 0 1 2 3 4 5)
    };
    (@ $parts:expr, $index:ident, $two:expr, $one:expr, $($i:literal)*) => {
        $({
            const $index: usize = $i;
            if const { $parts > 2 * $i + 1 } {
                $two
            } else if const { $parts == 2 * $i + 1 } {
                $one
            }
        })*
    };
}

/// The rows' dot products from those with two parts at a time.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
unsafe fn rows<V: Vector, const R: usize, const BITS: u32>(twos: &Twos<V>) -> [V::I; R] {
    let (groups, parts_each) = shape(R, BITS);
    let mut each = *twos;
    for_each_two!(parts(R, BITS), I => each[I] = V::apart(twos[I]), else ());
    let mut dots: Parts<V, R> = [[V::splat(0); 3]; R];
    for group in 0..groups {
        for part in 0..parts_each {
            let i = group * parts_each + part;
            dots[group][part] = each[i / 2][i % 2];
        }
    }
    whole::<V, R, BITS>(&dots)
}

/// The dot products of a block of 32.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
pub(super) unsafe fn dots_of_32<V: Vector, C: Codec32<V>, const R: usize, const BITS: u32>(
    p: *const u8,
    panel: *const u8,
) -> [V::I; R] {
    let (mut low, mut high) = ([V::splat(0); 4], [V::splat(0); 4]);
    for j in 0..4 {
        (low[j], high[j]) = C::weights(p, j);
    }
    if const { parts(R, BITS) > 1 } {
        (low, high) = (V::of_16(low), V::of_16(high));
    }
    let minus_sums = panel.add(run_bytes(R, BITS) + 8 * R).cast::<i32>();
    // What the weights are too large by is taken off from the start.
    let first = |minus_sums| match C::OFFSET {
        0 => V::splat(0),
        offset => of_offset::<V>(minus_sums, offset),
    };
    let mut twos: Twos<V> = [[V::splat(0); 2]; 6];
    for_each_two!(parts(R, BITS), I => {
        let q = panel.add(64 * I).cast();
        let [a, b] = V::of_two(minus_sums.add(2 * I));
        let dots = V::dot_two([first(a), first(b)], low, q);
        twos[I] = V::dot_two(dots, high, q.add(32));
    }, else {
        let q = panel.add(64 * I).cast();
        let dots = first(V::splat(minus_sums.add(2 * I).read_unaligned()));
        let dots = V::dot_one(dots, low, q);
        twos[I][0] = V::dot_one(dots, high, q.add(16));
    });
    rows::<V, R, BITS>(&twos)
}

/// Whether [`dots_of_256`] takes off what weights are too large by. For fewer rows it is less work to
/// take it off with the sums of the activations.
pub(super) const fn takes_offset_off(rows: usize, offset: i32) -> bool {
    offset != 0 && rows >= 4
}

/// The dot products of a block of 256, times the integer scales.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
pub(super) unsafe fn dots_of_256<V: Vector, C: Codec256<V>, const R: usize, const BITS: u32>(
    p: *const u8,
    scales: &Scales<V>,
    q: *const i8,
) -> [V::I; R] {
    let mut twos: Twos<V> = [[V::splat(0); 2]; 6];
    for outer in 0..8 / C::INNER {
        let share = C::BYTES / (8 / C::INNER);
        prefetch::<V>(p.add(outer * share), share);
        let q = q.add(outer * C::INNER * run_bytes(R, BITS));
        run::<V, C, R, BITS>(p, scales, q, outer, 0, &mut twos);
        run::<V, C, R, BITS>(p, scales, q, outer, 1, &mut twos);
        if C::INNER == 4 {
            run::<V, C, R, BITS>(p, scales, q, outer, 2, &mut twos);
            run::<V, C, R, BITS>(p, scales, q, outer, 3, &mut twos);
        }
    }
    rows::<V, R, BITS>(&twos)
}

/// The integer scale of sub-block `index`.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
unsafe fn sub_scale<V: Vector, C: Codec256<V>>(scales: &Scales<V>, index: usize) -> V::I {
    if C::OFFSET != 0 {
        // The pairs are the scales too, as they are.
        return V::half(scales.pairs[index / 4 * 2 + index % 2], index / 2 % 2);
    }
    let byte = V::shr(scales.scales[index / 4], 8 * (index % 4) as u32);
    V::and(byte, V::splat(0xff))
}

/// One run of 32 values: the dot products with its parts, times its integer scales, onto `twos`. The parts
/// are put together once per block: in 32 bits that wrap, it comes to the same.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
unsafe fn run<V: Vector, C: Codec256<V>, const R: usize, const BITS: u32>(
    p: *const u8,
    scales: &Scales<V>,
    q: *const i8,
    outer: usize,
    inner: usize,
    twos: &mut Twos<V>,
) {
    let q = q.add(inner * run_bytes(R, BITS));
    // Written out, so that the number of the second one is a constant too.
    sub_block::<V, C, R, BITS>(p, scales, q, outer, inner, 0, twos);
    if C::SUB_VALUES == 16 {
        sub_block::<V, C, R, BITS>(p, scales, q, outer, inner, 1, twos);
    }
}

/// The values of a run that share an integer scale.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn sub_block<V: Vector, C: Codec256<V>, const R: usize, const BITS: u32>(
    p: *const u8,
    scales: &Scales<V>,
    q: *const i8,
    outer: usize,
    inner: usize,
    sub: usize,
    twos: &mut Twos<V>,
) {
    let halves = C::SUB_VALUES / 16;
    let mut weights = [[V::splat(0); 4]; 2];
    for half in 0..halves {
        for j in 0..4 {
            let dword = 4 * (sub * halves + half) + j;
            weights[half][j] = C::weights(p, outer, inner, dword);
            if takes_offset_off(R, C::OFFSET) {
                weights[half][j] = V::less(weights[half][j], C::OFFSET as i8);
            }
        }
        if const { parts(R, BITS) > 1 } {
            weights[half] = V::of_16(weights[half]);
        }
    }
    let index = (outer * C::INNER + inner) * (32 / C::SUB_VALUES) + sub;
    let scale = sub_scale::<V, C>(scales, index);
    let scale_two = V::for_two(scale);
    for_each_two!(parts(R, BITS), I => {
        let q = q.add(64 * I + 32 * sub * halves);
        let mut dots = V::dot_two([V::splat(0); 2], weights[0], q);
        if halves == 2 {
            dots = V::dot_two(dots, weights[1], q.add(32));
        }
        for i in 0..2 {
            twos[I][i] = V::add_product(twos[I][i], dots[i], scale_two[i]);
        }
    }, else {
        let q = q.add(64 * I + 16 * sub * halves);
        let mut dots = V::dot_one(V::splat(0), weights[0], q);
        if halves == 2 {
            dots = V::dot_one(dots, weights[1], q.add(16));
        }
        twos[I][0] = V::add_product(twos[I][0], dots, scale);
    });
}
