//! What the store makes good by itself after the disk or the system failed for a moment, and what that costs.
#![allow(unsafe_code)]

#[path = "support/store.rs"]
mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use airstream::error::{Error, Kind, Result};
use airstream::format::tile::{self, Matrix, Use};
use airstream::io::sim::{Content, Fault, FaultAt, Faults, Options, Sim, Timing};
use airstream::io::{Completion, FileId, Full, Io, Read};
use airstream::residency::Rate;
use airstream::store::integrity::Integrity;
use airstream::store::{RowBytes, Store, Weights};
use support::{byte_at, slots};

const SLOT_BYTES: usize = 64 << 10;
const WINDOW: u32 = 8;

/// A flag that a test sets while something is to go wrong.
type Flag = Arc<AtomicBool>;

fn is_set(flag: &Flag) -> bool {
    flag.load(Ordering::Relaxed)
}

/// A disk that has a wrong bit in whatever is read while `lies`.
fn sim(lies: &Flag, faults: Faults) -> Sim {
    let lies = lies.clone();
    let serve = move |_, offset: u64, into: &mut [u8]| {
        for (i, byte) in into.iter_mut().enumerate() {
            *byte = byte_at(offset + i as u64) ^ u8::from(is_set(&lies));
        }
        into.len()
    };
    Sim::new(Options {
        seed: 1,
        depth: 8,
        content: Content::Serve(Box::new(serve)),
        timing: Timing::Reaps(0),
        faults,
        log_reads_max: 0,
    })
}

fn store(matrices: Vec<Matrix>, slots_count: usize, io: Box<dyn Io>) -> Store {
    let slots = slots(slots_count, SLOT_BYTES);
    let mut store = Store::empty(slots, slots_count as u32, io, WINDOW);
    let (tiles, ranges) = tile::cut(&matrices, SLOT_BYTES);
    store.add(Weights {
        integrity: Integrity::simulated(&matrices, &tiles),
        matrices,
        tiles,
        ranges,
        paths: vec![PathBuf::from("model.gguf")],
        resident: false,
    });
    store.set_rates(&[1.0].map(Rate::of_all));
    store
}

fn pass(store: &mut Store, matrix: usize) -> Result<()> {
    store.begin(store.tiles_of(matrix));
    while store.acquire()? > 0 {
        store.release()?;
    }
    Ok(())
}

/// Reads until everything is there.
fn fill(store: &mut Store) {
    while store.idle().expect("nothing fails") {}
}

#[test]
fn a_tile_whose_read_ahead_failed_comes_when_it_is_needed() {
    let matrices = support::matrices(40, &[1000], 512);
    let (tiles, ranges) = tile::cut(&matrices, SLOT_BYTES);
    let at = tiles[ranges[1].start as usize].offset + 5000;
    let fault = FaultAt {
        file: FileId(0),
        range: at..at + 1,
        fault: Fault::Io,
        times: 1,
    };
    let faults = Faults {
        rates: Vec::new(),
        at: vec![fault],
    };
    let sim = sim(&Flag::default(), faults);
    let log = sim.log();
    let mut store = store(matrices, tiles.len() + 20, Box::new(sim));
    for matrix in 0..2 {
        pass(&mut store, matrix).expect("nothing that was needed has failed");
    }
    let log = log.lock().expect("nobody panicked with it");
    assert_eq!(log.fault_count, 1);
    let (read, all) = (log.read_count, tiles.len() as u64);
    assert!(read * 3 < all, "{read} of {all} tiles were read before");
}

#[test]
fn a_kept_table_that_arrived_wrong_is_read_again() {
    let mut matrices = support::matrices(3, &[256], 512);
    matrices[0].used = Use::ByRow;
    let lies = Flag::default();
    let mut store = store(matrices, 30, Box::new(sim(&lies, Faults::default())));
    let row = |store: &mut Store| {
        let before = store.counters().reads;
        let mut first = None;
        let take = |_, row: RowBytes<'_>| match row {
            RowBytes::Plain(bytes) => first = Some(bytes[0]),
            RowBytes::Packed { .. } | RowBytes::OnDevice(_) => {}
        };
        store.rows(0, &[5], take).expect("the disk has the row");
        let offset = store.matrices()[0].offset + 5 * store.matrices()[0].row_bytes() as u64;
        assert_eq!(first, Some(byte_at(offset)));
        store.counters().reads - before
    };
    assert_eq!(row(&mut store), 1, "it is learnt from the disk");
    lies.store(true, Ordering::Relaxed);
    fill(&mut store);
    lies.store(false, Ordering::Relaxed);
    assert_eq!(row(&mut store), 1, "what is in memory is wrong");
    assert_eq!(store.counters().doubted, 1);
    fill(&mut store);
    assert_eq!(row(&mut store), 0, "it was read again");
}

/// Reads that nobody can take in while the system is `broken`.
struct Breaking {
    sim: Sim,
    broken: Flag,
}

impl Io for Breaking {
    unsafe fn submit(&mut self, read: Read) -> std::result::Result<(), Full> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.sim.submit(read) }
    }

    fn flush(&mut self) -> Result<()> {
        self.sim.flush()
    }

    fn reap(&mut self, done: &mut [Completion], wait: bool) -> Result<usize> {
        match is_set(&self.broken) {
            true => Err(Error::new(Kind::Io, "broken", "mend it")),
            false => self.sim.reap(done, wait),
        }
    }

    fn depth(&self) -> usize {
        self.sim.depth()
    }

    fn in_flight(&self) -> usize {
        self.sim.in_flight()
    }

    fn describe(&self) -> &str {
        self.sim.describe()
    }
}

#[test]
fn a_measurement_that_breaks_off_costs_its_slots_only() {
    let matrices = support::matrices(12, &[1000], 512);
    let broken = Flag::default();
    let io = Breaking {
        sim: sim(&Flag::default(), Faults::default()),
        broken: broken.clone(),
    };
    let mut store = store(matrices, 40, Box::new(io));
    let sweep = |store: &mut Store| {
        (0..12)
            .try_for_each(|matrix| pass(store, matrix))
            .expect("the system works");
    };
    sweep(&mut store);
    fill(&mut store);
    let pages = store.pages_free();
    broken.store(true, Ordering::Relaxed);
    store
        .measure_disk(Duration::from_millis(1))
        .expect_err("no read can be taken in");
    broken.store(false, Ordering::Relaxed);
    sweep(&mut store);
    assert_eq!(
        store.pages_free(),
        pages - 8,
        "as many as reads were in flight"
    );
    for _ in 0..store.pages_free() {
        store.take_page().expect("there are as many");
    }
    store.take_page().expect_err("there is no other");
    sweep(&mut store);
}
