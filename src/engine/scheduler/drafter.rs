//! Drafts of a draft model: it goes on with each answer for as long as that pays, all answers together.
//!
//! It follows the conversations one sweep behind: what it has computed of one is compared with what was said since, and
//! the rest is taken back. It need not have computed any of it. Prompts are caught up with a few rows at a time, because
//! all answers wait meanwhile, and pages that it cannot have it does without.

use std::time::Duration;

use super::pace::{COMPUTING_S_MAX, Pace};
use super::request::State;
use super::sessions::{Use, common};
use super::speculation::{Bargain, Candidate, Class, Draft};
use super::{Limits, Scheduler};
use crate::engine::{Choices, Engine, ModelId, Row, Spent, Wanted};
use crate::error::{Error, Result};

/// Rows of prompts that its sweep may have, however long they take: from fewer nobody could tell how long that is. Of so
/// many it is also worth looking whether another conversation begins with them.
const ROWS_LEAST: usize = 16;
/// Positions of each answer whose pages it does not take.
const AHEAD: usize = 32;
/// How much one sweep moves the estimate of how long it takes.
const WEIGHT: f32 = 0.2;
/// By how much that estimate sinks with each sweep in which it is why nothing is drafted: what was slow once need not
/// stay so.
const FORGETTING: f32 = 0.01;
/// Sweeps without drafts after the draft model has failed, the first time and at most.
const PAUSE: (u32, u32) = (64, 1 << 14);

/// A draft model as the scheduler sees it.
pub(super) struct Drafter {
    id: ModelId,
    vocab: usize,
    context: usize,
    /// For each session the tokens whose keys and values it has.
    held: Vec<Vec<u32>>,
    /// How long rows of prompts take it.
    pace: Pace,
    /// How much smaller it is: what its sweep takes of one of the other model's, as long as that is not known.
    share: f32,
    /// Seconds of its sweep of a row for each answer.
    sweep_s: Option<f32>,
    /// Sweeps of the other model in which it is left alone because it has failed, and how many will be if it does again.
    pause: u32,
    pause_next: u32,
    /// Memory that its sweeps use and leave.
    rows: Vec<Row>,
    active: Vec<Active>,
}

/// An answer that it drafts for.
struct Active {
    /// Its place among the requests.
    index: usize,
    session: usize,
    /// Drafts that it may have, and those that it has.
    most: usize,
    made: usize,
    /// How likely all of them are right.
    chance: f32,
    /// Rows that the next draft takes, and those that it has in the sweep at hand.
    missing: usize,
    take: usize,
    /// Whether it may have more.
    open: bool,
}

impl Active {
    /// Whether the sweep at hand tells its next draft.
    fn tells(&self) -> bool {
        self.take == self.missing
    }
}

/// What is asked of it beside one sweep of the other model.
#[derive(Clone, Copy)]
pub(super) struct Wish {
    /// Answers that the sweep goes on with, and the pages that they want for it.
    pub(super) decoders: usize,
    pub(super) pages: usize,
    /// Drafts that there may be in all.
    pub(super) drafts: usize,
    /// What a draft's row adds to the sweep, as a share of one without.
    pub(super) cost: f32,
}

impl Drafter {
    /// The draft model of a model of the engine, if it has one. All memory is taken here.
    pub(super) fn of(engine: &Engine, model: ModelId, limits: &Limits) -> Option<Drafter> {
        let id = engine.drafter(model)?;
        let (sessions, plan) = (engine.sessions(id), engine.plan(id));
        let bytes = engine.weight_bytes(id);
        let held = || Vec::with_capacity(plan.context);
        Some(Drafter {
            id,
            vocab: engine.config(id).vocab,
            context: plan.context,
            held: (0..sessions).map(|_| held()).collect(),
            pace: Pace::new(limits.neighbour_factor, sessions, bytes),
            share: bytes as f32 / engine.weight_bytes(model) as f32,
            sweep_s: None,
            pause: 0,
            pause_next: PAUSE.0,
            rows: Vec::with_capacity(plan.limits.rows),
            active: Vec::with_capacity(sessions),
        })
    }

    pub(super) fn id(&self) -> ModelId {
        self.id
    }

    /// Forgets what it has of a session.
    fn forget(&mut self, session: usize, engine: &mut Engine) {
        self.held[session].clear();
        engine.forget(self.id, session);
    }

