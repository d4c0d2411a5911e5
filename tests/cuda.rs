//! The engine on a GPU, without one: the same kernels, run late by a fake driver, give the CPU's logits.
#![allow(unsafe_code)]

#[path = "cuda/allocations.rs"]
mod allocations;
#[path = "support/counting_thread.rs"]
mod counting_thread;
#[path = "cuda/daemon.rs"]
mod daemon;
#[path = "support/fake_gpu.rs"]
mod fake_gpu;
#[path = "cuda/kept.rs"]
mod kept;
#[path = "cuda/launches.rs"]
mod launches;
#[path = "support/shim.rs"]
mod shim;
#[path = "cuda/staged.rs"]
mod staged;
#[path = "support/store.rs"]
mod store_support;
#[path = "support/mod.rs"]
mod support;

use std::path::Path;
use std::sync::Arc;

use airstream::device::DeviceChoice;
use airstream::engine::{Engine, ModelId, ModelOptions, Options, Precision, Row, Spent};
use airstream::error::Result;
use airstream::format::quant::QuantType;
use fake_gpu::FakeGpu;
use support::synth::{Arch, SynthSpec, all_specs, write};

/// Positions within which attention is the CPU's bit for bit.
const SPLIT: usize = 256;

fn options(rows: usize, context: usize) -> Options {
    Options {
        model: ModelOptions {
            context: Some(context),
            rows: Some(rows),
            logits_rows: rows,
            sessions: 2,
            ..ModelOptions::default()
        },
        device: DeviceChoice::Cpu,
        threads: Some(1),
        ..Options::default()
    }
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i * 7919 % 311).collect()
}

/// Tokens of a small vocabulary.
fn few(count: usize) -> Vec<u32> {
    tokens(count).into_iter().map(|token| token % 64).collect()
}

/// Sweeps over the tokens of one session, in chunks; the logits after each.
fn logits(engine: &mut Engine, session: usize, tokens: &[u32], chunk: usize) -> Result<Vec<f32>> {
    logits_of(engine, ModelId::FIRST, session, tokens, chunk)
}

fn logits_of(
    engine: &mut Engine,
    model: ModelId,
    session: usize,
    tokens: &[u32],
    chunk: usize,
) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for chunk in tokens.chunks(chunk) {
        let row = |&token| Row {
            session,
            token,
            logits: true,
        };
        let rows: Vec<Row> = chunk.iter().map(row).collect();
        engine.sweep(model, &rows, &mut Spent::default())?;
        for index in 0..chunk.len() {
            all.extend_from_slice(engine.logits(model, index));
        }
    }
    Ok(all)
}

fn on_cpu(model: &Path, options: &Options) -> Engine {
    Engine::open(model, options).unwrap_or_else(|e| panic!("{}: {e}", model.display()))
}

fn on_gpu(model: &Path, options: &Options, gpu: FakeGpu) -> Engine {
    Engine::new_on(
        &[(model.to_owned(), options.model.clone())],
        options,
        Some(Arc::new(gpu)),
    )
    .unwrap_or_else(|e| panic!("{}: {e}", model.display()))
}

fn assert_same(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let differ = got
        .iter()
        .zip(expected)
        .position(|(a, b)| a.to_bits() != b.to_bits());
    assert!(differ.is_none(), "{what}: logit {differ:?} differs");
}

#[test]
fn logits_are_the_cpus_bit_for_bit_for_every_architecture_and_weight_type() {
    let folder = tempfile::tempdir().expect("a folder");
    for (seed, (name, spec)) in all_specs().into_iter().enumerate() {
        let Some(gpu) = FakeGpu::new(seed as u64) else {
            return;
        };
        let model = folder.path().join(format!("{name}.gguf"));
        write(&spec, &model).expect("the folder can be written");
        let seen = gpu.seen();
        let (options, prompt, next) = (options(16, 128), tokens(9), tokens(2));
        let expect = &mut on_cpu(&model, &options);
        let mut expected = logits(expect, 0, &prompt, 9).expect("a sweep");
        expected.extend(logits(expect, 0, &next, 1).expect("a sweep"));
        {
            let got = &mut on_gpu(&model, &options, gpu);
            if seed == 0 {
                let rate = got.device().gpu_read_rate().expect("it reads");
                assert!(rate.is_some_and(|rate| rate > 0.0), "{rate:?}");
            }
            let mut logits_got = logits(got, 0, &prompt, 9).expect("a sweep");
            logits_got.extend(logits(got, 0, &next, 1).expect("a sweep"));
            assert_same(&logits_got, &expected, &name);
        }
        let seen = seen.lock().expect("nobody panics with it");
        assert!(seen.unregistered, "{name}: the memory was not let go");
        assert!(
            (2..=140).contains(&seen.behind_max),
            "{name}: {} behind",
            seen.behind_max
        );
    }
}

