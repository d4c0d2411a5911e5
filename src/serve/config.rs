//! The daemon's configuration file (TOML). Every key is explained in `cross/airstream.toml`.
//!
//! Reading it is pure: a text becomes a [`Config`] or an error that names the line, the key and the remedy. What the
//! machine has to say (files, budget, devices) shows when the daemon starts, or at `airstream serve --check`.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::outbox::Outbox;
use super::serial::port;
use crate::engine::plan::CONTEXT_DEFAULT;
use crate::engine::{DeviceChoice, Precision, THREADS_MAX};
use crate::error::{Error, Kind, Result};
use crate::units::parse_size;

/// Bytes of a model's name at most: it is in the daemon's fixed tables.
pub const MODEL_NAME_BYTES_MAX: usize = 64;

/// What a connection takes beside a request and its outbox: buffers to read and write, and its task.
const CONNECTION_BYTES: usize = 48 << 10;
/// What a request takes beside its texts or tokens: its sampler, stop strings, and text that is not sure yet.
const REQUEST_BYTES: usize = 8 << 10;

/// Requests of a client at a time, at most: they are in a fixed table.
pub const CLIENT_REQUESTS_MAX: usize = 64;

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The memory budget of the process.
    pub memory: Option<Size>,
    /// The budget of the memory of a GPU that has its own.
    pub gpu_memory: Option<Size>,
    /// What computes.
    #[serde(default)]
    pub device: DeviceChoice,
    /// Threads that compute.
    pub threads: Option<u16>,
    /// Whether tiles must agree with their checksums each time they are read.
    #[serde(default = "yes")]
    pub verify: bool,
    /// The models, the default one first.
    #[serde(default, rename = "model")]
    pub models: Vec<Spanned<Model>>,
    /// UNIX sockets.
    #[serde(default, rename = "socket")]
    pub sockets: Vec<Spanned<Socket>>,
    /// Serial ports.
    #[serde(default, rename = "serial")]
    pub serials: Vec<Spanned<Serial>>,
    /// The HTTP server, if any.
    pub http: Option<Spanned<Http>>,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
}

/// A model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// What requests call it.
    pub name: String,
    /// The GGUF file (any part of a split one).
    pub path: PathBuf,
    /// Its share of the sweeps against other models that have work: twice the number, twice the sweeps.
    #[serde(default = "one")]
    pub priority: u8,
    /// Positions of a session.
    pub context: Option<u32>,
    /// Bits that activations are rounded to.
    #[serde(default)]
    pub activations: Precision,
    /// Tokens at most that a sweep computes ahead.
    pub drafts: Option<u8>,
    /// The GGUF file of a smaller model of the same vocabulary that says which.
    pub draft_model: Option<PathBuf>,
    /// When it is loaded.
    #[serde(default)]
    pub load: Load,
}

impl Model {
    /// What cannot change while it is loaded.
    pub(super) fn engine_part(&self) -> impl PartialEq + '_ {
        (
            &self.path,
            self.context,
            self.activations,
            self.drafts,
            &self.draft_model,
        )
    }
}

/// When a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Load {
    /// When the daemon starts.
    #[default]
    Start,
    /// When a client asks for it with `load`.
    Demand,
}

/// A UNIX socket.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Socket {
    /// Where it is.
    pub path: PathBuf,
    /// Who may connect, as a file mode. Default: 0660, or what the service manager has given the socket.
    pub mode: Option<Mode>,
    /// The group it belongs to.
    pub group: Option<String>,
    /// Only these users may use it, if any are named. Root is not excepted.
    #[serde(default)]
    pub allow_uids: Vec<u32>,
}

/// A serial port.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// The terminal device.
    pub device: PathBuf,
    /// Bits per second.
    #[serde(default = "usual_baud")]
    pub baud: u32,
    /// How a receiver that is full says so.
    #[serde(default)]
    pub flow: FlowControl,
    /// What is spoken on it.
    #[serde(default)]
    pub mode: SerialMode,
}

/// How a receiver that is full says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowControl {
    /// Not at all.
    #[default]
    None,
    /// RTS and CTS.
    Hardware,
    /// XON and XOFF; for text only, since frames hold every byte but zero.
    Software,
}

/// What is spoken on a serial port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SerialMode {
    /// Framed messages, for a program.
    #[default]
    Frames,
    /// Lines, for a person with a terminal program.
    Text,
}

