//! Between two tokens nothing is allocated, streaming or resident.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/engine.rs"]
mod engine;
#[path = "support/models.rs"]
mod models;

use std::path::Path;

use airstream::engine::{Engine, ModelId, ModelOptions, Options, Spent};
use engine::open;

#[test]
fn sixty_four_tokens_without_an_allocation() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let model_bytes = std::fs::metadata(&model).expect("the model is there").len();
    for (name, memory) in [
        ("resident", None),
        ("streaming", Some(model_bytes * 6 / 10)),
        ("traced", Some(model_bytes * 6 / 10)),
    ] {
        // Small pages, so that the context crosses into new ones while we count.
        let options = Options {
            memory,
            model: ModelOptions {
                context: Some(512),
                ..ModelOptions::default()
            },
            threads: Some(2),
            ..Options::default()
        };
        let mut engine = open(&model, &options);
        if name == "traced" {
            engine.start_trace();
        }
        let mut spent = Spent::default();
        let prompt: Vec<u32> = (0..40).map(|i| 700 + i * 13).collect();
        engine
            .prefill(ModelId::FIRST, 0, &prompt, &mut spent, |_| true)
            .expect("prefill");
        let fewest = fewest_allocations(|| {
            for token in 500..564 {
                engine
                    .decode(ModelId::FIRST, 0, token, &mut spent)
                    .expect("decode");
            }
            // Prefill obeys the same law.
            engine
                .prefill(ModelId::FIRST, 0, &prompt, &mut spent, |_| true)
                .expect("prefill");
        });
        assert_eq!(fewest, 0, "{name}");
        assert_eq!(
            spent.read_bytes > model_bytes * 2,
            name != "resident",
            "{name}"
        );
    }
    two_models_in_turns(&model);
}

/// Allocations of `work` in the best of at most three rounds.
fn fewest_allocations(mut work: impl FnMut()) -> usize {
    let mut fewest = usize::MAX;
    for _ in 0..3 {
        counting::begin();
        work();
        fewest = fewest.min(counting::end());
        if fewest == 0 {
            break;
        }
    }
    fewest
}

/// Two models in turns: in bursts, so that each pushes the other out, and token by token.
fn two_models_in_turns(first: &Path) {
    let Some(second) = models::gemma3() else {
        return;
    };
    let bytes = |path: &Path| std::fs::metadata(path).expect("the model is there").len();
    let wishes = ModelOptions {
        context: Some(512),
        ..ModelOptions::default()
    };
    let options = Options {
        memory: Some((bytes(first) + bytes(&second)) * 6 / 10),
        threads: Some(2),
        ..Options::default()
    };
    let both = [(first.to_owned(), wishes.clone()), (second, wishes)];
    let mut engine = Engine::new(&both, &options).expect("opens");
    let ids: Vec<ModelId> = engine.models().collect();
    let mut spent = Spent::default();
    let mut token = 500;
    let fewest = fewest_allocations(|| {
        for burst in [4, 4, 1, 1, 1, 1] {
            for place in 0..2 {
                for sweep in 0..burst {
                    if sweep + 1 == burst {
                        engine.set_next(ids[1 - place]);
                    }
                    token += 1;
                    engine
                        .decode(ids[place], 0, token, &mut spent)
                        .expect("decode");
                }
            }
        }
    });
    assert_eq!(fewest, 0, "two models in turns");
}
