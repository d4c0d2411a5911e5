//! Every way to read gives the bytes of the file, whatever the system refuses.
#![allow(unsafe_code)]

#[path = "support/restrict.rs"]
mod restrict;

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use airstream::io::buffer::Buffer;
use airstream::io::{
    Access, Backend, Completion, Fate, FileId, Files, Full, Io, Read, choose, measure, open_model,
};

const BOTH: [Backend; 2] = [Backend::Uring, Backend::Pread];

/// Bytes that tell where they are from.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
        .collect()
}

/// A file of `len` patterned bytes in `dir`.
fn file_in(dir: &Path, len: usize) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir_in(dir).expect("a scratch folder");
    let (path, bytes) = (dir.path().join("model"), pattern(len));
    let mut file = File::create(&path).expect("a scratch file");
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .expect("space for a scratch file");
    (dir, path, bytes)
}

fn on_disk() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn open(path: &Path, access: Access) -> Arc<Files> {
    Arc::new(open_model(&[path.to_owned()], access).expect("the file opens"))
}

fn submit(io: &mut dyn Io, buffer: &Buffer, at: usize, offset: u64, len: u32) -> Result<(), Full> {
    assert!(at + len as usize <= buffer.bytes().len());
    let read = Read {
        file: FileId(0),
        offset,
        len,
        into: buffer.at(at),
        token: offset,
    };
    // SAFETY: the tests keep the buffer until the read is reaped or `io` dropped.
    unsafe { io.submit(read) }
}

/// Reads random aligned ranges, some past the end, and compares.
fn check_reads(io: &mut dyn Io, align: usize, bytes: &[u8], buffer: &mut Buffer, seed: u64) {
    let place_bytes = buffer.bytes().len() / io.depth();
    let mut random = seed;
    let mut below = |limit: usize| {
        random = random
            .wrapping_mul(0x5851_F42D_4C95_7F2D)
            .wrapping_add(0x1405_7B7E_F767_814F);
        (random >> 33) as usize % limit
    };
    for round in 0..20 {
        buffer.bytes_mut().fill(0xEE);
        let mut reads = Vec::new();
        for place in 0..io.depth() {
            // The last place of each round looks at the end of the file and beyond.
            let blocks = bytes.len().div_ceil(align) + 1;
            let block = if place + 1 == io.depth() {
                blocks - 1 - round % 2
            } else {
                below(blocks)
            };
            let len = (1 + below(place_bytes / align)) * align;
            let into = buffer.at(place * place_bytes);
            let offset = (block * align) as u64;
            let read = Read {
                file: FileId(0),
                offset,
                len: len as u32,
                into,
                token: place as u64,
            };
            // SAFETY: each place has one read, which is reaped before the buffer is looked at.
            unsafe { io.submit(read) }.expect("not more reads than the depth");
            reads.push((offset as usize, len));
        }
        assert_eq!(submit(io, buffer, 0, 0, align as u32), Err(Full));
        io.flush().expect("reads are taken");
        let mut done = vec![Completion::NONE; 3];
        let mut seen = vec![false; reads.len()];
        while io.in_flight() > 0 {
            let count = io.reap(&mut done, true).expect("reads finish");
            assert!(count > 0, "waiting brings at least one");
            for completion in &done[..count] {
                let place = completion.token as usize;
                assert!(
                    !std::mem::replace(&mut seen[place], true),
                    "each read finishes once"
                );
                let (offset, len) = reads[place];
                let expected = &bytes[offset.min(bytes.len())..(offset + len).min(bytes.len())];
                assert_eq!(
                    completion.result,
                    Ok(expected.len() as u32),
                    "at {offset} + {len}"
                );
                let got = &buffer.bytes()[place * place_bytes..][..expected.len()];
                assert!(got == expected, "wrong bytes at {offset} + {len}");
            }
        }
        assert!(seen.into_iter().all(|seen| seen));
        assert_eq!(
            io.reap(&mut done, true).expect("nothing can fail"),
            0,
            "nothing in flight, nothing to wait for"
        );
    }
}

#[test]
fn every_backend_reads_the_bytes_of_the_file() {
    let (_dir, path, bytes) = file_in(on_disk(), (3 << 20) + 4321);
    for backend in BOTH {
        for access in [Access::Direct, Access::Buffered] {
            for registered in [true, false] {
                let files = open(&path, access);
                let align = files.align() as usize;
                let mut buffer = Buffer::new(9 * (256 << 10));
                let regions = if registered {
                    vec![buffer.region()]
                } else {
                    Vec::new()
                };
                let mut io = backend.open(&files, &regions, 9).expect("a backend");
                let description = io.describe().to_owned();
                assert_eq!(
                    description.contains("buffered"),
                    !files.all_direct(),
                    "{description}"
                );
                check_reads(io.as_mut(), align, &bytes, &mut buffer, 7);
            }
        }
    }
}

