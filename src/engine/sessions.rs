//! The engine's conversations: how long they are, and beginning one with what another holds already.

use super::{Engine, ModelId};
use crate::model::kv;

impl Engine {
    /// Sessions that the model has.
    pub fn sessions(&self, model: ModelId) -> usize {
        self.hosted(model).sessions.len()
    }

    /// Forgets a session's conversation; its pages go back to the weights.
    pub fn forget(&mut self, model: ModelId, session: usize) {
        let place = self.place(model);
        kv::clear(&mut self.hosted[place].sessions, session, &mut self.store);
    }

    /// Forgets what a session has after the first `len` positions, and answers how many are left: fewer where a
    /// sliding window or memory does not allow so many.
    pub fn truncate(&mut self, model: ModelId, session: usize, len: usize) -> usize {
        let place = self.place(model);
        let hosted = &mut self.hosted[place];
        let specs = &hosted.model.config().layers;
        let memory = (&mut self.store, &self.device);
        kv::truncate(&mut hosted.sessions, session, specs, len, memory)
    }

    /// Forgets the last `rows` positions of a session, which were computed in its last sweep. Takes no time and gives no
    /// page back.
    pub fn retreat(&mut self, model: ModelId, session: usize, rows: usize) {
        let place = self.place(model);
        self.hosted[place].sessions[session].retreat(rows);
    }

    /// Lets an empty session begin with the first `len` positions of another, without computing them, and answers how
    /// many it has now: fewer where a sliding window or memory does not allow so many.
    pub fn share(&mut self, model: ModelId, from: usize, to: usize, len: usize) -> usize {
        let place = self.place(model);
        let hosted = &mut self.hosted[place];
        let specs = &hosted.model.config().layers;
        kv::share(
            &mut hosted.sessions,
            (from, to),
            specs,
            len,
            (&mut self.store, &self.device),
        )
    }

    /// KV pages that can still be taken from the weights.
    pub fn pages_free(&self) -> usize {
        self.store.pages_free() as usize
    }

    /// KV pages that `rows` more rows of a session take.
    pub fn pages_wanted(&self, model: ModelId, session: usize, rows: usize) -> usize {
        self.hosted(model).sessions[session].pages_wanted(rows)
    }

    /// KV pages that `rows` more rows of a session take in all the sweeps that they come in.
    pub fn pages_wanted_in_all(&self, model: ModelId, session: usize, rows: usize) -> usize {
        let hosted = self.hosted(model);
        let specs = &hosted.model.config().layers;
        hosted.sessions[session].pages_wanted_in_all(specs, rows, hosted.plan.limits.rows)
    }
}
