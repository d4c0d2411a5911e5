//! One sweep: which rows, then a token for each that wanted logits.

use std::time::Duration;

use super::batch::{self, Want};
use super::pace::COMPUTING_S_MAX;
use super::request::{End, State};
use super::sessions::Use;
use super::{Flow, Scheduler};
use crate::engine::request::{Event, Reason, Tag};
use crate::engine::{Engine, Row, Wanted, not_finite};
use crate::error::{Error, Kind};
use crate::trace::What;

impl Scheduler {
    /// Makes one sweep of a model that has rows; how long it took.
    pub(super) fn sweep(
        &mut self,
        place: usize,
        now: Duration,
        sink: &mut dyn FnMut(Tag, &Event<'_>) -> Flow,
    ) -> Duration {
        self.gather(place);
        self.make_room(place, now);
        let drafting = self.add_drafts(place);
        self.fill_rows(place, now);
        if self.scratch.rows.is_empty() {
            return Duration::ZERO;
        }
        let id = self.models[place].id;
        let next = self.turns.after(place, self.models[place].last_s);
        self.engine.set_next(self.models[next].id);
        let before = self.models[place].spent;
        let threads = self.engine.thread_share();
        let swept = self
            .engine
            .sweep(id, &self.scratch.rows, &mut self.models[place].spent);
        if let Err(error) = swept {
            match self.engine.device().failure() {
                Some(failure) => self.fail_all(&failure, now),
                None => self.fail_rows(&error, now),
            }
            return Duration::ZERO;
        }
        let spent = self.models[place].spent;
        let took = spent.time - before.time;
        let idle = spent.stalled - before.stalled + spent.rested - before.rested;
        // How many threads might compute changes within a sweep; what is guessed too high only makes the next one short.
        let threads = threads.max(self.engine.thread_share());
        let computed = took.saturating_sub(idle).mul_f32(threads);
        let taken = |decoding: bool| -> usize {
            let rows = self.scratch.wants.iter().zip(&self.scratch.takes);
            rows.filter(|(want, _)| want.decoding == decoding)
                .map(|(_, take)| take)
                .sum()
        };
        let (decoders, prefill_rows) = (taken(true), taken(false));
        let hosted = &mut self.models[place];
        let (took_s, computed_s) = (took.as_secs_f32(), computed.as_secs_f32());
        let pace = &mut hosted.pace;
        match self.scratch.drafts.iter().sum() {
            0 => pace.swept(decoders, prefill_rows, took_s, computed_s),
            drafts => pace.drafted(decoders, drafts, took_s),
        }
        hosted.turn = hosted.turn.wrapping_add(1);
        let took = drafting + took;
        self.models[place].last_s = took.as_secs_f64();
        self.turns.swept(place, took.as_secs_f64());
        self.choose_all(place, now + took, sink);
        took
    }

    /// Lists the requests that have rows, and decides how many each gets.
    fn gather(&mut self, place: usize) {
        let hosted = &self.models[place];
        let scratch = &mut self.scratch;
        scratch.who.clear();
        scratch.wants.clear();
        for (index, request) in self.requests.iter().enumerate() {
            if request.model != hosted.id {
                continue;
            }
            if let Some(session) = request.session() {
                let known = hosted.sessions.entries[session].tokens.len();
                scratch.who.push(index);
                scratch.wants.push(Want {
                    rows: known - self.engine.session_len(hosted.id, session),
                    decoding: request.counts.answer > 0,
                });
            }
        }
        let decoders = scratch.wants.iter().filter(|want| want.decoding).count();
        let limits = self.engine.plan(hosted.id).limits;
        let rows = self.engine.rows_max(hosted.id);
        let computing_s = self.engine.sweep_s_max(COMPUTING_S_MAX) * self.engine.thread_share();
        let limits = batch::Limits {
            rows,
            logits_rows: limits.logits_rows.min(rows),
            prefill_rows: hosted.pace.prefill_rows(decoders, rows, computing_s),
        };
        scratch.takes.clear();
        scratch.takes.resize(scratch.wants.len(), 0);
        batch::compose(&scratch.wants, limits, hosted.turn, &mut scratch.takes);
    }

    /// Sees to it that there are pages for all rows of the sweep. Where there are too few, idle sessions give up theirs,
    /// then prompts that are being read, then answers end. A prompt is begun when there is room for all of it.
    fn make_room(&mut self, place: usize, now: Duration) {
        let id = self.models[place].id;
        let (mut wanted, mut ended) = (0, false);
        for decoding in [true, false] {
            for at in 0..self.scratch.who.len() {
                let (index, take) = (self.scratch.who[at], self.scratch.takes[at]);
                let want = self.scratch.wants[at];
                if want.decoding != decoding || take == 0 {
                    continue;
                }
                let State::Running(session) = self.requests[index].state else {
                    continue;
                };
                let mut pages = self.engine.pages_wanted(id, session, take);
                if !decoding {
                    pages = pages.max(self.engine.pages_wanted_in_all(id, session, want.rows));
                }
                let fits = |engine: &Engine| wanted + pages <= engine.pages_free();
                while !fits(&self.engine) && (self.give_up_drafts() || self.give_up_idle()) {}
                while !fits(&self.engine) && decoding && self.give_up_prompt(None) {}
                if fits(&self.engine) {
                    wanted += pages;
                    continue;
                }
                self.scratch.takes[at] = 0;
                if decoding {
                    // What was held back as the possible beginning of a stop string stays untold.
                    self.end(index, End::Done(Reason::Context), now);
                    ended = true;
                }
            }
        }
        if ended || self.scratch.takes.iter().any(|&take| take > 0) {
            return;
        }
        // All that are left are prompts for which there is no memory. The first one gets what the others have; if that is
        // not enough, the last one goes. It may go on later, because its session stays.
        let first = self.scratch.who.first().copied();
        if self.give_up_prompt(first) {
            return;
        }
        if let Some(&index) = self.scratch.who.last() {
            let error = Error::new(
                Kind::Budget,
                format!(
                    "the prompts that are being computed need more memory than there is: {} slots are free for them",
                    self.engine.pages_free()
                ),
                "send the request again when others are answered, or give airstream more memory",
            );
            self.end(index, End::Failed(error), now);
        }
    }

    /// Takes back what was computed of the prompt that came last, of those that have pages and are not `except`; false
    /// if there is none. It has no rows in this sweep, and is computed again when there is room for all of it.
    pub(super) fn give_up_prompt(&mut self, except: Option<usize>) -> bool {
        let youngest = (0..self.requests.len()).rev().find_map(|index| {
            let request = &self.requests[index];
            let State::Running(session) = request.state else {
                return None;
            };
            let computed = self.engine.session_len(request.model, session);
            let may = request.counts.answer == 0 && computed > request.before;
            (may && except != Some(index)).then_some((index, session))
        });
        let Some((index, session)) = youngest else {
            return false;
        };
        let request = &self.requests[index];
        self.engine.truncate(request.model, session, request.before);
        for (&who, take) in self.scratch.who.iter().zip(&mut self.scratch.takes) {
            if who == index {
                *take = 0;
            }
        }
        true
    }

    /// Takes the pages of the idle session that is missed least; false if no idle one has any.
    ///
    /// The conversation itself is kept where it has a name: it is computed again when it goes on.
    pub(super) fn give_up_idle(&mut self) -> bool {
        let oldest = (0..self.models.len()).filter_map(|place| {
            let hosted = &self.models[place];
            let holds = |session| self.engine.session_len(hosted.id, session) > 0;
            let session = hosted.sessions.oldest_idle(holds)?;
            let entry = &hosted.sessions.entries[session];
            Some((!entry.name.is_empty(), entry.since, place, session))
        });
        let Some((_, _, place, session)) = oldest.min() else {
            return false;
        };
        self.forget_pages(place, session);
        true
    }

    /// Takes a session's pages; a conversation that has a name is kept.
    pub(super) fn forget_pages(&mut self, place: usize, session: usize) {
        let hosted = &self.models[place];
        match hosted.sessions.entries[session].name.is_empty() {
            true => self.forget(place, session),
            false => {
                self.engine.forget(hosted.id, session);
                self.forget_drafts(place, session);
            }
        }
    }

    /// Writes down the rows that were decided on.
    fn fill_rows(&mut self, place: usize, now: Duration) {
        let (hosted, scratch) = (&self.models[place], &mut self.scratch);
        scratch.rows.clear();
        for at in 0..scratch.who.len() {
            let (take, want) = (scratch.takes[at], scratch.wants[at]);
            let request = &mut self.requests[scratch.who[at]];
            let State::Running(session) = request.state else {
                continue;
            };
            if take > 0 {
                request.times.begun.get_or_insert(now);
            }
            let done = self.engine.session_len(hosted.id, session);
            let tokens = &hosted.sessions.entries[session].tokens[done..][..take];
            let last = want.rows.checked_sub(1);
            let wanted = request.prepared.wanted();
            scratch
                .rows
                .extend(tokens.iter().enumerate().map(|(row, &token)| Row {
                    session,
                    token,
                    wanted: match Some(row) == last {
                        true => wanted,
                        false => Wanted::Nothing,
                    },
                }));
            let drafts = request.drafts.iter().take(scratch.drafts[at]);
            scratch.rows.extend(drafts.map(|draft| Row {
                session,
                token: draft.token,
                wanted,
            }));
        }
    }

    /// Ends all requests that had rows in a sweep that failed. Their sessions stay as they were.
    fn fail_rows(&mut self, error: &Error, now: Duration) {
        for at in 0..self.scratch.who.len() {
            let index = self.scratch.who[at];
            if self.scratch.takes[at] > 0 && self.requests[index].state != State::Ended {
                self.end(index, End::Failed(error.clone()), now);
            }
        }
    }

    /// Ends all requests, because the GPU does nothing any more.
    fn fail_all(&mut self, failure: &Error, now: Duration) {
        let error = Error::new(
            failure.kind(),
            format!("the GPU has failed: {}", failure.what()),
            "send the request again when airstream has started again",
        );
        for index in 0..self.requests.len() {
            if self.requests[index].state != State::Ended {
                self.end(index, End::Failed(error.clone()), now);
            }
        }
    }

    /// Chooses the next token of each request whose row wanted logits, and those after it whose drafts were right.
    fn choose_all(
        &mut self,
        place: usize,
        now: Duration,
        sink: &mut dyn FnMut(Tag, &Event<'_>) -> Flow,
    ) {
        let begun = self.engine.trace().begin();
        let mut row = 0;
        for at in 0..self.scratch.who.len() {
            if self.scratch.takes[at] > 0 && self.scratch.takes[at] == self.scratch.wants[at].rows {
                self.choose_with_drafts(place, at, row, now, sink);
                row += 1 + self.scratch.drafts[at];
            }
        }
        if row > 0 {
            self.engine.trace().end(begun, What::Sample);
        }
    }

    /// Chooses a request's next token from the `row`-th row of logits, and sees whether its answer ends with it. None
    /// if it has failed, because the model has.
    pub(super) fn choose(
        &mut self,
        place: usize,
        index: usize,
        session: usize,
        row: usize,
        now: Duration,
    ) -> Option<u32> {
        let hosted = &mut self.models[place];
        let request = &mut self.requests[index];
        let choices = self.engine.choices(hosted.id, row);
        let chosen = request.prepared.choose(choices, &mut self.scratch.sampler);
        let Some(token) = chosen else {
            let error = not_finite(format_args!("the model {}", hosted.vocabulary.model()));
            log::error!("{error}");
            self.end(index, End::Failed(error), now);
            return None;
        };
        request.times.first.get_or_insert(now);
        request.times.last = now;
        request.untold.token = Some((request.counts.answer, token));
        request.counts.answer += 1;

        let entry = &mut hosted.sessions.entries[session];
        debug_assert_eq!(entry.used, Use::Busy);
        let full = entry.tokens.len() == hosted.vocabulary.context();
        let writer = &mut request.prepared.writer;
        let mut reason = if writer.is_end(token) {
            Some(Reason::End)
        } else {
            if !full {
                // Not computed yet: it is the session's next row, in this request or a later one.
                entry.tokens.push(token);
            }
            let stopped = writer.push(token);
            let length = request.counts.answer >= request.prepared.max_tokens;
            match (stopped, length, full) {
                (true, _, _) => Some(Reason::Stop),
                (_, true, _) => Some(Reason::Length),
                (_, _, true) => Some(Reason::Context),
                _ => None,
            }
        };
        if reason.is_some_and(|reason| reason != Reason::Stop) && writer.finish() {
            reason = Some(Reason::Stop);
        }
        if let Some(reason) = reason {
            self.end(index, End::Done(reason), now);
        }
        Some(token)
    }
}
