//! The thread that samples the sensors, sums up energy and asks the governor.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Reading;
use super::config::Board;
use super::cores::Online;
use super::governor::{GiveUp, Goals, Governor, HeldBy, Limits};
use super::pace::Pace;
use super::sensors::{CurrentMode, Sensors, current_mode};

/// Time between two samples.
pub const SAMPLE_EVERY: Duration = Duration::from_millis(200);
/// Samples closer than this tell nothing new: counters of energy move about every millisecond.
const SAMPLE_LEAST_S: f64 = 0.01;
/// A sensor that is silent for so long is taken to draw what it drew before; after that its time is not counted.
const BRIDGE_S: f64 = 3.0;

/// How often it is looked whether another power mode was set, and cores came or went with it.
const MODE_EVERY_S: f64 = 2.0;
/// Below this effort the engine is held down...
const EFFORT_HELD: f64 = 0.9;
/// ...and above this one it is not any more.
const EFFORT_FREE: f64 = 0.99;
/// The log is told of it at most so often.
const TELL_EVERY_S: f64 = 60.0;

impl Goals {
    /// What `board`, whose files lie under `root`, is to keep: `limit_w`, or the budget of the power mode that is set.
    /// An infinite limit is none.
    ///
    /// None if nothing is to be governed: nobody described how hot a generic host may get.
    pub fn of_board(
        board: &Board,
        root: &Path,
        limit_w: Option<f64>,
        give_up: GiveUp,
    ) -> Option<Goals> {
        let budget_w = current_mode(root, board).and_then(|mode| mode.budget_w);
        let power_w = limit_w.or(budget_w).filter(|watts| watts.is_finite());
        let follows_mode = limit_w.is_none();
        let described = !board.modes.is_empty();
        (described || power_w.is_some()).then_some(Goals {
            power_w,
            follows_mode,
            target_c: board.thermal.target_c,
            give_up,
        })
    }
}

/// Energy since the monitor started, or between two moments.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Energy {
    /// Joules, over the time in which power was measured.
    pub joules: f64,
    /// That time.
    pub seconds: f64,
    /// The highest temperature of the junction since the start.
    pub peak_c: Option<f64>,
}

impl Energy {
    /// What was used since `earlier`.
    pub fn since(&self, earlier: &Energy) -> Energy {
        Energy {
            joules: self.joules - earlier.joules,
            seconds: self.seconds - earlier.seconds,
            peak_c: self.peak_c,
        }
    }

    /// What was used in both times.
    pub fn plus(&self, other: &Energy) -> Energy {
        Energy {
            joules: self.joules + other.joules,
            seconds: self.seconds + other.seconds,
            peak_c: higher(self.peak_c, other.peak_c),
        }
    }

    /// Average power; none if it was not measured.
    pub fn average_w(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.joules / self.seconds)
    }

    /// Joules for each of `tokens`; none if power was not measured.
    pub fn joules_per_token(&self, tokens: u64) -> Option<f64> {
        (self.seconds > 0.0 && tokens > 0).then(|| self.joules / tokens as f64)
    }
}

/// What the governor does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Governed {
    /// Average power that it keeps; none if it is not limited.
    pub limit_w: Option<f64>,
    /// The share of what the engine could do, between 0 and 1.
    pub effort: f64,
    /// What holds it down.
    pub held_by: HeldBy,
    /// Threads that may compute.
    pub threads: u32,
}

/// How things stand after a sample.
#[derive(Debug, Clone, Copy, Default)]
pub struct Latest {
    /// The sample.
    pub reading: Reading,
    /// Energy until then.
    pub energy: Energy,
    /// What the governor does, where there is one.
    pub governed: Option<Governed>,
    /// Over-current events since the start; none if nothing counts them.
    pub over_current_events: Option<u64>,
}

/// What changes with every sample.
struct State {
    root: PathBuf,
    sensors: Sensors,
    online: Online,
    governor: Option<Governor>,
    latest: Latest,
    last_s: f64,
    /// The newest power, and when it was measured.
    power: Option<(f64, f64)>,
    /// When the power mode was looked at.
    mode_read_s: f64,
    tells: Tells,
}

