//! Predictions for boards against speeds that others have published. Nobody here has a board.
//!
//! What is published is decoding on the GPU. Models are data here: bytes of the weights that a token needs and products
//! that it takes, from their published shapes.

use airstream::board::config::Board;
use airstream::engine::roofline::{Device, Machine, Work};

/// Bits of a weight in MLC's q4f16_1: 4, and a 16-bit scale for every 32.
const MLC_BITS: f64 = 4.5;

/// How a runtime falls short of the roofline.
struct Runtime {
    name: &'static str,
    /// What it reaches of DRAM's peak, as a factor on what the prediction takes our kernels to reach.
    dram: f64,
    /// What launching a layer's kernels takes.
    layer_s: f64,
}

/// The runtime that our prediction takes for its model.
const MLC: Runtime = Runtime {
    name: "MLC",
    dram: 1.0,
    layer_s: 0.0,
};
/// 65% of the peak and half a millisecond a layer: two numbers that fit the two extremes of AGX Orin's three speeds.
const LLAMA_CPP: Runtime = Runtime {
    name: "llama.cpp",
    dram: 0.65 / 0.78,
    layer_s: 0.0005,
};

struct Case {
    board: &'static str,
    mode: &'static str,
    runtime: Runtime,
    model: &'static str,
    /// Billions of weights that a token is multiplied with: all but the embedding, which counts where it is the head.
    weights: f64,
    /// GB of them.
    gb: f64,
    layers: u32,
    reported: f64,
    /// Why the prediction is more than a quarter away.
    why_not: Option<&'static str>,
}

fn mlc(model: &'static str, weights: f64, layers: u32, reported: f64) -> Case {
    Case {
        board: "orin-nano-8gb-super",
        mode: "MAXN_SUPER",
        runtime: MLC,
        model,
        weights,
        gb: weights * MLC_BITS / 8.0,
        layers,
        reported,
        why_not: None,
    }
}

/// Quantizations are not told with the speeds: Q4_0 is assumed for Llama 2, Q4_K_M for the others.
fn llama_cpp(
    (board, mode): (&'static str, &'static str),
    model: &'static str,
    (weights, gb): (f64, f64),
    layers: u32,
    reported: f64,
) -> Case {
    Case {
        board,
        mode,
        runtime: LLAMA_CPP,
        model,
        weights,
        gb,
        layers,
        reported,
        why_not: None,
    }
}

fn cases() -> Vec<Case> {
    let nano = ("orin-nano-8gb-super", "25W");
    let agx = ("agx-orin-64gb", "MAXN");
    vec![
        mlc("Llama-3.1-8B", 7.505, 32, 19.1),
        mlc("Llama-3.2-3B", 3.213, 28, 43.1),
        mlc("Qwen2.5-7B", 7.071, 28, 21.8),
        mlc("Phi-3.5-mini", 3.723, 32, 38.1),
        Case {
            why_not: Some(
                "its head is the embedding of 256000 tokens; were that left in 16 bits, as MLC may do, the weights \
                 would be 2.3 GB and the prediction 34 tok/s",
            ),
            ..mlc("Gemma-2-2B", 2.614, 26, 35.0)
        },
        llama_cpp(agx, "Llama-2-7B", (6.6, 3.75), 32, 22.5),
        llama_cpp(agx, "Llama-2-13B", (12.85, 7.27), 40, 13.3),
        llama_cpp(agx, "Llama-2-70B", (68.7, 38.72), 80, 3.0),
        llama_cpp(nano, "LFM2.5-1.2B", (1.17, 0.73), 16, 54.0),
        Case {
            why_not: Some(
                "layers of 576 values take far less than half a millisecond: what a layer costs llama.cpp grows \
                 with its width, and the fit is to widths of 4096 and more",
            ),
            ..llama_cpp(nano, "SmolLM2-135M", (0.135, 0.1), 30, 165.0)
        },
    ]
}

fn predict(case: &Case, device: Device) -> (f64, &'static str) {
    let board = Board::named(case.board).expect("a board");
    let mode = board.mode(case.mode).expect("a mode");
    let mut machine = Machine::of_board(&board, Some(mode), device).expect("described");
    let (dram, layer_s) = match device {
        Device::Gpu => (case.runtime.dram, case.runtime.layer_s),
        Device::Cpu => (1.0, 0.0),
    };
    machine.dram_bytes_per_s *= dram;
    let sweep = machine.sweep(&Work {
        weight_bytes: (case.gb * 1e9) as u64,
        streamed_bytes: 0,
        copied_bytes: 0,
        kv_bytes: 0,
        products: (case.weights * 1e9) as u64,
        rows: 1,
    });
    (
        1.0 / (sweep.seconds + f64::from(case.layers) * layer_s),
        sweep.bound,
    )
}

#[test]
fn published_speeds_are_predicted_within_a_quarter_or_it_is_known_why_not() {
    println!(
        "| board, mode | runtime | model | reported | predicted | off by | our CPU backend, predicted |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut wrong = Vec::new();
    for case in cases() {
        let (predicted, _) = predict(&case, Device::Gpu);
        let (ours, bound) = predict(&case, Device::Cpu);
        let off = predicted / case.reported - 1.0;
        println!(
            "| {}, {} | {} | {} | {:.1} | {predicted:.1} | {:+.0}% | {ours:.1} ({bound}) |",
            case.board,
            case.mode,
            case.runtime.name,
            case.model,
            case.reported,
            100.0 * off
        );
        // A reason that is no longer needed is as wrong as one that is missing.
        if (off.abs() <= 0.25) == case.why_not.is_some() {
            wrong.push(format!("{}: {:+.0}%", case.model, 100.0 * off));
        }
        if let Some(why) = case.why_not {
            println!("  {}: {why}", case.model);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
