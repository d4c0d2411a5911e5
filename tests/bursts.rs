//! Two models that are together 1.6 times the memory, asked in bursts, on a virtual clock: the policy that only sees the
//! past against one that knew all bursts in advance.
//!
//! Bursts of random lengths leave less to be learnt of. There the policy is compared with the best that any policy could
//! do, known or untold, which is computed exactly for a machine that is nothing but bytes and seconds ([`Fluid`]).
use std::path::PathBuf;

use airstream::arena::Reservation;
use airstream::engine::demand::Demand;
use airstream::format::quant::QuantType;
use airstream::format::tile::{self, Matrix, Use};
use airstream::io::sim::{Clock, Content, Disk, Faults, Jitter, Options, Sim, Timing};
use airstream::residency::Rate;
use airstream::store::integrity::Integrity;
use airstream::store::{ModelId, Store, Weights};

const SLOT_BYTES: usize = 1 << 20;
const LAYERS: usize = 24;
/// Tiles of the groups of a layer: about the shares of q, k, v; o; gate, up; down.
const GROUPS: [usize; 4] = [4, 2, 8, 4];
const TILES: usize = LAYERS * 18;
const SLOTS: usize = 1 + 2 * TILES * 10 / 16;
const WINDOW: u32 = (SLOTS / 48) as u32;
/// The processor looks after the reads this often, in bytes of weights.
const POLL_BYTES: usize = 64 << 10;
const COMPUTE_BYTES_PER_S: f64 = 20e9;
/// Speeds of disks, in GB/s.
const DISKS: [f64; 3] = [0.5, 2.0, 6.0];

fn weights() -> Weights {
    let mut offset = 1_234_592;
    let matrices: Vec<Matrix> = (0..LAYERS)
        .flat_map(|layer| GROUPS.iter().map(move |&tiles| (layer, tiles)))
        .map(|(layer, tiles)| {
            let matrix = Matrix {
                name: format!("blk.{layer}"),
                qtype: QuantType::Q4_0,
                rows: tiles * 448,
                cols: 4096,
                file: 0,
                offset,
                used: Use::EverySweep,
            };
            offset += matrix.bytes();
            matrix
        })
        .collect();
    let (tiles, ranges) = tile::cut(&matrices, SLOT_BYTES);
    assert_eq!(tiles.len(), TILES);
    Weights {
        matrices,
        tiles,
        ranges,
        paths: vec![PathBuf::from("model.gguf")],
        integrity: Integrity::default(),
        resident: false,
    }
}

/// How the models' tiles are ranked, and what is known of the sweep after the one that begins.
enum Policy {
    /// As the engine does it, with no word of what comes.
    Untold(Demand),
    /// As the engine does it, where whoever schedules the sweeps says which is next.
    Told(Demand),
    /// All is known, and a model has the pool for runs of at least so many sweeps; the models share it in others.
    Oracle(usize),
}

