//! A serial port: a terminal device in raw mode, without waiting.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg, OFlag, open};
use nix::sys::stat::{Mode, fstat};
use nix::sys::termios::{self, BaudRate, ControlFlags, InputFlags, SetArg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Kind, Result};
use crate::serve::config::FlowControl;

/// How often a port that is gone is looked for, at first and at last.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// Speeds that every terminal driver knows.
const SPEEDS: &[(u32, BaudRate)] = &[
    (1200, BaudRate::B1200),
    (2400, BaudRate::B2400),
    (4800, BaudRate::B4800),
    (9600, BaudRate::B9600),
    (19_200, BaudRate::B19200),
    (38_400, BaudRate::B38400),
    (57_600, BaudRate::B57600),
    (115_200, BaudRate::B115200),
    (230_400, BaudRate::B230400),
    (460_800, BaudRate::B460800),
    (500_000, BaudRate::B500000),
    (921_600, BaudRate::B921600),
    (1_000_000, BaudRate::B1000000),
    (1_500_000, BaudRate::B1500000),
    (2_000_000, BaudRate::B2000000),
    (3_000_000, BaudRate::B3000000),
    (4_000_000, BaudRate::B4000000),
];

/// The terminal driver's name of a speed.
pub fn speed(baud: u32) -> Option<BaudRate> {
    SPEEDS
        .iter()
        .find(|(bits, _)| *bits == baud)
        .map(|(_, speed)| *speed)
}

/// The speeds there are, for an error.
pub fn speeds() -> String {
    let all: Vec<String> = SPEEDS.iter().map(|(bits, _)| bits.to_string()).collect();
    all.join(", ")
}

/// The major numbers of pseudo-terminals.
const PSEUDO: std::ops::RangeInclusive<u32> = 136..=143;

/// An open port. Nobody else who asks for the lock can have it at the same time, nor can anybody but root open the
/// device.
#[derive(Debug)]
pub struct Port(AsyncFd<Locked>);

#[derive(Debug)]
struct Locked(Flock<OwnedFd>);

impl Drop for Locked {
    fn drop(&mut self) {
        // A program that had the device open before may keep it, and others may come again.
        set_exclusive(&self.0, false);
    }
}

/// Has the system refuse others who would open the device, or lets them in again.
///
/// A refusal is no harm: it keeps away who does not ask for the lock, a program that looks for modems say.
fn set_exclusive(fd: &OwnedFd, exclusive: bool) {
    let request = match exclusive {
        true => libc::TIOCEXCL,
        false => libc::TIOCNXCL,
    };
    // SAFETY: the descriptor is open, and these requests have no argument.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request) } != 0 {
        let e = io::Error::last_os_error();
        log::debug!("cannot make a port exclusive or shared: {e}");
    }
}

/// Whether it is a pseudo-terminal. Nobody finds those by looking for ports; and one whose other end lives on would
/// stay exclusive after a kill.
fn is_pseudo(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| PSEUDO.contains(&libc::major(stat.st_rdev)))
}

