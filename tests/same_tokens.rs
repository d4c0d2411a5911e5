//! Budget, threads, batches and instruction sets change the speed and never the tokens.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/greedy.rs"]
mod greedy;
#[path = "support/models.rs"]
mod models;

use airstream::engine::{ModelId, ModelOptions, Options, Precision, Row, Spent, Wanted};
use engine::open;
use greedy::{argmax, greedy};

const TOKENS: usize = 24;

fn prompt() -> Vec<u32> {
    (0..97u32).map(|i| 1000 + i * 389 % 30000).collect()
}

fn options() -> Options {
    at(Precision::default())
}

fn at(activations: Precision) -> Options {
    Options {
        model: ModelOptions {
            context: Some(256),
            activations,
            ..ModelOptions::default()
        },
        threads: Some(2),
        ..Options::default()
    }
}

#[test]
fn budget_threads_and_chunks_do_not_change_the_tokens() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let expected = greedy(&mut open(&model, &options()), &prompt(), TOKENS);
    let model_bytes = std::fs::metadata(&model).expect("the model is there").len();
    let mut variants = Vec::new();
    for percent in [40, 60, 100] {
        variants.push((
            format!("{percent}% memory"),
            Options {
                memory: Some(model_bytes * percent / 100),
                ..options()
            },
        ));
    }
    for threads in [1, 3] {
        variants.push((
            format!("{threads} threads"),
            Options {
                threads: Some(threads),
                ..options()
            },
        ));
    }
    for rows in [1, 7, 64] {
        let memory = Some(model_bytes * 6 / 10);
        variants.push((
            format!("chunks of {rows}"),
            Options {
                model: ModelOptions {
                    rows: Some(rows),
                    ..options().model
                },
                memory,
                ..options()
            },
        ));
    }
    for (name, options) in variants {
        let limited = options.memory.is_some();
        let mut engine = open(&model, &options);
        assert_eq!(greedy(&mut engine, &prompt(), TOKENS), expected, "{name}");
        // With a full context even a budget of the model's size streams a little.
        assert_eq!(
            engine.plan(ModelId::FIRST).residency.given_up() > 0,
            limited,
            "{name}"
        );
    }
}

#[test]
fn nor_do_they_with_activations_of_8_bits() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let options = at(Precision::Bits8);
    let expected = greedy(&mut open(&model, &options), &prompt(), TOKENS);
    let memory = std::fs::metadata(&model).expect("the model is there").len() * 6 / 10;
    for (threads, rows) in [(1, 7), (2, 64), (3, 1)] {
        let options = Options {
            model: ModelOptions {
                rows: Some(rows),
                ..options.model.clone()
            },
            memory: Some(memory),
            threads: Some(threads),
            ..options.clone()
        };
        let got = greedy(&mut open(&model, &options), &prompt(), TOKENS);
        assert_eq!(got, expected, "{threads} threads, chunks of {rows}");
    }
}

#[test]
fn neighbours_in_the_batch_do_not_change_the_tokens() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let mut alone = open(&model, &options());
    let prompts: Vec<Vec<u32>> = (0..3u32)
        .map(|s| {
            (0..5 + 11 * s)
                .map(|i| 500 + (s * 31 + i) * 389 % 30000)
                .collect()
        })
        .collect();
    let expected: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| {
            alone.clear(ModelId::FIRST, 0);
            greedy(&mut alone, prompt, TOKENS)
        })
        .collect();

    let mut together = open(
        &model,
        &Options {
            model: ModelOptions {
                sessions: 3,
                logits_rows: 3,
                ..options().model
            },
            ..options()
        },
    );
    let mut spent = Spent::default();
    let mut got = vec![Vec::new(); 3];
    // The second and the third join while the ones before them are decoding.
    for step in 0..TOKENS + 4 {
        let mut rows = Vec::new();
        let mut wants = Vec::new();
        for session in 0..3 {
            if step == 2 * session {
                let prompt = &prompts[session];
                let last = prompt.len() - 1;
                rows.extend(prompt.iter().enumerate().map(|(i, &token)| Row {
                    session,
                    token,
                    wanted: match i == last {
                        true => Wanted::Logits,
                        false => Wanted::Nothing,
                    },
                }));
                wants.push(session);
            } else if step > 2 * session && got[session].len() < TOKENS {
                rows.push(Row {
                    session,
                    token: got[session][got[session].len() - 1],
                    wanted: Wanted::Logits,
                });
                wants.push(session);
            }
        }
        if rows.is_empty() {
            break;
        }
        together
            .sweep(ModelId::FIRST, &rows, &mut spent)
            .expect("a mixed batch");
        for (index, session) in wants.into_iter().enumerate() {
            let token = argmax(together.logits(ModelId::FIRST, index));
            got[session].push(token);
        }
    }
    assert_eq!(got, expected);
}
