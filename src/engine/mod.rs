//! The engine: models, their sessions, and sweeps over batches of their rows.
//!
//! [`Engine::open`] divides the budget, reserves the arena, loads what is
//! small and starts the reads; after that nothing is allocated between tokens.
//! Every model has a [`ModelId`], which calls about it take.
#![allow(unsafe_code)]

pub mod demand;
mod drafter;
mod hosting;
mod loaded;
mod loading;
pub mod plan;
pub mod pool;
pub mod request;
pub mod roofline;
pub mod scheduler;
mod sessions;
mod vocabulary;

use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::board::{self, Pace};
use crate::device::Device;
use crate::error::{Error, Kind, Result};
use crate::io::Files;
use crate::model::config::Config;
use crate::model::forward::Model;
use crate::model::kv::Session;
use crate::store::{Counters, DiskSample, Store};
use crate::text::{ChatTemplate, Tokenizer};
use crate::trace::Trace;

use demand::Demand;

pub use crate::device::DeviceChoice;
pub use crate::device::cpu::{Precision, THREADS_MAX};
pub use crate::model::forward::{Choices, Row, Wanted};
pub use crate::store::ModelId;
pub use hosting::Share;
pub use loaded::{Loaded, ModelOptions, Options, divide, threads};
pub use loading::{Built, Opening, Reserved};
pub use plan::{Line, Plan, Request};
pub use pool::{GpuPool, Pool};
pub use vocabulary::{Prepared, Vocabulary, not_finite};

/// Where the time and the bytes of some sweeps went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    /// Rows computed.
    pub rows: u64,
    /// Of these, drafts: rows of tokens that were only likely to come.
    pub drafts: u64,
    /// Of the drafts, those that came.
    pub drafts_right: u64,
    /// Sweeps made.
    pub sweeps: u64,
    /// Time in sweeps, those of a draft model included.
    pub time: Duration,
    /// Of that, in sweeps of a draft model.
    pub drafting: Duration,
    /// Of that, pauses that the governor wanted.
    pub rested: Duration,
    /// Of that, waiting for reads with nothing to compute.
    pub stalled: Duration,
    /// Bytes that arrived from disk.
    pub read_bytes: u64,
    /// Bytes that went into a GPU's own memory.
    pub copied_bytes: u64,
}

impl Spent {
    /// Tokens that the rows brought the conversations on by.
    pub fn tokens(&self) -> u64 {
        self.rows - self.drafts + self.drafts_right
    }

    /// This, and more.
    pub fn plus(&self, more: &Spent) -> Spent {
        Spent {
            rows: self.rows + more.rows,
            drafts: self.drafts + more.drafts,
            drafts_right: self.drafts_right + more.drafts_right,
            sweeps: self.sweeps + more.sweeps,
            time: self.time + more.time,
            drafting: self.drafting + more.drafting,
            rested: self.rested + more.rested,
            stalled: self.stalled + more.stalled,
            read_bytes: self.read_bytes + more.read_bytes,
            copied_bytes: self.copied_bytes + more.copied_bytes,
        }
    }

    /// What was spent after `before`.
    pub fn since(&self, before: &Spent) -> Spent {
        Spent {
            rows: self.rows - before.rows,
            drafts: self.drafts - before.drafts,
            drafts_right: self.drafts_right - before.drafts_right,
            sweeps: self.sweeps - before.sweeps,
            time: self.time - before.time,
            drafting: self.drafting - before.drafting,
            rested: self.rested - before.rested,
            stalled: self.stalled - before.stalled,
            read_bytes: self.read_bytes - before.read_bytes,
            copied_bytes: self.copied_bytes - before.copied_bytes,
        }
    }
}

/// What a model is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// To answer; the other one says what it is likely to say.
    Answers { drafter: Option<ModelId> },
    /// To say what this one is likely to say.
    Drafts { of: ModelId },
}

/// A model of the engine: everything that is its own.
struct Hosted {
    id: ModelId,
    role: Role,
    tokenizer: Option<Arc<Tokenizer>>,
    template: Option<Arc<ChatTemplate>>,
    model: Model,
    sessions: Vec<Session>,
    plan: Plan,
    /// Its files; the store's I/O knows those of all models.
    files: Arc<Files>,
}

