//! Several models in one store under simulated disks: each tile arrives whole whatever the others do, the busy one
//! pushes the idle one out, and a model goes while reads are in flight.
#![allow(unsafe_code)]

#[path = "support/store.rs"]
mod support;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use airstream::arena::SlotId;
use airstream::error::Result;
use airstream::format::tile::{self, Matrix};
use airstream::io::sim::{Content, Fault, Faults, Log, Options, Sim, Timing};
use airstream::io::{Completion, Full, Io, Read, Region};
use airstream::residency::Rate;
use airstream::store::integrity::Integrity;
use airstream::store::{ModelId, Store, Weights};
use support::byte_at;

const SLOT_BYTES: usize = 64 << 10;
const WINDOW: u32 = 4;

/// The byte of a model's file: each model has its own.
fn byte_of(model: u8, offset: u64) -> u8 {
    byte_at(offset) ^ model.wrapping_mul(0x35)
}

/// Reads of the files of some models, the first one's first.
fn sim(models: &[u8], seed: u64) -> (Box<dyn Io>, Arc<Mutex<Log>>) {
    let models = models.to_vec();
    let content = Content::Serve(Box::new(move |file, offset, into| {
        for (i, byte) in into.iter_mut().enumerate() {
            *byte = byte_of(models[usize::from(file.0)], offset + i as u64);
        }
        into.len()
    }));
    let sim = Sim::new(Options {
        seed,
        depth: 8,
        content,
        timing: Timing::Reaps(3),
        faults: Faults {
            rates: vec![(Fault::Short, 0.1), (Fault::Again, 0.05)],
            at: Vec::new(),
        },
        log_reads_max: 0,
    });
    let log = sim.log();
    (Box::new(sim), log)
}

fn matrices(model: u8) -> Vec<Matrix> {
    let rows: &[usize] = match model % 2 {
        0 => &[64, 1000, 256, 16, 400],
        _ => &[300, 48, 1200],
    };
    support::matrices(9, rows, 512)
}

fn weights(model: u8) -> Weights {
    let matrices = matrices(model);
    let (tiles, ranges) = tile::cut(&matrices, SLOT_BYTES);
    Weights {
        integrity: Integrity::simulated(&matrices, &tiles),
        matrices,
        tiles,
        ranges,
        paths: vec![PathBuf::from(format!("model-{model}.gguf"))],
        resident: false,
    }
}

fn tiles(model: u8) -> usize {
    weights(model).tiles.len()
}

/// A store of `slots` slots with some models.
fn store(models: &[u8], slots: usize, seed: u64) -> (Store, Vec<ModelId>, Arc<Mutex<Log>>) {
    let (io, log) = sim(models, seed);
    let mut store = Store::empty(support::slots(slots, SLOT_BYTES), slots as u32, io, WINDOW);
    let ids = models
        .iter()
        .map(|&model| store.add(weights(model)))
        .collect();
    (store, ids, log)
}

/// One sweep of a model over groups of its matrices; every tile must come exactly once, whole, and be its own.
fn sweep(store: &mut Store, id: ModelId, model: u8) {
    sweep_then(store, (id, model), None);
}

/// The same, with a word on which model is swept after that.
fn sweep_then(store: &mut Store, (id, model): (ModelId, u8), next: Option<ModelId>) {
    store.begin_sweep(id, next);
    let last = matrices(model).len();
    for group in [0..3, 3..4, 4..last] {
        let range = store.tiles_of(group.start).start..store.tiles_of(group.end - 1).end;
        let mut left = range.len();
        store.begin(range);
        while store.acquire().expect("such faults are retried") > 0 {
            left -= store.acquired().len();
            for round in 0..2 {
                for &tile in store.acquired() {
                    let (memory, what) = (store.memory(tile), store.tile(tile));
                    // SAFETY: the tile is handed out, so its rows are in memory and nobody writes them.
                    let bytes = unsafe {
                        std::slice::from_raw_parts(memory.data.as_ptr(), what.bytes as usize)
                    };
                    let own =
                        |(i, &byte): (usize, &u8)| byte == byte_of(model, what.offset + i as u64);
                    assert!(
                        bytes.iter().enumerate().all(own),
                        "tile {tile}, round {round}"
                    );
                }
                store.feed();
            }
            store.release().expect("the bytes are right");
        }
        assert_eq!(left, 0, "a tile never came");
    }
    store.finish_sweep().expect("no file to change");
}

fn bytes(log: &Mutex<Log>) -> u64 {
    log.lock().expect("nobody panicked with it").bytes
}

