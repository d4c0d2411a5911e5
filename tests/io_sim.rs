//! The simulation does what its tests rely on.
#![allow(unsafe_code)]

use std::sync::{Arc, Mutex};

use airstream::io::buffer::Buffer;
use airstream::io::sim::{
    Clock, Content, Disk, Fault, FaultAt, Faults, Jitter, Log, Options, POISON, Sim, Timing,
};
use airstream::io::{Completion, FileId, Io, Read};
use nix::errno::Errno;

const LEN: u32 = 4096;
const FILE_READS: u64 = 64;

fn contents() -> Vec<Arc<[u8]>> {
    vec![
        (0..FILE_READS * u64::from(LEN))
            .map(|i| (i * 7 / 5) as u8)
            .collect(),
    ]
}

fn sim(seed: u64, delay_max: u32, faults: Faults) -> Sim {
    Sim::new(Options {
        seed,
        depth: 16,
        content: Content::Bytes(contents()),
        timing: Timing::Reaps(delay_max),
        faults,
        log_reads_max: 10_000,
    })
}

fn read(buffer: &Buffer, place: usize, number: u64) -> Read {
    let into = buffer.at(place * LEN as usize);
    Read {
        file: FileId(0),
        offset: number * u64::from(LEN),
        len: LEN,
        into,
        token: number,
    }
}

/// Reads the whole file once; returns what happened to each read, in order of completion.
fn read_all(sim: &mut Sim) -> Vec<(Completion, Vec<u8>)> {
    let buffer = Buffer::new((FILE_READS * u64::from(LEN)) as usize);
    let (mut done, mut next, mut all) = ([Completion::NONE; 5], 0, Vec::new());
    while (all.len() as u64) < FILE_READS {
        while next < FILE_READS && sim.in_flight() < sim.depth() {
            // SAFETY: each read has a place of its own, looked at when it is reaped.
            unsafe { sim.submit(read(&buffer, next as usize, next)) }.expect("there is room");
            next += 1;
        }
        sim.flush().expect("it never fails");
        let count = sim
            .reap(&mut done, all.len() % 2 == 0)
            .expect("it never fails");
        for completion in &done[..count] {
            let at = completion.token as usize * LEN as usize;
            all.push((*completion, buffer.bytes()[at..at + LEN as usize].to_vec()));
        }
    }
    all
}

fn log_of(log: &Mutex<Log>) -> std::sync::MutexGuard<'_, Log> {
    log.lock().expect("nobody panicked")
}

#[test]
fn one_seed_gives_one_run() {
    let faults = || Faults {
        rates: vec![(Fault::Short, 0.3), (Fault::Io, 0.2)],
        at: Vec::new(),
    };
    let run = |seed| read_all(&mut sim(seed, 9, faults()));
    assert!(run(1) == run(1));
    assert!(run(1) != run(2));
}

#[test]
fn reads_finish_out_of_order_and_hold_poison_until_then() {
    let mut sim = sim(4, 20, Faults::default());
    let all = read_all(&mut sim);
    let tokens: Vec<_> = all.iter().map(|(completion, _)| completion.token).collect();
    assert!(!tokens.is_sorted());
    let file = &contents()[0];
    for (completion, bytes) in &all {
        assert_eq!(completion.result, Ok(LEN));
        assert!(bytes == &file[completion.token as usize * LEN as usize..][..LEN as usize]);
    }
    let buffer = Buffer::new(LEN as usize);
    // SAFETY: `sim` is dropped before the buffer is looked at the second time; the first look
    // is at a simulation, which writes in its own calls only.
    unsafe { sim.submit(read(&buffer, 0, 3)) }.expect("there is room");
    sim.flush().expect("it never fails");
    assert!(buffer.bytes().iter().all(|&byte| byte == POISON));
    drop(sim);
    assert!(
        buffer.bytes() == &file[3 * LEN as usize..][..LEN as usize],
        "written on drop"
    );
}

#[test]
fn faults_come_at_their_rates_and_are_logged() {
    let kinds = [
        Fault::Short,
        Fault::Interrupted,
        Fault::Again,
        Fault::Io,
        Fault::Flip,
    ];
    let rates = kinds.map(|kind| (kind, 0.1)).to_vec();
    let mut sim = sim(
        5,
        3,
        Faults {
            rates,
            at: Vec::new(),
        },
    );
    let log = sim.log();
    let file = &contents()[0];
    for _ in 0..50 {
        for (completion, bytes) in read_all(&mut sim) {
            let expected = &file[completion.token as usize * LEN as usize..][..LEN as usize];
            let fault = log_of(&log)
                .reads
                .iter()
                .rev()
                .find(|logged| logged.token == completion.token)
                .expect("every read is logged")
                .fault;
            match (fault, completion.result) {
                (None, Ok(LEN)) => assert!(bytes == expected),
                (Some(Fault::Short), Ok(n)) => {
                    assert!(n > 0 && n < LEN && n % 512 == 0);
                    assert!(bytes[..n as usize] == expected[..n as usize]);
                    assert!(bytes[n as usize..].iter().all(|&byte| byte == POISON));
                }
                (Some(Fault::Flip), Ok(LEN)) => {
                    let wrong = bytes
                        .iter()
                        .zip(expected)
                        .map(|(a, b)| (a ^ b).count_ones());
                    assert_eq!(wrong.sum::<u32>(), 1);
                }
                (Some(Fault::Interrupted), Err(Errno::EINTR))
                | (Some(Fault::Again), Err(Errno::EAGAIN))
                | (Some(Fault::Io), Err(Errno::EIO)) => {}
                odd => panic!("{odd:?}"),
            }
        }
    }
    let log = log_of(&log);
    assert_eq!(log.read_count, 50 * FILE_READS);
    for kind in kinds {
        let count = log
            .reads
            .iter()
            .filter(|logged| logged.fault == Some(kind))
            .count();
        assert!(
            (240..400).contains(&count),
            "{kind:?} came {count} times in 3200 reads"
        );
    }
}

