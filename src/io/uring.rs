//! Reads through io_uring: one system call hands over a whole batch, and
//! finished reads are picked from a ring in shared memory.
//!
//! Kernels from 5.6 on have what is needed; what newer ones add is tried and
//! left out where refused. With `COOP_TASKRUN` (5.19) the kernel does not
//! interrupt the computing thread for every finished read; it raises a flag in
//! the ring, and one system call then brings in all that are finished. Measured
//! with a thread that computes and looks in between, that takes a third less
//! processor time than no flag, and less than `DEFER_TASKRUN`, which would also
//! tie the ring to the thread that made it. Registered buffers halve the time
//! again. A ring works best from one thread: it is the thread that flushed
//! whose system calls bring its reads in.
#![allow(unsafe_code)]

use std::io::Error as OsError;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use nix::errno::Errno;

use crate::error::{Error, Kind, Result};

use super::{Access, Completion, Files, Full, Io, Read, Region};

/// The bit of `io_uring_enter(2)` that asks for completions.
const ENTER_GETEVENTS: u32 = 1;

/// How long to wait before asking again a kernel that is short of memory.
const BUSY_PAUSE: Duration = Duration::from_millis(1);
/// One that is short of it for longer is not going to recover by waiting.
const BUSY_PAUSES_MAX: u32 = 5000;

/// Reads in flight in an io_uring.
pub struct Uring {
    ring: IoUring,
    files: Arc<Files>,
    files_registered: bool,
    /// Registered buffers, by address; the index is the kernel's.
    buffers: Vec<libc::iovec>,
    /// What each number in `user_data` stands for while its read is in flight.
    reads: Box<[Option<Read>]>,
    /// Numbers that no read has.
    free: Vec<u32>,
    description: String,
}

// SAFETY: the `iovec`s hold addresses that are compared and never followed, and
// the ring is used through `&mut self` alone.
unsafe impl Send for Uring {}

impl Uring {
    /// Makes a ring for `depth` reads in flight; an error if this system has none that would do.
    pub fn new(files: &Arc<Files>, regions: &[Region], depth: usize) -> Result<Self> {
        let entries = u32::try_from(depth.clamp(1, 4096)).expect("clamped to 4096");
        let ring = make_ring(entries).map_err(|e| unavailable("set up", &e))?;
        let mut probe = Probe::new();
        ring.submitter()
            .register_probe(&mut probe)
            .map_err(|e| unavailable("probe", &e))?;
        let have = |code| probe.is_supported(code);
        if !(have(opcode::Read::CODE) && have(opcode::ReadFixed::CODE)) {
            return Err(unavailable("read with", &Errno::EOPNOTSUPP.into()));
        }
        let fds: Vec<_> = files
            .iter()
            .map(|(_, file)| file.as_fd().as_raw_fd())
            .collect();
        let files_registered = match ring.submitter().register_files(&fds) {
            Ok(()) => true,
            Err(_) if fds.is_empty() => false,
            Err(e) => {
                log::warn!(
                    "io_uring: cannot register the files ({e}); each read looks its file up"
                );
                false
            }
        };
        let buffers = register_buffers(&ring, regions);
        let description = description(files, &buffers);
        Ok(Uring {
            ring,
            files: files.clone(),
            files_registered,
            buffers,
            reads: (0..entries).map(|_| None).collect(),
            free: (0..entries).rev().collect(),
            description,
        })
    }

    /// The request for the kernel.
    fn entry(&self, read: &Read) -> squeue::Entry {
        let (into, len, offset) = (read.into.as_ptr(), read.len, read.offset);
        let fixed = types::Fixed(u32::from(read.file.0));
        let plain = types::Fd(self.files.get(read.file).as_fd().as_raw_fd());
        match (
            registered_buffer(&self.buffers, read),
            self.files_registered,
        ) {
            (Some(i), true) => opcode::ReadFixed::new(fixed, into, len, i)
                .offset(offset)
                .build(),
            (Some(i), false) => opcode::ReadFixed::new(plain, into, len, i)
                .offset(offset)
                .build(),
            (None, true) => opcode::Read::new(fixed, into, len).offset(offset).build(),
            (None, false) => opcode::Read::new(plain, into, len).offset(offset).build(),
        }
    }

