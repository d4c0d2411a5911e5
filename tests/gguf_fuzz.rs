//! Damaged and hostile GGUF files: an error or a correct load, never a panic, never memory that the
//! file's size does not justify. (A hang would hang the test.)
#![allow(unsafe_code)]

#[path = "support/gguf_sample.rs"]
mod gguf_sample;
#[path = "support/gguf_writer.rs"]
mod gguf_writer;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;
use std::path::Path;

use airstream::format::gguf::Gguf;
use gguf_sample::sample;
use gguf_writer::array;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

thread_local! {
    /// Heap bytes of this thread: now, and the most since the last reset.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

fn count(change: isize) {
    // At the end of a thread its counters are gone, and nobody asks for them any more.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are those of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above, and `at` came from `System`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Opens a file with these bytes in `folder`. If it loads, everything in it can be read and holds.
/// Whether it loads or not, the heap in use stays within a small multiple of the file.
fn open(folder: &Path, bytes: &[u8]) -> Result<(), String> {
    let path = folder.join("model.gguf");
    write_in_place(&path, bytes);
    let before = LIVE.get();
    PEAK.set(before);
    let result = Gguf::open(&path);
    let used = PEAK.get() - before;
    assert!(
        used < 16 * 1024 + 32 * bytes.len() as isize,
        "{used} bytes of heap"
    );
    let gguf = result.map_err(|error| error.to_string())?;
    read_everything(&gguf);
    let mut places: Vec<_> = gguf
        .tensors()
        .iter()
        .map(|t| (t.offset, t.offset + t.bytes))
        .collect();
    places.sort_unstable();
    assert!(
        places.windows(2).all(|w| w[0].1 <= w[1].0),
        "overlap: {places:?}"
    );
    assert!(
        places.iter().all(|place| place.1 <= bytes.len() as u64),
        "outside: {places:?}"
    );
    for tensor in gguf.tensors() {
        assert_eq!(tensor.bytes, (tensor.rows * tensor.row_bytes()) as u64);
        assert_eq!(gguf.tensor(&tensor.name), Some(tensor));
    }
    Ok(())
}

/// Writes a file without emptying it first, after which ext4 would wait for the disk at each close.
fn write_in_place(path: &Path, bytes: &[u8]) {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

/// Calls every reader on every key; which of them fail is not of interest here.
fn read_everything(gguf: &Gguf) {
    for (key, value) in gguf.keys() {
        let _ = value.to_string();
        let _ = (gguf.u32(key), gguf.f32(key), gguf.bool(key), gguf.str(key));
        if let Ok(Some(array)) = gguf.array(key) {
            let counts = [
                array.strings().map(Iterator::count),
                array.u32s().map(Iterator::count),
                array.f32s().map(Iterator::count),
                array.bools().map(Iterator::count),
            ];
            assert!(
                counts
                    .into_iter()
                    .flatten()
                    .all(|count| count == array.len())
            );
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = sample().to_bytes();
    open(folder.path(), &whole).unwrap();
    for len in 0..whole.len() {
        assert!(
            open(folder.path(), &whole[..len]).is_err(),
            "cut to {len} bytes"
        );
    }
}

/// Also finds the places where a number is a length or a count without naming them.
#[test]
fn a_huge_number_anywhere_is_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let whole = sample().to_bytes();
    for at in 0..sample().header().len() {
        for number in [u64::MAX, 1 << 62, 1 << 40, u64::from(u32::MAX), 1 << 16, 0] {
            let mut bytes = whole.clone();
            let end = (at + 8).min(bytes.len());
            bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            let _ = open(folder.path(), &bytes);
        }
    }
}

#[test]
fn huge_counts_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for huge in [u64::MAX, u64::MAX / 8, 1 << 40, 1 << 17] {
        let mut tensors = sample().to_bytes();
        tensors[8..16].copy_from_slice(&huge.to_le_bytes());
        assert!(
            open(folder.path(), &tensors)
                .unwrap_err()
                .contains("tensors")
        );
        let mut entries = sample().to_bytes();
        entries[16..24].copy_from_slice(&huge.to_le_bytes());
        assert!(
            open(folder.path(), &entries)
                .unwrap_err()
                .contains("metadata entries")
        );
        for element_type in 0..13 {
            let mut file = sample();
            file.entry("big", 9, &array(element_type, huge, &[]));
            let error = open(folder.path(), &file.to_bytes()).unwrap_err();
            assert!(error.contains("\"big\""), "{error}");
        }
        let mut file = sample();
        file.entry("long", 8, &huge.to_le_bytes());
        let error = open(folder.path(), &file.to_bytes()).unwrap_err();
        assert!(error.contains("\"long\""), "{error}");
    }
}

/// A change somewhere in a file; places are taken modulo its length.
#[derive(Debug, Clone)]
enum Mutation {
    Byte(usize, u8),
    U32(usize, u32),
    U64(usize, u64),
    Cut(usize),
    Remove(usize, usize),
    Repeat(usize, usize),
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        let mut put = |at: usize, new: &[u8]| {
            for (i, &byte) in new.iter().enumerate() {
                bytes[(at + i) % len] = byte;
            }
        };
        match *self {
            Mutation::Byte(at, value) => put(at, &[value]),
            Mutation::U32(at, value) => put(at, &value.to_le_bytes()),
            Mutation::U64(at, value) => put(at, &value.to_le_bytes()),
            Mutation::Cut(at) => bytes.truncate(at % len),
            Mutation::Remove(at, count) => {
                let at = at % len;
                bytes.drain(at..(at + count).min(len));
            }
            Mutation::Repeat(at, count) => {
                let at = at % len;
                let again = bytes[at..(at + count).min(len)].to_vec();
                bytes.splice(at..at, again);
            }
        }
    }
}

fn mutation(header_bytes: usize) -> impl Strategy<Value = Mutation> {
    // Mostly in the header; the data behind it is not looked at.
    let at = 0..header_bytes + 64;
    let small = prop_oneof![0u64..70, any::<u64>().prop_map(|n| n >> (n % 64))];
    prop_oneof![
        4 => (at.clone(), any::<u8>()).prop_map(|(at, v)| Mutation::Byte(at, v)),
        3 => (at.clone(), small.clone()).prop_map(|(at, v)| Mutation::U32(at, v as u32)),
        3 => (at.clone(), small).prop_map(|(at, v)| Mutation::U64(at, v)),
        1 => any::<usize>().prop_map(Mutation::Cut),
        1 => (at.clone(), 1usize..40).prop_map(|(at, n)| Mutation::Remove(at, n)),
        1 => (at, 1usize..40).prop_map(|(at, n)| Mutation::Repeat(at, n)),
    ]
}

#[test]
fn ten_thousand_random_mutations_are_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let whole = sample().to_bytes();
    let mutations = proptest::collection::vec(mutation(sample().header().len()), 1..4);
    let config = Config {
        cases: 10_000,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let loaded = Cell::new(0);
    TestRunner::new_with_rng(config, rng)
        .run(&mutations, |mutations| {
            let mut bytes = whole.clone();
            for mutation in &mutations {
                mutation.apply(&mut bytes);
            }
            loaded.set(loaded.get() + i32::from(open(folder.path(), &bytes).is_ok()));
            Ok(())
        })
        .unwrap();
    // Both ends are met often enough for the test to mean something.
    assert!(
        (500..9_500).contains(&loaded.get()),
        "{} of 10000 loaded",
        loaded.get()
    );
}
