//! The whole model agrees with llama.cpp on the same GGUF.

#[path = "support/agreement.rs"]
mod agreement;
#[path = "support/engine.rs"]
mod engine;
#[path = "support/models.rs"]
mod models;
#[path = "support/reference.rs"]
mod reference;
#[path = "support/mod.rs"]
mod support;

use std::path::Path;

use agreement::{assert_agrees, assert_synthetic_agrees, exact, logits, tokens_of};
use airstream::engine::{ModelOptions, Options, Precision};
use engine::open;

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

fn check_real(model: &Path, name: &str) {
    let ours = real_logits(model, Precision::Bits12, &tokens_of(name));
    assert_agrees(name, &ours);
}

/// With activations of 8 bits we are as far from exact ones as llama.cpp is, which rounds them so.
fn check_real_at_8_bits(model: &Path, name: &str, theirs: f64) {
    let exact = exact(name);
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
        assert_synthetic_agrees(&name, &spec, folder.path(), open);
    }
}
