//! The whole model agrees with llama.cpp on the same GGUF.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/models.rs"]
mod models;
#[path = "support/reference.rs"]
mod reference;
#[path = "support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};

use airstream::engine::{Engine, ModelId, ModelOptions, Options, Precision, Row, Spent};
use engine::open;
use reference::Reference;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference")
}

/// The logits after each of `tokens`, row by row.
fn logits(engine: &mut Engine, tokens: &[u32]) -> Vec<f32> {
    let mut all = Vec::with_capacity(tokens.len() * engine.config(ModelId::FIRST).vocab);
    let rows_max = engine.plan(ModelId::FIRST).limits.logits_rows;
    for chunk in tokens.chunks(rows_max) {
        let rows: Vec<Row> = chunk
            .iter()
            .map(|&token| Row {
                session: 0,
                token,
                logits: true,
            })
            .collect();
        engine
            .sweep(ModelId::FIRST, &rows, &mut Spent::default())
            .expect("a sweep");
        for index in 0..chunk.len() {
            all.extend_from_slice(engine.logits(ModelId::FIRST, index));
        }
    }
    all
}

/// The logits of a real model after the reference's tokens.
fn real_logits(model: &Path, activations: Precision, tokens: &[u32]) -> Vec<f32> {
    let options = Options {
        model: ModelOptions {
            context: Some(512),
            logits_rows: 32,
            activations,
            ..ModelOptions::default()
        },
        threads: Some(2),
        ..Options::default()
    };
    logits(&mut open(model, &options), tokens)
}

/// Against llama.cpp computing with the same weights and unrounded activations. Its default run rounds activations to
/// 8 bits and is itself 100 times further from that than we may be (`tests/reference.rs` shows it).
fn check_real(model: &Path, name: &str) {
    let exact = Reference::read(&fixtures().join(format!("{name}-exact.ref")));
    let ours = real_logits(model, Precision::Bits12, &exact.tokens());
    let found = exact.agreement(&ours);
    println!("{name}: {found:?}");
    assert!(exact.positions.len() >= 256);
    assert!(found.kl_mean <= 1e-4 && found.kl_max <= 1e-2, "{found:?}");
    // Some of Gemma's positions are near ties: any change of rounding moves this by a percent either way (98.3%
    // to 99.7% for largest integers from 1700 to 1785, at the same divergence). A miss is a reason to look.
    assert!(found.top1 >= 0.99, "{found:?}");
    assert!(
        (found.perplexity / found.reference_perplexity - 1.0).abs() <= 0.003,
        "{found:?}"
    );

    // Its default run is as far from us as it is from the exact one, and predicts the text as well.
    let default = Reference::read(&fixtures().join(format!("{name}-default.ref")));
    let found = default.agreement(&ours);
    println!("{name}, default: {found:?}");
    assert!(found.kl_mean <= 0.01 && found.top1 >= 0.95, "{found:?}");
    assert!(
        (found.perplexity / found.reference_perplexity - 1.0).abs() <= 0.003,
        "{found:?}"
    );
}

/// With activations of 8 bits we are as far from exact ones as llama.cpp is, which rounds them so.
fn check_real_at_8_bits(model: &Path, name: &str, theirs: f64) {
    let exact = Reference::read(&fixtures().join(format!("{name}-exact.ref")));
    let ours = real_logits(model, Precision::Bits8, &exact.tokens());
    let found = exact.agreement(&ours);
    println!("{name}, 8 bits: {found:?}");
    assert!(
        (0.5 * theirs..1.5 * theirs).contains(&found.kl_mean) && found.top1 >= 0.92,
        "{found:?}"
    );
}

#[test]
fn smollm2_agrees() {
    if let Some(model) = models::smollm2() {
        check_real(&model, "smollm2-135m");
        check_real_at_8_bits(&model, "smollm2-135m", 0.003);
    }
}

#[test]
fn gemma3_agrees() {
    if let Some(model) = models::gemma3() {
        check_real(&model, "gemma3-270m");
        check_real_at_8_bits(&model, "gemma3-270m", 0.0065);
    }
}

#[test]
fn every_architecture_and_weight_type_agrees() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, spec) in support::synth::all_specs() {
        let path = folder.path().join(format!("{name}.gguf"));
        support::synth::write(&spec, &path).expect("a small model");
        let options = Options {
            model: ModelOptions {
                context: Some(64),
                logits_rows: 16,
                ..ModelOptions::default()
            },
            threads: Some(2),
            ..Options::default()
        };
        let mut engine = open(&path, &options);
        let ours = logits(&mut engine, &reference::synthetic_tokens(spec.vocab));
        let theirs = reference::synthetic_logits(&fixtures().join("synthetic"), &name, spec.vocab);
        let vocab = spec.vocab as usize;
        let rows = ours.chunks_exact(vocab).zip(theirs.chunks_exact(vocab));
        let kl: f64 = rows
            .map(|(o, t)| reference::kl_of_logits(t, o))
            .sum::<f64>()
            / (ours.len() / vocab) as f64;
        println!("{name}: KL {kl:.2e}");
        assert!(kl <= 5e-5, "{name}: KL {kl:.2e}");
    }
}
