//! A small sound GGUF file with something of everything.

use airstream::format::quant::QuantType;

use super::gguf_writer::{GgufWriter, array, string};

/// Every value type, nested arrays, and four tensors of which the last has its bytes at the very end.
pub fn sample() -> GgufWriter {
    let mut file = GgufWriter::new();
    file.str("general.architecture", "llama");
    file.u32("a.u32", 7);
    file.f32("a.f32", 1e-5);
    file.entry("a.u8", 0, &[200]);
    file.entry("a.i8", 1, &(-3i8).to_le_bytes());
    file.entry("a.u16", 2, &60_000u16.to_le_bytes());
    file.entry("a.i16", 3, &(-300i16).to_le_bytes());
    file.entry("a.i32", 5, &70_000i32.to_le_bytes());
    file.entry("a.bool", 7, &[1]);
    file.entry("a.u64", 10, &(1u64 << 40).to_le_bytes());
    file.entry("a.i64", 11, &42i64.to_le_bytes());
    file.entry("a.f64", 12, &0.25f64.to_le_bytes());
    file.entry(
        "a.bytes",
        8,
        &[&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat(),
    );
    let tokens = ["<s>", "", "llo"].map(string).concat();
    file.entry("v.tokens", 9, &array(8, 3, &tokens));
    let types = [1i32, 3, 6].map(i32::to_le_bytes).concat();
    file.entry("v.types", 9, &array(5, 3, &types));
    file.entry("v.negative", 9, &array(5, 1, &(-1i32).to_le_bytes()));
    let scores = [0.0f32, -1.5, 2.0].map(f32::to_le_bytes).concat();
    file.entry("v.scores", 9, &array(6, 3, &scores));
    file.entry("v.bools", 9, &array(7, 2, &[0, 1]));
    file.entry(
        "v.nested",
        9,
        &array(9, 2, &[array(0, 2, &[1, 2]), array(8, 0, &[])].concat()),
    );
    file.tensor("norm", &[8], QuantType::F32, vec![1; 32]);
    file.tensor("cube", &[32, 2, 3], QuantType::Q8_0, vec![2; 6 * 34]);
    file.tensor("wide", &[256, 1], QuantType::Q2_K, vec![3; 84]);
    file.tensor("last", &[64, 2], QuantType::Q4_0, vec![4; 72]);
    file
}
