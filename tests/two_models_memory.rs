//! Memory with two models: never beyond the budget, and all of it comes back. Alone in its process, which it measures.

#[path = "support/models.rs"]
mod models;

use airstream::engine::{Engine, ModelId, ModelOptions, Options, Spent};

const MIB: u64 = 1 << 20;
/// What a process may take beside the budget.
const BESIDE: u64 = 24 * MIB;

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|l| l.starts_with(name)).expect(name);
    let kib = line
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse::<u64>().ok());
    kib.expect("a number of kB") << 10
}

/// Open descriptors, and mapped bytes.
fn held() -> (usize, u64) {
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("Linux").count();
    (descriptors, status("VmSize:"))
}

#[test]
fn two_models_stay_within_the_budget_and_leave_nothing_behind() {
    let (Some(a), Some(b)) = (models::smollm2(), models::gemma3()) else {
        return;
    };
    let wishes = ModelOptions {
        context: Some(128),
        rows: Some(16),
        ..ModelOptions::default()
    };
    let memory = 130 * MIB;
    let options = Options {
        memory: Some(memory),
        model: wishes.clone(),
        threads: Some(2),
        ..Options::default()
    };
    let mut engine = Engine::open(&a, &options).expect("opens");
    let mut spent = Spent::default();
    engine
        .decode(ModelId::FIRST, 0, 7, &mut spent)
        .expect("decode");
    let slots = engine.store().slots_in_use();
    let mut settled = None;
    for round in 0..100 {
        let second = engine.load(&b, &wishes).expect("loads");
        // Now and then both are at work; reads are in flight at every unloading after that.
        if round % 20 == 0 {
            for token in 5..8 {
                engine.decode(second, 0, token, &mut spent).expect("decode");
                engine
                    .decode(ModelId::FIRST, 0, token, &mut spent)
                    .expect("decode");
            }
        }
        engine.unload(second).expect("unloads");
        assert_eq!(engine.store().slots_in_use(), slots, "round {round}");
        if round == 20 {
            settled = Some(held());
        }
    }
    let (descriptors, mapped) = settled.expect("there were 20 rounds");
    let (descriptors_now, mapped_now) = held();
    assert_eq!(descriptors_now, descriptors);
    assert!(
        mapped_now <= mapped + 2 * MIB,
        "{mapped} bytes mapped after 20 rounds, {mapped_now} after 100"
    );
    let peak = status("VmHWM:");
    assert!(
        peak <= memory + BESIDE,
        "{} MiB at the peak with a budget of {} MiB",
        peak / MIB,
        memory / MIB
    );
}
