//! A scheduler with a clock that the test moves, and clients that may stop reading.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use airstream::Result;
use airstream::engine::request::{Counts, Event, Generate, Reason, Tag};
use airstream::engine::scheduler::{Flow, Limits, Scheduler, Step};
use airstream::engine::{Engine, ModelOptions, Options};
use airstream::error::Kind;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Done(Reason, Counts),
    Failed(Kind),
}

/// What a client was told of one request.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Answer {
    /// (prompt tokens, cached tokens).
    pub accepted: Option<(u32, u32)>,
    pub tokens: Vec<u32>,
    pub text: String,
    pub ending: Option<Ending>,
}

pub struct Serving {
    pub scheduler: Scheduler,
    pub now: Duration,
    pub answers: BTreeMap<Tag, Answer>,
    /// Clients that take nothing at present.
    pub full: BTreeSet<u32>,
}

pub const STEP: Duration = Duration::from_millis(10);

pub fn tag(client: u32, request: u32) -> Tag {
    Tag { client, request }
}

/// How engines are opened here.
pub fn options(sessions: usize, context: usize, memory: Option<u64>) -> Options {
    Options {
        memory,
        threads: Some(1),
        model: ModelOptions {
            context: Some(context),
            sessions,
            logits_rows: sessions,
            ..ModelOptions::default()
        },
        ..Options::default()
    }
}

impl Serving {
    /// A scheduler for models that clients call by these names, of which the first is the one to ask if none is named.
    pub fn open(
        models: &[(&str, impl AsRef<Path>)],
        sessions: usize,
        context: usize,
        memory: Option<u64>,
        limits: Limits,
    ) -> Serving {
        Serving::open_with(models, &options(sessions, context, memory), limits)
    }

    /// The same for an engine that is opened in another way.
    pub fn open_with(
        models: &[(&str, impl AsRef<Path>)],
        options: &Options,
        limits: Limits,
    ) -> Serving {
        let paths: Vec<_> = models
            .iter()
            .map(|(_, path)| (path.as_ref().to_owned(), options.model.clone()))
            .collect();
        let names: Vec<_> = models.iter().map(|(name, _)| (*name, 1)).collect();
        let engine = Engine::new(&paths, options).unwrap_or_else(|e| panic!("{paths:?}: {e}"));
        Serving {
            scheduler: Scheduler::new(engine, &names, limits),
            now: Duration::ZERO,
            answers: BTreeMap::new(),
            full: BTreeSet::new(),
        }
    }

    pub fn submit(&mut self, tag: Tag, request: &Generate) -> Result<()> {
        let vocabulary = self.scheduler.vocabulary(request.model.as_deref())?;
        let prepared = vocabulary.prepare(request)?;
        self.scheduler.submit(tag, prepared, self.now)?;
        assert!(
            self.answers
                .insert(tag, Answer::default())
                .is_none_or(|a| a.ending.is_some())
        );
        Ok(())
    }

    pub fn step(&mut self) -> Step {
        self.now += STEP;
        let (answers, full) = (&mut self.answers, &self.full);
        self.scheduler.step(self.now, &mut |tag, event| {
            // An error is the last word to a client that takes nothing.
            if full.contains(&tag.client)
                && !matches!(
                    event,
                    Event::Error {
                        code: Kind::Stalled,
                        ..
                    }
                )
            {
                return Flow::Full;
            }
            let answer = answers.get_mut(&tag).expect("nobody else asked");
            assert_eq!(answer.ending, None, "{tag:?} was told after its end");
            match event {
                Event::Accepted {
                    prompt_tokens,
                    cached_tokens,
                } => {
                    assert_eq!(answer.accepted, None);
                    answer.accepted = Some((*prompt_tokens, *cached_tokens));
                }
                Event::Token { index, id, text } => {
                    assert!(answer.accepted.is_some());
                    assert_eq!(
                        *index as usize,
                        answer.tokens.len(),
                        "{tag:?} lost an event"
                    );
                    answer.tokens.push(*id);
                    answer.text.push_str(text);
                }
                Event::Done { reason, counts, .. } => {
                    assert_eq!(counts.answer as usize, answer.tokens.len());
                    answer.ending = Some(Ending::Done(*reason, *counts));
                }
                Event::Error { code, .. } => answer.ending = Some(Ending::Failed(*code)),
            }
            Flow::Taken
        })
    }

    /// Steps until nothing is left to do.
    pub fn finish(&mut self) {
        for _ in 0..100_000 {
            if self.step() != Step::Swept {
                return;
            }
        }
        panic!("it goes on for ever: {:?}", self.scheduler.status());
    }

    /// One request after everything else; its answer.
    pub fn ask(&mut self, request: &Generate) -> Answer {
        let tag = tag(9999, self.answers.len() as u32);
        self.submit(tag, request).expect("there is room");
        self.finish();
        self.answers[&tag].clone()
    }
}
