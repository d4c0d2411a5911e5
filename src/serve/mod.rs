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
pub mod check;
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

use std::borrow::Cow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Kind, Result};

/// A runtime of one thread, which may have so many more that block.
///
/// # Errors
/// The system refuses.
pub fn runtime(blocking_threads: usize) -> Result<tokio::runtime::Runtime> {
    let built = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(blocking_threads)
        .build();
    built.map_err(|e| {
        let what = format!("cannot wait for events: {e}");
        Error::new(Kind::Io, what, "free descriptors and memory")
    })
}

/// A remedy in the words of the configuration, for those who have no command line.
pub fn in_keys(remedy: &str) -> Cow<'_, str> {
    const KEYS: [(&str, &str); 5] = [
        ("--gpu-memory", "`gpu_memory`"),
        ("--memory", "`memory`"),
        ("--ctx", "`context`"),
        ("--device cpu", "`device = \"cpu\"`"),
        ("--device", "`device`"),
    ];
    if !KEYS.iter().any(|(option, _)| remedy.contains(option)) {
        return Cow::Borrowed(remedy);
    }
    let replaced = KEYS
        .iter()
        .fold(remedy.to_owned(), |remedy, (option, key)| {
            remedy.replace(option, key)
        });
    Cow::Owned(replaced)
}

/// Locks what is sound after every statement, so also where a panic let it go.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_robot_is_told_of_keys_and_not_of_options() {
        let told = in_keys("give --gpu-memory 2MiB or more, or a smaller --ctx");
        assert_eq!(
            told,
            "give `gpu_memory` 2MiB or more, or a smaller `context`"
        );
        let told = in_keys("update the driver, or use --device cpu");
        assert_eq!(told, "update the driver, or use `device = \"cpu\"`");
        assert!(matches!(in_keys("wait"), Cow::Borrowed("wait")));
    }
}
