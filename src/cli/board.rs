//! Arguments that say which board this is, and what it may draw.

use std::path::PathBuf;

use clap::Args;

use crate::board::governor::Goals;
use crate::board::{Board, Energy, GiveUp, Monitor, cores, detect};
use crate::engine::{Engine, Options};
use crate::error::{Error, Kind, Result};
use crate::units::bytes;

/// Which board this is, and what it may draw.
#[derive(Args, Clone)]
pub struct BoardArgs {
    /// The board. Default: recognised, or a generic host (`plan --all-boards` lists all).
    #[arg(long, value_name = "NAME")]
    board: Option<String>,
    /// Average power to keep within (12W), or none. Default: what the power mode is named for, on a board with modes.
    #[arg(long, value_name = "WATTS", value_parser = parse_watts)]
    power_limit: Option<f64>,
    /// What to lose first where power or heat allow less: latency (answers slow down, and sweeps stay efficient) or
    /// throughput (sweeps become smaller).
    #[arg(long, value_name = "WHAT", default_value = "latency")]
    give_up: GiveUp,
    /// Where /proc, /sys and /etc are, for tests.
    #[arg(long, hide = true, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

impl BoardArgs {
    /// The board that the engine will run on; `options` take from it what the user has not said.
    pub fn apply(&self, options: &mut Options) -> Result<Board> {
        let board = detect::board(&self.root, self.board.as_deref())?;
        let default = detect::memory_default(&board, &self.root, 0);
        options.memory_most = Some(default);
        if let Some(memory) = options.memory {
            self.check_memory(memory, default)?;
        }
        if options.threads.is_none() {
            cores::leave_interrupts_alone(&board);
        }
        log::info!("board: {} ({})", board.title, board.name);
        Ok(board)
    }

    /// A budget is kept in memory, all of it: more than there is ends in the kernel killing somebody.
    fn check_memory(&self, memory: u64, default: u64) -> Result<()> {
        let mib = default >> 20;
        let total = detect::meminfo(&self.root, "MemTotal:");
        if let Some(total) = total.filter(|&total| memory > total) {
            let (memory, total) = (bytes(memory), bytes(total));
            let what = format!("a budget of {memory} is more than the {total} of this machine");
            let remedy = format!("give --memory {mib}MiB or less");
            return Err(Error::new(Kind::Usage, what, remedy));
        }
        let free = detect::memory_available(&self.root);
        if let Some(free) = free.filter(|&free| memory > free) {
            let (memory, free) = (bytes(memory), bytes(free));
            log::warn!(
                "a budget of {memory} is more than the {free} that are free now: stop other programs, or give {mib} MiB"
            );
        }
        Ok(())
    }

    /// Watches the board from now on, and has the engine keep within its limits.
    pub fn watch(&self, board: &Board, engine: &mut Engine) -> Monitor {
        let goals = Goals::of_board(board, &self.root, self.power_limit, self.give_up);
        let govern = goals.map(|goals| (goals, engine.full_limits()));
        let monitor = Monitor::start(board, &self.root, govern);
        engine.set_pace(monitor.pace());
        monitor
    }
}

/// What reading a prompt and answering took, as a line of a summary; nothing where nothing measures power or
/// temperature. Each is the energy, and the tokens that it went into.
pub fn energy_line(prefill: (Energy, u64), decode: (Energy, u64)) -> String {
    let all = prefill.0.plus(&decode.0);
    let mut parts = Vec::new();
    if let Some(watts) = all.average_w() {
        parts.push(format!("{watts:.1} W on average, {:.1} J", all.joules));
    }
    for (what, (energy, tokens)) in [("read", prefill), ("answered", decode)] {
        if let Some(each) = energy.joules_per_token(tokens) {
            parts.push(format!("{each:.3} J per token {what}"));
        }
    }
    if let Some(peak) = all.peak_c {
        parts.push(format!("at most {peak:.1} C"));
    }
    match parts.is_empty() {
        true => String::new(),
        false => format!("energy    {}\n", parts.join("; ")),
    }
}

/// Reads a power: 12, 12W, 12.5 W, or none.
fn parse_watts(text: &str) -> std::result::Result<f64, String> {
    if text == "none" {
        return Ok(f64::INFINITY);
    }
    let number = text.trim().trim_end_matches(['W', 'w']).trim();
    match number.parse::<f64>() {
        Ok(watts) if watts > 0.0 && watts.is_finite() => Ok(watts),
        _ => Err(format!("{text:?} is no power: use watts (12W), or none")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_as_people_write_them() {
        assert_eq!(parse_watts("12W"), Ok(12.0));
        assert_eq!(parse_watts("7.5 w"), Ok(7.5));
        assert_eq!(parse_watts("15"), Ok(15.0));
        assert_eq!(parse_watts("none"), Ok(f64::INFINITY));
        for wrong in ["", "W", "-3W", "0", "12kW", "inf"] {
            assert!(parse_watts(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_measured_is_not_told() {
        let nothing = (Energy::default(), 5);
        assert_eq!(energy_line(nothing, nothing), "");
        let warm = Energy {
            peak_c: Some(61.25),
            ..Energy::default()
        };
        assert_eq!(
            energy_line(nothing, (warm, 5)),
            "energy    at most 61.2 C\n"
        );
        let energy = Energy {
            joules: 20.0,
            seconds: 4.0,
            peak_c: None,
        };
        assert_eq!(
            energy_line((energy, 40), (energy, 10)),
            "energy    5.0 W on average, 40.0 J; 0.500 J per token read; 2.000 J per token answered\n"
        );
    }
}
