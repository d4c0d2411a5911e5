//! The system: kernel, memory, desktop, sensors, power mode, the daemon's unit and socket.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{AccessFlags, access};

use super::{Check, Host};
use crate::board::detect;
use crate::board::sensors::{Sensors, current_mode};
use crate::cli::report;

/// The oldest kernel that this is made for: JetPack 5's.
const KERNEL_OLDEST: (u32, u32) = (5, 10);
/// The daemon's unit and the socket that it listens on.
const UNIT: &str = "airstream.service";
const SOCKET: &str = "run/airstream/airstream.sock";
/// What a unit says that may lock all memory.
const UNLIMITED: &str = "LimitMEMLOCK=infinity";

pub(super) fn board(host: &Host) -> Check {
    let mut found = host.board.title.clone();
    if let Some(model) = detect::model(host.root) {
        found += &format!(" ({model})");
    }
    if let Some(release) = host.text("etc/nv_tegra_release") {
        // `# R36 (release), REVISION: 4.4, GCID: ...`
        let mut parts = release.trim_start_matches("# ").split(", ");
        let major = parts.next().and_then(|p| p.split(' ').next()).unwrap_or("");
        let minor = parts
            .next()
            .and_then(|p| p.strip_prefix("REVISION: "))
            .unwrap_or("");
        found += &format!(", L4T {}.{minor}", major.trim_start_matches('R'));
    }
    Check::ok("board", found)
}

pub(super) fn kernel(host: &Host) -> Check {
    let Some(release) = host.text("proc/sys/kernel/osrelease") else {
        return Check::skipped("kernel", "unknown");
    };
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < KERNEL_OLDEST {
        let remedy = "use kernel 5.10 or newer (JetPack 5.1 on a Jetson)";
        return Check::warning("kernel", release, remedy);
    }
    Check::ok("kernel", release)
}

/// Without the right to lock memory, reads land in unregistered buffers, which costs the kernel time.
pub(super) fn locked_memory(host: &Host) -> Check {
    let name = "memlock";
    if !host.live() {
        return Check::skipped(name, "not tried under another root");
    }
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Err(e) => Check::skipped(name, format!("cannot be read: {e}")),
        Ok((soft, _)) if soft >= host.memory => match soft {
            nix::libc::RLIM_INFINITY => Check::ok(name, "unlimited"),
            _ => Check::ok(name, report::bytes(soft)),
        },
        Ok((soft, _)) if unit_file(host).is_some_and(|text| text.contains(UNLIMITED)) => Check::ok(
            name,
            format!(
                "unlimited in the unit, {} in this shell",
                report::bytes(soft)
            ),
        ),
        Ok((soft, _)) => Check::warning(
            name,
            format!(
                "{} may be locked, and the budget is {}",
                report::bytes(soft),
                report::bytes(host.memory)
            ),
            "set LimitMEMLOCK=infinity in the unit, or `ulimit -l unlimited` (limits.conf: memlock)",
        ),
    }
}

pub(super) fn huge_pages(host: &Host) -> Check {
    let name = "huge pages";
    match host.text("sys/kernel/mm/transparent_hugepage/enabled") {
        None => Check::skipped(name, "the kernel has none"),
        Some(text) if text.contains("[never]") => Check::warning(
            name,
            "switched off",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(text) => {
            let set = text.split(['[', ']']).nth(1).unwrap_or(&text).to_owned();
            Check::ok(name, set)
        }
    }
}

pub(super) fn free_memory(host: &Host) -> Check {
    let name = "free memory";
    let Some(free) = detect::memory_available(host.root) else {
        return Check::skipped(name, "unknown");
    };
    let (budget, mut found) = (report::bytes(host.memory), report::bytes(free) + " free");
    if host.daemon_bytes > 0 {
        found += &format!(" and {} the daemon's", report::bytes(host.daemon_bytes));
    }
    found += &format!(", the budget is {budget}");
    let free = free + host.daemon_bytes;
    if host.memory > free {
        return Check::broken(name, found, "stop other programs, or give less --memory");
    }
    // What the board has to give, but others hold. Of a host that nobody described it is not known.
    let described = !host.board.modes.is_empty() && !host.memory_asked;
    let most = host.board.memory_for_models().filter(|_| described);
    match most.filter(|&most| host.memory < most / 4 * 3) {
        Some(most) => Check::warning(
            name,
            found,
            format!(
                "stop other programs: this board can give up to {}",
                report::bytes(most)
            ),
        ),
        None => Check::ok(name, found),
    }
}

/// Memory that is compressed into itself helps nobody who fills it with weights.
pub(super) fn swap(host: &Host) -> Check {
    let name = "swap";
    let swaps = host.text("proc/swaps").unwrap_or_default();
    let devices: Vec<&str> = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    if devices.iter().any(|device| device.contains("zram")) {
        return Check::warning(
            name,
            format!("on zram: {}", devices.join(", ")),
            "sudo systemctl disable --now nvzramconfig (elsewhere: swapoff the device), and put swap on the drive",
        );
    }
    match devices.is_empty() {
        true => Check::ok(name, "none"),
        false => Check::ok(name, devices.join(", ")),
    }
}

pub(super) fn desktop(host: &Host) -> Check {
    let name = "desktop";
    const SHELLS: [&str; 8] = [
        "Xorg",
        "Xwayland",
        "gnome-shell",
        "kwin_x11",
        "kwin_wayland",
        "xfwm4",
        "lxsession",
        "unity-panel-ser", // The kernel cuts names to 15 bytes.
    ];
    let processes = std::fs::read_dir(host.root.join("proc"))
        .into_iter()
        .flatten()
        .flatten();
    let running: Vec<String> = processes
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("comm")).ok())
        .map(|comm| comm.trim().to_owned())
        .filter(|comm| SHELLS.contains(&comm.as_str()))
        .collect();
    match running.first() {
        None => Check::ok(name, "not running"),
        Some(shell) => Check::warning(
            name,
            format!("{shell} is running"),
            "sudo systemctl set-default multi-user.target, and restart: that frees up to 865 MB on a Jetson",
        ),
    }
}