#[test]
fn every_tile_is_the_right_models_whatever_is_swept_next() {
    for seed in 0..60 {
        let (mut store, ids, _log) = store(&[0, 1, 2], 12 + seed as usize % 70, seed);
        let pages: Vec<_> = (0..seed % 4)
            .map(|_| store.take_page().expect("there are slots"))
            .collect();
        let order = [0, 0, 1, 0, 2, 1, 1, 2, 0];
        for (step, &model) in order.iter().enumerate() {
            let mut rates = [0.1, 0.2, 0.3];
            rates[model] = 1.0;
            store.set_rates(&rates.map(Rate::of_all));
            // Said before the sweep, or never, or wrongly.
            let next = match (seed + step as u64) % 3 {
                0 => Some(ids[order[(step + 1) % order.len()]]),
                1 => Some(ids[step % 3]),
                _ => None,
            };
            sweep_then(&mut store, (ids[model], model as u8), next);
        }
        for page in pages {
            store.free_page(page);
        }
    }
}

#[test]
fn the_busy_model_is_all_in_memory_and_the_idle_one_comes_back() {
    let (a, b) = (tiles(0), tiles(1));
    // The rows' slot, the window, and all of the larger model.
    let slots = 1 + WINDOW as usize + a.max(b) + 2;
    let (mut store, ids, log) = store(&[0, 1], slots, 7);
    for (model, rates) in [(0, [1.0, 0.1]), (1, [0.1, 1.0]), (0, [1.0, 0.1])] {
        store.set_rates(&rates.map(Rate::of_all));
        // Two sweeps, for what a sweep has used while it was still outside the plan.
        sweep(&mut store, ids[model], model as u8);
        sweep(&mut store, ids[model], model as u8);
        let before = bytes(&log);
        for _ in 0..3 {
            sweep(&mut store, ids[model], model as u8);
        }
        assert_eq!(bytes(&log), before, "model {model} is in memory");
    }
}

#[test]
fn a_model_goes_with_its_reads_in_flight_and_another_comes() {
    for seed in 0..40 {
        let slots = 14 + seed as usize % 50;
        let (mut store, ids, _log) = store(&[0, 1], slots, seed);
        store.set_rates(&[1.0, 0.5].map(Rate::of_all));
        sweep_then(&mut store, (ids[1], 1), Some(ids[0]));
        store.feed();
        // Fewer slots stay while a model is on its way out, as if its place were needed for something else.
        store
            .remove(ids[0], (slots as u32 - 2, WINDOW), sim(&[1], seed + 100).0)
            .expect("nothing stands against it");
        sweep(&mut store, ids[1], 1);
        store
            .resize(slots as u32, WINDOW, Some(sim(&[1, 2], seed + 200).0))
            .expect("there were as many");
        let third = store.add(weights(2));
        assert!(
            !ids.contains(&third),
            "the name of a model that is gone is not given again"
        );
        store.set_rates(&[0.5, 1.0].map(Rate::of_all));
        for (id, model) in [(third, 2), (ids[1], 1), (third, 2)] {
            sweep(&mut store, id, model);
        }
        assert_eq!(store.slots_in_use(), slots as u32);
    }
}

#[test]
fn a_removal_that_fails_changes_nothing() {
    let (mut store, ids, _log) = store(&[0, 1], 30, 3);
    store.set_rates(&[1.0, 0.5].map(Rate::of_all));
    sweep(&mut store, ids[0], 0);
    let pages: Vec<_> = (0..10).map(|_| store.take_page().expect("room")).collect();
    store
        .remove(ids[0], (14, WINDOW), sim(&[1], 4).0)
        .expect_err("no room for the pages and the window");
    assert_eq!(store.slots_in_use(), 30);
    for (id, model) in [(ids[0], 0), (ids[1], 1)] {
        sweep(&mut store, id, model);
    }
    for page in pages {
        store.free_page(page);
    }
    store
        .remove(ids[0], (14, WINDOW), sim(&[1], 4).0)
        .expect("the pages are free");
    sweep(&mut store, ids[1], 1);
}

/// What a page holds, all over.
fn fill(store: &Store, page: SlotId, byte: u8) {
    // SAFETY: the page is this test's.
    unsafe { store.page(page).write_bytes(byte, SLOT_BYTES) };
}

