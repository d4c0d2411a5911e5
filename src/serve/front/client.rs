//! A client as the daemon sees it: what it asked for, and what it is still owed.
//!
//! A client's requests are submitted by a task of its own, one after the other, so that its connection goes on reading
//! and writing while a request waits for a model, or for its turn to be made into tokens.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::{Connected, Done, Front, Place, ending, refusal, told};
use crate::engine::request::{
    Counts, Event, Generate, Prompt, Reason, SESSION_NAME_BYTES_MAX, Tag, Timings,
};
use crate::engine::scheduler::Flow;
use crate::error::{Error, Kind, Result};
use crate::serve::config::CLIENT_REQUESTS_MAX;
use crate::serve::message::{Answer, Command, Request, Reset};
use crate::serve::outbox::{Outbox, Taken};
use crate::serve::worker::Order;
use crate::text::Message;

/// How often a client whose outbox was full is looked at again.
const AGAIN: Duration = Duration::from_millis(20);

/// A client: its requests end when it is dropped.
pub struct Client {
    connected: Rc<Connected>,
    number: u32,
    outbox: Arc<Outbox>,
    live: RefCell<heapless::Vec<Live, CLIENT_REQUESTS_MAX>>,
    /// Holds no more than there are live requests.
    submissions: mpsc::UnboundedSender<Submission>,
    submitter: AbortHandle,
}

/// A request without its last reply.
#[derive(Debug)]
struct Live {
    id: u32,
    /// Its client wants it to end; it is said once.
    cancelled: Rc<Cell<bool>>,
}

/// A request on its way to the engine's thread.
struct Submission {
    id: u32,
    command: Command,
    cancelled: Rc<Cell<bool>>,
    /// The place of one that is to be answered.
    place: Option<Place>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.outbox.close();
        self.submitter.abort();
        self.cancel_all();
        self.front().drop_live(self.live.borrow().len());
    }
}

impl Client {
    /// A client of this connection.
    pub fn new(connected: Rc<Connected>) -> Client {
        let front = Rc::clone(&connected.front);
        let (number, outbox) = (front.number(), Outbox::new(front.limits().outbox_events));
        let outbox = Arc::new(outbox);
        let (submissions, submitted) = mpsc::unbounded_channel();
        let submitter = Submitter {
            front,
            client: number,
            outbox: Arc::clone(&outbox),
        };
        let task = tokio::task::spawn_local(submitter.run(submitted));
        Client {
            connected,
            number,
            outbox,
            live: RefCell::default(),
            submissions,
            submitter: task.abort_handle(),
        }
    }

    /// What the log calls it.
    pub fn name(&self) -> &str {
        self.connected.name()
    }

    /// Its number, which no other client has while it is connected.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What it belongs to.
    pub fn front(&self) -> &Rc<Front> {
        &self.connected.front
    }

    /// Whether it is owed replies.
    pub fn is_busy(&self) -> bool {
        !self.live.borrow().is_empty()
    }

    /// Ends all its answers.
    pub fn cancel_all(&self) {
        for live in self.live.borrow().iter() {
            live.cancelled.set(true);
        }
        if self.is_busy() {
            let front = self.front();
            front.worker.order_always(Order::CancelAll(self.number));
            front.changed.notify_waiters();
        }
    }

    /// Ends one of its answers, if that goes on.
    pub fn cancel(&self, request: u32) {
        let live = self.live.borrow();
        let found = live.iter().find(|live| live.id == request);
        if let Some(live) = found.filter(|live| !live.cancelled.replace(true)) {
            let tag = Tag {
                client: self.number,
                request: live.id,
            };
            // The engine's thread may not know it yet; then its submitter sees to it.
            let front = self.front();
            front.worker.order_always(Order::Cancel(tag));
            front.changed.notify_waiters();
        }
    }

