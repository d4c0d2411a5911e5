//! The whole pipeline on a virtual clock: the plan, the policy and the store that a run uses, with a disk and a
//! processor of chosen speeds. What it reaches is compared with the roofline: a sweep takes as long as the disk needs
//! for the streamed bytes or the processor for the weights, whichever is longer.
//!
//! `tests/pipeline/*.txt` hold the shares of the roofline, so that a change of policy shows as a diff. To write it
//! anew: `UPDATE_GRID=1 cargo test --release --test pipeline`, then look at what git says has changed.

#[path = "pipeline/machine.rs"]
mod machine;

use std::fmt::Write;
use std::path::Path;

use airstream::device::Placement;
use airstream::engine::plan::{Plan, Request};
use airstream::format::quant::QuantType;
use airstream::format::tile::Use;
use airstream::io::sim::Jitter;
use airstream::model::kv;
use machine::{Llama, Machine, Shape, Speed};

const BUDGETS_PERCENT: [u64; 6] = [25, 40, 60, 80, 95, 100];
const DISKS_GB_S: [f64; 5] = [0.5, 1.0, 2.0, 4.0, 7.0];
const COMPUTES_GB_S: [f64; 4] = [10.0, 20.0, 60.0, 200.0];
/// The least share of the roofline that is good enough.
const SHARE_MIN: f64 = 0.97;
/// Sweeps until all is as it stays, and sweeps that are timed.
const SWEEPS: (usize, usize) = (2, 4);

fn smollm2() -> Shape {
    Shape::llama(
        "SmolLM2 135M Q4_1",
        Llama {
            layers: 30,
            dim: 576,
            ff: 1536,
            heads: 9,
            kv_heads: 3,
            vocab: 49152,
            weights: QuantType::Q4_1,
            table: QuantType::Q8_0,
            tied: true,
        },
    )
}

fn llama_8b() -> Shape {
    Shape::llama(
        "Llama 8B Q4_0",
        Llama {
            layers: 32,
            dim: 4096,
            ff: 14336,
            heads: 32,
            kv_heads: 8,
            vocab: 49152,
            weights: QuantType::Q4_0,
            table: QuantType::Q4_0,
            tied: false,
        },
    )
}

fn llama_70b() -> Shape {
    Shape::llama(
        "Llama 70B Q4_0",
        Llama {
            layers: 80,
            dim: 8192,
            ff: 28672,
            heads: 64,
            kv_heads: 8,
            vocab: 128256,
            weights: QuantType::Q4_0,
            table: QuantType::Q4_0,
            tied: false,
        },
    )
}

impl Speed {
    fn gb_s(disk: f64, compute: f64) -> Speed {
        Speed {
            disk_bytes_per_s: disk * 1e9,
            compute_bytes_per_s: compute * 1e9,
            jitter: Jitter::default(),
        }
    }
}

/// The least time of a sweep that streams `streamed` bytes, in seconds.
fn roofline(shape: &Shape, streamed: u64, speed: Speed) -> f64 {
    (streamed as f64 / speed.disk_bytes_per_s)
        .max(shape.matrices.sweep_bytes() as f64 / speed.compute_bytes_per_s)
}

/// Share of the roofline that decoding reaches in steady state; the bytes it reads must be those planned.
fn steady(shape: &Shape, plan: &Plan, speed: Speed) -> f64 {
    let mut machine = Machine::new(shape, plan, speed);
    for _ in 0..SWEEPS.0 {
        machine.sweep(1);
    }
    let before = machine.read_bytes();
    let seconds: f64 = (0..SWEEPS.1).map(|_| machine.sweep(1)).sum();
    let read = machine.read_bytes() - before;
    let streamed = plan.streamed_bytes(plan.pages_at(&shape.config, 1));
    let planned = SWEEPS.1 as u64 * streamed;
    // Reads ahead differ by a window at most from one sweep's end to another's; embeddings are read by row.
    let window = u64::from(plan.window) * plan.slot_bytes as u64;
    assert!(
        read.abs_diff(planned) <= window + planned / 100,
        "{}: read {read}, planned {planned}",
        shape.name
    );
    roofline(shape, streamed, speed) * SWEEPS.1 as f64 / seconds
}