/// The number of MiB that the remedy of a refusal names behind `flag`.
fn named(message: &str, flag: &str) -> u64 {
    let rest = message.split(flag).nth(1);
    let mib = rest.and_then(|rest| rest.split("MiB").next());
    let mib = mib.and_then(|mib| mib.trim().parse().ok());
    mib.unwrap_or_else(|| panic!("no {flag} in {message}"))
}

/// A model of several slots, so that some of it streams in a small budget.
fn larger() -> SynthSpec {
    SynthSpec {
        layers: 3,
        ffn: 1536,
        ..SynthSpec::new(Arch::Llama, QuantType::Q8_0, 5)
    }
}

#[test]
fn neither_a_small_budget_nor_chunks_change_the_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.gguf");
    write(&larger(), &model).expect("the folder can be written");
    let bytes = model.metadata().expect("it is there").len();
    let expected =
        logits(&mut on_cpu(&model, &options(16, 128)), 0, &tokens(20), 16).expect("a sweep");
    for (seed, (chunk, least)) in [(1, true), (7, true), (16, false)].into_iter().enumerate() {
        const CONTEXT: u64 = 5 << 20;
        let Some(gpu) = FakeGpu::new(seed as u64) else {
            return;
        };
        let gpu = gpu.that_took(CONTEXT);
        let mut options = options(16, 128);
        if least {
            options.memory = Some(1);
            let fake = FakeGpu::new(0).expect("there was one before");
            let fake = fake.that_took(CONTEXT);
            let models = [(model.clone(), options.model.clone())];
            let refused = Engine::new_on(&models, &options, Some(Arc::new(fake)));
            let message = refused.err().expect("too little").to_string();
            options.memory = Some(named(&message, "--memory ") << 20);
        }
        let seen = gpu.seen();
        {
            let engine = &mut on_gpu(&model, &options, gpu);
            let streams = engine.plan(ModelId::FIRST).residency.given_up() > 0;
            assert_eq!(streams, least, "{bytes} bytes in {:?}", options.memory);
            assert_same(
                &logits(engine, 0, &tokens(20), chunk).expect("a sweep"),
                &expected,
                &format!("chunks of {chunk}"),
            );
        }
        // The processor's memory, the GPU's and the driver's are the same DRAM.
        let taken = CONTEXT + seen.lock().expect("nobody panics with it").taken_max as u64;
        let memory = options.memory.unwrap_or(u64::MAX);
        assert!(
            taken > CONTEXT && taken <= memory,
            "{taken} of {memory} bytes"
        );
    }
}

