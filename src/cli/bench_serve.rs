//! `airstream bench --serve`: how much more several sessions get out of the sweeps that they share.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::report;
use crate::engine::request::{Event, Generate, Prompt, Sampling, Tag};
use crate::engine::scheduler::{Flow, Limits, Scheduler};
use crate::engine::{Engine, ModelId, Options};
use crate::error::Result;

/// Numbers of sessions that are tried.
const SESSIONS: [usize; 4] = [1, 2, 4, 8];
/// Tokens of the prompts of sessions that decode together.
const PROMPT_TOKENS: u32 = 16;
/// Tokens of the prompt that a decoding neighbour has to bear.
const LONG_PROMPT_TOKENS: u32 = 512;

/// Sessions that decode at the same time.
#[derive(Serialize)]
struct Together {
    sessions: usize,
    /// Median of all rounds: tokens of all sessions per second.
    tok_s: f64,
    min_tok_s: f64,
    max_tok_s: f64,
    /// Over that of one session.
    speedup: f64,
    disk_bytes_per_sweep: f64,
    /// What a sweep takes, and what is done between sweeps: choosing rows and tokens, and telling the clients.
    sweep_ms: f64,
    between_us: f64,
    between_share: f64,
}

/// The time between two tokens of one session, in milliseconds.
#[derive(Serialize)]
struct Between {
    median_ms: f64,
    p95_ms: f64,
    max_ms: f64,
}

#[derive(Serialize)]
struct Summary {
    model: String,
    memory: u64,
    threads: usize,
    isa: String,
    streamed_bytes_per_sweep: u64,
    together: Vec<Together>,
    /// One session alone, and beside the prompt of another.
    alone: Between,
    beside_a_prompt: Between,
    slowed_median: f64,
    slowed_p95: f64,
    long_prompt_tok_s: f64,
    /// From a request's text to its first row, when nothing else is to be done.
    first_row_ms: f64,
}

/// What was told so far.
#[derive(Default)]
struct Told {
    /// (client, when).
    tokens: Vec<(u32, Instant)>,
}

struct Bench {
    scheduler: Scheduler,
    epoch: Instant,
    told: Told,
    sampling: Sampling,
    vocab: u32,
    next: u32,
}

/// Measures sessions of the model in `file` that share sweeps.
pub(super) fn run(
    file: &Path,
    options: &Options,
    tokens: usize,
    rounds: u16,
    json: bool,
) -> Result<()> {
    let sessions = SESSIONS[SESSIONS.len() - 1];
    let mut options = options.clone();
    options.model.sessions = sessions;
    options.model.logits_rows = sessions;
    // What sharing gives is measured, without what drafts give.
    options.model.drafts = Some(0);
    let context = PROMPT_TOKENS.max(LONG_PROMPT_TOKENS) as usize + tokens.max(256) + 2;
    options.model.context.get_or_insert(context);
    let mut bench = Bench::open(file, &options)?;
    // One of each first: it fills the slots, touches all that is touched once, and shows the scheduler what rows take.
    bench.together(sessions, tokens.min(16))?;
    bench.beside_a_prompt(16)?;
    let mut runs: Vec<Vec<Together>> = SESSIONS.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (runs, sessions) in runs.iter_mut().zip(SESSIONS) {
            runs.push(bench.together(sessions, tokens)?);
        }
    }
    let mut together: Vec<Together> = runs.into_iter().map(median).collect();
    let one = together[0].tok_s;
    for together in &mut together {
        together.speedup = together.tok_s / one;
    }
    let (mut alone, mut beside, mut long_s) = (Vec::new(), Vec::new(), 0.0);
    for _ in 0..rounds {
        let (a, b, seconds) = bench.beside_a_prompt(64)?;
        alone.extend(a);
        beside.extend(b);
        long_s += seconds;
    }
    let (alone, beside) = (between(alone), between(beside));
    let first_row_ms = bench.first_row()?;
    let engine = bench.scheduler.engine();
    let plan = engine.plan(ModelId::FIRST);
    let summary = Summary {
        model: file.display().to_string(),
        memory: plan.total_bytes(),
        threads: engine.device().threads(),
        isa: engine.device().name(),
        streamed_bytes_per_sweep: plan.streamed_bytes(0),
        together,
        slowed_median: beside.median_ms / alone.median_ms,
        slowed_p95: beside.p95_ms / alone.median_ms,
        alone,
        beside_a_prompt: beside,
        long_prompt_tok_s: f64::from(LONG_PROMPT_TOKENS) * f64::from(rounds) / long_s,
        first_row_ms,
    };
    if json {
        report::print_json(&summary);
    } else {
        print(&summary);
    }
    Ok(())
}

