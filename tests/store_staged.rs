//! The store above a device with memory of its own, from seeds: what is copied late, computed late and read in any
//! order is always what the file has, and each level moves what was planned.
//!
//! The device here computes by looking: work that it was given checks the bytes of its tile, or of its page, when it
//! runs. It runs late and in order, beside the copies, which are made late and in order too.
#![allow(unsafe_code)]

#[path = "support/random.rs"]
mod random;
#[path = "support/store.rs"]
mod support;

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use airstream::Result;
use airstream::arena::SlotId;
use airstream::format::tile::{self, Tile};
use airstream::io::sim::{Content, Fault, Faults, Options, Sim, Timing};
use airstream::residency::Rate;
use airstream::store::integrity::Integrity;
use airstream::store::{COPIES_MAX, Copies, MARKS_MAX, ModelId, Store, Weights};
use random::Random;
use support::{byte_at, matrices, slots};

const SLOT_BYTES: usize = 8 << 10;
const ROWS: [usize; 5] = [16, 300, 112, 500, 64];
const COLS: usize = 64;
const MATRICES: usize = 8;

/// The simulated file: the matrices and a block beyond.
static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| (0..96 << 10).map(byte_at).collect());

enum Work {
    /// The tile at this address holds the file's bytes from an offset on.
    Tile(usize, Tile),
    /// The page at this address is filled with this, or is filled with it already.
    Fill(usize, u8),
    Filled(usize, u8),
    Mark,
}

/// The device: two queues, and how far each has come.
struct Device {
    random: Random,
    copies: VecDeque<(usize, usize, usize)>,
    copied: u64,
    work: VecDeque<Work>,
    passed: u64,
    looked_at: u64,
}

impl Device {
    /// Goes on with either queue for a while.
    fn run(&mut self) {
        for _ in 0..self.random.below(4) {
            match self.random.below(2) {
                0 => self.copy_one(),
                _ => self.work_one(),
            }
        }
    }

    fn copy_one(&mut self) {
        if let Some((from, to, bytes)) = self.copies.pop_front() {
            // SAFETY: slots of the test, which live longer than this.
            unsafe { at(to).copy_from_nonoverlapping(at(from), bytes) };
            self.copied += 1;
        }
    }

    fn work_one(&mut self) {
        match self.work.pop_front() {
            Some(Work::Tile(place, tile)) => {
                let offset = tile.offset as usize;
                let right = &FILE[offset..offset + tile.bytes as usize];
                assert!(
                    bytes_at(place, right.len()) == right,
                    "not what the file has"
                );
                self.looked_at += 1;
            }
            Some(Work::Fill(place, byte)) => bytes_at(place, SLOT_BYTES).fill(byte),
            Some(Work::Filled(place, byte)) => {
                assert!(
                    bytes_at(place, SLOT_BYTES).iter().all(|&b| b == byte),
                    "a page was written"
                );
            }
            Some(Work::Mark) => self.passed += 1,
            None => {}
        }
    }
}

fn at(place: usize) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(place)
}

fn bytes_at(place: usize, len: usize) -> &'static mut [u8] {
    // SAFETY: slots of the test, which live longer than any use of this.
    unsafe { std::slice::from_raw_parts_mut(at(place), len) }
}

struct Shared(Arc<Mutex<Device>>);

impl Copies for Shared {
    unsafe fn begin(&mut self, from: NonNull<u8>, to: NonNull<u8>, bytes: usize) -> Result<()> {
        let mut device = lock(&self.0);
        assert!(device.copies.len() < COPIES_MAX, "too many copies");
        let address = |memory: NonNull<u8>| memory.as_ptr().expose_provenance();
        device.copies.push_back((address(from), address(to), bytes));
        Ok(())
    }

    fn done(&mut self) -> Result<u64> {
        let mut device = lock(&self.0);
        device.run();
        Ok(device.copied)
    }

    fn mark(&mut self) -> Result<()> {
        let mut device = lock(&self.0);
        device.work.push_back(Work::Mark);
        let marks = device.work.iter().filter(|work| matches!(work, Work::Mark));
        assert!(marks.count() <= MARKS_MAX, "too many marks");
        Ok(())
    }

    fn passed(&mut self) -> Result<u64> {
        let mut device = lock(&self.0);
        device.run();
        Ok(device.passed)
    }
}

