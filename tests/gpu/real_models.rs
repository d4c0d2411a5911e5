//! Real models on the GPU: llama.cpp's logits, the CPU's tokens, whatever streams.

use std::path::Path;

use airstream::engine::{Engine, ModelId, ModelOptions, Options, Spent};

use crate::agreement::{assert_agrees, logits, tokens_of};
use crate::checks::{Gpu, SPLIT, assert_same, on_cpu, on_gpu};
use crate::greedy::{argmax, greedy};
use crate::{gpu, models, say};

/// Tokens of a prompt, and greedy ones after it.
const PROMPT: usize = 16;
const TOKENS: usize = 256;
/// Behind a split a sum is rounded otherwise: as close may two logits be of which the other is the larger one then.
const TIE: f32 = 0.1;

fn options() -> Options {
    Options {
        model: ModelOptions {
            context: Some(512),
            logits_rows: 32,
            ..ModelOptions::default()
        },
        ..Options::default()
    }
}

/// Logits after a text agree with llama.cpp's, and are the CPU's within a split.
fn agrees(model: &Path, name: &str, gpu: &Gpu) {
    let tokens = tokens_of(name);
    let got = logits(&mut on_gpu(model, &options(), gpu), &tokens);
    let expected = logits(&mut on_cpu(model, &options()), &tokens[..SPLIT]);
    assert_same(&got[..expected.len()], &expected, "a text");
    assert_agrees(name, &got);
}

/// The logits after each of so many greedy tokens on the CPU, or after the same tokens.
fn follow(engine: &mut Engine, prompt: &[u32], tokens: Option<&[u32]>) -> (Vec<u32>, Vec<f32>) {
    let (mut spent, mut all, mut said) = (Spent::default(), Vec::new(), Vec::new());
    engine
        .prefill(ModelId::FIRST, 0, prompt, &mut spent, |_| true)
        .unwrap_or_else(|e| panic!("{e}"));
    for i in 0..TOKENS {
        let logits = engine.logits(ModelId::FIRST, 0);
        all.extend_from_slice(logits);
        let token = tokens.map_or_else(|| argmax(logits), |tokens| tokens[i]);
        said.push(token);
        engine
            .decode(ModelId::FIRST, 0, token, &mut spent)
            .unwrap_or_else(|e| panic!("{e}"));
    }
    (said, all)
}

/// Greedy tokens are the CPU's, but for ties in rounding behind a split.
fn greedy_tokens_are_the_cpus(model: &Path, name: &str, gpu: &Gpu) {
    let prompt = &tokens_of(name)[..PROMPT];
    let (tokens, expected) = follow(&mut on_cpu(model, &options()), prompt, None);
    let (_, got) = follow(&mut on_gpu(model, &options(), gpu), prompt, Some(&tokens));
    let vocab = expected.len() / TOKENS;
    let same = (SPLIT - PROMPT + 1) * vocab;
    assert_same(&got[..same], &expected[..same], "tokens");
    let mut ties = 0;
    let rows = got.chunks(vocab).zip(expected.chunks(vocab));
    for (i, (got, expected)) in rows.enumerate() {
        let (chosen, best) = (argmax(got), tokens[i]);
        let apart = expected[best as usize] - expected[chosen as usize];
        assert!(
            apart <= TIE,
            "token {i} is {chosen} instead of {best}, by {apart}"
        );
        ties += u32::from(chosen != best);
    }
    say(&format!(
        "{name}: {TOKENS} greedy tokens, {ties} ties among them decided otherwise"
    ));
}

/// In 40% and 70% of the GPU's memory that the weights take, with much and with little memory beside it, tokens stay.
fn streams(model: &Path, name: &str, gpu: &Gpu) {
    if gpu.facts().integrated {
        return say("SKIPPED: this GPU has no memory of its own");
    }
    let prompt = &tokens_of(name)[..PROMPT];
    let expected = greedy(&mut on_gpu(model, &options(), gpu), prompt, 64);
    let bytes = model.metadata().expect("it is there").len();
    for percent in [40, 70] {
        for memory in [None, Some(bytes * 6 / 10)] {
            let options = Options {
                gpu_memory: Some(bytes * percent / 100),
                memory,
                ..options()
            };
            let what = format!("{name} in {percent}% of the GPU's memory and {memory:?} beside it");
            let engine = &mut on_gpu(model, &options, gpu);
            assert_eq!(greedy(engine, prompt, 64), expected, "{what}");
            let mut spent = Spent::default();
            engine
                .decode(ModelId::FIRST, 0, expected[63], &mut spent)
                .expect("a sweep");
            say(&format!(
                "{what}: {} bytes copied and {} read per token",
                spent.copied_bytes, spent.read_bytes
            ));
            assert!(spent.copied_bytes > 0, "{what}: nothing was copied");
            assert_eq!(spent.read_bytes > 0, memory.is_some(), "{what}: reads");
        }
    }
}

#[test]
fn smollm2_agrees_with_llama_cpp_and_the_cpu() {
    let Some((gpu, _alone)) = gpu() else { return };
    let Some(model) = models::smollm2() else {
        return;
    };
    agrees(&model, "smollm2-135m", &gpu);
    greedy_tokens_are_the_cpus(&model, "smollm2-135m", &gpu);
}

#[test]
fn smollm2_streams() {
    let Some((gpu, _alone)) = gpu() else { return };
    let Some(model) = models::smollm2() else {
        return;
    };
    streams(&model, "smollm2-135m", &gpu);
}

#[test]
fn gemma3_agrees_with_llama_cpp_and_the_cpu() {
    let Some((gpu, _alone)) = gpu() else { return };
    let Some(model) = models::gemma3() else {
        return;
    };
    agrees(&model, "gemma3-270m", &gpu);
    greedy_tokens_are_the_cpus(&model, "gemma3-270m", &gpu);
}

#[test]
fn gemma3_streams() {
    let Some((gpu, _alone)) = gpu() else { return };
    let Some(model) = models::gemma3() else {
        return;
    };
    streams(&model, "gemma3-270m", &gpu);
}
