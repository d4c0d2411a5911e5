//! The scheduler: many requests, several models, one sweep after the other.
//!
//! Connection threads make requests ready by a shared [`Vocabulary`]; the thread that owns the engine submits them
//! here and calls [`Scheduler::step`] over and over. A step makes one sweep of one model: a row for every answer that
//! is being written, and rows of prompts as far as they do not delay those too much ([`Limits::neighbour_factor`]).
//! What comes of it goes out through the sink. A sink that takes no event holds up its own request and no other.
//!
//! Time is an argument, so that tests can make it. All memory is taken when the scheduler is made and, for a request,
//! by the thread that prepares it: between two tokens nothing is allocated.

mod batch;
mod drafter;
mod drafts;
mod lookup;
mod models;
mod pace;
mod request;
mod sessions;
mod speculation;
mod start;
mod status;
mod sweep;
mod turns;

use std::sync::Arc;
use std::time::Duration;

use super::request::{Event, Reason, Tag};
use super::{Engine, ModelId, Row, Spent, Vocabulary};
use crate::engine::Prepared;
use crate::engine::vocabulary::Length;
use crate::error::{Error, Kind, Result};
use crate::text::SamplerScratch;
use batch::Want;
use drafter::Drafter;
use pace::Pace;
use request::{End, Request, State, Told};
use sessions::{Sessions, Use};
use speculation::{Candidate, Trust};
use turns::Turns;

pub use speculation::DRAFTS_MAX;
pub use status::{ModelStatus, SessionState, SessionStatus, Status};

/// How often reads are looked after while nobody asks for anything.
const READS_EVERY: Duration = Duration::from_millis(1);

/// What the scheduler holds itself to.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Requests at a time, those that wait included.
    pub requests: usize,
    /// How long a client may take no event before its request is given up.
    pub stalled: Duration,
    /// How long a named session is kept after its last answer.
    pub idle: Duration,
    /// How long the conversation of a request without a session is kept for others that begin like it. Where weights
    /// stream it goes with the next sweep, unless the next request begins like it.
    pub kept: Duration,
    /// How many times as long as without them a sweep may take for prompt rows beside answers that are being written.
    pub neighbour_factor: f32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            requests: 64,
            stalled: Duration::from_secs(30),
            idle: Duration::from_secs(3600),
            kept: Duration::from_secs(300),
            neighbour_factor: 2.0,
        }
    }
}

/// What a sink answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// The event is on its way to the client.
    Taken,
    /// There is no room for it now: the request pauses, and the event comes again in later steps.
    Full,
    /// The client is gone: its request ends, and nothing more is told of it.
    Gone,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It made a sweep; there may be more to do at once.
    Swept,
    /// There is nothing to do until a request is submitted, a full sink has room again, or this time has come.
    Idle {
        /// When something times out, or reads that fill memory meanwhile should be looked after.
        until: Option<Duration>,
    },
}

/// A model as the scheduler sees it.
struct Hosted {
    id: ModelId,
    vocabulary: Arc<Vocabulary>,
    sessions: Sessions,
    pace: Pace,
    spent: Spent,
    /// Seconds of its last sweep.
    last_s: f64,
    /// Sweeps so far, by which turns go round.
    turn: usize,
    /// How likely drafts are right, for requests that come.
    trust: Trust,
    drafter: Option<Drafter>,
}

/// Memory that sweeps use and leave.
struct Scratch {
    sampler: SamplerScratch,
    /// For each request with rows: its place in the table, what it wants and what it gets.
    who: Vec<usize>,
    wants: Vec<Want>,
    takes: Vec<usize>,
    /// For each request with rows: how many drafts it has beside.
    drafts: Vec<usize>,
    candidates: Vec<Candidate>,
    rows: Vec<Row>,
}

/// Requests, and the engine that answers them. See the [module](self).
pub struct Scheduler {
    engine: Engine,
    limits: Limits,
    models: Vec<Hosted>,
    turns: Turns,
    /// In the order in which they came.
    requests: Vec<Request>,
    scratch: Scratch,
    /// Nothing was computed since checksums were saved last.
    rested: bool,
}

impl Scheduler {
    /// A scheduler for the models of `engine`, which clients call by `names` (in the engine's order), each with its
    /// priority: a model of priority 2 has twice the time of one of priority 1 when both have work.
    ///
    /// Each model has as many sessions as it was opened with.
    pub fn new(engine: Engine, names: &[(&str, u8)], limits: Limits) -> Scheduler {
        let ids: Vec<ModelId> = engine.models().collect();
        assert_eq!(ids.len(), names.len(), "a name for each model");
        let (mut models, mut turns) = (Vec::new(), Turns::default());
        for (&id, &(name, priority)) in ids.iter().zip(names) {
            turns.add(priority);
            models.push(Hosted::new(&engine, id, name, &limits));
        }
        let mut scheduler = Scheduler {
            scratch: Scratch {
                sampler: SamplerScratch::new(0),
                who: Vec::with_capacity(limits.requests),
                wants: Vec::with_capacity(limits.requests),
                takes: Vec::with_capacity(limits.requests),
                drafts: Vec::with_capacity(limits.requests),
                candidates: Vec::with_capacity(limits.requests),
                rows: Vec::new(),
            },
            requests: Vec::with_capacity(limits.requests),
            engine,
            limits,
            models,
            turns,
            rested: false,
        };
        scheduler.take_scratch();
        scheduler
    }