fn lock(device: &Mutex<Device>) -> MutexGuard<'_, Device> {
    device.lock().expect("no panic before")
}

struct Setup {
    store: Store,
    device: Arc<Mutex<Device>>,
    /// One bit in every so many reads is wrong; 0 for none.
    flip_once_in: Arc<AtomicU32>,
    tiles: Vec<Tile>,
    ranges: Vec<Range<u32>>,
    /// KV pages, and what they are filled with.
    pages: Vec<(SlotId, u8)>,
}

/// How many slots there are here and on the device, and through how many of them tiles pass.
#[derive(Debug, Clone, Copy)]
struct Shape {
    slots: usize,
    window: u32,
    device_slots: usize,
    device_window: u32,
}

fn setup(seed: u64, shape: Shape, rates: Vec<(Fault, f64)>) -> Setup {
    let matrices = matrices(MATRICES, &ROWS, COLS);
    let (tiles, ranges) = tile::cut(&matrices, SLOT_BYTES);
    let flip_once_in = Arc::new(AtomicU32::new(0));
    let (flips, mut random) = (flip_once_in.clone(), Random(!seed));
    let serve = move |_, offset: u64, into: &mut [u8]| {
        let from = (offset as usize).min(FILE.len());
        let count = into.len().min(FILE.len() - from);
        into[..count].copy_from_slice(&FILE[from..from + count]);
        let once_in = flips.load(Ordering::Relaxed);
        if once_in > 0 && count > 0 && random.once_in(once_in.into()) {
            into[random.below(count as u64) as usize] ^= 1 << random.below(8);
        }
        count
    };
    let sim = Sim::new(Options {
        seed,
        depth: 1 + seed as usize % 8,
        content: Content::Serve(Box::new(serve)),
        timing: Timing::Reaps(seed as u32 % 5),
        faults: Faults {
            rates,
            at: Vec::new(),
        },
        log_reads_max: 0,
    });
    let integrity = Integrity::simulated(&matrices, &tiles);
    let in_use = shape.slots as u32;
    let memory = slots(shape.slots, SLOT_BYTES);
    let mut store = Store::empty(memory, in_use, Box::new(sim), shape.window);
    let device = Arc::new(Mutex::new(Device {
        random: Random(seed),
        copies: VecDeque::new(),
        copied: 0,
        work: VecDeque::new(),
        passed: 0,
        looked_at: 0,
    }));
    let copies = Box::new(Shared(device.clone()));
    store.set_device(
        slots(shape.device_slots, SLOT_BYTES),
        shape.device_window,
        copies,
    );
    store.set_plain(true);
    let id = store.add(Weights {
        matrices,
        tiles: tiles.clone(),
        ranges: ranges.clone(),
        paths: vec![PathBuf::from("model.gguf")],
        integrity,
        resident: false,
    });
    assert_eq!(id, ModelId::FIRST);
    store.set_rates(&[Rate::of_all(1.0)]);
    Setup {
        store,
        device,
        flip_once_in,
        tiles,
        ranges,
        pages: Vec::new(),
    }
}

impl Setup {
    fn give(&self, work: Work) {
        lock(&self.device).work.push_back(work);
    }

    /// One pass: each tile is handed out once, on the device, and work is given for it.
    fn pass(&mut self, range: Range<u32>) -> Result<()> {
        self.store.begin(range.clone());
        let mut done = Vec::new();
        while self.store.acquire()? > 0 {
            for &tile in self.store.acquired() {
                let place = self.store.memory(tile).data.as_ptr().expose_provenance();
                self.give(Work::Tile(place, self.tiles[tile as usize]));
                done.push(tile);
            }
            self.store.feed();
            self.store.release()?;
        }
        done.sort_unstable();
        assert!(done.into_iter().eq(range), "each tile once");
        Ok(())
    }

    fn sweep(&mut self) -> Result<()> {
        self.store.begin_sweep(ModelId::FIRST, None);
        for first in (0..MATRICES).step_by(3) {
            let last = (first + 3).min(MATRICES) - 1;
            self.pass(self.ranges[first].start..self.ranges[last].end)?;
        }
        for &(slot, byte) in &self.pages {
            let place = self.store.page(slot).as_ptr().expose_provenance();
            self.give(Work::Filled(place, byte));
        }
        self.store.finish_sweep()
    }

