//! Power rails: INA3221 and INA238 monitors of a Jetson, and the energy counters (RAPL) of a PC.

use std::path::Path;

use crate::board::files::{self, Probe};

/// How a rail's power comes about.
#[derive(Debug)]
enum Source {
    /// Millivolts and milliamperes.
    VoltsAmperes(Probe, Probe),
    /// Microwatts.
    Microwatts(Probe),
    /// Microjoules that were used so far, wrapping around after `range`; and when they were last read.
    Microjoules {
        probe: Probe,
        range: i64,
        last: Option<(f64, i64)>,
    },
}

/// A power rail.
#[derive(Debug)]
pub struct Rail {
    /// As the board's designers call it: `VDD_IN`.
    pub name: String,
    /// What it drew at the last sample (an energy counter: since the one before).
    pub watts: Option<f64>,
    source: Source,
}

/// All rails, and which of them add up to the whole.
#[derive(Debug, Default)]
pub struct Rails {
    rails: Vec<Rail>,
    total: Vec<usize>,
}

impl Rails {
    pub(super) fn discover(root: &Path, sums: &[Vec<String>]) -> Rails {
        let mut rails = Vec::new();
        for folder in monitor_folders(root) {
            monitor(&folder, &mut rails);
        }
        energy_counters(root, &mut rails);
        let named = |pattern: &str| -> Vec<usize> {
            let fits = |name: &str| match pattern.strip_suffix('*') {
                Some(start) => name.starts_with(start),
                None => name == pattern,
            };
            (0..rails.len()).filter(|&i| fits(&rails[i].name)).collect()
        };
        let total = sums.iter().find_map(|sum| {
            let found: Vec<Vec<usize>> = sum.iter().map(|pattern| named(pattern)).collect();
            found
                .iter()
                .all(|rails| !rails.is_empty())
                .then(|| found.concat())
        });
        let total = total.unwrap_or_default();
        Rails { rails, total }
    }

    /// Reads all rails; the power of the whole, if every rail of its sum answered.
    pub(super) fn sample(
        &mut self,
        now_s: f64,
        number: &mut impl FnMut(&Probe) -> Option<i64>,
    ) -> Option<f64> {
        for rail in &mut self.rails {
            rail.watts = watts(&mut rail.source, now_s, number);
        }
        if self.total.is_empty() {
            return None;
        }
        self.total.iter().map(|&i| self.rails[i].watts).sum()
    }

    pub(super) fn all(&self) -> &[Rail] {
        &self.rails
    }

    pub(super) fn total(&self) -> &[usize] {
        &self.total
    }
}

fn watts(
    source: &mut Source,
    now_s: f64,
    number: &mut impl FnMut(&Probe) -> Option<i64>,
) -> Option<f64> {
    match source {
        Source::VoltsAmperes(volts, amperes) => {
            let (mv, ma) = (number(volts)?, number(amperes)?);
            // An idle channel may read slightly below nothing.
            Some((mv as f64 * ma as f64 / 1e6).max(0.0))
        }
        Source::Microwatts(probe) => Some(number(probe)? as f64 / 1e6),
        Source::Microjoules { probe, range, last } => {
            let count = number(probe)?;
            let before = last.replace((now_s, count));
            let (then_s, then) = before?;
            let used = match count - then {
                used if used >= 0 => used,
                wrapped => wrapped + *range,
            };
            let watts = used as f64 / 1e6 / (now_s - then_s);
            (now_s > then_s && used >= 0).then_some(watts)
        }
    }
}

/// The hwmon folders of power monitors. They are found by class; some kernels show them by driver only.
fn monitor_folders(root: &Path) -> Vec<std::path::PathBuf> {
    let mut folders: Vec<_> = files::entries(&root.join("sys/class/hwmon"));
    for driver in ["ina3221", "ina238"] {
        for device in files::entries(&root.join("sys/bus/i2c/drivers").join(driver)) {
            folders.extend(files::entries(&device.join("hwmon")));
        }
    }
    let is_monitor = |folder: &std::path::PathBuf| {
        files::text(&folder.join("name")).is_some_and(|name| name.starts_with("ina"))
    };
    folders.retain(is_monitor);
    folders
}

/// The channels of a monitor that are connected. An INA3221 has three; its `in4` to `in7` are voltages across the
/// shunts and their sum, which would count twice.
fn monitor(folder: &Path, rails: &mut Vec<Rail>) {
    for channel in 1..=3 {
        let file = |kind: &str| folder.join(format!("{kind}{channel}_input"));
        let label = files::text(&folder.join(format!("in{channel}_label"))).or_else(|| {
            // A monitor of one channel has one label.
            let label = files::text(&folder.join("label"));
            label.filter(|_| channel == 1)
        });
        let Some(name) = label.filter(|label| !label.is_empty() && label != "NC") else {
            continue;
        };
        let source = match Probe::open(&file("power")) {
            Some(power) => Some(Source::Microwatts(power)),
            None => Probe::open(&file("in"))
                .zip(Probe::open(&file("curr")))
                .map(|(volts, amperes)| Source::VoltsAmperes(volts, amperes)),
        };
        // The same monitor may be found by class and by driver.
        let known = rails.iter().any(|rail| rail.name == name);
        if let Some(source) = source.filter(|_| !known) {
            rails.push(Rail {
                name,
                watts: None,
                source,
            });
        }
    }
}

/// The packages' energy counters. Parts of a package are counted in it and left out.
fn energy_counters(root: &Path, rails: &mut Vec<Rail>) {
    for folder in files::entries(&root.join("sys/class/powercap")) {
        let is_package = folder
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with("intel-rapl:") && name.matches(':').count() == 1);
        if !is_package {
            continue;
        }
        let name = files::text(&folder.join("name"));
        let range = files::text(&folder.join("max_energy_range_uj")).and_then(|t| t.parse().ok());
        let probe = Probe::open(&folder.join("energy_uj"));
        if let (Some(name), Some(range), Some(probe)) = (name, range, probe) {
            rails.push(Rail {
                name,
                watts: None,
                source: Source::Microjoules {
                    probe,
                    range,
                    last: None,
                },
            });
        }
    }
}