impl AsRawFd for Locked {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Locked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn in_use(device: &Path) -> Error {
    Error::new(
        Kind::Io,
        format!("{} is in use", device.display()),
        "end the other program that uses the port (`fuser -v` tells which one)",
    )
}

impl Port {
    /// Opens a terminal device and makes it a plain line of bytes.
    ///
    /// # Errors
    /// It is not there, is no terminal, is in use, or does not know the speed.
    pub fn open(device: &Path, baud: u32, flow: FlowControl) -> Result<Port> {
        let failed = |errno: nix::Error| Error::file(device, "use", &errno.into());
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened = open(device, flags, Mode::empty());
        let fd = opened.map_err(|errno| match errno {
            nix::Error::EBUSY => in_use(device),
            // The file's own mode says EACCES.
            nix::Error::EPERM => Error::new(
                Kind::Io,
                format!("this process may not use {}", device.display()),
                "add its driver (/proc/devices) to DeviceAllow= in a drop-in of the unit, and restart it",
            ),
            errno => failed(errno),
        })?;
        let mut mode = termios::tcgetattr(&fd).map_err(failed)?;
        termios::cfmakeraw(&mut mode);
        // No modem decides whether the line is there.
        mode.control_flags |= ControlFlags::CLOCAL | ControlFlags::CREAD;
        mode.control_flags
            .set(ControlFlags::CRTSCTS, flow == FlowControl::Hardware);
        let software = InputFlags::IXON | InputFlags::IXOFF;
        mode.input_flags
            .set(software, flow == FlowControl::Software);
        let speed = speed(baud).ok_or_else(|| {
            let remedy = format!("use one of {}", speeds());
            Error::new(
                Kind::Usage,
                format!("{baud} baud is no usual speed"),
                remedy,
            )
        })?;
        termios::cfsetspeed(&mut mode, speed).map_err(failed)?;
        termios::tcsetattr(&fd, SetArg::TCSANOW, &mode).map_err(failed)?;
        let locked =
            Flock::lock(fd, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                nix::Error::EWOULDBLOCK => in_use(device),
                errno => failed(errno),
            })?;
        if !is_pseudo(&locked) {
            set_exclusive(&locked, true);
        }
        // SAFETY: the lock owns the descriptor, which stays the same and open until both are dropped together.
        let fd = unsafe { AsyncFd::register(Locked(locked)) };
        let fd = fd.map_err(|e| Error::file(device, "watch", &e.into()))?;
        Ok(Port(fd))
    }

    /// Opens the port as soon as that works. Why it does not is logged once.
    pub async fn wait_for(device: &Path, baud: u32, flow: FlowControl) -> Port {
        let [mut pause, longest] = BACKOFF;
        let mut told = false;
        loop {
            match Port::open(device, baud, flow) {
                Ok(port) => return port,
                Err(error) if !told => log::warn!("{error}; trying again until it works"),
                Err(_) => {}
            }
            told = true;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    /// Reads what has arrived, at least a byte.
    ///
    /// # Errors
    /// The device is gone.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = |fd: &Locked| Ok(nix::unistd::read(fd, buffer)?);
        match { self.0.async_io(Interest::READABLE, read) }.await {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            other => other,
        }
    }

    /// Writes as much as the driver takes, at least a byte.
    ///
    /// # Errors
    /// The device is gone.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let write = |fd: &Locked| Ok(nix::unistd::write(fd, bytes)?);
        self.0.async_io(Interest::WRITABLE, write).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::openpty;
    use nix::unistd::ttyname;

    fn is_exclusive(fd: &OwnedFd) -> bool {
        let mut exclusive: libc::c_int = -1;
        // SAFETY: the request writes an int.
        let asked = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGEXCL, &mut exclusive) };
        assert_eq!(asked, 0);
        exclusive != 0
    }

    #[test]
    fn a_port_is_for_one_program_until_it_is_closed() {
        let slave = || openpty(None, None).expect("a pseudo-terminal");
        let pair = slave();
        set_exclusive(&pair.slave, true);
        assert!(is_exclusive(&pair.slave));
        let again = pair.slave.try_clone().expect("a descriptor");
        let locked = Flock::lock(again, FlockArg::LockExclusiveNonblock);
        drop(Locked(locked.map_err(|(_, e)| e).expect("nobody has it")));
        assert!(!is_exclusive(&pair.slave));

        // A pseudo-terminal, which is no port of a machine, could not be opened again after a kill.
        let pair = slave();
        let path = ttyname(&pair.slave).expect("its name");
        let runtime = crate::serve::runtime(1).expect("a runtime");
        let opened = async { Port::open(&path, 115_200, FlowControl::None) };
        let port = runtime.block_on(opened).expect("a terminal");
        assert!(is_pseudo(&pair.slave) && !is_exclusive(&pair.slave));
        let second = async { Port::open(&path, 115_200, FlowControl::None) };
        let refused = runtime.block_on(second).expect_err("it is in use");
        assert!(refused.what().ends_with("is in use"), "{refused}");
        drop(port);
    }
}
