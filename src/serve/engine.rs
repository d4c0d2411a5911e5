//! The engine's thread: takes orders between two sweeps, sweeps while there is work, and sleeps otherwise.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::config::{Config, Load, Model};
use super::deliveries::Deliveries;
use super::front::Done;
use super::loader;
use super::status::{BoardStatus, BudgetLine, Held, Latest, ModelState, Rates, Work};
use super::systemd::Watchdog;
use super::worker::{Order, Reading, Worker};
use crate::board::Monitor;
use crate::engine::scheduler::{Limits, Scheduler, SessionState, Step};
use crate::engine::{Built, Engine, Line, Loaded, ModelOptions, Options, Plan, divide};
use crate::error::{Error, Result};

/// How long the thread sleeps at most where nobody watches it and nothing times out.
const SLEEP: Duration = Duration::from_secs(3600);
/// What happened of late is what happened since about so long ago.
const RECENT: Duration = Duration::from_secs(2);

/// What engines for this configuration are opened with.
pub fn options(config: &Config) -> Options {
    Options {
        memory: config.memory.map(|size| size.0),
        gpu_memory: config.gpu_memory.map(|size| size.0),
        device: config.device,
        threads: config.threads.map(usize::from),
        clients_bytes: config.clients_bytes(),
        verify: config.verify,
        ..Options::default()
    }
}

/// What a model gets.
fn wishes(config: &Config, model: &Model) -> ModelOptions {
    ModelOptions {
        context: model.context.map(|context| context as usize),
        sessions: config.limits.sessions,
        logits_rows: config.limits.sessions,
        activations: model.activations,
        drafts: model.drafts.map(usize::from),
        draft_model: model.draft_model.clone(),
        ..ModelOptions::default()
    }
}

/// A budget and how it is divided.
pub struct Budget {
    /// The whole.
    pub bytes: u64,
    /// Its parts.
    pub lines: Vec<BudgetLine>,
    /// The same for the memory of a GPU that has its own, if one computes there.
    pub gpu_bytes: u64,
    /// Its parts.
    pub gpu_lines: Vec<BudgetLine>,
    /// What of it works, but not well.
    pub warnings: Vec<String>,
}

