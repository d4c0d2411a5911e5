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

use airstream::engine::{Engine, Options, Row, Spent};
use engine::open;
use reference::Reference;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference")
}

/// The logits after each of `tokens`, row by row.
fn logits(engine: &mut Engine, tokens: &[u32]) -> Vec<f32> {
    let mut all = Vec::with_capacity(tokens.len() * engine.config().vocab);
    let rows_max = engine.plan().limits.logits_rows;
    for chunk in tokens.chunks(rows_max) {
        let rows: Vec<Row> = chunk
            .iter()
            .map(|&token| Row {
                session: 0,
                token,
                logits: true,
            })
            .collect();
        engine.sweep(&rows, &mut Spent::default()).expect("a sweep");
        for index in 0..chunk.len() {
            all.extend_from_slice(engine.logits(index));
        }
    }
    all
}

fn check_real(model: &Path, name: &str) {
    let options = Options {
        context: Some(512),
        logits_rows: 32,
        threads: Some(2),
        ..Options::default()
    };
    for kind in ["exact", "default"] {
        let reference = Reference::read(&fixtures().join(format!("{name}-{kind}.ref")));
        let found = reference.agreement(&logits(&mut open(model, &options), &reference.tokens()));
        println!("{name} {kind}: {found:?}");
    }
}

#[test]
fn smollm2_agrees() {
    if let Some(model) = models::smollm2() {
        check_real(&model, "smollm2-135m");
    }
}

#[test]
fn gemma3_agrees() {
    if let Some(model) = models::gemma3() {
        check_real(&model, "gemma3-270m");
    }
}

#[test]
fn every_architecture_and_weight_type_agrees() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, spec) in support::synth::all_specs() {
        let path = folder.path().join(format!("{name}.gguf"));
        support::synth::write(&spec, &path).expect("a small model");
        let options = Options {
            context: Some(64),
            logits_rows: 16,
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
    }
}
