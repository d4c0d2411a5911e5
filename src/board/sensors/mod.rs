//! Power, temperatures and clocks, as sysfs tells them.
//!
//! Paths are discovered once and files kept open; a sample reads them and allocates nothing. What does not answer is
//! left out of the sample. When a file is gone, or power or temperature has no sensor (drivers may be loaded later),
//! everything is discovered anew, but not more often than every [`DISCOVER_EVERY_S`] seconds.

mod clocks;
mod mode;
mod rails;
mod thermal;

use std::path::{Path, PathBuf};

use super::Reading;
use super::config::Board;
use super::files::{Found, Probe};
use clocks::Clocks;
use rails::Rails;

pub use mode::{CurrentMode, current_mode};
pub use rails::Rail;

/// The least time between two discoveries.
pub const DISCOVER_EVERY_S: f64 = 10.0;
/// Clocks are read at most so often: a processor's is measured while the reader waits.
const CLOCKS_EVERY_S: f64 = 1.0;

/// A counter of over-current events, and where it stood.
#[derive(Debug)]
struct Counter {
    probe: Probe,
    last: Option<i64>,
}

/// A zone that says how hot it is.
#[derive(Debug)]
pub struct Zone {
    /// Its type: `tj-thermal`.
    pub name: String,
    probe: Probe,
}

/// The sensors of a board.
#[derive(Debug)]
pub struct Sensors {
    root: PathBuf,
    board: Board,
    rails: Rails,
    zones: Vec<Zone>,
    over_current: Vec<Counter>,
    clocks: Clocks,
    /// Something was there and is no more, or has not been there yet.
    missing: bool,
    discovered_s: f64,
    clocks_read_s: f64,
    /// The newest clocks, between two readings of them.
    last: Reading,
}

impl Sensors {
    /// Discovers the sensors of `board` under `root`. Times are seconds since any moment.
    pub fn new(board: &Board, root: &Path, now_s: f64) -> Sensors {
        let mut sensors = Sensors {
            root: root.to_owned(),
            board: board.clone(),
            rails: Rails::default(),
            zones: Vec::new(),
            over_current: Vec::new(),
            clocks: Clocks::default(),
            missing: false,
            discovered_s: now_s,
            clocks_read_s: f64::NEG_INFINITY,
            last: Reading::default(),
        };
        sensors.discover(now_s);
        sensors
    }

    fn discover(&mut self, now_s: f64) {
        self.rails = Rails::discover(&self.root, &self.board.power.total);
        self.zones = thermal::discover(&self.root, &self.board.thermal.zones);
        self.over_current = thermal::over_current(&self.root)
            .into_iter()
            .map(|probe| Counter { probe, last: None })
            .collect();
        self.clocks = Clocks::discover(&self.root);
        self.missing = self.zones.is_empty() || self.rails.total().is_empty();
        self.discovered_s = now_s;
    }

    /// Reads everything. `now_s` only grows.
    pub fn sample(&mut self, now_s: f64) -> Reading {
        if self.missing && now_s - self.discovered_s >= DISCOVER_EVERY_S {
            self.discover(now_s);
        }
        let mut missing = false;
        let mut number = |probe: &Probe| match probe.read() {
            Found::Number(number) => Some(number),
            Found::Silent => None,
            Found::Gone => {
                missing = true;
                None
            }
        };
        let power_w = self.rails.sample(now_s, &mut number);
        let junction_c = self
            .zones
            .iter()
            .filter_map(|zone| number(&zone.probe))
            .map(|milli| milli as f64 / 1e3)
            // A sensor that is switched off may say nonsense instead of nothing.
            .filter(|c| (-40.0..200.0).contains(c))
            .reduce(f64::max);
        let mut events = 0;
        for counter in &mut self.over_current {
            let Some(count) = number(&counter.probe) else {
                continue;
            };
            // A counter that fell was reset: what it counts from now on is new.
            let before = counter.last.map_or(count, |last| last.min(count));
            events += (count - before) as u32;
            counter.last = Some(count);
        }
        if now_s - self.clocks_read_s >= CLOCKS_EVERY_S {
            self.clocks_read_s = now_s;
            self.clocks.sample(&mut number, &mut self.last);
        }
        self.missing |= missing;
        self.last = Reading {
            power_w,
            junction_c,
            over_current_events: events,
            ..self.last
        };
        self.last
    }

    /// The power mode that is set now.
    pub fn mode(&self) -> Option<CurrentMode> {
        current_mode(&self.root, &self.board)
    }

    /// The power rails, with what each drew at the last sample.
    pub fn rails(&self) -> &[Rail] {
        self.rails.all()
    }

    /// The names of the rails whose sum is the power of the whole; empty if there is none.
    pub fn total_rails(&self) -> Vec<&str> {
        let rails = self.rails.all();
        let name = |&index: &usize| rails[index].name.as_str();
        self.rails.total().iter().map(name).collect()
    }

    /// The thermal zones that count.
    pub fn zones(&self) -> &[Zone] {
        &self.zones
    }

    /// How many counters of over-current events there are.
    pub fn over_current_counters(&self) -> usize {
        self.over_current.len()
    }
}