    /// Begins a session with what another one's conversation has in common with what was `said`, where that saves many
    /// rows; then takes back what was not said. What is left to compute.
    fn take_back(&mut self, session: usize, said: &[u32], engine: &mut Engine) -> usize {
        // The last token is computed once more if need be: nobody knows any more what it said of the next.
        let same = |held: &[u32]| common(held, said).min(said.len() - 1);
        let own = same(&self.held[session]);
        if said.len() - own > ROWS_LEAST {
            let others = self
                .held
                .iter()
                .enumerate()
                .filter(|(at, _)| *at != session);
            let longest = others.map(|(at, held)| (same(held), at)).max();
            if let Some((len, from)) = longest.filter(|(len, _)| *len > own + ROWS_LEAST) {
                self.forget(session, engine);
                let len = engine.share(self.id, from, session, len);
                self.held[session].extend_from_slice(&said[..len]);
                return said.len() - len;
            }
        }
        let kept = engine.truncate(self.id, session, own);
        self.held[session].truncate(kept);
        said.len() - kept
    }

    /// Has failed: it begins anew, but not soon.
    fn fail(&mut self, error: &Error, engine: &mut Engine) {
        log::warn!(
            "answers go on without the draft model for {} sweeps: {error}",
            self.pause_next
        );
        for session in 0..self.held.len() {
            self.forget(session, engine);
        }
        self.pause = self.pause_next;
        self.pause_next = (2 * self.pause_next).min(PAUSE.1);
    }

    /// What its next sweep takes, as a share of one of `alone_s` seconds.
    fn sweep_share(&self, alone_s: f32) -> f32 {
        self.sweep_s.map_or(self.share, |seconds| seconds / alone_s)
    }

    /// A sweep of its rows took so long, of which it computed for `computing` seconds with all threads.
    fn swept(&mut self, seconds: f32, computing: f32) {
        if self.rows.len() > self.active.len() {
            self.pace.swept(0, self.rows.len(), seconds, computing);
            return;
        }
        // One that had to wait for something else says little of the next.
        self.sweep_s = Some(self.sweep_s.map_or(seconds, |before| {
            before + WEIGHT * (seconds.min(2.0 * before) - before)
        }));
    }
}

impl Scheduler {
    /// Has the draft model, if there is one, draft for the answers of a model's sweep as far as that pays; how long it
    /// took.
    pub(super) fn draft(&mut self, place: usize, wish: Wish) -> Duration {
        let Some(mut drafter) = self.models[place].drafter.take() else {
            return Duration::ZERO;
        };
        let mut spent = Spent::default();
        if drafter.pause > 0 {
            drafter.pause -= 1;
        } else {
            match self.draft_by(&mut drafter, place, wish, &mut spent) {
                Ok(()) if spent.sweeps > 0 => drafter.pause_next = PAUSE.0,
                Ok(()) => {}
                Err(error) => drafter.fail(&error, &mut self.engine),
            }
        }
        let hosted = &mut self.models[place];
        hosted.drafter = Some(drafter);
        hosted.spent = hosted.spent.plus(&Spent {
            rows: 0,
            sweeps: 0,
            drafting: spent.time,
            ..spent
        });
        spent.time
    }

    fn draft_by(
        &mut self,
        drafter: &mut Drafter,
        place: usize,
        wish: Wish,
        spent: &mut Spent,
    ) -> Result<()> {
        let Some(alone_s) = self.models[place].pace.alone_s(wish.decoders) else {
            return Ok(());
        };
        self.choose_drafted(drafter, place, alone_s);
        let mut bargain = Bargain::new(wish.decoders);
        let mut left = wish.drafts;
        while !drafter.active.is_empty() && left > 0 {
            self.share_rows(drafter, alone_s, left);
            let telling = drafter.active.iter().filter(|active| active.tells());
            let trust = |active: &Active| self.requests[active.index].trust.of(Class::UNSEEN);
            let (told, hoped) = telling.fold((0, 0.0), |(told, hoped), active| {
                (told + 1, hoped + active.chance * trust(active))
            });
            let time = drafter.sweep_share(alone_s) + wish.cost * told as f32;
            // Whether it pays to catch up was looked at before.
            if told > 0 && !bargain.is_better(hoped, time) {
                break;
            }
            if !self.fill_draft_rows(drafter, place, wish.pages) {
                break;
            }
            let (before, threads) = (*spent, self.engine.thread_share());
            self.engine.sweep(drafter.id, &drafter.rows, spent)?;
            let took = spent.since(&before);
            let (swept, stalled) = (took.time - took.rested, took.stalled);
            let computed = swept.saturating_sub(stalled).mul_f32(threads);
            drafter.swept(swept.as_secs_f32(), computed.as_secs_f32());
            bargain.add(0.0, swept.as_secs_f32() / alone_s);
            left -= self.take_guesses(drafter, place, wish.cost, &mut bargain);
            drafter.active.retain(|active| active.open);
        }
        if spent.sweeps == 0 {
            // It was not asked, so nobody would ever see that it has become better.
            let hosted = &mut self.models[place];
            hosted.trust.forget_models();
            for active in &drafter.active {
                self.requests[active.index].trust.forget_models();
            }
            drafter.sweep_s = drafter.sweep_s.map(|seconds| seconds * (1.0 - FORGETTING));
        }
        Ok(())
    }

