//! How the engine keeps to what the governor allows: pauses between sweeps, and threads within them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::governor::Limits;
use super::monitor::lock;

/// The longest pause at a time: somebody may want to stop the engine.
pub const PAUSE_MAX_S: f64 = 5.0;
/// However short pauses make them, sweeps may compute for so long: each reads all weights.
const SWEEP_LEAST_S: f64 = 1.0;

/// When sweeps began and ended, in seconds since any moment. Pure.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sweeps {
    took_s: f64,
    /// Of the sweep that is under way.
    began_s: Option<f64>,
    ended_s: Option<f64>,
}

impl Sweeps {
    /// A sweep begins.
    pub fn begin(&mut self, now_s: f64) {
        self.began_s = Some(now_s);
    }

    /// It has ended.
    pub fn end(&mut self, now_s: f64) {
        if let Some(began_s) = self.began_s.take() {
            self.took_s = now_s - began_s;
            self.ended_s = Some(now_s);
        }
    }

    /// The rest of the pause that the last sweep calls for.
    pub fn rest_s(&self, limits: &Limits, now_s: f64) -> f64 {
        let rested_s = self.ended_s.map_or(f64::MAX, |ended_s| now_s - ended_s);
        (self.pause_s(limits) - rested_s).max(0.0)
    }

    /// How long a sweep takes with its pause: the last one, or the one under way if that takes longer already. While it
    /// runs a governor cannot see what its pauses would do, so it must not believe that they do nothing.
    pub fn period_s(&self, limits: &Limits, now_s: f64) -> f64 {
        let last_s = self.took_s + self.pause_s(limits);
        last_s.max(self.began_s.map_or(0.0, |began_s| now_s - began_s))
    }

    fn pause_s(&self, limits: &Limits) -> f64 {
        limits.pause_s(self.took_s).min(PAUSE_MAX_S)
    }
}

/// The longest sweep, of `most_s` seconds at most, whose pause is not cut short.
pub fn sweep_s_max(limits: &Limits, most_s: f64) -> f64 {
    let paused_s = limits.pause_s(1.0);
    (PAUSE_MAX_S / paused_s).max(SWEEP_LEAST_S).min(most_s)
}

/// What the governor tells the engine, and the engine the governor. Cheap to clone and to ask.
#[derive(Debug, Clone)]
pub struct Pace(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    began: Instant,
    paced: Mutex<(Limits, Sweeps)>,
    threads: Arc<AtomicU32>,
}

impl Pace {
    /// A pace that holds nothing back, until a governor says otherwise.
    pub(super) fn new() -> Pace {
        Pace(Arc::new(Shared {
            began: Instant::now(),
            paced: Mutex::new((Limits::NONE, Sweeps::default())),
            threads: Arc::new(AtomicU32::new(Limits::NONE.threads)),
        }))
    }

    fn now_s(&self) -> f64 {
        self.0.began.elapsed().as_secs_f64()
    }

    /// What the engine may do now.
    pub fn limits(&self) -> Limits {
        lock(&self.0.paced).0
    }

    /// How many threads may compute, as it is at any moment: a sweep may take many seconds, and an over-current event
    /// does not wait for its end.
    pub fn threads(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.0.threads)
    }

    pub(super) fn set_limits(&self, limits: Limits) {
        lock(&self.0.paced).0 = limits;
        self.0.threads.store(limits.threads, Ordering::Relaxed);
    }

    /// Waits for as long as the last sweep calls for; the time since its end counts. Call it before every sweep.
    pub fn rest(&self) -> Duration {
        let left_s = {
            let (limits, sweeps) = *lock(&self.0.paced);
            sweeps.rest_s(&limits, self.now_s())
        };
        let left = Duration::from_secs_f64(left_s);
        if !left.is_zero() {
            std::thread::sleep(left);
        }
        left
    }

    /// A sweep begins. Call [`ended`](Self::ended) after it.
    pub fn begins(&self) {
        let now_s = self.now_s();
        lock(&self.0.paced).1.begin(now_s);
    }

    /// The sweep has ended, whatever came of it.
    pub fn ended(&self) {
        let now_s = self.now_s();
        lock(&self.0.paced).1.end(now_s);
    }

    /// How long a sweep takes with its pause.
    pub(super) fn period_s(&self) -> f64 {
        let (limits, sweeps) = *lock(&self.0.paced);
        sweeps.period_s(&limits, self.now_s())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_that_runs_counts_as_soon_as_it_takes_longer_than_the_last() {
        let half = Limits {
            duty: 0.5,
            ..Limits::NONE
        };
        let mut sweeps = Sweeps::default();
        assert_eq!(sweeps.rest_s(&half, 1.0), 0.0, "nothing was swept yet");
        assert_eq!(sweeps.period_s(&half, 1.0), 0.0);
        sweeps.begin(1.0);
        sweeps.end(3.0);
        assert_eq!(sweeps.rest_s(&half, 3.5), 1.5);
        assert_eq!(sweeps.rest_s(&half, 9.0), 0.0);
        assert_eq!(sweeps.period_s(&half, 9.0), 4.0);
        sweeps.begin(10.0);
        assert_eq!(sweeps.period_s(&half, 13.0), 4.0);
        assert_eq!(sweeps.period_s(&half, 17.0), 7.0);
        sweeps.end(30.0);
        assert_eq!(sweeps.rest_s(&half, 30.0), PAUSE_MAX_S);
        assert_eq!(sweeps.period_s(&half, 31.0), 20.0 + PAUSE_MAX_S);
    }

    #[test]
    fn sweeps_are_no_longer_than_their_pauses_allow() {
        let duty = |duty| {
            let limits = Limits {
                duty,
                ..Limits::NONE
            };
            sweep_s_max(&limits, 10.0)
        };
        assert_eq!(duty(1.0), 10.0);
        assert_eq!(duty(0.5), 5.0);
        assert_eq!(duty(0.04), SWEEP_LEAST_S);
    }
}
