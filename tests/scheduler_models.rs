//! Several models behind one scheduler: nobody's tokens depend on the others, and free memory is filled while nobody asks.

#[path = "support/serving.rs"]
mod serving;
mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use airstream::engine::Opening;
use airstream::engine::request::{Generate, Prompt, Reason, Sampling};
use airstream::engine::scheduler::{Limits, Step};
use airstream::error::Kind;
use serving::{Answer, Ending, Serving, tag};
use support::synth::{Arch, all_specs, write};
use tempfile::TempDir;

/// A Llama and a Gemma, and the folder that they live in.
fn models() -> (TempDir, [PathBuf; 2]) {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = [Arch::Llama, Arch::Gemma3].map(|arch| {
        let path = folder.path().join(format!("{arch:?}.gguf"));
        let spec = all_specs().into_iter().find(|(_, spec)| spec.arch == arch);
        write(&spec.expect("one of each").1, &path).expect("written");
        path
    });
    (folder, paths)
}

/// A scheduler for models that are called by their places.
fn open(paths: &[&Path], memory: Option<u64>) -> Serving {
    let models: Vec<(&str, &Path)> = ["0", "1"].into_iter().zip(paths.iter().copied()).collect();
    Serving::open(&models, 4, 256, memory, Limits::default())
}

/// The likeliest tokens of a model after a prompt of its number.
fn request(model: usize, number: u32, count: u32) -> Generate {
    let prompt = (0..20 + number).map(|i| (i * 37 + number * 61) % 320);
    Generate {
        model: Some(model.to_string()),
        sampling: Sampling::greedy(),
        max_tokens: Some(count),
        ..Generate::new(Prompt::Tokens(prompt.collect()))
    }
}

fn ended(answer: &Answer, reason: Reason) -> bool {
    matches!(answer.ending, Some(Ending::Done(found, _)) if found == reason)
}

#[test]
fn two_models_answer_in_turns_as_each_does_alone() {
    let (_folder, paths) = models();
    let alone: Vec<Vec<Answer>> = (0..2)
        .map(|model| {
            let mut serving = open(&[&paths[model]], None);
            let ask = |number| {
                let request = Generate {
                    model: None,
                    ..request(model, number, 40)
                };
                serving.ask(&request)
            };
            (0..4).map(ask).collect()
        })
        .collect();
    let both: u64 = paths
        .iter()
        .map(|path| std::fs::metadata(path).expect("it is there").len())
        .sum();
    // All is there, or most of it comes from disk again and again.
    for memory in [None, Some(both / 2 + (6 << 20))] {
        let mut serving = open(&[&paths[0], &paths[1]], memory);
        for number in 0..4 {
            for model in 0..2 {
                serving
                    .submit(tag(model as u32, number), &request(model, number, 40))
                    .expect("there is room");
            }
        }
        // Neither has to wait for the other to be done.
        for _ in 0..40 {
            serving.step();
        }
        let begun = |model| {
            let told = |number| serving.answers[&tag(model, number)].tokens.len();
            (0..4).map(told).sum::<usize>()
        };
        assert!(begun(0) > 0 && begun(1) > 0, "{memory:?}");
        serving.finish();
        for (model, alone) in alone.iter().enumerate() {
            for (number, alone) in alone.iter().enumerate() {
                let answer = &serving.answers[&tag(model as u32, number as u32)];
                assert!(ended(answer, Reason::Length), "{memory:?}");
                assert_eq!(answer.tokens, alone.tokens, "{memory:?} {model} {number}");
            }
        }
    }
}

