//! A second reading of the weight formats, value by value, and the arithmetic
//! that the kernels promise, on plain arrays.

use super::Random;
use crate::device::cpu::Precision;
use crate::format::quant::QuantType;
use half::{bf16, f16};

/// A quant block: value i = d * scales[i / sub] * q[i] - dmin * mins[i / sub].
/// (Q4_1 and Q5_1 have dmin = -1 x their minimum, and mins = 1.)
pub(super) struct Block {
    pub d: f32,
    pub dmin: f32,
    pub q: Vec<i32>,
    pub scales: Vec<i32>,
    pub mins: Vec<i32>,
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Reads one block of a type with integers.
pub(super) fn block(qtype: QuantType, b: &[u8]) -> Block {
    let nibble = |at: usize, i: usize| i32::from(b[at + i % 16] >> (i / 16 * 4)) & 15;
    let bit = |at: usize, i: usize| i32::from(b[at + i / 8] >> (i % 8)) & 1;
    let simple = |d, dmin, q: Vec<i32>| Block {
        d,
        dmin,
        q,
        scales: vec![1],
        mins: vec![1],
    };
    let of_32 = |f: &dyn Fn(usize) -> i32| (0..32).map(f).collect::<Vec<_>>();
    let of_256 = |f: &dyn Fn(usize) -> i32| (0..256).map(f).collect::<Vec<_>>();
    // The 6 bit scale (0..8) or minimum (8..16) number i of Q4_K and Q5_K, 12 bytes at 4.
    let six = |i: usize| {
        let (byte, k) = (|j: usize| i32::from(b[4 + j]), i % 8);
        match (k < 4, i < 8) {
            (true, true) => byte(k) & 63,
            (true, false) => byte(k + 4) & 63,
            (false, true) => (byte(k + 4) & 15) | (byte(k - 4) >> 6 << 4),
            (false, false) => (byte(k + 4) >> 4) | (byte(k) >> 6 << 4),
        }
    };
    match qtype {
        QuantType::Q4_0 => simple(half(b, 0), 0.0, of_32(&|i| nibble(2, i) - 8)),
        QuantType::Q4_1 => simple(half(b, 0), -half(b, 2), of_32(&|i| nibble(4, i))),
        QuantType::Q5_0 => simple(
            half(b, 0),
            0.0,
            of_32(&|i| nibble(6, i) + 16 * bit(2, i) - 16),
        ),
        QuantType::Q5_1 => simple(
            half(b, 0),
            -half(b, 2),
            of_32(&|i| nibble(8, i) + 16 * bit(4, i)),
        ),
        QuantType::Q8_0 => simple(half(b, 0), 0.0, of_32(&|i| i32::from(b[2 + i] as i8))),
        QuantType::Q2_K => Block {
            d: half(b, 80),
            dmin: half(b, 82),
            q: of_256(&|i| i32::from(b[16 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2)) & 3),
            scales: (0..16).map(|i| i32::from(b[i]) & 15).collect(),
            mins: (0..16).map(|i| i32::from(b[i]) >> 4).collect(),
        },
        QuantType::Q3_K => Block {
            d: half(b, 108),
            dmin: 0.0,
            q: of_256(&|i| {
                let low = i32::from(b[32 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2)) & 3;
                let high = i32::from(b[i % 32] >> (i / 32)) & 1;
                low + 4 * high - 4
            }),
            scales: (0..16)
                .map(|i| {
                    let low = i32::from(b[96 + i % 8] >> (i / 8 * 4)) & 15;
                    let high = i32::from(b[104 + i % 4] >> (i / 4 * 2)) & 3;
                    low + 16 * high - 32
                })
                .collect(),
            mins: vec![0; 16],
        },
        QuantType::Q4_K => Block {
            d: half(b, 0),
            dmin: half(b, 2),
            q: of_256(&|i| i32::from(b[16 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4)) & 15),
            scales: (0..8).map(six).collect(),
            mins: (8..16).map(six).collect(),
        },
        QuantType::Q5_K => Block {
            d: half(b, 0),
            dmin: half(b, 2),
            q: of_256(&|i| {
                let low = i32::from(b[48 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4)) & 15;
                low + 16 * (i32::from(b[16 + i % 32] >> (i / 32)) & 1)
            }),
            scales: (0..8).map(six).collect(),
            mins: (8..16).map(six).collect(),
        },
        QuantType::Q6_K => Block {
            d: half(b, 208),
            dmin: 0.0,
            q: of_256(&|i| {
                let (run, l) = (i / 128, i % 128);
                let low = i32::from(b[run * 64 + l % 64] >> (l / 64 * 4)) & 15;
                let high = i32::from(b[128 + run * 32 + l % 32] >> (l / 32 * 2)) & 3;
                low + 16 * high - 32
            }),
            scales: (0..16).map(|i| i32::from(b[192 + i] as i8)).collect(),
            mins: vec![0; 16],
        },
        QuantType::F32 | QuantType::F16 | QuantType::BF16 => unreachable!("has no integers"),
    }
}

/// Float weight number `i` of a row.
fn float(qtype: QuantType, row: &[u8], i: usize) -> f32 {
    match qtype {
        QuantType::F32 => f32::from_le_bytes(row[4 * i..4 * i + 4].try_into().expect("4 bytes")),
        QuantType::F16 => half(row, 2 * i),
        _ => bf16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32(),
    }
}

/// The values of a row, in f64.
pub(super) fn values(qtype: QuantType, row: &[u8]) -> Vec<f64> {
    if qtype.block_values() == 1 {
        return (0..row.len() / qtype.block_bytes())
            .map(|i| f64::from(float(qtype, row, i)))
            .collect();
    }
    let blocks = row
        .chunks_exact(qtype.block_bytes())
        .map(|b| block(qtype, b));
    blocks
        .flat_map(|b| {
            let sub = b.q.len() / b.scales.len();
            (0..b.q.len())
                .map(|i| {
                    let (scale, min) = (f64::from(b.scales[i / sub]), f64::from(b.mins[i / sub]));
                    f64::from(b.d) * scale * f64::from(b.q[i]) - f64::from(b.dmin) * min
                })
                .collect::<Vec<_>>()
        })
        .collect()
}

/// An activation block: integers, the scale for use, and the scaled sum for a minimum.
struct Quantized {
    q: Vec<i32>,
    scale: f32,
    scaled_sum: f32,
}

fn quantize(x: &[f32], precision: Precision) -> Quantized {
    let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let q_max = match precision {
        Precision::Bits8 => 127.0,
        Precision::Bits12 => 1768.0,
    };
    let factor = if largest == 0.0 { 0.0 } else { q_max / largest };
    let q: Vec<i32> = x
        .iter()
        .map(|x| (x * factor).round_ties_even() as i32)
        .collect();
    let scale = largest / q_max;
    let scaled_sum = scale * q.iter().sum::<i32>() as f32;
    Quantized {
        q,
        scale,
        scaled_sum,
    }
}

/// The dot product of a weight row with an activation row, exactly as the kernels promise it.
pub(super) fn dot(qtype: QuantType, row: &[u8], x: &[f32], precision: Precision) -> f32 {
    let mut acc = 0.0_f32;
    if qtype.block_values() == 1 {
        for (i, &x) in x.iter().enumerate() {
            acc = float(qtype, row, i).mul_add(x, acc);
        }
        return acc;
    }
    let blocks = row
        .chunks_exact(qtype.block_bytes())
        .map(|b| block(qtype, b));
    for (weights, x) in blocks.zip(x.chunks_exact(qtype.block_values())) {
        let act = quantize(x, precision);
        let sub = weights.q.len() / weights.scales.len();
        let (mut integer, mut minimum) = (0_i32, 0_i32);
        for i in 0..x.len() {
            integer += weights.scales[i / sub] * weights.q[i] * act.q[i];
            minimum += weights.mins[i / sub] * act.q[i];
        }
        if matches!(qtype, QuantType::Q2_K | QuantType::Q4_K | QuantType::Q5_K) {
            acc = (minimum as f32).mul_add(weights.dmin * -act.scale, acc);
        }
        acc = (integer as f32).mul_add(weights.d * act.scale, acc);
        if matches!(qtype, QuantType::Q4_1 | QuantType::Q5_1) {
            acc = (-weights.dmin).mul_add(act.scaled_sum, acc);
        }
    }
    acc
}

/// Where in a block the f16 scales are.
fn halves(qtype: QuantType) -> &'static [usize] {
    match qtype {
        QuantType::F32 | QuantType::F16 | QuantType::BF16 => &[],
        QuantType::Q4_0 | QuantType::Q5_0 | QuantType::Q8_0 => &[0],
        QuantType::Q4_1 | QuantType::Q5_1 | QuantType::Q4_K | QuantType::Q5_K => &[0, 2],
        QuantType::Q2_K => &[80, 82],
        QuantType::Q3_K => &[108],
        QuantType::Q6_K => &[208],
    }
}