    /// Has the kernel let go of all buffers.
    fn unregister(&mut self) {
        if self.buffers.is_empty() {
            return;
        }
        if let Err(e) = self.ring.submitter().unregister_buffers() {
            log::warn!(
                "io_uring: cannot unregister {} buffers ({e})",
                self.buffers.len()
            );
        }
        self.buffers.clear();
    }

    /// Moves what the kernel has finished into `done`; no system call.
    fn take_finished(&mut self, done: &mut [Completion]) -> usize {
        let mut count = 0;
        let mut finished = self.ring.completion();
        while count < done.len() {
            let Some(entry) = finished.next() else { break };
            let number = entry.user_data() as u32;
            let read = self.reads[number as usize]
                .take()
                .expect("the kernel completes each read once");
            self.free.push(number);
            let file = self.files.get(read.file);
            if file.access() == Access::Buffered {
                file.drop_behind(read.offset, read.len as usize);
            }
            let result = entry.result();
            let result = if result < 0 {
                Err(Errno::from_raw(-result))
            } else {
                Ok(result as u32)
            };
            done[count] = Completion {
                token: read.token,
                result,
            };
            count += 1;
        }
        count
    }

    /// Hands queued reads over and waits until `want` are finished.
    fn enter(&self, want: usize) -> Result<()> {
        let mut pauses = 0;
        loop {
            let Err(e) = self.ring.submit_and_wait(want) else {
                return Ok(());
            };
            match e.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN | libc::EBUSY) if want == 0 => return Ok(()),
                Some(libc::EAGAIN | libc::EBUSY) if pauses < BUSY_PAUSES_MAX => {
                    pauses += 1;
                    std::thread::sleep(BUSY_PAUSE);
                }
                _ => return Err(enter_failed(&e)),
            }
        }
    }
}

impl Io for Uring {
    unsafe fn submit(&mut self, read: Read) -> std::result::Result<(), Full> {
        let number = self.free.pop().ok_or(Full)?;
        let entry = self.entry(&read).user_data(u64::from(number));
        self.reads[number as usize] = Some(read);
        // SAFETY: the caller promises that the memory stays valid until the read is reaped or
        // `self` is dropped, which waits for it; the files live as long as `self`.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the ring has an entry for each free number");
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(0)
    }

    fn reap(&mut self, done: &mut [Completion], wait: bool) -> Result<usize> {
        let count = self.take_finished(done);
        if count > 0 || done.is_empty() || self.in_flight() == 0 {
            return Ok(count);
        }
        if wait {
            loop {
                self.enter(1)?;
                let count = self.take_finished(done);
                if count > 0 {
                    return Ok(count);
                }
            }
        }
        if self.ring.submission().taskrun() {
            // Reads are finished and wait for this thread to look in at the kernel.
            self.enter(0)?;
        }
        Ok(self.take_finished(done))
    }

    fn depth(&self) -> usize {
        self.reads.len()
    }

    fn in_flight(&self) -> usize {
        self.reads.len() - self.free.len()
    }

    fn register(&mut self, regions: &[Region]) {
        assert_eq!(self.in_flight(), 0, "reads are in flight");
        self.unregister();
        self.buffers = register_buffers(&self.ring, regions);
        self.description = description(&self.files, &self.buffers);
    }

    fn describe(&self) -> &str {
        &self.description
    }
}

impl Drop for Uring {
    /// Waits for what the kernel was handed: it writes to memory that the owner frees next. Buffers go here and now, and
    /// not when the kernel gets round to what is left of the ring.
    fn drop(&mut self) {
        let mut done = [Completion::NONE; 16];
        let unsent = self.ring.submission().len();
        loop {
            while self.take_finished(&mut done) > 0 {}
            if self.in_flight() <= unsent {
                break;
            }
            // SAFETY: no argument is passed. Nothing is submitted, so unsent reads never start.
            let waited = unsafe {
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(0, 1, ENTER_GETEVENTS, None)
            };
            match waited.map_err(|e| e.raw_os_error()) {
                Ok(_) | Err(Some(libc::EINTR)) => {}
                Err(Some(libc::EAGAIN | libc::EBUSY)) => std::thread::sleep(BUSY_PAUSE),
                Err(e) => {
                    log::error!(
                        "io_uring: cannot wait for reads in flight (error {e:?}); stopping, since they would overwrite freed memory"
                    );
                    std::process::abort();
                }
            }
        }
        self.unregister();
    }
}

