//! The checksum of weights: the low half of XXH3 (64 bits).
//!
//! Not a defence against forgers, but against disks, cables and files that change. One wrong piece in four billion
//! would go unnoticed.

use twox_hash::XxHash3_64;

/// Stands for a checksum that is not known; [`of`] never gives it.
pub const UNKNOWN: u32 = 0;

/// The checksum of some bytes.
pub fn of(bytes: &[u8]) -> u32 {
    match XxHash3_64::oneshot(bytes) as u32 {
        UNKNOWN => 1,
        sum => sum,
    }
}

/// A tensor that was read as a whole, and what its bytes were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// Which of the model's files holds it, and where.
    pub file: u16,
    /// Where it begins in that file.
    pub offset: u64,
    /// Its checksum.
    pub sum: u32,
}
