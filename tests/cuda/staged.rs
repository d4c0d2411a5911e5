//! A GPU with memory of its own: tiles on the GPU, then in the processor's memory, then on disk.

use std::path::{Path, PathBuf};

use airstream::engine::{Engine, ModelId, Options, Spent};

use super::fake_gpu::FakeGpu;
use super::{assert_same, larger, logits, named, on_cpu, on_gpu, options, tokens};

/// More than any of these models needs.
const PLENTY: u64 = 64 << 20;

/// How much of each memory there is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    Least,
    Some,
    Plenty,
}

fn model(folder: &tempfile::TempDir) -> PathBuf {
    let model = folder.path().join("model.gguf");
    super::write(&larger(), &model).expect("the folder can be written");
    model
}

fn refused(model: &Path, options: &Options) -> String {
    let gpu = FakeGpu::new(0).expect("there was one before");
    let gpu = gpu.with_memory(options.gpu_memory.unwrap_or(0) as usize);
    let models = [(model.to_owned(), options.model.clone())];
    let opened = Engine::new_on(&models, options, Some(std::sync::Arc::new(gpu)));
    opened.err().expect("too little").to_string()
}

/// Options with these budgets; the least ones are those that the refusals name.
pub fn with_budgets(model: &Path, host: Budget, gpu: Budget) -> Options {
    let mut options = Options {
        memory: Some(PLENTY),
        gpu_memory: Some(1),
        ..options(16, 128)
    };
    let mib = named(&refused(model, &options), "--gpu-memory ");
    options.gpu_memory = Some(match gpu {
        Budget::Least => mib << 20,
        Budget::Some => (mib + 1) << 20,
        Budget::Plenty => PLENTY,
    });
    if host != Budget::Plenty {
        options.memory = Some(1);
        let mib = named(&refused(model, &options), "--memory ");
        options.memory = Some((mib + u64::from(host == Budget::Some)) << 20);
    }
    options
}

#[test]
fn budgets_of_both_memories_change_what_moves_and_not_the_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model(&folder);
    let (prompt, next) = (tokens(20), tokens(6));
    let expect = &mut on_cpu(&model, &options(16, 128));
    let mut expected = logits(expect, 0, &prompt, 16).expect("a sweep");
    expected.extend(logits(expect, 0, &next, 1).expect("a sweep"));
    let budgets = [
        (Budget::Plenty, Budget::Plenty),
        (Budget::Least, Budget::Plenty),
        (Budget::Plenty, Budget::Some),
        (Budget::Some, Budget::Some),
        (Budget::Least, Budget::Least),
    ];
    for (seed, (host, gpu)) in budgets.into_iter().enumerate() {
        let Some(fake) = FakeGpu::new(seed as u64) else {
            return;
        };
        let what = format!("{host:?} of memory and {gpu:?} of the GPU's");
        let options = with_budgets(&model, host, gpu);
        let fake = fake.with_memory(options.gpu_memory.expect("given") as usize);
        let seen = fake.seen();
        {
            let engine = &mut on_gpu(&model, &options, fake);
            let mut got = logits(engine, 0, &prompt, 16).expect("a sweep");
            // Two sweeps more, and what moves is what was planned.
            got.extend(logits(engine, 0, &next[..2], 1).expect("a sweep"));
            let mut spent = Spent::default();
            for token in &next[2..] {
                engine
                    .decode(ModelId::FIRST, 0, *token, &mut spent)
                    .expect("a sweep");
                got.extend_from_slice(engine.logits(ModelId::FIRST, 0));
            }
            assert_same(&got, &expected, &what);
            let plan = engine.plan(ModelId::FIRST);
            let pages = plan.pages_at(engine.config(ModelId::FIRST), 26);
            let (copied, read) = (plan.copied_bytes(pages), plan.streamed_bytes(pages));
            assert_eq!(copied > 0, gpu != Budget::Plenty, "{what}");
            let streams = host != Budget::Plenty && gpu != Budget::Plenty;
            assert_eq!(read > 0, streams, "{what}");
            // Tiles ahead of the last sweep are copied in it, and those ahead of the first were before.
            let sweeps = spent.sweeps;
            assert_near(
                spent.copied_bytes,
                copied * sweeps,
                plan.gpu_window as usize * plan.slot_bytes,
                &what,
            );
            // Single rows are read only where the GPU does not have them.
            if gpu == Budget::Plenty {
                assert_eq!(spent.read_bytes, 0, "{what}");
            }
            let rows = 4096 * 4 * sweeps as usize;
            assert_near(
                spent.read_bytes,
                read * sweeps,
                (plan.window + plan.gpu_window) as usize * plan.slot_bytes + rows,
                &what,
            );
        }
        let seen = seen.lock().expect("nobody panics with it");
        assert!(seen.unregistered, "{what}: memory was not given back");
        let memory = options.gpu_memory.expect("given");
        assert!(
            seen.allocated_max as u64 <= memory,
            "{what}: {} bytes",
            seen.allocated_max
        );
        assert!(seen.behind_max <= 160, "{what}: {} behind", seen.behind_max);
        if gpu != Budget::Plenty {
            assert!(
                seen.overtook.iter().all(|&n| n > 0),
                "{what}: {:?}",
                seen.overtook
            );
        }
    }
}

