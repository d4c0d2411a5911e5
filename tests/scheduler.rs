//! Many requests at a time: what each is answered does not depend on the others, nobody waits for ever, nothing leaks.

#[path = "scheduler/drafter.rs"]
mod drafter;
#[path = "scheduler/drafts.rs"]
mod drafts;
#[path = "scheduler/memory.rs"]
mod memory;
#[path = "support/models.rs"]
mod models;
#[path = "scheduler/not_finite.rs"]
mod not_finite;
#[path = "support/pair.rs"]
mod pair;
#[path = "support/random.rs"]
mod random;
#[path = "support/serving.rs"]
mod serving;
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use airstream::engine::Loaded;
use airstream::engine::request::{Generate, Prompt, Reason, Sampling};
use airstream::engine::scheduler::{Limits, SessionState, Step};
use airstream::error::Kind;
use random::Random;
use serving::{Ending, STEP, Serving, tag};
use support::synth::{Arch, all_specs, write};
use tempfile::TempDir;

/// A small model, and the folder that it lives in.
fn model(arch: Arch) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    let spec = all_specs().into_iter().find(|(_, spec)| spec.arch == arch);
    write(&spec.expect("one of each").1, &path).expect("written");
    (folder, path)
}

fn prompt(random: &mut Random, tokens: u64) -> Vec<u32> {
    (0..tokens).map(|_| random.below(320) as u32).collect()
}

/// A request for `count` of the likeliest tokens after `prompt`.
fn greedy(prompt: &[u32], count: u32) -> Generate {
    Generate {
        sampling: Sampling::greedy(),
        max_tokens: Some(count),
        ..Generate::new(Prompt::Tokens(prompt.to_vec()))
    }
}

/// The same, but chosen at random from a seed.
fn seeded(prompt: &[u32], count: u32, seed: u64) -> Generate {
    Generate {
        sampling: Sampling {
            seed: Some(seed),
            repeat_penalty: 1.1,
            ..Sampling::default()
        },
        ..greedy(prompt, count)
    }
}

/// The least memory that the model can be opened with.
fn least_memory(path: &Path, sessions: usize, context: usize) -> u64 {
    let options = serving::options(sessions, context, Some(1));
    let refused = Loaded::read(path).and_then(|loaded| loaded.plan(&options));
    let remedy = refused.expect_err("a byte is too little").to_string();
    let mib = remedy
        .split("--memory ")
        .nth(1)
        .and_then(|rest| rest.split("MiB").next());
    let mib = mib.and_then(|mib| mib.parse::<u64>().ok());
    mib.expect("it says what would do") << 20
}

/// Rows computed so far.
fn rows(serving: &Serving) -> u64 {
    serving.scheduler.spent(None).expect("the first model").rows
}

/// Lets all idle sessions time out; slots that pages may take then.
fn all_slots(serving: &mut Serving) -> usize {
    serving.now += Duration::from_secs(1 << 30);
    serving.finish();
    assert_eq!(serving.scheduler.status().models[0].sessions, []);
    serving.scheduler.engine().pages_free()
}

fn done(reason: Reason) -> impl Fn(&Option<Ending>) -> bool {
    move |ending| matches!(ending, Some(Ending::Done(found, _)) if *found == reason)
}

#[test]
fn an_answer_is_the_same_alone_and_among_seven_others() {
    for arch in [Arch::Llama, Arch::Gemma3] {
        let (_folder, path) = model(arch);
        let mut random = Random(7);
        let requests: Vec<Generate> = (0..24)
            .map(|i| {
                let tokens = prompt(&mut random, 1 + i % 5 * 40);
                let count = 1 + random.below(40) as u32;
                match i % 2 {
                    0 => greedy(&tokens, count),
                    _ => seeded(&tokens, count, i),
                }
            })
            .collect();
        let mut alone = Serving::open(&[("m", &path)], 1, 512, None, Limits::default());
        let expected: Vec<Vec<u32>> = requests
            .iter()
            .map(|request| alone.ask(request).tokens)
            .collect();

        let mut together = Serving::open(&[("m", &path)], 8, 512, None, Limits::default());
        let mut left: Vec<usize> = (0..requests.len()).collect();
        while !left.is_empty() {
            if random.once_in(3) {
                let index = left.swap_remove(random.below(left.len() as u64) as usize);
                together
                    .submit(tag(index as u32, 0), &requests[index])
                    .expect("room for all");
            }
            together.step();
        }
        together.finish();
        for (index, expected) in expected.iter().enumerate() {
            let answer = &together.answers[&tag(index as u32, 0)];
            assert_eq!(&answer.tokens, expected, "{arch:?}, request {index}");
            assert!(done(Reason::Length)(&answer.ending));
        }
    }
}

