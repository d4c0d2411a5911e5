//! What an engine on a GPU must do, whatever the driver: the fake one, or NVIDIA's.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use airstream::device::DeviceChoice;
use airstream::device::cuda::driver::Driver;
use airstream::engine::{Engine, ModelId, ModelOptions, Options, Row, Spent, Wanted};
use airstream::error::Result;
use airstream::format::quant::QuantType;

use crate::support::synth::{Arch, SynthSpec, write};

/// A driver that several engines are opened on, one after the other.
pub type Gpu = Arc<dyn Driver>;

/// Positions within which attention is the CPU's bit for bit.
pub const SPLIT: usize = 256;
/// More memory than any of these models needs.
pub const PLENTY: u64 = 64 << 20;

pub fn options(rows: usize, context: usize) -> Options {
    Options {
        model: ModelOptions {
            context: Some(context),
            rows: Some(rows),
            logits_rows: rows,
            sessions: 2,
            ..ModelOptions::default()
        },
        device: DeviceChoice::Cpu,
        threads: Some(1),
        ..Options::default()
    }
}

pub fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i * 7919 % 311).collect()
}

/// Tokens of a small vocabulary.
pub fn few(count: usize) -> Vec<u32> {
    tokens(count).into_iter().map(|token| token % 64).collect()
}

/// Sweeps over the tokens of one session, in chunks; the logits after each.
pub fn logits(
    engine: &mut Engine,
    session: usize,
    tokens: &[u32],
    chunk: usize,
) -> Result<Vec<f32>> {
    logits_of(engine, ModelId::FIRST, session, tokens, chunk)
}

pub fn logits_of(
    engine: &mut Engine,
    model: ModelId,
    session: usize,
    tokens: &[u32],
    chunk: usize,
) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for chunk in tokens.chunks(chunk) {
        let row = |&token| Row {
            session,
            token,
            wanted: Wanted::Logits,
        };
        let rows: Vec<Row> = chunk.iter().map(row).collect();
        engine.sweep(model, &rows, &mut Spent::default())?;
        for index in 0..chunk.len() {
            all.extend_from_slice(engine.logits(model, index));
        }
    }
    Ok(all)
}

pub fn on_cpu(model: &Path, options: &Options) -> Engine {
    Engine::open(model, options).unwrap_or_else(|e| panic!("{}: {e}", model.display()))
}

pub fn on_gpu(model: &Path, options: &Options, gpu: &Gpu) -> Engine {
    let models = [(model.to_owned(), options.model.clone())];
    Engine::new_on(&models, options, Some(Arc::clone(gpu)))
        .unwrap_or_else(|e| panic!("{}: {e}", model.display()))
}

pub fn assert_same(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let differ = got
        .iter()
        .zip(expected)
        .position(|(a, b)| a.to_bits() != b.to_bits());
    assert!(differ.is_none(), "{what}: logit {differ:?} differs");
}

/// The number of MiB that the remedy of a refusal names behind `flag`.
pub fn named(message: &str, flag: &str) -> u64 {
    let rest = message.split(flag).nth(1);
    let mib = rest.and_then(|rest| rest.split("MiB").next());
    let mib = mib.and_then(|mib| mib.trim().parse().ok());
    mib.unwrap_or_else(|| panic!("no {flag} in {message}"))
}

/// A model of several slots, so that some of it streams in a small budget.
pub fn larger() -> SynthSpec {
    SynthSpec {
        layers: 3,
        ffn: 1536,
        ..SynthSpec::new(Arch::Llama, QuantType::Q8_0, 5)
    }
}

/// The models that most tests take: a larger one, and one that is loaded beside it.
pub fn models(folder: &Path) -> (PathBuf, PathBuf) {
    let (model, other) = (folder.join("model.gguf"), folder.join("other.gguf"));
    write(&larger(), &model).expect("the folder can be written");
    write(&SynthSpec::new(Arch::Qwen2, QuantType::Q4_K, 3), &other)
        .expect("the folder can be written");
    (model, other)
}

/// What an engine is refused with in these budgets, which are too small.
fn refused(model: &Path, options: &Options, gpu: &Gpu) -> String {
    let models = [(model.to_owned(), options.model.clone())];
    let opened = Engine::new_on(&models, options, Some(Arc::clone(gpu)));
    opened.err().expect("too little").to_string()
}

/// The options with the least memory that the model can live in.
pub fn with_least(model: &Path, options: &Options, gpu: &Gpu) -> Options {
    let mut options = Options {
        memory: Some(1),
        ..options.clone()
    };
    options.memory = Some(named(&refused(model, &options, gpu), "--memory ") << 20);
    options
}

