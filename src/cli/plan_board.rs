//! `airstream plan --board` and `--all-boards`: what a board would do with a model, from its description.

use serde::Serialize;

use super::report;
use crate::board::Board;
use crate::board::config::Mode;
use crate::engine::roofline::{self, Device, Machine};
use crate::engine::{Line, Loaded, Options, Plan};
use crate::error::{Error, Kind, Result};

/// What the predictions take for granted.
const ASSUMED: &str = "GPU: 78% of DRAM's peak, as MLC reaches on Orin Nano, and cores that do as much in a cycle as an H200's \
    with these kernels. CPU: this program's Q4_0 kernels by a model of the core. No board was measured \
    (src/engine/roofline.rs).";

/// A speed, and the limit that sets it.
#[derive(Serialize)]
struct Speed {
    tok_s: f64,
    bound: &'static str,
}

/// What one device does.
#[derive(Serialize)]
struct Speeds {
    device: Device,
    decode: Speed,
    prefill: Speed,
}

/// What the board does in one power mode.
#[derive(Serialize)]
struct InMode {
    mode: String,
    budget_w: Option<f64>,
    devices: Vec<Speeds>,
}

/// What a board does with the model.
#[derive(Serialize)]
struct OnBoard {
    board: String,
    title: String,
    memory: u64,
    lines: Vec<Line>,
    context: usize,
    rows_per_sweep: usize,
    resident_share: f64,
    streamed_bytes: u64,
    modes: Vec<InMode>,
}

/// Prints what `board` would do in `mode`, or in each of its modes.
pub fn one(
    loaded: &Loaded,
    options: &Options,
    board: &Board,
    mode: Option<&str>,
    json: bool,
) -> Result<()> {
    let modes: Vec<&Mode> = match mode {
        Some(name) => vec![board.mode(name)?],
        None => board.modes.iter().collect(),
    };
    let (found, plan) = on_board(loaded, options, board, &modes)?;
    if json {
        report::print_json(&found);
        return Ok(());
    }
    println!("board      {} ({})", found.title, found.board);
    print!("{}", report::budget(&plan));
    println!(
        "decode     at {} tokens: {:.0}% resident, {} streamed per token; prefill by {} rows\n",
        found.context,
        100.0 * found.resident_share,
        report::bytes(found.streamed_bytes),
        found.rows_per_sweep
    );
    if let Some(beyond) = loaded.config.beyond(found.context) {
        println!("warning    {beyond}\n");
    }
    println!(
        "| mode | device | decode tok/s | bound by | prefill tok/s | bound by |\n|---|---|---|---|---|---|"
    );
    for in_mode in &found.modes {
        for s in &in_mode.devices {
            println!(
                "| {} | {} | {} | {} | {} | {} |",
                in_mode.mode,
                device(s.device),
                number(s.decode.tok_s),
                s.decode.bound,
                number(s.prefill.tok_s),
                s.prefill.bound
            );
        }
    }
    println!("\n{ASSUMED}");
    Ok(())
}

/// Prints a table of all boards, each in the mode that it boots in.
pub fn all(loaded: &Loaded, options: &Options, json: bool) -> Result<()> {
    let mut found = Vec::new();
    let mut refused = Vec::new();
    for board in Board::all()?.iter().filter(|board| !board.modes.is_empty()) {
        let modes: Vec<&Mode> = board.default_mode().into_iter().collect();
        match on_board(loaded, options, board, &modes) {
            Ok((on_board, _)) => found.push(on_board),
            Err(e) if e.kind() == Kind::Budget => refused.push((board.name.clone(), e)),
            Err(e) => return Err(e),
        }
    }
    if json {
        report::print_json(&found);
        return Ok(());
    }
    println!(
        "| board | mode | memory | resident | streamed per token | decode GPU | bound by | decode CPU | bound by | prefill GPU | prefill CPU |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for on_board in &found {
        for in_mode in &on_board.modes {
            let of = |device: Device| in_mode.devices.iter().find(|s| s.device == device);
            let cells = |device: Device| match of(device) {
                Some(s) => (
                    number(s.decode.tok_s),
                    s.decode.bound,
                    number(s.prefill.tok_s),
                ),
                None => ("-".into(), "-", "-".into()),
            };
            let (gpu, cpu) = (cells(Device::Gpu), cells(Device::Cpu));
            println!(
                "| {} | {} | {} | {:.0}% | {} | {} | {} | {} | {} | {} | {} |",
                on_board.board,
                in_mode.mode,
                report::bytes(on_board.memory),
                100.0 * on_board.resident_share,
                report::bytes(on_board.streamed_bytes),
                gpu.0,
                gpu.1,
                cpu.0,
                cpu.1,
                gpu.2,
                cpu.2
            );
        }
    }
    for (name, error) in refused {
        println!("\n{name}: {error}");
    }
    println!("\nSpeeds in tok/s. {ASSUMED}");
    Ok(())
}

