//! Two models of different architecture in one arena: neither changes what the other says, whatever comes and goes.

#[path = "support/greedy.rs"]
mod greedy;
#[path = "support/models.rs"]
mod models;

use std::path::{Path, PathBuf};

use airstream::engine::{Engine, ModelId, ModelOptions, Options, Spent};
use greedy::{argmax, greedy};

const TOKENS: usize = 12;

fn wishes() -> ModelOptions {
    ModelOptions {
        context: Some(128),
        rows: Some(32),
        ..ModelOptions::default()
    }
}

fn options(memory: Option<u64>) -> Options {
    Options {
        memory,
        model: wishes(),
        threads: Some(2),
        ..Options::default()
    }
}

/// SmolLM2, Gemma and the bytes of both.
fn both() -> Option<(PathBuf, PathBuf, u64)> {
    let (a, b) = (models::smollm2()?, models::gemma3()?);
    let bytes = |path: &Path| std::fs::metadata(path).expect("the model is there").len();
    let together = bytes(&a) + bytes(&b);
    Some((a, b, together))
}

/// A conversation: a prompt, then the most likely tokens.
struct Talk {
    model: ModelId,
    tokens: Vec<u32>,
}

impl Talk {
    fn begin(engine: &mut Engine, model: ModelId, seed: u32) -> Talk {
        engine
            .prefill(model, 0, &prompt(seed), &mut Spent::default(), |_| true)
            .expect("prefill");
        let tokens = vec![argmax(engine.logits(model, 0))];
        Talk { model, tokens }
    }

    fn go_on(&mut self, engine: &mut Engine, tokens: usize) {
        for _ in 0..tokens {
            let last = self.tokens[self.tokens.len() - 1];
            engine
                .decode(self.model, 0, last, &mut Spent::default())
                .expect("decode");
            self.tokens.push(argmax(engine.logits(self.model, 0)));
        }
    }
}

/// What a model says when it is alone.
fn alone(path: &Path, seed: u32, tokens: usize) -> Vec<u32> {
    let mut engine = Engine::open(path, &options(None)).expect("opens");
    greedy(&mut engine, &prompt(seed), tokens + 1)
}

fn prompt(seed: u32) -> Vec<u32> {
    let token = |i: u32| 900 + (i * 389 + seed * 61) % 20000;
    (0..41).map(token).collect()
}

#[test]
fn models_that_come_and_go_do_not_change_the_others_tokens() {
    let Some((a, b, together)) = both() else {
        return;
    };
    let (expected_a, expected_b) = (alone(&a, 1, 4 * TOKENS), alone(&b, 2, TOKENS));
    for percent in [40, 60, 100] {
        let memory = together * percent / 100;
        let mut engine = Engine::open(&a, &options(Some(memory))).expect("opens");
        let mut talk = Talk::begin(&mut engine, ModelId::FIRST, 1);
        talk.go_on(&mut engine, TOKENS);

        // Loaded while the first one's reads are in flight, and swept in turns with it.
        let second = engine.load(&b, &wishes()).expect("loads");
        assert!(budget(&engine) <= memory, "{percent}%");
        talk.go_on(&mut engine, TOKENS / 2);
        let mut other = Talk::begin(&mut engine, second, 2);
        for step in 0..TOKENS {
            if step % 2 == 0 {
                engine.set_next(second);
            }
            talk.go_on(&mut engine, 1);
            engine.set_next(ModelId::FIRST);
            other.go_on(&mut engine, 1);
        }
        assert_eq!(other.tokens, expected_b, "the second model at {percent}%");

        engine.start_trace();
        other.go_on(&mut engine, 1);
        engine.unload(second).expect("unloads");
        let trace = tempfile::NamedTempFile::new().expect("a file");
        engine.write_trace(trace.path()).expect("written");
        let events = std::fs::read_to_string(trace.path()).expect("text");
        assert!(
            !events.contains("\"ph\":\"X\""),
            "of numbers that are others' now"
        );
        talk.go_on(&mut engine, 2 * TOKENS - TOKENS / 2);
        assert_eq!(talk.tokens, expected_a, "the first model at {percent}%");
        assert_eq!(engine.models().count(), 1);
    }
}

/// Bytes of all lines.
fn budget(engine: &Engine) -> u64 {
    let shares = engine.budget();
    shares.iter().flat_map(|s| &s.lines).map(|l| l.bytes).sum()
}

#[test]
fn the_first_model_goes_and_the_second_stays() {
    let Some((a, b, together)) = both() else {
        return;
    };
    let expected = alone(&b, 3, 2 * TOKENS);
    let memory = together / 2;
    let configured = [(a.clone(), wishes()), (b.clone(), wishes())];
    let mut engine = Engine::new(&configured, &options(Some(memory))).expect("opens");
    assert!(budget(&engine) <= memory);
    let ids: Vec<ModelId> = engine.models().collect();
    let mut gone = Talk::begin(&mut engine, ids[0], 1);
    let mut talk = Talk::begin(&mut engine, ids[1], 3);
    gone.go_on(&mut engine, 3);
    talk.go_on(&mut engine, TOKENS);
    let slots = engine.pool().slots;
    engine.unload(ids[0]).expect("unloads");
    assert!(!engine.has(ids[0]));
    talk.go_on(&mut engine, TOKENS);
    assert_eq!(talk.tokens, expected);

    // Its memory has come to the other, and it can come again.
    let own: u64 = engine.plan(ids[1]).own_bytes();
    assert!(engine.pool().slots > slots && own > 0);
    let back = engine.load(&a, &wishes()).expect("loads");
    assert!(back != ids[0] && engine.pool().slots == slots);
    let mut again = Talk::begin(&mut engine, back, 1);
    again.go_on(&mut engine, 3);
    assert_eq!(again.tokens, gone.tokens);
}

#[test]
fn what_cannot_be_loaded_changes_nothing() {
    let Some((a, b, _)) = both() else {
        return;
    };
    let bytes = std::fs::metadata(&a).expect("the model is there").len();
    let mut engine = Engine::open(&a, &options(Some(bytes * 6 / 10))).expect("opens");
    let mut talk = Talk::begin(&mut engine, ModelId::FIRST, 1);
    let (before, slots) = (budget(&engine), engine.store().slots_in_use());
    let huge = ModelOptions {
        context: Some(32768),
        ..wishes()
    };
    let refused = engine.load(&b, &huge).expect_err("too large").to_string();
    assert!(refused.contains("give at least"), "{refused}");
    engine
        .load(Path::new("/nowhere.gguf"), &wishes())
        .expect_err("no such file");
    assert_eq!(
        (budget(&engine), engine.store().slots_in_use()),
        (before, slots)
    );
    talk.go_on(&mut engine, TOKENS);
    assert_eq!(talk.tokens, alone(&a, 1, TOKENS));
}
