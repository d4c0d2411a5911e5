//! The daemon's side of the clients: who is connected, what they asked for, and what they are still owed.
//!
//! All connections are tasks of one thread, so what they share needs no lock.

mod client;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use super::config::{Config, Limits, Model};
use super::in_keys;
use super::message::Answer;
use super::status::Status;
use super::worker::{Order, Worker};
use crate::engine::request::Event;
use crate::error::{Error, Kind, Result};

pub use client::Client;

/// How often the log tells at most that clients are refused.
const REFUSALS_EVERY: Duration = Duration::from_secs(60);

/// A place among the requests that are waiting or being answered.
pub type Place = OwnedSemaphorePermit;

/// What the connections share.
pub struct Front {
    worker: Worker,
    config: RefCell<Rc<Config>>,
    started: Instant,
    clients: Cell<usize>,
    clients_ever: Cell<u32>,
    /// When the log told last that a client was refused.
    refused: Cell<Option<Instant>>,
    /// Numbers that were given so far.
    numbers: Cell<u32>,
    /// For all requests of all clients, from their arrival to their end: so their memory is bounded.
    places: Arc<Semaphore>,
    /// Requests of all clients without their last reply.
    live: Cell<usize>,
    /// The first model can answer.
    ready: Cell<bool>,
    /// No new requests: the daemon ends.
    stopping: Cell<bool>,
    /// Rung when one of these changes, or nothing is live any more.
    changed: Notify,
}

impl Front {
    /// A front to the engine's thread.
    pub fn new(worker: Worker, config: Config) -> Rc<Front> {
        let places = config.limits.requests();
        Rc::new(Front {
            worker,
            refused: Cell::default(),
            numbers: Cell::default(),
            places: Arc::new(Semaphore::new(places)),
            config: RefCell::new(Rc::new(config)),
            started: Instant::now(),
            clients: Cell::new(0),
            clients_ever: Cell::new(0),
            live: Cell::new(0),
            ready: Cell::new(false),
            stopping: Cell::new(false),
            changed: Notify::new(),
        })
    }

    /// The configuration as it is now.
    pub fn config(&self) -> Rc<Config> {
        Rc::clone(&self.config.borrow())
    }

    /// Takes over a changed configuration.
    pub fn set_config(&self, config: Config) {
        self.config.replace(Rc::new(config));
    }

    /// The bounds as they are now.
    pub fn limits(&self) -> Limits {
        self.config.borrow().limits.clone()
    }

    /// The engine's thread.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// The first model can answer from now on.
    pub fn set_ready(&self) {
        self.ready.set(true);
        self.changed.notify_waiters();
    }

    /// Refuses new requests from now on.
    pub fn stop(&self) {
        self.stopping.set(true);
        self.changed.notify_waiters();
    }

    /// Waits until the daemon is to end.
    pub async fn stopped(&self) {
        self.wait_for(|front| front.stopping.get()).await;
    }

    /// Waits until no client is owed a reply.
    pub async fn wait_until_idle(&self) {
        self.wait_for(|front| front.live.get() == 0).await;
    }

    async fn wait_for(&self, so: impl Fn(&Front) -> bool) {
        loop {
            let changed = self.changed.notified();
            if so(self) {
                return;
            }
            changed.await;
        }
    }

    /// Ends all answers.
    pub fn cancel_everything(&self) {
        self.worker.order_always(Order::CancelEverything);
    }

    /// The model of this name; the first one if none is asked for.
    ///
    /// # Errors
    /// The configuration has none of this name.
    pub fn model(&self, name: Option<&str>) -> Result<Model> {
        let config = self.config();
        let Some(index) = config.model(name) else {
            let known: Vec<&str> = config
                .models
                .iter()
                .map(|m| m.as_ref().name.as_str())
                .collect();
            return Err(Error::new(
                Kind::Usage,
                format!(
                    "there is no model {:?} in the configuration",
                    name.unwrap_or_default()
                ),
                format!("name one of {}", known.join(", ")),
            ));
        };
        Ok(config.models[index].as_ref().clone())
    }

    fn add_live(&self, count: usize) {
        self.live.set(self.live.get() + count);
    }

    fn drop_live(&self, count: usize) {
        self.live.set(self.live.get() - count);
        if self.live.get() == 0 {
            self.changed.notify_waiters();
        }
    }

    /// Lets a connection in, of one client or of one after the other. `name` is what the log calls it, at `level`.
    ///
    /// # Errors
    /// There are too many.
    pub fn connect(self: &Rc<Front>, name: String, level: log::Level) -> Result<Rc<Connected>> {
        let most = self.limits().clients;
        if self.clients.get() >= most {
            let lately = |at: Instant| at.elapsed() < REFUSALS_EVERY;
            if !self.refused.get().is_some_and(lately) {
                log::warn!("{name}: refused, as others may be: {most} clients are connected");
                self.refused.set(Some(Instant::now()));
            }
            return Err(Error::new(
                Kind::Busy,
                format!("{most} clients are connected"),
                "disconnect one, or raise `clients` under [limits]",
            ));
        }
        self.clients.set(self.clients.get() + 1);
        self.clients_ever
            .set(self.clients_ever.get().wrapping_add(1));
        log::log!(level, "{name}: connected");
        Ok(Rc::new(Connected {
            front: Rc::clone(self),
            name,
            level,
        }))
    }

    /// Lets a client in that has its connection for itself.
    ///
    /// # Errors
    /// There are too many.
    pub fn admit(self: &Rc<Front>, name: String) -> Result<Client> {
        Ok(Client::new(self.connect(name, log::Level::Info)?))
    }

    /// A number that no other client has.
    fn number(&self) -> u32 {
        self.numbers.set(self.numbers.get().wrapping_add(1));
        self.numbers.get()
    }

    /// A place for one more request.
    ///
    /// # Errors
    /// All are taken.
    fn place(&self) -> Result<Place> {
        Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            let Limits {
                sessions, queue, ..
            } = self.limits();
            Error::new(
                Kind::Busy,
                format!("{sessions} requests are being answered, and {queue} wait"),
                "ask again when some of them are answered, or raise `queue` under [limits]",
            )
        })
    }

    /// How things are.
    pub async fn status(&self) -> Status {
        let mut status = self.worker.status().await;
        status.uptime_s = self.started.elapsed().as_secs();
        status.clients = self.clients.get() as u32;
        status.clients_ever = self.clients_ever.get();
        status
    }
}

/// A connection that was let in, and counts until this is dropped.
pub struct Connected {
    front: Rc<Front>,
    name: String,
    level: log::Level,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.front.clients.set(self.front.clients.get() - 1);
        log::log!(self.level, "{}: disconnected", self.name);
    }
}

impl Connected {
    /// What the log calls it.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Where the engine's thread says what became of a command.
pub type Done = oneshot::Sender<Result<()>>;

/// What those hear who ask a daemon that ends.
pub(super) fn ending() -> Error {
    Error::new(
        Kind::Busy,
        "the daemon ends",
        "ask again when it has started again",
    )
}

/// An error as an event.
fn told(error: &Error) -> Event<'_> {
    Event::Error {
        code: error.kind(),
        text: error.what().into(),
        remedy: in_keys(error.remedy()),
    }
}

/// An error as a reply of its own.
pub fn refusal(error: &Error) -> Answer<'static> {
    Answer::Event(Event::Error {
        code: error.kind(),
        text: error.what().to_owned().into(),
        remedy: in_keys(error.remedy()).into_owned().into(),
    })
}
