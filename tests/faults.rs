//! The store when the disk misbehaves, from seeds: faults are injected below `trait Io`.
//!
//! [`Guard`] stands between the store and the simulated disk and knows, apart from the store's own books, which
//! memory is being read into and which is in use. So the two invariants are asserted from outside.
#![allow(unsafe_code)]

#[path = "support/random.rs"]
mod random;
#[path = "support/strips.rs"]
mod strips;
#[path = "support/store.rs"]
mod support;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use airstream::Result;
use airstream::format::tile::{self, Tile};
use airstream::io::sim::{Content, Fault, FaultAt, Faults, Options, Sim, Timing};
use airstream::io::{Completion, FileId, Full, Io, Read};
use airstream::store::integrity::Integrity;
use airstream::store::{RowBytes, Store};
use random::Random;
use support::{byte_at, matrices, slots};

const SLOT_BYTES: usize = 8 << 10;
const ROWS: [usize; 5] = [16, 300, 112, 500, 64];
const COLS: usize = 64;
const MATRICES: usize = 8;

/// The simulated file: the matrices and a block beyond.
static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| (0..96 << 10).map(byte_at).collect());

/// What the disk does wrong at present that `Faults` cannot say; tests change it while the store runs.
#[derive(Default)]
struct Mood {
    /// One bit in every so many reads is wrong; 0 for none.
    flip_once_in: AtomicU32,
    /// The file ends here; 0 for where it should.
    end: AtomicU64,
}

/// Ranges of addresses.
#[derive(Default)]
struct Memory {
    /// Being read into, by token.
    reading: Vec<(u64, Range<usize>)>,
    /// Handed out by the store.
    in_use: Vec<Range<usize>>,
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

struct Guard {
    sim: Sim,
    memory: Arc<Mutex<Memory>>,
}

impl Io for Guard {
    unsafe fn submit(&mut self, read: Read) -> std::result::Result<(), Full> {
        let start = read.into.as_ptr() as usize;
        let target = start..start + read.len as usize;
        let mut memory = self.memory.lock().expect("no panic before");
        assert!(
            !memory.in_use.iter().any(|used| overlap(used, &target)),
            "a read into memory that is in use"
        );
        assert!(
            !memory
                .reading
                .iter()
                .any(|(_, other)| overlap(other, &target)),
            "two reads into the same memory"
        );
        memory.reading.push((read.token, target));
        // SAFETY: the caller's promise is passed on.
        unsafe { self.sim.submit(read) }
    }

    fn flush(&mut self) -> Result<()> {
        self.sim.flush()
    }

