//! A GPU that is none: kernels compiled for the processor, run as late as CUDA allows.
//!
//! What is given to a stream waits there. Each time the device is asked whether something is done, some of it runs, a
//! random number and from either stream; so a slot, a table or a buffer that is written too early changes results.
//! Memory of its own holds no numbers at first, and can be touched by what runs alone.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use airstream::device::cuda::driver::{Args, Driver, EVENTS, Facts, KernelId, Stream};
use airstream::error::{Error, Kind, Result};

use super::shim::Shim;
use super::support::weights::Rng;

enum Work {
    Launch(String, [u32; 3], u32, Box<Args>),
    /// To, from, bytes, and what they were when the copy was given, if that must not change.
    Copy(u64, u64, usize, Option<u64>),
}

/// What tests look at afterwards.
#[derive(Default)]
pub struct Seen {
    /// Launches and copies.
    pub issued: u64,
    /// Launches alone.
    pub launches: u64,
    /// The most that were not done at a time.
    pub behind_max: u64,
    /// The device has let the processor's memory go, and given back all of its own.
    pub unregistered: bool,
    /// Bytes of its own that were taken, at most.
    pub allocated_max: usize,
    /// Bytes of tiles that were copied there.
    pub tile_bytes: u64,
    /// Copies of tiles that ran while launches waited that were given earlier, and launches of which the opposite is true.
    pub overtook: [u64; 2],
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(u64, Work)>,
    issued: u64,
    done: u64,
}

struct State {
    random: Rng,
    /// In the order of `Stream`.
    queues: [Queue; 2],
    /// Which stream, and how much was given to it, when an event was recorded.
    events: [(usize, u64); EVENTS],
    registered: Vec<(usize, usize)>,
    allocated: Vec<(usize, usize)>,
    names: Vec<String>,
    failed: bool,
}

/// The fake.
pub struct FakeGpu {
    facts: Facts,
    /// Bytes of its own.
    memory: usize,
    shim: &'static Shim,
    state: Mutex<State>,
    seen: Arc<Mutex<Seen>>,
    /// Which launch fails, and all after it.
    fails_at: u64,
    /// The next launch fails, and all after it.
    breaks: Arc<AtomicBool>,
}

impl FakeGpu {
    /// A GPU whose lateness follows from `seed`; none where the kernels cannot be compiled.
    pub fn new(seed: u64) -> Option<FakeGpu> {
        Some(FakeGpu {
            facts: Facts {
                name: "fake".into(),
                capability: (8, 7),
                integrated: true,
            },
            memory: 0,
            shim: Shim::get()?,
            state: Mutex::new(State {
                random: Rng(seed),
                queues: Default::default(),
                events: [(0, 0); EVENTS],
                registered: Vec::new(),
                allocated: Vec::new(),
                names: Vec::new(),
                failed: false,
            }),
            seen: Arc::default(),
            fails_at: u64::MAX,
            breaks: Arc::default(),
        })
    }

    /// The same GPU with `memory` bytes of its own.
    pub fn with_memory(mut self, memory: usize) -> FakeGpu {
        self.facts.integrated = false;
        self.memory = memory;
        self
    }

    /// The same GPU, of which launch number `at` fails.
    pub fn that_fails(mut self, at: u64) -> FakeGpu {
        self.fails_at = at;
        self
    }

    /// Set to have it fail.
    pub fn breaks(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.breaks)
    }

    pub fn seen(&self) -> Arc<Mutex<Seen>> {
        Arc::clone(&self.seen)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    fn look(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("nobody panics with it")
    }

    fn check(&self) -> Result<()> {
        match self.state().failed {
            true => Err(fault()),
            false => Ok(()),
        }
    }

    fn issue(&self, stream: Stream, work: Work) -> Result<()> {
        self.check()?;
        let (mut seen, mut state) = (self.look(), self.state());
        if seen.issued == self.fails_at || self.breaks.load(Ordering::Relaxed) {
            state.failed = true;
            state.queues = Default::default();
            return Err(fault());
        }
        seen.issued += 1;
        let queue = &mut state.queues[stream as usize];
        queue.waiting.push_back((seen.issued, work));
        queue.issued += 1;
        let behind = state.queues.iter().map(|q| q.issued - q.done).sum();
        seen.behind_max = seen.behind_max.max(behind);
        Ok(())
    }

    /// Runs the oldest work of a stream that has not run.
    fn run_one(&self, stream: usize) {
        let work = {
            let mut state = self.state();
            let Some((number, work)) = state.queues[stream].waiting.pop_front() else {
                return;
            };
            let other = state.queues[1 - stream].waiting.front();
            if other.is_some_and(|&(earlier, _)| earlier < number) {
                self.look().overtook[1 - stream] += 1;
            }
            work
        };
        match work {
            Work::Launch(name, grid, threads, args) => {
                let order = self.state().random.next() % 3;
                // SAFETY: the device gives each kernel what it takes.
                unsafe {
                    self.shim
                        .launch(&name, grid, threads, &args.pointers(), order)
                };
            }
            Work::Copy(to, from, bytes, sum) => {
                if let Some(sum) = sum {
                    assert_eq!(
                        sum_of(from, bytes),
                        sum,
                        "a slot was written before its copy"
                    );
                }
                // SAFETY: the device vouches for the ranges.
                unsafe { at(to).copy_from_nonoverlapping(at(from), bytes) };
            }
        }
        self.state().queues[stream].done += 1;
    }

    fn is_idle(&self) -> bool {
        self.state().queues.iter().all(|q| q.waiting.is_empty())
    }
}

fn at(address: u64) -> *mut u8 {
    ptr::with_exposed_provenance_mut(address as usize)
}

