//! `airstream status`: how the daemon is.

use std::io::Write;

use clap::Args;

use super::ask::DaemonArgs;
use super::tell::exchange;
use crate::error::Result;
use crate::serve::message::{Command, Nothing};

/// Show the daemon's models, sessions, budget, speed and queue.
#[derive(Args)]
pub struct StatusArgs {
    #[command(flatten)]
    daemon: DaemonArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl StatusArgs {
    pub(super) fn run(self) -> Result<()> {
        let status = exchange(&self.daemon, Command::Status(Nothing {}))?.unwrap_or_default();
        let text = match self.json {
            true => serde_json::to_string_pretty(&status).expect("a status is plain data") + "\n",
            false => status.to_string(),
        };
        // A reader that went away (`| head`) has seen what it wanted.
        let _ = std::io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}
