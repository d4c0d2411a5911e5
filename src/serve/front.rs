//! The daemon's side of the clients: who is connected, what they asked for, and what they are still owed.
//!
//! All connections are tasks of one thread, so what they share needs no lock.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use super::config::{CLIENT_REQUESTS_MAX, Config, Limits, Model};
use super::message::{Answer, Command, Request, Reset};
use super::outbox::{Outbox, Taken};
use super::status::Status;
use super::worker::{Order, Worker};
use crate::engine::request::{Event, Generate, Tag};
use crate::engine::scheduler::Flow;
use crate::error::{Error, Kind, Result};

/// How often a client whose outbox was full is looked at again.
const AGAIN: Duration = Duration::from_millis(20);

/// What the connections share.
pub struct Front {
    worker: Worker,
    config: RefCell<Rc<Config>>,
    started: Instant,
    clients: Cell<usize>,
    clients_ever: Cell<u32>,
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
        Rc::new(Front {
            worker,
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

    /// Lets a client in; `name` is what the log calls it.
    ///
    /// # Errors
    /// There are too many.
    pub fn admit(self: &Rc<Front>, name: String) -> Result<Client> {
        let limits = self.limits();
        if self.clients.get() >= limits.clients {
            log::warn!("{name}: refused, {} clients are connected", limits.clients);
            return Err(Error::new(
                Kind::Usage,
                format!("{} clients are connected", limits.clients),
                "disconnect one, or raise `clients` under [limits]",
            ));
        }
        self.clients.set(self.clients.get() + 1);
        self.clients_ever
            .set(self.clients_ever.get().wrapping_add(1));
        log::info!("{name}: connected");
        Ok(Client {
            front: Rc::clone(self),
            number: self.clients_ever.get(),
            outbox: Arc::new(Outbox::new(limits.outbox_events)),
            live: RefCell::default(),
            name,
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

/// A client: its requests end when it is dropped.
pub struct Client {
    front: Rc<Front>,
    number: u32,
    outbox: Arc<Outbox>,
    live: RefCell<heapless::Vec<Live, CLIENT_REQUESTS_MAX>>,
    name: String,
}

/// A request without its last reply.
#[derive(Debug)]
struct Live {
    id: u32,
    /// The engine was told to end it, which it is told once.
    cancelled: bool,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.outbox.close();
        self.cancel_all();
        self.front.drop_live(self.live.borrow().len());
        self.front.clients.set(self.front.clients.get() - 1);
        log::info!("{}: disconnected", self.name);
    }
}

impl Client {
    /// What the log calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number, which no other client has while it is connected.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What it belongs to.
    pub fn front(&self) -> &Rc<Front> {
        &self.front
    }

    /// Whether it is owed replies.
    pub fn is_busy(&self) -> bool {
        !self.live.borrow().is_empty()
    }

    /// Whether a request is not answered yet.
    pub fn is_live(&self, request: u32) -> bool {
        self.live.borrow().iter().any(|live| live.id == request)
    }

    /// Ends all its answers.
    pub fn cancel_all(&self) {
        if self.is_busy() {
            self.front
                .worker
                .order_always(Order::CancelAll(self.number));
        }
    }

    /// Ends one of its answers, if that goes on.
    pub fn cancel(&self, request: u32) {
        let mut live = self.live.borrow_mut();
        let found = live.iter_mut().find(|live| live.id == request);
        if let Some(live) = found.filter(|live| !live.cancelled) {
            live.cancelled = true;
            let tag = Tag {
                client: self.number,
                request,
            };
            self.front.worker.order_always(Order::Cancel(tag));
        }
    }

    /// Does what is asked for. The reply, if there is one at once; other replies are [taken](Self::take) as they come.
    pub async fn request(&self, request: Request) -> Option<Answer<'static>> {
        let id = request.id;
        if self.is_live(id) {
            return Some(refusal(&Error::new(
                Kind::Usage,
                format!("request {id} is still being answered"),
                "give every request its own id",
            )));
        }
        let at_once = matches!(request.command, Command::Status(_) | Command::Cancel(_));
        if self.front.stopping.get() && !at_once {
            return Some(refusal(&Error::new(
                Kind::Usage,
                "the daemon ends",
                "ask again when it has started again",
            )));
        }
        let (requests, most) = (
            self.live.borrow().len(),
            self.front.limits().client_requests,
        );
        if requests >= most && !at_once {
            return Some(refusal(&Error::new(
                Kind::Busy,
                format!("{requests} requests of this client are not answered yet"),
                "wait for one of them, or raise `client_requests` under [limits]",
            )));
        }
        let done = match request.command {
            Command::Status(_) => return Some(Answer::Status(Box::new(self.front.status().await))),
            Command::Cancel(which) => {
                self.cancel(which.request);
                return Some(Answer::Ok(Default::default()));
            }
            Command::Generate(generate) => {
                return self
                    .generate(id, *generate)
                    .await
                    .err()
                    .map(|e| refusal(&e));
            }
            Command::Reset(reset) => self.reset(reset),
            Command::Load(model) => self.load(&model.model),
            Command::Unload(model) => self.order(|done| Order::Unload(model.model, done)),
            Command::SetBudget(budget) => self.order(|done| Order::SetBudget(budget.bytes, done)),
        };
        match done {
            Ok(done) => {
                self.begin(id);
                tokio::task::spawn_local(tell_when_done(Arc::clone(&self.outbox), id, done));
                None
            }
            Err(error) => Some(refusal(&error)),
        }
    }

    async fn generate(&self, id: u32, generate: Generate) -> Result<()> {
        let model = self.front.model(generate.model.as_deref())?;
        self.front
            .wait_for(|front| front.ready.get() || front.stopping.get())
            .await;
        let prepared = self.front.worker.prepare(&model.name, generate).await?;
        let tag = Tag {
            client: self.number,
            request: id,
        };
        self.front.worker.order(Order::Generate {
            tag,
            outbox: Arc::clone(&self.outbox),
            prepared,
        })?;
        self.begin(id);
        Ok(())
    }

    fn begin(&self, id: u32) {
        let live = Live {
            id,
            cancelled: false,
        };
        let pushed = self.live.borrow_mut().push(live);
        pushed.expect("no more are let in than there is room for");
        self.front.add_live(1);
    }

    fn reset(&self, reset: Reset) -> Result<oneshot::Receiver<Result<()>>> {
        let model = Some(self.front.model(reset.model.as_deref())?.name);
        self.order(|done| Order::Reset(Reset { model, ..reset }, done))
    }

    fn load(&self, name: &str) -> Result<oneshot::Receiver<Result<()>>> {
        let model = self.front.model(Some(name))?;
        self.order(|done| Order::Load(model, Some(done)))
    }

    fn order(&self, order: impl FnOnce(Done) -> Order) -> Result<oneshot::Receiver<Result<()>>> {
        let (done, answer) = oneshot::channel();
        self.front.worker.order(order(done))?;
        Ok(answer)
    }

    /// The oldest reply that waits for the client.
    pub fn take(&self) -> Option<Taken> {
        let (taken, wake) = self.outbox.take()?;
        if wake {
            self.front.worker.wake();
        }
        if taken.answer().is_last() {
            let mut live = self.live.borrow_mut();
            if let Some(place) = live.iter().position(|live| live.id == taken.request) {
                live.swap_remove(place);
                self.front.drop_live(1);
            }
        }
        Some(taken)
    }

    /// Waits until there may be something to take.
    pub async fn filled(&self) {
        self.outbox.filled().await;
    }
}

/// Where the engine's thread says what became of a command.
pub type Done = oneshot::Sender<Result<()>>;

async fn tell_when_done(outbox: Arc<Outbox>, id: u32, done: oneshot::Receiver<Result<()>>) {
    let ended = || {
        Error::new(
            Kind::Usage,
            "the daemon ends",
            "ask again when it has started again",
        )
    };
    let result = done.await.unwrap_or_else(|_| Err(ended()));
    loop {
        let put = match &result {
            Ok(()) => outbox.put_ok(id),
            Err(error) => outbox.put(id, &Event::from(error)),
        };
        if put != Flow::Full {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// An error as a reply of its own.
pub fn refusal(error: &Error) -> Answer<'static> {
    Answer::Event(Event::Error {
        code: error.kind(),
        text: error.what().to_owned().into(),
        remedy: error.remedy().to_owned().into(),
    })
}
