//! A read that may arrive in pieces: whether it is done, goes on or has failed. Pure.

use nix::errno::Errno;

use crate::arena::PAGE_BYTES;

/// Why a read has failed, where it is not the kernel that says so.
pub(super) const FILE_ENDS: &str = "the file ends before it";

/// Reads that may bring nothing, one after the other, before it is given up.
const TRIES_MAX: u8 = 200;
/// After so many of them there is a pause before each: the kernel is short of something.
const TRIES_AT_ONCE: u8 = 40;

/// How far a read has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Partial {
    /// Whole blocks of its aligned range that have arrived: a short read goes on from there, as direct reads must.
    blocks: u16,
    /// Reads since then that brought nothing.
    tries: u8,
}

/// Every tile has a [`Partial`], so it is small.
const BLOCK_BYTES: u32 = PAGE_BYTES as u32;

/// What comes after a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// All that is needed is there.
    Done,
    /// What is missing is to be read.
    GoOn,
    /// The same, after a pause.
    GoOnLater,
    /// It is given up, and why.
    Failed(&'static str),
}

impl Partial {
    /// Nothing has arrived.
    pub(super) const NONE: Partial = Partial {
        blocks: 0,
        tries: 0,
    };

    /// Bytes of its aligned range that need not be read again.
    pub(super) fn arrived(&self) -> u32 {
        u32::from(self.blocks) * BLOCK_BYTES
    }

    /// Takes in what the kernel said of the read of what was missing of `needed` bytes.
    pub(super) fn take(&mut self, result: Result<u32, Errno>, needed: usize) -> Next {
        let bytes = match result {
            Ok(0) => return Next::Failed(FILE_ENDS),
            Ok(bytes) => bytes,
            Err(errno @ (Errno::EINTR | Errno::EAGAIN)) => return self.try_again(errno.desc()),
            Err(errno) => return Next::Failed(errno.desc()),
        };
        let arrived = self.arrived() + bytes;
        if arrived as usize >= needed {
            return Next::Done;
        }
        let blocks = u16::try_from(arrived / BLOCK_BYTES).unwrap_or(u16::MAX);
        if blocks == self.blocks {
            return self.try_again(FILE_ENDS);
        }
        (self.blocks, self.tries) = (blocks, 0);
        Next::GoOn
    }

    /// The read brought nothing.
    fn try_again(&mut self, why: &'static str) -> Next {
        self.tries += 1;
        match self.tries {
            TRIES_MAX.. => Next::Failed(why),
            TRIES_AT_ONCE.. => Next::GoOnLater,
            _ => Next::GoOn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_read_goes_on_from_a_whole_block() {
        let mut read = Partial::NONE;
        assert_eq!(read.take(Ok(5000), 9000), Next::GoOn);
        assert_eq!(read.arrived(), 4096);
        assert_eq!(read.take(Err(Errno::EINTR), 9000), Next::GoOn);
        assert_eq!(read.take(Ok(512), 9000), Next::GoOn);
        assert_eq!(read.arrived(), 4096);
        assert_eq!(read.take(Ok(4904), 9000), Next::Done);
    }

    #[test]
    fn patience_ends_and_begins_anew_with_each_block() {
        let mut read = Partial::NONE;
        for _ in 0..3 {
            let waits: Vec<Next> = (1..TRIES_MAX)
                .map(|_| read.take(Err(Errno::EAGAIN), 1 << 20))
                .collect();
            assert!(waits[..39].iter().all(|&next| next == Next::GoOn));
            assert!(waits[39..].iter().all(|&next| next == Next::GoOnLater));
            assert_eq!(read.take(Ok(4096), 1 << 20), Next::GoOn);
        }
        (1..TRIES_MAX).for_each(|_| _ = read.take(Ok(512), 1 << 20));
        assert_eq!(read.take(Ok(512), 1 << 20), Next::Failed(FILE_ENDS));
        assert_eq!(read.take(Ok(0), 1 << 20), Next::Failed(FILE_ENDS));
        let failed = Next::Failed(Errno::EIO.desc());
        assert_eq!(read.take(Err(Errno::EIO), 1 << 20), failed);
    }
}
