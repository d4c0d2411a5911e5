//! Random weights from a seed: quant blocks of random bits whose scales are chosen so that the
//! values have a wanted standard deviation.

use airstream::format::quant::QuantType;
use half::{bf16, f16};

/// A splitmix64 generator: the same numbers on every machine.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Evenly spread from `low` to `high`.
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * ((self.next() >> 40) as f32 / (1u64 << 24) as f32)
    }

    /// An integer from 0 to `end` - 1.
    fn below(&mut self, end: u64) -> u8 {
        (self.next() % end) as u8
    }

    /// Roughly normal, mean 0 and deviation 1. A sum rounds alike everywhere, a logarithm may not.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| self.range(-1.0, 1.0)).sum();
        sum * 0.75f32.sqrt()
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// The blocks of `values` weights of type `qtype` with standard deviation `deviation`.
pub fn random_blocks(rng: &mut Rng, qtype: QuantType, values: usize, deviation: f32) -> Vec<u8> {
    let mut out = vec![0; qtype.row_bytes(values)];
    for block in out.chunks_exact_mut(qtype.block_bytes()) {
        fill_block(rng, qtype, block, deviation);
    }
    out
}

/// Writes `value` as f16 at byte `at`.
fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// Fills one block. A scale is the wanted deviation over the deviation of random integers of that
/// many bits (4.61 for 4 bits, 73.9 for 8), times the root mean square of the inner scales.
fn fill_block(rng: &mut Rng, qtype: QuantType, block: &mut [u8], deviation: f32) {
    match qtype {
        QuantType::F32 => block.copy_from_slice(&(rng.normal() * deviation).to_le_bytes()),
        QuantType::F16 => put_half(block, 0, rng.normal() * deviation),
        QuantType::BF16 => {
            block.copy_from_slice(&bf16::from_f32(rng.normal() * deviation).to_le_bytes());
        }
        _ => {
            // Scales differ from block to block, else a mixed-up block would go unnoticed.
            let deviation = deviation * rng.range(0.75, 1.25);
            fill_quant_block(rng, qtype, block, deviation);
        }
    }
}

fn fill_quant_block(rng: &mut Rng, qtype: QuantType, block: &mut [u8], deviation: f32) {
    rng.fill(block);
    let sign = if rng.below(2) == 0 { 1.0 } else { -1.0 };
    match qtype {
        QuantType::Q4_0 => put_half(block, 0, sign * deviation / 4.63),
        QuantType::Q5_0 => put_half(block, 0, sign * deviation / 9.25),
        QuantType::Q8_0 => put_half(block, 0, sign * deviation / 73.9),
        QuantType::Q4_1 => {
            put_half(block, 0, deviation / 4.61);
            put_half(block, 2, -7.5 * deviation / 4.61);
        }
        QuantType::Q5_1 => {
            put_half(block, 0, deviation / 9.23);
            put_half(block, 2, -15.5 * deviation / 9.23);
        }
        QuantType::Q2_K => {
            for byte in &mut block[..16] {
                let scale = 1 + rng.below(15);
                *byte = scale | near(rng, scale, 15) << 4;
            }
            put_half(block, 80, deviation / 10.2);
            put_half(block, 82, 1.5 * deviation / 10.2);
        }
        QuantType::Q3_K => put_half(block, 108, sign * deviation / 43.4),
        QuantType::Q4_K | QuantType::Q5_K => {
            // The middle of the values, which the minimum has to cancel, and their deviation.
            let (middle, spread) = if qtype == QuantType::Q4_K {
                (7.5, 4.61)
            } else {
                (15.5, 9.23)
            };
            let scale = deviation / (36.9 * spread);
            put_half(block, 0, scale);
            put_half(block, 2, middle * scale);
            put_scales_and_mins(rng, &mut block[4..16]);
        }
        QuantType::Q6_K => put_half(block, 208, sign * deviation / (73.9 * 18.5)),
        QuantType::F32 | QuantType::F16 | QuantType::BF16 => unreachable!("not a quant block"),
    }
}

/// A number near `value`, from 0 to `max`: minimums follow the scales, or the mean would drift.
fn near(rng: &mut Rng, value: u8, max: u8) -> u8 {
    (value + rng.below(3)).saturating_sub(1).min(max)
}

/// The packed 8 scales and 8 minimums of Q4_K and Q5_K.
fn put_scales_and_mins(rng: &mut Rng, packed: &mut [u8]) {
    let scales: [u8; 8] = std::array::from_fn(|_| rng.below(64));
    let mins = scales.map(|s| near(rng, s, 63));
    for j in 0..4 {
        packed[j] = scales[j] | scales[j + 4] >> 4 << 6;
        packed[j + 4] = mins[j] | mins[j + 4] >> 4 << 6;
        packed[j + 8] = scales[j + 4] & 15 | (mins[j + 4] & 15) << 4;
    }
}