/// One budget's part of the grid, and its shares that are too low.
fn of_budget(shape: &Shape, percent: u64) -> (String, String) {
    let plan = shape.plan(percent, 256);
    let title = format!(
        "memory {percent}%: {} slots of {} KiB, window {}, {} reads in flight, {:.0}% streamed",
        plan.slots,
        plan.slot_bytes >> 10,
        plan.window,
        plan.depth(),
        100.0 * plan.streamed_bytes(0) as f64 / shape.matrices.sweep_bytes() as f64,
    );
    let mut text = format!("{title}\n");
    let mut low = String::new();
    for disk in DISKS_GB_S {
        let shares = COMPUTES_GB_S.map(|compute| steady(shape, &plan, Speed::gb_s(disk, compute)));
        let cells: String = shares
            .iter()
            .map(|s| format!(" {:>6.1}", 100.0 * s))
            .collect();
        let line = format!("  {disk:>4} GB/s{cells}\n");
        if shares.iter().any(|&share| share < SHARE_MIN) {
            let _ = write!(low, "{}, {title}\n{line}", shape.name);
        }
        text += &line;
    }
    (text, low)
}

/// One shape's part of the grid; shares that are too low go to `low`.
fn grid(shape: &Shape, low: &mut String) -> String {
    let mut text = format!(
        "\n{}, {:.2} GB\n",
        shape.name,
        shape.file_bytes() as f64 / 1e9
    );
    // The clocks are virtual, so that budgets may be tried side by side.
    let parts = std::thread::scope(|scope| {
        let parts = BUDGETS_PERCENT.map(|percent| scope.spawn(move || of_budget(shape, percent)));
        parts.map(|part| part.join().expect("no thread has panicked"))
    });
    for (part, low_part) in parts {
        text += &part;
        *low += &low_part;
    }
    text
}

#[test]
fn decoding_reaches_the_roofline_whatever_the_machine() {
    let mut text = String::from(
        "Share of the roofline in percent: one line for each disk, one column for each processor \
         (10, 20, 60, 200 GB/s of weights).\n",
    );
    let mut low = String::new();
    for shape in [smollm2(), llama_8b(), llama_70b()] {
        text += &grid(&shape, &mut low);
    }
    assert!(low.is_empty(), "too far from the roofline:\n{low}");
    check_snapshot("grid.txt", &text);
}

/// Compares with what is in the repository, or writes it there if asked to.
fn check_snapshot(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/pipeline")
        .join(name);
    if std::env::var_os("UPDATE_GRID").is_some() {
        std::fs::write(&path, text).expect("the repository can be written");
    }
    let before = std::fs::read_to_string(&path).expect("the grid is in the repository");
    let changed: Vec<(&str, &str)> = before
        .lines()
        .zip(text.lines())
        .filter(|(a, b)| a != b)
        .collect();
    assert!(
        changed.is_empty() && before.lines().count() == text.lines().count(),
        "the policy's results have changed (see the top of this file for how to accept that):\n{changed:#?}"
    );
}