    fn reap(&mut self, done: &mut [Completion], wait: bool) -> Result<usize> {
        let count = self.sim.reap(done, wait)?;
        let mut memory = self.memory.lock().expect("no panic before");
        for completion in &done[..count] {
            let index = memory
                .reading
                .iter()
                .position(|(token, _)| *token == completion.token);
            memory
                .reading
                .swap_remove(index.expect("only what was submitted completes"));
        }
        Ok(count)
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

/// How a setup differs from the next.
struct Shape {
    slots: usize,
    window: u32,
    depth: usize,
    delay_max: u32,
}

const SHAPE: Shape = Shape {
    slots: 10,
    window: 3,
    depth: 4,
    delay_max: 3,
};

struct Setup {
    store: Store,
    memory: Arc<Mutex<Memory>>,
    mood: Arc<Mood>,
    tiles: Vec<Tile>,
    ranges: Vec<Range<u32>>,
}

fn setup(seed: u64, shape: Shape, faults: Faults) -> Setup {
    let matrices = matrices(MATRICES, &ROWS, COLS);
    let (tiles, ranges) = tile::cut(&matrices, SLOT_BYTES);
    let mood = Arc::new(Mood::default());
    let (its_mood, mut random) = (mood.clone(), Random(!seed));
    let serve = move |_, offset: u64, into: &mut [u8]| {
        let end = match its_mood.end.load(Ordering::Relaxed) {
            0 => FILE.len(),
            end => end as usize,
        };
        let from = (offset as usize).min(end);
        let count = into.len().min(end - from);
        into[..count].copy_from_slice(&FILE[from..from + count]);
        let flip_once_in = its_mood.flip_once_in.load(Ordering::Relaxed);
        if flip_once_in > 0 && count > 0 && random.once_in(flip_once_in.into()) {
            into[random.below(count as u64) as usize] ^= 1 << random.below(8);
        }
        count
    };
    let sim = Sim::new(Options {
        seed,
        depth: shape.depth,
        content: Content::Serve(Box::new(serve)),
        timing: Timing::Reaps(shape.delay_max),
        faults,
        log_reads_max: 0,
    });
    let memory = Arc::new(Mutex::new(Memory::default()));
    let integrity = Integrity::simulated(&matrices, &tiles);
    let store = Store::new(
        matrices,
        (tiles.clone(), ranges.clone()),
        vec![PathBuf::from("model.gguf")],
        slots(shape.slots, SLOT_BYTES),
        Box::new(Guard {
            sim,
            memory: memory.clone(),
        }),
        shape.window,
    )
    .with_integrity(integrity);
    Setup {
        store,
        memory,
        mood,
        tiles,
        ranges,
    }
}

impl Setup {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().expect("no panic before")
    }

    /// The tiles that are handed out and hold the file's bytes; packed ones must.
    fn right_ones(&self) -> Vec<u32> {
        let right = |&tile: &u32| {
            let what = &self.tiles[tile as usize];
            let memory = self.store.memory(tile);
            // SAFETY: the tile is handed out, so its rows are in memory and nobody writes them.
            let bytes =
                unsafe { std::slice::from_raw_parts(memory.data.as_ptr(), what.bytes as usize) };
            let right = bytes == &FILE[what.offset as usize..][..bytes.len()];
            assert!(right || !memory.packed, "tile {tile} was not looked at");
            right
        };
        self.store
            .acquired()
            .iter()
            .copied()
            .filter(right)
            .collect()
    }

    /// One pass; checks what it hands out before and after the disk goes on.
    fn pass(&mut self, range: Range<u32>, mut feeds: impl FnMut() -> u64) -> Result<()> {
        self.store.begin(range.clone());
        let mut done = Vec::new();
        while self.store.acquire()? > 0 {
            {
                let mut memory = self.memory();
                for &tile in self.store.acquired() {
                    let start = self.store.memory(tile).data.as_ptr() as usize;
                    let used = start..start + self.tiles[tile as usize].bytes as usize;
                    assert!(
                        !memory
                            .reading
                            .iter()
                            .any(|(_, reading)| overlap(reading, &used)),
                        "a tile was handed out while it was being read"
                    );
                    memory.in_use.push(used);
                }
            }
            let right = self.right_ones();
            strips::inspect_acquired(&self.store);
            for _ in 0..feeds() {
                self.store.feed();
            }
            assert_eq!(right, self.right_ones(), "a tile in use was changed");
            done.extend(right);
            let handed_out = self.store.acquired().len();
            let mut memory = self.memory();
            let left = memory.in_use.len() - handed_out;
            memory.in_use.truncate(left);
            drop(memory);
            self.store.release()?;
        }
        done.sort_unstable();
        assert!(done.into_iter().eq(range), "each tile once as it should be");
        Ok(())
    }

    fn sweep(&mut self) -> Result<()> {
        for first in (0..MATRICES).step_by(3) {
            let last = (first + 3).min(MATRICES) - 1;
            self.pass(self.ranges[first].start..self.ranges[last].end, || 1)?;
        }
        self.store.finish_sweep()
    }

    /// Reads some rows of a matrix and checks them.
    fn rows(&mut self, matrix: usize, rows: &[u32]) -> Result<()> {
        let what = self.store.matrices()[matrix].clone();
        let mut seen = 0;
        self.store.rows(matrix, rows, |index, row| {
            let bytes = match row {
                RowBytes::Plain(bytes) => bytes,
                // Nobody packs here, so a strip that may be packed is as it was read.
                RowBytes::Packed { strip, lane } => {
                    &strip[lane * what.row_bytes()..][..what.row_bytes()]
                }
                RowBytes::OnDevice(_) => panic!("there is no device"),
            };
            let offset = what.offset as usize + rows[index] as usize * what.row_bytes();
            assert!(bytes == &FILE[offset..][..what.row_bytes()], "a wrong row");
            seen += 1;
        })?;
        assert_eq!(seen, rows.len());
        Ok(())
    }

    /// Every slot is somewhere: all that pages may have can be had.
    fn check_slots(&mut self, slots: usize, window: u32) {
        let needed = window.min(self.tiles.len() as u32) as usize;
        let mut pages = Vec::new();
        while self.store.pages_free() > 0 {
            pages.push(self.store.take_page().expect("pages are free"));
        }
        assert_eq!(pages.len(), slots - 1 - needed, "a slot was lost");
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len(), slots - 1 - needed, "a slot was given twice");
    }
}

/// What came of some schedules, to see that they cover what they are for.
#[derive(Debug, Default)]
struct Seen {
    errors: u64,
    doubted: u64,
    cancelled: u64,
    pages: u64,
    finished: u64,
}

/// One random schedule of completions, errors, pages and cancelled passes.
fn schedule(seed: u64, seen: &mut Seen) {
    let mut random = Random(seed);
    let window = 1 + random.below(5) as u32;
    let slot_count = window as usize + 2 + random.below(20) as usize;
    let shape = Shape {
        slots: slot_count,
        window,
        depth: 1 + random.below(8) as usize,
        delay_max: random.below(6) as u32,
    };
    let rate = |random: &mut Random, most: u64| random.below(most) as f64 / 100.0;
    let rates = vec![
        (Fault::Short, rate(&mut random, 30)),
        (Fault::Interrupted, rate(&mut random, 20)),
        (Fault::Again, rate(&mut random, 20)),
        (Fault::Io, rate(&mut random, 4)),
    ];
    let mut setup = setup(
        seed,
        shape,
        Faults {
            rates,
            at: Vec::new(),
        },
    );
    // Checksums are learnt from a disk that gives errors, but tells no lies.
    while let Err(error) = setup.sweep() {
        seen.errors += 1;
        assert!(error.to_string().contains("model.gguf"), "{error}");
    }
    let flip_once_in = if random.once_in(2) {
        1 + random.below(30) as u32
    } else {
        0
    };
    let mut pages: Vec<(u32, Range<usize>)> = Vec::new();
    let mut sweep_at = 0;
    for _ in 0..30 {
        setup
            .mood
            .flip_once_in
            .store(flip_once_in, Ordering::Relaxed);
        match random.below(10) {
            0 if setup.store.pages_free() > 0 => {
                let page = setup.store.take_page().expect("pages are free");
                let start = setup.store.page(page);
                // SAFETY: the page is ours until it is given back.
                unsafe { start.as_ptr().write_bytes(page as u8, SLOT_BYTES) };
                let range = start.as_ptr() as usize..start.as_ptr() as usize + SLOT_BYTES;
                let mut memory = setup.memory();
                assert!(!memory.reading.iter().any(|(_, r)| overlap(r, &range)));
                memory.in_use.insert(0, range.clone());
                drop(memory);
                pages.push((page, range));
                seen.pages += 1;
            }
            1 if !pages.is_empty() => {
                let (page, range) = pages.swap_remove(random.below(pages.len() as u64) as usize);
                // SAFETY: as above; it is given back only below.
                let bytes = unsafe {
                    std::slice::from_raw_parts(setup.store.page(page).as_ptr(), SLOT_BYTES)
                };
                assert!(
                    bytes.iter().all(|&b| b == page as u8),
                    "a page was overwritten"
                );
                setup.memory().in_use.retain(|used| *used != range);
                setup.store.free_page(page);
            }
            2 => {
                let matrix = random.below(MATRICES as u64) as usize;
                let rows = setup.store.matrices()[matrix].rows as u64;
                let wanted: Vec<u32> = (0..1 + random.below(40))
                    .map(|_| random.below(rows) as u32)
                    .collect();
                seen.errors += u64::from(setup.rows(matrix, &wanted).is_err());
            }
            3 => {
                // The sweep is cancelled between two passes, and the next one begins at the front.
                sweep_at = 0;
                seen.cancelled += 1;
            }
            _ => {
                let last = (sweep_at + random.below(3) as usize).min(MATRICES - 1);
                let range = setup.ranges[sweep_at].start..setup.ranges[last].end;
                sweep_at = (last + 1) % MATRICES;
                match setup.pass(range, || random.below(4)) {
                    Ok(()) => seen.finished += 1,
                    Err(error) => {
                        let text = error.to_string();
                        assert!(text.contains("model.gguf") && text.contains(" m"), "{text}");
                        seen.errors += 1;
                        sweep_at = 0;
                    }
                }
            }
        }
    }
    seen.doubted += setup.store.counters().doubted;
    for (page, _) in pages.drain(..) {
        setup.store.free_page(page);
    }
    setup.memory().in_use.clear();
    setup.check_slots(slot_count, window);
}

#[test]
fn the_slot_invariants_hold_under_ten_thousand_random_schedules() {
    const SCHEDULES: u64 = 10_000;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let run = |thread: u64| {
        let mut seen = Seen::default();
        for seed in (thread..SCHEDULES).step_by(threads as usize) {
            schedule(seed, &mut seen);
        }
        seen
    };
    let run = &run;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || run(thread)))
            .collect();
        for thread in threads {
            let seen = thread.join().expect("no invariant is broken");
            println!("{seen:?}");
            for count in [
                seen.errors,
                seen.doubted,
                seen.cancelled,
                seen.pages,
                seen.finished,
            ] {
                assert!(count > 100, "such schedules show nothing: {seen:?}");
            }
        }
    });
}

