//! The budget table, and measuring the machine.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;

use crate::engine::roofline::Machine;
use crate::engine::{self, Engine, Line, Options, Plan, Share, Spent};
use crate::error::Result;
use crate::io;

pub use crate::units::bytes;

/// Long enough to fill the disk's queue, short enough to wait for.
const DISK_MEASURED_FOR: Duration = Duration::from_millis(500);
/// Larger than any cache, where the budget allows.
const DRAM_MEASURED_BYTES: std::ops::RangeInclusive<usize> = 32 << 20..=256 << 20;

/// How an engine's budget is divided, and that of a GPU's own memory, as tables.
pub fn shares(engine: &Engine) -> String {
    let shares = engine.budget();
    let lines = |of: fn(&Share) -> &[Line]| {
        let of_share = |share: &Share| {
            let drafter = share.drafter;
            let line = move |line: &Line| match drafter {
                true => (format!("draft model: {}", line.what), line.bytes),
                false => (line.what.to_owned(), line.bytes),
            };
            of(share).iter().map(line).collect::<Vec<_>>()
        };
        shares.iter().flat_map(of_share).collect::<Vec<_>>()
    };
    let pool = engine.pool();
    let mut text = table("budget", &lines(|share| &share.lines), pool.memory);
    if let Some(gpu) = &pool.gpu {
        let lines = lines(|share| &share.gpu_lines);
        text += &table("budget of the GPU's memory", &lines, gpu.memory);
    }
    text
}

/// The lines of a budget, and of that of a GPU's own memory, as tables.
pub fn budget(plan: &Plan) -> String {
    let lines = |lines: &[Line]| -> Vec<_> {
        let line = |line: &Line| (line.what.to_owned(), line.bytes);
        lines.iter().map(line).collect()
    };
    let mut text = table("budget", &lines(&plan.lines), plan.memory);
    if let Some(memory) = plan.gpu_memory {
        text += &table(
            "budget of the GPU's memory",
            &lines(&plan.gpu_lines),
            memory,
        );
    }
    text
}

fn table(title: &str, lines: &[(String, u64)], whole: u64) -> String {
    let longest = lines.iter().map(|(what, _)| what.len() + 2).max();
    let width = longest.map_or(34, |longest| longest.max(34));
    let mut text = format!("{title}\n");
    for (what, of) in lines {
        text += &format!("  {what:<width$}{:>12}\n", bytes(*of));
    }
    let given = if whole > 1 << 50 {
        String::new()
    } else {
        format!(" of {}", bytes(whole))
    };
    let sum = lines.iter().map(|(_, of)| of).sum();
    text += &format!("  {:<width$}{:>12}{given}\n", "together", bytes(sum));
    text
}

/// Prints a value as JSON on stdout.
pub fn print_json(value: &impl serde::Serialize) {
    // The summaries hold numbers, strings and lists only, and those always serialize.
    println!(
        "{}",
        serde_json::to_string_pretty(value).expect("a summary is plain data")
    );
}

/// Tokens per second.
pub fn per_second(spent: &Spent) -> f64 {
    spent.tokens() as f64 / spent.time.as_secs_f64().max(1e-9)
}

/// Share of the time that was spent waiting for reads.
pub fn stalled_share(spent: &Spent) -> f64 {
    spent.stalled.as_secs_f64() / spent.time.as_secs_f64().max(1e-9)
}

/// Share of the time that went into a draft model.
pub fn drafting_share(spent: &Spent) -> f64 {
    spent.drafting.as_secs_f64() / spent.time.as_secs_f64().max(1e-9)
}

/// Bytes per second that arrived from disk.
pub fn disk_rate(spent: &Spent) -> f64 {
    spent.read_bytes as f64 / spent.time.as_secs_f64().max(1e-9)
}

/// How fast the machine is, where the user says so.
#[derive(Args, Clone, Copy)]
pub struct MachineArgs {
    /// Read bandwidth of the disk in GB/s. Default: a short measurement.
    #[arg(long, value_name = "X")]
    nvme_gbps: Option<f64>,
    /// Read bandwidth of memory in GB/s. Default: a short measurement.
    #[arg(long, value_name = "Y")]
    dram_gbps: Option<f64>,
}

impl MachineArgs {
    /// Whether the user says how fast the disk is.
    pub fn tells_disk(&self) -> bool {
        self.nvme_gbps.is_some()
    }

    /// Measures how fast the disk under `path` and the DRAM are, unless the user says.
    ///
    /// The disk is read as the engine would by this plan: reads of a slot's size, as many in flight. Takes some memory
    /// of its own, so no engine should be open under a tight limit.
    pub fn measure(&self, path: &Path, plan: &Plan, options: &Options) -> Result<Machine> {
        let (nvme_bytes_per_s, nvme_cpu_ms_per_gb) = match self.nvme_gbps {
            Some(gbps) => (gbps * 1e9, None),
            None => {
                let (size, depth) = (plan.slot_bytes as u32, plan.depth());
                let found =
                    io::measure::measure(path, size, depth, DISK_MEASURED_FOR, options.backend)?;
                (found.bytes_per_second(), Some(found.cpu_ms_per_gb()))
            }
        };
        let dram_bytes_per_s = match self.dram_gbps {
            Some(gbps) => gbps * 1e9,
            None => dram_bandwidth(engine::threads(options), plan.total_bytes() as usize),
        };
        Ok(Machine {
            nvme_bytes_per_s,
            dram_bytes_per_s,
            bus_bytes_per_s: None,
            nvme_cpu_ms_per_gb,
            compute: None,
        })
    }
}

/// Bytes per second that `threads` threads read from DRAM together: the best of some passes over at most `bytes`.
fn dram_bandwidth(threads: usize, bytes: usize) -> f64 {
    let bytes = bytes.clamp(*DRAM_MEASURED_BYTES.start(), *DRAM_MEASURED_BYTES.end());
    let words = vec![1u64; bytes / 8];
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(move || {
                    // Eight sums, so that no chain of additions is the limit.
                    let mut sums = [0u64; 64];
                    for line in part.chunks_exact(64) {
                        for (sum, word) in sums.iter_mut().zip(line) {
                            *sum = sum.wrapping_add(*word);
                        }
                    }
                    black_box(sums)
                });
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    bytes as f64 / best
}
