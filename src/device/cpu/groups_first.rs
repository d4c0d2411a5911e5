//! One packed strip against one panel, two rows (or four of 8 bits) at a time: the weights of a block are
//! taken apart once and stay in registers while the rows pass.
//!
//! That suits 32 registers of 512 bits. What puts the dot products of some rows together then stands between
//! the products of others, and runs beside them on the units that do no products; at the end of a block, for
//! all rows at once, it takes turns with the products instead.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `StripFn`.
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // Lanes and rows of several arrays run together.

use super::activations::{block_32_bytes, block_256_bytes, run_bytes};
use super::codec_32::Codec32;
use super::codec_256::{Codec256, Scales};
use super::precision::{BITS_8, FINE_BITS};
use super::strip::{Place, Sums, forget, of_offset, prefetch, put_back, sub_scale, vectors};
use super::vector::Vector;

/// Rows of a panel of `rows` rows that are taken together, and the parts that they have: enough chains
/// of dot products to hide the latency of one.
const fn together(rows: usize, bits: u32) -> (usize, usize) {
    match (bits, rows) {
        (BITS_8, 1 | 2 | 4) => (rows, rows),
        (BITS_8, _) => (4, 4),
        (_, 1) => (1, 2),
        _ => (2, 3),
    }
}

/// Does something for each of the groups of rows that are taken together. Written out, as the compiler
/// would leave a loop of this length alone, and the sums in memory.
macro_rules! for_each_group {
    ($rows:ident, $bits:ident, $group:ident => $body:expr) => {
        for_each_group!(@ $rows, $bits, $group, $body, 0 1 2 3)
    };
    (@ $rows:ident, $bits:ident, $group:ident, $body:expr, $($i:literal)*) => {
        $(
            if $i < $rows / together($rows, $bits).0 {
                let $group: usize = $i;
                $body
            }
        )*
    };
}

/// Dot products with the parts of rows that are taken together, or those of the rows. Those that there
/// are not are not used.
type Dots<V> = [<V as Vector>::I; 4];

/// The dot products of rows that are taken together from those of their parts.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
unsafe fn of_rows<V: Vector, const R: usize, const BITS: u32>(parts: Dots<V>) -> Dots<V> {
    let [x, y, z, _] = parts;
    match (BITS, R) {
        (BITS_8, _) => parts,
        (_, 1) => [V::add_i(V::shl(x, FINE_BITS), y), y, y, y],
        _ => {
            let first = V::add_i(V::shl(x, FINE_BITS), z);
            // 15 y + z.
            let second = V::add_i(V::shl(y, FINE_BITS), V::sub_i(z, y));
            [first, second, z, z]
        }
    }
}

/// Blocks of 32 values.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
pub(super) unsafe fn blocks_32<V: Vector, C: Codec32<V>, const R: usize, const BITS: u32>(
    (mut p, mut panel): Place,
    cols: usize,
    sums: &mut Sums<R>,
) -> Place {
    let mut acc = vectors::<V, R>(sums);
    let (rows, parts) = together(R, BITS);
    for _ in 0..cols / 32 {
        prefetch::<V>(p, C::BYTES);
        prefetch::<V>(panel, block_32_bytes(R, BITS));
        let mut weights = [(V::splat(0), V::splat(0)); 4];
        let (scale, min) = (C::scale(p), C::min(p));
        let act_scales = panel.add(run_bytes(R, BITS)).cast::<f32>();
        let scaled_sums = act_scales.add(R);
        let minus_sums = scaled_sums.add(R).cast::<i32>();
        for_each_group!(R, BITS, group => {
            let mut dots: Dots<V> = [V::splat(0); 4];
            if C::OFFSET != 0 {
                for part in 0..parts {
                    let minus_sum = V::splat_at(minus_sums.add(group * parts + part));
                    dots[part] = of_offset::<V>(minus_sum, C::OFFSET);
                }
            }
            let q = panel.cast::<i8>().add(32 * parts * group);
            for j in 0..4 {
                if group == 0 {
                    // Not all at once, for the products to begin meanwhile.
                    weights[j] = C::weights(p, j);
                }
                for part in 0..parts {
                    dots[part] = C::dot(dots[part], weights[j].0, q.add(32 * part + 4 * j));
                }
                for part in 0..parts {
                    dots[part] = C::dot(dots[part], weights[j].1, q.add(32 * part + 4 * j + 16));
                }
            }
            let dots = of_rows::<V, R, BITS>(dots);
            for i in 0..rows {
                let r = group * rows + i;
                let act_scale = V::splat_f(act_scales.add(r).read_unaligned());
                acc[r] = V::fma(V::to_f(dots[i]), V::mul(scale, act_scale), acc[r]);
                if C::MIN {
                    let scaled_sum = V::splat_f(scaled_sums.add(r).read_unaligned());
                    acc[r] = V::fma(min, scaled_sum, acc[r]);
                }
            }
        });
        p = p.add(C::BYTES);
        panel = panel.add(block_32_bytes(R, BITS));
    }
    put_back::<V, R>(acc, sums);
    (p, panel)
}