/// Models in one arena.
///
/// # Panics
/// Every call that takes a [`ModelId`] does if the engine has no such model.
pub struct Engine {
    // First of all: a GPU is done with memory before that goes.
    device: Device,
    hosted: Vec<Hosted>,
    store: Store,
    pool: Pool,
    demand: Demand,
    /// The model after the sweep that comes, if somebody said so.
    next: Option<ModelId>,
    batch: Vec<Row>,
    /// The files of all models.
    files: Arc<Files>,
    options: Options,
    /// What the board's governor allows.
    pace: Option<Pace>,
    /// What the pool and the files were before room was made for a model that is being loaded.
    before: Option<(Pool, Arc<Files>)>,
}

impl Engine {
    /// Has every sweep from now on keep to what `pace` allows: threads (also while it runs), reads in flight, rows of a
    /// prefill's sweep, and a pause before it. The time of a sweep includes the pause.
    pub fn set_pace(&mut self, pace: Pace) {
        self.device.follow_threads(pace.threads());
        self.pace = Some(pace);
    }

    /// What it does if no governor holds it down.
    pub fn full_limits(&self) -> board::Limits {
        let plans = || self.hosted.iter().map(|hosted| &hosted.plan);
        board::Limits {
            threads: self.device.threads() as u32,
            reads: plans().map(Plan::depth).max().unwrap_or(1) as u32,
            rows: plans().map(|plan| plan.limits.rows).max().unwrap_or(1) as u32,
            drafts: plans().map(|plan| plan.drafts).max().unwrap_or(0) as u32,
            precision_drop: 0,
            duty: 1.0,
        }
    }

    /// Rows that a sweep of the model should have at most now.
    pub fn rows_max(&self, model: ModelId) -> usize {
        let allowed = self
            .pace
            .as_ref()
            .map_or(u32::MAX, |pace| pace.limits().rows);
        self.plan(model).limits.rows.min(allowed as usize)
    }

    /// Drafts that a sweep of the model should have at most now.
    pub fn drafts_max(&self, model: ModelId) -> usize {
        let allowed = self
            .pace
            .as_ref()
            .map_or(u32::MAX, |pace| pace.limits().drafts);
        self.plan(model).drafts.min(allowed as usize)
    }

    /// The share of all threads that may compute now.
    pub fn thread_share(&self) -> f32 {
        let all = self.device.threads() as u32;
        let allowed = self.pace.as_ref().map_or(all, |pace| pace.limits().threads);
        allowed.clamp(1, all) as f32 / all as f32
    }

    /// How long a sweep should compute now, of `most_s` seconds: where there are pauses, a long one would need a longer
    /// one than they can be.
    pub fn sweep_s_max(&self, most_s: f32) -> f32 {
        let Some(pace) = &self.pace else {
            return most_s;
        };
        board::pace::sweep_s_max(&pace.limits(), f64::from(most_s)) as f32
    }

    /// Waits for as long as the governor wants, and takes up what it allows; how long it waited.
    fn keep_pace(&mut self) -> Duration {
        let Some(pace) = &self.pace else {
            return Duration::ZERO;
        };
        let rested = pace.rest();
        self.store.set_reads_max(pace.limits().reads as usize);
        rested
    }

