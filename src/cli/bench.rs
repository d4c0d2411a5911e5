//! `airstream bench`: the speed of prefill and decode, and how close they come to the machine's limits.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::args::{EngineArgs, TraceArgs};
use super::bench_decode::{self, Decoded, DiskSamples};
use super::board::{BoardArgs, energy_line};
use super::{bench_io, bench_ops, bench_serve, report};
use crate::board::{Energy, Monitor};
use crate::engine::roofline::{Machine, Sweep};
use crate::engine::{Engine, Loaded, ModelId, Spent};
use crate::error::{Error, Kind, Result};

/// Measure the speed of prefill (pp) and decode (tg), of sessions together, or of the disk.
#[derive(Args)]
pub struct Bench {
    /// The GGUF file (any part of a split one).
    file: PathBuf,
    /// Tokens of the prompt; 0 leaves prefill out.
    #[arg(short = 'p', long, default_value_t = 512)]
    prompt: usize,
    /// Tokens to generate; 0 leaves decode out.
    #[arg(short = 'n', long, default_value_t = 128)]
    generate: usize,
    /// Repetitions; the median is what counts.
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    machine: report::MachineArgs,
    #[command(flatten)]
    board: BoardArgs,
    #[command(flatten)]
    trace: TraceArgs,
    /// Measure the disk instead: reads of FILE of several sizes, several at a time, the way the engine reads.
    #[arg(long)]
    io: bool,
    /// Measure each op of a sweep instead, with the shapes and weight types of FILE, against its floor.
    #[arg(long, conflicts_with = "io")]
    ops: bool,
    /// Measure 1, 2, 4 and 8 sessions that share sweeps instead, -n tokens of each.
    #[arg(long, conflicts_with_all = ["io", "ops"])]
    serve: bool,
    /// How long to measure the disk, in seconds.
    #[arg(long, value_name = "S", default_value = "20", requires = "io", value_parser = parse_seconds)]
    seconds: Duration,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One test's repetitions.
#[derive(Serialize)]
struct Series {
    tokens: usize,
    median_tok_s: f64,
    min_tok_s: f64,
    max_tok_s: f64,
    /// Of the median: bytes from disk per token.
    disk_bytes_per_token: f64,
    /// Of the median: GB/s from disk.
    disk_gb_s: f64,
    /// Of the median: share of the time waiting for reads.
    stalled_share: f64,
    /// Weight bytes computed with per second, in GB/s.
    weight_gb_s: f64,
    /// Billions of weight multiplications per second.
    gmac_s: f64,
    /// Of all repetitions; none where nothing measures power.
    average_w: Option<f64>,
    joules_per_token: Option<f64>,
    #[serde(skip)]
    energy: (Energy, u64),
}

#[derive(Serialize)]
struct Summary {
    model: String,
    architecture: &'static str,
    isa: String,
    threads: usize,
    /// A GPU computes: "DRAM" is the memory that it computes in.
    gpu: bool,
    memory: u64,
    io: String,
    slot_bytes: usize,
    window: u32,
    reads_in_flight: usize,
    /// As measured right before the test, and right after it.
    machine_before: Machine,
    machine_after: Machine,
    /// Their mean; if anything streams, the disk as measured between slices of decoding.
    machine: Machine,
    /// What the board is, and how hot it became; none where nothing measures temperature.
    board: String,
    peak_c: Option<f64>,
    /// The disk between slices of decoding, in GB/s: the same reads without the computing.
    disk_samples_gb_s: Vec<f64>,
    pp: Option<Series>,
    tg: Option<Series>,
    /// What the machine's limits allow a decode sweep in the middle of the test.
    roofline: Option<Sweep>,
    /// Least time by the roofline over time taken, with the disk as it was around each slice: the median repetition.
    roofline_share: Option<f64>,
}

impl Bench {
    pub(super) fn run(self) -> Result<()> {
        let mut options = self.engine.options();
        if self.io {
            return bench_io::run(&self.file, self.seconds, options.backend, self.json);
        }
        if self.ops {
            return bench_ops::run(&self.file, &options, self.json);
        }
        if self.serve {
            let (tokens, rounds) = (self.generate.max(1), self.repetitions);
            return bench_serve::run(&self.file, &options, tokens, rounds, self.json);
        }
        if self.prompt + self.generate == 0 {
            return Err(Error::new(
                Kind::Usage,
                "there is nothing to measure",
                "give -p or -n above 0",
            ));
        }
        options
            .model
            .context
            .get_or_insert(self.prompt.max(self.generate) + 1);
        let board = self.board.apply(&mut options)?;
        // Right before and right after: disks and shared machines change their speed within seconds.
        let plan = Loaded::read(&self.file)?.plan(&options)?;
        let mut machine_before = self.machine.measure(&self.file, &plan, &options)?;
        let mut engine = Engine::open(&self.file, &options)?;
        let monitor = self.board.watch(&board, &mut engine);
        self.trace.start(&mut engine);
        // One sweep of each kind first: it fills the slots and touches all that is touched once.
        self.prefill(&mut engine, self.prompt.max(1))?;
        engine.decode(ModelId::FIRST, 0, 0, &mut Spent::default())?;
        let (mut pp, mut tg) = (Vec::new(), Vec::<Decoded>::new());
        let mut disk = DiskSamples::new(self.machine.tells_disk());
        for _ in 0..self.repetitions {
            if self.prompt > 0 {
                pp.push(measured(&monitor, || {
                    self.prefill(&mut engine, self.prompt)
                })?);
            }
            if self.generate > 0 {
                tg.push(bench_decode::decode(
                    &mut engine,
                    self.generate,
                    &mut disk,
                    &monitor,
                )?);
            }
        }
        self.trace.finish(&mut engine)?;
        let weight_bytes = engine.weight_bytes(ModelId::FIRST);
        let series = |runs: Vec<(Spent, Energy)>, logits_rows: fn(&Spent) -> u64| {
            (!runs.is_empty()).then(|| series(runs, &engine, weight_bytes, logits_rows))
        };
        let runs = tg.iter().map(|decoded| (decoded.spent, decoded.energy));
        // Of a prompt, the last row alone wants logits.
        let pp = series(pp, |_| 1);
        let tg_series = series(runs.collect(), |spent| spent.rows);
        let (architecture, isa) = (engine.config(ModelId::FIRST).arch, engine.device().name());
        let sweep = bench_decode::roofline_of(&engine);
        let (threads, io) = (
            engine.device().threads(),
            engine.store().io_description().to_owned(),
        );
        let plan = engine.plan(ModelId::FIRST).clone();
        let gpu_rate = engine.device().gpu_read_rate()?;
        let bus_rate = engine.device().gpu_copy_rate()?;
        // The measurement takes memory of its own, which under a limit is there only without the engine.
        drop(engine);
        let mut machine_after = self.machine.measure(&self.file, &plan, &options)?;
        if let Some(rate) = gpu_rate {
            // What the GPU can read is not what the processor can.
            for machine in [&mut machine_before, &mut machine_after] {
                (machine.dram_bytes_per_s, machine.bus_bytes_per_s) = (rate, bus_rate);
            }
        }
        let mut machine = machine_before.mean(&machine_after);
        if let Some((rate, cpu_ms_per_gb)) = disk.mean() {
            machine.nvme_bytes_per_s = rate;
            machine.nvme_cpu_ms_per_gb = Some(cpu_ms_per_gb);
        }
        let mut shares: Vec<f64> = tg.iter().map(|d| d.share(&machine, &sweep)).collect();
        shares.sort_by(f64::total_cmp);
        let summary = Summary {
            model: self.file.display().to_string(),
            architecture,
            isa,
            threads,
            gpu: gpu_rate.is_some(),
            memory: plan.total_bytes(),
            io,
            slot_bytes: plan.slot_bytes,
            window: plan.window,
            reads_in_flight: plan.depth(),
            machine_before,
            machine_after,
            machine,
            board: board.name,
            peak_c: monitor.energy().peak_c,
            disk_samples_gb_s: disk.bytes_per_s.iter().map(|rate| rate / 1e9).collect(),
            roofline: (!tg.is_empty()).then(|| sweep(self.generate / 2, &machine)),
            roofline_share: shares.get(shares.len() / 2).copied(),
            pp,
            tg: tg_series,
        };
        if self.json {
            report::print_json(&summary);
        } else {
            print(&summary);
        }
        Ok(())
    }

