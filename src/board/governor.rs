//! PURE: how much the engine may do, so that the board keeps within its power and heat.
//!
//! One number, the *effort* between 0 and 1, stands for how hard the engine works. Three rules hold it down, and the
//! strictest counts:
//!
//! - **Power** is held at its limit by an integrator in the logarithm of the effort. Of a plant that draws
//!   `P = idle + k * effort` it sees a gain of at most 1 at the limit, whatever idle and k are, so one constant is
//!   stable for every board.
//! - **Heat**: effort falls in proportion as the junction enters the band below its target, and a slow integral brings
//!   it to the top of the band where less would do. Against a first-order plant proportional control cannot oscillate,
//!   and the integral is too slow to.
//! - **Over-current** events cut the effort at once; it comes back a few percent a second.
//!
//! What does not answer changes nothing; a junction that is silent for long is taken to be warm. Effort never falls
//! below [`EFFORT_MIN`]: the engine goes on, slowly.

use super::Reading;

/// The least effort.
pub const EFFORT_MIN: f64 = 0.04;
/// How fast the logarithm of the effort follows a relative error in power, per second.
const POWER_GAIN: f64 = 1.8;
/// Effort rises at most by this factor's logarithm per second: it comes back slowly.
const RISE_MAX: f64 = 0.3;
/// Power is averaged over at least so long, since single readings are noisy...
const POWER_FILTER_S: f64 = 0.3;
/// ...and over so many sweeps with their pauses, which it swings with...
const POWER_FILTER_SWEEPS: f64 = 2.0;
/// ...but over no more than this, or a prompt would be read before anything is done. What swings beyond it moves the
/// effort little: the longer the average, the slower it is followed.
const POWER_FILTER_S_MAX: f64 = 8.0;
/// Over so many kelvins below the target effort falls from all to nothing.
const BAND_K: f64 = 10.0;
/// So far below the target the integral brings the junction.
const MARGIN_K: f64 = 1.0;
/// Time constant of that integral; about that of a board with its heat sink.
const HEAT_INTEGRAL_S: f64 = 80.0;
/// Temperatures are averaged over so long.
const HEAT_FILTER_S: f64 = 2.0;
/// A junction that was silent for so long is taken to be warm...
const BLIND_S: f64 = 5.0;
/// ...and the effort sinks to this.
const BLIND_EFFORT: f64 = 0.5;
/// What an over-current event leaves of the effort.
const OVER_CURRENT_CUT: f64 = 0.6;
/// After the last event the effort stays down for so long...
const OVER_CURRENT_HOLD_S: f64 = 3.0;
/// ...and then rises by this factor's logarithm per second.
const OVER_CURRENT_RISE: f64 = 0.03;
/// The part of the busy power that does not depend on how many threads work: memory, caches, clocks.
const SHARED: f64 = 0.2;
/// Pauses may take this share of the time before a thread is given up instead, lest the number of threads swings.
const THREAD_SLACK: f64 = 0.3;

/// What the user would rather lose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GiveUp {
    /// Sweeps stay as large as they are: most tokens per joule, and each answer slower.
    #[default]
    Latency,
    /// Sweeps get smaller with the effort: nobody waits long for one, and fewer tokens in all.
    Throughput,
}

impl std::str::FromStr for GiveUp {
    type Err = String;

    fn from_str(text: &str) -> Result<GiveUp, String> {
        match text {
            "latency" => Ok(GiveUp::Latency),
            "throughput" => Ok(GiveUp::Throughput),
            _ => Err("one of latency, throughput".into()),
        }
    }
}

/// What is to be kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goals {
    /// Average power; none if it is not limited.
    pub power_w: Option<f64>,
    /// Whether that is what the power mode is named for, and changes with it.
    pub follows_mode: bool,
    /// The junction's temperature.
    pub target_c: f64,
    /// What to lose first.
    pub give_up: GiveUp,
}

/// What holds the effort down most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldBy {
    /// Nothing does: the engine does all it can.
    #[default]
    Nothing,
    /// The limit of power.
    Power,
    /// The junction's temperature, or that nobody knows it any more.
    Heat,
    /// An over-current event.
    OverCurrent,
}

impl HeldBy {
    /// In a few words.
    pub fn words(self) -> &'static str {
        match self {
            HeldBy::Nothing => "nothing",
            HeldBy::Power => "the power limit",
            HeldBy::Heat => "heat",
            HeldBy::OverCurrent => "over-current",
        }
    }
}

