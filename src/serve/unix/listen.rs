//! Where a UNIX socket is, who may use it, and what becomes of one that a killed daemon left behind.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Group, chown};

use crate::error::{Error, Kind, Result};

/// A listening socket.
#[derive(Debug)]
pub struct Listening {
    /// The socket, which does not block.
    pub socket: UnixListener,
    /// The file it is, where this process made it.
    made: Option<Made>,
}

/// What is removed at the end, and the lock that keeps a second daemon away until then.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(made) = &self.made {
            // The lock's file stays: removing it would let two daemons lock two files of one name.
            let _ = fs::remove_file(&made.path);
        }
    }
}

impl Listening {
    /// Makes a socket at `path`, for those that `mode` and `group` let in. One that nobody listens on is replaced.
    ///
    /// # Errors
    /// A daemon listens there already, the file there is something else, or the system refuses.
    pub fn bind(path: &Path, mode: u32, group: Option<&str>) -> Result<Listening> {
        let lock = lock(path)?;
        remove_stale(path)?;
        // Nobody may connect before mode and group are right.
        let before = umask(Mode::from_bits_truncate(0o777));
        let bound = UnixListener::bind(path);
        umask(before);
        let socket = bound.map_err(|e| Error::file(path, "listen on", &e))?;
        let listening = Listening {
            socket,
            made: Some(Made {
                path: path.to_owned(),
                _lock: lock,
            }),
        };
        let_in(path, Some(mode), group)?;
        listening.without_waiting()
    }

    /// A socket that the service manager listens on at `path`. Who may use it is as it has said, unless the
    /// configuration says otherwise and this process may change it.
    ///
    /// # Errors
    /// The system refuses.
    pub fn inherited(
        fd: OwnedFd,
        path: &Path,
        mode: Option<u32>,
        group: Option<&str>,
    ) -> Result<Listening> {
        if let Err(error) = let_in(path, mode, group) {
            log::warn!(
                "{}: set SocketMode= and SocketGroup= in a drop-in of its .socket unit",
                error.what()
            );
        }
        Listening {
            socket: UnixListener::from(fd),
            made: None,
        }
        .without_waiting()
    }

    /// What accepts connections.
    ///
    /// # Errors
    /// The system refuses.
    pub fn listener(&self) -> std::io::Result<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.socket.try_clone()?)
    }

    fn without_waiting(self) -> Result<Listening> {
        match self.socket.set_nonblocking(true) {
            Ok(()) => Ok(self),
            Err(e) => Err(Error::new(
                Kind::Io,
                format!("cannot wait on a socket: {e}"),
                "report this",
            )),
        }
    }
}

/// Whether a socket could be made at `path` for this group, without making it.
///
/// # Errors
/// Its folder is not there, something else is at its place, or there is no such group.
pub fn check(path: &Path, group: Option<&str>) -> Result<()> {
    if let Some(name) = group {
        find_group(path, name)?;
    }
    let folder = path.parent().unwrap_or(path);
    // The service manager makes a folder in /run when it starts the daemon.
    if !folder.is_dir() && folder.parent() != Some(Path::new("/run")) {
        return Err(no_folder(path));
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(no_socket(path)),
        _ => Ok(()),
    }
}

/// Lets those in that `mode` and `group` name, as far as they are given.
fn let_in(path: &Path, mode: Option<u32>, group: Option<&str>) -> Result<()> {
    if let Some(name) = group {
        let group = find_group(path, name)?;
        let refused = |errno: nix::Error| {
            Error::file(path, &format!("give to the group {name}"), &errno.into())
        };
        chown(path, None, Some(group.gid)).map_err(refused)?;
    }
    let Some(mode) = mode else { return Ok(()) };
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(path, permissions).map_err(|e| Error::file(path, "set the mode of", &e))
}

fn find_group(path: &Path, name: &str) -> Result<Group> {
    Group::from_name(name).ok().flatten().ok_or_else(|| {
        let what = format!("there is no group {name:?} for {}", path.display());
        let remedy = "create it, or change `group` of the socket";
        Error::new(Kind::Usage, what, remedy)
    })
}

fn no_folder(path: &Path) -> Error {
    Error::new(
        Kind::Io,
        format!("the folder of {} is not there", path.display()),
        "create it (the unit's RuntimeDirectory= does), or change `path` of the socket",
    )
}

fn no_socket(path: &Path) -> Error {
    Error::new(
        Kind::Usage,
        format!("{} is there and no socket", path.display()),
        "move it away, or change `path` of the socket",
    )
}

fn in_use(path: &Path) -> Error {
    Error::new(
        Kind::Io,
        format!("another daemon serves {}", path.display()),
        "stop it, or give this one another socket",
    )
}

/// Holds the file beside the socket that a daemon locks for as long as it runs.
fn lock(path: &Path) -> Result<Flock<File>> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = Path::new(&name);
    let opened = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(name);
    let file = opened.map_err(|e| match e.kind() {
        ErrorKind::NotFound => no_folder(path),
        _ => Error::file(name, "create", &e),
    })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::Error::EWOULDBLOCK => in_use(path),
        errno => Error::file(name, "lock", &errno.into()),
    })
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path) -> Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !found.file_type().is_socket() {
        return Err(no_socket(path));
    }
    // A listener without our lock: the service manager, or a daemon that does not see our lock file.
    if UnixStream::connect(path).is_ok() {
        return Err(in_use(path));
    }
    log::info!("replacing {}, which a daemon left behind", path.display());
    fs::remove_file(path).map_err(|e| Error::file(path, "replace", &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_for_one_daemon_and_a_stale_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let first = Listening::bind(&path, 0o640, None).expect("free");
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o640);
        UnixStream::connect(&path).expect("it listens");
        let second = Listening::bind(&path, 0o600, None)
            .expect_err("in use")
            .to_string();
        assert!(second.contains("another daemon serves"), "{second}");
        drop(first);
        assert!(!path.exists());

        // What kill -9 leaves: a socket without a listener or lock.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let third = Listening::bind(&path, 0o600, None).expect("stale");
        UnixStream::connect(&path).expect("it listens");
        drop(third);

        // Somebody else's listener that knows nothing of our lock.
        let _other = UnixListener::bind(&path).unwrap();
        assert!(Listening::bind(&path, 0o600, None).is_err());
    }

    #[test]
    fn a_socket_of_the_manager_keeps_its_mode_unless_another_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let managers = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o606)).unwrap();
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        let inherit = |mode, group| {
            let fd = OwnedFd::from(managers.try_clone().unwrap());
            Listening::inherited(fd, &path, mode, group).expect("taken over")
        };
        drop(inherit(None, None));
        assert_eq!(mode(), 0o606);
        // What cannot be done is no reason not to start.
        drop(inherit(Some(0o640), Some("no such group")));
        assert_eq!(mode(), 0o606);
        drop(inherit(Some(0o640), None));
        assert_eq!(mode(), 0o640);
        assert!(path.exists());
    }

    #[test]
    fn nothing_but_a_socket_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = Listening::bind(&path, 0o600, None)
            .expect_err("a file")
            .to_string();
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
        let nowhere = folder.path().join("none/a.sock");
        let error = Listening::bind(&nowhere, 0o600, None)
            .expect_err("no folder")
            .to_string();
        assert!(error.contains("RuntimeDirectory"), "{error}");
        let grouped = folder.path().join("g.sock");
        let error = Listening::bind(&grouped, 0o660, Some("no such group"))
            .expect_err("no group")
            .to_string();
        assert!(error.contains("there is no group"), "{error}");
        assert!(!grouped.exists());
    }
}
