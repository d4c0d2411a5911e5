//! The thread that samples the sensors, sums up energy and asks the governor.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Reading;
use super::config::Board;
use super::governor::{GiveUp, Goals, Governor, Limits};
use super::pace::Pace;
use super::sensors::{CurrentMode, Sensors, current_mode};

/// Time between two samples.
pub const SAMPLE_EVERY: Duration = Duration::from_millis(200);
/// Samples closer than this tell nothing new: counters of energy move about every millisecond.
const SAMPLE_LEAST_S: f64 = 0.01;
/// A sensor that is silent for so long is taken to draw what it drew before; after that its time is not counted.
const BRIDGE_S: f64 = 3.0;

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
        let described = !board.modes.is_empty();
        (described || power_w.is_some()).then_some(Goals {
            power_w,
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

/// What changes with every sample.
struct State {
    sensors: Sensors,
    governor: Option<Governor>,
    reading: Reading,
    energy: Energy,
    last_s: f64,
    /// The newest power, and when it was measured.
    power: Option<(f64, f64)>,
}

impl State {
    fn step(&mut self, now_s: f64, pace: &Pace) {
        let dt_s = now_s - self.last_s;
        if dt_s < SAMPLE_LEAST_S {
            return;
        }
        self.last_s = now_s;
        self.reading = self.sensors.sample(now_s);
        if let Some(watts) = self.reading.power_w {
            self.power = Some((watts, now_s));
        }
        if let Some((watts, _)) = self.power.filter(|(_, at_s)| now_s - at_s <= BRIDGE_S) {
            self.energy.joules += watts * dt_s;
            self.energy.seconds += dt_s;
        }
        self.energy.peak_c = higher(self.energy.peak_c, self.reading.junction_c);
        if let Some(governor) = &mut self.governor {
            pace.set_limits(governor.step(&self.reading, pace.period_s(), dt_s));
        }
    }
}

struct Shared {
    state: Mutex<State>,
    pace: Pace,
    began: Instant,
    stop: AtomicBool,
}

impl Shared {
    /// Samples now.
    fn step(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        state.step(self.began.elapsed().as_secs_f64(), &self.pace);
        state
    }
}

/// Samples the board's sensors in the background until it is dropped.
pub struct Monitor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    mode: Option<CurrentMode>,
}

impl Monitor {
    /// Starts to watch `board`, whose files lie under `root`; with `govern`, also holds the engine to its goals, which
    /// at full effort does what the limits say.
    pub fn start(board: &Board, root: &Path, govern: Option<(Goals, Limits)>) -> Monitor {
        let sensors = Sensors::new(board, root, -SAMPLE_EVERY.as_secs_f64());
        let watched = !sensors.rails().is_empty()
            || !sensors.zones().is_empty()
            || sensors.over_current_counters() > 0;
        let mut state = State {
            sensors,
            governor: govern.map(|(goals, full)| Governor::new(goals, full)),
            reading: Reading::default(),
            energy: Energy::default(),
            last_s: -SAMPLE_EVERY.as_secs_f64(),
            power: None,
        };
        // A board that is hot already is not to find out in the middle of the first sweep.
        let pace = Pace::new();
        state.step(0.0, &pace);
        (state.energy.joules, state.energy.seconds) = (0.0, 0.0);
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            pace,
            began: Instant::now(),
            stop: AtomicBool::new(false),
        });
        // Where there is nothing to read there is nothing to do.
        let thread = watched.then(|| spawn(Arc::clone(&shared))).flatten();
        Monitor {
            shared,
            thread,
            mode: current_mode(root, board),
        }
    }

    /// The newest sample, and energy until then. Reads nothing.
    pub fn latest(&self) -> (Reading, Energy) {
        let state = lock(&self.shared.state);
        (state.reading, state.energy)
    }

    /// Energy until now.
    pub fn energy(&self) -> Energy {
        match self.thread {
            Some(_) => self.shared.step().energy,
            None => Energy::default(),
        }
    }

    /// The power mode that was set when the monitor started.
    pub fn mode(&self) -> Option<&CurrentMode> {
        self.mode.as_ref()
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
            drop(shared.step());
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