    /// Lists the answers that it could draft for: not those that more likely repeat themselves, and not those of which it
    /// has computed so little that catching up would take longer than it may save.
    fn choose_drafted(&mut self, drafter: &mut Drafter, place: usize, alone_s: f32) {
        let (hosted, engine) = (&self.models[place], &mut self.engine);
        drafter.active.clear();
        // The pages that answers want soon are left to them: what they take back would have to be computed again.
        let soon = |candidate: &Candidate| {
            let State::Running(session) = self.requests[self.scratch.who[candidate.at]].state
            else {
                return 0;
            };
            let said = hosted.sessions.entries[session].tokens.len();
            let rows = AHEAD.min(hosted.vocabulary.context() + 1 - said);
            engine.pages_wanted(hosted.id, session, rows)
        };
        let mut pages: usize = self.scratch.candidates.iter().map(soon).sum();
        for candidate in &self.scratch.candidates {
            let index = self.scratch.who[candidate.at];
            let request = &self.requests[index];
            let State::Running(session) = request.state else {
                continue;
            };
            let repeats = request.drafts.first().map(|draft| draft.class);
            let unseen = request.trust.of(Class::UNSEEN);
            let said = &hosted.sessions.entries[session].tokens;
            let room = (drafter.context + 1).saturating_sub(said.len());
            let most = candidate.most.min(room);
            let unknown = |&token: &u32| token as usize >= drafter.vocab;
            if most == 0
                || repeats.is_some_and(|class| request.trust.of(class) >= unseen)
                || said.iter().any(unknown)
            {
                continue;
            }
            let missing = drafter.take_back(session, said, engine);
            let to_come = request.prepared.max_tokens - request.counts.answer;
            let to_come = room.min(to_come as usize);
            let saved_s = alone_s * unseen / 2.0 * to_come as f32;
            let behind_s = (missing - 1) as f32 * drafter.pace.computing_row_s();
            let wanted = engine.pages_wanted(drafter.id, session, missing);
            if pages + wanted > engine.pages_free() || behind_s > saved_s {
                continue;
            }
            pages += wanted;
            drafter.active.push(Active {
                index,
                session,
                most,
                made: 0,
                chance: 1.0,
                missing,
                take: 0,
                open: true,
            });
        }
        // One that is far behind keeps nobody from drafting.
        drafter.active.sort_unstable_by_key(|active| active.missing);
    }

    /// Shares out the rows of its next sweep: all that are missing, or of prompts as many as take no longer than the other
    /// model's sweep. Only the likeliest go on where no more drafts than those may be `left`.
    fn share_rows(&mut self, drafter: &mut Drafter, alone_s: f32, left: usize) {
        if drafter.active.len() > left {
            let likeliest = |a: &Active, b: &Active| b.chance.total_cmp(&a.chance);
            drafter.active.sort_unstable_by(likeliest);
            drafter.active.truncate(left);
        }
        let allowed = self.engine.rows_max(drafter.id);
        let computing_s = self.engine.sweep_s_max(alone_s.min(COMPUTING_S_MAX));
        let computing_s = computing_s * self.engine.thread_share();
        let in_time = drafter.pace.prefill_rows(0, allowed, computing_s);
        let least = drafter.active.len() + ROWS_LEAST;
        let mut rows = in_time.max(least).min(allowed);
        for active in &mut drafter.active {
            active.take = active.missing.min(rows);
            rows -= active.take;
        }
    }

