//! `airstream plan`: the division of a budget and the predicted speed, without running.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::args::EngineArgs;
use super::{plan_board, report};
use crate::board::Board;
use crate::engine::roofline::{self, Machine, Sweep};
use crate::engine::{Line, Loaded};
use crate::error::Result;

/// Show how a budget would be divided and how fast it would run, without running.
#[derive(Args)]
pub struct PlanArgs {
    /// The GGUF file (any part of a split one).
    file: PathBuf,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    machine: report::MachineArgs,
    /// Plan for this board instead of this machine, in each of its power modes; --memory is what the board has to give
    /// unless you say.
    #[arg(long, value_name = "NAME")]
    board: Option<String>,
    /// Only in this power mode (15W, MAXN, or its number).
    #[arg(long, value_name = "MODE", requires = "board")]
    mode: Option<String>,
    /// Plan for every board, each in the power mode that it boots in.
    #[arg(long, conflicts_with = "board")]
    all_boards: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Prediction {
    context: usize,
    resident_share: f64,
    #[serde(flatten)]
    sweep: Sweep,
    tok_s: f64,
}

#[derive(Serialize)]
struct Summary {
    memory: u64,
    lines: Vec<Line>,
    total_bytes: u64,
    /// The same of a GPU's own memory, if one computes there.
    gpu_memory: Option<u64>,
    gpu_lines: Vec<Line>,
    gpu_slots: usize,
    context: usize,
    /// The longest that the model was made for.
    context_max: usize,
    slot_bytes: usize,
    slots: usize,
    window: u32,
    tiles: usize,
    rows_per_sweep: usize,
    sweep_bytes: u64,
    machine: Machine,
    decode: Vec<Prediction>,
}

impl PlanArgs {
    pub(super) fn run(self) -> Result<()> {
        let loaded = Loaded::read(&self.file)?;
        let options = self.engine.options();
        if self.all_boards {
            return plan_board::all(&loaded, &options, self.json);
        }
        if let Some(name) = &self.board {
            let board = Board::named(name)?;
            return plan_board::one(&loaded, &options, &board, self.mode.as_deref(), self.json);
        }
        let plan = loaded.plan(&options)?;
        let machine = self.machine.measure(&self.file, &plan, &options)?;
        let sweep_bytes = loaded.matrices.sweep_bytes();
        let predict = |context: usize| {
            let sweep = roofline::decode(&plan, &loaded.config, sweep_bytes, context, &machine);
            Prediction {
                context,
                resident_share: 1.0
                    - sweep.streamed_bytes.min(sweep_bytes) as f64 / sweep_bytes as f64,
                sweep,
                tok_s: 1.0 / sweep.seconds,
            }
        };
        let summary = Summary {
            memory: plan.total_bytes(),
            lines: plan.lines.clone(),
            total_bytes: plan.total_bytes(),
            gpu_memory: plan.gpu_memory,
            gpu_lines: plan.gpu_lines.clone(),
            gpu_slots: plan.gpu_slots,
            context: plan.context,
            context_max: loaded.config.context_max,
            slot_bytes: plan.slot_bytes,
            slots: plan.slots,
            window: plan.window,
            tiles: plan.tiles.len(),
            rows_per_sweep: plan.limits.rows,
            sweep_bytes,
            machine,
            decode: vec![predict(1), predict(plan.context)],
        };
        if self.json {
            report::print_json(&summary);
            return Ok(());
        }
        print!("{}", report::budget(&plan));
        println!(
            "slots      {} of {}, {} tiles, window {}",
            summary.slots,
            report::bytes(summary.slot_bytes as u64),
            summary.tiles,
            summary.window
        );
        if plan.gpu_memory.is_some() {
            println!(
                "GPU slots  {} of as much, window {}",
                plan.gpu_slots, plan.gpu_window
            );
        }
        println!(
            "context    {} tokens, up to {} rows in a sweep",
            summary.context, summary.rows_per_sweep
        );
        if let Some(beyond) = loaded.config.beyond(plan.context) {
            println!("warning    {beyond}");
        }
        println!(
            "machine    NVMe {:.2} GB/s, DRAM {:.1} GB/s",
            machine.nvme_bytes_per_s / 1e9,
            machine.dram_bytes_per_s / 1e9
        );
        for p in &summary.decode {
            println!(
                "decode     at {} tokens: {:.0}% resident, {} streamed per token, at most {:.2} tok/s, bound by {}",
                p.context,
                100.0 * p.resident_share,
                report::bytes(p.sweep.streamed_bytes),
                p.tok_s,
                p.sweep.bound
            );
        }
        Ok(())
    }
}
