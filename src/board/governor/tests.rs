//! The governor against simulated boards: power with noise, a thermal model of first order (or of die and heat sink),
//! sensors that drop out, load that comes and goes, fans that stop, over-current events.

use super::*;
use crate::board::Board;

const DT_S: f64 = 0.2;
/// Scenarios for each board. Other processors run these tests under emulation, where the arithmetic is the same and
/// takes a hundred times as long.
const SEEDS: u64 = if cfg!(target_arch = "x86_64") {
    1000
} else {
    10
};

/// A small generator of pseudo-random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.next()
    }

    /// Roughly normal, of mean 0 and deviation 1.
    fn noise(&mut self) -> f64 {
        2.0 * (self.next() + self.next() + self.next()) - 3.0
    }
}

/// A board that draws power and grows warm.
struct Plant {
    idle_w: f64,
    busy_w: f64,
    /// The part of the busy power that does not depend on the number of threads, and how the rest grows with it.
    shared: f64,
    exponent: f64,
    threads: f64,
    /// Kelvins per watt with the fan off, and what the fan makes of it.
    resistance: f64,
    fan: f64,
    /// The share of it between die and heat sink.
    die: f64,
    joules_per_k: f64,
    ambient_c: f64,
    load: f64,
    fan_on: bool,
    power_w: f64,
    sink_c: f64,
    junction_c: f64,
}

impl Plant {
    fn draws(&self, limits: &Limits) -> f64 {
        let threads = (f64::from(limits.threads) / self.threads).powf(self.exponent);
        let busy = self.shared + (1.0 - self.shared) * threads;
        self.idle_w + self.busy_w * self.load * busy * limits.duty
    }

    fn step(&mut self, limits: &Limits) {
        // Regulators and averaging sensors lag a little.
        self.power_w += (self.draws(limits) - self.power_w) * 0.8;
        let resistance = self.resistance * if self.fan_on { self.fan } else { 1.0 };
        let lost_w = (self.sink_c - self.ambient_c) / (resistance * (1.0 - self.die));
        self.sink_c += (self.power_w - lost_w) * DT_S / self.joules_per_k;
        // A die that is warmer than its heat sink follows it within seconds.
        let die_c = self.sink_c + self.power_w * resistance * self.die;
        let follows = if self.die > 0.0 { DT_S / 3.0 } else { 1.0 };
        self.junction_c += (die_c - self.junction_c) * follows;
    }
}

/// How often a row of values turns after it has moved by more than `least`: a step that is corrected turns once or
/// twice, drift never, and a limit cycle again and again.
fn turns(values: &[f64], least: f64) -> usize {
    let (mut low, mut high) = (f64::MAX, f64::MIN);
    let mut rising = None;
    let mut turns = 0;
    for &value in values {
        (low, high) = (low.min(value), high.max(value));
        let turned = match rising {
            Some(true) => high - value > least,
            Some(false) => value - low > least,
            None => high - low > least,
        };
        if turned {
            turns += usize::from(rising.is_some());
            rising = Some(value == high);
            (low, high) = (value, value);
        }
    }
    turns
}

fn averages(values: &[f64], count: usize) -> Vec<f64> {
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    values.chunks_exact(count).map(mean).collect()
}

struct Scenario {
    random: Random,
    plant: Plant,
    governor: Governor,
    full: Limits,
    limit_w: f64,
    target_c: f64,
    limit_c: f64,
    silent_power_s: f64,
    silent_heat_s: f64,
    what: String,
}

impl Scenario {
    fn new(board: &Board, seed: u64) -> Scenario {
        let mut random = Random(seed);
        let cores = board.cpu.cores.unwrap_or(8);
        let full = Limits {
            threads: (cores - u32::from(board.cpu.leave_cpu0)).max(1),
            reads: board.nvme.depth,
            rows: 512,
            drafts: 4,
            precision_drop: 0,
            duty: 1.0,
        };
        let budgets = board.modes.iter().filter_map(|mode| mode.budget_w);
        let most_w = budgets.fold(20.0, f64::max) * random.between(0.7, 1.6);
        let idle_w = most_w * random.between(0.1, 0.4);
        let busy_w = most_w - idle_w;
        let limit_w = idle_w + busy_w * random.between(0.25, 1.1);
        let ambient_c = random.between(5.0, 45.0);
        let (target_c, limit_c) = (board.thermal.target_c, board.thermal.limit_c);
        // With the fan off the board must be able to live with the least effort.
        let least_w = idle_w + busy_w * 0.15;
        let coolable = (target_c - 8.0 - ambient_c) / least_w;
        let resistance = coolable.min(random.between(30.0, 250.0) / most_w);
        let fan = random.between(0.4, 0.8);
        let die = if random.next() < 0.5 { 0.15 } else { 0.0 };
        let starts_c = ambient_c + idle_w * resistance * fan;
        let plant = Plant {
            idle_w,
            busy_w,
            shared: random.between(0.0, 0.4),
            exponent: random.between(0.7, 1.2),
            threads: f64::from(full.threads),
            resistance,
            fan,
            die,
            joules_per_k: random.between(40.0, 200.0) / resistance,
            ambient_c,
            load: 1.0,
            fan_on: random.next() < 0.5,
            power_w: idle_w,
            sink_c: starts_c,
            junction_c: starts_c,
        };
        let give_up = match random.next() < 0.5 {
            true => GiveUp::Latency,
            false => GiveUp::Throughput,
        };
        let goals = Goals {
            power_w: Some(limit_w),
            follows_mode: false,
            target_c,
            give_up,
        };
        Scenario {
            governor: Governor::new(goals, full),
            what: format!("{} seed {seed}", board.name),
            random,
            plant,
            full,
            limit_w,
            target_c,
            limit_c,
            silent_power_s: 0.0,
            silent_heat_s: 0.0,
        }
    }

