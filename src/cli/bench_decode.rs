//! Decode speed beside what the disk allowed meanwhile.
//!
//! A shared or virtual disk changes its speed within seconds. So decoding is cut into short slices, and the disk is
//! measured before, between and after them, by the store itself: the same reads into the same memory.

use std::time::Duration;

use crate::board::{Energy, Monitor};
use crate::engine::roofline::{self, Machine, Sweep};
use crate::engine::{Engine, ModelId, Row, Spent, Wanted};
use crate::error::Result;

/// How long tokens are decoded between two measurements, at least.
const SLICE: Duration = Duration::from_millis(1000);
/// How long the disk is measured; tens of windows of reads.
const SAMPLE: Duration = Duration::from_millis(250);

/// Tokens decoded in one go.
struct Slice {
    tokens: usize,
    seconds: f64,
    /// Positions before it.
    start: usize,
    /// Bytes per second that the disk gave right before and right after; none if nothing streams.
    nvme_bytes_per_s: Option<f64>,
}

/// One repetition of the decode test.
pub(super) struct Decoded {
    pub(super) spent: Spent,
    /// What went into the slices, without the measurements between them.
    pub(super) energy: Energy,
    slices: Vec<Slice>,
}

/// The disk as it was measured during a test.
#[derive(Default)]
pub(super) struct DiskSamples {
    /// The user has said how fast it is.
    known: bool,
    pub(super) bytes_per_s: Vec<f64>,
    bytes: u64,
    cpu_seconds: f64,
}

impl DiskSamples {
    /// No samples yet, nor ever if the disk's speed is `known`.
    pub(super) fn new(known: bool) -> DiskSamples {
        DiskSamples {
            known,
            ..DiskSamples::default()
        }
    }

    /// Measures once more: the rate, unless nothing streams or the rate is known, and the bytes that were read ahead
    /// in vain because of it.
    fn take(&mut self, engine: &mut Engine) -> Result<(Option<f64>, u64)> {
        if self.known {
            return Ok((None, 0));
        }
        let sample = engine.measure_disk(SAMPLE)?;
        let Some(found) = sample.bandwidth else {
            return Ok((None, sample.dropped_bytes));
        };
        self.bytes += found.bytes;
        self.cpu_seconds += found.cpu_seconds;
        self.bytes_per_s.push(found.bytes_per_second());
        Ok((Some(found.bytes_per_second()), sample.dropped_bytes))
    }

    /// The mean rate and the processor time in milliseconds per GB; none if nothing was measured.
    pub(super) fn mean(&self) -> Option<(f64, f64)> {
        let count = self.bytes_per_s.len() as f64;
        (count > 0.0).then(|| {
            (
                self.bytes_per_s.iter().sum::<f64>() / count,
                self.cpu_seconds * 1e3 / (self.bytes as f64 / 1e9),
            )
        })
    }
}

/// Decodes `tokens` tokens from an empty context.
pub(super) fn decode(
    engine: &mut Engine,
    tokens: usize,
    disk: &mut DiskSamples,
    monitor: &Monitor,
) -> Result<Decoded> {
    let model = ModelId::FIRST;
    engine.clear(model, 0);
    let vocab = engine.config(model).vocab as u32;
    let (mut spent, mut energy) = (Spent::default(), Energy::default());
    let mut slices = Vec::new();
    let (mut before, _) = disk.take(engine)?;
    let mut done = 0;
    while done < tokens {
        let (start, begun, energy_before) = (done, spent.time, monitor.energy());
        while done < tokens && spent.time - begun < SLICE {
            // Any tokens do: the work is the same for all.
            let token = (done as u32 * 7919 + 13) % vocab;
            let row = Row {
                session: 0,
                token,
                // What most samplers ask for.
                wanted: Wanted::Likeliest,
            };
            engine.sweep(model, &[row], &mut spent)?;
            done += 1;
        }
        energy = energy.plus(&monitor.energy().since(&energy_before));
        let (after, dropped_bytes) = disk.take(engine)?;
        // The next slice reads these once more; without the measurement it would not.
        spent.read_bytes -= dropped_bytes;
        slices.push(Slice {
            tokens: done - start,
            seconds: (spent.time - begun).as_secs_f64(),
            start,
            nvme_bytes_per_s: before.zip(after).map(|(a, b)| (a + b) / 2.0),
        });
        before = after;
    }
    Ok(Decoded {
        spent,
        energy,
        slices,
    })
}

impl Decoded {
    /// The time that its sweeps would take at the limits of the machine, over the time they took.
    ///
    /// `machine` says what DRAM gives; the disk is that of each slice, where it was measured.
    pub(super) fn share(&self, machine: &Machine, sweep: impl Fn(usize, &Machine) -> Sweep) -> f64 {
        let least = |slice: &Slice| {
            let machine = Machine {
                nvme_bytes_per_s: slice.nvme_bytes_per_s.unwrap_or(machine.nvme_bytes_per_s),
                ..*machine
            };
            sweep(slice.start + slice.tokens / 2, &machine).seconds * slice.tokens as f64
        };
        let took: f64 = self.slices.iter().map(|slice| slice.seconds).sum();
        self.slices.iter().map(least).sum::<f64>() / took
    }
}

/// The roofline of a model in an engine, by position and machine.
pub(super) fn roofline_of(engine: &Engine) -> impl Fn(usize, &Machine) -> Sweep + use<> {
    let model = ModelId::FIRST;
    let plan = engine.plan(model).clone();
    let config = engine.config(model).clone();
    let weight_bytes = engine.weight_bytes(model);
    move |positions, machine| roofline::decode(&plan, &config, weight_bytes, positions, machine)
}
