//! The engine on a GPU, without one: the same kernels, run late by a fake driver, give the CPU's logits.
#![allow(unsafe_code)]

#[path = "cuda/allocations.rs"]
mod allocations;
#[path = "cuda/checks.rs"]
mod checks;
#[path = "support/counting_thread.rs"]
mod counting_thread;
#[path = "cuda/daemon.rs"]
mod daemon;
#[path = "support/driven.rs"]
mod driven;
#[path = "support/fake_gpu.rs"]
mod fake_gpu;
#[path = "cuda/kept.rs"]
mod kept;
#[path = "kernels/mod.rs"]
mod kernels;
#[path = "cuda/launches.rs"]
mod launches;
#[path = "cuda/likeliest.rs"]
mod likeliest;
#[path = "cuda/likeliest_checks.rs"]
mod likeliest_checks;
#[path = "support/shim.rs"]
mod shim;
#[path = "cuda/staged.rs"]
mod staged;
#[path = "cuda/staged_checks.rs"]
mod staged_checks;
#[path = "support/store.rs"]
mod store_support;
#[path = "support/mod.rs"]
mod support;

use std::sync::{Arc, OnceLock};

use airstream::engine::{Engine, ModelId, ModelOptions, Precision};
use airstream::format::quant::QuantType;
use checks::{Gpu, assert_same, logits, on_cpu, on_gpu, options, tokens};
use driven::Driven;
use fake_gpu::FakeGpu;
use kernels::launch::Runner;
use support::synth::{Arch, SynthSpec, all_specs, write};

/// Kernels as a driver runs them: so that a real one finds these tests as they should be.
pub fn runner() -> Option<&'static dyn Runner> {
    static RUNNER: OnceLock<Option<Driven>> = OnceLock::new();
    let driven = || Some(Driven::new(Arc::new(FakeGpu::new(3)?.with_memory(1 << 30))));
    let runner = RUNNER.get_or_init(driven).as_ref();
    runner.map(|runner| runner as &dyn Runner)
}

#[test]
fn logits_are_the_cpus_bit_for_bit_for_every_architecture_and_weight_type() {
    let folder = tempfile::tempdir().expect("a folder");
    for (seed, (name, spec)) in all_specs().into_iter().enumerate() {
        let Some(gpu) = FakeGpu::new(seed as u64) else {
            return;
        };
        let seen = gpu.seen();
        let gpu: Gpu = Arc::new(gpu);
        checks::logits_are_the_cpus(&name, &spec, folder.path(), &gpu);
        let seen = seen.lock().expect("nobody panics with it");
        assert!(seen.unregistered, "{name}: the memory was not let go");
        assert!(
            (2..=140).contains(&seen.behind_max),
            "{name}: {} behind",
            seen.behind_max
        );
    }
}

#[test]
fn neither_a_small_budget_nor_chunks_change_the_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, _) = checks::models(folder.path());
    let bytes = model.metadata().expect("it is there").len();
    let expected =
        logits(&mut on_cpu(&model, &options(16, 128)), 0, &tokens(20), 16).expect("a sweep");
    for (seed, (chunk, least)) in [(1, true), (7, true), (16, false)].into_iter().enumerate() {
        const CONTEXT: u64 = 5 << 20;
        let Some(gpu) = FakeGpu::new(seed as u64) else {
            return;
        };
        let gpu = gpu.that_took(CONTEXT);
        let seen = gpu.seen();
        let gpu: Gpu = Arc::new(gpu);
        let options = match least {
            true => checks::with_least(&model, &options(16, 128), &gpu),
            false => options(16, 128),
        };
        {
            let engine = &mut on_gpu(&model, &options, &gpu);
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
    let gpu: Gpu = Arc::new(gpu);
    checks::beyond_a_split(folder.path(), &gpu);
}

#[test]
fn what_the_gpu_fails_at_fails_the_sweep_and_all_after_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.gguf");
    write(&SynthSpec::new(Arch::Qwen3, QuantType::Q4_0, 2), &model)
        .expect("the folder can be written");
    let Some(gpu) = FakeGpu::new(1) else { return };
    let gpu: Gpu = Arc::new(gpu.that_fails(12));
    let engine = &mut on_gpu(&model, &options(8, 64), &gpu);
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
    let (model, other) = checks::models(folder.path());
    let Some(gpu) = FakeGpu::new(9) else { return };
    let seen = gpu.seen();
    let gpu: Gpu = Arc::new(gpu);
    checks::budgets_and_models_change((&model, &other), &gpu);
    assert!(seen.lock().expect("nobody panics with it").unregistered);
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_build_without_cuda_says_so() {
    use airstream::device::DeviceChoice;
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