impl Bench {
    fn open(file: &Path, options: &Options) -> Result<Bench> {
        let engine = Engine::open(file, options)?;
        let vocab = engine.config(ModelId::FIRST).vocab as u32;
        // Answers end where the measurement does.
        let ends = engine.tokenizer(ModelId::FIRST).map(|tokenizer| {
            let ends = (0..vocab).filter(|&token| tokenizer.is_eog(token));
            ends.map(|token| (token, f32::NEG_INFINITY)).collect()
        });
        let limits = Limits {
            // Each round computes its prompts anew.
            kept: Duration::ZERO,
            ..Limits::default()
        };
        Ok(Bench {
            scheduler: Scheduler::new(engine, &[("model", 1)], limits),
            epoch: Instant::now(),
            told: Told::default(),
            sampling: Sampling {
                seed: Some(1),
                logit_bias: ends.unwrap_or_default(),
                ..Sampling::default()
            },
            vocab,
            next: 0,
        })
    }

    /// Submits a request; its client's number.
    fn submit(&mut self, prompt_tokens: u32) -> Result<u32> {
        self.next += 1;
        let client = self.next;
        // Any tokens do, but each session's begin differently, or they would share.
        let prompt = (0..prompt_tokens).map(|i| (client * 31 + i * 7919 + 13) % self.vocab);
        let request = Generate {
            sampling: self.sampling.clone(),
            ..Generate::new(Prompt::Tokens(prompt.collect()))
        };
        let prepared = self.scheduler.vocabulary(None)?.prepare(&request)?;
        let tag = Tag { client, request: 0 };
        self.scheduler.submit(tag, prepared, self.epoch.elapsed())?;
        Ok(client)
    }

    fn step(&mut self) -> Result<()> {
        let (told, mut failed) = (&mut self.told.tokens, None);
        self.scheduler
            .step(self.epoch.elapsed(), &mut |tag, event| {
                match event {
                    Event::Token { .. } => told.push((tag.client, Instant::now())),
                    Event::Error { code, text, remedy } => {
                        failed = Some(crate::Error::new(*code, text.as_ref(), remedy.as_ref()));
                    }
                    _ => {}
                }
                Flow::Taken
            });
        failed.map_or(Ok(()), Err)
    }

    fn tokens_of(&self, client: u32) -> usize {
        self.told
            .tokens
            .iter()
            .filter(|(c, _)| *c == client)
            .count()
    }

    /// Ends everything.
    fn rest(&mut self) -> Result<()> {
        for client in 0..=self.next {
            self.scheduler.cancel_client(client, self.epoch.elapsed());
        }
        self.told.tokens.clear();
        self.step()
    }