    /// What makes requests ready for a model, to be shared with other threads; the first model's if none is named.
    ///
    /// # Errors
    /// There is no such model.
    pub fn vocabulary(&self, model: Option<&str>) -> Result<Arc<Vocabulary>> {
        let place = self.find_model(model)?;
        Ok(Arc::clone(&self.models[place].vocabulary))
    }

    /// The engine, to look at.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The engine, when there is nothing more to schedule.
    pub fn into_engine(self) -> Engine {
        self.engine
    }

    /// What a model's sweeps took so far.
    ///
    /// # Errors
    /// There is no such model.
    pub fn spent(&self, model: Option<&str>) -> Result<Spent> {
        Ok(self.models[self.find_model(model)?].spent)
    }

    /// Takes a request. Its events come through the sinks of later steps, [`Event::Done`] or [`Event::Error`] last.
    ///
    /// # Errors
    /// There are too many requests already, the client's tag is in use, or the prompt cannot follow what its session
    /// holds because both together are longer than the context. Nothing is told of the request then.
    pub fn submit(&mut self, tag: Tag, prepared: Prepared, now: Duration) -> Result<()> {
        if self.requests.len() == self.limits.requests {
            return Err(Error::new(
                Kind::Busy,
                format!("there are {} requests already", self.requests.len()),
                "try again when some of them are answered",
            ));
        }
        if self.requests.iter().any(|request| request.tag == tag) {
            return Err(Error::new(
                Kind::Usage,
                format!("request {} is not answered yet", tag.request),
                "number requests so that no two have the same number at a time",
            ));
        }
        // Not by name: another file may have been loaded under it since.
        let made_for = |hosted: &&Hosted| hosted.vocabulary.made(&prepared);
        let Some(hosted) = self.models.iter().find(made_for) else {
            return Err(Error::new(
                Kind::Busy,
                format!("the model {:?} was unloaded meanwhile", prepared.model),
                "ask again, or load it again first",
            ));
        };
        if let (Some(name), Some(turn)) = (&prepared.session, &prepared.turn)
            && let Some(session) = hosted.sessions.find(name)
        {
            let held = hosted.sessions.entries[session].tokens.len();
            let length = Length::Exactly(held + turn.len());
            hosted.vocabulary.check_fits(length)?;
        }
        let id = hosted.id;
        self.requests.push(Request::new(tag, id, prepared, now));
        Ok(())
    }

    /// Ends a request before its next sweep; false if there is none of this tag.
    ///
    /// What its answer was so far stays in its session; a prompt that was not computed yet leaves it.
    pub fn cancel(&mut self, tag: Tag, now: Duration) -> bool {
        let found = self.requests.iter().position(|request| request.tag == tag);
        let Some(index) = found else {
            return false;
        };
        if self.requests[index].state != State::Ended {
            self.end(index, End::Done(Reason::Cancelled), now);
        }
        true
    }

    /// Ends all requests of a client that is gone; nothing more is told of them.
    pub fn cancel_client(&mut self, client: u32, now: Duration) {
        for index in (0..self.requests.len()).rev() {
            if self.requests[index].tag.client == client {
                self.drop_request(index, now);
            }
        }
    }

    /// Forgets a session's conversation; the next request of its name begins anew.
    ///
    /// # Errors
    /// There is no such model or session, or a request is being answered in it.
    pub fn reset(&mut self, model: Option<&str>, session: &str) -> Result<()> {
        let place = self.find_model(model)?;
        let hosted = &self.models[place];
        let found = hosted
            .sessions
            .find(session)
            .filter(|_| !session.is_empty());
        let Some(index) = found else {
            return Err(Error::new(
                Kind::Usage,
                format!("there is no session {session:?}"),
                "ask for the status: it lists the sessions",
            ));
        };
        if hosted.sessions.entries[index].used == Use::Busy {
            return Err(Error::new(
                Kind::Busy,
                format!("a request is being answered in the session {session:?}"),
                "cancel it or wait for its end, and reset the session then",
            ));
        }
        self.forget(place, index);
        Ok(())
    }

