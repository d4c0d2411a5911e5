//! The whole pipeline on a virtual clock: the plan, the policy and the store that a run uses, with a disk and a
//! processor of chosen speeds. What it reaches is compared with the roofline: a sweep takes as long as the disk needs
//! for the streamed bytes or the processor for the weights, whichever is longer.
//!
//! `tests/pipeline/grid.txt` holds the shares of the roofline, so that a change of policy shows as a diff. To write it
//! anew: `UPDATE_GRID=1 cargo test --release --test pipeline`, then look at what git says has changed.

#[path = "pipeline/machine.rs"]
mod machine;

use std::fmt::Write;

use airstream::format::quant::QuantType;
use machine::{Llama, Machine, Shape, Speed};

const BUDGETS_PERCENT: [u64; 6] = [25, 40, 60, 80, 95, 100];
const DISKS_GB_S: [f64; 5] = [0.5, 1.0, 2.0, 4.0, 7.0];
const COMPUTES_GB_S: [f64; 4] = [10.0, 20.0, 60.0, 200.0];
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

/// Share of the roofline that decoding reaches in steady state, and the bytes it read over those planned.
fn steady(shape: &Shape, percent: u64, speed: Speed) -> (f64, f64) {
    let plan = shape.plan(percent, 256);
    let mut machine = Machine::new(shape, &plan, speed);
    for _ in 0..SWEEPS.0 {
        machine.sweep(1);
    }
    let before = machine.read_bytes();
    let seconds: f64 = (0..SWEEPS.1).map(|_| machine.sweep(1)).sum();
    let read = (machine.read_bytes() - before) as f64;
    let streamed = plan.streamed_bytes(plan.pages_at(&shape.config, 1)) as f64;
    let roofline = (streamed / speed.disk_bytes_per_s)
        .max(shape.matrices.sweep_bytes() as f64 / speed.compute_bytes_per_s);
    let sweeps = SWEEPS.1 as f64;
    (roofline * sweeps / seconds, read / (streamed * sweeps))
}

/// One shape's part of the grid.
fn grid(shape: &Shape) -> String {
    let mut text = format!("\n{}, {:.2} GB\n", shape.name, shape.file_bytes() as f64 / 1e9);
    for percent in BUDGETS_PERCENT {
        let plan = shape.plan(percent, 256);
        let _ = writeln!(
            text,
            "memory {percent}%: {} slots of {} KiB, window {}, {} reads in flight, {:.0}% streamed",
            plan.slots,
            plan.slot_bytes >> 10,
            plan.window,
            plan.depth(),
            100.0 * plan.streamed_bytes(0) as f64 / shape.matrices.sweep_bytes() as f64,
        );
        for disk in DISKS_GB_S {
            let _ = write!(text, "  {disk:>4} GB/s");
            for compute in COMPUTES_GB_S {
                let speed = Speed {
                    disk_bytes_per_s: disk * 1e9,
                    compute_bytes_per_s: compute * 1e9,
                };
                let (share, _) = steady(shape, percent, speed);
                let _ = write!(text, " {:>6.1}", 100.0 * share);
            }
            text += "\n";
        }
    }
    text
}

#[test]
fn the_grid() {
    for shape in [smollm2(), llama_8b(), llama_70b()] {
        println!("{}", grid(&shape));
    }
}
