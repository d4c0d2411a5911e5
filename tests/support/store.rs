//! What tests of the store share: a file whose bytes tell where they are from, matrices in it, slots for them.

use airstream::arena::{Reservation, Slots};
use airstream::format::quant::QuantType;
use airstream::format::tile::{Matrix, Use};

/// The byte at `offset` of the simulated file.
pub fn byte_at(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

/// Q4_0 matrices `m0`, `m1` and so on, of uneven sizes, that begin anywhere.
pub fn matrices(count: usize, rows: &[usize], cols: usize) -> Vec<Matrix> {
    let mut offset = 4096 + 32;
    (0..count)
        .map(|i| {
            let matrix = Matrix {
                name: format!("m{i}"),
                qtype: QuantType::Q4_0,
                rows: rows[i % rows.len()],
                cols,
                file: 0,
                offset,
                used: Use::EverySweep,
            };
            offset += matrix.bytes() + 32 * (i as u64 % 3);
            matrix
        })
        .collect()
}

/// An arena of nothing but slots.
pub fn slots(count: usize, slot_bytes: usize) -> Slots {
    let slots = Reservation::new(count * slot_bytes)
        .expect("a small arena")
        .seal(slot_bytes);
    assert_eq!(slots.count() as usize, count);
    slots
}
