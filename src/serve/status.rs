//! How things are: what `airstream status` shows and `/metrics` counts.
//!
//! The engine's thread brings [`Latest`] up to date between two sweeps when somebody has asked: it writes numbers into
//! memory that is there already. What takes memory is done for whoever asked, on the front's thread.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::config::Config;
use crate::board::governor::HeldBy;
use crate::board::monitor;
use crate::engine::Spent;
use crate::engine::request::SessionName;
use crate::units::bytes;

/// The status as the engine's thread keeps it.
#[derive(Debug, Default)]
pub struct Latest {
    /// All but the conversations.
    pub status: Status,
    /// The conversations; there is room for all that there can be.
    pub sessions: Vec<Held>,
}

/// A conversation that is held.
#[derive(Debug)]
pub struct Held {
    /// Its model, as a place in the status's list.
    pub model: usize,
    /// Its name; empty if it belongs to a single request.
    pub name: SessionName,
    /// Its tokens.
    pub tokens: u32,
    /// Whether an answer is being made in it.
    pub busy: bool,
}

impl Latest {
    /// The status in a form that can be sent.
    pub fn to_status(&self) -> Status {
        let named = |held: &Held| SessionStatus {
            model: self.status.models[held.model].name.clone(),
            name: held.name.as_str().to_owned(),
            tokens: held.tokens,
            busy: held.busy,
        };
        Status {
            sessions: self.sessions.iter().map(named).collect(),
            ..self.status.clone()
        }
    }
}

/// The daemon as a whole.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Status {
    /// The program's version.
    pub version: String,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Connections.
    pub clients: u32,
    /// How many there were so far.
    pub clients_ever: u32,
    /// The memory budget.
    pub budget_bytes: u64,
    /// What it is divided into.
    pub budget: Vec<BudgetLine>,
    /// The budget of a GPU's own memory; 0 if none computes there.
    pub gpu_budget_bytes: u64,
    /// What it is divided into.
    pub gpu_budget: Vec<BudgetLine>,
    /// The models of the configuration.
    pub models: Vec<ModelStatus>,
    /// The conversations that are held.
    pub sessions: Vec<SessionStatus>,
    /// Requests that are being answered.
    pub running: u32,
    /// Requests that wait.
    pub waiting: u32,
    /// Requests that may wait.
    pub waiting_max: u32,
    /// What the board draws, and how warm it is.
    pub board: BoardStatus,
    /// What was done since the start.
    pub total: Work,
    /// What is done in a second, of late.
    pub recent: Rates,
}

/// A line of the budget.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct BudgetLine {
    /// What the memory is for.
    pub what: String,
    /// How much of it.
    pub bytes: u64,
}

/// A model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ModelStatus {
    /// Its name in the configuration.
    pub name: String,
    /// Whether it can answer.
    pub state: ModelState,
    /// Tokens of context of each of its conversations.
    pub context: u32,
    /// Its share of the sweeps against other models.
    pub priority: u32,
    /// Bytes of weights that a token needs.
    pub weight_bytes: u64,
    /// How many of them are in memory.
    pub resident_bytes: u64,
}

/// Whether a model can answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// Nobody has asked for it to be loaded.
    #[default]
    Off,
    /// It is being loaded.
    Loading,
    /// It answers.
    Ready,
    /// It could not be loaded; the log says why.
    Failed,
}

/// A conversation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its model.
    pub model: String,
    /// Its name; empty if it belongs to a single request.
    pub name: String,
    /// Its tokens.
    pub tokens: u32,
    /// Whether an answer is being made in it.
    pub busy: bool,
}

/// What the board's sensors say; none of what nothing measures.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct BoardStatus {
    /// Power of the whole, in watts.
    pub power_w: Option<f64>,
    /// The hottest zone.
    pub junction_c: Option<f64>,
    /// The hottest it has been since the start.
    pub peak_c: Option<f64>,
    /// Energy since the start, over the time in which power was measured.
    pub joules: f64,
    /// Over-current events since the start.
    pub over_current_events: Option<u64>,
    /// What the governor does, where there is one.
    pub governor: Option<GovernorStatus>,
}

/// How the governor holds the engine to the limits of the board.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct GovernorStatus {
    /// Average power that it keeps, in watts; none if it is not limited.
    pub limit_w: Option<f64>,
    /// The share of what the engine could do, between 0 and 1.
    pub effort: f64,
    /// What holds it down.
    pub held_by: HeldBy,
    /// Threads that may compute.
    pub threads: u32,
}

impl From<&monitor::Latest> for BoardStatus {
    fn from(latest: &monitor::Latest) -> BoardStatus {
        let governor = latest.governed.map(|governed| GovernorStatus {
            limit_w: governed.limit_w,
            effort: governed.effort,
            held_by: governed.held_by,
            threads: governed.threads,
        });
        BoardStatus {
            power_w: latest.reading.power_w,
            junction_c: latest.reading.junction_c,
            peak_c: latest.energy.peak_c,
            joules: latest.energy.joules,
            over_current_events: latest.over_current_events,
            governor,
        }
    }
}

/// Work done.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Work {
    /// Requests taken on.
    pub requests: u64,
    /// Requests that ended, for whatever reason.
    pub ended: u64,
    /// Of these, with an error.
    pub failed: u64,
    /// Tokens of prompts to compute, counted when a request begins.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub answer_tokens: u64,
    /// Sweeps.
    pub sweeps: u64,
    /// Seconds in sweeps.
    pub sweep_s: f64,
    /// Of these, waiting for reads.
    pub stalled_s: f64,
    /// Bytes read from disk.
    pub read_bytes: u64,
    /// Of the seconds of sweeps, those of draft models.
    pub drafting_s: f64,
    /// Rows computed ahead for tokens that were likely to come.
    pub drafts: u64,
    /// Of these, those whose tokens came.
    pub drafts_right: u64,
}

