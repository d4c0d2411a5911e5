//! Answers chosen from the likeliest tokens, which the GPU finds: the same as those chosen from all logits, which then
//! stay where they are.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use airstream::engine::request::{Event, Generate, Prompt, Sampling, Tag};
use airstream::engine::scheduler::{Flow, Limits, Scheduler, Step};
use airstream::engine::{Choices, Engine, ModelId, Options, Row, Spent, Wanted};

use super::checks::{Gpu, PLENTY, assert_same, few, logits, on_cpu, on_gpu, options, tokens};
use super::fake_gpu::{FakeGpu, Seen};
use super::support::synth::{SynthSpec, write};
use super::{Arch, QuantType};

const VOCAB: usize = 2100;
/// Tokens of an answer.
const ANSWER: u32 = 6;
/// What travels of a row whose likeliest tokens are enough.
const LIKELIEST_BYTES: u64 = 64 * 8;

/// A model of which the head is the most.
fn model(folder: &tempfile::TempDir) -> std::path::PathBuf {
    let path = folder.path().join("model.gguf");
    let spec = SynthSpec {
        layers: 1,
        ffn: 64,
        vocab: VOCAB as u32,
        ..SynthSpec::new(Arch::Gemma3, QuantType::Q8_0, 4)
    };
    write(&spec, &path).expect("the folder can be written");
    path
}

fn staged(model: &Path, options: &Options, seed: u64) -> Option<(Engine, FakeSeen)> {
    let gpu = FakeGpu::new(seed)?.with_memory(PLENTY as usize);
    let seen = gpu.seen();
    let options = Options {
        memory: Some(PLENTY),
        gpu_memory: Some(PLENTY),
        ..options.clone()
    };
    let gpu: Gpu = Arc::new(gpu);
    Some((on_gpu(model, &options, &gpu), seen))
}

type FakeSeen = Arc<Mutex<Seen>>;

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

#[test]
fn answers_are_the_cpus_and_those_of_all_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, options, requests) = (model(&folder), options(16, 128), requests());
    let expected = answers(on_cpu(&model, &options), &requests);
    for (request, tokens) in &expected {
        assert_eq!(tokens.len() as u32, ANSWER, "request {request}");
        assert_eq!(tokens, &expected[&(request % 3)], "request {request}");
    }
    assert_ne!(expected[&0], expected[&1], "some are chosen at random");
    let Some(direct) = FakeGpu::new(21) else {
        return;
    };
    let direct: Gpu = Arc::new(direct);
    let got = answers(on_gpu(&model, &options, &direct), &requests);
    assert_eq!(got, expected, "in shared memory");
    let (engine, seen) = staged(&model, &options, 22).expect("there was one before");
    let got = answers(engine, &requests);
    assert_eq!(got, expected, "in memory of its own");
    let travelled = seen.lock().expect("nobody panics with it").answer_bytes;
    let rows = 3 * u64::from(ANSWER);
    assert_eq!(travelled, rows * (LIKELIEST_BYTES + 4 * VOCAB as u64));
}

#[test]
fn only_the_logits_travel_that_somebody_looks_at() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, options) = (model(&folder), options(16, 128));
    let prompt = tokens(6);
    let expected = logits(&mut on_cpu(&model, &options), 0, &prompt, 6).expect("a sweep");
    let Some((mut engine, seen)) = staged(&model, &options, 23) else {
        return;
    };
    let (l, b) = (Wanted::Logits, Wanted::Likeliest);
    let cases = [
        [b, b, b, b, b, b],
        [Wanted::Nothing, l, b, l, l, b],
        [l, l, l, l, l, l],
    ];
    for wanted in cases {
        let before = seen.lock().expect("nobody panics with it").answer_bytes;
        let row = |(&token, wanted)| Row {
            session: 0,
            token,
            wanted,
        };
        let rows: Vec<Row> = prompt.iter().zip(wanted).map(row).collect();
        engine.clear(ModelId::FIRST, 0);
        engine
            .sweep(ModelId::FIRST, &rows, &mut Spent::default())
            .expect("a sweep");
        let after = seen.lock().expect("nobody panics with it").answer_bytes;
        let asked = wanted.iter().zip(expected.chunks(VOCAB));
        let asked: Vec<_> = asked.filter(|(w, _)| **w != Wanted::Nothing).collect();
        let bytes = asked.iter().map(|(wanted, _)| match wanted {
            Wanted::Logits => 4 * VOCAB as u64,
            _ => LIKELIEST_BYTES,
        });
        assert_eq!(after - before, bytes.sum::<u64>(), "{wanted:?}");
        for (index, (wanted, logits)) in asked.into_iter().enumerate() {
            match (engine.choices(ModelId::FIRST, index), wanted) {
                (Choices::Logits(got), Wanted::Logits) => {
                    assert_same(got, logits, "whole");
                }
                (Choices::Likeliest(got), Wanted::Likeliest) => {
                    let mut ids: Vec<u32> = (0..VOCAB as u32).collect();
                    ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
                    let got_ids: Vec<u32> = got.iter().map(|token| token.id).collect();
                    assert_eq!(got_ids, ids[..64]);
                    assert_eq!(got[63].logit.to_bits(), logits[ids[63] as usize].to_bits());
                }
                (other, wanted) => panic!("{wanted:?}: {other:?}"),
            }
        }
    }
    // On the processor all logits are at hand whatever is asked for.
    let mut cpu = on_cpu(&model, &options);
    let row = Row {
        session: 0,
        token: few(1)[0],
        wanted: b,
    };
    cpu.sweep(ModelId::FIRST, &[row], &mut Spent::default())
        .expect("a sweep");
    assert!(matches!(cpu.choices(ModelId::FIRST, 0), Choices::Logits(_)));
}
