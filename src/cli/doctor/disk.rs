//! The drive: io_uring, direct reads, the link, and how fast it is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Check, Host};
use crate::io::measure;
use crate::io::{Access, Backend, open_model};

/// How long the drive is measured.
const MEASURED_FOR: Duration = Duration::from_millis(400);
/// A drive that does less than this share of what the board's should do has something wrong.
const SHARE_LEAST: f64 = 0.6;

pub(super) fn checks(host: &Host) -> Vec<Check> {
    vec![io_uring(host), direct(host), link(host), speed(host)]
}

/// The file whose drive counts: the model, or else this program.
fn file(host: &Host) -> Option<PathBuf> {
    match host.model {
        Some(path) => Some(path.to_owned()),
        None => std::env::current_exe().ok(),
    }
}

fn io_uring(host: &Host) -> Check {
    let name = "io_uring";
    let disabled = host.text("proc/sys/kernel/io_uring_disabled");
    if disabled.as_deref() == Some("2") {
        return Check::warning(
            name,
            "switched off: reads go through threads",
            "sudo sysctl kernel.io_uring_disabled=0",
        );
    }
    let Some(path) = file(host).filter(|_| host.live()) else {
        return Check::skipped(name, "not tried under another root");
    };
    // One real read: a sandbox may refuse what the kernel has.
    match measure::measure(&path, 64 << 10, 1, Duration::ZERO, Some(Backend::Uring)) {
        Ok(read) => Check::ok(name, format!("read {} bytes", read.bytes)),
        Err(e) => Check::warning(
            name,
            first_line(&e.to_string()),
            "allow io_uring_setup in the container's seccomp profile, or run outside; reads go through threads",
        ),
    }
}

fn direct(host: &Host) -> Check {
    let name = "O_DIRECT";
    let Some(path) = file(host).filter(|_| host.live()) else {
        return Check::skipped(name, "not tried under another root");
    };
    match open_model(std::slice::from_ref(&path), Access::Direct) {
        Err(e) => Check::broken(name, first_line(&e.to_string()), e.remedy().to_owned()),
        Ok(files) if files.all_direct() => {
            Check::ok(name, format!("in blocks of {} bytes", files.align()))
        }
        Ok(_) => Check::warning(
            name,
            format!("not on the file system of {}", path.display()),
            "put the model on ext4 or xfs, not on tmpfs or an overlay",
        ),
    }
}

/// The PCIe link of each NVMe drive, as it is and as drive and port could.
fn link(host: &Host) -> Check {
    let name = "NVMe link";
    let drives = std::fs::read_dir(host.root.join("sys/class/nvme"));
    let mut drives: Vec<PathBuf> = drives
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    drives.sort();
    let mut found = Vec::new();
    let mut narrow = false;
    for drive in &drives {
        let text = |file: &str| {
            let text = std::fs::read_to_string(drive.join("device").join(file)).ok()?;
            Some(text.trim().to_owned())
        };
        // An emulated drive has a link of no lanes.
        let width = text("current_link_width").filter(|width| width != "0");
        let (Some(speed), Some(width)) = (text("current_link_speed"), width) else {
            continue;
        };
        // A drive of a later generation than the port it is in cannot do more than that.
        let could = |file: &str| {
            let number = |path: &str| leading_number(&text(path)?);
            let drive = number(file)?;
            let port = number(&format!("../{file}"));
            Some(port.map_or(drive, |port| drive.min(port)))
        };
        let less = |file: &str, now: &str| {
            let (could, now) = (could(file), leading_number(now));
            could.zip(now).is_some_and(|(could, now)| now < could)
        };
        narrow |= less("max_link_speed", &speed) || less("max_link_width", &width);
        let drive = drive.file_name().unwrap_or_default().to_string_lossy();
        found.push(format!(
            "{drive}: {} x{width}",
            speed.trim_end_matches(" PCIe")
        ));
    }
    match (found.is_empty(), narrow) {
        (true, _) => Check::skipped(name, "no NVMe drive that tells it"),
        (false, false) => Check::ok(name, found.join(", ")),
        (false, true) => Check::warning(
            name,
            format!(
                "{}, less than the drive can do in its place",
                found.join(", ")
            ),
            "use the x4 slot (2280) of the carrier, and check that the drive sits well in it",
        ),
    }
}

/// The number that a text begins with: 8 of `8.0 GT/s PCIe`.
fn leading_number(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

fn speed(host: &Host) -> Check {
    let name = "disk speed";
    let Some(path) = host.model.filter(|_| host.live()) else {
        return Check::skipped(name, "give --model to measure it");
    };
    let (size, depth) = (
        host.board.nvme.read_kib << 10,
        host.board.nvme.depth as usize,
    );
    match measured(path, size, depth) {
        Err(e) => Check::broken(name, first_line(&e.to_string()), e.remedy().to_owned()),
        Ok(rate) => {
            let found = format!(
                "{:.2} GB/s, {depth} reads of {} KiB in flight",
                rate / 1e9,
                size >> 10
            );
            let expected = host.board.nvme.gb_s.map(|gb_s| gb_s * 1e9);
            match expected.filter(|&expected| rate < SHARE_LEAST * expected) {
                Some(expected) => Check::warning(
                    name,
                    format!(
                        "{found}; this board's drive should do {:.1}",
                        expected / 1e9
                    ),
                    "check the drive's link and temperature, and that nothing else reads (iostat -x 1)",
                ),
                None => Check::ok(name, found),
            }
        }
    }
}

/// Bytes per second; a small file is read with shorter reads.
fn measured(path: &Path, size: u32, depth: usize) -> crate::Result<f64> {
    let len = std::fs::metadata(path).map_or(0, |meta| meta.len());
    let fits = (len / depth as u64).min(u64::from(size)).max(4096) as u32;
    let found = measure::measure(path, fits, depth, MEASURED_FOR, None)?;
    Ok(found.bytes_per_second())
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
