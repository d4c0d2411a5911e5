//! Weight types: block sizes and the plain decoding of a row.
//!
//! The layouts are ggml's (`ggml-common.h`, the GGUF specification).

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
