//! The status as Prometheus reads it.

use std::fmt::Write;

use crate::serve::status::{ModelState, Status};

/// The text exposition format, version 0.0.4.
pub(super) fn text(status: &Status) -> String {
    let mut text = String::new();
    let total = &status.total;
    let busy = status
        .sessions
        .iter()
        .filter(|session| session.busy)
        .count();
    for (name, kind, help, value) in [
        (
            "uptime_seconds",
            "gauge",
            "Since the daemon started.",
            status.uptime_s as f64,
        ),
        (
            "clients",
            "gauge",
            "Connections.",
            f64::from(status.clients),
        ),
        (
            "requests_running",
            "gauge",
            "Requests that are being answered.",
            f64::from(status.running),
        ),
        (
            "requests_waiting",
            "gauge",
            "Requests that wait.",
            f64::from(status.waiting),
        ),
        (
            "sessions",
            "gauge",
            "Conversations that are held.",
            status.sessions.len() as f64,
        ),
        (
            "sessions_busy",
            "gauge",
            "Conversations with an answer being made.",
            busy as f64,
        ),
        (
            "memory_budget_bytes",
            "gauge",
            "The memory budget.",
            status.budget_bytes as f64,
        ),
        (
            "gpu_memory_budget_bytes",
            "gauge",
            "The budget of a GPU's own memory; 0 if none computes there.",
            status.gpu_budget_bytes as f64,
        ),
        (
            "requests_total",
            "counter",
            "Requests taken on.",
            total.requests as f64,
        ),
        (
            "requests_ended_total",
            "counter",
            "Requests that ended.",
            total.ended as f64,
        ),
        (
            "requests_failed_total",
            "counter",
            "Requests that ended with an error.",
            total.failed as f64,
        ),
        (
            "prompt_tokens_total",
            "counter",
            "Tokens of prompts to compute, counted when a request begins.",
            total.prompt_tokens as f64,
        ),
        (
            "answer_tokens_total",
            "counter",
            "Tokens of answers.",
            total.answer_tokens as f64,
        ),
        (
            "sweeps_total",
            "counter",
            "Passes through a model.",
            total.sweeps as f64,
        ),
        (
            "sweep_seconds_total",
            "counter",
            "Time in sweeps.",
            total.sweep_s,
        ),
        (
            "stalled_seconds_total",
            "counter",
            "Of that, waiting for reads.",
            total.stalled_s,
        ),
        (
            "read_bytes_total",
            "counter",
            "Bytes read from disk.",
            total.read_bytes as f64,
        ),
        (
            "drafting_seconds_total",
            "counter",
            "Of the seconds of sweeps, those of draft models.",
            total.drafting_s,
        ),
        (
            "drafts_total",
            "counter",
            "Rows computed ahead for tokens that were likely to come.",
            total.drafts as f64,
        ),
        (
            "drafts_right_total",
            "counter",
            "Of these, those whose tokens came.",
            total.drafts_right as f64,
        ),
    ] {
        head(&mut text, name, kind, help);
        let _ = writeln!(text, "airstream_{name} {value}");
    }
    let board = &status.board;
    let governor = board.governor.as_ref();
    for (name, kind, help, value) in [
        (
            "power_watts",
            "gauge",
            "What the board draws.",
            board.power_w,
        ),
        (
            "energy_joules_total",
            "counter",
            "What it has drawn since the daemon started.",
            // Once there, a counter stays, also while a sensor is silent.
            (board.joules > 0.0).then_some(board.joules),
        ),
        (
            "junction_celsius",
            "gauge",
            "The hottest thermal zone.",
            board.junction_c,
        ),
        (
            "over_current_events_total",
            "counter",
            "Events that the board has counted since the daemon started.",
            board.over_current_events.map(|events| events as f64),
        ),
        (
            "power_limit_watts",
            "gauge",
            "What the governor keeps average power within.",
            governor.and_then(|governor| governor.limit_w),
        ),
        (
            "governor_effort",
            "gauge",
            "The share of the work that the governor lets the engine do.",
            governor.map(|governor| governor.effort),
        ),
        (
            "governor_threads",
            "gauge",
            "Threads that it lets compute.",
            governor.map(|governor| f64::from(governor.threads)),
        ),
    ] {
        // What nothing measures is left out, not 0.
        if let Some(value) = value {
            head(&mut text, name, kind, help);
            let _ = writeln!(text, "airstream_{name} {value}");
        }
    }
    head(
        &mut text,
        "budget_line_bytes",
        "gauge",
        "What the budget is divided into.",
    );
    for line in &status.budget {
        let what = label(&line.what);
        let _ = writeln!(
            text,
            "airstream_budget_line_bytes{{what=\"{what}\"}} {}",
            line.bytes
        );
    }
    for (name, help) in [
        ("model_ready", "Whether the model can answer."),
        ("model_weight_bytes", "Weights that a token needs."),
        ("model_resident_bytes", "Of these, in memory."),
    ] {
        head(&mut text, name, "gauge", help);
        for model in &status.models {
            let value = match name {
                "model_ready" => u64::from(model.state == ModelState::Ready),
                "model_weight_bytes" => model.weight_bytes,
                _ => model.resident_bytes,
            };
            let _ = writeln!(
                text,
                "airstream_{name}{{model=\"{}\"}} {value}",
                label(&model.name)
            );
        }
    }
    text
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(
        text,
        "# HELP airstream_{name} {help}\n# TYPE airstream_{name} {kind}"
    );
}

