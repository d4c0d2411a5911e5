//! The store under simulated disks: every tile arrives whole whatever happens, the bytes read are those that the
//! plan says, and the policy is as good as any can be.
#![allow(unsafe_code)]

#[path = "support/store.rs"]
mod support;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use airstream::format::tile::{self, Matrix, Tile};
use airstream::io::FileId;
use airstream::io::sim::{Content, Fault, FaultAt, Faults, Log, Options, Sim, Timing};
use airstream::residency::Residency;
use airstream::store::{RowBytes, Store};
use support::byte_at;

const SLOT_BYTES: usize = 64 << 10;

fn content() -> Content {
    Content::Serve(Box::new(|_, offset, into| {
        for (i, byte) in into.iter_mut().enumerate() {
            *byte = byte_at(offset + i as u64);
        }
        into.len()
    }))
}

fn matrices(count: usize) -> Vec<Matrix> {
    support::matrices(count, &[64, 1000, 256, 16, 400], 512)
}

struct Setup {
    store: Store,
    log: Arc<Mutex<Log>>,
    tiles: Vec<Tile>,
    ranges: Vec<Range<u32>>,
}

fn setup(matrices: Vec<Matrix>, slots: usize, window: u32, seed: u64, faults: Faults) -> Setup {
    let (tiles, ranges) = tile::cut(&matrices, SLOT_BYTES);
    let sim = Sim::new(Options {
        seed,
        depth: 8,
        content: content(),
        timing: Timing::Reaps(3),
        faults,
        log_reads_max: 0,
    });
    let log = sim.log();
    let paths = vec![PathBuf::from("model.gguf")];
    let store = Store::new(
        matrices,
        (tiles.clone(), ranges.clone()),
        paths,
        support::slots(slots, SLOT_BYTES),
        Box::new(sim),
        window,
    );
    Setup {
        store,
        log,
        tiles,
        ranges,
    }
}

/// Checks every byte of a tile that the store hands out.
fn check(store: &Store, tile: u32, what: &Tile) {
    let memory = store.memory(tile);
    // SAFETY: the tile is handed out, so its rows are in memory and nobody writes them.
    let bytes = unsafe { std::slice::from_raw_parts(memory.data.as_ptr(), what.bytes as usize) };
    for (i, &byte) in bytes.iter().enumerate() {
        assert_eq!(
            byte,
            byte_at(what.offset + i as u64),
            "tile {tile}, byte {i}"
        );
    }
}

/// One sweep over groups of matrices; every tile must be handed out exactly once and whole.
fn sweep(setup: &mut Setup) -> airstream::Result<()> {
    for group in [0..3, 3..4, 4..5, 5..setup.ranges.len()] {
        let range = setup.ranges[group.start].start..setup.ranges[group.end - 1].end;
        setup.store.begin(range.clone());
        let mut seen = vec![false; range.len()];
        while setup.store.acquire()? > 0 {
            for &tile in setup.store.acquired() {
                assert!(
                    !std::mem::replace(&mut seen[(tile - range.start) as usize], true),
                    "tile {tile} came twice"
                );
                check(&setup.store, tile, &setup.tiles[tile as usize]);
            }
            setup.store.feed();
            for &tile in setup.store.acquired() {
                check(&setup.store, tile, &setup.tiles[tile as usize]);
            }
            setup.store.release()?;
        }
        assert!(seen.iter().all(|s| *s), "a tile of {range:?} never came");
    }
    Ok(())
}

#[test]
fn every_tile_arrives_whole_under_short_reads_and_interruptions() {
    for seed in 0..150 {
        let faults = Faults {
            rates: vec![
                (Fault::Short, 0.2),
                (Fault::Interrupted, 0.1),
                (Fault::Again, 0.1),
            ],
            at: Vec::new(),
        };
        let slots = 10 + seed as usize % 60;
        let mut setup = setup(matrices(9), slots, 4, seed, faults);
        for _ in 0..3 {
            sweep(&mut setup).expect("such faults are retried");
        }
    }
}

#[test]
fn a_broken_disk_gives_an_error_that_names_the_tensor_and_the_next_pass_works() {
    for seed in 0..50 {
        let m = matrices(9);
        // Beyond the first block, which the matrix before shares.
        let at = m[4].offset + 8192;
        let faults = Faults {
            rates: vec![(Fault::Short, 0.2)],
            at: vec![FaultAt {
                file: FileId(0),
                range: at..at + 1,
                fault: Fault::Io,
                // Ahead of the sweep an error is forgotten; the second read is the one that is waited for.
                times: 2,
            }],
        };
        let mut setup = setup(m, 24, 4, seed, faults);
        let error = sweep(&mut setup)
            .expect_err("the disk is broken")
            .to_string();
        assert!(
            error.contains("m4") && error.contains("model.gguf"),
            "{error}"
        );
        for _ in 0..2 {
            sweep(&mut setup).expect("the fault is gone");
        }
    }
}

