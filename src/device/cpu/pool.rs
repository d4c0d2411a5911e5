//! A pool of pinned threads that share out the units of one job after the other.
//!
//! Each worker starts with its own run of neighbouring units and, when they are
//! done, takes single units from the others. Between jobs a worker spins for
//! some microseconds, then sleeps on a futex. No job allocates or locks, and a
//! worker that is late (asleep, or off its processor) is not waited for: the
//! others take its units and the gate closes without it.
#![allow(unsafe_code)]

use crate::error::{Error, Kind, Result};
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// In the gate: the job is closed, nobody may join it any more.
const CLOSED: u32 = 1 << 7;
/// In the gate: how many workers have joined the job.
const JOINED: u32 = CLOSED - 1;
/// Threads of a pool at most.
pub const THREADS_MAX: usize = JOINED as usize;
/// In the gate: the job's number counts in steps of this.
const JOB: u32 = 1 << 8;

/// What a job calls for each unit: (worker, unit).
type Work<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The threads. One thread at a time gives jobs, which `Cell` sees to.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    /// How many workers may take part, as somebody else says at any time.
    allowed: Arc<AtomicU32>,
    threads: Vec<JoinHandle<()>>,
    not_sync: PhantomData<Cell<()>>,
}

/// A worker's units that nobody has taken yet: `next..end`. Alone on its cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

struct Shared {
    /// Job number, whether it is closed, workers that joined it. Sleepers wait for it to change.
    gate: AtomicU32,
    /// Workers that are through with the job.
    left: AtomicU32,
    /// Workers asleep, or about to be.
    asleep: AtomicU32,
    /// Workers that may take units; the others sleep until this changes.
    active: AtomicU32,
    /// How often they became more.
    rises: AtomicU32,
    stop: AtomicBool,
    /// The open job. Written only while the gate is closed and all who joined have left.
    work: UnsafeCell<Option<*const Work<'static>>>,
    shares: Vec<Share>,
    spin: Duration,
}