impl State {
    fn step(&mut self, now_s: f64, pace: &Pace) {
        let dt_s = now_s - self.last_s;
        if dt_s < SAMPLE_LEAST_S {
            return;
        }
        self.last_s = now_s;
        let reading = self.sensors.sample(now_s);
        self.latest.reading = reading;
        if let Some(watts) = reading.power_w {
            self.power = Some((watts, now_s));
        }
        let energy = &mut self.latest.energy;
        if let Some((watts, _)) = self.power.filter(|(_, at_s)| now_s - at_s <= BRIDGE_S) {
            energy.joules += watts * dt_s;
            energy.seconds += dt_s;
        }
        energy.peak_c = higher(energy.peak_c, reading.junction_c);
        if self.sensors.over_current_counters() > 0 {
            let events = self.latest.over_current_events.get_or_insert(0);
            *events += u64::from(reading.over_current_events);
        }
        if now_s - self.mode_read_s >= MODE_EVERY_S {
            self.mode_read_s = now_s;
            self.follow_mode();
            self.follow_cores(pace);
        }
        if let Some(governor) = &mut self.governor {
            let limits = governor.step(&reading, pace.period_s(), dt_s);
            let threads = limits.threads.min(self.online.threads_max());
            let limits = Limits { threads, ..limits };
            pace.set_limits(limits);
            let governed = Governed {
                limit_w: governor.goals().power_w,
                effort: governor.effort(),
                held_by: governor.held_by(),
                threads: limits.threads,
            };
            self.latest.governed = Some(governed);
            self.tells.governed(&governed, now_s);
            self.tells.measured(&reading);
        }
    }
}

impl State {
    /// Whoever sets another power mode while the engine runs, a robot on its battery, wants its budget kept.
    fn follow_mode(&mut self) {
        let Some(governor) = self.governor.as_mut().filter(|g| g.goals().follows_mode) else {
            return;
        };
        let mode = self.sensors.mode();
        let budget_w = mode.as_ref().and_then(|mode| mode.budget_w);
        if budget_w != governor.goals().power_w {
            governor.set_power_limit(budget_w);
            self.tells.limit(budget_w, &self.sensors, mode.as_ref());
        }
    }
}

impl State {
    /// Threads without a core would only take it from each other, so there are no more of them than cores.
    fn follow_cores(&mut self, pace: &Pace) {
        if !self.online.look(&self.root) {
            return;
        }
        let threads = self.online.threads_max();
        self.tells.cores(&self.online);
        if self.governor.is_none() {
            pace.set_limits(Limits {
                threads,
                ..Limits::NONE
            });
        }
    }
}

/// What the log is told of the governor, lest somebody wonders why answers are slow.
#[derive(Default)]
struct Tells {
    /// The engine is held down, and when that was told, or that it is over.
    held: bool,
    told_s: Option<f64>,
    /// Power is to be kept, and nothing measures it.
    blind: bool,
}

impl Tells {
    /// Tells what is kept, and what cannot be.
    fn start(&mut self, goals: &Goals, sensors: &Sensors, mode: Option<&CurrentMode>) {
        self.limit(goals.power_w, sensors, mode);
        let (zones, target_c) = (sensors.zones().len(), goals.target_c);
        match zones {
            0 => log::warn!(
                "no thermal zone answers: heat is not governed; `airstream doctor` says what to do"
            ),
            _ => log::info!("the junction is held under {target_c} C: {zones} zones"),
        }
    }

    fn limit(&mut self, limit_w: Option<f64>, sensors: &Sensors, mode: Option<&CurrentMode>) {
        let rails = sensors.total_rails();
        let mode = mode.map_or(String::new(), |mode| format!(" (power mode {})", mode.name));
        match limit_w {
            Some(watts) if rails.is_empty() => {
                self.blind = true;
                log::warn!(
                    "nothing measures power here: it is not held at {watts} W{mode}; `airstream doctor` says what to do"
                );
            }
            Some(watts) => log::info!("power is held at {watts} W{mode}: {}", rails.join(" + ")),
            None => log::info!("power is not limited{mode}"),
        }
    }

    /// Tells that cores came or went.
    fn cores(&mut self, online: &Online) {
        let now = online.now();
        match online.threads_max() {
            u32::MAX => {
                log::info!("{now} cores are online: as many threads compute as at the start")
            }
            threads => log::warn!(
                "{now} cores are left online: no more than {threads} threads compute until others come back"
            ),
        }
    }

