//! How fast the disk is, measured the way that the engine reads.
#![allow(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::arena::{PAGE_BYTES, Reservation, SlotId};
use crate::error::{Error, Kind, Result};

use super::{Access, Backend, Completion, FileId, Files, Read, Region, choose, open_model};

/// Rounds of a sweep. A disk with a quota of bursts serves whoever comes first
/// best, so every point gets a turn in each round.
const ROUNDS: usize = 5;

/// A gain smaller than this is noise: shared and virtual disks vary by more within seconds.
const GAIN_MIN: f64 = 0.10;

/// The memory that is read into is at least this large: some huge pages.
const ARENA_BYTES_MIN: usize = 16 << 20;

/// What a measurement found.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bandwidth {
    /// Bytes read.
    pub bytes: u64,
    /// Time it took.
    pub seconds: f64,
    /// Processor time the process spent meanwhile, kernel included.
    pub cpu_seconds: f64,
}

impl Bandwidth {
    /// The rate.
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }

    /// Processor time for a GB, in milliseconds.
    pub fn cpu_ms_per_gb(&self) -> f64 {
        self.cpu_seconds * 1e3 / (self.bytes as f64 / 1e9)
    }

    /// The share of one core that the reads took.
    pub fn cpu_share(&self) -> f64 {
        self.cpu_seconds / self.seconds
    }
}

/// One point of a sweep.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Point {
    /// Bytes of each read.
    pub read_bytes: u32,
    /// Reads in flight.
    pub depth: usize,
    /// The median round.
    pub bandwidth: Bandwidth,
}

/// Reads `path` from front to back, again and again, for `budget`: `depth`
/// reads of `read_bytes` in flight.
///
/// It takes `depth * read_bytes` of memory, and the same path to the disk as a
/// run, so a fallback of that shows here too.
pub fn measure(
    path: &Path,
    read_bytes: u32,
    depth: usize,
    budget: Duration,
    backend: Option<Backend>,
) -> Result<Bandwidth> {
    let files = Arc::new(open_model(&[path.to_owned()], Access::Direct)?);
    measure_from(&files, &mut 0, read_bytes, depth, budget, backend)
}

/// Measures every pair of `read_sizes` and `depths` that fits in the file, for `budget` each.
pub fn sweep(
    path: &Path,
    read_sizes: &[u32],
    depths: &[usize],
    budget: Duration,
    backend: Option<Backend>,
) -> Result<Vec<Point>> {
    let files = Arc::new(open_model(&[path.to_owned()], Access::Direct)?);
    let mut pairs: Vec<_> = read_sizes
        .iter()
        .flat_map(|&size| depths.iter().map(move |&depth| (size, depth)))
        .collect();
    let fits = |&(size, depth): &(u32, usize)| {
        u64::from(size) * depth as u64 <= files.get(FileId(0)).len()
    };
    pairs.retain(fits);
    let mut rounds: Vec<Vec<Bandwidth>> = vec![Vec::new(); pairs.len()];
    let mut at = 0;
    for round in 0..ROUNDS {
        // Each round starts elsewhere, lest the same points always meet the end of a burst.
        for turn in 0..pairs.len() {
            let i = (turn + round * pairs.len() / ROUNDS) % pairs.len();
            let (size, depth) = pairs[i];
            let found = measure_from(
                &files,
                &mut at,
                size,
                depth,
                budget / ROUNDS as u32,
                backend,
            )?;
            rounds[i].push(found);
        }
    }
    let point = |(&(read_bytes, depth), mut found): (&(u32, usize), Vec<Bandwidth>)| {
        found.sort_by(|a, b| a.bytes_per_second().total_cmp(&b.bytes_per_second()));
        Point {
            read_bytes,
            depth,
            bandwidth: found[ROUNDS / 2],
        }
    };
    Ok(pairs.iter().zip(rounds).map(point).collect())
}

/// The point to use: the fewest bytes in flight, then the longest reads, among
/// those as fast as the fastest but for noise.
pub fn recommend(points: &[Point]) -> Option<&Point> {
    let rate = |point: &&Point| point.bandwidth.bytes_per_second();
    let best = points
        .iter()
        .map(|point| rate(&point))
        .max_by(f64::total_cmp)?;
    points
        .iter()
        .filter(|point| rate(point) >= best * (1.0 - GAIN_MIN))
        .min_by_key(|point| {
            (
                u64::from(point.read_bytes) * point.depth as u64,
                point.depth,
            )
        })
}

/// Measures from the read number `at` on, and leaves there where the next may go on.
fn measure_from(
    files: &Arc<Files>,
    at: &mut u64,
    read_bytes: u32,
    depth: usize,
    budget: Duration,
    backend: Option<Backend>,
) -> Result<Bandwidth> {
    let file = files.get(FileId(0));
    let align = file.align().max(PAGE_BYTES as u32);
    let read_bytes = read_bytes
        .next_multiple_of(align)
        .min(u32::MAX / align * align);
    let reads_in_file = file.len() / u64::from(read_bytes);
    if reads_in_file == 0 {
        return Err(Error::new(
            Kind::Usage,
            format!(
                "{} is smaller than one read of {read_bytes} bytes",
                file.path().display()
            ),
            "measure with a larger file or with shorter reads",
        ));
    }
    // An arena as the engine has it: its huge pages make for fewer requests to the disk than small ones, so it must not
    // be smaller than some of them however little is in flight.
    let bytes = (read_bytes as usize * depth).max(ARENA_BYTES_MIN);
    let slots = Reservation::new(bytes)?.seal(read_bytes as usize);
    let regions: Vec<Region> = slots
        .regions(slots.count())
        .map(|(start, len)| Region { start, len })
        .collect();
    let (mut io, _) = choose(files, &regions, depth, backend)?;
    let mut submit = |io: &mut dyn super::Io, place: u64| {
        let offset = *at % reads_in_file * u64::from(read_bytes);
        *at += 1;
        let into = slots.ptr(place as SlotId);
        let read = Read {
            file: FileId(0),
            offset,
            len: read_bytes,
            into,
            token: place,
        };
        // SAFETY: each slot has one read in flight at a time, nothing looks at the bytes, and `io`
        // is dropped before the slots.
        unsafe { io.submit(read) }.expect("there are as many places as the depth");
    };
    let mut done = vec![Completion::NONE; depth];
    let (cpu_start, start) = (cpu_seconds()?, Instant::now());
    let mut bytes = 0;
    for place in 0..depth as u64 {
        submit(io.as_mut(), place);
    }
    io.flush()?;
    while io.in_flight() > 0 {
        let count = io.reap(&mut done, true)?;
        for completion in &done[..count] {
            let got = completion
                .result
                .map_err(|e| Error::file(file.path(), "read", &e.into()))?;
            bytes += u64::from(got);
            if start.elapsed() < budget {
                submit(io.as_mut(), completion.token);
            }
        }
        io.flush()?;
    }
    let (seconds, cpu_seconds) = (start.elapsed().as_secs_f64(), cpu_seconds()? - cpu_start);
    Ok(Bandwidth {
        bytes,
        seconds,
        cpu_seconds,
    })
}

/// Processor time of the process so far, its own and the kernel's for it.
pub fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).map_err(|e| {
        Error::new(
            Kind::Io,
            format!("cannot read the processor time: {e}"),
            "allow getrusage(2)",
        )
    })?;
    Ok((usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6)
}