    /// The models that answer, in the order in which they came.
    pub fn models(&self) -> impl Iterator<Item = ModelId> + '_ {
        let answers = |hosted: &&Hosted| matches!(hosted.role, Role::Answers { .. });
        self.hosted.iter().filter(answers).map(|hosted| hosted.id)
    }

    /// The draft model of a model.
    pub fn drafter(&self, model: ModelId) -> Option<ModelId> {
        match self.hosted(model).role {
            Role::Answers { drafter } => drafter,
            Role::Drafts { .. } => None,
        }
    }

    /// Whether there is (still) such a model.
    pub fn has(&self, model: ModelId) -> bool {
        self.hosted.iter().any(|hosted| hosted.id == model)
    }

    /// Says which model is swept after the sweep that comes: its weights are read as soon as those of that sweep are in
    /// memory. Without this it is taken to be the same model.
    pub fn set_next(&mut self, model: ModelId) {
        self.next = Some(model);
    }

    fn place(&self, model: ModelId) -> usize {
        let place = self.hosted.iter().position(|hosted| hosted.id == model);
        place.unwrap_or_else(|| panic!("there is no {model:?}"))
    }

    fn hosted(&self, model: ModelId) -> &Hosted {
        &self.hosted[self.place(model)]
    }

    /// How the budget was divided for a model, as if it were alone with the pool.
    pub fn plan(&self, model: ModelId) -> &Plan {
        &self.hosted(model).plan
    }

    /// The model's shape.
    pub fn config(&self, model: ModelId) -> &Config {
        self.hosted(model).model.config()
    }

    /// Bytes of all weights that a sweep uses.
    pub fn weight_bytes(&self, model: ModelId) -> u64 {
        self.hosted(model).model.matrices().sweep_bytes()
    }

    /// The weights in memory and on their way.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Where what happens is recorded; off until [`start_trace`](Self::start_trace).
    pub fn trace(&mut self) -> &mut Trace {
        self.store.trace()
    }

    /// Records reads, stalls and ops from now on, in [`Trace::BYTES`] of memory beside the budget.
    pub fn start_trace(&mut self) {
        *self.store.trace() = Trace::on();
    }

    /// Writes what was recorded as Chrome trace-event JSON.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_trace(&mut self, path: &Path) -> Result<()> {
        let trace = std::mem::take(self.store.trace());
        let store = &self.store;
        let written = std::fs::File::create(path).and_then(|file| {
            let mut out = BufWriter::new(file);
            let name = |matrix: u32| store.matrices()[matrix as usize].name.clone();
            let matrix = |tile| store.tile(tile).matrix;
            let gone = trace.write(&mut out, matrix, name)?;
            out.flush().map(|()| gone)
        });
        let gone = written.map_err(|e| Error::file(path, "write", &e))?;
        if gone > 0 {
            log::warn!(
                "{}: the first {gone} events are left out, only the newest had room",
                path.display()
            );
        }
        Ok(())
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The tokenizer, to be shared with other threads.
    ///
    /// # Errors
    /// The model file has no vocabulary.
    pub fn tokenizer(&self, model: ModelId) -> Result<&Arc<Tokenizer>> {
        let tokenizer = self.hosted(model).tokenizer.as_ref();
        tokenizer.ok_or_else(no_vocabulary)
    }

    /// The chat template, to be shared with other threads.
    ///
    /// # Errors
    /// The model file has no vocabulary.
    pub fn template(&self, model: ModelId) -> Result<&Arc<ChatTemplate>> {
        let template = self.hosted(model).template.as_ref();
        template.ok_or_else(no_vocabulary)
    }

    /// Positions that a session has so far.
    pub fn session_len(&self, model: ModelId, session: usize) -> usize {
        self.hosted(model).sessions[session].len()
    }

    /// Forgets a session's conversation, and remembers for later runs what was learnt of the files meanwhile.
    pub fn clear(&mut self, model: ModelId, session: usize) {
        self.forget(model, session);
        self.save_checksums();
    }

    /// Remembers for later runs what was learnt of the files; writes a file if there is anything new.
    pub fn save_checksums(&mut self) {
        self.store.save_checksums();
    }

    /// Tells the store whose sweep it is, whose is next, and what that says of the demand for each model.
    fn take_turn(&mut self, place: usize) {
        let role = self.hosted[place].role;
        if let Role::Drafts { of } = role {
            // Meanwhile the model's own sweep, which is to come, is read ahead for.
            return self.store.begin_sweep(self.hosted[place].id, Some(of));
        }
        let next = self.next.take();
        let next = self.hosted.iter().position(|h| Some(h.id) == next);
        let plan = self.store.residency();
        let missing = plan.given_up() as f32 / plan.tiles() as f32;
        let next = self.demand.begin(place, next, missing);
        self.store.set_rates(self.demand.rates());
        let [now, mut next] = [place, next].map(|place| self.hosted[place].id);
        if let Role::Answers {
            drafter: Some(drafter),
        } = role
            && next == now
        {
            next = drafter;
        }
        self.store.begin_sweep(now, Some(next));
    }

    /// Fills free memory with weights while nobody asks for anything; says whether reads are still in flight. Never
    /// blocks: call it about every millisecond, until it says no.
    ///
    /// # Errors
    /// The system takes no reads.
    pub fn idle(&mut self) -> Result<bool> {
        self.store.idle()
    }

    /// How fast the disk is at present, measured in the engine's own memory for `budget`.
    ///
    /// # Errors
    /// A read failed.
    pub fn measure_disk(&mut self, budget: Duration) -> Result<DiskSample> {
        self.store.measure_disk(budget)
    }

    /// Runs one sweep over `rows`, at most as many as the plan's limits; adds to `spent` what it took.
    pub fn sweep(&mut self, model: ModelId, rows: &[Row], spent: &mut Spent) -> Result<()> {
        let place = self.place(model);
        let vocab = self.hosted[place].model.config().vocab;
        for row in rows {
            if row.token as usize >= vocab {
                return Err(Error::new(
                    Kind::Usage,
                    format!("token {} is not in the vocabulary of {vocab}", row.token),
                    "use the tokenizer of this model",
                ));
            }
        }
        let start = Instant::now();
        let rested = self.keep_pace();
        self.take_turn(place);
        let before: Counters = self.store.counters();
        let began = Instant::now();
        if let Some(pace) = &self.pace {
            pace.begins();
        }
        let hosted = &mut self.hosted[place];
        let swept = hosted
            .model
            .sweep(rows, &mut hosted.sessions, &mut self.store, &self.device);
        let took = began.elapsed();
        if let Some(pace) = &self.pace {
            pace.ended();
        }
        swept?;
        let after = self.store.counters();
        let (stalled, read_bytes) = (
            after.stalled - before.stalled,
            after.read_bytes - before.read_bytes,
        );
        if matches!(self.hosted[place].role, Role::Answers { .. }) {
            self.demand.end(
                place,
                stalled.as_secs_f32() / took.as_secs_f32().max(f32::EPSILON),
                read_bytes as f32 / self.hosted[place].model.matrices().sweep_bytes() as f32,
            );
        }
        spent.rows += rows.len() as u64;
        spent.sweeps += 1;
        spent.time += start.elapsed();
        spent.rested += rested;
        spent.stalled += stalled;
        spent.read_bytes += read_bytes;
        spent.copied_bytes += after.copied_bytes - before.copied_bytes;
        Ok(())
    }

    /// Adds `tokens` to a session in as few sweeps as the batch allows; the last one's logits are there afterwards.
    ///
    /// `each` is called after every sweep with the tokens done so far; if it returns false, the rest is left out and
    /// so is the answer true.
    pub fn prefill(
        &mut self,
        model: ModelId,
        session: usize,
        tokens: &[u32],
        spent: &mut Spent,
        mut each: impl FnMut(usize) -> bool,
    ) -> Result<bool> {
        let mut done = 0;
        while done < tokens.len() {
            // What a governor allows changes from sweep to sweep.
            let end = tokens.len().min(done + self.rows_max(model));
            let mut batch = std::mem::take(&mut self.batch);
            batch.clear();
            batch.extend(tokens[done..end].iter().map(|&token| Row {
                session,
                token,
                wanted: Wanted::Nothing,
            }));
            done = end;
            if let Some(last) = batch.last_mut().filter(|_| done == tokens.len()) {
                last.wanted = Wanted::Logits;
            }
            let swept = self.sweep(model, &batch, spent);
            self.batch = batch;
            swept?;
            if !each(done) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Adds one token to a session.
    pub fn decode(
        &mut self,
        model: ModelId,
        session: usize,
        token: u32,
        spent: &mut Spent,
    ) -> Result<()> {
        self.sweep(
            model,
            &[Row {
                session,
                token,
                wanted: Wanted::Logits,
            }],
            spent,
        )
    }

    /// What the next token of a row is chosen from: of the `index`-th one of the model's last sweep that wanted to know of
    /// it.
    pub fn choices(&mut self, model: ModelId, index: usize) -> Choices<'_> {
        let place = self.place(model);
        self.hosted[place].model.choices(index)
    }

    /// The logits of that row, which wanted them.
    pub fn logits(&mut self, model: ModelId, index: usize) -> &mut [f32] {
        let place = self.place(model);
        self.hosted[place].model.logits(index)
    }
}

fn no_vocabulary() -> Error {
    Error::new(
        Kind::Unsupported,
        "the model file has no vocabulary",
        "give token ids where the command takes them, or use a model file with a tokenizer",
    )
}