    /// Takes a page or gives one back.
    fn change_pages(&mut self, random: &mut Random) {
        if random.once_in(2) {
            if self.store.pages_free() > 0 {
                let slot = self.store.take_page().expect("a page is free");
                let byte = random.below(256) as u8;
                let place = self.store.page(slot).as_ptr().expose_provenance();
                assert!(
                    self.pages.iter().all(|&(other, _)| other != slot),
                    "given twice"
                );
                self.give(Work::Fill(place, byte));
                self.pages.push((slot, byte));
            }
        } else if !self.pages.is_empty() {
            let index = random.below(self.pages.len() as u64) as usize;
            let (slot, _) = self.pages.swap_remove(index);
            self.store.free_page(slot);
        }
    }
}

#[test]
fn whatever_is_late_the_device_computes_with_what_the_file_has() {
    let (mut errors, mut doubted, mut pages, mut looked_at) = (0, 0, 0, 0);
    for seed in 0..1000 {
        let mut random = Random(seed);
        let mut window = || 1 + random.below(4) as u32;
        let (window, device_window) = (window(), window());
        let shape = Shape {
            slots: window as usize + 2 + random.below(20) as usize,
            window,
            device_slots: device_window as usize + random.below(20) as usize,
            device_window,
        };
        let rate = |random: &mut Random, most: u64| random.below(most) as f64 / 100.0;
        let rates = vec![
            (Fault::Short, rate(&mut random, 30)),
            (Fault::Again, rate(&mut random, 20)),
            (Fault::Io, rate(&mut random, 3)),
        ];
        let mut setup = setup(seed, shape, rates);
        while setup.sweep().is_err() {
            errors += 1;
        }
        // From here on the checksums are known.
        let once_in = [0, 10, 30][seed as usize % 3];
        setup.flip_once_in.store(once_in, Ordering::Relaxed);
        for _ in 0..4 {
            setup.change_pages(&mut random);
            errors += u64::from(setup.sweep().is_err());
        }
        pages += setup.pages.len();
        doubted += setup.store.counters().doubted;
        while !lock(&setup.device).work.is_empty() {
            lock(&setup.device).run();
        }
        looked_at += lock(&setup.device).looked_at;
    }
    let seen = (errors, doubted, pages, looked_at);
    assert!(
        errors > 60 && doubted > 60 && pages > 300 && looked_at > 50_000,
        "{seen:?}"
    );
}

#[test]
fn each_level_moves_what_was_planned() {
    for (slots, device_slots) in [(60, 60), (20, 12), (40, 12), (6, 30), (6, 5)] {
        let shape = Shape {
            slots,
            window: 4,
            device_slots,
            device_window: 4,
        };
        let mut setup = setup(7, shape, Vec::new());
        for _ in 0..2 {
            setup.sweep().expect("no faults");
        }
        let before = setup.store.counters();
        const SWEEPS: u64 = 5;
        for _ in 0..SWEEPS {
            setup.sweep().expect("no faults");
        }
        let after = setup.store.counters();
        let plan = setup.store.residency();
        let bytes = |tile: u32, of: fn(&Tile) -> usize| of(&setup.tiles[tile as usize]) as u64;
        let read: u64 = plan.streamed().map(|t| bytes(t, Tile::read_bytes)).sum();
        let copied: u64 = plan
            .copied()
            .map(|t| bytes(t, |tile| tile.bytes as usize))
            .sum();
        let slack = 8 * SLOT_BYTES as u64;
        for (what, got, planned) in [
            ("read", after.read_bytes - before.read_bytes, SWEEPS * read),
            (
                "copied",
                after.copied_bytes - before.copied_bytes,
                SWEEPS * copied,
            ),
        ] {
            assert!(
                got.abs_diff(planned) <= slack,
                "{shape:?}: {got} {what}, planned {planned}"
            );
            assert!(planned > 0 || got == 0, "{shape:?}: {got} {what}");
        }
        let kept = |tile: &u32| plan.keeps(*tile) || plan.keeps_on_device(*tile);
        let kept: u64 = (0..plan.tiles())
            .filter(kept)
            .map(|t| bytes(t, |tile| tile.bytes as usize))
            .sum();
        assert!(setup.store.resident_bytes() >= kept, "{shape:?}");
    }
}