/// What the integers of random weights are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weights {
    /// Any bits.
    Random,
    /// Random, but every scale is zero.
    ZeroScales,
    /// All bits set, the largest finite scales.
    Ones,
    /// No bit set, the largest finite scales.
    Zeros,
    /// Signed bytes at their lowest, the largest finite scales.
    Lowest,
}

/// `rows` rows of `cols` values in GGUF layout.
pub(super) fn weights(
    qtype: QuantType,
    rows: usize,
    cols: usize,
    kind: Weights,
    random: &mut Random,
) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..rows * qtype.row_bytes(cols))
        .map(|_| match kind {
            Weights::Random | Weights::ZeroScales => random.next() as u8,
            Weights::Ones => 0xff,
            Weights::Zeros => 0,
            Weights::Lowest => 0x80,
        })
        .collect();
    for block in bytes.chunks_exact_mut(qtype.block_bytes()) {
        for &at in halves(qtype) {
            let scale = match kind {
                Weights::Random => f16::from_f32(random.float()),
                Weights::ZeroScales => f16::ZERO,
                _ => f16::MAX,
            };
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        // Any bits would give floats that are not finite.
        let value = if kind == Weights::Random {
            random.float()
        } else {
            0.0
        };
        match qtype {
            QuantType::F32 => block.copy_from_slice(&value.to_le_bytes()),
            QuantType::F16 => block.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            QuantType::BF16 => block.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            _ => {}
        }
    }
    bytes
}
