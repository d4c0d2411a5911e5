//! What a system may refuse or disturb, for child processes (`CommandExt::pre_exec`): system calls only, as a
//! forked child may make.
#![allow(unsafe_code)]

use std::io::{Error, Result};
use std::sync::atomic::{AtomicU32, Ordering};

/// What the system said.
pub fn answer(rc: libc::c_int) -> Result<()> {
    if rc == 0 {
        Ok(())
    } else {
        Err(Error::last_os_error())
    }
}

/// One step of a filter of system calls.
pub const fn step(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

pub const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
pub const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
pub const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
/// Where the filter finds the number of the system call.
pub const CALL: u32 = 0;

/// Installs a filter of system calls, for good.
pub fn filter(steps: &mut [libc::sock_filter]) -> Result<()> {
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: the program and its steps outlive the calls.
    answer(unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program)
    })
}

/// Has io_uring_setup(2) fail with EPERM, as container runtimes do.
pub fn forbid_io_uring() -> Result<()> {
    filter(&mut [
        step(LOAD, 0, 0, CALL),
        step(IF_EQUAL, 0, 1, libc::SYS_io_uring_setup as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ])
}

/// Leaves 64 KiB of memory that may be locked, as many systems have it.
pub fn forbid_locking() -> Result<()> {
    lock_at_most(64 << 10)
}

/// From here on (and after exec) no more than so many bytes of memory may be locked.
pub fn lock_at_most(bytes: u64) -> Result<()> {
    const CAP_IPC_LOCK: libc::c_ulong = 14;
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: plain values. Dropping the capability fails for users who lack it anyway.
    answer(unsafe {
        libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0);
        libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit)
    })
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

/// Signals that interrupted this process so far.
pub fn signals() -> u32 {
    SIGNALS.load(Ordering::Relaxed)
}

/// From here on a signal interrupts this process 5000 times a second. To be called by the child itself.
pub fn start_signal_storm() {
    extern "C" fn count(_: libc::c_int) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: `sigaction` and `itimerval` are plain data, for which zero is a value, and the
    // handler may interrupt anything. Without SA_RESTART, system calls fail with EINTR.
    let rc = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        let mut timer: libc::itimerval = std::mem::zeroed();
        timer.it_value.tv_usec = 200;
        timer.it_interval.tv_usec = 200;
        libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut())
            | libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut())
    };
    assert_eq!(rc, 0, "the storm starts");
}