#[test]
fn a_common_beginning_is_computed_once_and_no_slot_is_lost() {
    for arch in [Arch::Llama, Arch::Gemma3] {
        let (_folder, path) = model(arch);
        let mut random = Random(11);
        let system = prompt(&mut random, 150);
        let requests: Vec<Generate> = (0..6)
            .map(|i| {
                let own = prompt(&mut random, 5 + i);
                greedy(&[&system[..], &own].concat(), 12)
            })
            .collect();
        let mut apart = Serving::open(
            &[("m", &path)],
            1,
            512,
            None,
            Limits {
                kept: Duration::ZERO,
                ..Limits::default()
            },
        );
        let expected: Vec<Vec<u32>> = requests
            .iter()
            .map(|request| apart.ask(request).tokens)
            .collect();
        let all_rows = rows(&apart);

        let mut shared = Serving::open(&[("m", &path)], 8, 512, None, Limits::default());
        let slots = shared.scheduler.engine().pages_free();
        for (index, request) in requests.iter().enumerate() {
            // Some at once, some when the first are done.
            shared
                .submit(tag(index as u32, 0), request)
                .expect("room for all");
            if index >= 3 {
                shared.finish();
            }
        }
        shared.finish();
        for (index, expected) in expected.iter().enumerate() {
            let answer = &shared.answers[&tag(index as u32, 0)];
            assert_eq!(&answer.tokens, expected, "{arch:?}, request {index}");
            let cached = answer.accepted.expect("accepted").1;
            // A window gives up what it has passed, so there the beginning may be gone once an answer is long.
            if arch == Arch::Llama {
                assert_eq!(cached >= 150, index > 0, "request {index}: {cached} cached");
            }
        }
        if arch == Arch::Llama {
            assert!(
                rows(&shared) + 5 * 150 <= all_rows,
                "{} of {all_rows} rows",
                rows(&shared)
            );
        }
        assert_eq!(all_slots(&mut shared), slots, "{arch:?}");
    }
}

#[test]
fn a_session_goes_on_and_begins_anew_after_a_reset() {
    let (_folder, path) = model(Arch::Llama);
    let mut serving = Serving::open(&[("m", &path)], 2, 256, None, Limits::default());
    let slots = serving.scheduler.engine().pages_free();
    let mut talk: Vec<u32> = (1..40).collect();
    let named = |tokens: &[u32]| Generate {
        session: Some("nav".into()),
        ..greedy(tokens, 5)
    };
    let first = serving.ask(&named(&talk));
    talk.extend(&first.tokens);
    talk.extend([200, 201]);
    let second = serving.ask(&named(&talk));
    // The last token of an answer is no row yet.
    assert_eq!(second.accepted, Some((46, 43)));
    assert_eq!(
        second.tokens,
        Serving::open(&[("m", &path)], 1, 256, None, Limits::default())
            .ask(&greedy(&talk, 5))
            .tokens
    );

    // What differs from what the session holds makes way.
    let other: Vec<u32> = (1..30).chain([7, 7]).collect();
    let third = serving.ask(&named(&other));
    assert_eq!(third.accepted, Some((31, 29)));

    serving.scheduler.reset(None, "nav").expect("it is idle");
    assert_eq!(serving.ask(&named(&talk)).accepted, Some((46, 0)));
    let refused = serving
        .scheduler
        .reset(None, "map")
        .expect_err("no such session")
        .to_string();
    assert!(refused.contains("map"), "{refused}");
    assert_eq!(all_slots(&mut serving), slots);
}