fn sum_of(from: u64, bytes: usize) -> u64 {
    // SAFETY: the device vouches for the range.
    let bytes = unsafe { std::slice::from_raw_parts(at(from), bytes) };
    bytes.chunks(8).fold(0, |sum: u64, word| {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        sum.rotate_left(5) ^ u64::from_le_bytes(padded)
    })
}

/// Says who may touch memory of the GPU's own.
fn protect(allocated: &[(usize, usize)], how: i32) {
    for &(start, bytes) in allocated {
        // SAFETY: a mapping of ours.
        let changed = unsafe { libc::mprotect(at(start as u64).cast(), bytes, how) };
        assert_eq!(changed, 0, "memory can be protected");
    }
}

fn fault() -> Error {
    Error::new(
        Kind::Io,
        "the GPU cannot go on: it is a fake",
        "start again",
    )
}

impl Driver for FakeGpu {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn free_bytes(&self) -> Result<u64> {
        let taken: usize = self.state().allocated.iter().map(|(_, bytes)| bytes).sum();
        Ok((self.memory - taken) as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.check()?;
        assert!(!self.facts.integrated, "it has no memory of its own");
        // SAFETY: a new anonymous mapping.
        let start = unsafe {
            let (how, kind) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            libc::mmap(ptr::null_mut::<c_void>(), bytes, how, kind, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED, "there is memory");
        // SAFETY: just mapped. All ones are no number.
        unsafe { start.cast::<u8>().write_bytes(0xff, bytes) };
        let place = (start.expose_provenance(), bytes);
        protect(&[place], libc::PROT_NONE);
        let mut state = self.state();
        state.allocated.push(place);
        let taken: usize = state.allocated.iter().map(|(_, bytes)| bytes).sum();
        let mut seen = self.look();
        seen.allocated_max = seen.allocated_max.max(taken);
        match taken <= self.memory {
            true => Ok(place.0 as u64),
            false => Err(Error::new(
                Kind::Budget,
                "the fake has no such memory",
                "take less",
            )),
        }
    }

    unsafe fn free(&self, address: u64) {
        assert!(self.is_idle(), "memory goes while there is work for it");
        let mut state = self.state();
        let place = state
            .allocated
            .iter()
            .position(|&(start, _)| start == address as usize);
        let (start, bytes) = state
            .allocated
            .swap_remove(place.expect("it was allocated"));
        // SAFETY: a mapping of ours that nothing uses.
        unsafe { libc::munmap(at(start as u64).cast(), bytes) };
        self.look().unregistered = state.registered.is_empty() && state.allocated.is_empty();
    }

    unsafe fn register(&self, base: NonNull<u8>, bytes: usize) -> Result<u64> {
        let (start, registered) = (base.addr().get(), &mut self.state().registered);
        let apart =
            |&(other, length): &(usize, usize)| start + bytes <= other || other + length <= start;
        assert!(registered.iter().all(apart), "memory is registered twice");
        registered.push((start, bytes));
        Ok(base.as_ptr().expose_provenance() as u64)
    }

    unsafe fn unregister(&self, base: NonNull<u8>) {
        assert!(self.is_idle(), "memory goes while there is work for it");
        let mut state = self.state();
        let place = state
            .registered
            .iter()
            .position(|&(start, _)| start == base.addr().get());
        state
            .registered
            .swap_remove(place.expect("it was registered"));
        self.look().unregistered = state.registered.is_empty() && state.allocated.is_empty();
    }

    fn kernel(&self, name: &str) -> Result<KernelId> {
        let names = &mut self.state().names;
        names.push(name.to_string());
        Ok(KernelId(names.len() as u64 - 1))
    }

    unsafe fn launch(
        &self,
        kernel: KernelId,
        grid: [u32; 3],
        threads: u32,
        args: &Args,
    ) -> Result<()> {
        assert!(
            grid.iter().all(|&n| n > 0) && grid[1] < 65536 && grid[2] < 65536,
            "{grid:?}"
        );
        let name = self.state().names[kernel.0 as usize].clone();
        let work = Work::Launch(name, grid, threads, Box::new(args.clone()));
        self.look().launches += 1;
        self.issue(Stream::Compute, work)
    }

    unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        let own = |start: u64| {
            let within = |&(other, length): &(usize, usize)| {
                let start = start as usize;
                start >= other && start + bytes <= other + length
            };
            let state = self.state();
            let own = state.allocated.iter().any(within);
            assert!(
                own || state.registered.iter().any(within),
                "memory that the GPU does not know"
            );
            own
        };
        let (to_own, from_own) = (own(to), own(from));
        let sum = match stream {
            Stream::Compute => None,
            Stream::Tiles => {
                assert!(to_own && !from_own, "tiles go into the GPU's memory");
                self.look().tile_bytes += bytes as u64;
                Some(sum_of(from, bytes))
            }
        };
        self.issue(stream, Work::Copy(to, from, bytes, sum))
    }

    fn record(&self, stream: Stream, event: usize) -> Result<()> {
        self.check()?;
        let stream = stream as usize;
        let mut state = self.state();
        state.events[event] = (stream, state.queues[stream].issued);
        Ok(())
    }

    fn done(&self, event: usize) -> Result<bool> {
        self.check()?;
        let some = self.state().random.next() % 4;
        if some > 0 && !self.is_idle() {
            let allocated = self.state().allocated.clone();
            protect(&allocated, libc::PROT_READ | libc::PROT_WRITE);
            for _ in 0..some {
                let stream = self.state().random.next() % 2;
                self.run_one(stream as usize);
            }
            protect(&allocated, libc::PROT_NONE);
        }
        let state = self.state();
        let (stream, issued) = state.events[event];
        Ok(state.queues[stream].done >= issued)
    }
}
