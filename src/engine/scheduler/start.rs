//! Gives requests that wait their sessions, and the longest beginning that is computed already.

use std::time::Duration;

use super::Scheduler;
use super::request::{End, State};
use super::sessions::{self, Prefix, Use};
use crate::engine::request::PENALTY_WINDOW_MAX;
use crate::engine::vocabulary::Length;

/// How long a request without a session leaves conversations to requests that came after it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tokens of a beginning that others are just computing for which it pays to wait.
const WORTH_WAITING: usize = 16;

impl Scheduler {
    /// Gives a request a session, if there is one for it.
    pub(super) fn start(&mut self, index: usize, now: Duration) {
        let place = self.place(self.requests[index].model);
        let named = self.requests[index].prepared.session.as_deref();
        let found = named.and_then(|name| self.models[place].sessions.find(name));
        let session = match found {
            Some(session) => self.go_on(index, place, session, now),
            None => self.begin(index, place, now),
        };
        let Some(session) = session else {
            return;
        };
        let cached = self.engine.session_len(self.models[place].id, session);
        let entry = &mut self.models[place].sessions.entries[session];
        entry.used = Use::Busy;
        let request = &mut self.requests[index];
        request.state = State::Running(session);
        request.untold.accepted = true;
        request.counts.prompt = entry.tokens.len() as u32;
        request.counts.cached = cached as u32;
        let lately = entry.tokens.len().saturating_sub(PENALTY_WINDOW_MAX);
        for &token in &entry.tokens[lately..] {
            request.prepared.sampler.accept(token);
        }
        request.trust = self.models[place].trust;
    }

    /// Goes on with a session that holds something; none if another request is being answered there.
    fn go_on(
        &mut self,
        index: usize,
        place: usize,
        session: usize,
        now: Duration,
    ) -> Option<usize> {
        let hosted = &mut self.models[place];
        let entry = &mut hosted.sessions.entries[session];
        if entry.used == Use::Busy {
            return None;
        }
        let request = &mut self.requests[index];
        if let Some(turn) = &request.prepared.turn {
            // Looked at again, because what was submitted before may have made the conversation longer.
            if let Err(error) = hosted
                .vocabulary
                .check_fits(Length::Exactly(entry.tokens.len() + turn.len()))
            {
                self.end(index, End::Failed(error), now);
                return None;
            }
            request.before = entry.tokens.len();
            entry.tokens.extend_from_slice(turn);
            return Some(session);
        }
        // The whole conversation was sent: what differs from the one held makes way.
        let whole = &request.prepared.whole;
        let same = sessions::common(&entry.tokens, whole).min(whole.len() - 1);
        let kept = self.engine.truncate(hosted.id, session, same);
        entry.tokens.clear();
        entry.tokens.extend_from_slice(whole);
        request.before = kept;
        Some(session)
    }

    /// Begins a conversation in a session of its own; none if all are busy, or if a longer beginning is coming.
    fn begin(&mut self, index: usize, place: usize, now: Duration) -> Option<usize> {
        let hosted = &self.models[place];
        let id = hosted.id;
        let whole = &self.requests[index].prepared.whole;
        // What was to follow a conversation may fit its session where the whole, system's words and all, does not.
        if let Err(error) = hosted.vocabulary.check_fits(Length::Exactly(whole.len())) {
            self.end(index, End::Failed(error), now);
            return None;
        }
        let computed = |session| self.engine.session_len(id, session);
        let Prefix { from, len, coming } = hosted.sessions.prefix(whole, computed);
        if coming >= len + WORTH_WAITING {
            return None;
        }
        let source = &hosted.sessions.entries[from];
        // A conversation that is only the beginning of this one need not be kept beside it.
        let takes_over =
            len > 0 && source.used == Use::Idle && source.name.is_empty() && len == computed(from);
        let session = if takes_over {
            from
        } else if let Some(free) = hosted.sessions.free() {
            free
        } else {
            // A conversation that another request waits to go on with is no idle one; but those that came later do not
            // keep this one waiting for ever.
            let waited = now.saturating_sub(self.requests[index].times.submitted);
            let others = match waited < PATIENCE {
                true => &self.requests[..],
                false => &self.requests[..index],
            };
            let waited_for = |session: usize| {
                let name = &hosted.sessions.entries[session].name;
                others.iter().any(|request| {
                    request.state == State::Waiting
                        && request.model == id
                        && request.prepared.session.as_ref() == Some(name)
                })
            };
            let victim = hosted
                .sessions
                .oldest_idle(|session| (len == 0 || session != from) && !waited_for(session));
            let victim =
                victim.or_else(|| hosted.sessions.oldest_idle(|session| !waited_for(session)))?;
            let name = &hosted.sessions.entries[victim].name;
            if !name.is_empty() {
                log::warn!("the session {name:?} makes way for a new one");
            }
            victim
        };
        if session == from && len > 0 {
            self.engine.truncate(id, session, len);
        } else {
            self.engine.forget(id, session);
            if len > 0 {
                self.engine.share(id, from, session, len);
            }
        }
        let request = &self.requests[index];
        let name = request.prepared.session.as_ref();
        let entry = &mut self.models[place].sessions.entries[session];
        entry.begin(name, &request.prepared.whole);
        Some(session)
    }
}