/// Makes the ring with as many of the newer features as the kernel has.
fn make_ring(entries: u32) -> std::io::Result<IoUring> {
    let cooperative = IoUring::builder()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .dontfork()
        .build(entries);
    match cooperative {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().dontfork().build(entries)
        }
        result => result,
    }
}

/// What is at work.
fn description(files: &Files, buffers: &[libc::iovec]) -> String {
    let access = match files.all_direct() {
        true => "direct",
        false => "buffered",
    };
    let registered = match buffers.is_empty() {
        true => "unregistered",
        false => "registered",
    };
    format!("io_uring, {access}, {registered} buffers")
}

/// Registers the regions, in order of address; none if the kernel refuses.
fn register_buffers(ring: &IoUring, regions: &[Region]) -> Vec<libc::iovec> {
    let buffer = |region: &Region| libc::iovec {
        iov_base: region.start.as_ptr().cast(),
        iov_len: region.len,
    };
    let mut buffers: Vec<libc::iovec> = regions.iter().map(buffer).collect();
    if buffers.is_empty() {
        return buffers;
    }
    buffers.sort_by_key(|buffer| buffer.iov_base);
    // SAFETY: registration pins the pages as they are and writes nothing. Reads go there only
    // through `submit`, whose caller vouches for the memory.
    let registered = unsafe { ring.submitter().register_buffers(&buffers) };
    if let Err(e) = registered {
        let mib = regions.iter().map(|region| region.len).sum::<usize>() >> 20;
        log::warn!(
            "io_uring: cannot register {mib} MiB of memory ({e}); reading without, which costs some processor time{}",
            memlock_remedy(&e),
        );
        buffers.clear();
    }
    buffers
}

/// What lifts the limit that registration ran into.
fn memlock_remedy(e: &OsError) -> String {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK);
    match (e.raw_os_error(), limit) {
        (Some(libc::ENOMEM), Ok((soft, _))) => format!(
            "; RLIMIT_MEMLOCK is {} KiB: raise it with `ulimit -l unlimited`, or LimitMEMLOCK=infinity in a systemd unit",
            soft >> 10
        ),
        _ => String::new(),
    }
}

/// The registered buffer that holds the whole target of `read`.
fn registered_buffer(buffers: &[libc::iovec], read: &Read) -> Option<u16> {
    let start = read.into.as_ptr() as usize;
    let i = buffers
        .partition_point(|buffer| buffer.iov_base as usize <= start)
        .checked_sub(1)?;
    let end_of_buffer = buffers[i].iov_base as usize + buffers[i].iov_len;
    (start + read.len as usize <= end_of_buffer).then_some(i as u16)
}

fn unavailable(doing: &str, source: &OsError) -> Error {
    let remedy = match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "allow it: sysctl kernel.io_uring_disabled=0, and a seccomp profile (container) that lets io_uring through"
        }
        Some(libc::ENOMEM) => "raise RLIMIT_MEMLOCK (ulimit -l unlimited)",
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        _ => "run a Linux kernel from 5.6 on that has CONFIG_IO_URING",
    };
    Error::new(
        Kind::Io,
        format!("cannot {doing} io_uring: {source}"),
        remedy,
    )
}

fn enter_failed(source: &OsError) -> Error {
    let what = format!("io_uring stopped taking reads: {source}");
    Error::new(
        Kind::Io,
        what,
        "look into dmesg for the reason, and start again",
    )
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use super::super::FileId;
    use super::*;

    #[test]
    fn a_read_is_fixed_only_within_one_buffer() {
        let iovec = |base: usize, len| libc::iovec {
            iov_base: base as *mut _,
            iov_len: len,
        };
        let buffers = [
            iovec(0x1000, 0x2000),
            iovec(0x3000, 0x1000),
            iovec(0x8000, 0x1000),
        ];
        let find = |start: usize, len| {
            let into = NonNull::new(start as *mut u8).expect("no test address is 0");
            registered_buffer(
                &buffers,
                &Read {
                    file: FileId(0),
                    offset: 0,
                    len,
                    into,
                    token: 0,
                },
            )
        };
        assert_eq!(find(0x1000, 0x2000), Some(0));
        assert_eq!(find(0x2000, 0x2000), None, "crosses into the next one");
        assert_eq!(find(0x3800, 0x800), Some(1));
        assert_eq!(find(0x4000, 0x10), None, "in the gap");
        assert_eq!(find(0x8000, 0x1001), None);
        assert_eq!(find(0x500, 0x10), None);
    }
}