/// The HTTP server.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Where it listens: an address and port, or `unix:` and a path.
    pub listen: Listen,
    /// What a client must show as `Authorization: Bearer`.
    pub token: Option<String>,
    /// A file that holds the token, so that the configuration need not be secret.
    pub token_file: Option<PathBuf>,
}

/// Where HTTP is served.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Listen {
    /// On an address of the network.
    Tcp(SocketAddr),
    /// On a UNIX socket.
    Unix(PathBuf),
}

/// Bounds: what a client can make the daemon hold, and how long it waits for what.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Connections at a time, all transports together.
    pub clients: usize,
    /// Requests that are answered at a time, and so conversations that take memory.
    pub sessions: usize,
    /// Requests that wait beyond these.
    pub queue: usize,
    /// Requests of one client at a time, so that it cannot fill the queue for all.
    pub client_requests: usize,
    /// Bytes of a request on a socket, and of the body of an HTTP request.
    pub request_bytes: Size,
    /// Events that wait for a client to read them, before its answers pause.
    pub outbox_events: usize,
    /// Seconds that a named conversation is kept without a request.
    pub session_idle_s: u64,
    /// Seconds that a client may leave its events unread before it is disconnected.
    pub stalled_s: u64,
    /// Seconds that answers may take to end after SIGTERM.
    pub stop_s: u64,
    /// How many times as long as alone the others' prompts may make the time between two tokens of an answer.
    pub prefill_slowdown: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            clients: 32,
            sessions: 8,
            queue: 32,
            client_requests: 16,
            request_bytes: Size(64 << 10),
            outbox_events: 64,
            session_idle_s: 600,
            stalled_s: 60,
            stop_s: 10,
            prefill_slowdown: 2.0,
        }
    }
}

impl Limits {
    /// Requests that are waiting or being answered at a time.
    pub fn requests(&self) -> usize {
        self.sessions + self.queue
    }

    /// Bytes that a request may take from its arrival until it is made ready: its texts are no longer than what was
    /// sent, but small numbers and empty texts take more than they took on the line.
    pub fn held_bytes(&self) -> usize {
        2 * self.request_bytes.0 as usize
    }

    /// Bytes that all clients together can make the daemon hold, with conversations of `context` tokens.
    ///
    /// Each connection has what came of a request so far, its outbox, and buffers; each request has either its texts,
    /// or the tokens that were made of them: the whole conversation's, and those that would follow an old one.
    pub fn clients_bytes(&self, context: usize) -> u64 {
        let connection =
            self.request_bytes.0 as usize + Outbox::bytes(self.outbox_events) + CONNECTION_BYTES;
        let tokens = 2 * context * size_of::<u32>();
        let request = self.held_bytes().max(tokens) + REQUEST_BYTES;
        (self.clients * connection + self.requests() * request) as u64
    }

    /// How long answers may take to end after SIGTERM.
    pub fn stop(&self) -> Duration {
        Duration::from_secs(self.stop_s)
    }

    /// How long a client may leave its events unread.
    pub fn stalled(&self) -> Duration {
        Duration::from_secs(self.stalled_s)
    }
}

/// Bytes, written with a unit (`"2GiB"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Size, String> {
        parse_size(&text).map(Size)
    }
}

/// A file mode, written in octal (`"0660"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Mode(pub u32);

impl Default for Mode {
    fn default() -> Self {
        Mode(0o660)
    }
}

impl TryFrom<String> for Mode {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Mode, String> {
        match u32::from_str_radix(&text, 8) {
            Ok(mode) if mode <= 0o777 => Ok(Mode(mode)),
            _ => Err(format!(
                "{text:?} is no file mode: write it in octal, like \"0660\""
            )),
        }
    }
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Listen, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Listen::Unix(path.into()));
        }
        SocketAddr::from_str(&text).map(Listen::Tcp).map_err(|_| {
            format!("{text:?} is no address: write \"127.0.0.1:8080\" or \"unix:/run/airstream/http.sock\"")
        })
    }
}

fn yes() -> bool {
    true
}

fn one() -> u8 {
    1
}

