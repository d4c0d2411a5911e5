//! How finely activations are rounded, and the bytes that their integers stand in.
//!
//! Machines multiply bytes. An integer of 8 bits is one; one of 12 bits is cut into parts.
//!
//! # Three dot products of bytes for two rows of 12 bits
//!
//! A single row has two parts: `q = 16 coarse + fine`. But the fine part wastes half of its byte, and two
//! rows can share it. Let `a` and `b` be the integers of two neighbouring rows. As 16 and 15 have no
//! common factor, there is one `z` of 240 (-120..=120) that leaves the same rest as `a` when divided by
//! 16, and the same as `b` when divided by 15 (the Chinese remainder theorem). So
//!
//! ```text
//! a = 16 x + z        b = 15 y + z        x, y and z within a byte
//! ```
//!
//! and three dot products of bytes make the exact dot products of both rows, where coarse and fine
//! parts take four. A row's integers, and so its results, do not depend on the rows beside it.

use serde::Deserialize;
use std::fmt;
use std::str::FromStr;

/// Bits of the integers that activations are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "u8")]
pub enum Precision {
    /// As ggml rounds them: batches take two thirds of the byte products, and a small model's distribution
    /// moves by a KL divergence of 0.003 to 0.007, by another amount for each order of summation.
    Bits8,
    /// 1/200 of that divergence.
    #[default]
    Bits12,
}

/// [`Precision::Bits8`] to a kernel that is compiled for it.
pub(super) const BITS_8: u32 = Precision::Bits8.bits();
/// [`Precision::Bits12`] to a kernel that is compiled for it.
pub(super) const BITS_12: u32 = Precision::Bits12.bits();

impl Precision {
    /// Every precision.
    pub const ALL: [Precision; 2] = [Precision::Bits8, Precision::Bits12];

    /// How many bits.
    pub const fn bits(self) -> u32 {
        match self {
            Precision::Bits8 => 8,
            Precision::Bits12 => 12,
        }
    }

    /// Products of bytes that a weight takes for a row of a batch.
    pub fn products(self) -> f64 {
        parts(2, self.bits()) as f64 / 2.0
    }
}

impl TryFrom<u8> for Precision {
    type Error = &'static str;

    fn try_from(bits: u8) -> Result<Precision, &'static str> {
        match bits {
            8 => Ok(Precision::Bits8),
            12 => Ok(Precision::Bits12),
            _ => Err("activations are rounded to 8 or 12 bits"),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bits().fmt(f)
    }
}

impl FromStr for Precision {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Precision, &'static str> {
        text.parse::<u8>().unwrap_or(0).try_into()
    }
}

/// A single row's integer of 12 bits is `coarse << FINE_BITS` plus a fine part; so is the first one's of
/// two rows `x << FINE_BITS` plus `z`.
pub(super) const FINE_BITS: u32 = 4;
/// The second row's integer of two is `SECOND * y + z`.
pub(super) const SECOND: i32 = (1 << FINE_BITS) - 1;

/// The largest magnitude of an activation's integer. Of 12 bits, `y` fits a byte up to
/// 15 * 127 - 120 = 1785, and a whole block of 256 still sums up exactly in 32 bits: 256 values of Q6_K,
/// 32 x 128 x 1768 each, are the most there can be. (CUDA's kernels have the same number.)
pub(super) const fn q_max(bits: u32) -> f32 {
    if bits == BITS_8 { 127.0 } else { 1768.0 }
}

/// Rows that share their parts, and parts that they have, in a panel of `rows` rows: (groups of rows,
/// parts of a group).
pub(super) const fn shape(rows: usize, bits: u32) -> (usize, usize) {
    match (bits, rows) {
        (BITS_8, _) => (rows, 1),
        (_, 1) => (1, 2),
        _ => (rows / 2, 3),
    }
}

/// Parts of all rows of a panel.
pub(super) const fn parts(rows: usize, bits: u32) -> usize {
    let (groups, parts_each) = shape(rows, bits);
    groups * parts_each
}