impl Work {
    /// Adds what sweeps took.
    pub fn add(&mut self, spent: &Spent) {
        self.sweeps += spent.sweeps;
        self.sweep_s += spent.time.as_secs_f64();
        self.stalled_s += spent.stalled.as_secs_f64();
        self.read_bytes += spent.read_bytes;
        self.drafting_s += spent.drafting.as_secs_f64();
        self.drafts += spent.drafts;
        self.drafts_right += spent.drafts_right;
    }
}

/// Work in a second.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Rates {
    /// Rows of prompts.
    pub prompt_tokens: f64,
    /// Tokens of answers.
    pub answer_tokens: f64,
    /// Bytes read from disk.
    pub read_bytes: f64,
}

/// The models of a configuration, as yet not loaded.
pub fn models(config: &Config) -> Vec<ModelStatus> {
    let models = config.models.iter().map(|model| ModelStatus {
        name: model.as_ref().name.clone(),
        priority: u32::from(model.as_ref().priority),
        ..ModelStatus::default()
    });
    models.collect()
}

impl Status {
    /// Whether some model can answer.
    pub fn is_ready(&self) -> bool {
        self.models
            .iter()
            .any(|model| model.state == ModelState::Ready)
    }
}

impl ModelState {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            ModelState::Off => "off",
            ModelState::Loading => "loading",
            ModelState::Ready => "ready",
            ModelState::Failed => "failed",
        }
    }
}

/// Writes a budget as a table.
pub fn write_budget(
    to: &mut impl fmt::Write,
    title: &str,
    lines: &[BudgetLine],
    whole: u64,
) -> fmt::Result {
    writeln!(to, "{title}")?;
    for line in lines {
        writeln!(to, "  {:<44}{:>12}", line.what, bytes(line.bytes))?;
    }
    let sum = lines.iter().map(|line| line.bytes).sum();
    let (sum, whole) = (bytes(sum), bytes(whole));
    writeln!(to, "  {:<44}{sum:>12} of {whole}", "together")
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { total, recent, .. } = self;
        writeln!(
            f,
            "airstream {}, up {} s, {} clients",
            self.version, self.uptime_s, self.clients
        )?;
        write_budget(f, "budget", &self.budget, self.budget_bytes)?;
        if self.gpu_budget_bytes > 0 {
            let (lines, whole) = (&self.gpu_budget, self.gpu_budget_bytes);
            write_budget(f, "budget of the GPU's memory", lines, whole)?;
        }
        writeln!(f, "models")?;
        for model in &self.models {
            write!(f, "  {:<16}{:<8}", model.name, model.state.word())?;
            if model.state == ModelState::Ready {
                let share = 100.0 * model.resident_bytes as f64 / model.weight_bytes.max(1) as f64;
                let (weights, context) = (bytes(model.weight_bytes), model.context);
                write!(
                    f,
                    "{share:.0}% of {weights} resident, context {context}, priority {}",
                    model.priority
                )?;
            }
            writeln!(f)?;
        }
        writeln!(f, "sessions")?;
        for session in &self.sessions {
            let name = if session.name.is_empty() {
                "-"
            } else {
                &session.name
            };
            let busy = if session.busy { ", answering" } else { "" };
            writeln!(
                f,
                "  {:<16}{name}: {} tokens{busy}",
                session.model, session.tokens
            )?;
        }
        let (running, waiting, waiting_max) = (self.running, self.waiting, self.waiting_max);
        writeln!(
            f,
            "queue     {running} running, {waiting} of {waiting_max} waiting"
        )?;
        writeln!(
            f,
            "now       {:.1} tok/s answered, {:.1} tok/s read of prompts, NVMe {:.2} GB/s",
            recent.answer_tokens,
            recent.prompt_tokens,
            recent.read_bytes / 1e9
        )?;
        let board = &self.board;
        if let Some(watts) = board.power_w {
            let each = board.joules / total.answer_tokens.max(1) as f64;
            let joules = board.joules;
            writeln!(
                f,
                "power     {watts:.1} W; {joules:.0} J so far, {each:.3} J per token answered"
            )?;
        }
        if let (Some(junction), Some(peak)) = (board.junction_c, board.peak_c) {
            writeln!(f, "junction  {junction:.1} C, at most {peak:.1} C so far")?;
        }
        if let Some(governor) = &board.governor {
            let (effort, threads) = (100.0 * governor.effort, governor.threads);
            write!(f, "governor  {effort:.0}% of the work, {threads} threads")?;
            if governor.held_by != HeldBy::Nothing {
                write!(f, ", held down by {}", governor.held_by.words())?;
            }
            if let Some(watts) = governor.limit_w {
                write!(f, "; power limit {watts:.1} W")?;
            }
            if let Some(events) = board.over_current_events.filter(|&events| events > 0) {
                write!(f, "; {events} over-current events")?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "so far    {} requests ({} failed), {} prompt and {} answer tokens in {} sweeps of {:.1} ms, {} of {} drafts came true, {:.0}% stalled, {} read",
            total.requests,
            total.failed,
            total.prompt_tokens,
            total.answer_tokens,
            total.sweeps,
            1e3 * total.sweep_s / total.sweeps.max(1) as f64,
            total.drafts_right,
            total.drafts,
            100.0 * total.stalled_s / total.sweep_s.max(1e-9),
            bytes(total.read_bytes)
        )
    }
}
