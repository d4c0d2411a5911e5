//! A sign of life while the first sweeps read a model.

use std::io::{IsTerminal, stderr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::report;

/// What takes less needs no sign.
const PATIENCE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(20);

/// Runs `work`; if it takes long and a person watches, tells on stderr how much has been read.
pub fn while_reading<T>(arrived_bytes: Arc<AtomicU64>, work: impl FnOnce() -> T) -> T {
    if !stderr().is_terminal() {
        return work();
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| watch(&arrived_bytes, &done));
        // However `work` ends, the watcher must, or the scope never would.
        let _ending = Ending(&done);
        work()
    })
}

/// Tells the watcher that it is over.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn watch(arrived_bytes: &AtomicU64, done: &AtomicBool) {
    let (start, before) = (Instant::now(), arrived_bytes.load(Ordering::Relaxed));
    let mut shown = false;
    while !done.load(Ordering::Relaxed) {
        std::thread::sleep(TICK);
        let elapsed = start.elapsed();
        if elapsed > PATIENCE && !done.load(Ordering::Relaxed) {
            let bytes = arrived_bytes.load(Ordering::Relaxed) - before;
            let rate = bytes as f64 / elapsed.as_secs_f64() / 1e9;
            eprint!("\rread {} at {rate:.2} GB/s\x1b[K", report::bytes(bytes));
            shown = true;
        }
    }
    if shown {
        eprint!("\r\x1b[K");
    }
}
