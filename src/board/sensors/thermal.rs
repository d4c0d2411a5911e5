//! Thermal zones, and the counters of over-current events beside them.

use std::path::Path;

use super::Zone;
use crate::board::files::{self, Probe};

/// A name with this in front is a sensor of hwmon, not a thermal zone.
const HWMON: &str = "hwmon:";

/// A zone's name as it is compared: L4T r35 (JetPack 5) says `CPU-therm` and `tj-therm` for what r36 and later call
/// `cpu-thermal` and `tj-thermal`.
fn comparable(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    match name.strip_suffix("-therm") {
        Some(part) => format!("{part}-thermal"),
        None => name,
    }
}

/// The zones of the given types that there are.
pub(super) fn discover(root: &Path, wanted: &[String]) -> Vec<Zone> {
    let wanted: Vec<String> = wanted.iter().map(|name| comparable(name)).collect();
    let mut zones = Vec::new();
    let mut add = |name: String, path: &Path| {
        let counts = wanted.contains(&comparable(&name));
        if let Some(probe) = Probe::open(path).filter(|_| counts) {
            zones.push(Zone { name, probe });
        }
    };
    for folder in files::entries(&root.join("sys/class/thermal")) {
        if let Some(kind) = files::text(&folder.join("type")) {
            add(kind, &folder.join("temp"));
        }
    }
    for folder in files::entries(&root.join("sys/class/hwmon")) {
        if let Some(name) = files::text(&folder.join("name")) {
            add(format!("{HWMON}{name}"), &folder.join("temp1_input"));
        }
    }
    zones
}

/// The counters of over-current events: OC1 is undervoltage, OC2 average and OC3 instantaneous current.
pub(super) fn over_current(root: &Path) -> Vec<Probe> {
    files::entries(&root.join("sys/class/hwmon"))
        .iter()
        .filter(|folder| files::text(&folder.join("name")).as_deref() == Some("soctherm_oc"))
        .flat_map(|folder| (1..=3).map(move |n| folder.join(format!("oc{n}_event_cnt"))))
        .filter_map(|path| Probe::open(&path))
        .collect()
}