    /// One reading and what follows from it.
    fn step(&mut self, events: u32) -> Limits {
        let random = &mut self.random;
        for silent_s in [&mut self.silent_power_s, &mut self.silent_heat_s] {
            *silent_s -= DT_S;
            // About every 25 seconds a sensor is silent for up to 2.
            if *silent_s < -5.0 && random.next() < DT_S / 20.0 {
                *silent_s = random.between(0.0, 2.0);
            }
        }
        let power_w = self.plant.power_w * (1.0 + 0.01 * random.noise());
        let junction_c = self.plant.junction_c + 0.05 * random.noise();
        let reading = Reading {
            power_w: (self.silent_power_s <= 0.0).then_some(power_w),
            junction_c: (self.silent_heat_s <= 0.0).then_some(junction_c),
            over_current_events: events,
            ..Reading::default()
        };
        let limits = self.governor.step(&reading, 0.05, DT_S);
        self.plant.step(&limits);
        assert!(limits.threads >= 1 && limits.duty > 0.0 && limits.rows >= 1 && limits.reads >= 1);
        limits
    }

    /// The seconds after something has changed, and what does not hold by then.
    fn settle(&mut self, after: &str, seconds: usize) -> Vec<String> {
        let (mut power, mut junction, mut efforts) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..5 * seconds {
            self.step(0);
            power.push(self.plant.power_w);
            junction.push(self.plant.junction_c);
            efforts.push(self.governor.effort());
        }
        let mut wrong = Vec::new();
        let mut check = |holds: bool, what: String| {
            if !holds {
                wrong.push(format!("{}, {after}: {what}", self.what));
            }
        };
        let peak_c = junction.iter().copied().fold(f64::MIN, f64::max);
        check(peak_c <= self.limit_c, format!("{peak_c:.1} C"));
        // From the tenth second on.
        for (i, average) in averages(&power[50..], 50).into_iter().enumerate() {
            let at = 50 + 50 * i..100 + 50 * i;
            let over = average / self.limit_w - 1.0;
            let least = efforts[at.clone()].iter().all(|&e| e <= EFFORT_MIN);
            check(
                over <= 0.02 || least,
                format!("{:.1}% too much", 100.0 * over),
            );
            let most = efforts[at.clone()].iter().any(|&e| e >= 0.99);
            let warm = junction[at]
                .iter()
                .any(|&c| c > self.target_c - BAND_K - 1.0);
            // What an over-current event took comes back more slowly.
            let soon = after == "over-current" && i <= 1;
            let idle = self.plant.load == 0.0;
            check(
                over >= -0.02 || most || warm || soon || idle,
                format!("{:.1}% left", -100.0 * over),
            );
        }
        // Warming up takes its time; when it is over, nothing may go round in circles.
        let settled = 5 * 60.min(seconds);
        let cycles = turns(&averages(&power[settled..], 5), 0.03 * self.limit_w);
        check(cycles <= 2, format!("power turns {cycles} times"));
        let cycles = turns(&averages(&junction[settled..], 5), 1.0);
        check(cycles <= 2, format!("the junction turns {cycles} times"));
        wrong
    }