fn assert_near(got: u64, expected: u64, slack: usize, what: &str) {
    assert!(
        got.abs_diff(expected) <= slack as u64,
        "{what}: {got} instead of {expected} bytes, to {slack}"
    );
}

#[test]
fn conversations_share_and_forget_pages_on_the_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model(&folder);
    let Some(fake) = FakeGpu::new(11) else { return };
    let options = with_budgets(&model, Budget::Some, Budget::Some);
    let fake = fake.with_memory(options.gpu_memory.expect("given") as usize);
    let id = ModelId::FIRST;
    let talk = |engine: &mut Engine| {
        let mut all = logits(engine, 0, &tokens(21), 16).expect("a sweep");
        assert_eq!(engine.share(id, 0, 1, 19), 19);
        all.extend(logits(engine, 1, &tokens(3), 1).expect("a sweep"));
        all.extend(logits(engine, 0, &tokens(2), 2).expect("a sweep"));
        assert_eq!(engine.truncate(id, 1, 17), 17);
        all.extend(logits(engine, 1, &tokens(4), 4).expect("a sweep"));
        engine.clear(id, 0);
        all.extend(logits(engine, 0, &tokens(5), 5).expect("a sweep"));
        all
    };
    let expected = talk(&mut on_cpu(&model, &super::options(16, 128)));
    let got = talk(&mut on_gpu(&model, &options, fake));
    assert_same(&got, &expected, "two conversations");
}

#[test]
fn models_come_and_go_within_the_gpus_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model(&folder);
    let other = folder.path().join("other.gguf");
    let spec = super::SynthSpec::new(super::Arch::Qwen2, super::QuantType::Q4_K, 3);
    super::write(&spec, &other).expect("the folder can be written");
    let Some(fake) = FakeGpu::new(5) else { return };
    let cpu = super::options(16, 128);
    let of_model = logits(&mut on_cpu(&model, &cpu), 0, &tokens(9), 9).expect("a sweep");
    let of_other = logits(&mut on_cpu(&other, &cpu), 0, &tokens(9), 9).expect("a sweep");
    let say = |engine: &mut Engine, id, expected: &[f32], what| {
        let got = super::logits_of(engine, id, 0, &tokens(9), 9).expect("a sweep");
        assert_same(&got, expected, what);
        engine.clear(id, 0);
    };
    let options = with_budgets(&model, Budget::Plenty, Budget::Plenty);
    let engine = &mut on_gpu(&model, &options, fake.with_memory(PLENTY as usize));
    say(engine, ModelId::FIRST, &of_model, "alone");
    let second = engine.load(&other, &options.model).expect("there is room");
    say(engine, second, &of_other, "another model");
    say(engine, ModelId::FIRST, &of_model, "beside it");
    engine.set_memory(16 << 20).expect("it is enough");
    say(engine, second, &of_other, "with less memory");
    engine.unload(second).expect("it goes");
    say(engine, ModelId::FIRST, &of_model, "alone again");

    // Slots are chosen for the models of the start: what those leave over may be too little for one more.
    let options = with_budgets(&model, Budget::Plenty, Budget::Some);
    let fake = FakeGpu::new(5).expect("there was one before");
    let engine = &mut on_gpu(&model, &options, fake.with_memory(PLENTY as usize));
    let error = engine.load(&other, &options.model).expect_err("too little");
    assert!(error.to_string().contains("give --gpu-memory"), "{error}");
    say(engine, ModelId::FIRST, &of_model, "after a refusal");
}

#[test]
fn without_a_budget_a_margin_stays_free_and_a_failure_ends_the_sweep() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model(&folder);
    let options = Options {
        memory: Some(PLENTY),
        ..super::options(16, 128)
    };
    let Some(fake) = FakeGpu::new(2) else { return };
    let fake = fake.with_memory(1 << 30).that_fails(150);
    let engine = &mut on_gpu(&model, &options, fake);
    assert_eq!(engine.plan(ModelId::FIRST).gpu_memory, Some(768 << 20));
    let bus = engine.device().gpu_copy_rate().expect("it copies");
    assert!(bus.is_some_and(|rate| rate > 0.0), "{bus:?}");
    let error = logits(engine, 0, &tokens(30), 16).expect_err("it fails in a sweep");
    assert!(error.to_string().contains("remedy: start again"), "{error}");
    assert!(
        logits(engine, 0, &tokens(1), 1).is_err(),
        "it does not recover"
    );
}
