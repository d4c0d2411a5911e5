//! The other end of a connection: what `airstream ask` and `airstream status` speak to the daemon with.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::config::FlowControl;
use super::lines::{Line, Lines};
use super::message::{Reply, Request};
use super::serial::framed::Framed;
use super::serial::link::{Event, MESSAGE_MAX};
use super::serial::port::Port;
use crate::error::{Error, Kind, Result};

/// A reply may hold a status of many models and sessions.
const REPLY_BYTES_MAX: usize = 1 << 20;

/// How long a line may take for the last acknowledgement.
const GOODBYE: Duration = Duration::from_millis(500);

/// A connection to a daemon.
pub enum Connection {
    /// On a UNIX socket.
    Unix {
        /// Replies, one a line.
        lines: Lines<BufReader<OwnedReadHalf>>,
        /// Where requests go.
        write: OwnedWriteHalf,
    },
    /// On a serial line.
    Serial(Box<SerialLine>),
}

/// A serial line and the reply that came last.
pub struct SerialLine {
    framed: Framed,
    reply: heapless::Vec<u8, MESSAGE_MAX>,
}

impl Connection {
    /// Connects to a UNIX socket.
    ///
    /// # Errors
    /// Nobody listens there, or this user may not.
    pub async fn unix(path: &Path) -> Result<Connection> {
        let stream = UnixStream::connect(path).await.map_err(|e| {
            let remedy = match e.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "join the socket's group, or run as a user that may use it"
                }
                _ => {
                    "start the daemon (systemctl start airstream), or name its socket with --socket"
                }
            };
            Error::new(
                Kind::Io,
                format!("cannot connect to {}: {e}", path.display()),
                remedy,
            )
        })?;
        let (read, write) = stream.into_split();
        let lines = Lines::new(BufReader::new(read), REPLY_BYTES_MAX);
        Ok(Connection::Unix { lines, write })
    }

    /// Opens a serial port and calls the daemon at its other end.
    ///
    /// # Errors
    /// The port cannot be used, or nobody answers.
    pub async fn serial(device: &Path, baud: u32, flow: FlowControl) -> Result<Connection> {
        let port = Port::open(device, baud, flow)?;
        let framed = Framed::new(port, baud, true);
        let mut line = Box::new(SerialLine {
            framed,
            reply: heapless::Vec::new(),
        });
        let patience = Duration::from_secs(10);
        let connected = async {
            while line.next().await? != News::Connected {}
            Ok(())
        };
        match tokio::time::timeout(patience, connected).await {
            Ok(connected) => connected.map(|()| Connection::Serial(line)),
            Err(_) => Err(Error::new(
                Kind::Io,
                format!("nobody answers on {}", device.display()),
                "check the wires, the speed at both ends, and that the daemon serves frames on its port",
            )),
        }
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The connection is lost, or the request too long for it.
    pub async fn send(&mut self, request: &Request) -> Result<()> {
        match self {
            Connection::Unix { write, .. } => {
                let mut line = serde_json::to_vec(request).expect("a request is plain data");
                line.push(b'\n');
                write
                    .write_all(&line)
                    .await
                    .map_err(|e| lost(&e.to_string()))
            }
            Connection::Serial(line) => {
                let mut bytes = [0; MESSAGE_MAX];
                let bytes = postcard::to_slice(request, &mut bytes).map_err(|_| {
                    let what =
                        format!("a request on a serial line has at most {MESSAGE_MAX} bytes");
                    Error::new(Kind::Usage, what, "give a shorter prompt")
                })?;
                while line.framed.link().send(bytes).is_err() {
                    line.framed.turn().await.map_err(|e| lost(&e.to_string()))?;
                }
                Ok(())
            }
        }
    }

    /// The next reply. May be dropped and called again without losing any.
    ///
    /// # Errors
    /// The connection is lost, or what came is no reply.
    pub async fn next(&mut self) -> Result<Reply<'_>> {
        match self {
            Connection::Unix { lines, .. } => match lines.next().await {
                Ok(Some(Line::Whole(bytes))) => {
                    serde_json::from_slice(bytes).map_err(|e| no_reply(&e.to_string()))
                }
                Ok(Some(Line::TooLong)) => Err(no_reply("it is too long")),
                Ok(None) => Err(lost("the daemon closed it")),
                Err(e) => Err(lost(&e.to_string())),
            },
            Connection::Serial(line) => {
                if line.next().await? == News::Connected {
                    return Err(lost("the daemon has started again"));
                }
                postcard::from_bytes(&line.reply).map_err(|e| no_reply(&e.to_string()))
            }
        }
    }
}

impl Connection {
    /// Says goodbye: the daemon need not repeat its last words.
    pub async fn finish(mut self) {
        if let Connection::Serial(line) = &mut self {
            // There is nobody to tell that the last acknowledgement was lost.
            let _ = tokio::time::timeout(GOODBYE, line.framed.flush()).await;
        }
    }
}

/// What happened on a serial line.
#[derive(PartialEq, Eq)]
enum News {
    Connected,
    Replied,
}

impl SerialLine {
    async fn next(&mut self) -> Result<News> {
        loop {
            match self.framed.event() {
                Some(Event::Connected) => return Ok(News::Connected),
                Some(Event::Message(bytes)) => {
                    self.reply = heapless::Vec::from_slice(bytes).expect("a message fits");
                    return Ok(News::Replied);
                }
                Some(Event::TooLong) => return Err(no_reply("it is too long")),
                Some(Event::Lost) => return Err(lost("the daemon is silent")),
                None => self.framed.turn().await.map_err(|e| lost(&e.to_string()))?,
            }
        }
    }
}

fn lost(why: &str) -> Error {
    Error::new(
        Kind::Io,
        format!("the connection to the daemon is lost: {why}"),
        "see the daemon's log, and ask again",
    )
}

fn no_reply(why: &str) -> Error {
    Error::new(
        Kind::Format,
        format!("the daemon's reply makes no sense: {why}"),
        "use the same version of airstream at both ends",
    )
}
