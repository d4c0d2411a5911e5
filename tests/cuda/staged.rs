//! A GPU with memory of its own: tiles on the GPU, then in the processor's memory, then on disk.

use std::sync::Arc;

use airstream::engine::{Engine, ModelId, ModelOptions, Options};

use super::checks::{Gpu, PLENTY, logits, models, on_gpu, options, tokens};
use super::fake_gpu::FakeGpu;
use super::staged_checks::{
    BUDGETS, conversations_share_and_forget, expected_of, models_come_and_go, moves_what_is_planned,
};

#[test]
fn budgets_of_both_memories_change_what_moves_and_not_the_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, _) = models(folder.path());
    let expected = expected_of(&model);
    for (seed, budgets) in BUDGETS.into_iter().enumerate() {
        let Some(fake) = FakeGpu::new(seed as u64) else {
            return;
        };
        let fake = fake.with_memory(PLENTY as usize);
        let (what, seen) = (format!("{budgets:?}"), fake.seen());
        let gpu: Gpu = Arc::new(fake);
        let memory = moves_what_is_planned(&model, budgets, &expected, &gpu);
        let seen = seen.lock().expect("nobody panics with it");
        assert!(seen.unregistered, "{what}: memory was not given back");
        assert!(
            seen.allocated_max as u64 <= memory,
            "{what}: {} bytes",
            seen.allocated_max
        );
        assert!(seen.behind_max <= 160, "{what}: {} behind", seen.behind_max);
        if memory < PLENTY {
            assert!(
                seen.overtook.iter().all(|&n| n > 0),
                "{what}: {:?}",
                seen.overtook
            );
        }
    }
}

#[test]
fn conversations_share_and_forget_pages_on_the_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, _) = models(folder.path());
    let Some(fake) = FakeGpu::new(11) else { return };
    let gpu: Gpu = Arc::new(fake.with_memory(PLENTY as usize));
    conversations_share_and_forget(&model, &gpu);
}

#[test]
fn models_come_and_go_within_the_gpus_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, other) = models(folder.path());
    let Some(fake) = FakeGpu::new(5) else { return };
    let gpu: Gpu = Arc::new(fake.with_memory(PLENTY as usize));
    models_come_and_go((&model, &other), &gpu);
}

/// Two models that nobody gave a number of rows open in what is enough for few rows.
#[test]
fn rows_are_fewer_where_two_models_have_little_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, other) = models(folder.path());
    let rows_of = |rows: Option<usize>, mib: u64| {
        let options = Options {
            memory: Some(mib << 20),
            gpu_memory: Some(PLENTY),
            ..options(1, 512)
        };
        let wishes = ModelOptions {
            rows,
            ..options.model.clone()
        };
        let both = [&model, &other].map(|path| (path.clone(), wishes.clone()));
        let gpu: Gpu = Arc::new(FakeGpu::new(7)?.with_memory(PLENTY as usize));
        let engine = Engine::new_on(&both, &options, Some(gpu)).ok()?;
        Some(engine.plan(ModelId::FIRST).limits.rows)
    };
    if FakeGpu::new(7).is_none() {
        return;
    }
    let least = { 1..64 }.find(|&mib| rows_of(Some(8), mib).is_some());
    let least = least.expect("much is enough");
    let (few, many) = (rows_of(None, least), rows_of(None, 512));
    assert!(few.is_some() && few < many, "{few:?} of {many:?}");
}

#[test]
fn without_a_budget_a_margin_stays_free_and_a_failure_ends_the_sweep() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, _) = models(folder.path());
    let options = Options {
        memory: Some(PLENTY),
        ..options(16, 128)
    };
    let Some(fake) = FakeGpu::new(2) else { return };
    let gpu: Gpu = Arc::new(fake.with_memory(1 << 30).that_fails(150));
    let engine = &mut on_gpu(&model, &options, &gpu);
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
