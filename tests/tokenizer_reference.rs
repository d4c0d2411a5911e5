//! Token ids against llama.cpp's, on the real vocabularies.
//!
//! `tests/reference/tokens.py` made the fixtures.

use airstream::format::gguf::Gguf;
use airstream::text::Tokenizer;
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Fixture {
    vocabulary: usize,
    bos: u32,
    add_bos: bool,
    eog: Vec<u32>,
    texts: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    plain: Vec<u32>,
    special: Vec<u32>,
}

fn model(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        eprintln!("skipped: {variable} does not name the model file");
    }
    path
}

fn check(model: &Path, fixture: &str, table_bytes_max: usize) {
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(model).unwrap()).unwrap();
    let fixture: Fixture = serde_json::from_str(fixture).unwrap();
    assert_eq!(tokenizer.len(), fixture.vocabulary);
    assert_eq!(tokenizer.bos(), Some(fixture.bos));
    assert_eq!(tokenizer.add_bos_default(), fixture.add_bos);
    let eog: Vec<u32> = (0..tokenizer.len() as u32)
        .filter(|&id| tokenizer.is_eog(id))
        .collect();
    assert_eq!(eog, fixture.eog);
    let mut wrong = 0;
    for case in &fixture.texts {
        for (parse_special, expected) in [(false, &case.plain), (true, &case.special)] {
            let mut ids = Vec::new();
            tokenizer.encode(&case.text, false, parse_special, &mut ids);
            if ids != *expected {
                eprintln!(
                    "{:?} (special: {parse_special})\n  is   {ids:?}\n  must {expected:?}",
                    case.text
                );
                wrong += 1;
            }
        }
    }
    assert_eq!(wrong, 0, "of {} texts", fixture.texts.len());
    let table_bytes = tokenizer.table_bytes();
    eprintln!("{}: tables of {table_bytes} bytes", model.display());
    assert!(table_bytes <= table_bytes_max, "{table_bytes}");
}

#[test]
fn smollm2_has_llama_cpps_ids() {
    if let Some(model) = model("AIRSTREAM_TEST_SMOLLM2") {
        check(
            &model,
            include_str!("fixtures/tokenizer/smollm2.json"),
            3 << 20,
        );
    }
}

#[test]
fn gemma3_has_llama_cpps_ids() {
    if let Some(model) = model("AIRSTREAM_TEST_GEMMA3") {
        check(
            &model,
            include_str!("fixtures/tokenizer/gemma3.json"),
            8 << 20,
        );
    }
}