    /// `sessions` that decode `tokens` each at the same time.
    fn together(&mut self, sessions: usize, tokens: usize) -> Result<Together> {
        let clients: Vec<u32> = (0..sessions)
            .map(|_| self.submit(PROMPT_TOKENS))
            .collect::<Result<_>>()?;
        while clients.iter().any(|&client| self.tokens_of(client) == 0) {
            self.step()?;
        }
        // The first sweep in which all decode shows what it takes; it may still hold the rest of a prompt.
        self.step()?;
        self.told.tokens.clear();
        let before = self.scheduler.spent(None)?;
        let start = Instant::now();
        while self.told.tokens.len() < tokens * sessions {
            self.step()?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let after = self.scheduler.spent(None)?;
        let sweeps = (after.sweeps - before.sweeps) as f64;
        let swept = (after.time - before.time).as_secs_f64();
        let tok_s = self.told.tokens.len() as f64 / seconds;
        self.rest()?;
        Ok(Together {
            sessions,
            tok_s,
            min_tok_s: tok_s,
            max_tok_s: tok_s,
            speedup: 1.0,
            disk_bytes_per_sweep: (after.read_bytes - before.read_bytes) as f64 / sweeps,
            sweep_ms: swept * 1e3 / sweeps,
            between_us: (seconds - swept) * 1e6 / sweeps,
            between_share: (seconds - swept) / swept,
        })
    }

    /// Times between tokens of one session alone (`tokens` of them) and while another's long prompt is computed, in
    /// milliseconds, and how long that prompt took, in seconds.
    fn beside_a_prompt(&mut self, tokens: usize) -> Result<(Vec<f64>, Vec<f64>, f64)> {
        let client = self.submit(PROMPT_TOKENS)?;
        while self.tokens_of(client) < tokens + 2 {
            self.step()?;
        }
        let alone = self.times(client, 1);
        let from = self.tokens_of(client);
        let start = Instant::now();
        let other = self.submit(LONG_PROMPT_TOKENS)?;
        while self.tokens_of(other) == 0 {
            self.step()?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let beside = self.times(client, from);
        self.rest()?;
        Ok((alone, beside, seconds))
    }

    /// Milliseconds before each token of a client from the `from`-th on.
    fn times(&self, client: u32, from: usize) -> Vec<f64> {
        let own = self.told.tokens.iter().filter(|(c, _)| *c == client);
        let at: Vec<Instant> = own.map(|(_, at)| *at).collect();
        let pairs = at.windows(2).skip(from - 1);
        pairs
            .map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3)
            .collect()
    }

    /// Milliseconds from a prompt to its first sweep, everything that follows the sweep included.
    fn first_row(&mut self) -> Result<f64> {
        let before = self.scheduler.spent(None)?.time;
        let start = Instant::now();
        self.submit(LONG_PROMPT_TOKENS)?;
        self.step()?;
        let took = start.elapsed();
        let swept = self.scheduler.spent(None)?.time - before;
        self.rest()?;
        Ok((took - swept).as_secs_f64() * 1e3)
    }
}

/// The round of median speed, with the range of all.
fn median(mut runs: Vec<Together>) -> Together {
    runs.sort_by(|a, b| a.tok_s.total_cmp(&b.tok_s));
    let (min_tok_s, max_tok_s) = (runs[0].tok_s, runs[runs.len() - 1].tok_s);
    Together {
        min_tok_s,
        max_tok_s,
        ..runs.swap_remove(runs.len() / 2)
    }
}

fn between(mut ms: Vec<f64>) -> Between {
    ms.sort_by(f64::total_cmp);
    let at = |share: f64| ms[((ms.len() - 1) as f64 * share) as usize];
    Between {
        median_ms: at(0.5),
        p95_ms: at(0.95),
        max_ms: at(1.0),
    }
}

fn print(s: &Summary) {
    println!(
        "{} on {} x {}, memory {}, {} streamed per sweep\n",
        s.model,
        s.threads,
        s.isa,
        report::bytes(s.memory),
        report::bytes(s.streamed_bytes_per_sweep)
    );
    println!("| sessions | tok/s | min to max | times one | sweep ms | between sweeps |");
    println!("|---|---|---|---|---|---|");
    for t in &s.together {
        println!(
            "| {} | {:.1} | {:.1} to {:.1} | {:.2} | {:.3} | {:.0} us, {:.2}% |",
            t.sessions,
            t.tok_s,
            t.min_tok_s,
            t.max_tok_s,
            t.speedup,
            t.sweep_ms,
            t.between_us,
            100.0 * t.between_share
        );
    }
    println!("\n| between two tokens | median ms | 95% ms | max ms |");
    println!("|---|---|---|---|");
    let beside = format!("beside a prompt of {LONG_PROMPT_TOKENS}");
    for (name, b) in [("alone", &s.alone), (beside.as_str(), &s.beside_a_prompt)] {
        println!(
            "| {name} | {:.2} | {:.2} | {:.2} |",
            b.median_ms, b.p95_ms, b.max_ms
        );
    }
    println!(
        "\nbeside a prompt {:.2} times as long in the median, {:.2} at 95%; the prompt at {:.0} tok/s\nfrom a request to its first row: {:.3} ms",
        s.slowed_median, s.slowed_p95, s.long_prompt_tok_s, s.first_row_ms
    );
}