#[test]
fn a_cancelled_request_ends_at_once_and_its_session_goes_on() {
    let (_folder, path) = model(Arch::Llama);
    let mut serving = Serving::open(&[("m", &path)], 2, 256, None, Limits::default());
    let named = |tokens: &[u32]| Generate {
        session: Some("s".into()),
        ..greedy(tokens, 200)
    };
    let talk: Vec<u32> = (1..40).collect();
    // While it waits, before its first row, and after any number of tokens.
    for steps in 0..6 {
        serving.submit(tag(1, steps), &named(&talk)).expect("room");
        for _ in 0..steps {
            serving.step();
        }
        assert!(serving.scheduler.cancel(tag(1, steps), serving.now));
        let told = serving.answers[&tag(1, steps)].tokens.len();
        serving.step();
        let answer = &serving.answers[&tag(1, steps)];
        assert!(done(Reason::Cancelled)(&answer.ending), "{answer:?}");
        assert_eq!(answer.tokens.len(), told, "a token after the end");
        assert!(!serving.scheduler.cancel(tag(1, steps), serving.now));
    }
    let end = serving.ask(&Generate {
        max_tokens: Some(3),
        ..named(&talk)
    });
    assert_eq!(end.tokens.len(), 3);
    assert_eq!(
        end.tokens,
        Serving::open(&[("m", &path)], 1, 256, None, Limits::default())
            .ask(&greedy(&talk, 3))
            .tokens
    );

    // A client that goes takes all its requests along, told of or not.
    serving
        .submit(tag(5, 0), &greedy(&[1, 2, 3], 100))
        .expect("room");
    serving
        .submit(tag(5, 1), &greedy(&[4, 5, 6], 100))
        .expect("room");
    serving.step();
    serving.scheduler.cancel_client(5, serving.now);
    assert!(matches!(serving.step(), Step::Idle { .. }));
    assert_eq!(serving.answers[&tag(5, 0)].ending, None);
}

#[test]
fn a_conversation_that_goes_on_makes_way_for_nobody() {
    let (_folder, path) = model(Arch::Llama);
    let named = |tokens: &[u32]| Generate {
        session: Some("s".into()),
        ..greedy(tokens, 5)
    };
    let open = || Serving::open(&[("m", &path)], 1, 256, None, Limits::default());
    let mut alone = open();
    let first = alone.ask(&named(&[1, 2, 3])).tokens;
    let whole: Vec<u32> = [1, 2, 3]
        .into_iter()
        .chain(first.clone())
        .chain([7, 8])
        .collect();
    let second = alone.ask(&named(&whole)).tokens;
    // Others wait for the only session too, longer than who goes on in it.
    let mut serving = open();
    for (client, request) in [
        named(&[1, 2, 3]),
        greedy(&[4, 5, 6], 5),
        greedy(&[5, 6, 7], 5),
        named(&whole),
    ]
    .iter()
    .enumerate()
    {
        serving
            .submit(tag(client as u32, 0), request)
            .expect("room");
    }
    serving.finish();
    let last = &serving.answers[&tag(3, 0)];
    assert_eq!(
        (&last.tokens, &serving.answers[&tag(0, 0)].tokens),
        (&second, &first)
    );
    assert!(
        last.accepted.is_some_and(|(_, cached)| cached >= 7),
        "{last:?}"
    );
}

#[test]
fn what_cannot_be_is_refused_at_once() {
    let (_folder, path) = model(Arch::Llama);
    let limits = Limits {
        requests: 3,
        ..Limits::default()
    };
    let mut serving = Serving::open(&[("m", &path)], 1, 64, None, limits);
    let error = serving
        .submit(tag(1, 0), &greedy(&[1; 64], 1))
        .expect_err("too long");
    assert_eq!(error.kind(), Kind::Budget);
    assert!(error.remedy().contains("at most 63 tokens"), "{error}");
    let unknown = Generate {
        model: Some("n".into()),
        ..greedy(&[1], 1)
    };
    assert!(
        serving
            .submit(tag(1, 0), &unknown)
            .expect_err("no such model")
            .remedy()
            .contains("one of m")
    );
    assert!(
        serving.submit(tag(1, 0), &greedy(&[1, 999], 1)).is_err(),
        "no such token"
    );
    assert!(
        serving.submit(tag(1, 0), &greedy(&[], 1)).is_err(),
        "no prompt"
    );
    let text = Generate::new(Prompt::Text("Hi".into()));
    assert_eq!(
        serving
            .submit(tag(1, 0), &text)
            .expect_err("no vocabulary")
            .kind(),
        Kind::Unsupported
    );

    for request in 0..3 {
        serving
            .submit(tag(1, request), &greedy(&[1, 2], 3))
            .expect("the table has room");
    }
    assert_eq!(
        serving
            .submit(tag(1, 3), &greedy(&[1, 2], 3))
            .expect_err("full")
            .kind(),
        Kind::Busy
    );
    serving.step();
    assert_eq!(serving.scheduler.status().waiting, 2);
    serving.finish();
    let long = serving.ask(&greedy(&[1; 60], 100));
    assert!(done(Reason::Context)(&long.ending));
    assert_eq!(
        long.tokens.len(),
        5,
        "the last is chosen from the last position"
    );
}