/// The time that bursts take, in seconds: `bursts` are the sweeps of the first model, of the second, the first again.
fn time(bursts: &[usize], disk_gb_s: f64, mut policy: Policy) -> f64 {
    let clock = Clock::default();
    let disk = Disk {
        bytes_per_second: disk_gb_s * 1e9,
        latency_ns: 80_000,
        depth: 64,
        jitter: Jitter::default(),
    };
    let sim = Sim::new(Options {
        seed: 1,
        depth: WINDOW as usize,
        content: Content::Nothing,
        timing: Timing::Disk(disk, clock.clone()),
        faults: Faults::default(),
        log_reads_max: 0,
    });
    let arena = Reservation::new(SLOTS * SLOT_BYTES).expect("nothing of it is ever touched");
    let slots = arena.seal(SLOT_BYTES);
    let mut store = Store::empty(slots, SLOTS as u32, Box::new(sim), WINDOW);
    let ids = [store.add(weights()), store.add(weights())];
    let bytes = weights().matrices.iter().map(Matrix::bytes).sum::<u64>() as f32;
    let sweeps: Vec<(usize, usize)> = bursts
        .iter()
        .enumerate()
        .flat_map(|(burst, &sweeps)| (0..sweeps).map(move |sweep| (burst, sweep)))
        .collect();
    let mut front = None;
    for (index, &(burst, sweep)) in sweeps.iter().enumerate() {
        let place = burst % 2;
        let known = sweeps.get(index + 1).map(|&(burst, _)| burst % 2);
        let missing = store.residency().given_up() as f32 / store.residency().tiles() as f32;
        let mut begin = |demand: &mut Demand, next| {
            let next = demand.begin(place, next, missing);
            store.set_rates(demand.rates());
            next
        };
        let next = match &mut policy {
            Policy::Untold(demand) => begin(demand, None),
            Policy::Told(demand) => begin(demand, known),
            Policy::Oracle(run_least) => {
                let last = sweep + 1 == bursts[burst];
                let owner = if last { burst + 1 } else { burst };
                let long = bursts.get(owner).is_some_and(|sweeps| sweeps >= run_least);
                front = if long {
                    Some(owner % 2)
                } else {
                    front.filter(|_| *run_least < usize::MAX)
                };
                let mut rates = [Rate::of_all(0.5); 2];
                if let Some(front) = front {
                    rates[front] = Rate::of_all(1.0);
                }
                store.set_rates(&rates);
                known.unwrap_or(place)
            }
        };
        let (began_ns, read_bytes) = (clock.now_ns(), store.counters().read_bytes);
        let computed_ns = one_sweep(&mut store, ids[place], ids[next], &clock);
        let stalled = 1.0 - computed_ns as f32 / (clock.now_ns() - began_ns) as f32;
        let read = (store.counters().read_bytes - read_bytes) as f32 / bytes;
        if let Policy::Untold(demand) | Policy::Told(demand) = &mut policy {
            demand.end(place, stalled, read);
        }
    }
    clock.now_ns() as f64 / 1e9
}

/// Makes a sweep; the nanoseconds in which it computed.
fn one_sweep(store: &mut Store, id: ModelId, next: ModelId, clock: &Clock) -> u64 {
    let mut computed_ns = 0;
    store.begin_sweep(id, Some(next));
    for matrix in 0..LAYERS * GROUPS.len() {
        store.begin(store.tiles_of(matrix));
        while store.acquire().expect("no faults") > 0 {
            let acquired = store.acquired().iter();
            let mut bytes: usize = acquired.map(|&t| store.tile(t).bytes as usize).sum();
            while bytes > 0 {
                let step = bytes.min(POLL_BYTES);
                bytes -= step;
                let step_ns = (step as f64 / COMPUTE_BYTES_PER_S * 1e9) as u64;
                clock.advance(step_ns);
                computed_ns += step_ns;
                store.feed();
            }
            store.release().expect("no faults");
        }
    }
    store.finish_sweep().expect("no file to change");
    computed_ns
}

fn demand() -> Demand {
    let mut demand = Demand::default();
    demand.add();
    demand.add();
    demand
}

/// Bursts of all lengths up to twice a mean, as answers have them.
fn mixed_bursts(mean: usize, count: usize) -> Vec<usize> {
    (0..count).map(|i| 1 + i * 37 % (2 * mean - 1)).collect()
}

#[test]
fn alternating_bursts_take_hardly_longer_than_if_they_were_known() {
    let repeat = |pair: [usize; 2], times: usize| pair.repeat(times);
    let workloads = [
        ("1 and 1 in turns", repeat([1, 1], 40)),
        ("2 and 2", repeat([2, 2], 16)),
        ("3 and 3", repeat([3, 3], 20)),
        ("4 and 4", repeat([4, 4], 8)),
        ("4 and 1", repeat([4, 1], 20)),
        ("3 and 2", repeat([3, 2], 16)),
        ("16 and 16", repeat([16, 16], 4)),
        ("60 and 6", repeat([60, 6], 3)),
        ("1 to 15", mixed_bursts(8, 16)),
        ("1 to 79", mixed_bursts(40, 8)),
    ];
    let mut slow = String::new();
    for (name, bursts) in &workloads {
        for disk in DISKS {
            let oracle = oracle(bursts, disk);
            let untold = time(bursts, disk, Policy::Untold(demand())) / oracle;
            let told = time(bursts, disk, Policy::Told(demand())) / oracle;
            let line = format!(
                "{name:<18} {disk} GB/s: {oracle:7.2} s, untold {untold:.3}, told {told:.3}\n"
            );
            print!("{line}");
            if untold > 1.1 || told > 1.1 {
                slow += &line;
            }
        }
    }
    assert!(slow.is_empty(), "too long beside the oracle:\n{slow}");
}

