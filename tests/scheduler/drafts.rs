//! Tokens that are computed ahead, because they are likely to come, save sweeps and change no answer.

use airstream::engine::request::Event;
use airstream::engine::scheduler::Flow;
use airstream::engine::{ModelOptions, Options, Spent};

use super::*;

fn open(path: &Path, sessions: usize, context: usize, drafts: usize) -> Serving {
    let usual = serving::options(sessions, context, None);
    let options = Options {
        model: ModelOptions {
            drafts: Some(drafts),
            ..usual.model
        },
        ..usual
    };
    Serving::open_with(&[("m", path)], &options, Limits::default())
}

fn spent(serving: &Serving) -> Spent {
    serving.scheduler.spent(None).expect("the first model")
}

/// Allows few tokens, so that what comes has come before.
fn of_few(request: Generate) -> Generate {
    let logit_bias = [(3, 40.0), (70, 40.0), (71, 40.0)].to_vec();
    Generate {
        sampling: Sampling {
            logit_bias,
            ..request.sampling
        },
        ..request
    }
}

/// Requests whose answers have much and little that repeats: of the likeliest tokens, and drawn from few and many.
fn requests(random: &mut Random) -> Vec<Generate> {
    let request = |i: u64| {
        let tokens = prompt(random, 2 + i % 5 * 17);
        let count = 20 + random.below(80) as u32;
        match i % 3 {
            0 => of_few(greedy(&tokens, count)),
            1 => of_few(seeded(&tokens, count, i)),
            _ => seeded(&tokens, count, i),
        }
    };
    (0..18).map(request).collect()
}

#[test]
fn they_save_sweeps_and_change_no_token() {
    for arch in [Arch::Llama, Arch::Gemma3] {
        let (_folder, path) = model(arch);
        let requests = requests(&mut Random(3));
        let mut without = open(&path, 1, 512, 0);
        let expected: Vec<_> = requests.iter().map(|r| without.ask(r).tokens).collect();
        let slow = spent(&without);
        assert_eq!((slow.drafts, slow.rows), (0, slow.tokens()));
        for sessions in [1, 8] {
            let mut with = open(&path, sessions, 512, 7);
            let slots = with.scheduler.engine().pages_free();
            for (client, request) in requests.iter().enumerate() {
                with.submit(tag(client as u32, 0), request)
                    .expect("room for all");
            }
            with.finish();
            for (client, expected) in expected.iter().enumerate() {
                let answer = &with.answers[&tag(client as u32, 0)];
                assert_eq!(&answer.tokens, expected, "{arch:?}, request {client}");
                assert!(done(Reason::Length)(&answer.ending));
            }
            let fast = spent(&with);
            assert!(fast.drafts_right > 0 && fast.drafts > fast.drafts_right);
            if sessions == 1 {
                assert_eq!(fast.tokens(), slow.tokens());
                let saved = slow.sweeps - fast.sweeps;
                assert_eq!(saved, fast.drafts_right, "each saves a sweep");
                assert!(10 * saved > slow.sweeps, "{saved} of {} saved", slow.sweeps);
            }
            assert_eq!(all_slots(&mut with), slots, "{arch:?}");
        }
    }
}

/// The answer's tokens for a client that takes so many events, and then none for a while.
pub fn read_in_bursts(serving: &mut Serving, request: &Generate, taken: usize) -> Vec<u32> {
    serving.submit(tag(1, 0), request).expect("room");
    let mut tokens = Vec::new();
    let (mut left, mut ended) = (taken, false);
    for step in 0..2000 {
        serving.now += STEP;
        if step % 3 == 0 {
            left = taken;
        }
        serving.scheduler.step(serving.now, &mut |_, event| {
            if left == 0 {
                return Flow::Full;
            }
            left -= 1;
            match event {
                Event::Token { index, id, .. } => {
                    assert_eq!(*index as usize, tokens.len());
                    tokens.push(*id);
                }
                event => ended |= event.is_last(),
            }
            Flow::Taken
        });
    }
    assert!(ended);
    tokens
}

#[test]
fn a_client_that_stops_reading_in_the_middle_of_them_misses_nothing() {
    let (_folder, path) = model(Arch::Llama);
    let request = of_few(greedy(&[5, 6, 7], 120));
    let expected = open(&path, 1, 256, 0).ask(&request).tokens;
    for taken in [1, 2, 3, 5] {
        let mut serving = open(&path, 1, 256, 7);
        let tokens = read_in_bursts(&mut serving, &request, taken);
        assert_eq!(tokens, expected, "{taken} events at a time");
        assert!(taken == 1 || spent(&serving).drafts_right > 0);
    }
}

#[test]
fn an_answer_ends_where_it_would_end_without_them() {
    let (_folder, path) = model(Arch::Llama);
    let ask = |serving: &mut Serving, request: &Generate| {
        let answer = serving.ask(request);
        (answer.tokens, answer.text, answer.ending)
    };
    // At the context's end, at any length, and where the conversation goes on after it.
    let (mut without, mut with) = (open(&path, 2, 96, 0), open(&path, 2, 96, 7));
    for count in [1, 2, 3, 9, 30, 500] {
        let request = of_few(greedy(&[5, 6, 7], count));
        assert_eq!(ask(&mut with, &request), ask(&mut without, &request));
    }
    for turn in 0..3 {
        let request = Generate {
            session: Some("s".into()),
            ..of_few(greedy(&[9, 8, 8 + turn], 20))
        };
        assert_eq!(ask(&mut with, &request), ask(&mut without, &request));
    }
    // A stop string that comes from a draft.
    let text = without.ask(&of_few(greedy(&[5, 6, 7], 60))).text;
    for at in [10, 20, 30] {
        let stop: String = text.chars().skip(at).take(3).collect();
        let request = Generate {
            stop: vec![stop],
            ..of_few(greedy(&[5, 6, 7], 60))
        };
        assert_eq!(ask(&mut with, &request), ask(&mut without, &request));
    }
    assert!(spent(&with).drafts_right > 0);
}