#[test]
fn a_fault_hits_its_range_so_many_times() {
    let range = 5 * u64::from(LEN)..5 * u64::from(LEN) + 1;
    let at = vec![FaultAt {
        file: FileId(0),
        range,
        fault: Fault::Io,
        times: 2,
    }];
    let mut sim = sim(
        6,
        0,
        Faults {
            rates: Vec::new(),
            at,
        },
    );
    for failing in [true, true, false] {
        for (completion, _) in read_all(&mut sim) {
            let failed = completion.result == Err(Errno::EIO);
            assert_eq!(failed, failing && completion.token == 5, "{completion:?}");
        }
    }
    assert_eq!(log_of(&sim.log()).fault_count, 2);
}

#[test]
fn the_end_of_a_file_and_contents_from_a_function() {
    let serve = Box::new(|file: FileId, offset: u64, to: &mut [u8]| {
        to.fill(file.0 as u8 + 1);
        to.len().min(10_000usize.saturating_sub(offset as usize))
    });
    let content = Content::Serve(serve);
    let (timing, faults) = (Timing::Reaps(0), Faults::default());
    let mut sim = Sim::new(Options {
        seed: 0,
        depth: 4,
        content,
        timing,
        faults,
        log_reads_max: 0,
    });
    let buffer = Buffer::new(4 * LEN as usize);
    for number in 0..4 {
        // SAFETY: nothing looks at the buffer before the reads are reaped.
        unsafe { sim.submit(read(&buffer, number, number as u64)) }.expect("there is room");
    }
    let mut done = [Completion::NONE; 4];
    let mut results = [0; 4];
    while sim.in_flight() > 0 {
        let count = sim.reap(&mut done, true).expect("it never fails");
        for completion in &done[..count] {
            results[completion.token as usize] = completion.result.expect("no faults here");
        }
    }
    assert_eq!(results, [4096, 4096, 1808, 0]);
    assert_eq!(buffer.bytes()[0], 1);
}

/// A sweep of `tiles` reads with computing after each; returns the time it took and the time stalled.
fn simulate(disk: Disk, window: usize, tiles: u64, compute_ns: u64) -> (u64, u64) {
    let clock = Clock::default();
    let mut sim = Sim::new(Options {
        seed: 0,
        depth: window,
        content: Content::Nothing,
        timing: Timing::Disk(disk, clock.clone()),
        faults: Faults::default(),
        log_reads_max: 0,
    });
    let log = sim.log();
    let buffer = Buffer::new(LEN as usize);
    let mut done = [Completion::NONE];
    let mut next = 0;
    for _ in 0..tiles {
        while next < tiles && sim.in_flight() < window {
            // SAFETY: these contents leave memory alone.
            unsafe {
                sim.submit(Read {
                    token: next,
                    len: 1 << 20,
                    ..read(&buffer, 0, 0)
                })
            }
            .expect("there is room");
            next += 1;
        }
        sim.flush().expect("it never fails");
        sim.reap(&mut done, true).expect("it never fails");
        clock.advance(compute_ns);
    }
    let stalled_ns = log_of(&log).stalled_ns;
    (clock.now_ns(), stalled_ns)
}

#[test]
fn the_virtual_disk_keeps_to_its_roofline() {
    let disk = Disk {
        bytes_per_second: f64::from(1 << 30),
        latency_ns: 100_000,
        depth: 32,
        jitter: Jitter::default(),
    };
    let transfer_ns = 1_000_000_000 / 1024;
    let near = |got: u64, expected: u64| {
        assert!(
            got.abs_diff(expected) * 100 <= expected,
            "{got} ns, expected {expected}"
        );
    };
    // Bound by the disk, by computing, and with nothing to overlap.
    near(
        simulate(disk, 8, 1000, transfer_ns / 2).0,
        1000 * transfer_ns,
    );
    near(
        simulate(disk, 8, 1000, transfer_ns * 2).0,
        1000 * transfer_ns * 2,
    );
    near(
        simulate(disk, 1, 1000, 500_000).0,
        1000 * (transfer_ns + 100_000 + 500_000),
    );
    let (total, stalled) = simulate(disk, 8, 1000, transfer_ns / 2);
    near(stalled, total - 1000 * (transfer_ns / 2));
}

#[test]
fn jitter_makes_reads_late_and_keeps_the_mean() {
    let steady = Disk {
        bytes_per_second: f64::from(1 << 30),
        latency_ns: 100_000,
        depth: 32,
        jitter: Jitter::default(),
    };
    let with = |jitter| simulate(Disk { jitter, ..steady }, 8, 4000, 0).0;
    let regular = with(Jitter::default());
    let spread = Jitter {
        latency_spread: 1.0,
        ..Jitter::default()
    };
    // Latencies overlap with other transfers, so only few of them show.
    assert!(with(spread) > regular && with(spread) < regular + regular / 50);
    let stalls = Jitter {
        stall_once_in: 40,
        stall_ns: 10_000_000,
        ..Jitter::default()
    };
    let stalled = with(stalls) - regular;
    let expected = 4000 / 40 * 10_000_000;
    assert!(
        stalled.abs_diff(expected) < expected / 4,
        "{stalled} ns of stalls, expected {expected}"
    );
    let lumps = Jitter {
        in_lumps: true,
        ..Jitter::default()
    };
    // All eight reads come at once, and then the disk waits for the next: one latency for each lump.
    let late = with(lumps) - regular;
    assert!(
        late.abs_diff(4000 / 8 * 100_000) < 1_000_000,
        "{late} ns later"
    );
}