// SAFETY: `work` is written only by the thread that gives jobs, while the gate is closed and no
// worker is inside, and read only by workers that joined; the gate's orderings see to it.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is used only while `run` keeps its referent alive.
unsafe impl Send for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("workers", &self.shares.len())
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts `threads` - 1 threads; the caller of `run` is worker 0.
    ///
    /// Worker i runs on the i-th processor that the process may use. With more
    /// threads than processors nothing is pinned and nobody spins.
    pub(super) fn new(threads: usize) -> Result<Pool> {
        if threads == 0 || threads > THREADS_MAX {
            let what = format!("{threads} threads cannot be used");
            return Err(Error::new(
                Kind::Usage,
                what,
                format!("use 1 to {THREADS_MAX} threads"),
            ));
        }
        let processors = allowed_processors();
        let room = threads <= processors.len();
        let shared = Arc::new(Shared {
            gate: AtomicU32::new(CLOSED),
            left: AtomicU32::new(0),
            asleep: AtomicU32::new(0),
            active: AtomicU32::new(threads as u32),
            rises: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            work: UnsafeCell::new(None),
            shares: (0..threads).map(|_| Share::default()).collect(),
            spin: if room { SPIN } else { Duration::ZERO },
        });
        let mut pool = Pool {
            shared,
            allowed: Arc::new(AtomicU32::new(u32::MAX)),
            threads: Vec::new(),
            not_sync: PhantomData,
        };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let processor = room.then(|| processors.get(worker).copied()).flatten();
            let body = move || {
                if let Some(processor) = processor {
                    pin(processor);
                }
                shared.serve(worker, processor);
            };
            let thread = std::thread::Builder::new()
                .name(format!("worker {worker}"))
                .spawn(body);
            let thread = thread.map_err(|e| {
                let what = format!("cannot start worker thread {worker}: {e}");
                Error::new(
                    Kind::Io,
                    what,
                    "use fewer threads, or raise the limit (ulimit -u)",
                )
            })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Workers, the caller of `run` among them.
    pub(super) fn workers(&self) -> usize {
        self.shared.shares.len()
    }

    /// Lets only the first `allowed` workers, of which the caller of `run` is one, take part in each job, as many as
    /// there are when it begins. The others sleep, which saves power.
    pub(super) fn follow(&mut self, allowed: Arc<AtomicU32>) {
        self.allowed = allowed;
    }

    /// Workers that take part in the job that begins.
    fn take_up(&self) -> usize {
        let allowed = self.allowed.load(Ordering::Relaxed) as usize;
        let active = allowed.clamp(1, self.workers());
        self.set_active(active as u32);
        active
    }

    fn set_active(&self, workers: u32) {
        let active = &self.shared.active;
        let before = active.load(Ordering::Relaxed);
        if before != workers {
            if before < workers {
                self.shared.rises.fetch_add(1, Ordering::Relaxed);
            }
            active.store(workers, Ordering::SeqCst);
            futex(active, libc::FUTEX_WAKE, i32::MAX as u32);
        }
    }

    /// Calls `work(worker, unit)` once for every unit below `units`; returns when all are done.
    ///
    /// `work` must not call `run`, and a panic in it ends the process. Worker 0 is the calling thread.
    pub(super) fn run(&self, units: usize, work: &Work<'_>) {
        let shared = &*self.shared;
        let active = self.take_up();
        if units <= 1 || active == 1 {
            (0..units).for_each(|unit| work(0, unit));
            return;
        }
        for (worker, share) in shared.shares.iter().enumerate() {
            // Workers that do not take part have no units of their own.
            let first = |worker: usize| worker.min(active) * units / active;
            share.next.store(first(worker), Ordering::Relaxed);
            share.end.store(first(worker + 1), Ordering::Relaxed);
        }
        shared.left.store(0, Ordering::Relaxed);
        // SAFETY: the gate is closed and all who had joined have left, so nobody reads `work`. The
        // lifetime is cut off: workers use the reference only before this function returns.
        unsafe {
            *shared.work.get() =
                Some(std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work))
        };
        let gate = (shared.gate.load(Ordering::Relaxed) & !(JOB - 1)).wrapping_add(JOB);
        shared.gate.store(gate, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            futex(&shared.gate, libc::FUTEX_WAKE, i32::MAX as u32);
        }
        shared.take_units(0, work);
        let joined = shared.gate.fetch_or(CLOSED, Ordering::Acquire) & JOINED;
        let mut spins = 0_u32;
        while shared.left.load(Ordering::Acquire) != joined {
            spins += 1;
            // A worker may have lost its processor to this very thread.
            if spins.is_multiple_of(4096) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Those who sit out wait for this word, and find that they are to stop.
        self.set_active(self.workers() as u32);
        self.shared.gate.fetch_add(JOB, Ordering::SeqCst);
        futex(&self.shared.gate, libc::FUTEX_WAKE, i32::MAX as u32);
        for thread in self.threads.drain(..) {
            // A worker that panicked has already said so on stderr.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A worker's life, on its processor.
    fn serve(&self, worker: usize, processor: Option<usize>) {
        let (mut seen, mut rises) = (CLOSED, 0);
        loop {
            self.sit_out(worker);
            seen = self.wait(seen);
            // A processor that was switched off has lost its worker, and may be back.
            let before = std::mem::replace(&mut rises, self.rises.load(Ordering::Relaxed));
            if let Some(processor) = processor.filter(|_| before != rises) {
                pin(processor);
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // Whoever sees a job also sees how many may take part in it, for that is set between jobs.
            if worker < self.active.load(Ordering::Relaxed) as usize && self.join(seen) {
                // SAFETY: the job is open and this worker has joined it, so `run` waits for it.
                let work = unsafe { (*self.work.get()).expect("an open job has work") };
                // SAFETY: as above: the reference given to `run` is still alive.
                self.take_units(worker, unsafe { &*work });
                self.left.fetch_add(1, Ordering::Release);
            }
        }
    }

    /// Sleeps while this worker may not take part.
    fn sit_out(&self, worker: usize) {
        loop {
            let active = self.active.load(Ordering::SeqCst);
            if worker < active as usize || self.stop.load(Ordering::Acquire) {
                return;
            }
            futex(&self.active, libc::FUTEX_WAIT, active);
        }
    }

    /// Waits for a job with another number than `seen`; its gate.
    fn wait(&self, seen: u32) -> u32 {
        let is_new = |gate: u32| gate & !(JOB - 1) != seen & !(JOB - 1);
        let began = Instant::now();
        loop {
            // The clock is read once in a while: reading it costs as much as many spins.
            for _ in 0..64 {
                let gate = self.gate.load(Ordering::Acquire);
                if is_new(gate) {
                    return gate;
                }
                std::hint::spin_loop();
            }
            if began.elapsed() >= self.spin {
                break;
            }
        }
        loop {
            self.asleep.fetch_add(1, Ordering::SeqCst);
            let gate = self.gate.load(Ordering::SeqCst);
            if !is_new(gate) {
                futex(&self.gate, libc::FUTEX_WAIT, gate);
            }
            self.asleep.fetch_sub(1, Ordering::SeqCst);
            let gate = self.gate.load(Ordering::Acquire);
            if is_new(gate) {
                return gate;
            }
        }
    }

    /// Joins the job of `gate`, unless it is closed or over.
    fn join(&self, gate: u32) -> bool {
        let mut now = self.gate.load(Ordering::Relaxed);
        while now & CLOSED == 0 && now & !(JOB - 1) == gate & !(JOB - 1) {
            match self.gate.compare_exchange_weak(
                now,
                now + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(other) => now = other,
            }
        }
        false
    }

    /// Does own units, then others'.
    fn take_units(&self, worker: usize, work: &Work<'_>) {
        let _guard = AbortOnPanic;
        let workers = self.shares.len();
        for other in 0..workers {
            let share = &self.shares[(worker + other) % workers];
            let end = share.end.load(Ordering::Relaxed);
            while share.next.load(Ordering::Relaxed) < end {
                let unit = share.next.fetch_add(1, Ordering::Relaxed);
                if unit >= end {
                    break;
                }
                work(worker, unit);
            }
        }
    }
}

/// Ends the process when a unit panics: unwinding would free what other workers still use, or
/// leave the caller waiting for ever.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("a worker panicked in the middle of an op");
            std::process::abort();
        }
    }
}

