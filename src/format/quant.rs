//! Weight types: block sizes, byte layouts, and the plain decoding of a row.
//!
//! The layouts are ggml's (`ggml-common.h`, the GGUF specification). A row is a sequence of quant
//! blocks; everything in a block is little-endian, `f16` is IEEE binary16. Where a field packs
//! several values into a byte, bit 0 is the lowest. [`dequantize_row`] is the oracle of every kernel
//! that computes on quant blocks: its products and sums are rounded in the order that ggml rounds
//! them, so the two agree bit for bit.

use half::{bf16, f16};

/// How the values of a weight tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, missing_docs)] // ggml's own names.
pub enum QuantType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl QuantType {
    /// Every type the loader knows.
    pub const ALL: [QuantType; 13] = [
        QuantType::F32,
        QuantType::F16,
        QuantType::BF16,
        QuantType::Q4_0,
        QuantType::Q4_1,
        QuantType::Q5_0,
        QuantType::Q5_1,
        QuantType::Q8_0,
        QuantType::Q2_K,
        QuantType::Q3_K,
        QuantType::Q4_K,
        QuantType::Q5_K,
        QuantType::Q6_K,
    ];

    /// The type's number in a GGUF file (`ggml_type`), its name, values per quant block, bytes per quant block.
    const fn facts(self) -> (u32, &'static str, usize, usize) {
        match self {
            QuantType::F32 => (0, "F32", 1, 4),
            QuantType::F16 => (1, "F16", 1, 2),
            QuantType::BF16 => (30, "BF16", 1, 2),
            QuantType::Q4_0 => (2, "Q4_0", 32, 18),
            QuantType::Q4_1 => (3, "Q4_1", 32, 20),
            QuantType::Q5_0 => (6, "Q5_0", 32, 22),
            QuantType::Q5_1 => (7, "Q5_1", 32, 24),
            QuantType::Q8_0 => (8, "Q8_0", 32, 34),
            QuantType::Q2_K => (10, "Q2_K", 256, 84),
            QuantType::Q3_K => (11, "Q3_K", 256, 110),
            QuantType::Q4_K => (12, "Q4_K", 256, 144),
            QuantType::Q5_K => (13, "Q5_K", 256, 176),
            QuantType::Q6_K => (14, "Q6_K", 256, 210),
        }
    }

    /// The type with number `ggml_type` in a GGUF file, if it is one of ours.
    pub fn from_ggml(ggml_type: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.facts().0 == ggml_type)
    }

    /// The type's number in a GGUF file.
    pub const fn ggml_type(self) -> u32 {
        self.facts().0
    }

    /// ggml's name of the type.
    pub const fn name(self) -> &'static str {
        self.facts().1
    }

    /// Values in one quant block; a row is a whole number of blocks.
    pub const fn block_values(self) -> usize {
        self.facts().2
    }

    /// Bytes of one quant block.
    pub const fn block_bytes(self) -> usize {
        self.facts().3
    }

    /// Bytes of a row of `cols` values (`cols` is a multiple of the block's).
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_values() * self.block_bytes()
    }
}

/// Decodes one row, or several that follow each other: `src` is whole quant blocks of `qtype`, `dst`
/// gets their values.
///
/// # Panics
/// If `src` is not exactly the blocks of `dst.len()` values: the shapes were checked at load.
pub fn dequantize_row(qtype: QuantType, src: &[u8], dst: &mut [f32]) {
    assert!(
        dst.len().is_multiple_of(qtype.block_values()),
        "a row is whole quant blocks"
    );
    assert_eq!(
        src.len(),
        qtype.row_bytes(dst.len()),
        "as many blocks as values"
    );
    let decode: fn(&[u8], &mut [f32]) = match qtype {
        QuantType::F32 => |b, y| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        QuantType::F16 => |b, y| y[0] = half_at(b, 0),
        QuantType::BF16 => |b, y| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        QuantType::Q4_0 => q4_0,
        QuantType::Q4_1 => q4_1,
        QuantType::Q5_0 => q5_0,
        QuantType::Q5_1 => q5_1,
        QuantType::Q8_0 => q8_0,
        QuantType::Q2_K => q2_k,
        QuantType::Q3_K => q3_k,
        QuantType::Q4_K => q4_k,
        QuantType::Q5_K => q5_k,
        QuantType::Q6_K => q6_k,
    };
    let blocks = src.chunks_exact(qtype.block_bytes());
    for (block, values) in blocks.zip(dst.chunks_exact_mut(qtype.block_values())) {
        decode(block, values);
    }
}

