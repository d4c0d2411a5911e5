//! The budget of a running engine goes down and up: the same tokens, other bytes, and the memory really comes back.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/greedy.rs"]
mod greedy;
#[path = "support/models.rs"]
mod models;

use airstream::engine::{Engine, ModelId, ModelOptions, Options, Spent};
use engine::open;
use greedy::{argmax, greedy};

const MIB: u64 = 1 << 20;

/// Resident memory of this process.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find(|l| l.starts_with("VmRSS:"))
        .expect("VmRSS");
    line.split_whitespace()
        .nth(1)
        .and_then(|n| n.parse::<u64>().ok())
        .expect("kB")
        / 1024
}

/// Bytes read for each of some tokens once a plan has settled.
fn bytes_per_token(engine: &mut Engine) -> u64 {
    engine
        .decode(ModelId::FIRST, 0, 7, &mut Spent::default())
        .expect("decode");
    let mut spent = Spent::default();
    for token in 8..16 {
        engine
            .decode(ModelId::FIRST, 0, token, &mut spent)
            .expect("decode");
    }
    spent.read_bytes / spent.rows
}

#[test]
fn the_budget_changes_in_mid_conversation() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let options = Options {
        model: ModelOptions {
            context: Some(256),
            ..ModelOptions::default()
        },
        threads: Some(2),
        ..Options::default()
    };
    let prompt: Vec<u32> = (0..40).map(|i| 900 + i * 61).collect();
    let expected = greedy(&mut open(&model, &options), &prompt, 30);

    let mut engine = open(&model, &options);
    let all = engine.plan(ModelId::FIRST).total_bytes();
    let mut spent = Spent::default();
    engine
        .prefill(ModelId::FIRST, 0, &prompt, &mut spent, |_| true)
        .expect("prefill");
    let before = resident_mib();
    let mut tokens = Vec::new();
    for memory in [all, 60 * MIB, 90 * MIB, 45 * MIB, all, 60 * MIB] {
        engine
            .set_memory(memory)
            .expect("a budget that is large enough");
        assert!(engine.plan(ModelId::FIRST).total_bytes() <= memory);
        for _ in 0..5 {
            tokens.push(argmax(engine.logits(ModelId::FIRST, 0)));
            engine
                .decode(ModelId::FIRST, 0, tokens[tokens.len() - 1], &mut spent)
                .expect("decode");
        }
    }
    assert_eq!(tokens, expected);
    let after = resident_mib();
    assert!(
        after + 30 < before,
        "{before} MiB before, {after} MiB at a budget of 60 MiB"
    );

    let streamed =
        engine
            .plan(ModelId::FIRST)
            .streamed_bytes(engine.plan(ModelId::FIRST).pages_at(
                engine.config(ModelId::FIRST),
                engine.session_len(ModelId::FIRST, 0),
            ));
    let read = bytes_per_token(&mut engine);
    assert!(
        read.abs_diff(streamed) * 50 < streamed,
        "{read} bytes a token, {streamed} planned"
    );
    engine.set_memory(all).expect("as in the beginning");
    assert_eq!(
        bytes_per_token(&mut engine),
        0,
        "the tiles did not come back"
    );

    let refused = engine
        .set_memory(10 * MIB)
        .expect_err("too little")
        .to_string();
    assert!(refused.contains("at least"), "{refused}");
    let refused = engine
        .set_memory(1 << 40)
        .expect_err("too much")
        .to_string();
    assert!(refused.contains("--memory 1048576MiB"), "{refused}");
    assert_eq!(engine.pool().memory, all);
    engine
        .decode(ModelId::FIRST, 0, 7, &mut spent)
        .expect("nothing has changed");
}
