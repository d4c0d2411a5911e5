//! Two models that are together 1.6 times the memory, asked in bursts, on a virtual clock: the policy that only sees the
//! past against one that knew all bursts in advance.
use std::path::PathBuf;

use airstream::arena::Reservation;
use airstream::engine::demand::Demand;
use airstream::format::quant::QuantType;
use airstream::format::tile::{self, Matrix, Use};
use airstream::io::sim::{Clock, Content, Disk, Faults, Jitter, Options, Sim, Timing};
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
    }
}

/// How the models' tiles are ranked, and what is known of the sweep after the one that begins.
enum Policy {
    /// As the engine does it, with no word of what comes.
    Untold(Demand),
    /// As the engine does it, where whoever schedules the sweeps says which is next.
    Told(Demand),
    /// All is known, and a model has the pool for runs of at least so many sweeps.
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
    let sweeps: Vec<(usize, usize)> = bursts
        .iter()
        .enumerate()
        .flat_map(|(burst, &sweeps)| (0..sweeps).map(move |sweep| (burst, sweep)))
        .collect();
    let mut front = 0;
    for (index, &(burst, sweep)) in sweeps.iter().enumerate() {
        let place = burst % 2;
        let known = sweeps.get(index + 1).map(|&(burst, _)| burst % 2);
        let next = match &mut policy {
            Policy::Untold(demand) => {
                store.set_rates(demand.begin(place, None));
                None
            }
            Policy::Told(demand) => {
                store.set_rates(demand.begin(place, known));
                known
            }
            Policy::Oracle(run_least) => {
                let last = sweep + 1 == bursts[burst];
                let owner = if last { burst + 1 } else { burst };
                if bursts.get(owner).is_some_and(|sweeps| sweeps >= run_least) {
                    front = owner % 2;
                }
                let mut rates = [0.5; 2];
                rates[front] = 1.0;
                store.set_rates(&rates);
                known
            }
        };
        one_sweep(&mut store, ids[place], next.map(|next| ids[next]), &clock);
    }
    clock.now_ns() as f64 / 1e9
}

fn one_sweep(store: &mut Store, id: ModelId, next: Option<ModelId>, clock: &Clock) {
    store.begin_sweep(id, next);
    for matrix in 0..LAYERS * GROUPS.len() {
        store.begin(store.tiles_of(matrix));
        while store.acquire().expect("no faults") > 0 {
            let acquired = store.acquired().iter();
            let mut bytes: usize = acquired.map(|&t| store.tile(t).bytes as usize).sum();
            while bytes > 0 {
                let step = bytes.min(POLL_BYTES);
                bytes -= step;
                clock.advance((step as f64 / COMPUTE_BYTES_PER_S * 1e9) as u64);
                store.feed();
            }
            store.release().expect("no faults");
        }
    }
    store.finish_sweep().expect("no file to change");
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
    // Bursts, and the most times the oracle's time that a policy may take which nobody tells anything.
    //
    // In a burst of few sweeps the first one is most of it, and that cannot begin before the burst does: only with a
    // word on what is next are its tiles read while the sweep before it is computed.
    let workloads = [
        ("1 and 1 in turns", repeat([1, 1], 24), 1.1),
        ("2 and 2", repeat([2, 2], 12), 1.35),
        ("4 and 4", repeat([4, 4], 8), 1.2),
        ("4 and 1", repeat([4, 1], 20), 1.1),
        ("16 and 16", repeat([16, 16], 4), 1.1),
        ("60 and 6", repeat([60, 6], 3), 1.1),
        ("1 to 15", mixed_bursts(8, 16), 1.15),
        ("1 to 79", mixed_bursts(40, 8), 1.1),
    ];
    let mut slow = String::new();
    for (name, bursts, untold_max) in &workloads {
        for disk in [0.5, 2.0, 6.0] {
            let oracle = time(bursts, disk, Policy::Oracle(2)).min(time(
                bursts,
                disk,
                Policy::Oracle(usize::MAX),
            ));
            let untold = time(bursts, disk, Policy::Untold(demand())) / oracle;
            let told = time(bursts, disk, Policy::Told(demand())) / oracle;
            let line = format!(
                "{name:<18} {disk} GB/s: {oracle:7.2} s, untold {untold:.3}, told {told:.3}\n"
            );
            print!("{line}");
            if untold > *untold_max || told > 1.1 {
                slow += &line;
            }
        }
    }
    assert!(slow.is_empty(), "too long beside the oracle:\n{slow}");
}