#[test]
fn memory_file_systems_are_read_too() {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        eprintln!("skipped: no /dev/shm here");
        return;
    }
    let (_dir, path, bytes) = file_in(shm, (1 << 20) + 99);
    let files = open(&path, Access::Direct);
    for backend in BOTH {
        let mut buffer = Buffer::new(4 * (64 << 10));
        let mut io = backend
            .open(&files, &[buffer.region()], 4)
            .expect("a backend");
        check_reads(io.as_mut(), files.align() as usize, &bytes, &mut buffer, 8);
    }
}

#[test]
fn a_file_system_without_direct_reads_is_read_through_the_page_cache() {
    let files = open(Path::new("/proc/version"), Access::Direct);
    assert_eq!(files.get(FileId(0)).access(), Access::Buffered);
}

/// Pages of the file at `path` that the page cache holds.
fn cached_pages(path: &Path) -> usize {
    let file = File::open(path).expect("the file");
    // SAFETY: nobody writes to the file.
    let map = unsafe { memmap2::Mmap::map(&file) }.expect("a mapping");
    let mut pages = vec![0u8; map.len().div_ceil(4096)];
    // SAFETY: one byte for each page of the mapping.
    let rc = unsafe {
        libc::mincore(
            map.as_ptr().cast_mut().cast(),
            map.len(),
            pages.as_mut_ptr(),
        )
    };
    assert_eq!(rc, 0, "mincore");
    pages.iter().filter(|&&page| page & 1 == 1).count()
}

#[test]
fn no_read_leaves_the_page_cache_full() {
    let (_dir, path, bytes) = file_in(on_disk(), 32 << 20);
    let pages = bytes.len() / 4096;
    for access in [Access::Direct, Access::Buffered] {
        for backend in BOTH {
            let files = open(&path, Access::Buffered);
            let forget = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            nix::fcntl::posix_fadvise(files.get(FileId(0)), 0, 0, forget).expect("it is advice");
            let before = cached_pages(&path);
            if before > pages / 8 {
                eprintln!("skipped: this file system keeps {before} of {pages} pages anyway");
                return;
            }
            let files = open(&path, access);
            let buffer = Buffer::new(32 << 20);
            let mut io = backend
                .open(&files, &[buffer.region()], 8)
                .expect("a backend");
            let mut done = [Completion::NONE; 8];
            for offset in (0..32u64).map(|mib| mib << 20) {
                let at = offset as usize;
                while submit(io.as_mut(), &buffer, at, offset, 1 << 20).is_err() {
                    io.reap(&mut done, true).expect("reads finish");
                }
            }
            while io.in_flight() > 0 {
                io.reap(&mut done, true).expect("reads finish");
            }
            let cached = cached_pages(&path);
            assert!(
                cached <= pages / 8,
                "{access:?} {backend:?}: {cached} of {pages} pages"
            );
        }
    }
}

#[test]
fn several_files_keep_their_numbers() {
    let (_a, first, _) = file_in(on_disk(), 8192);
    let (_b, second, _) = file_in(on_disk(), 4096);
    std::fs::write(&second, vec![0x42; 4096]).expect("a scratch file");
    let files = Arc::new(open_model(&[first, second], Access::Direct).expect("both open"));
    assert_eq!(
        files.iter().map(|(_, file)| file.len()).collect::<Vec<_>>(),
        [8192, 4096]
    );
    for backend in BOTH {
        let buffer = Buffer::new(4096);
        let mut io = backend.open(&files, &[], 1).expect("a backend");
        let read = Read {
            file: FileId(1),
            offset: 0,
            len: 4096,
            into: buffer.at(0),
            token: 5,
        };
        // SAFETY: reaped just below.
        unsafe { io.submit(read) }.expect("one fits");
        let mut done = [Completion::NONE];
        assert_eq!(
            io.reap(&mut done, true).expect("reads finish"),
            1,
            "waiting flushes"
        );
        assert_eq!(
            done[0],
            Completion {
                token: 5,
                result: Ok(4096)
            }
        );
        assert!(buffer.bytes().iter().all(|&byte| byte == 0x42));
    }
}