    /// A life of seven minutes, and all that goes wrong in it.
    fn live(mut self) -> Vec<String> {
        let mut wrong = self.settle("started", 60);
        self.plant.load = self.random.between(0.3, 1.0);
        wrong.extend(self.settle("another load", 40));
        self.plant.fan_on = !self.plant.fan_on;
        wrong.extend(self.settle("fan switched", 40));
        self.plant.load = 1.0;
        wrong.extend(self.settle("full load", 180));
        // An over-current event shows at once.
        let before = self.governor.effort();
        self.step(1);
        let after = self.governor.effort();
        if after > (OVER_CURRENT_CUT * before).max(EFFORT_MIN) {
            wrong.push(format!(
                "{}: effort {after} after an over-current event",
                self.what
            ));
        }
        wrong.extend(self.settle("over-current", 40));
        // When the load goes, all comes back.
        self.plant.load = 0.0;
        wrong.extend(self.settle("load gone", 60));
        let limits = self.step(0);
        let cool = self.plant.junction_c < self.target_c - BAND_K - 1.0;
        if cool && limits != self.full {
            wrong.push(format!("{}: {limits:?} without load", self.what));
        }
        wrong
    }
}

#[test]
fn every_board_keeps_within_power_and_heat() {
    let boards = Board::all().expect("sound");
    let scenarios = boards
        .iter()
        .flat_map(|b| (0..SEEDS).map(move |seed| Scenario::new(b, seed)));
    let wrong: Vec<String> = scenarios.flat_map(Scenario::live).collect();
    assert!(
        wrong.is_empty(),
        "{} findings, for example\n{}",
        wrong.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
}

#[test]
fn long_sweeps_are_averaged_over() {
    // Two seconds a sweep at 20 W, then a pause at 5 W: no single reading is near the 10 W that are allowed.
    let goals = Goals {
        power_w: Some(10.0),
        follows_mode: false,
        target_c: 90.0,
        give_up: GiveUp::Latency,
    };
    let full = Limits {
        threads: 1,
        reads: 16,
        rows: 512,
        drafts: 0,
        precision_drop: 0,
        duty: 1.0,
    };
    let mut governor = Governor::new(goals, full);
    let (mut limits, mut left_s, mut busy) = (full, 2.0, true);
    let mut powers = Vec::new();
    for _ in 0..3000 {
        left_s -= DT_S;
        if left_s <= 0.0 {
            busy = !busy;
            left_s = if busy { 2.0 } else { limits.pause_s(2.0) };
        }
        let power_w = if busy { 20.0 } else { 5.0 };
        powers.push(power_w);
        let reading = Reading {
            power_w: Some(power_w),
            ..Reading::default()
        };
        limits = governor.step(&reading, 2.0 + limits.pause_s(2.0), DT_S);
    }
    let late = &powers[1500..];
    let average = late.iter().sum::<f64>() / late.len() as f64;
    assert!((9.5..10.5).contains(&average), "{average}");
}

#[test]
fn a_host_without_sensors_is_left_alone_and_one_that_lost_them_is_careful() {
    let goals = Goals {
        power_w: Some(10.0),
        follows_mode: false,
        target_c: 90.0,
        give_up: GiveUp::Latency,
    };
    let full = Limits {
        threads: 4,
        ..Limits::NONE
    };
    let mut governor = Governor::new(goals, full);
    for _ in 0..1000 {
        governor.step(&Reading::default(), 0.1, DT_S);
    }
    assert_eq!(governor.effort(), 1.0);
    let seen = Reading {
        junction_c: Some(60.0),
        ..Reading::default()
    };
    governor.step(&seen, 0.1, DT_S);
    for _ in 0..1000 {
        governor.step(&Reading::default(), 0.1, DT_S);
    }
    assert_eq!(governor.effort(), BLIND_EFFORT);
    governor.step(&seen, 0.1, DT_S);
    assert_eq!(governor.effort(), 1.0);
}

#[test]
fn the_user_chooses_what_is_lost_first() {
    let limits = |give_up| {
        let goals = Goals {
            power_w: Some(10.0),
            follows_mode: false,
            target_c: 90.0,
            give_up,
        };
        let full = Limits {
            threads: 8,
            reads: 16,
            rows: 512,
            drafts: 4,
            precision_drop: 0,
            duty: 1.0,
        };
        let mut governor = Governor::new(goals, full);
        let hot = Reading {
            junction_c: Some(90.0 - BAND_K / 2.0),
            ..Reading::default()
        };
        assert_eq!(governor.held_by(), HeldBy::Nothing);
        let limits = governor.step(&hot, 0.1, DT_S);
        assert_eq!(governor.held_by(), HeldBy::Heat);
        limits
    };
    let (latency, throughput) = (limits(GiveUp::Latency), limits(GiveUp::Throughput));
    assert_eq!((latency.rows, latency.drafts), (512, 4));
    assert!(
        throughput.rows < 300 && throughput.drafts == 2,
        "{throughput:?}"
    );
    assert!(latency.threads < 8 && latency.duty < 1.0, "{latency:?}");
    assert_eq!(
        (latency.threads, latency.duty),
        (throughput.threads, throughput.duty)
    );
}