/// How much of each memory there is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    Least,
    Some,
    Plenty,
}

/// Options with these budgets; the least ones are those that the refusals name.
pub fn with_budgets(model: &Path, host: Budget, of_gpu: Budget, gpu: &Gpu) -> Options {
    let mut options = Options {
        memory: Some(PLENTY),
        gpu_memory: Some(1),
        ..options(16, 128)
    };
    let mib = named(&refused(model, &options, gpu), "--gpu-memory ");
    options.gpu_memory = Some(match of_gpu {
        Budget::Least => mib << 20,
        Budget::Some => (mib + 1) << 20,
        Budget::Plenty => PLENTY,
    });
    match host {
        Budget::Plenty => options,
        Budget::Least => with_least(model, &options, gpu),
        Budget::Some => {
            let least = with_least(model, &options, gpu);
            Options {
                memory: least.memory.map(|memory| memory + (1 << 20)),
                ..least
            }
        }
    }
}

/// A model's logits after a prompt and after tokens one by one are the CPU's, bit for bit.
pub fn logits_are_the_cpus(name: &str, spec: &SynthSpec, folder: &Path, gpu: &Gpu) {
    let model = folder.join(format!("{name}.gguf"));
    write(spec, &model).expect("the folder can be written");
    let (options, prompt, next) = (options(16, 128), tokens(9), tokens(2));
    let of = |engine: &mut Engine| {
        let mut all = logits(engine, 0, &prompt, 9).expect("a sweep");
        all.extend(logits(engine, 0, &next, 1).expect("a sweep"));
        all
    };
    let expected = of(&mut on_cpu(&model, &options));
    let engine = &mut on_gpu(&model, &options, gpu);
    assert_same(&of(engine), &expected, name);
}

/// Where attention is of several splits logits are close, and the same in every batch.
pub fn beyond_a_split(folder: &Path, gpu: &Gpu) {
    let model = folder.join("model.gguf");
    // Little beside attention.
    let spec = SynthSpec {
        layers: 1,
        ffn: 64,
        vocab: 64,
        ..SynthSpec::new(Arch::Llama, QuantType::Q4_0, 2)
    };
    write(&spec, &model).expect("the folder can be written");
    let (count, options) = (SPLIT + 20, options(64, 512));
    let expected = logits(&mut on_cpu(&model, &options), 0, &few(count), 64).expect("a sweep");
    let engine = &mut on_gpu(&model, &options, gpu);
    let rate = engine.device().gpu_read_rate().expect("it reads");
    assert!(rate.is_some_and(|rate| rate > 0.0), "{rate:?}");
    let got = logits(engine, 0, &few(count), 64).expect("a sweep");
    let vocab = got.len() / count;
    assert_same(
        &got[..SPLIT * vocab],
        &expected[..SPLIT * vocab],
        "the first split",
    );
    let largest = got
        .iter()
        .zip(&expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    // What rounds otherwise moves some activations by a step of their 12 bits, and the logits with them.
    assert!(largest < 0.03, "logits differ by {largest}");
    // The other session is swept beside the first one, in other chunks.
    let other = logits(engine, 1, &few(count), 29).expect("a sweep");
    assert_same(&other, &got, "another session, other chunks");
}

/// Budgets and models change while the engine is there.
pub fn budgets_and_models_change((model, other): (&Path, &Path), gpu: &Gpu) {
    let options = Options {
        memory: Some(32 << 20),
        ..options(16, 128)
    };
    let of_model = logits(&mut on_cpu(model, &options), 0, &tokens(9), 9).expect("a sweep");
    let of_other = logits(&mut on_cpu(other, &options), 0, &tokens(9), 9).expect("a sweep");
    let engine = &mut on_gpu(model, &options, gpu);
    let say = |engine: &mut Engine, id, expected: &[f32], what| {
        let got = logits_of(engine, id, 0, &tokens(9), 9).expect("a sweep");
        assert_same(&got, expected, what);
        engine.clear(id, 0);
    };
    say(engine, ModelId::FIRST, &of_model, "alone");
    let refused = engine.set_memory(1).expect_err("too little").to_string();
    let least = { refused.split("at least ").nth(1) }.and_then(|rest| rest.split(' ').next());
    let least: u64 = { least.expect("the remedy names it").parse() }.expect("a number");
    engine.set_memory(least << 20).expect("it is enough");
    say(engine, ModelId::FIRST, &of_model, "with less memory");
    engine.set_memory(32 << 20).expect("it was there before");
    let second = engine.load(other, &options.model).expect("there is room");
    say(engine, second, &of_other, "another model");
    engine.unload(second).expect("it goes");
    say(engine, ModelId::FIRST, &of_model, "alone again");
}
