//! Token ids against llama.cpp's, on the real vocabularies.
//!
//! `tests/reference/tokens.py` made the fixtures.

#[path = "support/models.rs"]
mod models;

use airstream::format::gguf::Gguf;
use airstream::text::{Parts, TokenKind, Tokenizer};
use serde::Deserialize;
use std::path::Path;

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
    if let Some(model) = models::smollm2() {
        check(
            &model,
            include_str!("fixtures/tokenizer/smollm2.json"),
            3 << 20,
        );
    }
}

#[test]
fn gemma3_has_llama_cpps_ids() {
    if let Some(model) = models::gemma3() {
        check(
            &model,
            include_str!("fixtures/tokenizer/gemma3.json"),
            8 << 20,
        );
    }
}

#[derive(Deserialize)]
struct PreFixture {
    pre: Vec<String>,
    texts: Vec<PreCase>,
}

#[derive(Deserialize)]
struct PreCase {
    text: String,
    /// The ids by each pre-tokenizer.
    ids: Vec<Vec<u32>>,
}

/// SmolLM2's vocabulary under other pre-tokenizers.
#[test]
fn pre_tokenizers_cut_like_llama_cpps() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let gguf = Gguf::open(&model).unwrap();
    let array = |key: &str| gguf.array(key).unwrap().unwrap();
    let fixture: PreFixture =
        serde_json::from_str(include_str!("fixtures/tokenizer/pretokenizers.json")).unwrap();
    let mut wrong = 0;
    for (at, pre) in fixture.pre.iter().enumerate() {
        let tokenizer = Tokenizer::from_parts(Parts {
            model: "gpt2",
            pre,
            tokens: array("tokenizer.ggml.tokens").strings().unwrap(),
            merges: array("tokenizer.ggml.merges").strings().unwrap(),
            scores: Box::default(),
            kinds: array("tokenizer.ggml.token_type")
                .u32s()
                .unwrap()
                .map(TokenKind::from_ggml)
                .collect(),
            bos: Some(1),
            ends: vec![2],
            unknown: None,
            add_bos: None,
            add_space_prefix: None,
        })
        .unwrap();
        for case in &fixture.texts {
            let mut ids = Vec::new();
            tokenizer.encode(&case.text, false, false, &mut ids);
            if ids != case.ids[at] {
                eprintln!(
                    "{pre}: {:?}\n  is   {ids:?}\n  must {:?}",
                    case.text, case.ids[at]
                );
                wrong += 1;
            }
        }
    }
    assert_eq!(wrong, 0);
}