#[test]
fn a_flipped_bit_is_healed_by_reading_again() {
    let (mut doubted, mut failures) = (0, 0);
    for seed in 0..50 {
        let mut setup = setup(seed, SHAPE, Faults::default());
        setup.sweep().expect("a sound disk");
        // Each read is wrong with this chance, so now and then two in a row are, which is an error.
        setup.mood.flip_once_in.store(20, Ordering::Relaxed);
        failures += (0..10).filter(|_| setup.sweep().is_err()).count() as u64;
        doubted += setup.store.counters().doubted;
        setup.mood.flip_once_in.store(0, Ordering::Relaxed);
        setup.sweep().expect("the disk is sound again");
    }
    assert!(
        doubted > 50 && failures < doubted / 5,
        "{doubted} tiles were read again, {failures} sweeps failed"
    );
}

#[test]
fn bytes_that_stay_wrong_are_an_error_that_names_file_offset_and_tensor() {
    let mut setup = setup(1, SHAPE, Faults::default());
    setup.sweep().expect("a sound disk");
    setup.mood.flip_once_in.store(1, Ordering::Relaxed);
    let error = (0..20)
        .find_map(|_| setup.sweep().err())
        .expect("every read is wrong");
    let text = error.to_string();
    let named = setup.tiles.iter().any(|tile| {
        text.contains(&format!(
            "m{} at offset {} of model.gguf",
            tile.matrix, tile.offset
        ))
    });
    assert!(named && text.contains("checksum"), "{text}");
    setup.mood.flip_once_in.store(0, Ordering::Relaxed);
    setup.sweep().expect("the disk is sound again");
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_no_endless_loop() {
    for cut in [0, 1, 100, 512, 4095] {
        let mut setup = setup(1, SHAPE, Faults::default());
        setup.sweep().expect("a sound disk");
        let end = setup.tiles[9].offset / 4096 * 4096 + 4096 + cut;
        setup.mood.end.store(end, Ordering::Relaxed);
        let error = (0..3)
            .find_map(|_| setup.sweep().err())
            .expect("the end is missing");
        assert!(
            error.to_string().contains("the file ends before it"),
            "{error}"
        );
        let matrix = setup.store.matrices().len() - 1;
        let error = setup
            .rows(matrix, &[60])
            .expect_err("its end is missing too");
        assert!(error.to_string().contains("m7"), "{error}");
        setup.mood.end.store(0, Ordering::Relaxed);
        setup.sweep().expect("the file is whole again");
        setup
            .rows(matrix, &[60, 3])
            .expect("the file is whole again");
    }
}

#[test]
fn storms_pass_and_a_kernel_that_only_says_again_is_an_error() {
    for fault in [Fault::Interrupted, Fault::Again] {
        let rates = |rate| Faults {
            rates: vec![(fault, rate)],
            at: Vec::new(),
        };
        let mut stormy = setup(5, SHAPE, rates(0.7));
        for _ in 0..3 {
            stormy.sweep().expect("most reads come through in the end");
            stormy
                .rows(3, &[0, 77, 499])
                .expect("most reads come through in the end");
        }
        let mut stuck = setup(5, SHAPE, rates(1.0));
        let error = stuck
            .sweep()
            .expect_err("no read ever comes through")
            .to_string();
        assert!(error.contains("model.gguf"), "{error}");
    }
}

#[test]
fn an_error_ahead_of_the_sweep_matters_only_when_its_tile_is_needed() {
    let m = matrices(MATRICES, &ROWS, COLS);
    // In the middle of a matrix: its ends share blocks with their neighbours.
    let at = m[3].offset + 9000;
    let broken = |times| Faults {
        rates: Vec::new(),
        at: vec![FaultAt {
            file: FileId(0),
            range: at..at + 1,
            fault: Fault::Io,
            times,
        }],
    };
    // Everything fits, so the first pass reads all ahead; the error strikes while nobody waits for that tile.
    let roomy = Shape {
        slots: 40,
        depth: 32,
        ..SHAPE
    };
    let mut healed = setup(2, roomy, broken(1));
    healed
        .pass(healed.ranges[0].clone(), || 50)
        .expect("its own tiles are sound");
    for _ in 0..2 {
        healed
            .sweep()
            .expect("the tile is read again when it is needed");
    }
    let roomy = Shape {
        slots: 40,
        depth: 32,
        ..SHAPE
    };
    let mut broken = setup(2, roomy, broken(u32::MAX));
    broken
        .pass(broken.ranges[0].clone(), || 50)
        .expect("its own tiles are sound");
    let error = broken
        .sweep()
        .expect_err("the tile is needed now")
        .to_string();
    assert!(
        error.contains("m3") && error.contains("model.gguf"),
        "{error}"
    );
}

#[test]
fn one_failed_batch_of_rows_leaves_nothing_behind() {
    let m = matrices(MATRICES, &ROWS, COLS);
    let end = m[1].offset + m[1].bytes();
    let faults = Faults {
        rates: Vec::new(),
        at: vec![FaultAt {
            file: FileId(0),
            range: m[1].offset..end,
            fault: Fault::Io,
            times: 5,
        }],
    };
    let mut setup = setup(3, Shape { depth: 2, ..SHAPE }, faults);
    let wanted = [0, 50, 100, 150, 200, 250, 299];
    let mut errors = 0;
    while let Err(error) = setup.rows(1, &wanted) {
        errors += 1;
        assert!(error.to_string().contains("m1"), "{error}");
    }
    assert!((1..=5).contains(&errors), "{errors} errors for 5 bad reads");
    setup.sweep().expect("the disk is sound again");
}
