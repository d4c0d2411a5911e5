//! A disk with bad sectors and one that is full, for child processes: see `restrict.rs`.
#![allow(unsafe_code)]

use std::io::Result;

use super::restrict::{CALL, IF_EQUAL, LOAD, RETURN, answer, filter, step};

const IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
/// Where the filter finds the low half of the fourth argument.
const FOURTH_ARGUMENT: u32 = 16 + 3 * 8;

/// The bad sectors of [`break_disk`]: offsets in any file.
pub const BROKEN: std::ops::Range<u32> = 4_400_000..4_650_000;

/// Has pread(2) fail with EIO in the range [`BROKEN`] of offsets, and io_uring forbidden so that pread is used.
pub fn break_disk() -> Result<()> {
    filter(&mut [
        step(LOAD, 0, 0, CALL),
        step(IF_EQUAL, 5, 0, libc::SYS_io_uring_setup as u32),
        step(IF_EQUAL, 0, 3, libc::SYS_pread64 as u32),
        step(LOAD, 0, 0, FOURTH_ARGUMENT),
        step(IF_AT_LEAST, 0, 1, BROKEN.start),
        step(IF_AT_LEAST, 0, 2, BROKEN.end),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EIO as u32),
    ])
}

/// Lets no file grow, as on a full disk: writing fails with EFBIG.
pub fn forbid_writing() -> Result<()> {
    let limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: plain values; the signal that would end the process is ignored.
    answer(unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        libc::setrlimit(libc::RLIMIT_FSIZE, &limit)
    })
}
