//! What an engine on a GPU with memory of its own must do, whatever the driver.

use std::path::Path;

use airstream::engine::{Choices, Engine, ModelId, Row, Spent, Wanted};

use super::checks::{
    Budget, Gpu, assert_same, logits, logits_of, on_cpu, on_gpu, options, tokens, with_budgets,
};
use super::counting_thread::{allocations, counted};

/// Budgets of the processor's memory and of the GPU's: tiles on the GPU, then in the processor's memory, then on disk.
pub const BUDGETS: [(Budget, Budget); 5] = [
    (Budget::Plenty, Budget::Plenty),
    (Budget::Least, Budget::Plenty),
    (Budget::Plenty, Budget::Some),
    (Budget::Some, Budget::Some),
    (Budget::Least, Budget::Least),
];

/// What the CPU makes of [`moves_what_is_planned`].
pub fn expected_of(model: &Path) -> Vec<f32> {
    let engine = &mut on_cpu(model, &options(16, 128));
    let mut expected = logits(engine, 0, &tokens(20), 16).expect("a sweep");
    expected.extend(logits(engine, 0, &tokens(6), 1).expect("a sweep"));
    expected
}

/// Logits are the expected ones in these budgets, and what moves is what was planned. How much of the GPU's memory there
/// was.
pub fn moves_what_is_planned(
    model: &Path,
    (host, of_gpu): (Budget, Budget),
    expected: &[f32],
    gpu: &Gpu,
) -> u64 {
    let what = format!("{host:?} of memory and {of_gpu:?} of the GPU's");
    let options = with_budgets(model, host, of_gpu, gpu);
    let (prompt, next) = (tokens(20), tokens(6));
    let engine = &mut on_gpu(model, &options, gpu);
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
    assert_same(&got, expected, &what);
    let plan = engine.plan(ModelId::FIRST);
    let pages = plan.pages_at(engine.config(ModelId::FIRST), 26);
    let (copied, read) = (plan.copied_bytes(pages), plan.streamed_bytes(pages));
    assert_eq!(copied > 0, of_gpu != Budget::Plenty, "{what}");
    let streams = host != Budget::Plenty && of_gpu != Budget::Plenty;
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
    if of_gpu == Budget::Plenty {
        assert_eq!(spent.read_bytes, 0, "{what}");
    }
    let rows = 4096 * 4 * sweeps as usize;
    assert_near(
        spent.read_bytes,
        read * sweeps,
        (plan.window + plan.gpu_window) as usize * plan.slot_bytes + rows,
        &what,
    );
    options.gpu_memory.expect("given")
}

fn assert_near(got: u64, expected: u64, slack: usize, what: &str) {
    assert!(
        got.abs_diff(expected) <= slack as u64,
        "{what}: {got} instead of {expected} bytes, to {slack}"
    );
}

/// Conversations share and forget pages.
pub fn conversations_share_and_forget(model: &Path, gpu: &Gpu) {
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
    let expected = talk(&mut on_cpu(model, &options(16, 128)));
    let options = with_budgets(model, Budget::Some, Budget::Some, gpu);
    let got = talk(&mut on_gpu(model, &options, gpu));
    assert_same(&got, &expected, "two conversations");
}

/// Models come and go within the GPU's memory, and one for which there is too little is refused.
pub fn models_come_and_go((model, other): (&Path, &Path), gpu: &Gpu) {
    let cpu = options(16, 128);
    let of_model = logits(&mut on_cpu(model, &cpu), 0, &tokens(9), 9).expect("a sweep");
    let of_other = logits(&mut on_cpu(other, &cpu), 0, &tokens(9), 9).expect("a sweep");
    let say = |engine: &mut Engine, id, expected: &[f32], what| {
        let got = logits_of(engine, id, 0, &tokens(9), 9).expect("a sweep");
        assert_same(&got, expected, what);
        engine.clear(id, 0);
    };
    {
        let options = with_budgets(model, Budget::Plenty, Budget::Plenty, gpu);
        let engine = &mut on_gpu(model, &options, gpu);
        say(engine, ModelId::FIRST, &of_model, "alone");
        let second = engine.load(other, &options.model).expect("there is room");
        say(engine, second, &of_other, "another model");
        say(engine, ModelId::FIRST, &of_model, "beside it");
        engine.set_memory(16 << 20).expect("it is enough");
        say(engine, second, &of_other, "with less memory");
        engine.unload(second).expect("it goes");
        say(engine, ModelId::FIRST, &of_model, "alone again");
    }

    // Slots are chosen for the models of the start: what those leave over may be too little for one more.
    let options = with_budgets(model, Budget::Plenty, Budget::Some, gpu);
    let engine = &mut on_gpu(model, &options, gpu);
    let error = engine.load(other, &options.model).expect_err("too little");
    assert!(error.to_string().contains("give --gpu-memory"), "{error}");
    say(engine, ModelId::FIRST, &of_model, "after a refusal");
}

/// Between two tokens the engine's thread allocates nothing while tiles pass through both memories.
pub fn tokens_without_an_allocation(model: &Path, gpu: &Gpu) {
    let options = with_budgets(model, Budget::Some, Budget::Some, gpu);
    let engine = &mut on_gpu(model, &options, gpu);
    let (mut spent, next, prompt) = (Spent::default(), tokens(6), tokens(16));
    // So many that the context crosses into new pages.
    let mut in_tokens = || {
        let before = allocations();
        counted(true);
        drop(std::hint::black_box(Box::new(1)));
        assert_eq!(allocations() - before, 1, "the counter counts");
        for &token in &next {
            engine
                .decode(ModelId::FIRST, 0, token, &mut spent)
                .expect("a sweep");
            let row = Row {
                session: 0,
                token,
                wanted: Wanted::Likeliest,
            };
            engine
                .sweep(ModelId::FIRST, &[row], &mut spent)
                .expect("a sweep");
            let choices = engine.choices(ModelId::FIRST, 0);
            assert!(matches!(choices, Choices::Likeliest([_, ..])));
        }
        engine
            .prefill(ModelId::FIRST, 0, &prompt, &mut spent, |_| true)
            .expect("a sweep");
        counted(false);
        allocations() - before - 1
    };
    in_tokens();
    assert_eq!(in_tokens(), 0);
    assert!(spent.copied_bytes > 0 && spent.read_bytes > 0, "{spent:?}");
}
