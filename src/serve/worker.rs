//! The way from the clients to the engine's thread: a bounded queue of orders, and what both sides share.
//!
//! The front never waits for the engine, and the engine never for the front: orders are taken between two sweeps, and
//! the status is written where it lies, when somebody asked for it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};

use super::config::{Config, Model};
use super::front::{Done, Place};
use super::lock;
use super::message::Reset;
use super::outbox::Outbox;
use super::status::{Latest, ModelState, Status};
use crate::engine::request::{Generate, Tag};
use crate::engine::{Built, Opening, Prepared, Reserved, Vocabulary};
use crate::error::{Error, Kind, Result};

/// How long to wait for the end of a sweep, before an older status has to do.
const STATUS_PATIENCE: Duration = Duration::from_millis(300);

/// Threads that turn prompts into tokens; they are there only while they work.
pub(super) const TOKENIZING_THREADS: usize = 2;

/// What the front asks of the engine's thread.
pub enum Order {
    /// Answer a request.
    Generate {
        /// Whose it is.
        tag: Tag,
        /// Where its events go.
        outbox: Arc<Outbox>,
        /// The request, made ready.
        prepared: Box<Prepared>,
        /// Its place, which it has until its end.
        place: Option<Place>,
    },
    /// End an answer.
    Cancel(Tag),
    /// End all answers of a client that is gone.
    CancelAll(u32),
    /// End all answers there are; every client is told.
    CancelEverything,
    /// Forget a conversation.
    Reset(Reset, Done),
    /// Load a model, and tell whoever asked.
    Load(Model, Option<Done>),
    /// Make room for the model that is being loaded.
    Reserve(Box<Opening>, SyncSender<Result<Reserved>>),
    /// Take it in, or hear why it could not be loaded.
    Admit(Result<Box<Built>>),
    /// Give a model's memory back.
    Unload(String, Done),
    /// Change the memory budget.
    SetBudget(u64, Done),
    /// Take over what may change of a configuration.
    Reload(Arc<Config>),
    /// End the thread.
    Stop,
}

impl Order {
    /// Whether it changes which models there are, or how much memory.
    pub(super) fn changes_memory(&self) -> bool {
        matches!(
            self,
            Order::Load(..) | Order::Unload(..) | Order::SetBudget(..) | Order::Reload(_)
        )
    }

    /// Whether the budget may be divided in another way when it is done.
    pub(super) fn moves_memory(&self) -> bool {
        self.changes_memory() || matches!(self, Order::Reserve(..) | Order::Admit(_))
    }
}

/// A model that is being read for the first time.
#[derive(Clone)]
pub struct Reading {
    /// Its name.
    pub model: String,
    /// Bytes that have arrived, of all models.
    pub arrived: Arc<AtomicU64>,
    /// Bytes that a sweep needs.
    pub of: u64,
}

/// A handle to the engine's thread; all handles are of the same one.
#[derive(Clone)]
pub struct Worker(Arc<Shared>);

struct Shared {
    orders: Mutex<Orders>,
    /// Orders beyond these are refused.
    orders_max: usize,
    /// Rung for every order.
    bell: Condvar,
    latest: Mutex<Latest>,
    /// Somebody wants to know the status as it is now.
    asked: AtomicBool,
    /// The status was brought up to date.
    told: Notify,
    reading: Mutex<Option<Reading>>,
    /// Those of the models that can answer.
    vocabularies: Mutex<Vec<Arc<Vocabulary>>>,
    /// One for each thread that makes requests ready: the others wait where they cost nothing, and leave with their
    /// clients.
    tokenizing: Arc<Semaphore>,
}

struct Orders {
    queue: VecDeque<Order>,
    /// The engine's thread is to look around before it sleeps again.
    woken: bool,
}

impl Worker {
    /// A queue for `orders_max` orders, before there is a thread.
    pub fn new(orders_max: usize, status: Status) -> Worker {
        Worker(Arc::new(Shared {
            // Cancellations come on top: one for each request there is.
            orders: Mutex::new(Orders {
                queue: VecDeque::with_capacity(4 * orders_max),
                woken: false,
            }),
            orders_max,
            bell: Condvar::new(),
            latest: Mutex::new(Latest {
                status,
                ..Latest::default()
            }),
            asked: AtomicBool::new(false),
            told: Notify::new(),
            reading: Mutex::default(),
            vocabularies: Mutex::default(),
            tokenizing: Arc::new(Semaphore::new(TOKENIZING_THREADS)),
        }))
    }

    /// Gives an order.
    ///
    /// # Errors
    /// The engine is so busy that too many wait.
    pub fn order(&self, order: Order) -> Result<()> {
        let mut orders = lock(&self.0.orders);
        if orders.queue.len() >= self.0.orders_max {
            return Err(Error::new(
                Kind::Busy,
                format!("{} requests wait for the next sweep", orders.queue.len()),
                "ask again when some of them are answered",
            ));
        }
        orders.queue.push_back(order);
        drop(orders);
        self.wake();
        Ok(())
    }

