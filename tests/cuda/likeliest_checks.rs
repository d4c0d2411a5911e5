//! Answers chosen from the likeliest tokens, which the GPU finds, whatever the driver.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use airstream::engine::request::{Event, Generate, Prompt, Sampling, Tag};
use airstream::engine::scheduler::{Flow, Limits, Scheduler, Step};
use airstream::engine::{Engine, ModelOptions, Options};
use airstream::format::quant::QuantType;

use super::checks::{Gpu, PLENTY, on_cpu, on_gpu};
use crate::support::synth::{Arch, SynthSpec, write};

/// Tokens of the model.
pub const VOCAB: usize = 2100;
/// Tokens of an answer.
const ANSWER: u32 = 6;

/// A model of which the head is the most.
pub fn model(folder: &Path) -> PathBuf {
    let path = folder.join("model.gguf");
    let spec = SynthSpec {
        layers: 1,
        ffn: 64,
        vocab: VOCAB as u32,
        ..SynthSpec::new(Arch::Gemma3, QuantType::Q8_0, 4)
    };
    write(&spec, &path).expect("the folder can be written");
    path
}

/// Options for the model on this GPU. A row is computed for each token, and no draft.
pub fn options(gpu: &Gpu) -> Options {
    let options = super::checks::options(16, 128);
    Options {
        memory: Some(PLENTY),
        gpu_memory: (!gpu.facts().integrated).then_some(PLENTY),
        model: ModelOptions {
            drafts: Some(0),
            ..options.model
        },
        ..options
    }
}

/// Greedy and random ones; the same again with a bias of nothing, for which a sampler needs to see all logits.
fn requests() -> Vec<Generate> {
    let kinds = [
        Sampling::greedy(),
        Sampling {
            seed: Some(3),
            ..Sampling::default()
        },
        Sampling {
            temperature: 1.5,
            top_k: 64,
            top_p: 1.0,
            min_p: 0.0,
            seed: Some(4),
            ..Sampling::default()
        },
    ];
    let request = |(i, sampling): (u32, Sampling)| Generate {
        sampling,
        max_tokens: Some(ANSWER),
        ..Generate::new(Prompt::Tokens(vec![i % 3, 7, 11]))
    };
    let biased = kinds.clone().map(|sampling| Sampling {
        logit_bias: vec![(5, 0.0)],
        ..sampling
    });
    (0..)
        .zip(kinds.into_iter().chain(biased))
        .map(request)
        .collect()
}

/// The tokens of each request, all of them answered at the same time, two by two.
fn answers(engine: Engine, requests: &[Generate]) -> BTreeMap<u32, Vec<u32>> {
    let mut scheduler = Scheduler::new(engine, &[("m", 1)], Limits::default());
    let vocabulary = scheduler.vocabulary(None).expect("the first model");
    for (request, generate) in (0..).zip(requests) {
        let tag = Tag { client: 0, request };
        let prepared = vocabulary.prepare(generate).expect("sound");
        let submitted = scheduler.submit(tag, prepared, Duration::ZERO);
        submitted.expect("there is room");
    }
    let mut answers: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut now = Duration::ZERO;
    let mut done = 0;
    while done < requests.len() {
        now += Duration::from_millis(1);
        let step = scheduler.step(now, &mut |tag, event| {
            match event {
                Event::Token { id, .. } => answers.entry(tag.request).or_default().push(*id),
                Event::Done { .. } => done += 1,
                Event::Error { .. } => panic!("request {} failed", tag.request),
                Event::Accepted { .. } => {}
            }
            Flow::Taken
        });
        assert!(step == Step::Swept || done == requests.len(), "it rests");
    }
    answers
}

/// Answers are the CPU's, and those of all logits. How many tokens were chosen from likely ones, and as many from all
/// logits.
pub fn answers_are_the_cpus(folder: &Path, gpu: &Gpu) -> u64 {
    let (model, requests) = (model(folder), requests());
    let options = options(gpu);
    let expected = answers(on_cpu(&model, &super::checks::options(16, 128)), &requests);
    for (request, tokens) in &expected {
        assert_eq!(tokens.len() as u32, ANSWER, "request {request}");
        assert_eq!(tokens, &expected[&(request % 3)], "request {request}");
    }
    assert_ne!(expected[&0], expected[&1], "some are chosen at random");
    assert_eq!(answers(on_gpu(&model, &options, gpu), &requests), expected);
    expected
        .values()
        .map(|tokens| tokens.len() as u64)
        .sum::<u64>()
        / 2
}