    /// Does what is asked for. The reply, if there is one at once; other replies are [taken](Self::take) as they come.
    pub async fn request(&self, request: Request) -> Option<Answer<'static>> {
        let Request { id, command } = request;
        if self.live.borrow().iter().any(|live| live.id == id) {
            return Some(refusal(&Error::new(
                Kind::Usage,
                format!("request {id} is still being answered"),
                "give every request its own id",
            )));
        }
        match command {
            Command::Status(_) => Some(Answer::Status(Box::new(self.front().status().await))),
            Command::Cancel(which) => {
                self.cancel(which.request);
                Some(Answer::Ok(Default::default()))
            }
            command => self.submit(id, command).err().map(|e| refusal(&e)),
        }
    }

    /// Hands a request to the submitter.
    fn submit(&self, id: u32, command: Command) -> Result<()> {
        let front = self.front();
        if front.stopping.get() {
            return Err(ending());
        }
        let (requests, limits) = (self.live.borrow().len(), front.limits());
        if requests >= limits.client_requests {
            return Err(Error::new(
                Kind::Busy,
                format!("{requests} requests of this client are not answered yet"),
                "wait for one of them, or raise `client_requests` under [limits]",
            ));
        }
        let place = match &command {
            Command::Generate(generate) => {
                check_bytes(generate, limits.held_bytes())?;
                Some(front.place()?)
            }
            Command::Reset(reset) => {
                check_session(&reset.session)?;
                front.model(reset.model.as_deref()).map(|_| None)?
            }
            Command::Load(name) | Command::Unload(name) => {
                front.model(Some(&name.model)).map(|_| None)?
            }
            Command::SetBudget(_) | Command::Status(_) | Command::Cancel(_) => None,
        };
        let cancelled = Rc::new(Cell::new(false));
        let live = Live {
            id,
            cancelled: Rc::clone(&cancelled),
        };
        let pushed = self.live.borrow_mut().push(live);
        pushed.expect("no more are let in than there is room for");
        front.add_live(1);
        let submission = Submission {
            id,
            command,
            cancelled,
            place,
        };
        let sent = self.submissions.send(submission);
        sent.map_err(|_| ending())
    }

    /// The oldest reply that waits for the client.
    pub fn take(&self) -> Option<Taken> {
        let (taken, wake) = self.outbox.take()?;
        let front = self.front();
        if wake {
            front.worker.wake();
        }
        if taken.answer().is_last() {
            let mut live = self.live.borrow_mut();
            if let Some(place) = live.iter().position(|live| live.id == taken.request) {
                live.swap_remove(place);
                front.drop_live(1);
            }
        }
        Some(taken)
    }

    /// Waits until there may be something to take.
    pub async fn filled(&self) {
        self.outbox.filled().await;
    }
}

/// Whether the texts and numbers of a request take no more memory than they may until it is made ready.
fn check_bytes(generate: &Generate, most: usize) -> Result<()> {
    let prompt = match &generate.prompt {
        Prompt::Raw(text) | Prompt::Text(text) => text.len(),
        Prompt::Tokens(tokens) => tokens.capacity() * size_of::<u32>(),
        Prompt::Messages(messages) => {
            let said = messages.iter().map(|m| m.role.len() + m.content.len());
            messages.capacity() * size_of::<Message>() + said.sum::<usize>()
        }
    };
    let stops = generate.stop.iter().map(String::len).sum::<usize>()
        + generate.stop.capacity() * size_of::<String>();
    let bias = generate.sampling.logit_bias.capacity() * size_of::<(u32, f32)>();
    let others = [&generate.system, &generate.session, &generate.model];
    let others = others.into_iter().flatten().map(String::len).sum::<usize>();
    let bytes = prompt + stops + bias + others;
    if bytes <= most {
        return Ok(());
    }
    Err(Error::new(
        Kind::Usage,
        format!("the request takes {bytes} bytes of memory, and may take {most}"),
        "send fewer messages, tokens or stop strings, or raise `request_bytes` under [limits]",
    ))
}

fn check_session(name: &str) -> Result<()> {
    if name.len() <= SESSION_NAME_BYTES_MAX {
        return Ok(());
    }
    let what = format!("the session's name has {} bytes", name.len());
    let remedy = format!("give a name of 1 to {SESSION_NAME_BYTES_MAX} bytes");
    Err(Error::new(Kind::Usage, what, remedy))
}

