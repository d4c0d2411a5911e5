//! Weight types with blocks of 32 values and one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//!
//! Layouts: ggml's `block_q4_0` and so on, each packed over 16 rows (`pack`):
//! 16 f16 where the block has an odd half, then each dword of 16 rows.
#![allow(unsafe_code)]
// Kernels are unsafe through and through, each for the one reason given at `Codec32`.
#![allow(unsafe_op_in_unsafe_fn)]

use super::vector::Vector;

/// How to read a packed block of 32 values x 16 rows.
///
/// All methods: `p` points at a packed block, and the caller is compiled for `V`.
pub(super) trait Codec32<V: Vector> {
    /// Bytes of a packed block.
    const BYTES: usize;
    /// What the weights returned by `weights` are too large by; a power of two, or 0.
    const OFFSET: i32;
    /// Whether the type has a minimum that is added to every value.
    const MIN: bool;

    /// Values 4j..4j+4 and 16+4j..16+4j+4 of each row, as bytes of 0..=127 plus `OFFSET`; j < 4.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn weights(p: *const u8, j: usize) -> (V::I, V::I);
    /// The scale of each row.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn scale(p: *const u8) -> V::F;
    /// The minimum of each row, where `MIN`.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn min(_p: *const u8) -> V::F {
        V::splat_f(0.0)
    }
    /// The dot product for these weights.
    ///
    /// # Safety
    /// As the trait says.
    #[inline(always)]
    unsafe fn dot(acc: V::I, weights: V::I, a: *const i8) -> V::I {
        V::dot(acc, weights, a)
    }
}

/// The low and high nibbles of dword `j` at `p`.
///
/// # Safety
/// As for [`Codec32`].
#[inline(always)]
unsafe fn nibbles<V: Vector>(p: *const u8, j: usize) -> (V::I, V::I) {
    let x = V::load(p.add(64 * j));
    (
        V::and(x, V::splat(0x0f0f_0f0f)),
        V::field(x, 4, 0x0f0f_0f0f),
    )
}

/// The nibbles of dword `j` at `p`, with their fifth bits from the dword at `high`, in which they stand
/// as `pack` has put them: those of the low nibbles in bits j of the bytes, of the high ones in bits 4 + j.
///
/// # Safety
/// As for [`Codec32`].
#[inline(always)]
unsafe fn five_bits<V: Vector>(p: *const u8, high: *const u8, j: usize) -> (V::I, V::I) {
    let (low, up) = nibbles::<V>(p, j);
    let high = V::load(high);
    (
        V::insert(low, V::shl(high, 4 - j as u32), 0x1010_1010),
        V::insert(up, V::shr(high, j as u32), 0x1010_1010),
    )
}

/// d f16; 16 bytes of nibbles, values i and i + 16. Value = (q - 8) d.
pub(super) struct Q4_0;

impl<V: Vector> Codec32<V> for Q4_0 {
    const BYTES: usize = 16 * 18;
    const OFFSET: i32 = 8;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn weights(p: *const u8, j: usize) -> (V::I, V::I) {
        nibbles::<V>(p.add(32), j)
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::load_half(p)
    }
}

/// d, m f16; 16 bytes of nibbles. Value = q d + m.
pub(super) struct Q4_1;

impl<V: Vector> Codec32<V> for Q4_1 {
    const BYTES: usize = 16 * 20;
    const OFFSET: i32 = 0;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn weights(p: *const u8, j: usize) -> (V::I, V::I) {
        nibbles::<V>(p.add(64), j)
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::low_half(V::load(p))
    }
    #[inline(always)]
    unsafe fn min(p: *const u8) -> V::F {
        V::high_half(V::load(p))
    }
}

/// d f16; a dword of fifth bits; 16 bytes of nibbles. Value = (q - 16) d.
pub(super) struct Q5_0;

impl<V: Vector> Codec32<V> for Q5_0 {
    const BYTES: usize = 16 * 22;
    const OFFSET: i32 = 16;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn weights(p: *const u8, j: usize) -> (V::I, V::I) {
        five_bits::<V>(p.add(96), p.add(32), j)
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::load_half(p)
    }
}

/// d, m f16; a dword of fifth bits; 16 bytes of nibbles. Value = q d + m.
pub(super) struct Q5_1;

impl<V: Vector> Codec32<V> for Q5_1 {
    const BYTES: usize = 16 * 24;
    const OFFSET: i32 = 0;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn weights(p: *const u8, j: usize) -> (V::I, V::I) {
        five_bits::<V>(p.add(128), p.add(64), j)
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::low_half(V::load(p))
    }
    #[inline(always)]
    unsafe fn min(p: *const u8) -> V::F {
        V::high_half(V::load(p))
    }
}

/// d f16; 32 signed bytes. Value = q d.
pub(super) struct Q8_0;

impl<V: Vector> Codec32<V> for Q8_0 {
    const BYTES: usize = 16 * 34;
    const OFFSET: i32 = V::SIGNED_OFFSET;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn weights(p: *const u8, j: usize) -> (V::I, V::I) {
        (
            V::signed(V::load(p.add(32 + 64 * j))),
            V::signed(V::load(p.add(32 + 64 * (j + 4)))),
        )
    }
    #[inline(always)]
    unsafe fn scale(p: *const u8) -> V::F {
        V::load_half(p)
    }
    #[inline(always)]
    unsafe fn dot(acc: V::I, weights: V::I, a: *const i8) -> V::I {
        V::dot_signed(acc, weights, a)
    }
}
