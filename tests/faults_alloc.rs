//! Nothing is allocated between two sweeps while the disk misbehaves in ways that the store mends.
#![allow(unsafe_code)]

#[path = "support/counting_thread.rs"]
mod counting_thread;
#[path = "support/random.rs"]
mod random;
#[path = "support/strips.rs"]
mod strips;
#[path = "support/store.rs"]
mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use airstream::format::tile;
use airstream::io::sim::{Content, Fault, Faults, Options, Sim, Timing};
use airstream::store::Store;
use airstream::store::integrity::Integrity;
use counting_thread::{allocations, counted};
use random::Random;
use support::{byte_at, matrices, slots};

const SLOT_BYTES: usize = 64 << 10;
const SLOTS: usize = 20;

#[test]
fn mending_faults_allocates_nothing() {
    let matrices = matrices(9, &[64, 1000, 256, 16, 400], 512);
    let (tiles, ranges) = tile::cut(&matrices, SLOT_BYTES);
    let file: Vec<u8> = (0..2 << 20).map(byte_at).collect();
    // The first two sweeps learn the checksums; from then on every eighth read or so has a wrong bit.
    let lies = Arc::new(AtomicBool::new(false));
    let (its_lies, mut random) = (lies.clone(), Random(7));
    let serve = move |_, offset: u64, into: &mut [u8]| {
        let from = &file[(offset as usize).min(file.len())..];
        let count = into.len().min(from.len());
        into[..count].copy_from_slice(&from[..count]);
        if its_lies.load(Ordering::Relaxed) && random.once_in(8) {
            into[random.below(count as u64) as usize] ^= 4;
        }
        count
    };
    let sim = Sim::new(Options {
        seed: 4,
        depth: 8,
        content: Content::Serve(Box::new(serve)),
        timing: Timing::Reaps(3),
        faults: Faults {
            rates: vec![
                (Fault::Short, 0.2),
                (Fault::Interrupted, 0.2),
                (Fault::Again, 0.2),
            ],
            at: Vec::new(),
        },
        log_reads_max: 0,
    });
    let integrity = Integrity::simulated(&matrices, &tiles);
    let all = tiles.len() as u32;
    let paths = vec![PathBuf::from("model.gguf")];
    let slots = slots(SLOTS, SLOT_BYTES);
    let mut store = Store::new(matrices, (tiles, ranges), paths, slots, Box::new(sim), 4)
        .with_integrity(integrity);
    let mut sweep = || {
        store.begin(0..all);
        while store.acquire()? > 0 {
            strips::inspect_acquired(&store);
            store.feed();
            store.release()?;
        }
        store.rows(1, &[5, 999, 40], |_, _| ())?;
        store.finish_sweep()
    };
    for _ in 0..2 {
        sweep().expect("such faults are mended");
    }
    lies.store(true, Ordering::Relaxed);
    let mut mended = 0;
    for _ in 0..60 {
        let before = allocations();
        counted(true);
        drop(std::hint::black_box(Box::new(1)));
        let swept = sweep();
        counted(false);
        // Two wrong reads of one tile in a row are an error, and errors may allocate.
        if swept.is_ok() {
            // The one box shows that the counter counts.
            assert_eq!(allocations() - before, 1);
            mended += 1;
        }
    }
    let doubted = store.counters().doubted;
    assert!(
        mended > 20 && doubted > 30,
        "{mended} sweeps, {doubted} tiles read again"
    );
}