/// Processors that this process may run on, in order.
fn allowed_processors() -> Vec<usize> {
    let all = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0));
    let set = all.unwrap_or_default();
    (0..nix::sched::CpuSet::count())
        .filter(|&i| set.is_set(i).unwrap_or(false))
        .collect()
}

/// Keeps the calling thread on one processor. A refusal only costs speed.
fn pin(processor: usize) {
    let mut set = nix::sched::CpuSet::new();
    let pinned = set
        .set(processor)
        .and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set));
    if let Err(e) = pinned {
        log::debug!("cannot pin a worker to processor {processor}: {e}");
    }
}

/// One futex call on this process's own word. Every outcome is fine: waiters check again.
fn futex(word: &AtomicU32, operation: i32, value: u32) {
    // SAFETY: the word outlives the call; FUTEX_WAIT and FUTEX_WAKE write nothing.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            operation | libc::FUTEX_PRIVATE_FLAG,
            value,
            std::ptr::null::<libc::timespec>(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_done_once_by_whatever_worker() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads).expect("threads start");
            let done: Vec<AtomicU32> = (0..1000).map(|_| AtomicU32::new(0)).collect();
            for round in 0..300 {
                let units = [0, 1, 2, 5, 100, 1000][round % 6];
                pool.run(units, &|worker, unit| {
                    assert!(worker < threads);
                    done[unit].fetch_add(1, Ordering::Relaxed);
                });
                for (unit, count) in done.iter().enumerate() {
                    assert_eq!(count.swap(0, Ordering::Relaxed), u32::from(unit < units));
                }
                if round % 50 == 0 {
                    std::thread::sleep(Duration::from_millis(1)); // Long enough to fall asleep.
                }
            }
        }
    }

    #[test]
    fn workers_that_may_not_take_part_do_nothing_and_come_back() {
        let mut pool = Pool::new(4).expect("threads start");
        let allowed = Arc::new(AtomicU32::new(4));
        pool.follow(Arc::clone(&allowed));
        for (round, active) in [4, 1, 3, 2, 4, 1].into_iter().cycle().take(90).enumerate() {
            allowed.store(active as u32, Ordering::Relaxed);
            let done: Vec<AtomicU32> = (0..500).map(|_| AtomicU32::new(0)).collect();
            pool.run(500, &|worker, unit| {
                assert!(worker < active);
                // What changes in the middle of a job counts from the next one on.
                allowed.store(1 + unit as u32 % 4, Ordering::Relaxed);
                done[unit].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            if round % 7 == 0 {
                std::thread::sleep(Duration::from_millis(1)); // Long enough to fall asleep.
            }
        }
        allowed.store(0, Ordering::Relaxed);
        let own = std::thread::current().id();
        pool.run(50, &|worker, _| {
            assert_eq!((worker, std::thread::current().id()), (0, own));
        });
    }

    /// The kernel lets a thread run anywhere when it switches the thread's processor off, and leaves it so.
    #[test]
    fn a_worker_is_on_its_processor_again_when_more_may_take_part() {
        let processors = allowed_processors();
        if processors.len() < 2 {
            return;
        }
        let mut pool = Pool::new(2).expect("threads start");
        let allowed = Arc::new(AtomicU32::new(2));
        pool.follow(Arc::clone(&allowed));
        // Until the worker has come to a job; how many processors it may use then.
        let of_worker = |moves: bool| {
            let found = AtomicU32::new(0);
            while found.load(Ordering::Relaxed) == 0 {
                pool.run(2, &|worker, _| {
                    if worker == 1 {
                        if moves {
                            let mut all = nix::sched::CpuSet::new();
                            processors
                                .iter()
                                .for_each(|&i| all.set(i).expect("a processor"));
                            let own = nix::unistd::Pid::from_raw(0);
                            nix::sched::sched_setaffinity(own, &all).expect("they are its own");
                        }
                        found.store(allowed_processors().len() as u32, Ordering::Relaxed);
                    } else {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            found.into_inner()
        };
        assert_eq!(of_worker(false), 1);
        assert_eq!(of_worker(true), processors.len() as u32);
        allowed.store(1, Ordering::Relaxed);
        pool.run(2, &|_, _| ());
        std::thread::sleep(Duration::from_millis(20));
        allowed.store(2, Ordering::Relaxed);
        assert_eq!(of_worker(false), 1);
    }

    #[test]
    fn absurd_thread_counts_are_refused() {
        assert!(Pool::new(0).is_err());
        assert!(Pool::new(1000).is_err());
    }
}
