//! `airstream ask`: a question to the daemon.

use std::io::{self, Write};
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use super::question::{self, INTERRUPTED, Question};
use crate::engine::request::{Event, Generate, Reason};
use crate::error::{Error, Kind, Result};
use crate::serve::client::Connection;
use crate::serve::config::FlowControl;
use crate::serve::message::{Answer, Cancel, Command, Request};
use crate::serve::runtime;

/// Where the default configuration has the daemon's socket.
const SOCKET: &str = "/run/airstream/airstream.sock";
/// The question's number, and its cancellation's.
const QUESTION: u32 = 1;
const CANCEL: u32 = 2;
/// How long nothing may come before the user is told why.
const PATIENCE: Duration = Duration::from_secs(2);

/// How to reach the daemon.
#[derive(Args, Clone)]
pub struct DaemonArgs {
    /// The daemon's UNIX socket.
    #[arg(long, value_name = "PATH", default_value = SOCKET, conflicts_with = "serial")]
    socket: PathBuf,
    /// A serial port with a daemon at its other end, which serves it in mode "frames".
    #[arg(long, value_name = "DEV")]
    serial: Option<PathBuf>,
    /// The serial port's bits per second.
    #[arg(long, value_name = "N", default_value_t = 115_200, requires = "serial")]
    baud: u32,
    /// Use the serial port's RTS and CTS lines.
    #[arg(long, requires = "serial")]
    rtscts: bool,
}

impl DaemonArgs {
    /// Connects.
    pub async fn connect(&self) -> Result<Connection> {
        let flow = if self.rtscts {
            FlowControl::Hardware
        } else {
            FlowControl::None
        };
        match &self.serial {
            Some(device) => Connection::serial(device, self.baud, flow).await,
            None => Connection::unix(&self.socket).await,
        }
    }
}

/// Ask the daemon.
///
/// Streams the answer to stdout. Ctrl-C ends it, with exit code 130; an answer that the daemon cut short, with 1.
#[derive(Args)]
pub struct Ask {
    #[command(flatten)]
    daemon: DaemonArgs,
    /// The model. Default: the first of the daemon's configuration.
    #[arg(long, value_name = "M")]
    model: Option<String>,
    /// The conversation that the question belongs to; it is begun if there is none of this name.
    #[arg(long, value_name = "S")]
    session: Option<String>,
    #[command(flatten)]
    question: Question,
}

impl Ask {
    pub(super) fn run(self) -> Result<ExitCode> {
        let text = self.question.text()?.ok_or_else(question::no_prompt)?;
        let generate = Generate {
            model: self.model.clone(),
            session: self.session.clone(),
            ..self.question.request(text)
        };
        runtime(1)?.block_on(self.ask(generate))
    }

    async fn ask(&self, generate: Generate) -> Result<ExitCode> {
        let mut daemon = self.daemon.connect().await?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| {
            Error::new(
                Kind::Io,
                format!("cannot watch for Ctrl-C: {e}"),
                "free some memory",
            )
        })?;
        let question = Request {
            id: QUESTION,
            command: Command::Generate(Box::new(generate)),
        };
        daemon.send(&question).await?;
        let mut stdout = io::stdout();
        // A reader that went away (`| head`) ends the answer like Ctrl-C does.
        let mut gone = false;
        let mut cancelled = false;
        let mut interrupted = false;
        // Said once, if it takes long until the daemon says anything.
        let mut waiting = pin!(sleep(PATIENCE));
        let mut waits = true;
        loop {
            if gone && !cancelled {
                cancelled = true;
                daemon.send(&cancel()).await?;
            }
            let reply = tokio::select! {
                reply = daemon.next() => reply?,
                () = &mut waiting, if waits => {
                    waits = false;
                    eprintln!("waiting: the daemon is loading the model, or answering others");
                    continue;
                }
                _ = interrupt.recv() => {
                    // The second Ctrl-C is for a daemon that does not answer the first.
                    if cancelled {
                        std::process::exit(i32::from(INTERRUPTED));
                    }
                    (cancelled, interrupted) = (true, true);
                    daemon.send(&cancel()).await?;
                    continue;
                }
            };
            if reply.id == CANCEL {
                continue;
            }
            waits = false;
            match reply.answer {
                Answer::Event(Event::Token { text, .. }) => {
                    gone |= stdout
                        .write_all(text.as_bytes())
                        .and_then(|()| stdout.flush())
                        .is_err();
                }
                Answer::Event(Event::Done { reason, .. }) => {
                    // Its reader may be gone.
                    let _ = writeln!(stdout);
                    daemon.finish().await;
                    match reason {
                        Reason::Context => question::tell_cut_short(
                            "ask in another session, or give the daemon a larger `context` or more `memory`",
                        ),
                        Reason::Cancelled if !cancelled => {
                            let remedy = "see the daemon's log, and ask again";
                            return Err(Error::new(
                                Kind::Busy,
                                "the daemon ended the answer",
                                remedy,
                            ));
                        }
                        _ => {}
                    }
                    return Ok(match interrupted {
                        true => ExitCode::from(INTERRUPTED),
                        false => ExitCode::SUCCESS,
                    });
                }
                Answer::Event(Event::Error { code, text, remedy }) => {
                    return Err(Error::new(code, text, remedy));
                }
                _ => {}
            }
        }
    }
}

fn cancel() -> Request {
    let command = Command::Cancel(Cancel { request: QUESTION });
    Request {
        id: CANCEL,
        command,
    }
}