/// Plans for a board, and predicts each of `modes`.
fn on_board(
    loaded: &Loaded,
    options: &Options,
    board: &Board,
    modes: &[&Mode],
) -> Result<(OnBoard, Plan)> {
    let undescribed = || {
        Error::new(
            Kind::Usage,
            format!(
                "the description of {} says too little to plan with",
                board.name
            ),
            "name a board, or leave --board out to plan for this machine",
        )
    };
    let total = board
        .memory
        .total_gib
        .map(|gib| (gib * (1_u64 << 30) as f64) as u64);
    if let Some((asked, total)) = options
        .memory
        .zip(total)
        .filter(|(asked, total)| asked > total)
    {
        return Err(Error::new(
            Kind::Budget,
            format!(
                "{} is more than the {} that {} has",
                report::bytes(asked),
                report::bytes(total),
                board.name
            ),
            "give less --memory, or leave it out",
        ));
    }
    let mut options = options.clone();
    options.memory_most = Some(board.memory_for_models().ok_or_else(undescribed)?);
    let cores = board.cpu.cores.ok_or_else(undescribed)?;
    let computing = cores.saturating_sub(u32::from(board.cpu.leave_cpu0)).max(1);
    options.threads.get_or_insert(computing as usize);
    let plan = loaded.plan(&options)?;
    let weight_bytes = loaded.matrices.sweep_bytes();
    // The context that the plan makes room for, so that no run is slower than it says for want of slots.
    let context = plan.context;
    let streamed_bytes = plan.streamed_bytes(plan.pages_at(&loaded.config, context));
    let speeds = |mode: &Mode| -> Vec<Speeds> {
        let of = |device: Device| {
            let machine = Machine::of_board(board, Some(mode), device)?;
            let speed = |rows: usize, positions: usize| {
                let at = (rows, positions);
                let sweep = roofline::sweep(&plan, &loaded.config, weight_bytes, at, &machine);
                Speed {
                    tok_s: rows as f64 / sweep.seconds,
                    bound: sweep.bound,
                }
            };
            Some(Speeds {
                device,
                decode: speed(1, context),
                // A prompt of one full sweep: its rows see half of it on average.
                prefill: speed(plan.limits.rows, plan.limits.rows / 2),
            })
        };
        [Device::Gpu, Device::Cpu]
            .into_iter()
            .filter_map(of)
            .collect()
    };
    let modes = modes.iter().map(|mode| InMode {
        mode: mode.name.clone(),
        budget_w: mode.budget_w,
        devices: speeds(mode),
    });
    let found = OnBoard {
        board: board.name.clone(),
        title: board.title.clone(),
        memory: plan.total_bytes(),
        lines: plan.lines.clone(),
        context,
        rows_per_sweep: plan.limits.rows,
        resident_share: 1.0 - streamed_bytes.min(weight_bytes) as f64 / weight_bytes as f64,
        streamed_bytes,
        modes: modes.collect(),
    };
    Ok((found, plan))
}

fn device(device: Device) -> &'static str {
    match device {
        Device::Cpu => "CPU",
        Device::Gpu => "GPU",
    }
}

/// Two or three digits: a prediction knows no more.
fn number(value: f64) -> String {
    match value {
        0.0..10.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}
