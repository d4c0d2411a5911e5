//! Prompts under the board's governor, simulated: nobody waits long for the end of a sweep, and power is held.

use super::*;
use crate::board::Reading;
use crate::board::governor::{GiveUp, Goals, Governor, Limits};
use crate::board::monitor::SAMPLE_EVERY;
use crate::board::pace::{Sweeps, sweep_s_max};

/// The part of the busy power that does not depend on the number of threads.
const SHARED: f64 = 0.2;
/// The share of it that decoding draws, which waits for memory most of the time.
const DECODING: f64 = 0.5;
/// Steps of the simulation; a job of the pool's takes no longer.
const STEP_S: f64 = 0.05;
/// What the unit's WatchdogSec= leaves room for several times over.
const GAP_S_MAX: f64 = 20.0;

/// A board, its governor and an engine, at some moment.
struct Machine {
    threads: u32,
    idle_w: f64,
    busy_w: f64,
    governor: Governor,
    limits: Limits,
    sweeps: Sweeps,
    now_s: f64,
    sampled_s: f64,
    joules: f64,
}

impl Machine {
    fn new(threads: u32, idle_w: f64, busy_w: f64, limit_w: f64) -> Machine {
        let goals = Goals {
            power_w: Some(limit_w),
            follows_mode: false,
            target_c: 90.0,
            give_up: GiveUp::Latency,
        };
        let limits = Limits {
            threads,
            rows: 512,
            ..Limits::NONE
        };
        Machine {
            threads,
            idle_w,
            busy_w,
            governor: Governor::new(goals, limits),
            limits,
            sweeps: Sweeps::default(),
            now_s: 0.0,
            sampled_s: 0.0,
            joules: 0.0,
        }
    }

    fn share(&self) -> f64 {
        f64::from(self.limits.threads) / f64::from(self.threads)
    }

    /// Lets so much time go by, and the governor look at the power meanwhile.
    fn pass(&mut self, seconds: f64, power_w: f64) {
        self.joules += power_w * seconds;
        self.now_s += seconds;
        let dt_s = self.now_s - self.sampled_s;
        if dt_s >= SAMPLE_EVERY.as_secs_f64() {
            self.sampled_s = self.now_s;
            let reading = Reading {
                power_w: Some(power_w),
                ..Reading::default()
            };
            let period_s = self.sweeps.period_s(&self.limits, self.now_s);
            self.limits = self.governor.step(&reading, period_s, dt_s);
        }
    }

    fn rest(&mut self) {
        loop {
            let left_s = self.sweeps.rest_s(&self.limits, self.now_s).min(STEP_S);
            if left_s <= 1e-9 {
                return;
            }
            self.pass(left_s, self.idle_w);
        }
    }

    /// A sweep of which all threads would compute so long; how long it computes.
    fn sweep(&mut self, work_s: f64, busy: f64) -> f64 {
        self.rest();
        self.sweeps.begin(self.now_s);
        let (began_s, mut left_s) = (self.now_s, work_s);
        while left_s > 1e-9 {
            let share = self.share();
            let took_s = STEP_S.min(left_s / share);
            left_s -= took_s * share;
            let power = SHARED + (1.0 - SHARED) * share;
            self.pass(took_s, self.idle_w + self.busy_w * busy * power);
        }
        self.sweeps.end(self.now_s);
        self.now_s - began_s
    }

    /// Decodes for so long.
    fn decode(&mut self, seconds: f64) {
        let end_s = self.now_s + seconds;
        while self.now_s < end_s {
            self.sweep(0.1, DECODING);
        }
    }

    /// Reads a prompt of so many rows; the longest time between two ends of sweeps.
    fn read(&mut self, pace: &mut Pace, rows: usize, row_s: f64) -> f64 {
        let (mut left, mut gap_s) = (rows, 0.0_f64);
        while left > 0 {
            let most_s = sweep_s_max(&self.limits, f64::from(COMPUTING_S_MAX));
            let most_s = (most_s * self.share()) as f32;
            let taken = pace.prefill_rows(0, left.min(512), most_s);
            let (before_s, share) = (self.now_s, self.share());
            let computed_s = self.sweep(taken as f64 * row_s, 1.0) * share.max(self.share());
            pace.swept(0, taken, (self.now_s - before_s) as f32, computed_s as f32);
            gap_s = gap_s.max(self.now_s - before_s);
            left -= taken;
        }
        gap_s
    }
}

#[test]
fn a_prompt_after_an_answer_does_not_wind_the_governor_up() {
    // Boards like the Nano, the AGX and Thor, slightly over their limits and far; and a GPU, which has no threads to
    // give up.
    for (threads, idle_w, busy_w, limit_w, row_s) in [
        (5, 4.5, 8.5, 10.0, 0.03),
        (5, 4.5, 8.5, 10.0, 0.2),
        (11, 12.0, 24.0, 28.0, 0.03),
        (11, 12.0, 24.0, 32.0, 0.03),
        (13, 30.0, 60.0, 40.0, 0.03),
        (13, 30.0, 60.0, 70.0, 0.03),
        (13, 30.0, 60.0, 82.0, 0.03),
        (1, 30.0, 60.0, 40.0, 0.03),
        (1, 30.0, 60.0, 70.0, 0.03),
    ] {
        let what = format!("{threads} threads, {idle_w} + {busy_w} W, {limit_w} W, {row_s} s");
        let mut machine = Machine::new(threads, idle_w, busy_w, limit_w);
        machine.decode(10.0);
        let mut pace = Pace::new(2.0, 8, (row_s * f64::from(BYTE_ROWS_PER_S)) as u64);
        let gap_s = machine.read(&mut pace, 2048, row_s);
        assert!(gap_s < GAP_S_MAX, "{what}: {gap_s} s");
        // What follows is long enough for an average.
        let (began_s, before_j) = (machine.now_s, machine.joules);
        let gap_s = machine.read(&mut pace, 4096, row_s);
        assert!(gap_s < GAP_S_MAX, "{what}: {gap_s} s");
        let took_s = machine.now_s - began_s;
        let average_w = (machine.joules - before_j) / took_s;
        let over = average_w / limit_w - 1.0;
        assert!((-0.1..0.03).contains(&over), "{what}: {average_w} W");
        println!("{what}: gap {gap_s:.1} s, {average_w:.2} W");
    }
}
