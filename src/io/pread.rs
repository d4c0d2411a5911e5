//! Positioned reads on a few threads, where io_uring is not to be had.
//!
//! The queues are as long as the depth from the start, so that no read
//! allocates. Each thread does one blocking read at a time.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::error::{Error, Kind, Result};

use super::{Completion, Files, Full, Io, Read};

/// More threads than this bring no more from one disk.
const THREADS_MAX: usize = 8;

/// Reads in flight on a pool of threads.
pub struct Pread {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Submitted and not yet flushed.
    unsent: Vec<Read>,
    depth: usize,
    in_flight: usize,
    description: String,
}

struct Shared {
    files: Arc<Files>,
    queues: Mutex<Queues>,
    /// There is a read to do, or it is time to end.
    work: Condvar,
    /// A read was finished.
    finished: Condvar,
}

struct Queues {
    to_do: VecDeque<Read>,
    done: VecDeque<Completion>,
    closing: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        // The queues are consistent between any two statements, whoever panicked.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread does until the pool closes.
    fn work(&self) {
        let mut queues = self.lock();
        loop {
            if queues.closing {
                return;
            }
            let Some(read) = queues.to_do.pop_front() else {
                queues = self
                    .work
                    .wait(queues)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(queues);
            let file = self.files.get(read.file);
            // SAFETY: whoever submitted this read vouched for the memory until it is reaped or the
            // `Pread` is dropped, and dropping joins this thread.
            let result =
                unsafe { file.read_at(read.into.as_ptr(), read.len as usize, read.offset) };
            queues = self.lock();
            queues.done.push_back(Completion {
                token: read.token,
                result,
            });
            self.finished.notify_one();
        }
    }
}

impl Pread {
    /// Starts the threads.
    pub fn new(files: &Arc<Files>, depth: usize) -> Result<Self> {
        let depth = depth.max(1);
        let thread_count = depth.min(THREADS_MAX);
        let shared = Arc::new(Shared {
            files: files.clone(),
            queues: Mutex::new(Queues {
                to_do: VecDeque::with_capacity(depth),
                done: VecDeque::with_capacity(depth),
                closing: false,
            }),
            work: Condvar::new(),
            finished: Condvar::new(),
        });
        let access = if files.all_direct() {
            "direct"
        } else {
            "buffered"
        };
        let mut pread = Pread {
            shared,
            threads: Vec::with_capacity(thread_count),
            unsent: Vec::with_capacity(depth),
            depth,
            in_flight: 0,
            description: format!("positioned reads on {thread_count} threads, {access}"),
        };
        for i in 0..thread_count {
            let shared = pread.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("read-{i}"))
                .stack_size(64 << 10)
                .spawn(move || shared.work())
                .map_err(|e| {
                    let what = format!("cannot start a thread for reading: {e}");
                    Error::new(Kind::Io, what, "raise the limit of processes (ulimit -u)")
                })?;
            pread.threads.push(thread);
        }
        Ok(pread)
    }
}

impl Io for Pread {
    unsafe fn submit(&mut self, read: Read) -> std::result::Result<(), Full> {
        if self.in_flight == self.depth {
            return Err(Full);
        }
        assert!(
            usize::from(read.file.0) < self.shared.files.len(),
            "a file that was not opened"
        );
        self.in_flight += 1;
        self.unsent.push(read);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.unsent.is_empty() {
            self.shared.lock().to_do.extend(self.unsent.drain(..));
            self.shared.work.notify_all();
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut [Completion], wait: bool) -> Result<usize> {
        if wait {
            self.flush()?;
        }
        let mut queues = self.shared.lock();
        while wait && queues.done.is_empty() && self.in_flight > 0 && !done.is_empty() {
            queues = self
                .shared
                .finished
                .wait(queues)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let count = queues.done.len().min(done.len());
        for (to, from) in done.iter_mut().zip(queues.done.drain(..count)) {
            *to = from;
        }
        self.in_flight -= count;
        Ok(count)
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn describe(&self) -> &str {
        &self.description
    }
}

impl Drop for Pread {
    /// Waits for the reads that threads are at; those not begun never start.
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                // A panic is impossible in `work`, and its read has ended either way.
                log::error!("a reading thread panicked");
            }
        }
    }
}
