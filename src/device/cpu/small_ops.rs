//! The ops between the matrices: norm, sum, gated activation, rotation, cap.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `NormFn`.
#![allow(unsafe_op_in_unsafe_fn)]

use super::vector::{Vector, exp, sum, tanh};

/// 1 / rms(x) over `n` values: (x, n, eps).
pub(super) type NormFn = unsafe fn(*const f32, usize, f32) -> f32;
/// `out = x * factor * weight` over `n` values: (x, factor, weight, out, n). `out` may be `x`.
pub(super) type WeighFn = unsafe fn(*const f32, f32, *const f32, *mut f32, usize);
/// `x += y` over `n` values: (x, y, n).
pub(super) type AddFn = unsafe fn(*mut f32, *const f32, usize);
/// `out = f(gate) * up` over `n` values: (gate, up, out, n).
pub(super) type GateFn = unsafe fn(*const f32, *const f32, *mut f32, usize);
/// `x = f(x, c)` over `n` values: (x, n, c).
pub(super) type UnaryFn = unsafe fn(*mut f32, usize, f32);

/// Up to 16 values, zeros behind them.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
unsafe fn load_some<V: Vector>(x: *const f32, n: usize) -> V::F {
    if n >= 16 {
        return V::load_f(x);
    }
    let mut some = [0.0; 16];
    some.as_mut_ptr().copy_from_nonoverlapping(x, n);
    V::load_f(some.as_ptr())
}

/// Stores up to 16 values.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
unsafe fn store_some<V: Vector>(a: V::F, x: *mut f32, n: usize) {
    if n >= 16 {
        V::store_f(a, x);
    } else {
        x.copy_from_nonoverlapping(super::vector::lanes::<V>(a).as_ptr(), n);
    }
}

/// See [`NormFn`]. The squares are summed in 16 lanes.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
pub(super) unsafe fn norm<V: Vector>(x: *const f32, n: usize, eps: f32) -> f32 {
    let mut squares = V::splat_f(0.0);
    for i in (0..n).step_by(16) {
        let x = load_some::<V>(x.add(i), n - i);
        squares = V::fma(x, x, squares);
    }
    let sum = sum::<V>(squares);
    // Where the sum overflows, all values would become zeros, which look like sound ones: infinity times zero does not.
    1.0 / (sum / n as f32 + eps).sqrt() + 0.0 * sum
}

/// See [`WeighFn`].
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
pub(super) unsafe fn weigh<V: Vector>(
    x: *const f32,
    factor: f32,
    weight: *const f32,
    out: *mut f32,
    n: usize,
) {
    let factor = V::splat_f(factor);
    for i in (0..n).step_by(16) {
        let x = load_some::<V>(x.add(i), n - i);
        let weight = load_some::<V>(weight.add(i), n - i);
        store_some::<V>(V::mul(V::mul(x, factor), weight), out.add(i), n - i);
    }
}

/// `x += y`.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
pub(super) unsafe fn add<V: Vector>(x: *mut f32, y: *const f32, n: usize) {
    for i in (0..n).step_by(16) {
        let (a, b) = (
            load_some::<V>(x.add(i), n - i),
            load_some::<V>(y.add(i), n - i),
        );
        store_some::<V>(V::add(a, b), x.add(i), n - i);
    }
}

/// `out = gate / (1 + e^-gate) * up`.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
pub(super) unsafe fn silu_mul<V: Vector>(
    gate: *const f32,
    up: *const f32,
    out: *mut f32,
    n: usize,
) {
    for i in (0..n).step_by(16) {
        let (a, b) = (
            load_some::<V>(gate.add(i), n - i),
            load_some::<V>(up.add(i), n - i),
        );
        let e = exp::<V>(V::sub(V::splat_f(0.0), a));
        let silu = V::div(a, V::add(V::splat_f(1.0), e));
        store_some::<V>(V::mul(silu, b), out.add(i), n - i);
    }
}

/// `out = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) * up` of the gate `x`.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
pub(super) unsafe fn gelu_tanh_mul<V: Vector>(
    gate: *const f32,
    up: *const f32,
    out: *mut f32,
    n: usize,
) {
    for i in (0..n).step_by(16) {
        let (a, b) = (
            load_some::<V>(gate.add(i), n - i),
            load_some::<V>(up.add(i), n - i),
        );
        let one = V::splat_f(1.0);
        let inner = V::fma(V::mul(a, a), V::splat_f(0.044_715), one);
        let inner = V::mul(V::mul(a, V::splat_f(0.797_884_6)), inner);
        let gelu = V::mul(V::mul(a, V::splat_f(0.5)), V::add(one, tanh::<V>(inner)));
        store_some::<V>(V::mul(gelu, b), out.add(i), n - i);
    }
}

/// `x *= c`.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
pub(super) unsafe fn scale<V: Vector>(x: *mut f32, n: usize, c: f32) {
    for i in (0..n).step_by(16) {
        let a = load_some::<V>(x.add(i), n - i);
        store_some::<V>(V::mul(a, V::splat_f(c)), x.add(i), n - i);
    }
}

/// `x = c tanh(x / c)`.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
pub(super) unsafe fn softcap<V: Vector>(x: *mut f32, n: usize, c: f32) {
    for i in (0..n).step_by(16) {
        let value = load_some::<V>(x.add(i), n - i);
        let a = V::div(value, V::splat_f(c));
        let capped = V::mul(tanh::<V>(a), V::splat_f(c));
        // The cap of what is not finite would look sound.
        let capped = V::fma(value, V::splat_f(0.0), capped);
        store_some::<V>(capped, x.add(i), n - i);
    }
}

/// Rotates the pairs (a, b) of one head: (head, cos, sin, pairs, adjacent or in halves).
pub(super) type RopeFn = unsafe fn(*mut f32, *const f32, *const f32, usize, bool);

/// See [`RopeFn`]. Plain Rust: the compiler vectorises it and keeps every rounding.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
pub(super) unsafe fn rope(x: *mut f32, cos: *const f32, sin: *const f32, n: usize, adjacent: bool) {
    for i in 0..n {
        let (a, b) = if adjacent {
            (x.add(2 * i), x.add(2 * i + 1))
        } else {
            (x.add(i), x.add(n + i))
        };
        let (c, s) = (*cos.add(i), *sin.add(i));
        (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
    }
}

/// Writes one head's key and value of one position as f16: (key, value, head_dim, to the key of
/// dimension 0, to the value).
pub(super) type KvFn = unsafe fn(*const f32, *const f32, usize, *mut u8, *mut u8);

/// See [`KvFn`]. Dimensions of a key are 16 positions apart.
///
/// # Safety
/// As for [`NormFn`].
#[inline(always)]
pub(super) unsafe fn kv_head<V: Vector>(
    k: *const f32,
    v: *const f32,
    head_dim: usize,
    to_k: *mut u8,
    to_v: *mut u8,
) {
    for d in (0..head_dim).step_by(16) {
        V::store_half(V::load_f(v.add(d)), to_v.add(2 * d));
        let mut halves = [0_u16; 16];
        V::store_half(V::load_f(k.add(d)), halves.as_mut_ptr().cast());
        for (i, half) in halves.into_iter().enumerate() {
            to_k.cast::<u16>().add(16 * (d + i)).write_unaligned(half);
        }
    }
}