    /// Writes down the rows of its next sweep; false if there are none, or no pages for them beside the `pages` that are
    /// wanted otherwise.
    fn fill_draft_rows(&mut self, drafter: &mut Drafter, place: usize, pages: usize) -> bool {
        let (id, engine) = (drafter.id, &self.engine);
        let wanted = |active: &Active| engine.pages_wanted(id, active.session, active.take);
        let wanted: usize = drafter.active.iter().map(wanted).sum();
        drafter.rows.clear();
        if pages + wanted > engine.pages_free() {
            return false;
        }
        for active in &drafter.active {
            let said = &self.models[place].sessions.entries[active.session].tokens;
            let request = &self.requests[active.index];
            let drafts = request.drafts.iter().take(active.made);
            let drafts = drafts.map(|draft| draft.token);
            let held = &mut drafter.held[active.session];
            let rest = said.iter().copied().chain(drafts).skip(held.len());
            let first = drafter.rows.len();
            drafter.rows.extend(rest.take(active.take).map(|token| Row {
                session: active.session,
                token,
                wanted: Wanted::Nothing,
            }));
            held.extend(drafter.rows[first..].iter().map(|row| row.token));
            if active.tells()
                && let Some(last) = drafter.rows.last_mut()
            {
                last.wanted = request.prepared.wanted();
            }
        }
        !drafter.rows.is_empty()
    }

    /// Takes the drafts that its sweep has told; how many.
    fn take_guesses(
        &mut self,
        drafter: &mut Drafter,
        place: usize,
        cost: f32,
        bargain: &mut Bargain,
    ) -> usize {
        let vocab = self.engine.config(self.models[place].id).vocab;
        let (mut row, mut taken) = (0, 0);
        for at in 0..drafter.active.len() {
            let active = &mut drafter.active[at];
            if !active.tells() {
                active.open = false;
                continue;
            }
            let request = &mut self.requests[active.index];
            let choices = self.engine.choices(drafter.id, row);
            let scratch = &mut self.scratch.sampler;
            let guess = request.prepared.guess(active.made, choices, scratch);
            let Some(token) = guess.filter(|&token| (token as usize) < vocab) else {
                // Its keys and values may be no numbers either.
                for trust in [&mut request.trust, &mut self.models[place].trust] {
                    trust.learn(Class::UNSEEN, false);
                }
                active.open = false;
                let session = active.session;
                drafter.forget(session, &mut self.engine);
                row += 1;
                continue;
            };
            let class = Class::lead(lead(token, &self.engine.choices(drafter.id, row)));
            row += 1;
            if active.made == 0 {
                // What it says is likelier than what came before.
                request.drafts.clear();
            }
            let pushed = request.drafts.push(Draft { token, class }).is_ok();
            active.chance *= request.trust.of(class);
            (active.made, active.missing) = (active.made + 1, 1);
            taken += 1;
            active.open = pushed && active.made < active.most;
            match bargain.is_better(active.chance, cost) {
                true => bargain.add(active.chance, cost),
                false => active.open = false,
            }
        }
        taken
    }

    /// Forgets what a draft model has of a session.
    pub(super) fn forget_drafts(&mut self, place: usize, session: usize) {
        if let Some(drafter) = &mut self.models[place].drafter {
            drafter.forget(session, &mut self.engine);
        }
    }

    /// Takes the pages of a session that a draft model has, of one that is idle if there is one; false if none has any. It
    /// can compute them again.
    pub(super) fn give_up_drafts(&mut self) -> bool {
        let engine = &mut self.engine;
        for busy in [false, true] {
            for hosted in &mut self.models {
                let Some(drafter) = &mut hosted.drafter else {
                    continue;
                };
                let entries = &hosted.sessions.entries;
                let mut held = drafter.held.iter().zip(entries);
                let found = held.position(|(held, entry)| {
                    !held.is_empty() && (entry.used == Use::Busy) == busy
                });
                if let Some(session) = found {
                    drafter.forget(session, engine);
                    return true;
                }
            }
        }
        false
    }
}

/// By how much a token's logit leads before the best of the others.
fn lead(token: u32, choices: &Choices<'_>) -> f32 {
    let (mut own, mut others) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    let mut look = |id: u32, logit: f32| match id == token {
        true => own = logit,
        false => others = others.max(logit),
    };
    match choices {
        Choices::Likeliest(tokens) => tokens.iter().for_each(|t| look(t.id, t.logit)),
        Choices::Logits(logits) => (0..).zip(logits.iter()).for_each(|(id, &l)| look(id, l)),
    }
    own - others
}