fn usual_baud() -> u32 {
    115_200
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// The file cannot be read, or see [`parse`](Self::parse).
    pub fn read(path: &Path) -> Result<Config> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, "read", &e))?;
        Config::parse(&text, path)
    }

    /// Reads a configuration; `path` is what errors call it.
    ///
    /// # Errors
    /// It is no TOML, a key is unknown or missing, or a value makes no sense; the error names line, key and remedy.
    pub fn parse(text: &str, path: &Path) -> Result<Config> {
        let place = Place { text, path };
        let config: Config = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            // The library's message goes on to say what would be right.
            let what = e.message().trim().replace('\n', "; ");
            let key = place
                .key(at)
                .map_or(String::new(), |key| format!(" at `{key}`"));
            place.error(
                at,
                format!("{what}{key}"),
                "each key is explained in the airstream.toml that the package puts into /etc/airstream",
            )
        })?;
        config.check(&place)?;
        Ok(config)
    }

    fn check(&self, place: &Place<'_>) -> Result<()> {
        let Some(first) = self.models.first() else {
            return Err(place.error(
                place.text.len(),
                "there is no [[model]]",
                "name one: [[model]] name = .., path = ..",
            ));
        };
        if first.as_ref().load == Load::Demand
            && self.models.iter().all(|m| m.as_ref().load == Load::Demand)
        {
            let remedy = "leave out `load` of the model that should answer first";
            return Err(place.error(
                first.span().start,
                "no model has `load = \"start\"`",
                remedy,
            ));
        }
        for (index, spanned) in self.models.iter().enumerate() {
            let (at, model) = (spanned.span().start, spanned.as_ref());
            let name = &model.name;
            if name.is_empty()
                || name.len() > MODEL_NAME_BYTES_MAX
                || name.contains(char::is_whitespace)
            {
                let remedy = format!("give 1 to {MODEL_NAME_BYTES_MAX} bytes without spaces");
                return Err(place.error(at, format!("model `name` {name:?} is no name"), remedy));
            }
            if self.models[..index]
                .iter()
                .any(|m| &m.as_ref().name == name)
            {
                return Err(place.error(
                    at,
                    format!("model `name` {name:?} is there twice"),
                    "give each its own",
                ));
            }
            place.range(at, "priority", u64::from(model.priority), 1..=255)?;
            if let Some(context) = model.context {
                place.range(at, "context", u64::from(context), 1..=1 << 24)?;
            }
        }
        if let Some(threads) = self.threads {
            let at = place.text.find("\nthreads").map_or(0, |before| before + 1);
            place.range(at, "threads", u64::from(threads), 1..=THREADS_MAX as u64)?;
        }
        for (index, spanned) in self.sockets.iter().enumerate() {
            let (at, path) = (spanned.span().start, &spanned.as_ref().path);
            place.socket_path(at, "path", path)?;
            let earlier = self.sockets[..index].iter();
            place.once(at, path, earlier.map(|socket| &socket.as_ref().path))?;
        }
        for (index, spanned) in self.serials.iter().enumerate() {
            let (at, serial) = (spanned.span().start, spanned.as_ref());
            let earlier = self.serials[..index].iter();
            let earlier = earlier.map(|serial| &serial.as_ref().device);
            place.once(at, &serial.device, earlier)?;
            if port::speed(serial.baud).is_none() {
                let what = format!("`baud` {} is no usual speed", serial.baud);
                return Err(place.error(at, what, format!("use one of {}", port::speeds())));
            }
            if serial.flow == FlowControl::Software && serial.mode == SerialMode::Frames {
                let what = "`flow = \"software\"` takes bytes that frames need";
                return Err(place.error(
                    at,
                    what,
                    "use `flow = \"hardware\"` or \"none\", or `mode = \"text\"`",
                ));
            }
        }
        if let Some(spanned) = &self.http {
            self.check_http(spanned, place)?;
        }
        if self.sockets.is_empty() && self.serials.is_empty() && self.http.is_none() {
            let remedy = "add a [[socket]], a [[serial]] or an [http]";
            return Err(place.error(place.text.len(), "nobody could reach the daemon", remedy));
        }
        self.check_limits(place)
    }

    fn check_http(&self, spanned: &Spanned<Http>, place: &Place<'_>) -> Result<()> {
        let (at, http) = (spanned.span().start, spanned.as_ref());
        if http.token.is_some() && http.token_file.is_some() {
            return Err(place.error(
                at,
                "both `token` and `token_file` are given",
                "keep one of them",
            ));
        }
        let token_is_sound =
            |token: &String| !token.is_empty() && token.chars().all(|c| c.is_ascii_graphic());
        if !http.token.iter().all(token_is_sound) {
            return Err(place.error(
                at,
                "`token` is no token",
                "give printable ASCII without spaces",
            ));
        }
        match &http.listen {
            Listen::Unix(path) => {
                place.socket_path(at, "listen", path)?;
                let sockets = self.sockets.iter();
                place.once(at, path, sockets.map(|socket| &socket.as_ref().path))
            }
            Listen::Tcp(address) => {
                if !address.ip().is_loopback() && http.token.is_none() && http.token_file.is_none()
                {
                    let what =
                        format!("`listen` on {address} is open to the network without a token");
                    return Err(place.error(at, what, "add `token_file`, or listen on 127.0.0.1"));
                }
                Ok(())
            }
        }
    }

    fn check_limits(&self, place: &Place<'_>) -> Result<()> {
        let limits = &self.limits;
        let at = place.text.find("[limits]").unwrap_or(0);
        place.range(at, "clients", limits.clients as u64, 1..=1024)?;
        place.range(at, "sessions", limits.sessions as u64, 1..=256)?;
        place.range(at, "queue", limits.queue as u64, 0..=1024)?;
        let client_requests = limits.client_requests as u64;
        let most = CLIENT_REQUESTS_MAX as u64;
        place.range(at, "client_requests", client_requests, 1..=most)?;
        place.range(at, "request_bytes", limits.request_bytes.0, 1024..=64 << 20)?;
        place.range(at, "outbox_events", limits.outbox_events as u64, 4..=4096)?;
        place.range(
            at,
            "session_idle_s",
            limits.session_idle_s,
            1..=u64::from(u32::MAX),
        )?;
        place.range(at, "stalled_s", limits.stalled_s, 1..=86_400)?;
        place.range(at, "stop_s", limits.stop_s, 0..=3_600)?;
        if !(1.0..=100.0).contains(&limits.prefill_slowdown) {
            let what = format!("`prefill_slowdown` is {}", limits.prefill_slowdown);
            return Err(place.error(at, what, "give a number from 1 to 100"));
        }
        Ok(())
    }

    /// Bytes that all clients together can make the daemon hold.
    pub fn clients_bytes(&self) -> u64 {
        let contexts = self.models.iter().map(|model| model.as_ref().context);
        let contexts = contexts.map(|context| context.map_or(CONTEXT_DEFAULT, |c| c as usize));
        self.limits.clients_bytes(contexts.max().unwrap_or(0))
    }

    /// The models that are loaded when the daemon starts.
    pub fn at_start(&self) -> impl Iterator<Item = &Model> {
        let models = self.models.iter().map(Spanned::as_ref);
        models.filter(|model| model.load == Load::Start)
    }

    /// Index of the model that has this name; the first one's if none is asked for.
    pub fn model(&self, name: Option<&str>) -> Option<usize> {
        let Some(name) = name else { return Some(0) };
        self.models
            .iter()
            .position(|model| model.as_ref().name == name)
    }
}

