//! `airstream serve`: the daemon.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::board::BoardArgs;
use crate::engine::{Engine, Options};
use crate::error::{Error, Kind, Result};
use crate::serve::config::{Config, Load};
use crate::serve::engine::Setup;
use crate::serve::status::write_budget;
use crate::serve::{check, daemon, engine, in_keys};

/// Where the package puts the configuration.
const CONFIG: &str = "/etc/airstream/airstream.toml";
/// The exit status (EX_CONFIG of sysexits.h) that says that another start would fail like this one. The unit knows it.
const NOT_AGAIN: u8 = 78;

/// Answer programs and people on sockets, serial ports and HTTP.
///
/// Runs until SIGTERM or Ctrl-C. SIGHUP reads the configuration again.
#[derive(Args)]
pub struct Serve {
    /// The configuration file.
    #[arg(long, value_name = "FILE", default_value = CONFIG)]
    config: PathBuf,
    /// Check the configuration and the models, show how the budget would be divided, and end.
    #[arg(long)]
    check: bool,
    /// Check the configuration alone, without the models' contents and the budget, and end (`systemctl reload` does).
    #[arg(long, conflicts_with = "check")]
    check_config: bool,
    #[command(flatten)]
    board: BoardArgs,
}

impl Serve {
    pub(super) fn run(self) -> Result<()> {
        // Who runs a daemon has its configuration to change, not a command line.
        self.serve()
            .map_err(|e| Error::new(e.kind(), e.what(), in_keys(e.remedy())))
    }

    fn serve(self) -> Result<()> {
        let config = Config::read(&self.config)?;
        if self.check_config {
            // Neither models nor a GPU are opened, both of which the running daemon has.
            return check::refuse(check::findings(&config, Path::new("/")));
        }
        let mut options = engine::options(&config);
        let board = self.board.apply(&mut options)?;
        if self.check {
            return show(&config, &options);
        }
        let arguments = self.board.clone();
        let watch = Box::new(move |engine: &mut Engine| arguments.watch(&board, engine));
        let setup = Setup {
            options,
            open: Box::new(Engine::new),
            watch,
        };
        daemon::run(config, &self.config, setup)
    }
}

/// The exit status of a daemon that has ended, after telling why.
pub(super) fn end(ended: Result<()>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => super::fail(&error, ExitCode::from(status(error.kind()))),
    }
}

/// Says whether another start may succeed: files come with drives, memory is given back, and so may GPUs be. What was
/// written wrong stays wrong.
fn status(kind: Kind) -> u8 {
    match kind {
        Kind::Usage | Kind::Format => NOT_AGAIN,
        _ => 1,
    }
}

/// Checks everything, and shows how the budget would be divided.
fn show(config: &Config, options: &Options) -> Result<()> {
    check::refuse(check::findings(config, Path::new("/")))?;
    let budget = engine::plan(config, options)?;
    for warning in &budget.warnings {
        log::warn!("{warning}");
    }
    let mut tables = String::new();
    // Writing into a string cannot fail.
    let _ = write_budget(&mut tables, "budget", &budget.lines, budget.bytes);
    if budget.gpu_bytes > 0 {
        let (title, whole) = ("budget of the GPU's memory", budget.gpu_bytes);
        let _ = write_budget(&mut tables, title, &budget.gpu_lines, whole);
    }
    print!("{tables}");
    println!("models");
    for model in config.models.iter().map(|model| model.as_ref()) {
        let when = match model.load {
            Load::Start => "loaded at the start",
            Load::Demand => "loaded on demand",
        };
        let (name, path, sessions) = (&model.name, model.path.display(), config.limits.sessions);
        println!("  {name} ({path}), {when}, {sessions} sessions");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_starts_again_what_may_succeed_and_nothing_else() {
        let unit = include_str!("../../cross/systemd/airstream.service");
        let line = format!("RestartPreventExitStatus=2 {NOT_AGAIN}\n");
        assert!(unit.contains(&line), "{line}");
        let checks = "ExecReload=/usr/bin/airstream serve --check-config --config /etc/airstream/airstream.toml\n";
        assert!(unit.contains(checks));
        for kind in [Kind::Io, Kind::Unsupported, Kind::Budget, Kind::Busy] {
            assert_eq!(status(kind), 1, "{kind:?}");
        }
        assert_eq!(status(Kind::Usage), NOT_AGAIN);
        assert_eq!(status(Kind::Format), NOT_AGAIN);
    }
}