/// What the engine may do until the governor says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Limits {
    /// Threads that compute.
    pub threads: u32,
    /// Reads in flight.
    pub reads: u32,
    /// Rows in a sweep.
    pub rows: u32,
    /// Tokens drafted ahead, where there is speculation.
    pub drafts: u32,
    /// Levels of precision to do without, where a model has several; 0 is the best answer.
    pub precision_drop: u32,
    /// The share of the time that sweeps may take; pauses take the rest.
    pub duty: f64,
}

impl Limits {
    /// Nothing is held down.
    pub const NONE: Limits = Limits {
        threads: u32::MAX,
        reads: u32::MAX,
        rows: u32::MAX,
        drafts: u32::MAX,
        precision_drop: 0,
        duty: 1.0,
    };

    /// The pause that a sweep of `sweep_s` seconds calls for.
    pub fn pause_s(&self, sweep_s: f64) -> f64 {
        sweep_s * (1.0 / self.duty.clamp(EFFORT_MIN, 1.0) - 1.0)
    }
}

/// The governor: call [`step`](Self::step) with every reading.
#[derive(Debug, Clone)]
pub struct Governor {
    goals: Goals,
    /// What the engine does at full effort.
    full: Limits,
    /// What each rule allows.
    for_power: f64,
    for_heat: f64,
    for_current: f64,
    power_w: Option<f64>,
    junction_c: Option<f64>,
    heat_integral: f64,
    blind_s: f64,
    hold_s: f64,
    threads: u32,
}

impl Governor {
    /// A governor for an engine that does `full` if nothing holds it down.
    pub fn new(goals: Goals, full: Limits) -> Governor {
        Governor {
            goals,
            full,
            for_power: 1.0,
            for_heat: 1.0,
            for_current: 1.0,
            power_w: None,
            junction_c: None,
            heat_integral: 0.0,
            blind_s: 0.0,
            hold_s: 0.0,
            threads: full.threads.max(1),
        }
    }

    /// The effort that is allowed now.
    pub fn effort(&self) -> f64 {
        let strictest = self.for_power.min(self.for_heat).min(self.for_current);
        strictest.clamp(EFFORT_MIN, 1.0)
    }

    /// What holds it down.
    pub fn held_by(&self) -> HeldBy {
        let effort = self.effort();
        if effort >= 1.0 {
            HeldBy::Nothing
        } else if self.for_current <= effort {
            HeldBy::OverCurrent
        } else if self.for_heat <= effort {
            HeldBy::Heat
        } else {
            HeldBy::Power
        }
    }

    /// What it keeps.
    pub fn goals(&self) -> &Goals {
        &self.goals
    }

    /// Keeps to another limit of power from now on.
    pub fn set_power_limit(&mut self, power_w: Option<f64>) {
        self.goals.power_w = power_w;
        if power_w.is_none() {
            self.for_power = 1.0;
        }
    }

    /// Takes in a reading that comes `dt_s` after the last one. `period_s` is how long a sweep takes with its pause
    /// ([`Sweeps::period_s`](super::pace::Sweeps::period_s)).
    pub fn step(&mut self, reading: &Reading, period_s: f64, dt_s: f64) -> Limits {
        let before = self.effort();
        self.hold_current(reading.over_current_events, before, dt_s);
        self.hold_heat(reading.junction_c, dt_s);
        self.hold_power(reading.power_w, before, period_s, dt_s);
        self.limits()
    }

    fn hold_power(&mut self, power_w: Option<f64>, effort: f64, period_s: f64, dt_s: f64) {
        let Some(limit_w) = self.goals.power_w else {
            return;
        };
        let Some(measured) = power_w else {
            // Nobody would see what a higher effort does. A host that never had a sensor is left alone.
            if self.power_w.is_some() {
                self.for_power = self.for_power.min(effort);
            }
            return;
        };
        let filter_s = (POWER_FILTER_SWEEPS * period_s).clamp(POWER_FILTER_S, POWER_FILTER_S_MAX);
        let power = smooth(&mut self.power_w, measured, filter_s, dt_s);
        // A longer average answers later, so it is followed more slowly.
        let gain = POWER_GAIN * POWER_FILTER_S / filter_s;
        let error = (limit_w / power.max(1e-3)).ln().clamp(-2.0, 2.0);
        let change = (gain * error).min(RISE_MAX) * dt_s;
        // While another rule holds the effort down, this one does not rise above it: it would let go too far then.
        let others = self.for_heat.min(self.for_current).max(EFFORT_MIN);
        let ceiling = others.max(self.for_power);
        let next = (self.for_power * change.exp()).min(ceiling);
        self.for_power = next.clamp(EFFORT_MIN, 1.0);
    }

