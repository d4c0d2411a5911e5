//! `airstream bench --io`: how fast the disk is at which read size and depth, and what that costs the processor.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::report;
use crate::error::{Error, Kind, Result};
use crate::io::Backend;
use crate::io::advice::Advice;
use crate::io::measure::{self, Point};
use crate::store::sidecar;

const READ_SIZES: [u32; 7] = [
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
    4 << 20,
];
const DEPTHS: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Processor time for reads that is little enough: 3% of one core at 1.5 GB/s.
const CPU_MS_PER_GB_GOOD: f64 = 20.0;

#[derive(Serialize)]
struct Measured {
    read_bytes: u32,
    depth: usize,
    gb_s: f64,
    cpu_share: f64,
    cpu_ms_per_gb: f64,
}

#[derive(Serialize)]
struct Summary {
    file: String,
    points: Vec<Measured>,
    recommended: Measured,
    /// Where the recommendation is kept for the planner.
    kept: Option<PathBuf>,
}

fn measured(point: &Point) -> Measured {
    Measured {
        read_bytes: point.read_bytes,
        depth: point.depth,
        gb_s: point.bandwidth.bytes_per_second() / 1e9,
        cpu_share: point.bandwidth.cpu_share(),
        cpu_ms_per_gb: point.bandwidth.cpu_ms_per_gb(),
    }
}

/// Measures every pair of read size and depth on `file`, for `time` in all, and prints what it found.
pub fn run(file: &Path, time: Duration, backend: Option<Backend>, json: bool) -> Result<()> {
    let each = time / (READ_SIZES.len() * DEPTHS.len()) as u32;
    let points = measure::sweep(file, &READ_SIZES, &DEPTHS, each, backend)?;
    let cheap: Vec<Point> = points
        .iter()
        .filter(|point| point.bandwidth.cpu_ms_per_gb() <= CPU_MS_PER_GB_GOOD)
        .copied()
        .collect();
    let candidates = if cheap.is_empty() { &points } else { &cheap };
    let best = measure::recommend(candidates).ok_or_else(|| {
        Error::new(
            Kind::Usage,
            format!("{} is too small to measure a disk with", file.display()),
            "give a file of some hundred MiB, best the model file itself",
        )
    })?;
    let summary = Summary {
        file: file.display().to_string(),
        points: points.iter().map(measured).collect(),
        recommended: measured(best),
        kept: keep(file, best),
    };
    if json {
        report::print_json(&summary);
    } else {
        print(&summary);
    }
    Ok(())
}

/// Keeps the recommendation for the disk that `file` is on; where to, if it could be.
fn keep(file: &Path, best: &Point) -> Option<PathBuf> {
    let advice = Advice {
        read_bytes: best.read_bytes,
        depth: best.depth as u32,
    };
    let Some(cache) = sidecar::cache_folder() else {
        log::warn!("no cache folder (neither XDG_CACHE_HOME nor HOME is set): nothing is kept");
        return None;
    };
    let saved = std::fs::metadata(file).and_then(|file| advice.save(&cache, file.dev()));
    saved
        .inspect_err(|e| log::warn!("{}: cannot keep what was found ({e})", cache.display()))
        .ok()
}

fn print(summary: &Summary) {
    type Column = fn(&Measured) -> String;
    let tables: [(&str, Column); 3] = [
        ("GB/s", |m| format!("{:.2}", m.gb_s)),
        ("CPU share of one core", |m| {
            format!("{:.1}%", 100.0 * m.cpu_share)
        }),
        ("CPU ms per GB", |m| format!("{:.1}", m.cpu_ms_per_gb)),
    ];
    for (title, cell) in tables {
        println!("{title}, by read size and reads in flight\n");
        println!(
            "| read | {} |",
            DEPTHS.map(|depth| depth.to_string()).join(" | ")
        );
        println!("|---|{}", "---|".repeat(DEPTHS.len()));
        for size in READ_SIZES {
            let cells = DEPTHS.map(|depth| {
                let at = |m: &&Measured| (m.read_bytes, m.depth) == (size, depth);
                // What is larger than the file was left out.
                summary.points.iter().find(at).map_or("-".to_owned(), cell)
            });
            println!(
                "| {} | {} |",
                report::bytes(u64::from(size)),
                cells.join(" | ")
            );
        }
        println!();
    }
    let best = &summary.recommended;
    println!(
        "recommended: reads of {}, {} in flight: {:.2} GB/s for {:.1} ms of processor time per GB",
        report::bytes(u64::from(best.read_bytes)),
        best.depth,
        best.gb_s,
        best.cpu_ms_per_gb
    );
    if let Some(path) = &summary.kept {
        println!(
            "kept in {}: from now on plans for this disk make reads at least so long, and so much in flight, where \
             the memory allows",
            path.display()
        );
    }
}
