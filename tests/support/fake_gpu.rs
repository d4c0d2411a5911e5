//! A GPU that is none: kernels compiled for the processor, run as late as CUDA allows.
//!
//! What is launched waits in a queue. Each time the device is asked whether something is done, a random
//! number of launches run; so a slot, a table or a buffer that is written too early changes results.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use airstream::device::cuda::driver::{Args, Driver, EVENTS, Facts, KernelId};
use airstream::error::{Error, Kind, Result};

use super::shim::Shim;
use super::support::weights::Rng;

enum Work {
    Launch(String, [u32; 3], u32, Box<Args>),
    Copy(u64, u64, usize),
}

/// What tests look at afterwards.
#[derive(Default)]
pub struct Seen {
    /// Launches and copies.
    pub issued: u64,
    /// The most that were not done at a time.
    pub behind_max: u64,
    /// The device has let the memory go.
    pub unregistered: bool,
}

struct State {
    random: Rng,
    queue: VecDeque<Work>,
    done: u64,
    /// How much was issued when an event was recorded.
    events: [u64; EVENTS],
    registered: Vec<(usize, usize)>,
    names: Vec<String>,
    failed: bool,
}

/// The fake.
pub struct FakeGpu {
    facts: Facts,
    shim: &'static Shim,
    state: RefCell<State>,
    seen: Arc<Mutex<Seen>>,
    /// Which launch fails, and all after it.
    fails_at: u64,
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
            shim: Shim::get()?,
            state: RefCell::new(State {
                random: Rng(seed),
                queue: VecDeque::new(),
                done: 0,
                events: [0; EVENTS],
                registered: Vec::new(),
                names: Vec::new(),
                failed: false,
            }),
            seen: Arc::default(),
            fails_at: u64::MAX,
        })
    }

    /// The same GPU, of which launch number `at` fails.
    pub fn that_fails(mut self, at: u64) -> FakeGpu {
        self.fails_at = at;
        self
    }

    pub fn seen(&self) -> Arc<Mutex<Seen>> {
        Arc::clone(&self.seen)
    }

    fn check(&self) -> Result<()> {
        match self.state.borrow().failed {
            true => Err(fault()),
            false => Ok(()),
        }
    }

    fn issue(&self, work: Work) -> Result<()> {
        self.check()?;
        let mut seen = self.seen.lock().expect("nobody panics with it");
        let state = &mut *self.state.borrow_mut();
        if seen.issued == self.fails_at {
            state.failed = true;
            state.queue.clear();
            return Err(fault());
        }
        seen.issued += 1;
        state.queue.push_back(work);
        seen.behind_max = seen.behind_max.max(seen.issued - state.done);
        Ok(())
    }

    /// Runs the oldest launch that has not run.
    fn run_one(&self) -> bool {
        let Some(work) = self.state.borrow_mut().queue.pop_front() else {
            return false;
        };
        match work {
            Work::Launch(name, grid, threads, args) => {
                let order = self.state.borrow_mut().random.next() % 3;
                // SAFETY: the device gives each kernel what it takes.
                unsafe {
                    self.shim
                        .launch(&name, grid, threads, &args.pointers(), order)
                };
            }
            Work::Copy(to, from, bytes) => {
                let at =
                    |address: u64| std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
                // SAFETY: the device vouches for the ranges.
                unsafe { at(to).copy_from_nonoverlapping(at(from), bytes) };
            }
        }
        self.state.borrow_mut().done += 1;
        true
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

    unsafe fn register(&self, base: NonNull<u8>, bytes: usize) -> Result<u64> {
        let (start, registered) = (base.addr().get(), &mut self.state.borrow_mut().registered);
        let apart =
            |&(other, length): &(usize, usize)| start + bytes <= other || other + length <= start;
        assert!(registered.iter().all(apart), "memory is registered twice");
        registered.push((start, bytes));
        Ok(base.as_ptr().expose_provenance() as u64)
    }

    unsafe fn unregister(&self, base: NonNull<u8>) {
        let mut state = self.state.borrow_mut();
        assert!(
            state.queue.is_empty(),
            "memory goes while kernels are to run on it"
        );
        let place = state
            .registered
            .iter()
            .position(|&(start, _)| start == base.addr().get());
        state
            .registered
            .swap_remove(place.expect("it was registered"));
        self.seen
            .lock()
            .expect("nobody panics with it")
            .unregistered = state.registered.is_empty();
    }

    fn kernel(&self, name: &str) -> Result<KernelId> {
        let names = &mut self.state.borrow_mut().names;
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
        let name = self.state.borrow().names[kernel.0 as usize].clone();
        self.issue(Work::Launch(name, grid, threads, Box::new(args.clone())))
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        for start in [to as usize, from as usize] {
            let within = |&(other, length): &(usize, usize)| {
                start >= other && start + bytes <= other + length
            };
            assert!(
                self.state.borrow().registered.iter().any(within),
                "memory that is not registered"
            );
        }
        self.issue(Work::Copy(to, from, bytes))
    }

    fn record(&self, event: usize) -> Result<()> {
        self.check()?;
        let issued = self.seen.lock().expect("nobody panics with it").issued;
        self.state.borrow_mut().events[event] = issued;
        Ok(())
    }

    fn done(&self, event: usize) -> Result<bool> {
        self.check()?;
        let some = self.state.borrow_mut().random.next() % 4;
        for _ in 0..some {
            self.run_one();
        }
        let state = self.state.borrow();
        Ok(state.done >= state.events[event])
    }
}