/// The f16 at byte `at` of a block.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Value `i` of 32 nibbles in 16 bytes: the low nibbles are the first 16 values, the high ones the rest.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    if i < 16 {
        bytes[i] & 15
    } else {
        bytes[i - 16] >> 4
    }
}

/// Bit `i` of 32 bits in 4 bytes.
fn bit(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 8] >> (i % 8) & 1
}

/// Q4_0, 18 bytes for 32 values: `d: f16` at 0, nibbles at 2. Value = (q - 8) d.
fn q4_0(block: &[u8], y: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, y) in y.iter_mut().enumerate() {
        *y = (f32::from(nibble(&block[2..], i)) - 8.0) * d;
    }
}

/// Q4_1, 20 bytes for 32 values: `d: f16` at 0, `m: f16` at 2, nibbles at 4. Value = q d + m.
fn q4_1(block: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, y) in y.iter_mut().enumerate() {
        *y = f32::from(nibble(&block[4..], i)) * d + m;
    }
}

/// Q5_0, 22 bytes for 32 values: `d: f16` at 0, the values' fifth bits at 2 (32 bits), nibbles at 6.
/// Value = (q - 16) d.
fn q5_0(block: &[u8], y: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, y) in y.iter_mut().enumerate() {
        let q = nibble(&block[6..], i) | bit(&block[2..6], i) << 4;
        *y = (f32::from(q) - 16.0) * d;
    }
}

/// Q5_1, 24 bytes for 32 values: `d: f16` at 0, `m: f16` at 2, the fifth bits at 4, nibbles at 8.
/// Value = q d + m.
fn q5_1(block: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, y) in y.iter_mut().enumerate() {
        let q = nibble(&block[8..], i) | bit(&block[4..8], i) << 4;
        *y = f32::from(q) * d + m;
    }
}

/// Q8_0, 34 bytes for 32 values: `d: f16` at 0, 32 x i8 at 2. Value = q d.
fn q8_0(block: &[u8], y: &mut [f32]) {
    let d = half_at(block, 0);
    for (y, &q) in y.iter_mut().zip(&block[2..]) {
        *y = f32::from(q as i8) * d;
    }
}

// The K types have 256 values in a block, in 8 groups of 32 (`i / 32`) and, for 2, 3 and 6 bits, in
// 16 subgroups of 16 (`i / 16`), each with a scale of its own. `i % 32` is called the lane.

/// Value `i` of 256 values of 2 bits in 64 bytes: the first 32 bytes hold the groups 0 to 3, one in
/// each pair of bits from the lowest on, the other 32 bytes the groups 4 to 7.
fn two_bits(bytes: &[u8], i: usize) -> u8 {
    let (half, group, lane) = (i / 128, i / 32 % 4, i % 32);
    bytes[32 * half + lane] >> (2 * group) & 3
}

/// Value `i` of 256 nibbles in 128 bytes: each 32 bytes hold two groups, first the low nibbles.
fn four_bits(bytes: &[u8], i: usize) -> u8 {
    let (group, lane) = (i / 32, i % 32);
    bytes[32 * (group / 2) + lane] >> (4 * (group % 2)) & 15
}

/// Q2_K, 84 bytes: at 0 a byte for each subgroup (low nibble the scale `s`, high nibble the minimum
/// `m`), at 16 the values' 2 bits, at 80 `d: f16`, at 82 `dmin: f16`. Value = (d s) q - dmin m.
fn q2_k(block: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (i, y) in y.iter_mut().enumerate() {
        let scale = block[i / 16];
        let q = two_bits(&block[16..80], i);
        *y = d * f32::from(scale & 15) * f32::from(q) - dmin * f32::from(scale >> 4);
    }
}

