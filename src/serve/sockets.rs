//! The sockets of the configuration: made here, or taken over from the service manager.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::config::{Config, Http, Listen};
use super::front::Front;
use super::http::{self, Listener, Token};
use super::unix;
use super::unix::listen::Listening;
use super::{serial, systemd};
use crate::error::{Error, Kind, Result};

/// Everything that clients come by.
pub struct Sockets {
    unix: Vec<(Listening, Vec<u32>)>,
    http: Option<(Listener, Token)>,
}

/// A socket that the service manager listens on.
enum Inherited {
    Unix(PathBuf, OwnedFd),
    Tcp(SocketAddr, OwnedFd),
}

impl Inherited {
    /// Finds out where it listens.
    fn new(fd: OwnedFd) -> Option<Inherited> {
        let unix = UnixListener::from(fd);
        if let Ok(address) = unix.local_addr() {
            let path = address.as_pathname()?.to_owned();
            return Some(Inherited::Unix(path, unix.into()));
        }
        let tcp = TcpListener::from(OwnedFd::from(unix));
        Some(Inherited::Tcp(tcp.local_addr().ok()?, tcp.into()))
    }
}

/// The manager's sockets that nobody has claimed yet.
struct Unclaimed(Vec<Inherited>);

impl Unclaimed {
    fn unix(&mut self, wanted: &Path) -> Option<OwnedFd> {
        let is =
            |inherited: &Inherited| matches!(inherited, Inherited::Unix(path, _) if path == wanted);
        match self.0.swap_remove(self.0.iter().position(is)?) {
            Inherited::Unix(_, fd) | Inherited::Tcp(_, fd) => Some(fd),
        }
    }

    fn tcp(&mut self, wanted: SocketAddr) -> Option<OwnedFd> {
        let is = |inherited: &Inherited| matches!(inherited, Inherited::Tcp(address, _) if *address == wanted);
        match self.0.swap_remove(self.0.iter().position(is)?) {
            Inherited::Unix(_, fd) | Inherited::Tcp(_, fd) => Some(fd),
        }
    }
}

impl Sockets {
    /// Takes over the manager's sockets, and makes those that it has not.
    ///
    /// # Errors
    /// One is in use, or the system refuses.
    pub fn open(config: &Config) -> Result<Sockets> {
        let mut unclaimed = Unclaimed(
            systemd::listening_sockets()
                .into_iter()
                .filter_map(Inherited::new)
                .collect(),
        );
        let mut unix = Vec::new();
        for socket in config.sockets.iter().map(|socket| socket.as_ref()) {
            let (path, group) = (&socket.path, socket.group.as_deref());
            let listening = match unclaimed.unix(path) {
                Some(fd) => Listening::inherited(fd, path, socket.mode.map(|mode| mode.0), group)?,
                None => Listening::bind(path, socket.mode.unwrap_or_default().0, group)?,
            };
            unix.push((listening, socket.allow_uids.clone()));
        }
        let http = config
            .http
            .as_ref()
            .map(|http| open_http(http.as_ref(), &mut unclaimed))
            .transpose()?;
        for inherited in unclaimed.0 {
            let place = match inherited {
                Inherited::Unix(path, _) => path.display().to_string(),
                Inherited::Tcp(address, _) => address.to_string(),
            };
            log::warn!(
                "{place}: the service manager listens there, but the configuration has no such socket"
            );
        }
        Ok(Sockets { unix, http })
    }

    /// Lets clients in; what those of HTTP must show, if there is HTTP. Another token may be put there.
    pub fn serve(self, front: &Rc<Front>) -> Option<(Listen, Token)> {
        for (listening, allow_uids) in self.unix {
            tokio::task::spawn_local(unix::serve(Rc::clone(front), listening, allow_uids));
        }
        let config = front.config();
        let served = self.http.zip(config.http.as_ref());
        let served = served.map(|((listener, token), http)| {
            tokio::task::spawn_local(http::serve(Rc::clone(front), listener, token.clone()));
            (http.as_ref().listen.clone(), token)
        });
        for serial in &config.serials {
            let serial = serial.as_ref().clone();
            tokio::task::spawn_local(serial::serve(Rc::clone(front), serial));
        }
        served
    }
}

fn open_http(http: &Http, unclaimed: &mut Unclaimed) -> Result<(Listener, Token)> {
    let listener = match &http.listen {
        Listen::Unix(path) => Listener::Unix(match unclaimed.unix(path) {
            Some(fd) => Listening::inherited(fd, path, None, None)?,
            None => Listening::bind(path, 0o660, None)?,
        }),
        Listen::Tcp(address) => {
            let listener = match unclaimed.tcp(*address) {
                Some(fd) => Ok(TcpListener::from(fd)),
                None => TcpListener::bind(address),
            };
            let listener = listener.and_then(|listener| {
                listener.set_nonblocking(true)?;
                tokio::net::TcpListener::from_std(listener)
            });
            Listener::Tcp(listener.map_err(|e| {
                let what = format!("cannot listen on {address}: {e}");
                Error::new(
                    Kind::Io,
                    what,
                    "stop what uses the port, or change `listen` under [http]",
                )
            })?)
        }
    };
    Ok((listener, token(http)?))
}

/// The token as it is, or out of its file.
///
/// # Errors
/// The file cannot be read, or holds no token.
pub fn token(http: &Http) -> Result<Token> {
    let Some(path) = &http.token_file else {
        return Ok(Token::new(http.token.clone()));
    };
    let text = fs::read_to_string(path).map_err(|e| Error::file(path, "read", &e))?;
    let token = text.trim();
    if token.is_empty() || !token.chars().all(|c| c.is_ascii_graphic()) {
        let what = format!("{} holds no token", path.display());
        return Err(Error::new(
            Kind::Usage,
            what,
            "write one line of printable ASCII without spaces",
        ));
    }
    Ok(Token::new(Some(token.to_owned())))
}
