//! Loads a model on a thread of its own, while the engine's thread goes on answering: that one only makes room for it and
//! takes it in, between two sweeps.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use super::front::ending;
use super::worker::{Order, Worker};
use crate::engine::{Built, ModelOptions, Opening};
use crate::error::{Error, Kind, Result};

/// Begins to load a model. [`Order::Reserve`] follows, and in any case [`Order::Admit`].
///
/// # Errors
/// There is no thread for it; nothing follows then.
pub fn begin(worker: Worker, path: PathBuf, wishes: ModelOptions) -> Result<()> {
    let thread = thread::Builder::new().name("airstream-load".into());
    let spawned = thread.spawn(move || {
        // Whatever is wrong with a file, the daemon goes on with the others.
        let built = catch_unwind(AssertUnwindSafe(|| load(&worker, &path, &wishes)));
        let built = built.unwrap_or_else(|_| Err(broke(&path)));
        worker.order_always(Order::Admit(built.map(Box::new)));
    });
    spawned.map(drop).map_err(|e| {
        Error::new(
            Kind::Io,
            format!("cannot start a thread to load a model: {e}"),
            "raise the limit on threads",
        )
    })
}

fn load(worker: &Worker, path: &Path, wishes: &ModelOptions) -> Result<Built> {
    let opening = Box::new(Opening::read(path, wishes)?);
    let (reply, reserved) = mpsc::sync_channel(1);
    worker.order_always(Order::Reserve(opening, reply));
    let reserved = reserved.recv().unwrap_or_else(|_| Err(ending()));
    reserved?.build()
}

fn broke(path: &Path) -> Error {
    Error::new(
        Kind::Format,
        format!("{} could not be loaded: see above why", path.display()),
        "report it, with the file",
    )
}
