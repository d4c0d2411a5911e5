//! airstream runs large language models that do not fit in memory.
//!
//! Quantized GGUF weights are read from NVMe by direct io_uring reads into
//! the slots of one fixed arena, and computed on where they land.
//!
//! # The layers, lowest first
//!
//! | module | what it is |
//! |---|---|
//! | [`error`] | operating errors, each with its remedy |
//! | [`units`] | sizes as people write and read them |
//! | [`board`] | what the board is, draws and endures; the governor |
//! | [`trace`] | what happened when, for a viewer |
//! | [`arena`] | one reservation: carve, seal, then only slots |
//! | [`mod@io`] | submit reads, reap completions: io_uring, positioned reads, simulation |
//! | [`mod@format`] | GGUF files, quant block layouts, and how matrices become tiles |
//! | [`residency`] | the pure policy: which tiles stay, what is read next |
//! | [`store`] | executes the policy: slots, reads in flight, pins |
//! | [`device`] | the ops a sweep needs, on the CPU or a GPU |
//! | [`model`] | architectures and the forward pass, written once |
//! | [`text`] | tokenizer, chat template, sampler |
//! | [`engine`] | sessions, batches of rows, sweeps |
//! | [`serve`] | the daemon: messages, UNIX socket, serial line, HTTP, systemd |
//! | [`cli`] | the subcommands of the binary |
//!
//! A layer may use the ones above it in this table and no other
//! (`tests/tidy.rs` holds the edges).

pub mod arena;
pub mod board;
pub mod cli;
pub mod device;
pub mod engine;
pub mod error;
pub mod format;
pub mod io;
pub mod model;
pub mod residency;
pub mod serve;
pub mod store;
pub mod text;
pub mod trace;
pub mod units;

pub use error::{Error, Result};
