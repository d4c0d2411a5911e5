//! A request in the scheduler's table: where it stands, and what its client has not been told yet.

use std::time::Duration;

use super::super::ModelId;
use super::super::request::{Counts, Event, Reason, Tag, Timings};
use super::super::vocabulary::Prepared;
use super::Flow;
use super::speculation::{Drafts, Trust};
use crate::error::Error;

/// Where a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It waits for a session.
    Waiting,
    /// It is answered in this session of its model.
    Running(usize),
    /// Only its client has to be told.
    Ended,
}

/// How a request ended.
pub(super) enum End {
    Done(Reason),
    Failed(Error),
}

/// Events that the client has to take before the request goes on.
#[derive(Default)]
pub(super) struct Untold {
    pub(super) accepted: bool,
    /// (place in the answer, token); its text is in the writer.
    pub(super) token: Option<(u32, u32)>,
    pub(super) end: Option<End>,
    /// Since when the client takes nothing.
    pub(super) since: Option<Duration>,
}

/// When what happened to a request.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Times {
    pub(super) submitted: Duration,
    pub(super) begun: Option<Duration>,
    pub(super) first: Option<Duration>,
    pub(super) last: Duration,
}

pub(super) struct Request {
    pub(super) tag: Tag,
    pub(super) model: ModelId,
    pub(super) prepared: Prepared,
    pub(super) state: State,
    pub(super) counts: Counts,
    /// Tokens that its session held before it.
    pub(super) before: usize,
    /// What is likely to come, while its next token is computed.
    pub(super) drafts: Drafts,
    pub(super) trust: Trust,
    pub(super) times: Times,
    pub(super) untold: Untold,
}

/// What became of telling a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// It knows everything that there is so far.
    All,
    /// It took not all of it.
    Some,
    /// It knows how the request ended, or went away.
    Everything,
}

impl Request {
    pub(super) fn new(tag: Tag, model: ModelId, prepared: Prepared, now: Duration) -> Request {
        Request {
            tag,
            model,
            prepared,
            state: State::Waiting,
            counts: Counts::default(),
            before: 0,
            drafts: Drafts::new(),
            trust: Trust::default(),
            times: Times {
                submitted: now,
                ..Times::default()
            },
            untold: Untold::default(),
        }
    }

    /// The session that has rows of it to compute; none while its client has not taken the last token.
    pub(super) fn session(&self) -> Option<usize> {
        match self.state {
            State::Running(session) if self.untold.token.is_none() => Some(session),
            _ => None,
        }
    }

    /// Tells the client what it was not told yet, in order, as far as it takes it.
    pub(super) fn tell(
        &mut self,
        now: Duration,
        sink: &mut dyn FnMut(Tag, &Event<'_>) -> Flow,
    ) -> Told {
        while let Some(event) = self.next_event() {
            let last = event.is_last();
            let flow = sink(self.tag, &event);
            drop(event);
            match flow {
                Flow::Taken if last => return Told::Everything,
                Flow::Gone => return Told::Everything,
                Flow::Taken => {}
                Flow::Full => {
                    self.untold.since.get_or_insert(now);
                    return Told::Some;
                }
            }
            self.untold.since = None;
            if self.untold.accepted {
                self.untold.accepted = false;
            } else {
                self.untold.token = None;
                self.prepared.writer.text.clear();
            }
        }
        Told::All
    }

    fn next_event(&self) -> Option<Event<'_>> {
        if self.untold.accepted {
            return Some(Event::Accepted {
                prompt_tokens: self.counts.prompt,
                cached_tokens: self.counts.cached,
            });
        }
        if let Some((index, id)) = self.untold.token {
            let text = self.prepared.writer.text.as_str().into();
            return Some(Event::Token { index, id, text });
        }
        Some(match self.untold.end.as_ref()? {
            End::Failed(error) => error.into(),
            End::Done(reason) => Event::Done {
                reason: *reason,
                counts: self.counts,
                timings: self.timings(),
            },
        })
    }

    fn timings(&self) -> Timings {
        let Times {
            submitted,
            begun,
            first,
            last,
        } = self.times;
        let ms = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f32() * 1e3;
        let begun = begun.unwrap_or(last.max(submitted));
        let first = first.unwrap_or(last.max(begun));
        Timings {
            queued_ms: ms(submitted, begun),
            prefill_ms: ms(begun, first),
            decode_ms: ms(first, last),
        }
    }
}
