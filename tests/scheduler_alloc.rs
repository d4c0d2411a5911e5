//! Between two tokens nothing is allocated while sessions come and go, share beginnings, stop, and are cancelled.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/pair.rs"]
mod pair;
mod support;

use std::time::Duration;

use airstream::engine::request::{Event, Generate, Prompt, Sampling, Tag};
use airstream::engine::scheduler::{Flow, Limits, Scheduler};
use airstream::engine::{Engine, ModelOptions, Options, Prepared};
use airstream::format::quant::QuantType;
use pair::write_pair;
use support::synth::{Arch, all_specs, write};

/// Requests of all kinds: greedy and not, with common beginnings, long and short answers, in sessions and not.
fn requests(scheduler: &Scheduler, round: u32) -> Vec<Prepared> {
    let vocabulary = scheduler.vocabulary(None).expect("the first model");
    let request = |i: u32| {
        let beginning = (0..40).map(|t| (t * 7 + i % 3) % 320);
        let own = (0..i % 7).map(|t| (t * 11 + i + round) % 320);
        let sampling = Sampling {
            // Hot enough for answers that do not repeat themselves.
            temperature: (i % 2) as f32 * 3.0,
            top_k: i % 3 * 20,
            frequency_penalty: 0.5,
            ..Sampling::default()
        };
        let request = Generate {
            session: i.is_multiple_of(5).then(|| format!("s{}", i % 10)),
            sampling,
            max_tokens: Some(3 + i * 5 % 40),
            ..Generate::new(Prompt::Tokens(beginning.chain(own).collect()))
        };
        vocabulary.prepare(&request).expect("a sound request")
    };
    (0..16).map(request).collect()
}

#[test]
fn sixty_four_sweeps_with_sessions_that_come_and_go() {
    let folder = tempfile::tempdir().expect("a folder");
    for (arch, drafted) in [
        (Arch::Llama, false),
        (Arch::Gemma3, false),
        (Arch::Llama, true),
    ] {
        let path = folder.path().join(format!("{arch:?}.gguf"));
        let spec = all_specs().into_iter().find(|(_, spec)| spec.arch == arch);
        let mut spec = spec.expect("one of each").1;
        let drafter = folder.path().join("drafter.gguf");
        if drafted {
            (spec.layers, spec.qtype) = (16, QuantType::F32);
            write_pair(&spec, &path, &drafter).expect("written");
        } else {
            write(&spec, &path).expect("written");
        }
        // Of few answers it is asked sooner.
        let sessions = if drafted { 2 } else { 8 };
        let options = Options {
            threads: Some(2),
            model: ModelOptions {
                context: Some(256),
                sessions,
                logits_rows: sessions,
                draft_model: drafted.then_some(drafter),
                ..ModelOptions::default()
            },
            ..Options::default()
        };
        let engine = Engine::open(&path, &options).expect("a sound model");
        let mut scheduler = Scheduler::new(engine, &[("m", 1)], Limits::default());
        let mut now = Duration::ZERO;
        let mut told = [0_usize; 4];
        let mut drafting_before = Duration::ZERO;
        // The first round warms up.
        let rounds = (0..5).map(|round| {
            let mut coming = requests(&scheduler, round);
            counting::begin();
            for sweep in 0..64_u32 {
                if sweep % 4 != 3
                    && let Some(prepared) = coming.pop()
                {
                    let tag = Tag {
                        client: coming.len() as u32,
                        request: round,
                    };
                    scheduler.submit(tag, prepared, now).expect("there is room");
                }
                if sweep == 20 {
                    scheduler.cancel(
                        Tag {
                            client: 12,
                            request: round,
                        },
                        now,
                    );
                }
                now += Duration::from_millis(5);
                scheduler.step(now, &mut |tag, event| {
                    // The third client takes nothing for a while.
                    if tag.client == 3 && sweep < 50 {
                        return Flow::Full;
                    }
                    told[match event {
                        Event::Accepted { .. } => 0,
                        Event::Token { .. } => 1,
                        Event::Done { .. } => 2,
                        Event::Error { .. } => 3,
                    }] += 1;
                    Flow::Taken
                });
            }
            let allocations = counting::end();
            let drafting = scheduler.spent(None).expect("the first model").drafting;
            let drafting = drafting - std::mem::replace(&mut drafting_before, drafting);
            for client in 0..16 {
                scheduler.cancel_client(client, now);
            }
            (allocations, drafting > Duration::ZERO)
        });
        // One with drafts where there is a draft model, or it would show nothing of it.
        let rounds = rounds.skip(1).filter(|(_, drafts)| *drafts == drafted);
        let fewest = rounds.map(|(allocations, _)| allocations).min();
        assert_eq!(fewest, Some(0), "{arch:?}, {drafted}");
        let [accepted, tokens, done, errors] = told;
        let least = if drafted {
            [20, 200, 10]
        } else {
            [50, 500, 20]
        };
        assert!(
            accepted > least[0] && tokens > least[1] && done > least[2] && errors == 0,
            "{told:?}"
        );
    }
}