#[test]
fn finished_reads_turn_up_without_waiting() {
    let (_dir, path, _) = file_in(on_disk(), 1 << 20);
    let files = open(&path, Access::Direct);
    for backend in BOTH {
        let buffer = Buffer::new(1 << 20);
        let mut io = backend
            .open(&files, &[buffer.region()], 16)
            .expect("a backend");
        for i in 0..16 {
            submit(io.as_mut(), &buffer, i << 16, (i as u64) << 16, 1 << 16).expect("it fits");
        }
        io.flush().expect("reads are taken");
        let mut done = [Completion::NONE; 16];
        let mut total = 0;
        let patience = std::time::Instant::now();
        while total < 16 {
            total += io.reap(&mut done, false).expect("reads finish");
            assert!(
                patience.elapsed() < Duration::from_secs(20),
                "{backend:?} lost a read"
            );
            std::hint::spin_loop();
        }
    }
}

#[test]
fn reads_survive_a_move_to_another_thread() {
    let (_dir, path, bytes) = file_in(on_disk(), 1 << 20);
    let files = open(&path, Access::Direct);
    for backend in BOTH {
        let mut buffer = Buffer::new(1 << 20);
        let mut io = backend
            .open(&files, &[buffer.region()], 8)
            .expect("a backend");
        submit(io.as_mut(), &buffer, 0, 0, 1 << 19).expect("it fits");
        io.flush().expect("reads are taken");
        let (files, bytes) = (files.clone(), bytes.clone());
        let thread = std::thread::spawn(move || {
            let mut done = [Completion::NONE; 8];
            assert_eq!(io.reap(&mut done, true).expect("reads finish"), 1);
            check_reads(io.as_mut(), files.align() as usize, &bytes, &mut buffer, 9);
        });
        thread.join().expect("no panic");
    }
}

#[test]
fn dropping_waits_for_reads_in_flight() {
    let (_dir, path, bytes) = file_in(on_disk(), 16 << 20);
    let files = open(&path, Access::Direct);
    for backend in BOTH {
        for _ in 0..5 {
            let buffer = Buffer::new(16 << 20);
            let mut io = backend
                .open(&files, &[buffer.region()], 32)
                .expect("a backend");
            for i in 0..31 {
                submit(io.as_mut(), &buffer, i << 19, (i as u64) << 19, 1 << 19).expect("it fits");
            }
            io.flush().expect("reads are taken");
            submit(io.as_mut(), &buffer, 31 << 19, 31 << 19, 1 << 19).expect("it fits");
            drop(io);
            let after = buffer.bytes().to_vec();
            std::thread::sleep(Duration::from_millis(30));
            assert!(
                after == buffer.bytes(),
                "{backend:?} wrote after it was dropped"
            );
            assert!(
                after[31 << 19..].iter().all(|&byte| byte == 0),
                "never flushed, never read"
            );
            if backend == Backend::Uring {
                assert!(
                    after[..31 << 19] == bytes[..31 << 19],
                    "what the kernel has, it finishes"
                );
            }
        }
    }
}

#[test]
fn a_file_that_changes_is_noticed() {
    let (_dir, path, bytes) = file_in(on_disk(), 64 << 10);
    let files = open(&path, Access::Direct);
    let file = files.get(FileId(0));
    assert_eq!(file.fate().expect("it is open"), Fate::Same);
    let other = path.with_extension("other");
    std::fs::write(&other, &bytes).expect("a scratch file");
    std::fs::rename(&other, &path).expect("a rename");
    assert_eq!(file.fate().expect("it is open"), Fate::Replaced);
    let files = open(&path, Access::Direct);
    File::options()
        .write(true)
        .open(&path)
        .and_then(|f| f.set_len(4096))
        .expect("a truncation");
    assert_eq!(
        files.get(FileId(0)).fate().expect("it is open"),
        Fate::Changed
    );
    for backend in BOTH {
        let buffer = Buffer::new(8192);
        let mut io = backend.open(&files, &[], 1).expect("a backend");
        submit(io.as_mut(), &buffer, 0, 0, 8192).expect("it fits");
        let mut done = [Completion::NONE];
        assert_eq!(io.reap(&mut done, true).expect("reads finish"), 1);
        assert_eq!(done[0].result, Ok(4096), "the rest is gone");
    }
}

#[test]
fn a_file_that_cannot_be_opened_is_named() {
    for (path, word) in [
        ("/nonexistent/model.gguf", "/nonexistent/model.gguf"),
        ("/", "regular"),
    ] {
        let e = open_model(&[path.into()], Access::Direct).expect_err("nothing to open");
        assert!(e.to_string().contains(word), "{e}");
    }
}

