//! The daemon's life: sockets, engine, clients, signals, and a clean end.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::LocalSet;

use super::config::{Config, Limits, Listen, Load, Size};
use super::engine::{Answering, Setup};
use super::front::Front;
use super::http::Token;
use super::sockets::{self, Sockets};
use super::status::{ModelState, Status, models};
use super::systemd;
use super::worker::{Order, TOKENIZING_THREADS, Worker};
use crate::error::{Error, Kind, Result};
use crate::units::bytes;

/// How often the service manager is told how far loading is.
const PROGRESS: Duration = Duration::from_millis(500);
/// How long opening the models may take, before their weights are read.
const OPENING_MAX: Duration = Duration::from_secs(600);
/// What connections get to write the last replies.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// Orders that may wait: a sweep takes them all, so there are many only while one takes long.
const ORDERS_MAX: usize = 256;

/// Serves until SIGTERM or Ctrl-C. `path` is where the configuration was read from, and is again at SIGHUP.
///
/// # Errors
/// A socket cannot be listened on, a model not be loaded, the GPU has failed, or the engine's thread has died. Who
/// started the daemon should start it again after the last two.
pub fn run(config: Config, path: &Path, setup: Setup) -> Result<()> {
    let runtime = super::runtime(TOKENIZING_THREADS)?;
    let local = LocalSet::new();
    let ended = local.block_on(&runtime, serve(config, path, setup));
    // A prompt that is still being tokenized has nobody left to answer to.
    runtime.shutdown_background();
    ended
}

async fn serve(config: Config, path: &Path, setup: Setup) -> Result<()> {
    let (mut signals, mut hangup) = (Signals::new()?, watch(SignalKind::hangup())?);
    systemd::starting("opening sockets");
    let sockets = Sockets::open(&config)?;
    let worker = Worker::new(ORDERS_MAX, first_status(&config));
    let front = Front::new(worker.clone(), config);
    let http = sockets.serve(&front);
    let (opened, mut ended) = start_engine(&front, setup)?;
    let started = Instant::now();
    tokio::select! {
        opened = opened => match opened {
            Ok(result) => result?,
            Err(_) => return Err(died()),
        },
        never = progress(&worker) => match never {},
        () = signals.stop() => return Ok(()),
    }
    front.set_ready();
    let seconds = started.elapsed().as_secs_f64();
    log::info!("ready after {seconds:.1} s");
    systemd::ready(&format!("ready after {seconds:.1} s"));
    loop {
        tokio::select! {
            end = &mut ended => {
                // Clients are told before the process ends.
                front.stop();
                let _ = tokio::time::timeout(LAST_WORDS, front.wait_until_idle()).await;
                tokio::time::sleep(LAST_WORDS).await;
                return end.unwrap_or_else(|_| Err(died()));
            }
            () = signals.stop() => break,
            _ = hangup.recv() => reload(&front, path, http.as_ref()),
        }
    }
    finish(&front, &mut signals, ended).await;
    Ok(())
}

fn died() -> Error {
    Error::new(
        Kind::Io,
        "the engine's thread has died",
        "see above why, and report it",
    )
}

/// The status before anything is loaded.
fn first_status(config: &Config) -> Status {
    let mut models = models(config);
    for (told, model) in models.iter_mut().zip(&config.models) {
        if model.as_ref().load == Load::Start {
            told.state = ModelState::Loading;
        }
    }
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        budget_bytes: config.memory.map_or(0, |memory| memory.0),
        models,
        waiting_max: config.limits.queue as u32,
        ..Status::default()
    }
}

type Opened = oneshot::Receiver<Result<()>>;

/// Starts the engine's thread. The first receiver hears whether the models could be loaded, the second the thread's
/// end.
fn start_engine(front: &Front, setup: Setup) -> Result<(Opened, oneshot::Receiver<Result<()>>)> {
    let (config, worker) = (front.config(), front.worker().clone());
    // The thread outlives no borrow of the front's, so it has its own copy.
    let config = Arc::new(Config::clone(&config));
    let (tell_opened, opened) = oneshot::channel();
    let (tell_ended, ended) = oneshot::channel();
    let thread = thread::Builder::new().name("airstream-engine".into());
    let spawned = thread.spawn(move || {
        match Answering::open(config, setup, worker) {
            // If the daemon was told to end meanwhile, nobody listens and nothing is to be answered.
            Ok(answering) => {
                if tell_opened.send(Ok(())).is_ok() {
                    drop(tell_ended.send(answering.run()));
                }
            }
            Err(error) => drop(tell_opened.send(Err(error))),
        }
    });
    spawned.map_err(|e| {
        Error::new(
            Kind::Io,
            format!("cannot start the engine's thread: {e}"),
            "raise the limit on threads",
        )
    })?;
    Ok((opened, ended))
}

/// Tells the service manager how far loading is, and to have patience as long as it goes on.
async fn progress(worker: &Worker) -> std::convert::Infallible {
    let (mut before, begun) = (None, Instant::now());
    loop {
        let reading = worker.reading();
        let arrived = reading
            .as_ref()
            .map(|r| r.arrived.load(std::sync::atomic::Ordering::Relaxed));
        // A disk that delivers nothing is not waited for endlessly. What opening does is not counted: it takes the arena,
        // and compiles the GPU's kernels.
        let opens = arrived.is_none() && begun.elapsed() < OPENING_MAX;
        if opens || Some(arrived) != before {
            systemd::starting(&match (&reading, arrived) {
                (Some(reading), Some(arrived)) => {
                    let share = (100 * arrived / reading.of.max(1)).min(100);
                    format!(
                        "loading {}: {share}% of {}",
                        reading.model,
                        bytes(reading.of)
                    )
                }
                _ => "opening the models".to_owned(),
            });
        }
        before = Some(arrived);
        tokio::time::sleep(PROGRESS).await;
    }
}

