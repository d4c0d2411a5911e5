//! `airstream status`: how the daemon is.

use std::io::Write;

use clap::Args;

use super::ask::{DaemonArgs, runtime};
use crate::engine::request::Event;
use crate::error::{Error, Kind, Result};
use crate::serve::message::{Answer, Command, Nothing, Request};

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
        runtime()?.block_on(async {
            let mut daemon = self.daemon.connect().await?;
            daemon
                .send(&Request {
                    id: 1,
                    command: Command::Status(Nothing {}),
                })
                .await?;
            let status = match daemon.next().await?.answer {
                Answer::Status(status) => status,
                Answer::Event(Event::Error { code, text, remedy }) => {
                    return Err(Error::new(code, text, remedy));
                }
                _ => {
                    let remedy = "use the same version of airstream at both ends";
                    return Err(Error::new(
                        Kind::Format,
                        "the daemon tells something else",
                        remedy,
                    ));
                }
            };
            daemon.finish().await;
            let text = match self.json {
                true => {
                    serde_json::to_string_pretty(&status).expect("a status is plain data") + "\n"
                }
                false => status.to_string(),
            };
            // A reader that went away (`| head`) has seen what it wanted.
            let _ = std::io::stdout().write_all(text.as_bytes());
            Ok(())
        })
    }
}
