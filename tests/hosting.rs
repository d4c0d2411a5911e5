//! Synthetic models come to an engine and go under a budget, and what stands against it.

mod support;

use std::path::{Path, PathBuf};

use airstream::engine::{Engine, Loaded, ModelId, ModelOptions, Opening, Options, Spent};
use airstream::error::Kind;
use airstream::format::quant::QuantType;
use support::gguf_writer::{self, GgufWriter};
use support::synth::{Arch, Mix, SynthSpec, all_specs};

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

/// A small model.
fn spec() -> SynthSpec {
    let found = all_specs()
        .into_iter()
        .find(|(name, _)| name == "llama-q8_0");
    found.expect("there is one").1
}

/// A model file in the folder.
fn model(dir: &Path, name: &str, change: impl Fn(&mut SynthSpec)) -> PathBuf {
    let path = dir.join(name);
    let mut spec = spec();
    change(&mut spec);
    support::synth::write(&spec, &path).expect("a synthetic model");
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

#[test]
fn a_model_is_one_file_whatever_comes_to_its_path() {
    let dir = tempfile::tempdir().expect("a folder");
    let [path, other] = [(1, "a.gguf"), (77, "b.gguf")]
        .map(|(seed, name)| model(dir.path(), name, |spec| spec.seed = seed));
    let first = model(dir.path(), "c.gguf", |spec| spec.seed = 1);
    let mut engine = Engine::open(&first, &options(dir.path(), 16 * MIB)).expect("it fits");
    let expected = decode(&mut engine, ModelId::FIRST, 5);

    let read = Loaded::read(&path).expect("it is sound");
    let opening = Opening::read(&path, &wishes(64)).expect("it is sound");
    std::fs::rename(&other, &path).expect("the same folder");
    let built = engine.reserve(opening).expect("there is room").build();
    let id = engine.admit(built).expect("it is still open");
    assert_eq!(decode(&mut engine, id, 5), expected, "that of a.gguf");
    let refused = Opening::new(read, &wishes(64)).err().expect("another file");
    assert_eq!(refused.remedy(), "load it again");
}

#[test]
fn a_vocabulary_is_no_larger_than_its_embeddings() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a.gguf");
    let mut tokens = [8u32.to_le_bytes().to_vec(), 321u64.to_le_bytes().to_vec()].concat();
    (0..321).for_each(|_| tokens.extend(gguf_writer::string("a")));
    let add = |file: &mut GgufWriter| file.entry("tokenizer.ggml.tokens", 9, &tokens);
    support::synth::write_with(&spec(), &path, add).expect("a model");
    let refused = Loaded::read(&path).err().expect("320 rows");
    assert_eq!(refused.kind(), Kind::Format);
    assert!(refused.what().contains("321 tokens"), "{refused}");
}

#[test]
fn a_vocabulary_may_be_smaller_than_a_strip() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = model(dir.path(), "a.gguf", |spec| {
        (spec.arch, spec.qtype, spec.mix) = (Arch::Qwen3, QuantType::Q2_K, Mix::MoreBits);
        (spec.vocab, spec.embd, spec.layers) = (4, 8192, 1);
        (spec.heads, spec.head_dim, spec.kv_heads) = (2, 128, 1);
        spec.ffn = 256;
    });
    let mut opened = 0;
    for mib in [1, 2, 3, 4, 8, 64] {
        let options = Options {
            model: wishes(16),
            ..options(dir.path(), mib * MIB)
        };
        if let Ok(mut engine) = Engine::open(&path, &options) {
            decode(&mut engine, ModelId::FIRST, 1);
            opened += 1;
        }
    }
    assert!(opened > 1, "slots of several sizes");
}