    fn prefill(&self, engine: &mut Engine, tokens: usize) -> Result<Spent> {
        engine.clear(ModelId::FIRST, 0);
        let vocab = engine.config(ModelId::FIRST).vocab as u32;
        // Any tokens do: the work is the same for all.
        let prompt: Vec<u32> = (0..tokens as u32)
            .map(|i| (i * 7919 + 13) % vocab)
            .collect();
        let mut spent = Spent::default();
        engine.prefill(ModelId::FIRST, 0, &prompt, &mut spent, |_| true)?;
        Ok(spent)
    }
}

/// Runs `f`, and says what energy went into it.
fn measured(monitor: &Monitor, f: impl FnOnce() -> Result<Spent>) -> Result<(Spent, Energy)> {
    let before = monitor.energy();
    let spent = f()?;
    Ok((spent, monitor.energy().since(&before)))
}

/// A time in seconds, up to an hour.
fn parse_seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds = text.parse().ok().filter(|s| (0.01..=3600.0).contains(s));
    let seconds = seconds.ok_or("give seconds, 0.01 to 3600")?;
    Ok(Duration::from_secs_f64(seconds))
}

fn series(
    runs: Vec<(Spent, Energy)>,
    engine: &Engine,
    weight_bytes: u64,
    logits_rows: fn(&Spent) -> u64,
) -> Series {
    let config = engine.config(ModelId::FIRST);
    let tokens: u64 = runs.iter().map(|(spent, _)| spent.rows).sum();
    let energy = runs
        .iter()
        .fold(Energy::default(), |all, (_, energy)| all.plus(energy));
    let mut runs: Vec<Spent> = runs.into_iter().map(|(spent, _)| spent).collect();
    runs.sort_by(|a, b| report::per_second(a).total_cmp(&report::per_second(b)));
    let median = runs[runs.len() / 2];
    let seconds = median.time.as_secs_f64();
    Series {
        tokens: median.rows as usize,
        median_tok_s: report::per_second(&median),
        min_tok_s: report::per_second(&runs[0]),
        max_tok_s: report::per_second(&runs[runs.len() - 1]),
        disk_bytes_per_token: median.read_bytes as f64 / median.rows as f64,
        disk_gb_s: report::disk_rate(&median) / 1e9,
        stalled_share: report::stalled_share(&median),
        weight_gb_s: (weight_bytes * median.sweeps) as f64 / seconds / 1e9,
        gmac_s: config.products(median.rows, logits_rows(&median)) as f64 / seconds / 1e9,
        average_w: energy.average_w(),
        joules_per_token: energy.joules_per_token(tokens),
        energy: (energy, tokens),
    }
}