#[test]
fn measuring_reads_at_some_rate() {
    let (_dir, path, _) = file_in(on_disk(), 8 << 20);
    let budget = Duration::from_millis(60);
    for backend in BOTH {
        let found = measure::measure(&path, 1 << 18, 4, budget, Some(backend)).expect("a rate");
        assert!(
            found.bytes >= 4 << 18 && found.bytes_per_second() > 1e6,
            "{found:?}"
        );
    }
    let points = measure::sweep(&path, &[1 << 18, 1 << 20], &[1, 4, 16], budget, None);
    let points = points.expect("rates");
    assert_eq!(
        points.len(),
        5,
        "16 reads of 1 MiB are longer than the file"
    );
    assert!(measure::recommend(&points).is_some());
    let e = measure::measure(&path, 1 << 24, 1, budget, None).expect_err("too long a read");
    assert!(e.to_string().contains("smaller than one read"), "{e}");
}

/// What the tests below run in a child process, whose system refuses or disturbs something.
#[test]
fn child_reads_with_what_it_gets() {
    let Ok(path) = std::env::var("AIRSTREAM_TEST_CHILD_FILE") else {
        return;
    };
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Warn)
        .init();
    let storm = std::env::var_os("AIRSTREAM_TEST_CHILD_STORM").is_some();
    if storm {
        restrict::start_signal_storm();
    }
    let files = open(Path::new(&path), Access::Direct);
    let bytes = std::fs::read(&path).expect("the parent's file");
    let mut buffer = Buffer::new(1 << 20);
    let mut io = choose(&files, &[buffer.region()], 8, None)
        .expect("a backend")
        .0;
    println!("described as: {}", io.describe());
    check_reads(io.as_mut(), files.align() as usize, &bytes, &mut buffer, 10);
    let another = || {
        choose(&files, &[buffer.region()], 8, None)
            .expect("a backend")
            .0
    };
    println!("beside it: {}", another().describe());
    io.register(&[]);
    println!("in its place: {}", another().describe());
    io.register(&[buffer.region()]);
    println!("as before: {}", io.describe());
    check_reads(io.as_mut(), files.align() as usize, &bytes, &mut buffer, 12);
    drop(io);
    while storm && restrict::signals() < 500 {
        for backend in BOTH {
            let mut io = backend.open(&files, &[], 8).expect("a backend");
            check_reads(io.as_mut(), files.align() as usize, &bytes, &mut buffer, 11);
        }
    }
    println!("signals: {}", restrict::signals());
}

/// Runs the test above in a child that `restrict` was applied to, and returns all it said.
fn run_child(restrict: fn() -> std::io::Result<()>, storm: bool) -> String {
    let (_dir, path, _) = file_in(on_disk(), 1 << 20);
    let mut child = Command::new(std::env::current_exe().expect("this test"));
    child.args(["child_reads_with_what_it_gets", "--exact", "--nocapture"]);
    child.env("AIRSTREAM_TEST_CHILD_FILE", &path);
    if storm {
        child.env("AIRSTREAM_TEST_CHILD_STORM", "1");
    }
    // SAFETY: `restrict` makes system calls only, as a forked child may.
    unsafe { child.pre_exec(restrict) };
    let output = child.output().expect("the child runs");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

#[test]
fn without_io_uring_threads_read() {
    let said = run_child(restrict::forbid_io_uring, false);
    assert!(
        said.contains("described as: positioned reads on 8 threads"),
        "{said}"
    );
    assert!(
        said.contains("reading with threads instead"),
        "one log line: {said}"
    );
    assert!(
        said.contains("io_uring_disabled"),
        "with the remedy: {said}"
    );
}

#[test]
fn without_lockable_memory_buffers_stay_unregistered() {
    let said = run_child(restrict::forbid_locking, false);
    assert!(said.contains("unregistered buffers"), "{said}");
    assert!(said.contains("RLIMIT_MEMLOCK is 64 KiB"), "{said}");
}

#[test]
fn a_ring_lets_go_of_its_buffers_for_another() {
    // Enough for the buffer of one MiB once, with what old kernels count for the rings themselves.
    let said = run_child(|| restrict::lock_at_most(3 << 19), false);
    for (when, buffers) in [
        ("described as", "registered"),
        ("beside it", "unregistered"),
        ("in its place", "registered"),
        ("as before", "registered"),
    ] {
        let line = format!("{when}: io_uring, direct, {buffers} buffers");
        assert!(said.contains(&line), "{line}: {said}");
    }
}

#[test]
fn a_storm_of_signals_loses_no_read() {
    let said = run_child(|| Ok(()), true);
    assert!(
        said.contains("signals: ") && !said.contains("signals: 0"),
        "{said}"
    );
}
