//! `airstream serve`: the daemon.

use std::path::PathBuf;

use clap::Args;

use super::board::BoardArgs;
use crate::engine::{Engine, Options};
use crate::error::{Error, Result};
use crate::serve::config::{Config, Load};
use crate::serve::engine::Setup;
use crate::serve::status::write_budget;
use crate::serve::{daemon, engine, in_keys, sockets};

/// Where the package puts the configuration.
const CONFIG: &str = "/etc/airstream/airstream.toml";

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
        let mut options = engine::options(&config);
        let board = self.board.apply(&mut options)?;
        if self.check {
            return check(&config, &options);
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

fn check(config: &Config, options: &Options) -> Result<()> {
    sockets::check(config)?;
    let budget = engine::plan(config, options)?;
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