#[test]
fn bytes_read_per_sweep_are_what_the_plan_says_and_the_best_there_can_be() {
    let tiles_in_all = tile::cut(&matrices(40), SLOT_BYTES).0.len();
    for percent in [25, 40, 60, 80, 100] {
        let window = 4;
        let slots = 1 + (tiles_in_all * percent / 100).max(8);
        let mut setup = setup(matrices(40), slots, window, 7, Faults::default());
        sweep(&mut setup).expect("no faults");
        sweep(&mut setup).expect("no faults");
        let before = setup.log.lock().expect("log").bytes;
        const SWEEPS: u64 = 5;
        for _ in 0..SWEEPS {
            sweep(&mut setup).expect("no faults");
        }
        let read = setup.log.lock().expect("log").bytes - before;
        let planned: u64 = setup
            .store
            .residency()
            .streamed()
            .map(|t| setup.tiles[t as usize].read_bytes() as u64)
            .sum();
        // Reads ahead for the sweep after the last are a window at most, and were so before the first.
        let slack = u64::from(window + 8) * SLOT_BYTES as u64;
        assert!(
            read.abs_diff(SWEEPS * planned) <= slack,
            "{percent}%: read {read}, planned {SWEEPS} x {planned}"
        );
        if percent == 100 {
            assert_eq!(read, 0, "a model that fits is read once");
        }
        // The optimum for a cyclic order keeps a fixed set that fills all slots but those that reads pass through.
        let kept = setup.tiles.len() as u32 - setup.store.residency().given_up();
        assert_eq!(
            kept,
            (slots as u32 - 1 - if percent == 100 { 0 } else { window }).min(tiles_in_all as u32)
        );
    }
}

#[test]
fn hit_share_is_within_a_percent_of_the_optimum() {
    // A cyclic order of N equal tiles in C slots: no policy hits more than C of N (Belady); ours loses its window.
    let tiles = 4000;
    for capacity in [400, 1600, 2400, 3600] {
        let plan = Residency::new(&vec![1.0; tiles], capacity, 16);
        let hits = f64::from(tiles as u32 - plan.given_up()) / tiles as f64;
        assert!(
            hits > f64::from(capacity) / tiles as f64 - 0.01,
            "{capacity}"
        );
    }
}

#[test]
fn pages_take_the_slots_of_tiles_and_give_them_back() {
    let all = tile::cut(&matrices(20), SLOT_BYTES).0.len();
    let mut setup = setup(matrices(20), all + 1, 4, 3, Faults::default());
    sweep(&mut setup).expect("fits");
    let mut pages = Vec::new();
    while setup.store.pages_free() > 0 {
        pages.push(setup.store.take_page().expect("pages are free"));
        if pages.len() % 7 == 0 {
            sweep(&mut setup).expect("a smaller pool works");
        }
    }
    assert!(
        setup.store.take_page().is_err(),
        "the window is never given away"
    );
    let unique: std::collections::BTreeSet<_> = pages.iter().collect();
    assert_eq!(unique.len(), pages.len(), "a slot was given twice");
    sweep(&mut setup).expect("the smallest pool works");
    for page in pages {
        setup.store.free_page(page);
    }
    sweep(&mut setup).expect("all fits again");
    sweep(&mut setup).expect("all fits again");
    let before = setup.log.lock().expect("log").bytes;
    sweep(&mut setup).expect("all fits again");
    assert_eq!(
        setup.log.lock().expect("log").bytes,
        before,
        "the tiles did not come back"
    );
}

#[test]
fn rows_come_from_tiles_or_from_disk() {
    let faults = Faults {
        rates: vec![(Fault::Short, 0.3), (Fault::Interrupted, 0.1)],
        at: Vec::new(),
    };
    let mut setup = setup(matrices(9), 20, 4, 11, faults);
    let wanted: Vec<u32> = (0..150).map(|i| i * 37 % 1000).collect();
    for _ in 0..3 {
        let matrix = setup.store.matrices()[1].clone();
        let mut seen = 0;
        let given = wanted.clone();
        setup
            .store
            .rows(1, &given, |index, row| {
                let RowBytes::Plain(bytes) = row else {
                    panic!("nothing was packed")
                };
                let offset = matrix.offset + u64::from(wanted[index]) * matrix.row_bytes() as u64;
                assert_eq!(bytes.len(), matrix.row_bytes());
                assert!(
                    bytes
                        .iter()
                        .enumerate()
                        .all(|(i, b)| *b == byte_at(offset + i as u64))
                );
                seen += 1;
            })
            .expect("such faults are retried");
        assert_eq!(seen, wanted.len());
        // Between the rounds some tiles come into memory; they are handed back unpacked only if they do not stay.
        setup.store.begin(setup.ranges[0].clone());
        while setup.store.acquire().expect("retried") > 0 {
            setup.store.release().expect("nothing is verified");
        }
    }
}