/// Q3_K, 110 bytes: at 0 the values' third bits (byte = lane, bit = group; a clear bit subtracts 4),
/// at 32 the low 2 bits, at 96 the 16 scales of 6 bits, at 108 `d: f16`.
/// Value = (d (s - 32)) q with q from -4 to 3.
///
/// The scales' low nibbles are 16 nibbles in 8 bytes (first the low ones), their high 2 bits are in
/// the next 4 bytes: scale `j` has the bits `2 (j / 4)` of byte `j % 4`.
fn q3_k(block: &[u8], y: &mut [f32]) {
    let d = half_at(block, 108);
    let scales = &block[96..108];
    for (i, y) in y.iter_mut().enumerate() {
        let (j, group, lane) = (i / 16, i / 32, i % 32);
        let low = if j < 8 {
            scales[j] & 15
        } else {
            scales[j - 8] >> 4
        };
        let high = scales[8 + j % 4] >> (2 * (j / 4)) & 3;
        let scale = f32::from(low | high << 4) - 32.0;
        let third = block[lane] >> group & 1;
        let q = f32::from(two_bits(&block[32..96], i) | third << 2) - 4.0;
        *y = d * scale * q;
    }
}

/// Scale and minimum of group `j` of Q4_K and Q5_K: 8 + 8 values of 6 bits in 12 bytes.
///
/// The bytes 0 to 3 have the scales 0 to 3 in their low 6 bits, the bytes 4 to 7 the minimums 0 to 3.
/// The bytes 8 to 11 have the low nibbles of the scales 4 to 7 (low) and of the minimums 4 to 7
/// (high), whose high 2 bits fill the high bits of the bytes 0 to 3 and 4 to 7.
fn scale_and_min(scales: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let low = scales[j + 4];
        (
            low & 15 | scales[j - 4] >> 6 << 4,
            low >> 4 | scales[j] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

/// Q4_K, 144 bytes: `d: f16` at 0, `dmin: f16` at 2, scales and minimums of the 8 groups at 4 (see
/// [`scale_and_min`]), the values' nibbles at 16. Value = (d s) q - dmin m.
fn q4_k(block: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, y) in y.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], i / 32);
        let q = four_bits(&block[16..], i);
        *y = d * scale * f32::from(q) - dmin * min;
    }
}

/// Q5_K, 176 bytes: as Q4_K, but at 16 the values' fifth bits (byte = lane, bit = group) and at 48
/// the nibbles.
fn q5_k(block: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, y) in y.iter_mut().enumerate() {
        let (group, lane) = (i / 32, i % 32);
        let (scale, min) = scale_and_min(&block[4..16], group);
        let fifth = block[16 + lane] >> group & 1;
        let q = four_bits(&block[48..], i) | fifth << 4;
        *y = d * scale * f32::from(q) - dmin * min;
    }
}

/// Q6_K, 210 bytes: low nibbles at 0, high 2 bits at 128, an i8 scale for each of the 16 subgroups at
/// 192, `d: f16` at 208. Value = (d s) (q - 32).
///
/// Each 64 bytes of nibbles hold four groups: the low nibbles of the first 32 bytes, of the other 32,
/// then the high nibbles of the first 32, of the other 32.
fn q6_k(block: &[u8], y: &mut [f32]) {
    let d = half_at(block, 208);
    for (i, y) in y.iter_mut().enumerate() {
        let (half, group, lane) = (i / 128, i / 32 % 4, i % 32);
        let low = block[64 * half + 32 * (group % 2) + lane] >> (4 * (group / 2)) & 15;
        let q = low | two_bits(&block[128..192], i) << 4;
        let scale = f32::from(block[192 + i / 16] as i8);
        *y = d * scale * (f32::from(q) - 32.0);
    }
}