#[test]
fn beyond_a_split_logits_are_close_and_do_not_depend_on_the_batch() {
    let Some(gpu) = FakeGpu::new(3) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.gguf");
    // Little beside attention.
    let spec = SynthSpec {
        layers: 1,
        ffn: 64,
        vocab: 64,
        ..SynthSpec::new(Arch::Llama, QuantType::Q4_0, 2)
    };
    write(&spec, &model).expect("the folder can be written");
    let (count, options) = (SPLIT + 20, options(64, 512));
    let expected = logits(&mut on_cpu(&model, &options), 0, &few(count), 64).expect("a sweep");
    let engine = &mut on_gpu(&model, &options, gpu);
    let got = logits(engine, 0, &few(count), 64).expect("a sweep");
    let vocab = got.len() / count;
    assert_same(
        &got[..SPLIT * vocab],
        &expected[..SPLIT * vocab],
        "the first split",
    );
    let largest = got
        .iter()
        .zip(&expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    // What rounds otherwise moves some activations by a step of their 12 bits, and the logits with them.
    assert!(largest < 0.03, "logits differ by {largest}");
    // The other session is swept beside the first one, in other chunks.
    let other = logits(engine, 1, &few(count), 29).expect("a sweep");
    assert_same(&other, &got, "another session, other chunks");
}

#[test]
fn what_the_gpu_fails_at_fails_the_sweep_and_all_after_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.gguf");
    write(&SynthSpec::new(Arch::Qwen3, QuantType::Q4_0, 2), &model)
        .expect("the folder can be written");
    let Some(gpu) = FakeGpu::new(1) else { return };
    let engine = &mut on_gpu(&model, &options(8, 64), gpu.that_fails(12));
    let first = logits(engine, 0, &tokens(8), 8).expect_err("it fails in this sweep");
    assert!(first.to_string().contains("remedy: start again"), "{first}");
    let second = logits(engine, 0, &tokens(1), 1).expect_err("it does not recover");
    assert_eq!(first.to_string(), second.to_string());
    assert_eq!(
        engine.session_len(ModelId::FIRST, 0),
        0,
        "no session has advanced"
    );

    let gpu = FakeGpu::new(1).expect("there was one before").that_fails(0);
    let opened = Engine::new_on(
        &[(model, options(8, 64).model)],
        &options(8, 64),
        Some(Arc::new(gpu)),
    );
    assert!(opened.is_err(), "the first launch is part of opening");
}

#[test]
fn activations_of_8_bits_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.gguf");
    write(&SynthSpec::new(Arch::Llama, QuantType::Q4_0, 2), &model).expect("it can be written");
    let Some(gpu) = FakeGpu::new(1) else { return };
    let options = options(8, 64);
    let wishes = ModelOptions {
        activations: Precision::Bits8,
        ..options.model.clone()
    };
    let opened = Engine::new_on(&[(model, wishes)], &options, Some(Arc::new(gpu)));
    let error = opened.err().expect("no kernel does it").to_string();
    assert!(error.contains("--device cpu"), "{error}");
}

#[test]
fn budgets_and_models_change_on_a_gpu_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, other) = (
        folder.path().join("model.gguf"),
        folder.path().join("other.gguf"),
    );
    write(&larger(), &model).expect("the folder can be written");
    write(&SynthSpec::new(Arch::Qwen2, QuantType::Q4_K, 3), &other)
        .expect("the folder can be written");
    let Some(gpu) = FakeGpu::new(9) else { return };
    let options = Options {
        memory: Some(32 << 20),
        ..options(16, 128)
    };
    let of_model = logits(&mut on_cpu(&model, &options), 0, &tokens(9), 9).expect("a sweep");
    let of_other = logits(&mut on_cpu(&other, &options), 0, &tokens(9), 9).expect("a sweep");
    let seen = gpu.seen();
    {
        let engine = &mut on_gpu(&model, &options, gpu);
        assert_same(
            &logits(engine, 0, &tokens(9), 9).expect("a sweep"),
            &of_model,
            "alone",
        );
        let refused = engine.set_memory(1).expect_err("too little").to_string();
        let least = refused
            .split("at least ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let least: u64 = least
            .expect("the remedy names it")
            .parse()
            .expect("a number");
        engine.set_memory(least << 20).expect("it is enough");
        engine.clear(ModelId::FIRST, 0);
        assert_same(
            &logits(engine, 0, &tokens(9), 9).expect("a sweep"),
            &of_model,
            "with less memory",
        );
        engine.set_memory(32 << 20).expect("it was there before");
        let second = engine.load(&other, &options.model).expect("there is room");
        assert_same(
            &logits_of(engine, second, 0, &tokens(9), 9).expect("a sweep"),
            &of_other,
            "another model",
        );
        engine.unload(second).expect("it goes");
        engine.clear(ModelId::FIRST, 0);
        assert_same(
            &logits(engine, 0, &tokens(9), 9).expect("a sweep"),
            &of_model,
            "alone again",
        );
    }
    assert!(seen.lock().expect("nobody panics with it").unregistered);
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_build_without_cuda_says_so() {
    let error = DeviceChoice::Cuda
        .open()
        .err()
        .expect("there is no driver in it");
    assert!(error.to_string().contains("--features cuda"), "{error}");
    assert!(
        DeviceChoice::Auto
            .open()
            .expect("auto never fails")
            .is_none()
    );
}