/// Irregular disks: what they are called in the snapshot, and what they do.
fn irregular() -> [(&'static str, Jitter); 3] {
    [
        (
            "late reads (log-normal latency)",
            Jitter {
                latency_spread: 1.0,
                ..Jitter::default()
            },
        ),
        (
            "stops of 5 ms, once in 400 reads",
            Jitter {
                latency_spread: 0.5,
                stall_once_in: 400,
                stall_ns: 5_000_000,
                ..Jitter::default()
            },
        ),
        (
            "finishes all it was given at once",
            Jitter {
                in_lumps: true,
                ..Jitter::default()
            },
        ),
    ]
}

/// The window bridges what a disk does for some milliseconds: it is the disk's mean speed that counts.
#[test]
fn an_irregular_disk_is_used_as_well_as_a_regular_one() {
    let mut text = String::from(
        "Share of the roofline in percent, by the mean speed of the disk: 8B, one column for each processor (10, 20, \
         60, 200 GB/s of weights).\n",
    );
    let shape = llama_8b();
    let mut low = String::new();
    for (name, jitter) in irregular() {
        text += &format!("\n{name}\n");
        for percent in [40, 60, 80] {
            let plan = shape.plan(percent, 256);
            for disk in [0.5, 1.0, 2.0, 4.0] {
                let read_bytes = plan.slot_bytes as f64;
                let stop_s = match jitter.stall_once_in {
                    0 => 0.0,
                    once_in => jitter.stall_ns as f64 / 1e9 / f64::from(once_in),
                };
                let mean = read_bytes / (read_bytes / (disk * 1e9) + stop_s) / 1e9;
                let streamed = plan.streamed_bytes(plan.pages_at(&shape.config, 1));
                let shares = COMPUTES_GB_S.map(|compute| {
                    let speed = Speed::gb_s(disk, compute);
                    let least = |disk| roofline(&shape, streamed, Speed::gb_s(disk, compute));
                    steady(&shape, &plan, Speed { jitter, ..speed }) * least(mean) / least(disk)
                });
                let cells: String = shares
                    .iter()
                    .map(|s| format!(" {:>6.1}", 100.0 * s))
                    .collect();
                let line = format!("  memory {percent}%, {disk:>4} GB/s{cells}\n");
                if shares.iter().any(|&share| share < SHARE_MIN) {
                    low += &format!("{name}\n{line}");
                }
                text += &line;
            }
        }
    }
    assert!(low.is_empty(), "too far from the roofline:\n{low}");
    check_snapshot("irregular.txt", &text);
}

#[test]
fn a_cold_start_computes_as_the_bytes_arrive() {
    for (shape, percent) in [
        (llama_8b(), 40),
        (llama_8b(), 95),
        (llama_8b(), 120),
        (smollm2(), 60),
        (smollm2(), 200),
    ] {
        for disk in DISKS_GB_S {
            let speed = Speed::gb_s(disk, 20.0);
            let plan = shape.plan(percent, 256);
            let seconds = Machine::new(&shape, &plan, speed).sweep(1);
            // Direct reads end on whole blocks, which counts with the small tiles of a small model.
            let tiles = plan.tiles.iter();
            let needed = tiles
                .filter(|t| shape.matrices.matrices[t.matrix as usize].used == Use::EverySweep)
                .map(|t| t.read_bytes() as u64)
                .sum();
            let least = roofline(&shape, needed, speed);
            assert!(
                seconds <= 1.03 * least,
                "{} at {percent}%, {disk} GB/s: {seconds:.4} s, at least {least:.4} s",
                shape.name
            );
        }
    }
}

#[test]
fn a_prompt_is_one_pass_over_the_disk_and_both_sides_are_busy() {
    let shape = llama_8b();
    let plan = shape.plan(60, 2048);
    for disk in [0.5, 1.0, 2.0, 4.0] {
        // With hundreds of rows a weight keeps the processor busy for long: 0.1 GB/s of weights for 512 rows of 8B
        // are some 100 billion multiplications per second.
        for compute in [0.1, 0.3, 1.0, 3.0] {
            let speed = Speed::gb_s(disk, compute);
            let mut machine = Machine::new(&shape, &plan, speed);
            machine.sweep(1);
            let before = machine.read_bytes();
            let rows = plan.limits.rows;
            let seconds = machine.sweep(rows);
            let streamed = plan.streamed_bytes(plan.pages_at(&shape.config, rows + 1));
            let share = roofline(&shape, streamed, speed) / seconds;
            assert!(
                share >= 0.97,
                "{disk} GB/s, {compute} GB/s: {share:.3} of the roofline"
            );
            let read = machine.read_bytes() - before;
            // One sweep may end with a window more or less read ahead than it began with.
            let window = u64::from(plan.window) * plan.slot_bytes as u64;
            assert!(
                read.abs_diff(streamed) <= window + streamed / 100,
                "read {read}, planned {streamed}"
            );
        }
    }
}

#[test]
fn a_growing_context_takes_slots_one_by_one_and_its_end_gives_them_back() {
    let shape = llama_8b();
    let context = 8192;
    let plan = shape.plan(60, context);
    let speed = Speed::gb_s(2.0, 60.0);
    let mut machine = Machine::new(&shape, &plan, speed);
    machine.sweep(1);
    machine.sweep(1);
    let first = machine.sweep(1);
    let (mut last, mut before) = (first, machine.read_bytes());
    while machine.session.len() + 128 < context {
        last = machine.sweep(128);
        let streamed = plan.streamed_bytes(plan.pages_at(&shape.config, machine.session.len()));
        let share = roofline(&shape, streamed, speed) / last;
        assert!(
            share >= SHARE_MIN,
            "{share:.3} of the roofline at {} tokens",
            machine.session.len()
        );
        // What a page took the slot of is read again, and nothing else.
        let read = machine.read_bytes() - before;
        before = machine.read_bytes();
        let window = u64::from(plan.window) * plan.slot_bytes as u64;
        assert!(
            read.abs_diff(streamed) < 2 * window,
            "read {read}, planned {streamed}"
        );
    }
    assert!(
        last > 1.2 * first,
        "a long context costs memory, and that costs time"
    );

    let sessions = std::slice::from_mut(&mut machine.session);
    kv::clear(sessions, 0, &mut machine.store);
    machine.idle();
    let again = machine.sweep(1);
    assert!(
        again <= first / SHARE_MIN,
        "{again:.3} s after the end of the conversation, {first:.3} s before it"
    );
}

#[test]
fn a_model_whose_rows_do_not_fit_the_arenas_slots_is_refused_with_a_remedy() {
    let shape = llama_70b();
    let request = shape.request(60, 256);
    let in_slots = |slot_bytes| {
        Plan::in_slots(
            &shape.config,
            &shape.matrices,
            &request,
            usize::MAX,
            (slot_bytes, 1000),
        )
    };
    let refused = in_slots(64 << 10).expect_err("too small").to_string();
    assert!(
        refused.contains("slots of 64 KiB are too small") && refused.contains("at the start"),
        "{refused}"
    );
    let plan = in_slots(2 << 20).expect("large enough");
    assert_eq!(plan.slot_bytes, 2 << 20);
    assert!(plan.tiles.iter().all(|tile| tile.read_bytes() <= 2 << 20));
}

#[test]
fn a_gpu_with_its_own_memory_takes_as_many_rows_of_a_prompt_as_fill_it() {
    let shape = llama_8b();
    let memory = 64 << 30;
    let request = |memory| Request {
        rows: None,
        memory,
        gpu: Some(Placement::Staged { memory: 32 << 30 }),
        ..shape.request(100, 4096)
    };
    let plan = |memory| Plan::new(&shape.config, &shape.matrices, &request(memory));
    // The processor's memory, as it is chosen where nobody does: what is needed where all is.
    let all = plan(memory).expect("plenty");
    let needed = plan(all.total_bytes()).expect("enough");
    assert_eq!((all.limits.rows, needed.limits.rows), (512, 512));
    // With less there is still a plan, of fewer rows in the end.
    let least = { 1..4096 }.find(|mib| plan(mib << 20).is_ok());
    let least = plan(least.expect("enough") << 20).expect("it was found");
    assert!(least.limits.rows < 512, "{}", least.limits.rows);
}

#[test]
fn idle_time_before_the_first_request_and_after_an_answer_fills_the_memory() {
    let shape = llama_8b();
    for percent in [40, 120] {
        let plan = shape.plan(percent, 2048);
        let speed = Speed::gb_s(2.0, 60.0);
        let mut machine = Machine::new(&shape, &plan, speed);
        let slots = (plan.slots as u64 - 1) * plan.slot_bytes as u64;
        let fill = |machine: &mut Machine, bytes: u64| {
            let before = machine.read_bytes();
            let seconds = machine.idle();
            let read = machine.read_bytes() - before;
            assert!(
                read <= bytes && read >= bytes * 9 / 10,
                "{read} of {bytes} bytes"
            );
            // It looks after the reads every millisecond only, in which this disk delivers 2 MB.
            assert!(seconds <= bytes as f64 / 2e9 * 1.05 + 0.002, "{seconds} s");
            assert_eq!(machine.idle(), 0.0, "nothing is left");
        };
        // Reads are whole blocks.
        let tiles = plan.tiles.iter().map(|t| t.read_bytes() as u64).sum();
        fill(&mut machine, slots.min(tiles));
        let first = machine.sweep(1);
        machine.sweep(1);
        let steady = machine.sweep(1);
        assert!(
            first <= steady * 1.03,
            "the first sweep takes {first} s, a later one {steady} s"
        );
        machine.idle();
        machine.sweep(1500);
        let pages = plan.pages_at(&shape.config, machine.session.len()) as u64;
        let sessions = std::slice::from_mut(&mut machine.session);
        kv::clear(sessions, 0, &mut machine.store);
        machine.idle();
        let again = machine.sweep(1);
        assert!(
            again <= steady * 1.03,
            "{again} s after {pages} pages came back, {steady} s before"
        );
    }
}