#[test]
fn a_client_that_does_not_read_delays_nobody_and_loses_nothing() {
    let (_folder, path) = model(Arch::Llama);
    let limits = Limits {
        stalled: Duration::from_secs(5),
        ..Limits::default()
    };
    let mut serving = Serving::open(&[("m", &path)], 4, 256, None, limits);
    let request = |client: u32| greedy(&[client, 2, 3], 30);
    let expected: Vec<Vec<u32>> = (0..3)
        .map(|client| serving.ask(&request(client)).tokens)
        .collect();

    for client in 0..3 {
        serving
            .submit(tag(client, 0), &request(client))
            .expect("room");
    }
    for _ in 0..5 {
        serving.step();
    }
    let told = serving.answers[&tag(0, 0)].tokens.len();
    serving.full.extend([0, 1]);
    for _ in 0..40 {
        serving.step();
    }
    assert!(
        done(Reason::Length)(&serving.answers[&tag(2, 0)].ending),
        "the others went on"
    );
    assert_eq!(serving.answers[&tag(0, 0)].tokens.len(), told);
    assert_eq!(serving.scheduler.status().stalled, 2);
    let until = loop {
        match serving.step() {
            // Weights that are still on their way are looked after sooner.
            Step::Idle { until: Some(until) } if until > serving.now + STEP => break until,
            Step::Idle { .. } => {}
            Step::Swept => panic!("nothing can be done while nobody reads"),
        }
    };
    serving.full.remove(&0);
    serving.finish();
    for client in [0, 2] {
        assert_eq!(
            serving.answers[&tag(client, 0)].tokens,
            expected[client as usize]
        );
    }
    // The other one never reads again.
    serving.now = until;
    serving.step();
    assert_eq!(
        serving.answers[&tag(1, 0)].ending,
        Some(Ending::Failed(Kind::Stalled))
    );
    let status = serving.scheduler.status();
    assert!(
        status.models[0]
            .sessions
            .iter()
            .all(|s| s.state == SessionState::Idle)
    );
}

#[test]
fn those_who_ask_for_the_same_get_the_same() {
    let (_folder, path) = model(Arch::Llama);
    let mut serving = Serving::open(&[("m", &path)], 4, 512, None, Limits::default());
    for client in 0..4 {
        let tokens: Vec<u32> = (0..300).map(|i| (i * 7 + client * 31) % 320).collect();
        serving
            .submit(tag(client, 0), &greedy(&tokens, 60))
            .expect("room");
    }
    let mut most = 0;
    for _ in 0..80 {
        serving.step();
        let counts: BTreeMap<_, _> = serving
            .answers
            .iter()
            .map(|(tag, a)| (tag, a.tokens.len()))
            .collect();
        let (least, most_now) = (counts.values().min(), counts.values().max());
        most = most.max(*most_now.unwrap_or(&0));
        if least > Some(&0) {
            assert!(
                least.zip(most_now).is_some_and(|(a, b)| b - a <= 8),
                "{counts:?}"
            );
        }
    }
    assert_eq!(most, 60);
    // A newcomer with a long prompt gets on while others write.
    for client in 10..13 {
        serving
            .submit(tag(client, 0), &greedy(&[client, 1], 400))
            .expect("room");
    }
    for _ in 0..5 {
        serving.step();
    }
    let late: Vec<u32> = (0..400).map(|i| (i * 11) % 320).collect();
    serving.submit(tag(20, 0), &greedy(&late, 5)).expect("room");
    let before = serving.answers[&tag(10, 0)].tokens.len();
    while serving.answers[&tag(20, 0)].ending.is_none() {
        serving.step();
    }
    let between = serving.answers[&tag(10, 0)].tokens.len() - before;
    assert!((5..390).contains(&between), "{between} tokens meanwhile");
}

