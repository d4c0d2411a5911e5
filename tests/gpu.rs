//! The CUDA backend on an NVIDIA GPU: what `tests/kernels.rs` and `tests/cuda.rs` show without one, and what only one can
//! show. `tests/on_gpu` runs it.
//!
//! Where there is no GPU each test says that it was skipped; with `AIRSTREAM_GPU=require` it fails. Lines that begin with
//! `figure:` are what was measured.
#![allow(unsafe_code)]

#[path = "support/agreement.rs"]
mod agreement;
#[path = "cuda/checks.rs"]
mod checks;
#[path = "support/counting_thread.rs"]
mod counting_thread;
#[path = "support/driven.rs"]
mod driven;
#[path = "gpu/engine.rs"]
mod engine;
#[path = "support/greedy.rs"]
mod greedy;
#[path = "kernels/mod.rs"]
mod kernels;
#[path = "cuda/likeliest_checks.rs"]
mod likeliest_checks;
#[path = "support/models.rs"]
mod models;
#[path = "gpu/rates.rs"]
mod rates;
#[path = "gpu/real_models.rs"]
mod real_models;
#[path = "support/reference.rs"]
mod reference;
#[path = "cuda/staged_checks.rs"]
mod staged_checks;
#[path = "support/mod.rs"]
mod support;

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use airstream::device::cuda;
use checks::Gpu;
use driven::Driven;
use kernels::launch::Runner;

/// Says something on stderr itself: the harness hides what passing tests print by macro.
fn say(what: &str) {
    writeln!(std::io::stderr(), "{what}").expect("stderr is there");
}

/// A figure that was measured.
fn figure(name: &str, value: f64) {
    say(&format!("figure: {name} {value:.4}"));
}

/// NVIDIA's driver, opened once more.
fn open() -> Option<Gpu> {
    let begun = Instant::now();
    match cuda::open() {
        Ok(gpu) => {
            figure("open_s", begun.elapsed().as_secs_f64());
            Some(gpu)
        }
        Err(error) => {
            let required = std::env::var_os("AIRSTREAM_GPU").is_some_and(|how| how == "require");
            assert!(!required, "no GPU: {error}");
            say(&format!("SKIPPED: no GPU: {error}"));
            None
        }
    }
}

/// The GPU for a test of an engine, which has it alone.
pub fn gpu() -> Option<(Gpu, MutexGuard<'static, ()>)> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    GPU.get_or_init(open).clone().map(|gpu| (gpu, alone))
}

/// What runs single kernels: a driver of its own, beside which engines may run.
pub fn runner() -> Option<&'static dyn Runner> {
    static RUNNER: OnceLock<Option<Driven>> = OnceLock::new();
    let runner = RUNNER.get_or_init(|| open().map(Driven::new)).as_ref();
    runner.map(|runner| runner as &dyn Runner)
}

#[test]
fn a_gpu_opens_with_its_kernels() {
    let Some((gpu, _alone)) = gpu() else { return };
    say(&format!("{:?}", gpu.facts()));
    let free = gpu.free_bytes().expect("it tells");
    figure("free_gib", free as f64 / (1 << 30) as f64);
    let device = cuda::Cuda::new(Arc::clone(&gpu));
    device.unwrap_or_else(|e| panic!("{e}"));
}
