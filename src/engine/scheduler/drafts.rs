//! Drafts in a sweep: which answers have how many, and what their rows have brought.

use std::time::Duration;

use super::drafter::Wish;
use super::lookup::Match;
use super::request::{State, Told};
use super::speculation::{self, Candidate, Class, DRAFTS_MAX};
use super::{Flow, Scheduler};
use crate::engine::request::{Event, Tag};

impl Scheduler {
    /// Gives the answers of the sweep as many drafts as pay. Beside prompts there are none: those want the time. How long
    /// a draft model took for it.
    pub(super) fn add_drafts(&mut self, place: usize) -> Duration {
        let id = self.models[place].id;
        let scratch = &mut self.scratch;
        scratch.drafts.clear();
        scratch.drafts.resize(scratch.who.len(), 0);
        scratch.candidates.clear();
        let allowed = self.engine.drafts_max(id).min(DRAFTS_MAX);
        let (mut decoders, mut pages) = (0, 0);
        for at in 0..scratch.who.len() {
            let request = &mut self.requests[scratch.who[at]];
            request.drafts.clear();
            let State::Running(session) = request.state else {
                continue;
            };
            let next = scratch.wants[at].decoding && scratch.wants[at].rows == 1;
            if allowed == 0 || !next || scratch.takes[at] == 0 {
                continue;
            }
            decoders += 1;
            pages += self.engine.pages_wanted(id, session, 1);
            let hosted = &self.models[place];
            let tokens = &hosted.sessions.entries[session].tokens;
            if let Some(found) = Match::find(tokens) {
                request.drafts.extend(found.drafts(tokens).take(allowed));
            }
            // None is computed for what will not be said any more.
            let left = request.prepared.max_tokens - request.counts.answer - 1;
            let room = hosted.vocabulary.context() - tokens.len();
            scratch.candidates.push(Candidate {
                at,
                chances: heapless::Vec::new(),
                most: allowed.min(left as usize).min(room),
                given: 0,
            });
        }
        let beside_prompts = scratch.wants.iter().any(|want| !want.decoding);
        let cost = self.models[place].pace.draft_cost(decoders);
        let Some(cost) = cost.filter(|_| !beside_prompts) else {
            return Duration::ZERO;
        };
        let limits = self.engine.plan(id).limits;
        let rows = allowed
            .min(self.engine.rows_max(id).saturating_sub(decoders))
            .min(limits.logits_rows.saturating_sub(decoders));
        let wish = Wish {
            decoders,
            pages,
            drafts: rows,
            cost,
        };
        let took = self.draft(place, wish);
        for candidate in &mut self.scratch.candidates {
            let request = &self.requests[self.scratch.who[candidate.at]];
            candidate.weigh(&request.drafts, &request.trust);
        }
        speculation::share_out(&mut self.scratch.candidates, rows, decoders, cost);
        for candidate in &self.scratch.candidates {
            let State::Running(session) = self.requests[self.scratch.who[candidate.at]].state
            else {
                continue;
            };
            let more = |drafts| {
                let wanted = |rows| self.engine.pages_wanted(id, session, rows);
                wanted(1 + drafts) - wanted(1)
            };
            let mut given = candidate.given;
            while pages + more(given) > self.engine.pages_free() {
                given -= 1;
            }
            pages += more(given);
            self.scratch.drafts[candidate.at] = given;
        }
        took
    }

    /// Chooses a request's next token from the `row`-th row of logits, and where its drafts are right, from the rows
    /// after it.
    pub(super) fn choose_with_drafts(
        &mut self,
        place: usize,
        at: usize,
        row: usize,
        now: Duration,
        sink: &mut dyn FnMut(Tag, &Event<'_>) -> Flow,
    ) {
        let (index, drafts) = (self.scratch.who[at], self.scratch.drafts[at]);
        let State::Running(session) = self.requests[index].state else {
            return;
        };
        let mut right = 0;
        loop {
            let Some(token) = self.choose(place, index, session, row + right, now) else {
                // Its keys and values may be no numbers either: they are computed again if the conversation goes on.
                self.forget_pages(place, session);
                break;
            };
            let hosted = &mut self.models[place];
            let request = &mut self.requests[index];
            let Some(draft) = request.drafts.get(right) else {
                break;
            };
            let came = token == draft.token;
            for trust in [&mut request.trust, &mut hosted.trust] {
                trust.learn(draft.class, came);
                if right == 0 && draft.class.is_models() {
                    trust.learn(Class::UNSEEN, came);
                }
            }
            // A client that does not take the token has the next one computed when it does.
            let goes_on = came && right < drafts && request.tell(now, sink) == Told::All;
            if !goes_on || request.session().is_none() {
                break;
            }
            right += 1;
        }
        let id = self.models[place].id;
        let gone = (drafts - right).min(self.engine.session_len(id, session));
        self.engine.retreat(id, session, gone);
        let spent = &mut self.models[place].spent;
        spent.drafts += drafts as u64;
        spent.drafts_right += right as u64;
    }
}
