//! Models that come and go while requests are answered.

use std::sync::Arc;
use std::time::Duration;

use super::drafter::Drafter;
use super::request::{End, State};
use super::{Hosted, Limits, Pace, SamplerScratch, Scheduler, Sessions, Trust};
use crate::engine::{Built, Engine, ModelId, Opening, Pool, Reserved, Spent, Vocabulary};
use crate::error::{Error, Kind, Result};

impl Hosted {
    /// A model of the engine, which clients call `name`.
    pub(super) fn new(engine: &Engine, id: ModelId, name: &str, limits: &Limits) -> Hosted {
        let context = engine.plan(id).context;
        let tokenizer = engine.tokenizer(id).ok().zip(engine.template(id).ok());
        let tokenizer = tokenizer.map(|(t, c)| (Arc::clone(t), Arc::clone(c)));
        let vocab = engine.config(id).vocab;
        let sweep_bytes = engine.weight_bytes(id);
        Hosted {
            id,
            vocabulary: Arc::new(Vocabulary::new(name, tokenizer, vocab, context)),
            sessions: Sessions::new(engine.sessions(id), context),
            pace: Pace::new(limits.neighbour_factor, engine.sessions(id), sweep_bytes),
            spent: Spent::default(),
            last_s: 0.0,
            turn: 0,
            trust: Trust::default(),
            drafter: Drafter::of(engine, id, limits),
        }
    }
}

impl Scheduler {
    /// Makes room for a model, which clients will call `name`; see [`Engine::reserve`]. The answers of the others go on;
    /// what idle sessions hold makes way.
    ///
    /// # Errors
    /// There is a model of this name, or the engine has no room; everything is as it was then.
    pub fn reserve(&mut self, name: &str, opening: Opening) -> Result<Reserved> {
        if self.find_model(Some(name)).is_ok() {
            return Err(Error::new(
                Kind::Usage,
                format!("the model {name:?} is loaded already"),
                "unload it first, or give the other one another name",
            ));
        }
        let (pool, _) = self.engine.pool_with(&opening)?;
        self.make_way(&pool);
        self.engine.reserve(opening)
    }

    /// Changes the memory budget; see [`Engine::set_memory`]. What idle sessions hold makes way for it, and is computed
    /// again when they go on.
    ///
    /// # Errors
    /// As of the engine; the answers under way hold more than the budget allows, if it is not the budget itself.
    pub fn set_memory(&mut self, memory: u64) -> Result<()> {
        let pool = self.engine.pool_within(memory)?;
        self.make_way(&pool);
        self.engine.set_memory(memory)
    }

    /// Takes pages that can be computed again, until the others fit into such a pool or are all that there are.
    fn make_way(&mut self, pool: &Pool) {
        while self.engine.crowds(pool)
            && (self.give_up_drafts() || self.give_up_idle() || self.give_up_prompt(None))
        {}
    }

    /// Takes in the model that room was made for; see [`Engine::admit`].
    ///
    /// # Errors
    /// Why it could not be built; everything is as it was then.
    pub fn admit(&mut self, name: &str, priority: u8, built: Result<Built>) -> Result<ModelId> {
        let id = self.engine.admit(built)?;
        self.models
            .push(Hosted::new(&self.engine, id, name, &self.limits));
        self.turns.add(priority);
        self.take_scratch();
        Ok(id)
    }

    /// Unloads a model; see [`Engine::unload`]. Its conversations are forgotten, and its requests end with an error.
    ///
    /// # Errors
    /// There is no such model, or the system refuses; its requests have ended then all the same.
    pub fn unload(&mut self, name: &str, now: Duration) -> Result<()> {
        let place = self.find_model(Some(name))?;
        let id = self.models[place].id;
        for index in 0..self.requests.len() {
            let request = &self.requests[index];
            if request.model == id && request.state != State::Ended {
                let error = Error::new(
                    Kind::Busy,
                    format!("the model {name:?} was unloaded"),
                    "load it again, or ask another one",
                );
                self.end(index, End::Failed(error), now);
            }
        }
        let unloaded = self.engine.unload(id);
        if unloaded.is_err() && self.engine.drafter(id).is_none() {
            self.models[place].drafter = None;
        }
        unloaded?;
        self.models.remove(place);
        self.turns.remove(place);
        Ok(())
    }

    /// Reads the weights of a model and its draft model by a sweep of one row each, so that the first answer does not wait
    /// for the disk.
    ///
    /// # Errors
    /// There is no such model, or its file cannot be read.
    pub fn warm_up(&mut self, name: &str) -> Result<()> {
        let place = self.find_model(Some(name))?;
        let hosted = &mut self.models[place];
        // A session that holds something shows that there was a sweep already.
        if let Some(session) = hosted.sessions.free() {
            let swept = self.engine.decode(hosted.id, session, 0, &mut hosted.spent);
            self.engine.forget(hosted.id, session);
            swept?;
            if let Some(drafter) = hosted.drafter.as_ref().map(Drafter::id) {
                let swept = self
                    .engine
                    .decode(drafter, session, 0, &mut Spent::default());
                self.engine.forget(drafter, session);
                swept?;
            }
        }
        Ok(())
    }

    /// Changes a model's share of the time.
    ///
    /// # Errors
    /// There is no such model.
    pub fn set_priority(&mut self, name: &str, priority: u8) -> Result<()> {
        let place = self.find_model(Some(name))?;
        self.turns.set_priority(place, priority);
        Ok(())
    }

    /// Changes how long is waited for clients that take no events, and how long named sessions are kept.
    pub fn set_patience(&mut self, stalled: Duration, idle: Duration) {
        (self.limits.stalled, self.limits.idle) = (stalled, idle);
    }

    /// Takes the memory that sweeps of the present models need.
    pub(super) fn take_scratch(&mut self) {
        let drafters = self
            .models
            .iter()
            .filter_map(|model| model.drafter.as_ref());
        let ids = self.models.iter().map(|model| model.id);
        let vocab = ids
            .chain(drafters.map(Drafter::id))
            .map(|id| self.engine.config(id).vocab);
        let rows = self
            .models
            .iter()
            .map(|model| self.engine.plan(model.id).limits.rows);
        self.scratch.sampler = SamplerScratch::new(vocab.max().unwrap_or(0));
        self.scratch.rows.clear();
        self.scratch.rows.reserve(rows.max().unwrap_or(0));
    }
}