fn print(s: &Summary) {
    println!("{} on {} x {}, {}", s.architecture, s.threads, s.isa, s.io);
    let dram = if s.gpu { "the GPU's memory" } else { "DRAM" };
    println!(
        "memory {}; NVMe {:.2} GB/s before and {:.2} after, with {} reads of {}; {dram} {:.1} GB/s before and {:.1} after",
        report::bytes(s.memory),
        s.machine_before.nvme_bytes_per_s / 1e9,
        s.machine_after.nvme_bytes_per_s / 1e9,
        s.reads_in_flight,
        report::bytes(s.slot_bytes as u64),
        s.machine_before.dram_bytes_per_s / 1e9,
        s.machine_after.dram_bytes_per_s / 1e9
    );
    println!(
        "\n| test | tok/s | min to max | weights GB/s | GMAC/s | disk per token | disk GB/s | stalled |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (name, series) in [("pp", &s.pp), ("tg", &s.tg)] {
        if let Some(t) = series {
            println!(
                "| {name}{} | {:.2} | {:.2} to {:.2} | {:.2} | {:.1} | {} | {:.2} | {:.1}% |",
                t.tokens,
                t.median_tok_s,
                t.min_tok_s,
                t.max_tok_s,
                t.weight_gb_s,
                t.gmac_s,
                report::bytes(t.disk_bytes_per_token as u64),
                t.disk_gb_s,
                100.0 * t.stalled_share
            );
        }
    }
    if let (Some(bus), Some(roofline)) = (s.machine.bus_bytes_per_s, &s.roofline) {
        println!(
            "\n{} go to the GPU for each token, over a bus of {:.1} GB/s",
            report::bytes(roofline.copied_bytes),
            bus / 1e9
        );
    }
    if let Some(cost) = s.machine.nvme_cpu_ms_per_gb {
        println!("\nreading takes {cost:.1} ms of processor time per GB");
    }
    let energy =
        |series: &Option<Series>| series.as_ref().map_or_else(Default::default, |s| s.energy);
    let line = energy_line(energy(&s.pp), energy(&s.tg));
    if !line.is_empty() {
        print!("\n{line}");
    }
    if let (Some(roofline), Some(share)) = (s.roofline, s.roofline_share) {
        println!(
            "\nroofline: {} streamed per token, so at most {:.2} tok/s, bound by {}; reached {:.0}%",
            report::bytes(roofline.streamed_bytes),
            1.0 / roofline.seconds,
            roofline.bound.replace("DRAM", dram),
            100.0 * share
        );
    }
}