/// A thousand steps of everything that clients do.
#[test]
fn whatever_clients_do_every_request_ends_and_all_slots_come_back() {
    for (arch, seed) in [(Arch::Llama, 1), (Arch::Gemma3, 2), (Arch::Qwen3, 3)] {
        let (_folder, path) = model(arch);
        let limits = Limits {
            requests: 12,
            stalled: Duration::from_millis(700),
            idle: Duration::from_secs(2),
            kept: Duration::from_secs(1),
            ..Limits::default()
        };
        let mut serving = Serving::open(&[("m", &path)], 5, 256, None, limits);
        let slots = serving.scheduler.engine().pages_free();
        let mut random = Random(seed);
        let mut gone = Vec::new();
        let mut requests = BTreeMap::new();
        let beginnings: Vec<Vec<u32>> = (0..3).map(|_| prompt(&mut random, 60)).collect();
        for step in 0..1000 {
            let client = random.below(6) as u32;
            match random.below(10) {
                0..4 => {
                    let mut tokens =
                        beginnings[random.below(3) as usize][..random.below(60) as usize].to_vec();
                    let own = 1 + random.below(30);
                    tokens.extend(prompt(&mut random, own));
                    let request = Generate {
                        session: random.once_in(3).then(|| format!("s{}", random.below(7))),
                        ..seeded(&tokens, 1 + random.below(30) as u32, seed)
                    };
                    match serving.submit(tag(client, step), &request) {
                        Ok(()) => drop(requests.insert(tag(client, step), request)),
                        Err(error) => assert_eq!(error.kind(), Kind::Busy, "{error}"),
                    }
                }
                4 => {
                    let unended = serving.answers.iter().filter(|(_, a)| a.ending.is_none());
                    let tags: Vec<_> = unended.map(|(tag, _)| *tag).collect();
                    if let Some(&tag) = tags.get(random.below(1 + tags.len() as u64) as usize) {
                        serving.scheduler.cancel(tag, serving.now);
                    }
                }
                5 => {
                    let name = format!("s{}", random.below(7));
                    if let Err(error) = serving.scheduler.reset(None, &name) {
                        assert!([Kind::Usage, Kind::Busy].contains(&error.kind()), "{error}");
                    }
                }
                6 if !serving.full.remove(&client) && random.once_in(3) => {
                    serving.full.insert(client);
                }
                7 if random.once_in(4) => {
                    serving.scheduler.cancel_client(client, serving.now);
                    gone.extend(
                        serving
                            .answers
                            .keys()
                            .filter(|tag| tag.client == client)
                            .copied(),
                    );
                }
                _ => {}
            }
            serving.step();
        }
        serving.full.clear();
        serving.finish();
        let mut ends = [0; 3];
        let mut alone = Serving::open(&[("m", &path)], 1, 256, None, Limits::default());
        for (tag, answer) in &serving.answers {
            let request = &requests[tag];
            let whole = alone
                .ask(&Generate {
                    session: None,
                    ..request.clone()
                })
                .tokens;
            assert!(
                whole.starts_with(&answer.tokens),
                "{tag:?} was told of another's answer"
            );
            match answer.ending {
                Some(Ending::Done(Reason::Cancelled, _)) => ends[1] += 1,
                Some(Ending::Done(..)) => ends[0] += 1,
                Some(Ending::Failed(kind)) => {
                    assert_eq!(kind, Kind::Stalled);
                    ends[2] += 1;
                }
                None => assert!(gone.contains(tag), "{tag:?} was never ended"),
            }
        }
        assert!(ends[0] > 80 && ends[1] > 10 && ends[2] > 0, "{ends:?}");
        assert_eq!(all_slots(&mut serving), slots, "{arch:?}");
    }
}
