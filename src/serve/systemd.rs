//! What the daemon and the service manager tell each other. Without one, nothing happens.

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// How much longer than a step of the start may take than it announces.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells the service manager something. That there is none is no error; that it does not listen is logged.
pub fn notify(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        log::warn!("the service manager does not listen: {e}");
    }
}

/// The daemon is starting (or reloading) and needs more time than the manager allows; `status` says what for.
pub fn starting(status: &str) {
    let patience = PATIENCE.as_micros() as u32;
    notify(&[
        NotifyState::ExtendTimeoutUsec(patience),
        NotifyState::Status(status),
    ]);
}

/// The first model can answer.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The configuration is being read again; [`ready`] follows.
pub fn reloading() {
    let now = NotifyState::monotonic_usec_now();
    match now {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// The daemon ends, within the time given.
pub fn stopping(within: Duration) {
    let patience = (within + PATIENCE / 6).as_micros() as u32;
    notify(&[
        NotifyState::Stopping,
        NotifyState::ExtendTimeoutUsec(patience),
    ]);
}

/// The sockets that the service manager listens on for us, in the order of its unit.
pub fn listening_sockets() -> Vec<OwnedFd> {
    match sd_notify::listen_fds() {
        // SAFETY: the manager has opened these descriptors for this process, which has not touched them yet: this is
        // called once, at its start.
        #[allow(unsafe_code)]
        Ok(fds) => fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect(),
        Err(e) => {
            log::warn!("ignoring the sockets of the service manager: {e}");
            Vec::new()
        }
    }
}

/// The manager is told so often at most.
const FEED_EVERY: Duration = Duration::from_secs(1);

/// Tells the manager that the sweeps go on. The engine's thread owns it, and nothing else can feed it.
#[derive(Debug)]
pub struct Watchdog {
    /// The manager's socket, and how often to write to it at least; none without a manager that watches.
    feed: Option<(UnixDatagram, Duration)>,
    fed: Option<Instant>,
}

impl Watchdog {
    /// The watchdog that the manager asks for.
    pub fn from_environment() -> Watchdog {
        let feed =
            sd_notify::watchdog_enabled().and_then(|timeout| Some((connect()?, timeout / 3)));
        Watchdog { feed, fed: None }
    }

    /// The longest time that may pass between two [`feed`](Self::feed)s.
    pub fn every(&self) -> Option<Duration> {
        self.feed.as_ref().map(|(_, every)| *every)
    }

    /// A sweep is done, or there is none to do. Allocates nothing.
    pub fn feed(&mut self, now: Instant) {
        let Some((socket, every)) = &self.feed else {
            return;
        };
        // What is not said now may have to wait for a long sweep.
        if self
            .fed
            .is_some_and(|fed| now - fed < FEED_EVERY.min(*every))
        {
            return;
        }
        self.fed = Some(now);
        // If the manager does not read, it also does not wait for us.
        let _ = socket.send(b"WATCHDOG=1");
    }
}

fn connect() -> Option<UnixDatagram> {
    let path = std::env::var_os("NOTIFY_SOCKET")?;
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    let connected = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    connected
        .inspect_err(|e| log::warn!("the watchdog cannot be fed: {e}"))
        .ok()
}