    /// Tells when the engine begins to be held down, and when it is let go; not more often than every minute.
    fn governed(&mut self, governed: &Governed, now_s: f64) {
        let soon = self
            .told_s
            .is_some_and(|told_s| now_s - told_s < TELL_EVERY_S);
        let changed = match self.held {
            true => governed.effort > EFFORT_FREE,
            false => governed.effort < EFFORT_HELD,
        };
        if soon || !changed {
            return;
        }
        (self.held, self.told_s) = (!self.held, Some(now_s));
        match self.held {
            true => log::info!(
                "held down by {}: {:.0}% of the work, {} threads",
                governed.held_by.words(),
                100.0 * governed.effort,
                governed.threads
            ),
            false => log::info!("no longer held down"),
        }
    }

    /// Tells that a sensor has come after all.
    fn measured(&mut self, reading: &Reading) {
        if self.blind && reading.power_w.is_some() {
            self.blind = false;
            log::info!("power is measured now, and held");
        }
    }
}

struct Shared {
    state: Mutex<State>,
    /// As of the last sample: whoever asks does not wait for a sensor that hangs.
    latest: Mutex<Latest>,
    pace: Pace,
    began: Instant,
    stop: AtomicBool,
}

impl Shared {
    /// Samples now.
    fn step(&self) -> Latest {
        let mut state = lock(&self.state);
        state.step(self.began.elapsed().as_secs_f64(), &self.pace);
        *lock(&self.latest) = state.latest;
        state.latest
    }
}

/// Samples the board's sensors in the background until it is dropped.
pub struct Monitor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Starts to watch `board`, whose files lie under `root`; with `govern`, also holds the engine to its goals, which
    /// at full effort does what the limits say.
    pub fn start(board: &Board, root: &Path, govern: Option<(Goals, Limits)>) -> Monitor {
        let sensors = Sensors::new(board, root, -SAMPLE_EVERY.as_secs_f64());
        let mut tells = Tells::default();
        if let Some((goals, _)) = &govern {
            tells.start(goals, &sensors, sensors.mode().as_ref());
        }
        // What is to be governed may get its sensors later; where there is nothing to read there is nothing to do else.
        let watched = govern.is_some()
            || !sensors.rails().is_empty()
            || !sensors.zones().is_empty()
            || sensors.over_current_counters() > 0;
        let mut state = State {
            root: root.to_owned(),
            sensors,
            online: Online::new(root),
            governor: govern.map(|(goals, full)| Governor::new(goals, full)),
            latest: Latest::default(),
            last_s: -SAMPLE_EVERY.as_secs_f64(),
            power: None,
            mode_read_s: 0.0,
            tells,
        };
        // A board that is hot already is not to find out in the middle of the first sweep.
        let pace = Pace::new();
        state.step(0.0, &pace);
        let energy = &mut state.latest.energy;
        (energy.joules, energy.seconds) = (0.0, 0.0);
        let shared = Arc::new(Shared {
            latest: Mutex::new(state.latest),
            state: Mutex::new(state),
            pace,
            began: Instant::now(),
            stop: AtomicBool::new(false),
        });
        let thread = watched.then(|| spawn(Arc::clone(&shared))).flatten();
        Monitor { shared, thread }
    }

    /// How things stood at the newest sample. Reads nothing.
    pub fn latest(&self) -> Latest {
        *lock(&self.shared.latest)
    }

    /// Energy until now.
    pub fn energy(&self) -> Energy {
        match self.thread {
            Some(_) => self.shared.step().energy,
            None => Energy::default(),
        }
    }

    /// What the governor allows, for the engine to follow.
    pub fn pace(&self) -> Pace {
        self.shared.pace.clone()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic there has already been told on stderr.
            let _ = thread.join();
        }
    }
}

fn spawn(shared: Arc<Shared>) -> Option<JoinHandle<()>> {
    let body = move || {
        while !shared.stop.load(Ordering::Acquire) {
            shared.step();
            std::thread::park_timeout(SAMPLE_EVERY);
        }
    };
    let thread = std::thread::Builder::new()
        .name("sensors".into())
        .spawn(body);
    if let Err(e) = &thread {
        log::warn!("power and temperature are not watched: cannot start a thread: {e}");
    }
    thread.ok()
}

/// The higher of two temperatures, as far as they are known.
fn higher(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    a.into_iter().chain(b).reduce(f64::max)
}

/// The value behind a lock, whatever became of a thread that held it: all of them are plain numbers.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