/// Takes a client's requests to the engine's thread.
struct Submitter {
    front: Rc<Front>,
    client: u32,
    outbox: Arc<Outbox>,
}

/// What became of a submission that is no error.
enum Submitted {
    /// It is on its way.
    Sent,
    /// Its client cancelled it before.
    Cancelled,
}

impl Submitter {
    async fn run(self, mut submissions: mpsc::UnboundedReceiver<Submission>) {
        while let Some(submission) = submissions.recv().await {
            let id = submission.id;
            match self.submit(submission).await {
                Ok(Submitted::Sent) => {}
                Ok(Submitted::Cancelled) => {
                    let cancelled = Event::Done {
                        reason: Reason::Cancelled,
                        counts: Counts::default(),
                        timings: Timings::default(),
                    };
                    put(&self.outbox, |outbox| outbox.put(id, &cancelled)).await;
                }
                Err(error) => put(&self.outbox, |outbox| outbox.put(id, &told(&error))).await,
            }
        }
    }

    async fn submit(&self, submission: Submission) -> Result<Submitted> {
        let front = &self.front;
        let Submission {
            id,
            command,
            cancelled,
            place,
        } = submission;
        let done = match command {
            Command::Generate(generate) => {
                return self.generate(id, *generate, &cancelled, place).await;
            }
            Command::Reset(reset) => {
                let model = Some(front.model(reset.model.as_deref())?.name);
                self.order(|done| Order::Reset(Reset { model, ..reset }, done))
            }
            Command::Load(model) => {
                let model = front.model(Some(&model.model))?;
                self.order(|done| Order::Load(model, Some(done)))
            }
            Command::Unload(model) => {
                let name = front.model(Some(&model.model))?.name;
                self.order(|done| Order::Unload(name, done))
            }
            Command::SetBudget(budget) => self.order(|done| Order::SetBudget(budget.bytes, done)),
            // Answered where they arrive.
            Command::Status(_) | Command::Cancel(_) => return Ok(Submitted::Sent),
        };
        let outbox = Arc::clone(&self.outbox);
        tokio::task::spawn_local(tell_when_done(outbox, id, done?));
        Ok(Submitted::Sent)
    }

    async fn generate(
        &self,
        id: u32,
        generate: Generate,
        cancelled: &Cell<bool>,
        place: Option<Place>,
    ) -> Result<Submitted> {
        let front = &self.front;
        let model = front.model(generate.model.as_deref())?;
        front
            .wait_for(|front| front.ready.get() || front.stopping.get() || cancelled.get())
            .await;
        if cancelled.get() {
            return Ok(Submitted::Cancelled);
        }
        if !front.ready.get() {
            return Err(ending());
        }
        let prepared = front.worker.prepare(&model.name, generate).await?;
        if cancelled.get() {
            return Ok(Submitted::Cancelled);
        }
        let tag = Tag {
            client: self.client,
            request: id,
        };
        front.worker.order(Order::Generate {
            tag,
            outbox: Arc::clone(&self.outbox),
            prepared,
            place,
        })?;
        Ok(Submitted::Sent)
    }

    fn order(&self, order: impl FnOnce(Done) -> Order) -> Result<oneshot::Receiver<Result<()>>> {
        let (done, answer) = oneshot::channel();
        self.front.worker.order(order(done))?;
        Ok(answer)
    }
}

async fn tell_when_done(outbox: Arc<Outbox>, id: u32, done: oneshot::Receiver<Result<()>>) {
    let result = done.await.unwrap_or_else(|_| Err(ending()));
    put(&outbox, |outbox| match &result {
        Ok(()) => outbox.put_ok(id),
        Err(error) => outbox.put(id, &told(error)),
    })
    .await;
}

/// Puts something into an outbox as soon as there is room.
async fn put(outbox: &Outbox, put: impl Fn(&Outbox) -> Flow) {
    while put(outbox) == Flow::Full {
        tokio::time::sleep(AGAIN).await;
    }
}
