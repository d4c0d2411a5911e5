//! A person with a terminal program on a serial port: a line is a question, and its answer streams back.

use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use super::editor::{CTRL_C, Editor, Typed};
use super::port::Port;
use crate::engine::request::{Event, Generate, Prompt, Reason, SESSION_NAME_BYTES_MAX};
use crate::error::Kind;
use crate::serve::config::Serial;
use crate::serve::front::{Client, Front};
use crate::serve::message::{Answer, Command, Nothing, Request, Reset};
use crate::serve::outbox::shortened;

const GREETING: &str =
    "\r\nairstream. Type a question; Ctrl-C stops an answer, /help lists commands.\r\n> ";
const HELP: &str = "/new forgets the conversation, /status tells how things are.\r\n";
/// Answers are request 1; commands are 2.
const ANSWER: u32 = 1;
const COMMAND: u32 = 2;
/// Bytes that wait for the line before more is taken from the client's outbox.
const OUT_BYTES: usize = 4096;

/// Serves the port, and waits for it to come back when it is gone.
pub(super) async fn serve(front: Rc<Front>, serial: Serial) {
    let device = &serial.device;
    loop {
        let port = Port::wait_for(device, serial.baud, serial.flow).await;
        let client = loop {
            // Nobody is there to be told of a limit when a port opens, and the limit on clients may pass.
            match front.admit(device.display().to_string()) {
                Ok(client) => break client,
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        };
        let mut terminal = Terminal {
            client,
            session: session_name(device),
            forgetting: false,
            out: GREETING.into(),
        };
        if let Err(e) = terminal.converse(&port).await {
            log::warn!("{}: {e}; waiting for it to come back", device.display());
        }
    }
}

/// The port's conversation is called as the port.
fn session_name(device: &Path) -> String {
    let name = device.file_name().unwrap_or_default().to_string_lossy();
    shortened(&name, SESSION_NAME_BYTES_MAX).to_owned()
}

struct Terminal {
    client: Client,
    session: String,
    /// The command that is being done is `/new`.
    forgetting: bool,
    /// What the terminal is to show.
    out: Vec<u8>,
}

impl Terminal {
    async fn converse(&mut self, port: &Port) -> io::Result<()> {
        let mut editor = Editor::default();
        loop {
            while self.out.len() < OUT_BYTES
                && let Some(taken) = self.client.take()
            {
                self.show(&taken.answer());
            }
            let mut bytes = [0; 64];
            let room = self.out.len() < OUT_BYTES;
            tokio::select! {
                read = port.read(&mut bytes) => {
                    for &byte in &bytes[..read?] {
                        match self.client.is_busy() {
                            true => self.interrupted(byte),
                            false => self.typed(editor.push(byte)).await,
                        }
                    }
                }
                written = port.write(&self.out), if !self.out.is_empty() => {
                    self.out.drain(..written?);
                }
                () = self.client.filled(), if room => {}
            }
        }
    }

    /// What is typed during an answer would be mixed with it on the screen, and is dropped; Ctrl-C ends the answer.
    fn interrupted(&mut self, byte: u8) {
        match byte {
            CTRL_C => self.client.cancel(ANSWER),
            b'\r' => self.print("\n(still answering: Ctrl-C stops it)\n"),
            _ => {}
        }
    }

    async fn typed(&mut self, typed: Typed<'_>) {
        match typed {
            Typed::Echo(bytes) => self.out.extend_from_slice(&bytes),
            Typed::Erase(columns) => {
                (0..columns).for_each(|_| self.out.extend_from_slice(b"\x08 \x08"));
            }
            Typed::Cancel => self.print("^C\n> "),
            Typed::Line(line) => self.line(line).await,
            Typed::Nothing => {}
        }
    }

    async fn line(&mut self, line: &str) {
        self.print("\n");
        let command = match line.trim() {
            "" => return self.print("> "),
            "/help" => {
                self.out.extend_from_slice(HELP.as_bytes());
                return self.print("> ");
            }
            "/status" => Command::Status(Nothing {}),
            "/new" => Command::Reset(Reset {
                session: self.session.clone(),
                model: None,
            }),
            question => Command::Generate(Box::new(Generate {
                session: Some(self.session.clone()),
                ..Generate::new(Prompt::Text(question.to_owned()))
            })),
        };
        self.forgetting = matches!(command, Command::Reset(_));
        let id = if matches!(command, Command::Generate(_)) {
            ANSWER
        } else {
            COMMAND
        };
        if let Some(answer) = self.client.request(Request { id, command }).await {
            self.show(&answer);
        }
    }

    fn show(&mut self, answer: &Answer<'_>) {
        match answer {
            Answer::Event(Event::Accepted { .. }) => {}
            Answer::Event(Event::Token { text, .. }) => self.print(text),
            Answer::Event(Event::Done { reason, .. }) => self.print(match reason {
                Reason::End | Reason::Stop => "\n> ",
                Reason::Cancelled => "\n(stopped)\n> ",
                Reason::Length | Reason::Context => {
                    "\n(no room for more: /new begins a new conversation)\n> "
                }
            }),
            // There was no conversation, and there is none now.
            Answer::Event(Event::Error {
                code: Kind::Usage, ..
            }) if self.forgetting => self.print("done\n> "),
            Answer::Event(Event::Error { text, remedy, .. }) => {
                self.print(&format!("error: {text}\n  remedy: {remedy}\n> "))
            }
            Answer::Ok(_) => self.print("done\n> "),
            Answer::Status(status) => self.print(&format!("{status}> ")),
        }
    }

    /// Shows text. A model's words must not steer the terminal, so of control characters only the newline is kept.
    fn print(&mut self, text: &str) {
        for c in text.chars() {
            match c {
                '\n' => self.out.extend_from_slice(b"\r\n"),
                '\t' => self.out.push(b' '),
                c if c.is_control() => {}
                c => self
                    .out
                    .extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
    }
}