pub(super) fn power(host: &Host) -> Check {
    let name = "power";
    let mut sensors = Sensors::new(&host.board, host.root, 0.0);
    sensors.sample(0.0);
    // An energy counter speaks only from the second look on.
    if host.live() && !sensors.rails().is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let reading = sensors.sample(0.05);
    let rails = sensors.total_rails().join(" + ");
    match reading.power_w {
        Some(watts) => Check::ok(name, format!("{watts:.1} W ({rails})")),
        None if !rails.is_empty() => Check::ok(name, rails),
        None if host.root.join("sys/class/powercap/intel-rapl:0").exists() => Check::warning(
            name,
            "the processor's energy counters are for root only",
            "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj (a udev rule makes it last)",
        ),
        None if host.board.modes.is_empty() => Check::skipped(name, "nothing measures it here"),
        None => Check::warning(
            name,
            "none of the board's power monitors is there",
            "load the ina3221 driver, or name the rails of this carrier in /etc/airstream/board.toml",
        ),
    }
}

pub(super) fn temperature(host: &Host) -> Check {
    let name = "temperature";
    let mut sensors = Sensors::new(&host.board, host.root, 0.0);
    let limit = host.board.thermal.limit_c;
    match sensors.sample(0.0).junction_c {
        Some(c) if c >= limit => Check::warning(
            name,
            format!("{c:.1} C, and the hardware throttles at {limit:.0} C"),
            "check fan and heat sink",
        ),
        Some(c) => Check::ok(name, format!("{c:.1} C ({} zones)", sensors.zones().len())),
        None if host.board.modes.is_empty() => Check::skipped(name, "nothing measures it here"),
        None => Check::warning(
            name,
            "no thermal zone answers",
            "name this carrier's zones in /etc/airstream/board.toml",
        ),
    }
}

pub(super) fn mode(host: &Host) -> Check {
    let name = "power mode";
    let Some(mode) = current_mode(host.root, &host.board) else {
        return Check::skipped(name, "no nvpmodel");
    };
    let budget = |mode: &crate::board::config::Mode| mode.budget_w.unwrap_or(f64::MAX);
    let modes = host.board.modes.iter();
    let most = modes.max_by(|a, b| budget(a).total_cmp(&budget(b)));
    let mut found = format!("{} (mode {})", mode.name, mode.id);
    // A lower mode is a choice, and no fault.
    if let Some(most) = most.filter(|most| mode.budget_w.is_some_and(|w| w < budget(most))) {
        found += &format!(
            "; nvpmodel -m {} ({}) is faster, if supply and cooling allow",
            most.id, most.name
        );
    }
    Check::ok(name, found)
}

/// The unit as it is installed.
pub(super) fn unit_file(host: &Host) -> Option<String> {
    let folders = [
        "etc/systemd/system",
        "lib/systemd/system",
        "usr/lib/systemd/system",
    ];
    let mut paths = folders.iter().map(|folder| format!("{folder}/{UNIT}"));
    paths.find_map(|path| host.text(&path))
}

/// Where the daemon's control group is, with cgroup v2 and v1; none if it does not run.
fn cgroup(root: &Path) -> Option<PathBuf> {
    let slices = [
        "sys/fs/cgroup/system.slice",
        "sys/fs/cgroup/systemd/system.slice",
    ];
    let mut groups = slices.iter().map(|slice| root.join(slice).join(UNIT));
    groups.find(|group| group.exists())
}

/// Memory that the daemon holds; 0 if it does not run.
pub(super) fn daemon_bytes(root: &Path) -> u64 {
    let processes = cgroup(root).map(|group| std::fs::read_to_string(group.join("cgroup.procs")));
    let processes = processes.and_then(|text| text.ok()).unwrap_or_default();
    let resident = |process: &str| {
        let status =
            std::fs::read_to_string(root.join("proc").join(process).join("status")).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kib << 10)
    };
    processes.lines().filter_map(resident).sum()
}

pub(super) fn unit(host: &Host) -> Check {
    let name = "unit";
    if unit_file(host).is_none() {
        return Check::skipped(name, "not installed");
    }
    match cgroup(host.root) {
        Some(_) => Check::ok(name, "running"),
        None => Check::warning(
            name,
            "installed, not running",
            "airstream serve --check says what is wrong with its configuration, journalctl -u airstream why it stopped; \
             then sudo systemctl enable --now airstream",
        ),
    }
}

pub(super) fn socket(host: &Host) -> Check {
    let name = "socket";
    let path = host.root.join(SOCKET);
    let Ok(meta) = std::fs::metadata(&path) else {
        return Check::skipped(name, "not there: the daemon does not run");
    };
    if !meta.file_type().is_socket() {
        return Check::broken(
            name,
            format!("/{SOCKET} is no socket"),
            "remove it and restart the daemon",
        );
    }
    match access(&path, AccessFlags::R_OK | AccessFlags::W_OK) {
        Ok(()) => Check::ok(name, format!("/{SOCKET}")),
        Err(_) => Check::warning(
            name,
            format!("/{SOCKET} is not for this user"),
            "sudo usermod -aG airstream $USER, and log in again",
        ),
    }
}
