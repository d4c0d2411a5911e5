//! Signals that end a command. Ctrl-C: the first asks for a clean end, the second ends at once.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigHandler, Signal, signal};
use signal_hook::consts::SIGINT;
use signal_hook::flag;

/// Lets the process end silently when nobody reads what it prints any more (`| head`), as other tools do.
///
/// Not for a command that talks to a socket: a peer that goes away would end it too.
pub fn with_the_reader() {
    // SAFETY: the default action runs no code of this process.
    if let Err(e) = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) } {
        log::debug!("an early end of the output will be an error: {e}");
    }
}

/// Set by Ctrl-C.
#[derive(Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Takes over SIGINT.
    pub fn install() -> Stop {
        let stop = Arc::new(AtomicBool::new(false));
        // The order matters: the second Ctrl-C finds the flag set and ends the process.
        let registered = flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&stop))
            .and_then(|_| flag::register(SIGINT, Arc::clone(&stop)));
        if let Err(e) = registered {
            log::warn!("Ctrl-C will end the program without a summary: {e}");
        }
        Stop(stop)
    }

    /// Whether Ctrl-C was pressed.
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Forgets a Ctrl-C that was acted on.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}
