//! Synthetic models come to an engine and go under a budget, and what stands against it.

#[path = "support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/synth.rs"]
mod synth;
#[path = "support/weights.rs"]
mod weights;

use std::path::{Path, PathBuf};

use airstream::engine::{Engine, ModelId, ModelOptions, Options, Spent};
use airstream::error::Kind;
use airstream::format::quant::QuantType;
use synth::{Arch, SynthSpec};

const MIB: u64 = 1 << 20;

fn wishes(context: usize) -> ModelOptions {
    ModelOptions {
        context: Some(context),
        rows: Some(8),
        ..ModelOptions::default()
    }
}

fn options(dir: &Path, memory: u64) -> Options {
    Options {
        memory: Some(memory),
        model: wishes(64),
        threads: Some(1),
        cache: Some(dir.to_owned()),
        ..Options::default()
    }
}

/// A model file in the folder.
fn model(dir: &Path, name: &str, change: impl Fn(&mut SynthSpec)) -> PathBuf {
    let path = dir.join(name);
    let mut spec = SynthSpec::new(Arch::Llama, QuantType::Q8_0, 1);
    change(&mut spec);
    synth::write(&spec, &path).expect("a synthetic model");
    path
}

/// One with large pages for its size.
fn with_long_pages(spec: &mut SynthSpec) {
    (spec.layers, spec.kv_heads) = (8, 8);
}

fn decode(engine: &mut Engine, model: ModelId, token: u32) -> Vec<f32> {
    let spent = &mut Spent::default();
    engine.decode(model, 0, token, spent).expect("a sweep");
    engine.logits(model, 0).to_vec()
}

#[test]
fn a_model_goes_whatever_its_conversation_takes() {
    let dir = tempfile::tempdir().expect("a folder");
    let big = model(dir.path(), "big.gguf", with_long_pages);
    let small = model(dir.path(), "small.gguf", |_| ());
    let models = [(big, wishes(1024)), (small, wishes(64))];
    let mut engine = Engine::new(&models, &options(dir.path(), 64 * MIB)).expect("it fits");
    let ids: Vec<ModelId> = engine.models().collect();
    let said = decode(&mut engine, ids[1], 9);
    let tokens: Vec<u32> = (0..900).map(|i| i % 300).collect();
    engine
        .prefill(ids[0], 0, &tokens, &mut Spent::default(), |_| true)
        .expect("its context holds it");
    engine.unload(ids[0]).expect("nothing stands against it");
    let again = decode(&mut engine, ids[1], 9);
    engine.clear(ids[1], 0);
    assert_ne!(said, again, "the conversation of the other one went on");
    assert_eq!(decode(&mut engine, ids[1], 9), said);
}

#[test]
fn a_budget_never_grows_beyond_that_of_the_start() {
    let dir = tempfile::tempdir().expect("a folder");
    let first = model(dir.path(), "a.gguf", |_| ());
    let second = model(dir.path(), "b.gguf", with_long_pages);
    let mut engine = Engine::open(&first, &options(dir.path(), 16 * MIB)).expect("it fits");
    let refused = engine.set_memory(1 << 30).expect_err("more than 16 MiB");
    assert_eq!(refused.kind(), Kind::Budget);
    assert_eq!(
        refused.remedy(),
        "give no more than 16 MiB, or start again with --memory 1024MiB"
    );
    assert_eq!(engine.pool().memory, 16 * MIB);
    let refused = engine.load(&second, &wishes(4096)).expect_err("too large");
    assert!(refused.remedy().contains("MiB"), "{refused}");
    engine.load(&second, &wishes(16)).expect("there is room");
    engine.set_memory(15 * MIB).expect("it is enough");
    engine.set_memory(16 * MIB).expect("as in the beginning");
}

#[test]
fn conversations_go_on_where_their_pages_are() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = model(dir.path(), "a.gguf", with_long_pages);
    let options = Options {
        model: wishes(512),
        ..options(dir.path(), 16 * MIB)
    };
    let open = || Engine::open(&path, &options).expect("it fits");
    let (mut steady, mut changing) = (open(), open());
    let refused = changing.set_memory(1).expect_err("too little").to_string();
    let least = refused.split("at least ").nth(1).expect("the remedy");
    let least: u64 = least.split(' ').next().expect("MiB").parse().expect("MiB");
    let say = |engine: &mut Engine, tokens: &[u32]| {
        let spent = &mut Spent::default();
        let said = engine.prefill(ModelId::FIRST, 0, tokens, spent, |_| true);
        said.expect("a sweep");
        engine.logits(ModelId::FIRST, 0).to_vec()
    };
    for step in 0..60 {
        let mib = [16, least, 12, least + 1][step as usize / 2 % 4].max(least);
        changing.set_memory(mib * MIB).expect("it is enough");
        let tokens: Vec<u32> = (0..8).map(|i| (step * 8 + i) * 31 % 300).collect();
        let expected = say(&mut steady, &tokens);
        assert_eq!(
            say(&mut changing, &tokens),
            expected,
            "step {step}, {mib} MiB"
        );
    }
}
