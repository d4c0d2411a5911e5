//! The plain decoding of every weight type against the `gguf` Python package, bit for bit.

use airstream::format::quant::{QuantType, dequantize_row};

fn unhex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks_exact(2);
    pairs
        .map(|p| u8::from_str_radix(std::str::from_utf8(p).unwrap(), 16).unwrap())
        .collect()
}

/// `tests/reference/quant_rows.py` makes the fixture.
#[test]
fn dequantized_rows_equal_the_reference() {
    let fixture: serde_json::Value =
        serde_json::from_str(include_str!("fixtures/quant_rows.json")).unwrap();
    for qtype in QuantType::ALL {
        let case = &fixture[qtype.name()];
        let bytes = unhex(case["bytes"].as_str().unwrap());
        let expected: Vec<f32> = unhex(case["values"].as_str().unwrap())
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let mut values = vec![0.0; expected.len()];
        dequantize_row(qtype, &bytes, &mut values);
        for (i, (a, b)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(
                a.to_bits(),
                b.to_bits(),
                "{}: value {i} is {a}, not {b}",
                qtype.name()
            );
        }
    }
}
