//! Arguments that several subcommands share.

use std::path::PathBuf;

use clap::Args;

use crate::device::DeviceChoice;
use crate::device::cpu::Isa;
use crate::engine::scheduler::DRAFTS_MAX;
use crate::engine::{Engine, ModelOptions, Options, Precision, THREADS_MAX};
use crate::error::Result;
use crate::io::Backend;

pub use crate::units::parse_size;

/// What an engine is opened with.
#[derive(Args, Clone)]
pub struct EngineArgs {
    /// Memory for everything: weights, context, buffers, tables (64MiB, 2GiB, 1500M). Default: what the model needs,
    /// within what is free.
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// The same of the memory of a GPU that has its own (a Jetson's has none). Default: what the model needs, within
    /// what is free there.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub gpu_memory: Option<u64>,
    /// Tokens of context. Default: 4096, or less where the model or the memory allows no more.
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
    /// What computes: the CPU, an NVIDIA GPU, or auto: the GPU if there is one that can.
    #[arg(long, value_name = "auto|cpu|cuda", default_value = "auto")]
    device: DeviceChoice,
    /// Bits that activations are rounded to before they are multiplied with weights: 12, or 8 as in llama.cpp. With 8
    /// the processor reads prompts 1.3 to 1.4 times as fast, and a small model's distribution moves by a KL divergence
    /// of 0.003 to 0.005.
    #[arg(long, value_name = "8|12", default_value_t)]
    activations: Precision,
    /// Threads that compute. Default: as many as this process may use.
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=THREADS_MAX as i64))]
    pub threads: Option<u16>,
    /// Tokens at most that are computed ahead in a sweep where the conversation suggests them, because its last words
    /// stood in it before, or a draft model does; 0 for none. Never changes the answer. Default: 7, with a draft model 15, or
    /// fewer where memory is short.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(..=DRAFTS_MAX as i64))]
    drafts: Option<u8>,
    /// Whether weights must agree with their checksums each time they are read. The checksums are learnt from the
    /// first read, and kept in the cache folder for later runs.
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = parse_switch, action = clap::ArgAction::Set)]
    verify: bool,
    /// Instruction set to use (scalar, avx2, avx512, neon, i8mm), for tests.
    #[arg(long, hide = true, value_name = "ISA")]
    cpu: Option<Isa>,
    /// How to read (uring, pread), for tests.
    #[arg(long, hide = true, value_name = "BACKEND", value_parser = parse_backend)]
    backend: Option<Backend>,
    /// Rows in a sweep at most, for tests.
    #[arg(long, hide = true, value_name = "N")]
    rows: Option<usize>,
}

impl EngineArgs {
    /// The engine's options, for one session.
    pub fn options(&self) -> Options {
        Options {
            memory: self.memory,
            gpu_memory: self.gpu_memory,
            model: ModelOptions {
                context: self.ctx.map(|c| c as usize),
                rows: self.rows,
                activations: self.activations,
                drafts: self.drafts.map(usize::from),
                ..ModelOptions::default()
            },
            device: self.device,
            threads: self.threads.map(usize::from),
            isa: self.cpu,
            backend: self.backend,
            verify: self.verify,
            ..Options::default()
        }
    }
}

/// Whether to record what happens.
#[derive(Args, Clone)]
pub struct TraceArgs {
    /// Record reads, stalls and ops and write them to FILE at the end, as Chrome trace events (load it in Perfetto or
    /// chrome://tracing). Takes 10 MiB of memory beside the budget; of a long run only the newest 262144 events stay.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

impl TraceArgs {
    /// Begins to record, if asked for.
    pub fn start(&self, engine: &mut Engine) {
        if self.trace.is_some() {
            engine.start_trace();
        }
    }

    /// Writes what was recorded, if asked for.
    pub fn finish(&self, engine: &mut Engine) -> Result<()> {
        match &self.trace {
            Some(path) => engine.write_trace(path),
            None => Ok(()),
        }
    }
}

fn parse_switch(text: &str) -> std::result::Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("one of on, off".into()),
    }
}

fn parse_backend(text: &str) -> std::result::Result<Backend, String> {
    match text {
        "uring" => Ok(Backend::Uring),
        "pread" => Ok(Backend::Pread),
        _ => Err("one of uring, pread".into()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_trace_takes_what_its_help_says() {
        assert_eq!(crate::trace::Trace::BYTES, 10 << 20);
    }
}