/// A label's value, escaped.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::governor::HeldBy;
    use crate::serve::status::{BoardStatus, GovernorStatus, ModelStatus};

    #[test]
    fn what_nothing_measures_is_left_out() {
        assert!(!text(&Status::default()).contains("airstream_power_watts"));
        let board = BoardStatus {
            power_w: Some(6.5),
            junction_c: Some(49.125),
            peak_c: Some(50.0),
            joules: 12.0,
            over_current_events: Some(2),
            governor: Some(GovernorStatus {
                limit_w: Some(15.0),
                effort: 0.625,
                held_by: HeldBy::Power,
                threads: 3,
            }),
        };
        let status = Status {
            board,
            ..Status::default()
        };
        for line in [
            "airstream_power_watts 6.5\n",
            "airstream_energy_joules_total 12\n",
            "airstream_junction_celsius 49.125\n",
            "airstream_over_current_events_total 2\n",
            "airstream_power_limit_watts 15\n",
            "airstream_governor_effort 0.625\n",
            "airstream_governor_threads 3\n",
        ] {
            assert!(text(&status).contains(line), "{line}");
        }
        let shown = status.to_string();
        assert!(shown.contains("power     6.5 W; 12 J so far"), "{shown}");
        assert!(
            shown.contains("junction  49.1 C, at most 50.0 C"),
            "{shown}"
        );
        let governor = "governor  62% of the work, 3 threads, held down by the power limit; power limit 15.0 W; 2 over";
        assert!(shown.contains(governor), "{shown}");
        // A sensor that is silent for a moment takes no counter away.
        let silent = Status {
            board: BoardStatus {
                power_w: None,
                ..board
            },
            ..Status::default()
        };
        assert!(text(&silent).contains("airstream_energy_joules_total 12\n"));
    }

    #[test]
    fn every_line_is_a_comment_or_a_sample() {
        let status = Status {
            models: vec![ModelStatus {
                name: "a\"b\\".into(),
                state: ModelState::Ready,
                ..ModelStatus::default()
            }],
            ..Status::default()
        };
        let text = text(&status);
        assert!(
            text.contains("airstream_model_ready{model=\"a\\\"b\\\\\"} 1\n"),
            "{text}"
        );
        for line in text.lines() {
            let sample = line.rsplit_once(' ').is_some_and(|(name, value)| {
                name.starts_with("airstream_") && value.parse::<f64>().is_ok()
            });
            assert!(
                sample
                    || line.starts_with("# HELP airstream_")
                    || line.starts_with("# TYPE airstream_"),
                "{line}"
            );
        }
    }
}