/// How the budget would be divided among the models that are loaded at the start. Reads all models' metadata.
///
/// # Errors
/// A model's file is not sound, or the budget cannot hold the minimum.
pub fn plan(config: &Config, options: &Options) -> Result<Budget> {
    let (mut owners, mut loaded, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for model in config.models.iter().map(|model| model.as_ref()) {
        let read = Loaded::read(&model.path)?;
        let wishes = wishes(config, model);
        let drafter = read.read_drafter(&wishes)?;
        if model.load == Load::Start {
            let both = [Some((read, wishes)), drafter];
            for (drafter, (read, wishes)) in
                [false, true].into_iter().zip(both.into_iter().flatten())
            {
                owners.push(owner(&model.name, drafter));
                loaded.push(read);
                wanted.push(wishes);
            }
        }
    }
    let wanted: Vec<&ModelOptions> = wanted.iter().collect();
    let loaded: Vec<&Loaded> = loaded.iter().collect();
    let (pool, plans) = divide(&loaded, &wanted, options, options.placement())?;
    let models = owners.iter().zip(&loaded).zip(&plans);
    let warnings = models.filter_map(|((name, model), plan)| {
        let beyond = model.config.beyond(plan.context)?;
        Some(format!("{name}: {beyond}"))
    });
    let warnings = warnings.collect();
    let plans: Vec<&Plan> = plans.iter().collect();
    let owners = owners.iter().map(|owner| Some(owner.as_str()));
    let owners = owners.chain([None]);
    let (mut lines, mut gpu_lines) = (Vec::new(), Vec::new());
    for (owner, [own, gpu_own]) in owners.zip(pool.shares(&plans)) {
        lines.extend(own.iter().map(|line| budget_line(owner, line)));
        gpu_lines.extend(gpu_own.iter().map(|line| budget_line(owner, line)));
    }
    Ok(Budget {
        bytes: pool.memory,
        lines,
        gpu_bytes: pool.gpu.map_or(0, |gpu| gpu.memory),
        gpu_lines,
        warnings,
    })
}

/// What a model, or its draft model, is called in the budget.
fn owner(model: &str, drafter: bool) -> String {
    match drafter {
        true => format!("{model}'s draft model"),
        false => model.to_owned(),
    }
}

fn budget_line(owner: Option<&str>, line: &Line) -> BudgetLine {
    let what = match owner {
        Some(owner) => format!("{owner}: {}", line.what),
        None => line.what.to_owned(),
    };
    BudgetLine {
        what,
        bytes: line.bytes,
    }
}

fn limits(config: &Config) -> Limits {
    Limits {
        requests: config.limits.requests(),
        stalled: config.limits.stalled(),
        idle: Duration::from_secs(config.limits.session_idle_s),
        neighbour_factor: config.limits.prefill_slowdown as f32,
        ..Limits::default()
    }
}

/// Opens an engine with some models, as [`Engine::new`] does.
pub type OpenEngine =
    Box<dyn FnOnce(&[(PathBuf, ModelOptions)], &Options) -> Result<Engine> + Send>;

/// What the engine's thread needs beside the configuration.
pub struct Setup {
    /// What the engine is opened with.
    pub options: Options,
    /// Opens an engine with the models of the start.
    pub open: OpenEngine,
    /// Begins to hold an engine to the limits of the board, for as long as the monitor lives.
    pub watch: Box<dyn FnOnce(&mut Engine) -> Monitor + Send>,
}

/// What the thread works with.
pub struct Answering {
    /// Keeps the engine within the limits of the board.
    monitor: Monitor,
    config: Arc<Config>,
    scheduler: Scheduler,
    worker: Worker,
    /// Those that are loaded.
    models: Vec<Model>,
    /// The one that is being loaded, and who waits for it.
    loading: Option<(Model, Option<Done>)>,
    /// Orders that wait until it is.
    deferred: VecDeque<Order>,
    deliveries: Deliveries,
    watchdog: Watchdog,
    started: Instant,
    /// What was done until two moments, the older one first.
    samples: [(Instant, Work); 2],
}

impl Answering {
    /// Opens the models that are loaded at the start, and reads the first of them once, so that its first answer does not
    /// wait for the disk. The weights of the others come when they are asked for, or while nobody asks.
    ///
    /// # Errors
    /// A model cannot be opened, or the budget cannot hold them.
    pub fn open(config: Arc<Config>, setup: Setup, worker: Worker) -> Result<Answering> {
        let models: Vec<Model> = config.at_start().cloned().collect();
        let file = |model: &Model| (model.path.clone(), wishes(&config, model));
        let files: Vec<_> = models.iter().map(file).collect();
        let name = |model: &'_ Model| (model.name.clone(), model.priority);
        let names: Vec<(String, u8)> = models.iter().map(name).collect();
        let names: Vec<(&str, u8)> = names.iter().map(|(name, p)| (name.as_str(), *p)).collect();
        let mut engine = (setup.open)(&files, &setup.options)?;
        let monitor = (setup.watch)(&mut engine);
        let mut scheduler = Scheduler::new(engine, &names, limits(&config));
        if let Some(first) = models.first() {
            read(&mut scheduler, &worker, first)?;
        }
        for model in &models {
            worker.add_vocabulary(scheduler.vocabulary(Some(&model.name))?);
            worker.set_model_state(&model.name, ModelState::Ready);
        }
        let requests_max = config.limits.requests();
        let now = Instant::now();
        let answering = Answering {
            monitor,
            config,
            scheduler,
            worker,
            models,
            loading: None,
            deferred: VecDeque::new(),
            deliveries: Deliveries::new(requests_max),
            watchdog: Watchdog::from_environment(),
            started: now,
            samples: [(now, Work::default()); 2],
        };
        answering.tell_budget();
        answering.worker.set_status(|latest| answering.fill(latest));
        Ok(answering)
    }

    /// Answers until the daemon ends.
    ///
    /// # Errors
    /// The GPU has failed, and all requests with it. CUDA asks for a new process after that.
    pub fn run(mut self) -> Result<()> {
        loop {
            while let Some(order) = self.next_order() {
                if matches!(order, Order::Stop) {
                    return Ok(());
                }
                self.obey(order);
            }
            self.deliveries.catch_up();
            let now = self.started.elapsed();
            let deliveries = &mut self.deliveries;
            let step = self
                .scheduler
                .step(now, &mut |tag, event| deliveries.deliver(tag, event));
            self.sample();
            self.worker.tell_status(|latest| self.fill(latest));
            if let Some(failure) = self.scheduler.engine().device().failure() {
                return Err(failure);
            }
            self.watchdog.feed(Instant::now());
            if let Step::Idle { until } = step {
                let until =
                    until.map_or(SLEEP, |until| until.saturating_sub(self.started.elapsed()));
                self.worker
                    .sleep(until.min(self.watchdog.every().unwrap_or(SLEEP)));
            }
        }
    }

    /// The next order that can be obeyed: while a model is being loaded, none that changes models or memory.
    fn next_order(&mut self) -> Option<Order> {
        let deferred = || self.deferred.pop_front();
        if let Some(order) = self.loading.is_none().then(deferred).flatten() {
            return Some(order);
        }
        loop {
            let order = self.worker.next_order()?;
            if self.loading.is_none() || !order.changes_memory() {
                return Some(order);
            }
            self.deferred.push_back(order);
        }
    }

    fn obey(&mut self, order: Order) {
        let moves_memory = order.moves_memory();
        self.act(order);
        if moves_memory {
            self.tell_budget();
        }
    }

    fn act(&mut self, order: Order) {
        let now = self.started.elapsed();
        match order {
            Order::Generate {
                tag,
                outbox,
                prepared,
                place,
            } => match self.scheduler.submit(tag, *prepared, now) {
                Ok(()) => self.deliveries.begin(tag, outbox, place),
                Err(error) => self.deliveries.refuse(tag, outbox, error),
            },
            Order::Cancel(tag) => {
                self.scheduler.cancel(tag, now);
            }
            Order::CancelAll(client) => {
                self.scheduler.cancel_client(client, now);
                self.deliveries.forget(client);
            }
            Order::CancelEverything => {
                for tag in self.deliveries.tags() {
                    self.scheduler.cancel(tag, now);
                }
            }
            // Who asked may be gone: then nobody is told.
            Order::Reset(reset, done) => {
                let _ = done.send(self.scheduler.reset(reset.model.as_deref(), &reset.session));
            }
            Order::Load(model, done) => self.load(model, done),
            Order::Reserve(opening, reply) => {
                // The loader hears that nobody waits for it, where this drops `reply`.
                if let Some((model, _)) = &self.loading {
                    let _ = reply.send(self.scheduler.reserve(&model.name, *opening));
                }
            }
            Order::Admit(built) => self.admit(built.map(|built| *built)),
            Order::Unload(model, done) => {
                let _ = done.send(self.unload(&model));
            }
            Order::SetBudget(bytes, done) => {
                let _ = done.send(self.scheduler.set_memory(bytes));
            }
            Order::Reload(config) => self.reload(config),
            Order::Stop => {}
        }
    }

    /// Begins to load a model, unless it is there; `done` hears what comes of it.
    fn load(&mut self, model: Model, done: Option<Done>) {
        if self.models.iter().any(|loaded| loaded.name == model.name) {
            return tell(done, Ok(()));
        }
        self.worker
            .set_model_state(&model.name, ModelState::Loading);
        let wishes = wishes(&self.config, &model);
        match loader::begin(self.worker.clone(), model.path.clone(), wishes) {
            Ok(()) => self.loading = Some((model, done)),
            Err(error) => self.cannot_load(&model, done, error),
        }
    }

    /// Takes in the model that was being loaded. Its weights are read when they are asked for, or while nobody asks.
    fn admit(&mut self, built: Result<Built>) {
        let Some((model, done)) = self.loading.take() else {
            return;
        };
        let (name, scheduler) = (&model.name, &mut self.scheduler);
        let admitted = scheduler.admit(name, model.priority, built);
        match admitted.and_then(|_| scheduler.vocabulary(Some(name))) {
            Ok(vocabulary) => {
                self.worker.add_vocabulary(vocabulary);
                self.worker.set_model_state(name, ModelState::Ready);
                self.models.push(model);
                tell(done, Ok(()));
            }
            Err(error) => self.cannot_load(&model, done, error),
        }
    }

    fn cannot_load(&self, model: &Model, done: Option<Done>, error: Error) {
        log::error!("{} cannot be loaded: {error}", model.name);
        self.worker.set_model_state(&model.name, ModelState::Failed);
        tell(done, Err(error));
    }

    fn unload(&mut self, name: &str) -> Result<()> {
        let spent = self.scheduler.spent(Some(name))?;
        self.scheduler.unload(name, self.started.elapsed())?;
        // What it did is done, though it is gone.
        self.deliveries.work.add(&spent);
        self.worker.remove_vocabulary(name);
        self.models.retain(|model| model.name != name);
        self.worker.set_model_state(name, ModelState::Off);
        Ok(())
    }

    /// Takes over what may change while answers are made. What cannot be done is logged.
    fn reload(&mut self, config: Arc<Config>) {
        let told = |result: Result<()>| {
            if let Err(error) = result {
                log::error!("not changed: {error}");
            }
        };
        if let Some(memory) = config.memory
            && self.config.memory != config.memory
        {
            told(self.scheduler.set_memory(memory.0));
        }
        let idle = Duration::from_secs(config.limits.session_idle_s);
        self.scheduler.set_patience(config.limits.stalled(), idle);
        self.config = Arc::clone(&config);
        self.worker.set_status(|latest| {
            latest.sessions.clear();
            latest.status.models = super::status::models(&config);
        });
        for old in self.models.clone() {
            let mut models = config.models.iter().map(|model| model.as_ref());
            match models.find(|new| new.name == old.name) {
                Some(new) if new.engine_part() == old.engine_part() => {
                    told(self.scheduler.set_priority(&new.name, new.priority));
                    self.worker.set_model_state(&new.name, ModelState::Ready);
                }
                _ => told(self.unload(&old.name)),
            }
        }
        let missing = config.at_start().cloned();
        self.deferred
            .extend(missing.map(|model| Order::Load(model, None)));
    }

    fn sample(&mut self) {
        let now = Instant::now();
        if now - self.samples[1].0 < RECENT {
            return;
        }
        self.samples = [self.samples[1], (now, self.done())];
    }

    /// The work so far, sweeps included.
    fn done(&self) -> Work {
        let mut work = self.deliveries.work;
        for model in &self.models {
            // Every model here is the scheduler's too.
            work.add(&self.scheduler.spent(Some(&model.name)).unwrap_or_default());
        }
        work
    }

    /// Writes down how the budget is divided, and makes room for all the conversations that there can be. Of the
    /// status, this is what takes memory; it is done when models come and go, or memory does.
    fn tell_budget(&self) {
        let engine = self.scheduler.engine();
        let name = |id| {
            let mut named = self.models.iter().zip(engine.models());
            let found = named.find(|(_, of)| Some(*of) == id);
            found.map(|(model, _)| model.name.as_str())
        };
        let (mut budget, mut gpu_budget) = (Vec::new(), Vec::new());
        for share in &engine.budget() {
            let owner = name(share.model).map(|name| owner(name, share.drafter));
            let line = |line| budget_line(owner.as_deref(), line);
            budget.extend(share.lines.iter().map(line));
            gpu_budget.extend(share.gpu_lines.iter().map(line));
        }
        let sessions = engine.models().map(|id| engine.sessions(id)).sum();
        self.worker.set_status(|latest| {
            let status = &mut latest.status;
            (status.budget, status.gpu_budget) = (budget, gpu_budget);
            status.budget_bytes = engine.pool().memory;
            status.gpu_budget_bytes = engine.pool().gpu.map_or(0, |gpu| gpu.memory);
            latest.sessions.clear();
            latest.sessions.reserve(sessions);
        });
    }

    /// Brings the numbers of the status up to date. Allocates nothing.
    fn fill(&self, latest: &mut Latest) {
        let engine = self.scheduler.engine();
        let Latest { status, sessions } = latest;
        for (model, id) in self.models.iter().zip(engine.models()) {
            if let Some(told) = status
                .models
                .iter_mut()
                .find(|told| told.name == model.name)
            {
                told.context = engine.plan(id).context as u32;
                told.weight_bytes = engine.weight_bytes(id);
                told.resident_bytes = engine.store().resident_bytes_of(id).min(told.weight_bytes);
            }
        }
        sessions.clear();
        self.scheduler.each_session(|model, name, tokens, state| {
            let place = status.models.iter().position(|told| told.name == model);
            if let Some(model) = place {
                sessions.push(Held {
                    model,
                    name: name.clone(),
                    tokens: tokens as u32,
                    busy: state == SessionState::Busy,
                });
            }
        });
        let (waiting, running) = self.scheduler.requests();
        (status.waiting, status.running) = (waiting as u32, running as u32);
        status.total = self.done();
        status.board = BoardStatus::from(&self.monitor.latest());
        let (since, before) = self.samples[0];
        let seconds = since.elapsed().as_secs_f64().max(1e-3);
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        status.recent = Rates {
            prompt_tokens: rate(status.total.prompt_tokens, before.prompt_tokens),
            answer_tokens: rate(status.total.answer_tokens, before.answer_tokens),
            read_bytes: rate(status.total.read_bytes, before.read_bytes),
        };
    }
}

/// Tells who asked for something what came of it; they may be gone, or nobody have asked.
fn tell(done: Option<Done>, result: Result<()>) {
    if let Some(done) = done {
        let _ = done.send(result);
    }
}

/// Reads a model once.
fn read(scheduler: &mut Scheduler, worker: &Worker, model: &Model) -> Result<()> {
    let engine = scheduler.engine();
    let weights = engine.models().next().map(|id| engine.weight_bytes(id));
    worker.set_reading(Some(Reading {
        model: model.name.clone(),
        arrived: engine.store().arrived_bytes(),
        of: weights.unwrap_or(0),
    }));
    let warmed = scheduler.warm_up(&model.name);
    worker.set_reading(None);
    warmed
}