#[test]
fn a_model_comes_and_goes_between_the_tokens_of_another() {
    let (_folder, paths) = models();
    let (mut serving, mut other) = (open(&[&paths[0]], Some(64 << 20)), open(&[&paths[1]], None));
    let alone = serving.ask(&request(0, 1, 120));
    let from_other = Generate {
        model: None,
        ..request(1, 1, 20)
    };
    let from_other = other.ask(&from_other);
    serving
        .submit(tag(1, 1), &request(0, 1, 120))
        .expect("there is room");
    let step = |serving: &mut Serving| (0..8).for_each(|_| assert_eq!(serving.step(), Step::Swept));
    step(&mut serving);

    // Each step of loading with sweeps in between, on whatever thread.
    let wishes = serving::options(4, 256, None).model;
    let read = || Opening::read(&paths[1], &wishes).expect("a sound model");
    let opening = std::thread::spawn({
        let (path, wishes) = (paths[1].clone(), wishes.clone());
        move || Opening::read(&path, &wishes).expect("a sound model")
    });
    let opening = opening.join().expect("nobody panics");
    step(&mut serving);
    let reserved = serving.scheduler.reserve("1", opening).expect("room");
    step(&mut serving);
    let busy = serving.scheduler.reserve("2", read()).err();
    assert_eq!(busy.map(|e| e.kind()), Some(Kind::Busy));
    let busy = serving.scheduler.set_memory(60 << 20).err();
    assert_eq!(busy.map(|e| e.kind()), Some(Kind::Busy));
    let built = std::thread::spawn(|| reserved.build());
    let built = built.join().expect("nobody panics");
    step(&mut serving);
    serving.scheduler.admit("1", 1, built).expect("built");
    let taken = serving.scheduler.reserve("1", read()).err();
    assert_eq!(taken.map(|e| e.kind()), Some(Kind::Usage));

    serving
        .submit(tag(2, 1), &request(1, 1, 20))
        .expect("there is room");
    while serving.answers[&tag(2, 1)].ending.is_none() {
        assert_eq!(serving.step(), Step::Swept);
    }
    assert_eq!(serving.answers[&tag(2, 1)].tokens, from_other.tokens);
    serving
        .submit(tag(2, 2), &request(1, 2, 200))
        .expect("there is room");
    step(&mut serving);
    let vocabulary = serving
        .scheduler
        .vocabulary(Some("1"))
        .expect("it is there");
    let late = vocabulary.prepare(&request(1, 2, 200)).expect("sound");
    serving
        .scheduler
        .unload("1", serving.now)
        .expect("it is there");
    // Its tokens may be those of another vocabulary now, whatever is called "1".
    let refused = serving.scheduler.submit(tag(2, 3), late, serving.now);
    assert_eq!(refused.map_err(|e| e.kind()), Err(Kind::Busy));
    serving.finish();
    let gone = serving.answers[&tag(2, 2)].ending;
    assert_eq!(gone, Some(Ending::Failed(Kind::Busy)));
    assert_eq!(serving.answers[&tag(1, 1)].tokens, alone.tokens);
}

#[test]
fn a_model_that_cannot_be_built_leaves_everything_as_it_was() {
    let (_folder, paths) = models();
    let mut serving = open(&[&paths[0]], Some(64 << 20));
    let slots = serving.scheduler.engine().pool().slots;
    let wishes = serving::options(4, 256, None).model;
    let opening = Opening::read(&paths[1], &wishes).expect("a sound model");
    let reserved = serving.scheduler.reserve("1", opening).expect("room");
    assert!(reserved.build().is_ok(), "if nothing were wrong");
    let wrong = airstream::Error::new(Kind::Io, "the disk is gone", "look for it");
    let refused = serving.scheduler.admit("1", 1, Err(wrong)).err();
    assert_eq!(refused.map(|e| e.kind()), Some(Kind::Io));
    assert_eq!(serving.scheduler.engine().pool().slots, slots);
    assert!(ended(&serving.ask(&request(0, 1, 20)), Reason::Length));
}

#[test]
fn memory_fills_while_nobody_asks() {
    let (_folder, paths) = models();
    let mut serving = open(&[&paths[0], &paths[1]], None);
    let begun = std::time::Instant::now();
    loop {
        match serving.step() {
            Step::Swept => panic!("nobody asked"),
            Step::Idle { until: None } => break,
            Step::Idle { until: Some(until) } => {
                assert!(until > serving.now, "it would not sleep");
                std::thread::sleep(until - serving.now);
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
    let engine = serving.scheduler.engine();
    for model in engine.models() {
        let resident = engine.store().resident_bytes_of(model);
        assert!(resident >= engine.weight_bytes(model), "{resident} bytes");
    }
    assert_eq!(serving.scheduler.spent(None).expect("a model").sweeps, 0);
}
