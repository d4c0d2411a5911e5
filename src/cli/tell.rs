//! `airstream tell`: what the daemon is to do, other than answer.

use clap::{Args, ValueEnum};

use super::ask::DaemonArgs;
use crate::engine::request::Event;
use crate::error::{Error, Kind, Result};
use crate::serve::message::{Answer, Budget, Command, ModelName, Request, Reset};
use crate::serve::runtime;
use crate::serve::status::Status;
use crate::units::parse_size;

/// Tell the daemon to load or unload a model, to forget a conversation, or to change its memory budget.
///
/// Ends when it is done.
#[derive(Args)]
pub struct Tell {
    #[command(flatten)]
    daemon: DaemonArgs,
    /// The conversation's model. Default: the first of the daemon's configuration.
    #[arg(long, value_name = "M")]
    model: Option<String>,
    /// What to do.
    what: What,
    /// The model, the conversation, or the budget (2GiB).
    #[arg(value_name = "NAME|SIZE")]
    of: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Load a model of the configuration.
    Load,
    /// Give a model's memory back.
    Unload,
    /// Forget a conversation.
    Reset,
    /// Change the memory budget.
    Budget,
}

impl Tell {
    pub(super) fn run(self) -> Result<()> {
        if self.model.is_some() && self.what != What::Reset {
            let remedy = "leave --model out: the model's name stands alone";
            return Err(Error::new(
                Kind::Usage,
                "only `reset` takes --model",
                remedy,
            ));
        }
        let name = || ModelName {
            model: self.of.clone(),
        };
        let command = match self.what {
            What::Load => Command::Load(name()),
            What::Unload => Command::Unload(name()),
            What::Reset => Command::Reset(Reset {
                session: self.of.clone(),
                model: self.model.clone(),
            }),
            What::Budget => Command::SetBudget(Budget {
                bytes: parse_size(&self.of).map_err(|what| {
                    Error::new(Kind::Usage, what, "give a number and a unit, like 2GiB")
                })?,
            }),
        };
        exchange(&self.daemon, command).map(drop)
    }
}

/// Has the daemon do something that is no question, and waits until it is done. The status, if that was asked for.
pub fn exchange(daemon: &DaemonArgs, command: Command) -> Result<Option<Box<Status>>> {
    runtime(1)?.block_on(async {
        let mut daemon = daemon.connect().await?;
        daemon.send(&Request { id: 1, command }).await?;
        let done = match daemon.next().await?.answer {
            Answer::Status(status) => Ok(Some(status)),
            Answer::Ok(_) => Ok(None),
            Answer::Event(Event::Error { code, text, remedy }) => {
                Err(Error::new(code, text, remedy))
            }
            Answer::Event(_) => Err(Error::new(
                Kind::Format,
                "the daemon tells something else",
                "use the same version of airstream at both ends",
            )),
        };
        daemon.finish().await;
        done
    })
}
