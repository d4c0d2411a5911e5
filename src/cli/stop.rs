//! Ctrl-C: the first asks for a clean end, the second ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::SIGINT;
use signal_hook::flag;

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