    /// Gives an order that ends something: there are no more of these than requests, so none is refused.
    pub fn order_always(&self, order: Order) {
        lock(&self.0.orders).queue.push_back(order);
        self.wake();
    }

    /// Lets the engine's thread look around, if it sleeps.
    pub fn wake(&self) {
        lock(&self.0.orders).woken = true;
        self.0.bell.notify_one();
    }

    /// The oldest order.
    pub(super) fn next_order(&self) -> Option<Order> {
        lock(&self.0.orders).queue.pop_front()
    }

    /// Sleeps until there is an order, somebody [wakes](Self::wake) the thread, or the time is over.
    pub(super) fn sleep(&self, at_most: Duration) {
        let mut orders = lock(&self.0.orders);
        if orders.queue.is_empty() && !orders.woken {
            // Woken for nothing is no harm: the engine looks around and sleeps again.
            (orders, _) = self
                .0
                .bell
                .wait_timeout(orders, at_most)
                .unwrap_or_else(PoisonError::into_inner);
        }
        orders.woken = false;
    }

    /// The status as it is now, or, where a sweep takes long, as it was when somebody asked last.
    pub async fn status(&self) -> Status {
        let told = self.0.told.notified();
        self.0.asked.store(true, Ordering::Release);
        self.wake();
        let _ = tokio::time::timeout(STATUS_PATIENCE, told).await;
        self.last_status()
    }

    /// The status as it was last.
    pub fn last_status(&self) -> Status {
        lock(&self.0.latest).to_status()
    }

    /// Brings the status up to date, if somebody asked.
    pub(super) fn tell_status(&self, update: impl FnOnce(&mut Latest)) {
        if self.0.asked.swap(false, Ordering::Acquire) {
            update(&mut lock(&self.0.latest));
            self.0.told.notify_waiters();
        }
    }

    /// Brings the status up to date, asked or not.
    pub(super) fn set_status(&self, update: impl FnOnce(&mut Latest)) {
        update(&mut lock(&self.0.latest));
    }

    /// Tells whether a model can answer.
    pub(super) fn set_model_state(&self, name: &str, state: ModelState) {
        let status = &mut lock(&self.0.latest).status;
        if let Some(model) = status.models.iter_mut().find(|model| model.name == name) {
            model.state = state;
        }
    }

    /// The model that is being read for the first time, if any.
    pub fn reading(&self) -> Option<Reading> {
        lock(&self.0.reading).clone()
    }

    pub(super) fn set_reading(&self, reading: Option<Reading>) {
        *lock(&self.0.reading) = reading;
    }

    /// Makes a model's vocabulary known.
    pub(super) fn add_vocabulary(&self, vocabulary: Arc<Vocabulary>) {
        lock(&self.0.vocabularies).push(vocabulary);
    }

    /// Forgets a model's vocabulary.
    pub(super) fn remove_vocabulary(&self, model: &str) {
        lock(&self.0.vocabularies).retain(|vocabulary| vocabulary.model() != model);
    }

    /// Makes a request ready, on a thread that may take its time.
    ///
    /// # Errors
    /// Its model is not loaded, or something of it makes no sense.
    pub async fn prepare(&self, model: &str, request: Generate) -> Result<Box<Prepared>> {
        let known = |vocabulary: &&Arc<Vocabulary>| vocabulary.model() == model;
        let found = lock(&self.0.vocabularies).iter().find(known).cloned();
        let Some(vocabulary) = found else {
            return Err(self.cannot_answer(model));
        };
        let turn = Arc::clone(&self.0.tokenizing).acquire_owned().await;
        let prepared = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            vocabulary.prepare(&request).map(Box::new)
        });
        let prepared = prepared.await;
        prepared.unwrap_or_else(|e| {
            Err(Error::new(
                Kind::Usage,
                format!("the request broke the tokenizer: {e}"),
                "report this",
            ))
        })
    }

    /// Why a model that is not there cannot answer.
    fn cannot_answer(&self, name: &str) -> Error {
        let status = &lock(&self.0.latest).status;
        let model = status.models.iter().find(|model| model.name == name);
        let (what, remedy) = match model.map_or(ModelState::Off, |model| model.state) {
            ModelState::Loading => ("is being loaded", "ask again in a moment"),
            ModelState::Failed => (
                "could not be loaded",
                "see the daemon's log, or ask another one (`airstream status` lists them)",
            ),
            ModelState::Off | ModelState::Ready => (
                "is not loaded",
                "load it first (\"load\"), or ask another one (`airstream status` lists them)",
            ),
        };
        Error::new(Kind::Busy, format!("the model {name:?} {what}"), remedy)
    }
}
