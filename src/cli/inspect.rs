//! `airstream inspect`: what a model file holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::args::EngineArgs;
use super::report;
use crate::engine::Loaded;
use crate::error::Result;

/// Show what a model file holds, and what would stream at a given budget.
#[derive(Args)]
pub struct Inspect {
    /// The GGUF file (any part of a split one).
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Serialize)]
struct Tensor<'a> {
    name: &'a str,
    qtype: &'static str,
    rows: usize,
    cols: usize,
    bytes: u64,
    /// Share of its bytes that would be read again in every sweep.
    streamed_share: f64,
}

#[derive(Serialize)]
struct Summary<'a> {
    architecture: &'a str,
    gguf_version: u32,
    files: Vec<String>,
    file_bytes: u64,
    layers: usize,
    dim: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    feed_forward: usize,
    vocabulary: usize,
    context: usize,
    bytes_by_type: BTreeMap<&'static str, u64>,
    sweep_bytes: u64,
    streamed_bytes_per_sweep: u64,
    tensors: Vec<Tensor<'a>>,
}

impl Inspect {
    pub(super) fn run(self) -> Result<()> {
        let loaded = Loaded::read(&self.file)?;
        let plan = loaded.plan(&self.engine.options())?;
        let (gguf, config) = (&loaded.gguf, &loaded.config);
        let mut streamed: BTreeMap<&str, u64> = BTreeMap::new();
        for tile in plan.residency.streamed() {
            let tile = &plan.tiles[tile as usize];
            *streamed
                .entry(&loaded.matrices.matrices[tile.matrix as usize].name)
                .or_default() += u64::from(tile.bytes);
        }
        let mut bytes_by_type = BTreeMap::new();
        for tensor in gguf.tensors() {
            *bytes_by_type.entry(tensor.qtype.name()).or_default() += tensor.bytes;
        }
        let tensors = gguf.tensors().iter().map(|t| Tensor {
            name: &t.name,
            qtype: t.qtype.name(),
            rows: t.rows,
            cols: t.cols,
            bytes: t.bytes,
            streamed_share: streamed.get(t.name.as_str()).copied().unwrap_or(0) as f64
                / t.bytes as f64,
        });
        let summary = Summary {
            architecture: config.arch,
            gguf_version: gguf.version(),
            files: gguf
                .files()
                .iter()
                .map(|p| p.display().to_string())
                .collect(),
            file_bytes: gguf.opened().iter().map(|file| file.metadata.len()).sum(),
            layers: config.layers.len(),
            dim: config.dim,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            feed_forward: config.ff,
            vocabulary: config.vocab,
            context: config.context_max,
            bytes_by_type,
            sweep_bytes: loaded.matrices.sweep_bytes(),
            streamed_bytes_per_sweep: plan.streamed_bytes(0),
            tensors: tensors.collect(),
        };
        if self.json {
            super::report::print_json(&summary);
        } else {
            print(&summary, self.engine.memory);
            if let Some(beyond) = config.beyond(plan.context) {
                println!("\nwarning: {beyond}");
            }
        }
        Ok(())
    }
}

fn print(s: &Summary, memory: Option<u64>) {
    println!(
        "architecture   {} (GGUF v{})",
        s.architecture, s.gguf_version
    );
    println!(
        "file           {} in {} file(s)",
        report::bytes(s.file_bytes),
        s.files.len()
    );
    println!(
        "layers         {} of {} values, feed-forward {}",
        s.layers, s.dim, s.feed_forward
    );
    println!(
        "heads          {} of {} values, {} for keys and values",
        s.heads, s.head_dim, s.kv_heads
    );
    println!("vocabulary     {} tokens", s.vocabulary);
    println!("context        {} tokens", s.context);
    let types: Vec<String> = s
        .bytes_by_type
        .iter()
        .map(|(t, b)| format!("{t} {}", report::bytes(*b)))
        .collect();
    println!("weights        {}", types.join(", "));
    println!("used per sweep {}", report::bytes(s.sweep_bytes));
    if let Some(memory) = memory {
        println!(
            "streamed       {} per sweep at {}",
            report::bytes(s.streamed_bytes_per_sweep),
            report::bytes(memory)
        );
    }
    println!(
        "\n{:<36} {:<5} {:>15} {:>11}  streamed",
        "tensor", "type", "rows x cols", "size"
    );
    for t in &s.tensors {
        let shape = format!("{} x {}", t.rows, t.cols);
        let share = if t.streamed_share > 0.0 {
            format!("{:>7.0}%", 100.0 * t.streamed_share)
        } else {
            "-".into()
        };
        println!(
            "{:<36} {:<5} {:>15} {:>11}  {share:>8}",
            t.name,
            t.qtype,
            shape,
            report::bytes(t.bytes)
        );
    }
}