    fn hold_heat(&mut self, junction_c: Option<f64>, dt_s: f64) {
        let Some(measured) = junction_c else {
            // Nothing is known of a host that never had a sensor.
            if self.junction_c.is_some() {
                self.blind_s += dt_s;
                if self.blind_s > BLIND_S && self.for_heat > BLIND_EFFORT {
                    self.for_heat = (self.for_heat - 0.1 * dt_s).max(BLIND_EFFORT);
                }
            }
            return;
        };
        self.blind_s = 0.0;
        let junction = smooth(&mut self.junction_c, measured, HEAT_FILTER_S, dt_s);
        let below = self.goals.target_c - junction;
        let step = (below - MARGIN_K) / BAND_K * dt_s / HEAT_INTEGRAL_S;
        // It gives back only what heat has taken, and outside of the band there is nothing to give back.
        let takes = self.for_heat < self.for_power.min(self.for_current);
        self.heat_integral = match below > BAND_K {
            true => 0.0,
            false if step > 0.0 && !takes => self.heat_integral,
            false => (self.heat_integral + step).clamp(-1.0, 1.0),
        };
        self.for_heat = (below / BAND_K + self.heat_integral).clamp(EFFORT_MIN, 1.0);
    }

    fn hold_current(&mut self, events: u32, effort: f64, dt_s: f64) {
        if events > 0 {
            let cut = OVER_CURRENT_CUT.powi(events.min(3) as i32);
            self.for_current = (effort * cut).max(EFFORT_MIN);
            // On the way back power is to stop the rise where it would have stopped it before.
            self.for_power = self.for_power.min(self.for_current);
            self.hold_s = OVER_CURRENT_HOLD_S;
        } else if self.hold_s > 0.0 {
            self.hold_s -= dt_s;
        } else {
            self.for_current = (self.for_current * (OVER_CURRENT_RISE * dt_s).exp()).min(1.0);
        }
    }

    /// Turns the effort into limits: threads as many as it takes, and pauses for the fraction.
    fn limits(&mut self) -> Limits {
        let (effort, full) = (self.effort(), self.full);
        // The effort of so many threads without a pause, and how many it takes at least.
        let without_pause =
            |threads: u32| SHARED + (1.0 - SHARED) * f64::from(threads) / f64::from(full.threads);
        let needed = |effort: f64| {
            let threads = (effort - SHARED) / (1.0 - SHARED) * f64::from(full.threads);
            (threads.ceil() as u32).clamp(1, full.threads)
        };
        self.threads = self
            .threads
            .clamp(needed(effort), needed(effort / (1.0 - THREAD_SLACK)));
        let share = |most: u32, share: f64, least: u32| {
            let part = (f64::from(most) * share.min(1.0)).ceil() as u32;
            part.clamp(least.min(most), most)
        };
        let work = match self.goals.give_up {
            GiveUp::Latency => 1.0,
            GiveUp::Throughput => effort,
        };
        Limits {
            threads: self.threads,
            // The drive keeps pace with the sweeps by itself; only where little is left it is held down too.
            reads: share(full.reads, 2.0 * effort, 2),
            rows: share(full.rows, work, 1),
            drafts: (f64::from(full.drafts) * work) as u32,
            precision_drop: match effort < 2.0 * EFFORT_MIN {
                true => full.precision_drop,
                false => 0,
            },
            duty: (effort / without_pause(self.threads)).clamp(EFFORT_MIN, 1.0),
        }
    }
}

/// Averages exponentially over about `over_s` seconds.
fn smooth(average: &mut Option<f64>, measured: f64, over_s: f64, dt_s: f64) -> f64 {
    let last = average.unwrap_or(measured);
    let next = last + (measured - last) * (1.0 - (-dt_s / over_s).exp());
    *average = Some(next);
    next
}

#[cfg(test)]
mod tests;
