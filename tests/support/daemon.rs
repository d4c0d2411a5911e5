//! A daemon in a folder of its own, and clients that speak to it as programs do.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What the daemon may have.
pub const BUDGET_BYTES: u64 = 140 << 20;

/// A daemon, killed when dropped.
pub struct Daemon {
    pub child: Child,
    pub folder: TempDir,
}

/// The start of a configuration: one model, one socket in the folder.
pub fn config(model: &Path, folder: &Path) -> String {
    format!(
        "memory = \"{BUDGET_BYTES}\"\nthreads = 2\n[[model]]\nname = \"small\"\npath = \"{}\"\ncontext = 512\n[[socket]]\npath = \"{}\"\n",
        model.display(),
        folder.join("a.sock").display()
    )
}

impl Daemon {
    /// Starts a daemon; `rest` is added to its configuration, with the folder for `{folder}`.
    pub fn start(model: &Path, rest: &str) -> Daemon {
        Daemon::start_with(model, rest, &mut |_| {})
    }

    /// The same, but the command may be changed first.
    pub fn start_with(model: &Path, rest: &str, change: &mut dyn FnMut(&mut Command)) -> Daemon {
        let text = |folder: &Path| {
            let rest = rest.replace("{folder}", folder.to_str().expect("UTF-8"));
            config(model, folder) + &rest
        };
        Daemon::start_as(text, change)
    }

    /// The same with the configuration that is made for its folder.
    pub fn start_as(
        config: impl FnOnce(&Path) -> String,
        change: &mut dyn FnMut(&mut Command),
    ) -> Daemon {
        let folder = tempfile::tempdir().expect("a folder");
        let text = config(folder.path());
        std::fs::write(folder.path().join("airstream.toml"), text).expect("a file");
        let child = spawn(folder.path(), change);
        let daemon = Daemon { child, folder };
        daemon.connect();
        daemon
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("a.sock")
    }

    /// Connects as soon as the daemon listens.
    pub fn connect(&self) -> Client {
        Daemon::client_of(&self.socket())
    }

    /// Connects to a daemon's socket as soon as it listens.
    pub fn client_of(socket: &Path) -> Client {
        Client::new(stream_to(socket))
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Resident bytes of the process.
    pub fn resident_bytes(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("VmRSS");
        let kib: u64 = line
            .split_whitespace()
            .nth(1)
            .and_then(|kib| kib.parse().ok())
            .expect("a number");
        kib << 10
    }

    /// What the process has open.
    pub fn descriptors(&self) -> Vec<PathBuf> {
        let folder = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("it runs");
        // One may be closed while it is looked at.
        folder
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended as the test wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects to a socket as soon as somebody listens there: a daemon opens its own one after the other.
pub fn stream_to(socket: &Path) -> UnixStream {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(e) => assert!(begun.elapsed() < PATIENCE, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn spawn(folder: &Path, change: &mut dyn FnMut(&mut Command)) -> Child {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(folder.join("log"));
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("airstream"));
    command
        .args(["serve", "--config"])
        .arg(folder.join("airstream.toml"))
        .stdin(Stdio::null())
        .stderr(log.expect("a log"));
    change(&mut command);
    command.spawn().expect("the binary starts")
}

/// A client on the UNIX socket.
pub struct Client {
    pub stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    fn new(stream: UnixStream) -> Client {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let lines = BufReader::new(stream.try_clone().expect("a descriptor"));
        Client { stream, lines }
    }

    pub fn send(&mut self, request: &Value) {
        self.send_raw(format!("{request}\n").as_bytes());
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the daemon reads");
    }

    /// The next reply; none when the daemon has closed the connection.
    pub fn try_next(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).expect("a reply is JSON")),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(e) => panic!("no reply: {e}"),
        }
    }

    pub fn next(&mut self) -> Value {
        self.try_next().expect("the daemon lives")
    }

    /// Sends a request and waits for the reply that ends it.
    pub fn ask(&mut self, request: &Value) -> Value {
        self.send(request);
        loop {
            let reply = self.next();
            if reply["id"] == request["id"] && is_last(&reply) {
                return reply;
            }
        }
    }

    /// The text of an answer, and the reply that ended it.
    pub fn answer(&mut self, request: &Value) -> (String, Value) {
        self.send(request);
        let mut text = String::new();
        loop {
            let reply = self.next();
            if reply["id"] != request["id"] {
                continue;
            }
            if let Some(piece) = reply["token"]["text"].as_str() {
                text.push_str(piece);
            }
            if is_last(&reply) {
                return (text, reply);
            }
        }
    }

    /// Everything until the daemon closes the connection.
    pub fn drain(mut self) -> Vec<u8> {
        let mut all = Vec::new();
        if let Err(e) = self.lines.read_to_end(&mut all) {
            // A reset is an end too, but none that does not come.
            let kind = e.kind();
            assert_eq!(kind, std::io::ErrorKind::ConnectionReset, "{e}");
        }
        all
    }
}

pub fn is_last(reply: &Value) -> bool {
    ["done", "error", "ok", "status"]
        .iter()
        .any(|kind| !reply[kind].is_null())
}

/// A greedy request for some tokens.
pub fn generate(id: u32, text: &str, max_tokens: u32) -> Value {
    json!({
        "id": id,
        "generate": { "prompt": { "text": text }, "max_tokens": max_tokens, "sampling": { "temperature": 0.0 } },
    })
}