/// The time that the bursts take if all are known.
fn oracle(bursts: &[usize], disk: f64) -> f64 {
    [2, 3, usize::MAX]
        .map(|run_least| time(bursts, disk, Policy::Oracle(run_least)))
        .into_iter()
        .fold(f64::INFINITY, f64::min)
}

#[test]
fn random_bursts_take_hardly_longer_than_they_must_for_who_does_not_know_them() {
    let bursts = random_bursts(4, 100);
    for disk in DISKS {
        let fluid = Fluid::new(disk);
        let (known, untold) = (fluid.known(&random_bursts(4, 4000)), fluid.untold(4));
        let least = untold / known;
        let ours = time(&bursts, disk, Policy::Untold(demand())) / oracle(&bursts, disk);
        println!(
            "1 to 4 at random   {disk} GB/s: untold {ours:.3}, at least {least:.3} by whatever policy"
        );
        assert!(ours < 1.15 * least, "{ours} beside {least}");
        // Without foreknowledge 1.1 is out of reach where the disk is slow.
        assert_eq!(least > 1.1, disk < 6.0, "{least}");
    }
}

/// Bursts of 1 to `longest` sweeps, each as likely.
fn random_bursts(longest: usize, count: usize) -> Vec<usize> {
    let mut state = 1u64;
    let mut next = || {
        // Knuth's MMIX generator; its high bits are good.
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        1 + (state >> 33) as usize % longest
    };
    (0..count).map(|_| next()).collect()
}

/// Shares of a model that may be in memory: from a quarter, when the other one is there as a whole, to all, by sixteenths.
const SHARES: usize = 13;

/// Two models without tiles, latencies and windows: what is in memory is a number. A sweep reads what is missing of its
/// model, may keep any part of that instead of the other model's, and may read of the other what takes the place of what it
/// has used itself. So all that there is to decide in a sweep is which share of its model is there after it.
struct Fluid {
    /// Seconds of a sweep, by the share that is there before and after it.
    seconds: [[f64; SHARES]; SHARES],
}

impl Fluid {
    fn new(disk_gb_s: f64) -> Fluid {
        let bytes = weights().matrices.iter().map(Matrix::bytes).sum::<u64>() as f64;
        let share = |index: usize| (index + 4) as f64 / 16.0;
        let second = |before: usize, after: usize| {
            let read = 1.0 - share(before.min(after));
            (read * bytes / (disk_gb_s * 1e9)).max(bytes / COMPUTE_BYTES_PER_S)
        };
        Fluid {
            seconds: std::array::from_fn(|before| {
                std::array::from_fn(|after| second(before, after))
            }),
        }
    }

    /// The least time from each share on, if `later` is the least from each share after the sweep.
    fn sweep(&self, later: impl Fn(usize) -> f64) -> [f64; SHARES] {
        std::array::from_fn(|before| {
            let ways = (0..SHARES).map(|after| self.seconds[before][after] + later(after));
            ways.fold(f64::INFINITY, f64::min)
        })
    }

    /// Seconds per sweep of the best way through bursts that are known: backwards from the end.
    fn known(&self, bursts: &[usize]) -> f64 {
        let mut later = [0.0; SHARES];
        for &length in bursts.iter().rev() {
            // After the last sweep of the burst it is the other model whose share counts.
            later.reverse();
            for _ in 0..length {
                later = self.sweep(|after| later[after]);
            }
        }
        later[0] / bursts.iter().sum::<usize>() as f64
    }

    /// Seconds per sweep of the best policy that knows only how likely a burst is to end with each sweep, where all lengths
    /// up to `longest` are as likely: by value iteration (each step goes half way, so that it converges).
    fn untold(&self, longest: usize) -> f64 {
        let mut values = vec![[0.0; SHARES]; longest];
        let mut gain = 0.0;
        for _ in 0..3000 {
            let next: Vec<[f64; SHARES]> = (0..longest)
                .map(|done| {
                    let ends = 1.0 / (longest - done) as f64;
                    self.sweep(|after| {
                        let goes_on = values.get(done + 1).map_or(0.0, |values| values[after]);
                        ends * values[0][SHARES - 1 - after] + (1.0 - ends) * goes_on
                    })
                })
                .collect();
            gain = next[0][0] - values[0][0];
            let base = next[0][0];
            for (value, next) in values
                .as_flattened_mut()
                .iter_mut()
                .zip(next.as_flattened())
            {
                *value = (*value + next - base) / 2.0;
            }
        }
        gain
    }
}