/// Lets answers end for as long as the configuration says, and then ends them.
async fn finish(front: &Front, signals: &mut Signals, ended: oneshot::Receiver<Result<()>>) {
    let within = front.limits().stop();
    log::info!("ending: answers have {} s to finish", within.as_secs());
    systemd::stopping(within);
    front.stop();
    tokio::select! {
        () = front.wait_until_idle() => {}
        () = tokio::time::sleep(within) => log::info!("cancelling what is left"),
        () = signals.stop() => log::info!("told again: cancelling what is left"),
    }
    // Each of these waits has its own time.
    systemd::stopping(within);
    front.cancel_everything();
    // Every request's last event is on its way after one sweep.
    let _ = tokio::time::timeout(within.max(LAST_WORDS), front.wait_until_idle()).await;
    tokio::time::sleep(LAST_WORDS).await;
    systemd::stopping(within);
    front.worker().order_always(Order::Stop);
    // A sweep from a slow disk may take long; the process ends without it.
    let _ = tokio::time::timeout(within.max(LAST_WORDS), ended).await;
}

/// Reads the configuration again, and takes over what may change. `http` is where HTTP is served, and for which token.
fn reload(front: &Rc<Front>, path: &Path, http: Option<&(Listen, Token)>) {
    systemd::reloading();
    let read = Config::read(path).and_then(|config| {
        // What is meant for another address is not for the one that is open.
        let new = config.http.as_ref().map(|new| new.as_ref());
        let same = new
            .zip(http)
            .filter(|(new, (listen, _))| new.listen == *listen);
        if let Some((new, (_, token))) = same {
            token.become_like(&sockets::token(new)?);
        }
        Ok(config)
    });
    match read {
        Ok(mut config) => {
            let old = front.config();
            for what in unchangeable(&old, &config) {
                log::warn!("{}: {what} changes at the next start only", path.display());
            }
            keep_promise(&old.limits, &mut config.limits);
            front
                .worker()
                .order_always(Order::Reload(Arc::new(config.clone())));
            front.set_config(config);
            log::info!(
                "{}: read again; models that have the path they had are not",
                path.display()
            );
            systemd::ready("configuration read again");
        }
        Err(error) => {
            log::error!("the configuration stays as it was: {error}");
            systemd::ready("the changed configuration has an error: see the log");
        }
    }
}

/// What differs, but cannot be changed while the daemon runs.
fn unchangeable(old: &Config, new: &Config) -> Vec<&'static str> {
    let mut changes = Vec::new();
    let mut differs = |what, differs: bool| {
        if differs {
            changes.push(what);
        }
    };
    let no_longer = old.memory.is_some() && new.memory.is_none();
    differs("`memory`, which is no longer given,", no_longer);
    differs("`gpu_memory`", old.gpu_memory != new.gpu_memory);
    differs("`device`", old.device != new.device);
    differs("`threads`", old.threads != new.threads);
    differs("`verify`", old.verify != new.verify);
    differs(
        "a [[socket]]",
        !old.sockets
            .iter()
            .map(|s| s.as_ref())
            .eq(new.sockets.iter().map(|s| s.as_ref())),
    );
    differs(
        "a [[serial]]",
        !old.serials
            .iter()
            .map(|s| s.as_ref())
            .eq(new.serials.iter().map(|s| s.as_ref())),
    );
    let listen = |config: &Config| Some(config.http.as_ref()?.as_ref().listen.clone());
    differs("`listen` of [http]", listen(old) != listen(new));
    let (a, b) = (&old.limits, &new.limits);
    differs("`sessions`", a.sessions != b.sessions);
    differs("`queue`", a.queue != b.queue);
    differs(
        "`prefill_slowdown`",
        a.prefill_slowdown != b.prefill_slowdown,
    );
    differs("a larger `clients`", b.clients > a.clients);
    let larger = b.request_bytes.0 > a.request_bytes.0;
    differs("a larger `request_bytes`", larger);
    let larger = b.outbox_events > a.outbox_events;
    differs("a larger `outbox_events`", larger);
    changes
}

/// Holds what clients can make the daemon hold to what the budget was divided for.
fn keep_promise(old: &Limits, new: &mut Limits) {
    new.clients = new.clients.min(old.clients);
    new.request_bytes = Size(new.request_bytes.0.min(old.request_bytes.0));
    new.outbox_events = new.outbox_events.min(old.outbox_events);
}

/// The signals that end the daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

fn watch(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|e| {
        Error::new(
            Kind::Io,
            format!("cannot watch for signals: {e}"),
            "free some memory",
        )
    })
}

impl Signals {
    fn new() -> Result<Signals> {
        Ok(Signals {
            terminate: watch(SignalKind::terminate())?,
            interrupt: watch(SignalKind::interrupt())?,
        })
    }

    /// Waits for SIGTERM or Ctrl-C.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
