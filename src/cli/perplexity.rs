//! `airstream perplexity`: how well a model predicts a text, and its raw logits.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::args::EngineArgs;
use super::report;
use crate::engine::{Engine, ModelId, Row, Spent, Wanted, not_finite};
use crate::error::{Error, Kind, Result};

/// Logits of one sweep may take this much memory where no budget was given.
const LOGITS_BYTES: u64 = 64 << 20;

/// Measure how well a model predicts a text, or write its logits.
///
/// The text is cut into windows of --ctx tokens, each evaluated from an empty context (and with the BOS token where
/// the model wants one); every token but the first of a window counts.
#[derive(Args)]
pub struct Perplexity {
    /// The GGUF file (any part of a split one).
    file: PathBuf,
    /// The text.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "tokens",
        conflicts_with = "tokens"
    )]
    text: Option<PathBuf>,
    /// Token ids instead of a text, one a line.
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Write the logits of every position: little-endian f32, positions x vocabulary, row by row.
    #[arg(long, value_name = "OUT")]
    logits: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Serialize)]
struct Summary {
    tokens: usize,
    predicted: usize,
    perplexity: f64,
    nats_per_token: f64,
    tok_s: f64,
}

impl Perplexity {
    pub(super) fn run(self) -> Result<()> {
        let mut options = self.engine.options();
        let vocab_bytes = crate::engine::Loaded::read(&self.file)?.config.vocab as u64 * 4;
        let logits_bytes = options.memory.map_or(LOGITS_BYTES, |memory| memory / 8);
        options.model.logits_rows = (logits_bytes / vocab_bytes).clamp(1, 64) as usize;
        let mut engine = Engine::open(&self.file, &options)?;
        let tokens = self.read_tokens(&engine)?;
        if tokens.len() < 2 {
            return Err(Error::new(
                Kind::Usage,
                "there are fewer than two tokens to predict",
                "give a longer text",
            ));
        }
        let mut out = match &self.logits {
            Some(path) => Some((
                BufWriter::new(File::create(path).map_err(|e| Error::file(path, "create", &e))?),
                path,
            )),
            None => None,
        };
        let (mut nats, mut predicted, mut spent) = (0.0, 0, Spent::default());
        let limits = engine.plan(ModelId::FIRST).limits;
        let bos = self
            .text
            .as_ref()
            .and(engine.tokenizer(ModelId::FIRST).ok())
            .filter(|t| t.add_bos_default())
            .and_then(|t| t.bos());
        let room = engine.plan(ModelId::FIRST).context - usize::from(bos.is_some());
        for window in tokens.chunks(room.max(1)) {
            engine.clear(ModelId::FIRST, 0);
            let window: Vec<u32> = bos.iter().chain(window).copied().collect();
            let mut position = 0;
            for chunk in window.chunks(limits.rows.min(limits.logits_rows)) {
                let rows: Vec<Row> = chunk
                    .iter()
                    .map(|&token| Row {
                        session: 0,
                        token,
                        wanted: Wanted::Logits,
                    })
                    .collect();
                engine.sweep(ModelId::FIRST, &rows, &mut spent)?;
                for index in 0..chunk.len() {
                    let logits = engine.logits(ModelId::FIRST, index);
                    if let Some((file, path)) = &mut out {
                        for value in logits.iter() {
                            file.write_all(&value.to_le_bytes())
                                .map_err(|e| Error::file(path, "write", &e))?;
                        }
                    }
                    position += 1;
                    if let Some(&next) = window.get(position) {
                        let surprise = surprise(logits, next);
                        if !surprise.is_finite() {
                            return Err(not_finite(self.file.display()));
                        }
                        nats += surprise;
                        predicted += 1;
                    }
                }
            }
            eprint!("\r{predicted} of {} tokens", tokens.len());
        }
        eprintln!();
        if let Some((mut file, path)) = out {
            file.flush().map_err(|e| Error::file(path, "write", &e))?;
        }
        let nats_per_token = nats / f64::from(predicted.max(1));
        let summary = Summary {
            tokens: tokens.len(),
            predicted: predicted as usize,
            perplexity: nats_per_token.exp(),
            nats_per_token,
            tok_s: report::per_second(&spent),
        };
        if self.json {
            report::print_json(&summary);
        } else {
            println!(
                "perplexity {:.4} over {} tokens ({:.4} nats a token, {:.1} tok/s)",
                summary.perplexity, summary.predicted, summary.nats_per_token, summary.tok_s
            );
        }
        Ok(())
    }

    fn read_tokens(&self, engine: &Engine) -> Result<Vec<u32>> {
        if let Some(path) = &self.tokens {
            let vocab = engine.config(ModelId::FIRST).vocab;
            return read_text(path)?
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty())
                .map(|line| {
                    let id = line.parse().ok().filter(|&id: &u32| (id as usize) < vocab);
                    id.ok_or_else(|| {
                        let what = format!("{line:?} in {} is no token id", path.display());
                        let remedy = format!("give one number below {vocab} a line");
                        Error::new(Kind::Usage, what, remedy)
                    })
                })
                .collect();
        }
        let path = self.text.as_ref().expect("clap asks for one of the two");
        let mut tokens = Vec::new();
        engine
            .tokenizer(ModelId::FIRST)?
            .encode(&read_text(path)?, false, false, &mut tokens);
        Ok(tokens)
    }
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::file(path, "read", &e))
}

/// Nats of surprise at `token`: -ln softmax(logits)[token].
fn surprise(logits: &[f32], token: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - largest).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - largest)
}

#[cfg(test)]
mod tests {
    use super::surprise;

    #[test]
    fn surprise_is_minus_log_probability() {
        let logits = [1.0f32.ln(), 3.0f32.ln(), 4.0f32.ln()];
        assert!((surprise(&logits, 1) - (8.0f64 / 3.0).ln()).abs() < 1e-6);
        assert!((surprise(&[1000.0, 1000.0], 0) - 2.0f64.ln()).abs() < 1e-6);
    }
}