#[test]
fn what_stays_moves_to_the_front() {
    for seed in 0..30 {
        let (mut store, ids, log) = store(&[0, 1], 60, seed);
        store.set_rates(&[1.0, 0.5].map(Rate::of_all));
        // Pages lie between tiles, in slots of tiles that were given up here and there.
        let mut pages = Vec::new();
        for round in 0..4 {
            sweep(&mut store, ids[round % 2], (round % 2) as u8);
            pages.extend((0..3).map(|_| store.take_page().expect("room")));
        }
        for (number, &page) in pages.iter().enumerate() {
            fill(&store, page, number as u8);
        }
        sweep(&mut store, ids[0], 0);
        while store.idle().expect("nothing fails") {}
        let kept = store.resident_bytes_of(ids[0]);
        let before = bytes(&log);
        for slots in [40, 25, 33, 20] {
            let moved = store.resize(slots, WINDOW, None).expect("there is room");
            for page in &mut pages {
                if let Some(moved) = moved.iter().find(|moved| moved.from == *page) {
                    *page = moved.to;
                }
            }
            let regions = store.regions();
            assert_eq!(regions.len(), 1);
            assert_eq!(regions[0].len, slots as usize * SLOT_BYTES);
            let mut distinct = pages.clone();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), pages.len());
            for (number, &page) in pages.iter().enumerate() {
                assert!(0 < page && page < slots, "page {page} of {slots} slots");
                // SAFETY: the page is this test's.
                let held =
                    unsafe { std::slice::from_raw_parts(store.page(page).as_ptr(), SLOT_BYTES) };
                assert!(held.iter().all(|&byte| byte == number as u8), "page {page}");
            }
            if slots == 40 {
                assert_eq!(bytes(&log), before);
                let left = store.resident_bytes_of(ids[0]);
                assert!(left * 10 > kept * 8, "{left} of {kept} bytes moved");
            }
            sweep(&mut store, ids[1], 1);
            sweep(&mut store, ids[0], 0);
        }
    }
}

/// Bytes that the kernel was asked to hold on to by each [`Io`] so far.
type Held = Arc<Mutex<Vec<usize>>>;

/// An [`Io`] that tells what it holds.
struct Holder {
    sim: Box<dyn Io>,
    held: Held,
    own: usize,
}

impl Holder {
    fn boxed(regions: &[Region], held: &Held) -> Box<dyn Io> {
        let own = held.lock().expect("nobody panicked with it").len();
        held.lock().expect("nobody panicked with it").push(0);
        let (sim, held) = (sim(&[0], 5).0, Arc::clone(held));
        let mut holder = Holder { sim, held, own };
        holder.register(regions);
        Box::new(holder)
    }
}

impl Io for Holder {
    unsafe fn submit(&mut self, read: Read) -> std::result::Result<(), Full> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.sim.submit(read) }
    }

    fn flush(&mut self) -> Result<()> {
        self.sim.flush()
    }

    fn reap(&mut self, done: &mut [Completion], wait: bool) -> Result<usize> {
        self.sim.reap(done, wait)
    }

    fn depth(&self) -> usize {
        self.sim.depth()
    }

    fn in_flight(&self) -> usize {
        self.sim.in_flight()
    }

    fn register(&mut self, regions: &[Region]) {
        assert_eq!(self.in_flight(), 0);
        let bytes = regions.iter().map(|region| region.len).sum();
        let mut held = self.held.lock().expect("nobody panicked with it");
        held[self.own] = bytes;
        assert!(held.iter().filter(|&&bytes| bytes > 0).count() <= 1);
    }

    fn describe(&self) -> &str {
        "holder"
    }
}

#[test]
fn memory_is_never_held_twice_for_reads() {
    let held = Held::default();
    let now = || held.lock().expect("nobody panicked with it").clone();
    let slots = support::slots(30, SLOT_BYTES);
    let region = |(start, len)| Region { start, len };
    let all: Vec<Region> = slots.regions(30).map(region).collect();
    let mut store = Store::empty(slots, 30, Holder::boxed(&all, &held), WINDOW);
    let id = store.add(weights(0));
    store.set_rates(&[1.0].map(Rate::of_all));
    sweep(&mut store, id, 0);
    assert_eq!(now(), [30 * SLOT_BYTES]);

    store.resize(20, WINDOW, None).expect("there is room");
    assert_eq!(now(), [20 * SLOT_BYTES]);
    let another = Holder::boxed(&[], &held);
    store.resize(25, WINDOW, Some(another)).expect("room");
    assert_eq!(now(), [0, 25 * SLOT_BYTES], "one lets go before the other");
    sweep(&mut store, id, 0);
}
