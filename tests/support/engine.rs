//! Opening the engine in tests.

use std::path::Path;

use airstream::engine::{Engine, Options};

/// Opens an engine, or fails the test with the reason.
pub fn open(path: &Path, options: &Options) -> Engine {
    Engine::open(path, options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