/// The file that errors speak of.
struct Place<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Place<'_> {
    fn error(&self, at: usize, what: impl std::fmt::Display, remedy: impl Into<String>) -> Error {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line = before.bytes().filter(|&b| b == b'\n').count() + 1;
        Error::new(
            Kind::Usage,
            format!("{}: line {line}: {what}", self.path.display()),
            remedy,
        )
    }

    /// The key whose line holds this byte.
    fn key(&self, at: usize) -> Option<&str> {
        let start = self
            .text
            .get(..at)?
            .rfind('\n')
            .map_or(0, |newline| newline + 1);
        let (key, _) = self.text[start..].lines().next()?.split_once('=')?;
        Some(key.trim())
    }

    fn range(&self, at: usize, key: &str, value: u64, range: RangeInclusive<u64>) -> Result<()> {
        if range.contains(&value) {
            return Ok(());
        }
        let remedy = format!("give a number from {} to {}", range.start(), range.end());
        Err(self.error(at, format!("`{key}` is {value}"), remedy))
    }

    /// Nothing can be served twice in one place.
    fn once<'a>(
        &self,
        at: usize,
        path: &Path,
        mut earlier: impl Iterator<Item = &'a PathBuf>,
    ) -> Result<()> {
        if !earlier.any(|earlier| earlier == path) {
            return Ok(());
        }
        let what = format!("{} is there twice", path.display());
        Err(self.error(at, what, "keep one of them"))
    }

    fn socket_path(&self, at: usize, key: &str, path: &Path) -> Result<()> {
        // sun_path of sockaddr_un, less its final zero.
        let len = path.as_os_str().len();
        if path.is_absolute() && len <= 107 {
            return Ok(());
        }
        let what = format!("`{key}` {} is no path of a socket", path.display());
        Err(self.error(at, what, "give an absolute path of at most 107 bytes"))
    }
}

#[cfg(test)]
mod tests;
