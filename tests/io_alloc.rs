//! No read allocates: not when submitted, not when flushed, not when reaped.
#![allow(unsafe_code)]

#[path = "support/counting.rs"]
mod counting;

use std::path::Path;
use std::sync::Arc;

use airstream::io::buffer::Buffer;
use airstream::io::sim::{Content, Fault, Faults, Options, Sim, Timing};
use airstream::io::{Access, Backend, Completion, FileId, Io, Read, open_model};

/// Keeps the queue full for a while; returns the allocations of the whole process after the first rounds.
fn allocations_of(io: &mut dyn Io, buffer: &Buffer, file_bytes: usize) -> usize {
    const LEN: usize = 64 << 10;
    let mut done = vec![Completion::NONE; io.depth()];
    let mut next = 0;
    for round in 0..300 {
        if round == 20 {
            counting::begin();
        }
        while io.in_flight() < io.depth() {
            let place = next % io.depth();
            let offset = (next * LEN % file_bytes) as u64;
            let into = buffer.at(place * LEN);
            let read = Read {
                file: FileId(0),
                offset,
                len: LEN as u32,
                into,
                token: 0,
            };
            // SAFETY: nobody looks at the bytes, and the buffer outlives `io`.
            unsafe { io.submit(read) }.expect("there is room");
            next += 1;
        }
        io.flush().expect("reads are taken");
        io.reap(&mut done, round % 3 != 0).expect("reads finish");
    }
    counting::end()
}

#[test]
fn reads_allocate_nothing() {
    let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("a folder");
    let (path, file_bytes) = (dir.path().join("model"), 4 << 20);
    std::fs::write(&path, vec![1; file_bytes]).expect("a scratch file");
    let buffer = Buffer::new(8 * (64 << 10));
    for access in [Access::Direct, Access::Buffered] {
        let files = Arc::new(open_model(std::slice::from_ref(&path), access).expect("it opens"));
        for backend in [Backend::Uring, Backend::Pread] {
            let mut io = backend
                .open(&files, &[buffer.region()], 8)
                .expect("a backend");
            let rounds = (0..3).map(|_| allocations_of(io.as_mut(), &buffer, file_bytes));
            assert_eq!(rounds.min(), Some(0), "{backend:?} {access:?}");
        }
    }
    let mut sim = Sim::new(Options {
        seed: 3,
        depth: 8,
        content: Content::Bytes(vec![Arc::from(vec![1; file_bytes])]),
        timing: Timing::Reaps(4),
        faults: Faults {
            rates: vec![(Fault::Short, 0.2), (Fault::Io, 0.1), (Fault::Flip, 0.1)],
            at: Vec::new(),
        },
        log_reads_max: 100,
    });
    assert_eq!(
        allocations_of(&mut sim, &buffer, file_bytes),
        0,
        "simulation"
    );
}