    /// Tells clients what they were not told yet, begins what waits, and makes one sweep. `now` is the time since any
    /// fixed moment and never goes back.
    ///
    /// A sweep that fails ends the requests that had rows in it; their sinks get the error.
    pub fn step(&mut self, now: Duration, sink: &mut dyn FnMut(Tag, &Event<'_>) -> Flow) -> Step {
        self.tell(now, sink);
        self.expire(now);
        for index in 0..self.requests.len() {
            if self.requests[index].state == State::Waiting {
                self.start(index, now);
            }
        }
        let (models, requests) = (&self.models, &self.requests);
        let busy = |place: usize| {
            let id = models[place].id;
            requests
                .iter()
                .any(|request| request.model == id && request.session().is_some())
        };
        if let Some(place) = self.turns.next(busy) {
            self.rested = false;
            if self.engine.store().residency().streamed().next().is_some() {
                self.forget_nameless();
            }
            let took = self.sweep(place, now, sink);
            self.tell(now + took, sink);
            return Step::Swept;
        }
        self.tell(now, sink);
        if !std::mem::replace(&mut self.rested, true) {
            self.engine.save_checksums();
        }
        // If weights cannot be read now, the sweep that needs them will say why.
        let reading = matches!(self.engine.idle(), Ok(true));
        let looks_after = reading.then_some(now + READS_EVERY);
        Step::Idle {
            until: self.next_timeout().into_iter().chain(looks_after).min(),
        }
    }

    fn tell(&mut self, now: Duration, sink: &mut dyn FnMut(Tag, &Event<'_>) -> Flow) {
        let mut index = 0;
        while let Some(request) = self.requests.get_mut(index) {
            let told = request.tell(now, sink);
            let since = request.untold.since;
            let stalled = since.is_some_and(|since| since + self.limits.stalled <= now);
            if told == Told::Some && stalled {
                // Whether it takes this or not, nothing more is said to it.
                let error = Error::new(
                    Kind::Stalled,
                    format!(
                        "the client took no event for {} s",
                        self.limits.stalled.as_secs()
                    ),
                    "read the answers while they are written",
                );
                let _ = sink(request.tag, &Event::from(&error));
            }
            if told == Told::Everything || told == Told::Some && stalled {
                self.drop_request(index, now);
            } else {
                index += 1;
            }
        }
    }

    /// Forgets idle sessions whose time is up.
    fn expire(&mut self, now: Duration) {
        for place in 0..self.models.len() {
            let Limits { idle, kept, .. } = self.limits;
            while let Some(index) = self.models[place].sessions.expired(now, idle, kept) {
                self.forget(place, index);
            }
        }
    }

    /// Forgets what idle sessions without a name hold: while weights stream, every page of theirs costs each sweep a
    /// read, and computing a prompt again costs one sweep or a few.
    fn forget_nameless(&mut self) {
        for place in 0..self.models.len() {
            for session in 0..self.models[place].sessions.entries.len() {
                let entry = &self.models[place].sessions.entries[session];
                if entry.used == Use::Idle && entry.name.is_empty() {
                    self.forget(place, session);
                }
            }
        }
    }

    fn next_timeout(&self) -> Option<Duration> {
        let Limits { idle, kept, .. } = self.limits;
        let sessions = self
            .models
            .iter()
            .filter_map(|m| m.sessions.next_expiry(idle, kept));
        let since = self
            .requests
            .iter()
            .filter_map(|request| request.untold.since);
        sessions
            .chain(since.map(|at| at + self.limits.stalled))
            .min()
    }

    /// Ends a request; its client is told in the next step.
    fn end(&mut self, index: usize, end: End, now: Duration) {
        self.leave_session(index, now);
        let request = &mut self.requests[index];
        request.state = State::Ended;
        request.times.last = now;
        request.untold.end = Some(end);
    }

    /// Takes a request out of the table.
    fn drop_request(&mut self, index: usize, now: Duration) {
        self.leave_session(index, now);
        self.requests.remove(index);
    }

    /// Frees the session of a request for others. A prompt that was not computed to its end leaves it.
    fn leave_session(&mut self, index: usize, now: Duration) {
        let request = &self.requests[index];
        let State::Running(session) = request.state else {
            return;
        };
        let place = self.place(request.model);
        let hosted = &mut self.models[place];
        let entry = &mut hosted.sessions.entries[session];
        (entry.used, entry.since) = (Use::Idle, now);
        if request.counts.answer == 0 {
            entry.tokens.truncate(request.before);
            if entry.tokens.is_empty() {
                self.forget(place, session);
            } else {
                self.engine.truncate(hosted.id, session, request.before);
            }
        }
    }

    /// Forgets a conversation altogether.
    fn forget(&mut self, place: usize, session: usize) {
        let hosted = &mut self.models[place];
        hosted.sessions.entries[session].free();
        self.engine.forget(hosted.id, session);
        self.forget_drafts(place, session);
    }

    fn place(&self, id: ModelId) -> usize {
        let found = self.models.iter().position(|hosted| hosted.id == id);
        found.expect("requests leave with their model")
    }

    fn find_model(&self, name: Option<&str>) -> Result<usize> {
        let Some(name) = name else {
            return Ok(0);
        };
        let found = self
            .models
            .iter()
            .position(|hosted| hosted.vocabulary.model() == name);
        found.ok_or_else(|| {
            let names: Vec<&str> = self.models.iter().map(|m| m.vocabulary.model()).collect();
            Error::new(
                Kind::Usage,
                format!("there is no model {name:?}"),
                format!("name one of {}", names.join(", ")),
            )
        })
    }
}
