//! The daemon: one process that answers many clients out of one memory budget.
//!
//! Two threads. The **engine's thread** ([`engine`]) owns the scheduler and does nothing but sweep: between two sweeps
//! it takes orders from a bounded queue ([`worker`]), and it puts events into bounded outboxes ([`outbox`]), one for
//! each client. A full outbox pauses that client's requests and nothing else. The **front** ([`front`]) is one thread
//! with a task for each connection, whatever it comes by:
//!
//! | module | what clients speak |
//! |---|---|
//! | [`unix`] | JSON, one object a line, on UNIX sockets |
//! | [`serial`] | `postcard` in frames on serial ports, or lines for a person |
//! | [`http`] | OpenAI's interface over HTTP/1.1 |
//!
//! All of them say the same things ([`message`]), as [`client`] does at the other end. [`daemon`] is the life of the
//! process, [`config`] its configuration file, [`systemd`] what it tells the service manager.

mod accept;
pub mod client;
pub mod config;
pub mod daemon;
pub mod deliveries;
pub mod engine;
pub mod front;
pub mod http;
pub mod lines;
mod loader;
pub mod message;
pub mod outbox;
pub mod serial;
pub mod sockets;
pub mod status;
pub mod systemd;
pub mod unix;
pub mod worker;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks what is sound after every statement, so also where a panic let it go.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
