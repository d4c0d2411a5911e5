//! Lines from stdin, with something useful to do until they come.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long to wait for a line before doing more, in milliseconds.
const WAIT_MS: u8 = 1;

/// Stdin, line by line.
pub struct Lines {
    stdin: BufReader<File>,
}

impl Lines {
    /// Reads stdin from here on; nobody else may.
    pub fn new() -> io::Result<Lines> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        Ok(Lines {
            stdin: BufReader::new(stdin),
        })
    }

    /// The next line with its end, empty at the end of the input. Until it comes calls `meanwhile` about every
    /// millisecond, as long as that says that there is more to do.
    pub fn next(&mut self, mut meanwhile: impl FnMut() -> bool) -> io::Result<String> {
        while self.stdin.buffer().is_empty() && meanwhile() {
            let mut fds = [PollFd::new(self.stdin.get_ref().as_fd(), PollFlags::POLLIN)];
            // A signal ends the wait too: whether it means anything is for the caller to say, after reading.
            if poll(&mut fds, PollTimeout::from(WAIT_MS)) != Ok(0) {
                break;
            }
        }
        let mut line = String::new();
        self.stdin.read_line(&mut line)?;
        Ok(line)
    }
}
