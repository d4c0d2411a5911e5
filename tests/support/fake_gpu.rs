//! A GPU that is none: kernels compiled for the processor, run as late as CUDA allows.
//!
//! What is given to a stream waits there. Each time the device is asked whether something is done, some of it runs, a
//! random number and from either stream; so a slot, a table or a buffer that is written too early changes results. Tiles
//! that a product reads where they were read into must be the same when it runs as when it was given.
//! Memory of its own holds no numbers at first, and can be touched by what runs alone.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use airstream::device::cuda::driver::{Args, Driver, EVENTS, Facts, KernelId, Stream};
use airstream::error::{Error, Kind, Result};
use airstream::format::quant::QuantType;

use super::shim::Shim;
use super::support::weights::Rng;

enum Work {
    /// The kernel, the grid, threads, arguments, and what its tiles were when it was given, if that must not change.
    Launch(String, [u32; 3], u32, Box<Args>, Option<u64>),
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
    /// Bytes of its own that were taken, at most; and together with the processor's that it was shown.
    pub allocated_max: usize,
    pub taken_max: usize,
    /// Bytes of tiles that were copied there.
    pub tile_bytes: u64,
    /// Bytes that were copied from there.
    pub answer_bytes: u64,
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

impl State {
    fn taken(&self) -> usize {
        let all = self.registered.iter().chain(&self.allocated);
        all.map(|(_, bytes)| bytes).sum()
    }
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
                context_bytes: 0,
            },
            memory: usize::MAX,
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

    /// The same GPU, whose driver has taken `bytes` of the memory that it shares.
    pub fn that_took(mut self, bytes: u64) -> FakeGpu {
        self.facts.context_bytes = bytes;
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
        // What a failed test has left is never done.
        match self.state().failed || std::thread::panicking() {
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
            Work::Launch(name, grid, threads, args, sum) => {
                if let Some(sum) = sum {
                    let now = sum_of_tiles(&name, grid, &args, |table| table);
                    assert_eq!(now, Some(sum), "a slot was written before {name} read it");
                }
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
                        sum_of(from, bytes as u64),
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

    /// Where something is read from that waits to be copied to `address`, if it does.
    fn written_at(&self, address: u64) -> u64 {
        let state = self.state();
        let mut waiting = state.queues[Stream::Compute as usize].waiting.iter().rev();
        let found = waiting.find_map(|(_, work)| match *work {
            Work::Copy(to, from, bytes, _) if (to..to + bytes as u64).contains(&address) => {
                Some(from + (address - to))
            }
            _ => None,
        });
        found.unwrap_or(address)
    }

    fn is_idle(&self) -> bool {
        std::thread::panicking() || self.state().queues.iter().all(|q| q.waiting.is_empty())
    }
}

fn at(address: u64) -> *mut u8 {
    ptr::with_exposed_provenance_mut(address as usize)
}

fn sum_of(from: u64, bytes: u64) -> u64 {
    // SAFETY: the device vouches for the range.
    let bytes = unsafe { std::slice::from_raw_parts(at(from), bytes as usize) };
    bytes.chunks(8).fold(0, |sum: u64, word| {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        sum.rotate_left(5) ^ u64::from_le_bytes(padded)
    })
}

/// What the tiles are that a product reads, whose table can be read at `place` of its address; none if the kernel is not
/// a product.
fn sum_of_tiles(
    name: &str,
    grid: [u32; 3],
    args: &Args,
    place: impl FnOnce(u64) -> u64,
) -> Option<u64> {
    /// `Tile` of `kernels/weights.h`.
    #[repr(C)]
    struct Tile {
        data: u64,
        out: u64,
        rows: u32,
        stride: u32,
        first: u32,
    }
    let (kind, qtype) = name.split_once('_')?;
    if !["matvec", "matpanel", "matmul", "floats"].contains(&kind) {
        return None;
    }
    let qtype = QuantType::ALL
        .iter()
        .find(|t| t.name().eq_ignore_ascii_case(qtype))
        .expect("a product is of a type");
    let pointers = args.pointers();
    // SAFETY: a product takes a table of as many tiles as its grid is high, and their width, before all else; but
    // `matmul` of blocks of 32 is told how many at last.
    let (tiles, cols) = unsafe {
        let table = at(place(pointers[0].cast::<u64>().read())).cast::<Tile>();
        let count = match (kind, qtype.block_values()) {
            ("matmul", 32) => pointers[4].cast::<u32>().read(),
            _ => grid[1],
        };
        let tiles = std::slice::from_raw_parts(table, count as usize);
        (tiles, pointers[1].cast::<u32>().read() as usize)
    };
    let row_bytes = qtype.row_bytes(cols);
    let sum = |tile: &Tile| sum_of(tile.data, u64::from(tile.rows) * row_bytes as u64);
    Some(
        tiles
            .iter()
            .fold(0, |all: u64, tile| all.rotate_left(7) ^ sum(tile)),
    )
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
        seen.taken_max = seen.taken_max.max(state.taken());
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
        let mut state = self.state();
        let (start, registered) = (base.addr().get(), &mut state.registered);
        let apart =
            |&(other, length): &(usize, usize)| start + bytes <= other || other + length <= start;
        assert!(registered.iter().all(apart), "memory is registered twice");
        assert!(
            bytes <= 64 << 20,
            "a Jetson may refuse {bytes} bytes at a time"
        );
        registered.push((start, bytes));
        let mut seen = self.look();
        seen.taken_max = seen.taken_max.max(state.taken());
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
        // Of its own memory copies alone see to.
        let sum = match self.facts.integrated {
            true => sum_of_tiles(&name, grid, args, |table| self.written_at(table)),
            false => None,
        };
        let work = Work::Launch(name, grid, threads, Box::new(args.clone()), sum);
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
            Stream::Compute => {
                if from_own && !to_own {
                    self.look().answer_bytes += bytes as u64;
                }
                None
            }
            Stream::Tiles => {
                assert!(to_own && !from_own, "tiles go into the GPU's memory");
                self.look().tile_bytes += bytes as u64;
                Some(sum_of(from, bytes as u64))
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