/// Blocks of 256 values.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
pub(super) unsafe fn blocks_256<V: Vector, C: Codec256<V>, const R: usize, const BITS: u32>(
    (mut p, mut panel): Place,
    cols: usize,
    sums: &mut Sums<R>,
) -> Place {
    let mut acc = vectors::<V, R>(sums);
    let (rows, _) = together(R, BITS);
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
        for_each_group!(R, BITS, group => {
            for r in group * rows..(group + 1) * rows {
                let act_sums = act_sums.add(32 * r).cast::<i16>();
                let from_sums = V::dot_sums(&integers.pairs, pairs, times, act_sums);
                if C::OFFSET == 0 {
                    let minus = V::splat_f(-act_scales.add(r).read_unaligned());
                    acc[r] = V::fma(V::to_f(from_sums), V::mul(min_scale, minus), acc[r]);
                } else {
                    dots[r] = V::sub_i(dots[r], V::shl(from_sums, C::OFFSET.ilog2()));
                }
            }
        });
        for outer in 0..8 / C::INNER {
            let share = C::BYTES / (8 / C::INNER);
            prefetch::<V>(p.add(outer * share), share);
            let share = block_256_bytes(R, BITS) / (8 / C::INNER);
            prefetch::<V>(panel.add(outer * share), share);
            let q = q.add(outer * C::INNER * run_bytes(R, BITS));
            run::<V, C, R, BITS>(p, &integers, q, outer, 0, &mut dots);
            run::<V, C, R, BITS>(p, &integers, q, outer, 1, &mut dots);
            if C::INNER == 4 {
                run::<V, C, R, BITS>(p, &integers, q, outer, 2, &mut dots);
                run::<V, C, R, BITS>(p, &integers, q, outer, 3, &mut dots);
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

/// One run of 32 values: its dot products times its integer scales, onto `dots`.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
unsafe fn run<V: Vector, C: Codec256<V>, const R: usize, const BITS: u32>(
    p: *const u8,
    integers: &Scales<V>,
    q: *const i8,
    outer: usize,
    inner: usize,
    dots: &mut [V::I; R],
) {
    let q = q.add(inner * run_bytes(R, BITS));
    sub_block::<V, C, R, BITS>(p, integers, q, (outer, inner, 0), dots);
    if C::SUB_VALUES == 16 {
        sub_block::<V, C, R, BITS>(p, integers, q, (outer, inner, 1), dots);
    }
}

/// The values of a run that share an integer scale.
///
/// # Safety
/// As for [`StripFn`](super::strip::StripFn).
#[inline(always)]
unsafe fn sub_block<V: Vector, C: Codec256<V>, const R: usize, const BITS: u32>(
    p: *const u8,
    integers: &Scales<V>,
    q: *const i8,
    (outer, inner, sub): (usize, usize, usize),
    dots: &mut [V::I; R],
) {
    // The runs of types with four to a dword share too many dwords to keep them all.
    let p = if R > 2 && C::INNER == 4 { forget(p) } else { p };
    let (rows, parts) = together(R, BITS);
    let dwords = C::SUB_VALUES / 4;
    let mut weights = [V::splat(0); 8];
    let index = (outer * C::INNER + inner) * (32 / C::SUB_VALUES) + sub;
    let scale = sub_scale::<V, C>(&integers.scales, index);
    for_each_group!(R, BITS, group => {
        let q = q.add(32 * parts * group + 4 * sub * dwords);
        let mut of_parts: Dots<V> = [V::splat(0); 4];
        for j in 0..dwords {
            if group == 0 {
                weights[j] = C::weights(p, outer, inner, sub * dwords + j);
            }
            for part in 0..parts {
                of_parts[part] = V::dot(of_parts[part], weights[j], q.add(32 * part + 4 * j));
            }
        }
        let of_rows = of_rows::<V, R, BITS>(of_parts);
        for i in 0..rows {
            let r = group * rows + i;
            dots[r] = V::add_i(dots[r], V::mul_i(of_rows[i], scale));
        }
    });
}
