//! How many launches a layer takes in decode, so that the number does not grow unseen.

use std::sync::Arc;

use airstream::engine::{ModelId, Row, Spent, Wanted};
use airstream::format::quant::QuantType;

use super::checks::{Gpu, few, logits, on_gpu, options};
use super::fake_gpu::FakeGpu;
use super::support::synth::{Arch, SynthSpec, write};

/// Norm, queries with keys and values, their heads, attention, its rounding, output; norm, gate with up, gating, down.
const PER_LAYER: u64 = 10;

/// Those that find the likeliest tokens.
const LIKELIEST: u64 = 2;

/// Launches of a sweep of one row behind `context` others, of a model with so many layers.
fn launches(arch: Arch, layers: u32, context: usize) -> Option<u64> {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.gguf");
    let spec = SynthSpec {
        layers,
        ffn: 64,
        vocab: 64,
        ..SynthSpec::new(arch, QuantType::Q8_0, 6)
    };
    write(&spec, &model).expect("the folder can be written");
    let gpu = FakeGpu::new(1)?;
    let seen = gpu.seen();
    let gpu: Gpu = Arc::new(gpu);
    let engine = &mut on_gpu(&model, &options(64, 512), &gpu);
    logits(engine, 0, &few(context), 64).expect("a sweep");
    let issued = || seen.lock().expect("nobody panics with it").launches;
    let before = issued();
    logits(engine, 0, &few(1), 1).expect("a sweep");
    let launches = issued() - before;
    let row = Row {
        session: 0,
        token: 0,
        wanted: Wanted::Likeliest,
    };
    let swept = engine.sweep(ModelId::FIRST, &[row], &mut Spent::default());
    swept.expect("another sweep");
    assert_eq!(issued() - before - launches, launches + LIKELIEST);
    Some(launches)
}

#[test]
fn a_layer_takes_few_launches() {
    for (arch, context) in [
        (Arch::Llama, 3),
        (Arch::Llama, 300),
        (Arch::Qwen2, 3),
        (Arch::Gemma3, 3),
    ] {
        let of = |layers| launches(arch, layers, context);
        let (Some(two), Some(three)) = (of(2), of(3)) else {
            return;
        };
        assert_eq!(three - two, PER_LAYER, "{arch:?}");
        // The embedding's scale, the last norm and the head.
        assert!(two - 2 * PER_LAYER <= 3, "{arch:?}: {two} in all");
    }
}
