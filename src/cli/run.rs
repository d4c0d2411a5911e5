//! `airstream run`: answers a prompt, or chats.

use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;

use clap::Args;

use super::args::{EngineArgs, TraceArgs};
use super::board::{self, BoardArgs};
use super::lines::Lines;
use super::stop::Stop;
use super::{fetch, progress, report};
use crate::board::{Energy, Monitor};
use crate::engine::{Engine, ModelId, Spent};
use crate::error::{Error, Kind, Result};
use crate::text::{Message, Sampler, SamplerOptions, SamplerScratch, Utf8Stream};
use crate::trace::What;

/// Answer a prompt, or chat.
///
/// With a prompt (as arguments, or piped to stdin) streams the answer to stdout. With neither, on a terminal, chats
/// until end of input (Ctrl-D); Ctrl-C stops an answer. Where the time went is told on stderr at the end.
#[derive(Args)]
pub struct Run {
    /// The GGUF file (any part of a split one). Default: SmolLM2-135M-Instruct, fetched once.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    board: BoardArgs,
    #[command(flatten)]
    trace: TraceArgs,
    /// Tokens to answer with at most. Default: until the model ends or the context is full.
    #[arg(short = 'n', long, value_name = "MAX")]
    max_tokens: Option<usize>,
    /// Temperature: 0 always takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.6)]
    temp: f32,
    /// Sample from the K likeliest tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,
    /// Sample from the likeliest tokens that together have probability P.
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Leave out tokens less likely than P times the likeliest.
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Make tokens of the last 64 less likely by this factor; 1 does nothing.
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Seed of the sampling: the same seed gives the same answer. Default: another one each time.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// The system's part of the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Continue the text as it is, without the model's chat template.
    #[arg(long)]
    raw: bool,
    /// The prompt.
    #[arg(value_name = "PROMPT")]
    prompt: Vec<String>,
}

/// Why an answer ended.
enum End {
    Token,
    Limit,
    Context,
    Stopped,
}

/// What the whole run took.
#[derive(Default)]
struct Total {
    prefill: Spent,
    decode: Spent,
    prefill_energy: Energy,
    decode_energy: Energy,
}

struct Conversation<'a> {
    engine: Engine,
    monitor: Monitor,
    sampler: Sampler,
    scratch: SamplerScratch,
    stop: Stop,
    run: &'a Run,
    /// The conversation so far, and the tokens of it that the session holds.
    messages: Vec<Message>,
    held: Vec<u32>,
    total: Total,
}

impl Run {
    pub(super) fn run(self) -> Result<()> {
        let prompt = self.read_prompt()?;
        let model = match &self.model {
            Some(path) => path.clone(),
            None => fetch::fetch(&fetch::SMOLLM2_135M)?,
        };
        let mut options = self.engine.options();
        let board = self.board.apply(&mut options)?;
        let mut engine = Engine::open(&model, &options)?;
        let monitor = self.board.watch(&board, &mut engine);
        self.trace.start(&mut engine);
        let scratch = SamplerScratch::new(engine.config(ModelId::FIRST).vocab);
        let messages = self
            .system
            .iter()
            .map(|text| Message::new("system", text.clone()))
            .collect();
        let mut conversation = Conversation {
            engine,
            monitor,
            sampler: Sampler::new(self.sampling()),
            scratch,
            stop: Stop::install(),
            run: &self,
            messages,
            held: Vec::new(),
            total: Total::default(),
        };
        match prompt {
            Some(prompt) => {
                conversation.answer(prompt)?;
                println!();
            }
            None => conversation.chat()?,
        }
        eprint!("{}", conversation.summary());
        self.trace.finish(&mut conversation.engine)?;
        Ok(())
    }

    /// The prompt from the arguments or from a pipe; none on a terminal.
    fn read_prompt(&self) -> Result<Option<String>> {
        if !self.prompt.is_empty() {
            return Ok(Some(self.prompt.join(" ")));
        }
        if io::stdin().is_terminal() {
            return Ok(None);
        }
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map_err(|e| {
            Error::new(
                Kind::Usage,
                format!("cannot read the prompt: {e}"),
                "give UTF-8 text",
            )
        })?;
        if text.trim().is_empty() {
            return Err(Error::new(
                Kind::Usage,
                "the prompt is empty",
                "give a prompt as an argument or on stdin",
            ));
        }
        Ok(Some(text))
    }

    fn sampling(&self) -> SamplerOptions {
        let clock = || {
            std::time::UNIX_EPOCH
                .elapsed()
                .map_or(0, |t| t.as_nanos() as u64)
        };
        SamplerOptions {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed.unwrap_or_else(clock),
            ..SamplerOptions::default()
        }
    }
}

impl Conversation<'_> {
    /// Reads lines and answers them until the input ends.
    fn chat(&mut self) -> Result<()> {
        eprintln!("Ctrl-D ends, Ctrl-C stops an answer.");
        let unreadable =
            |e: io::Error| Error::new(Kind::Usage, format!("cannot read: {e}"), "give UTF-8 text");
        let mut lines = Lines::new().map_err(unreadable)?;
        loop {
            eprint!("> ");
            // While somebody types, weights arrive. If they cannot, the answer will say why.
            let line = lines
                .next(|| matches!(self.engine.idle(), Ok(true)))
                .map_err(unreadable)?;
            if line.is_empty() {
                break;
            }
            if line.trim().is_empty() {
                continue;
            }
            if self.stop.asked() {
                break;
            }
            match self.answer(line.trim_end().to_owned()) {
                Ok(End::Context) => {
                    println!();
                    eprintln!(
                        "The context of {} tokens is full: a new conversation begins.",
                        self.engine.plan(ModelId::FIRST).context
                    );
                    self.forget();
                }
                Ok(_) => println!(),
                // A question that is too long ends the conversation, not the program.
                Err(e) if e.kind() == Kind::Budget => {
                    eprintln!("{e}");
                    self.forget();
                }
                Err(e) => return Err(e),
            }
            self.stop.reset();
        }
        eprintln!();
        Ok(())
    }

    fn forget(&mut self) {
        self.engine.clear(ModelId::FIRST, 0);
        self.held.clear();
        self.messages.retain(|m| m.role == "system");
    }

    /// Adds the prompt to the conversation and streams the model's answer to stdout.
    fn answer(&mut self, prompt: String) -> Result<End> {
        let tokens = self.encode(prompt)?;
        // What the session holds already need not be computed again.
        let common = self
            .held
            .iter()
            .zip(&tokens)
            .take_while(|(a, b)| a == b)
            .count();
        let new = if common == self.held.len() && common < tokens.len() {
            &tokens[common..]
        } else {
            self.engine.clear(ModelId::FIRST, 0);
            self.held.clear();
            &tokens[..]
        };
        let stop = self.stop.clone();
        let before = self.monitor.energy();
        let whole = progress::while_reading(self.engine.store().arrived_bytes(), || {
            self.engine
                .prefill(ModelId::FIRST, 0, new, &mut self.total.prefill, |_| {
                    !stop.asked()
                })
        })?;
        let prefilled = self.monitor.energy();
        let used = prefilled.since(&before);
        self.total.prefill_energy = self.total.prefill_energy.plus(&used);
        if !whole {
            self.forget();
            return Ok(End::Stopped);
        }
        self.held.extend_from_slice(new);
        tokens.iter().for_each(|&t| self.sampler.accept(t));
        let end = self.generate();
        let used = self.monitor.energy().since(&prefilled);
        self.total.decode_energy = self.total.decode_energy.plus(&used);
        end
    }

    /// The tokens of the whole conversation with the prompt at its end.
    fn encode(&mut self, prompt: String) -> Result<Vec<u32>> {
        let tokenizer = self.engine.tokenizer(ModelId::FIRST)?;
        let mut tokens = Vec::new();
        if self.run.raw {
            if self.held.is_empty() {
                tokenizer.encode(&prompt, tokenizer.add_bos_default(), true, &mut tokens);
            } else {
                tokens.clone_from(&self.held);
                tokenizer.encode(&prompt, false, true, &mut tokens);
            }
        } else {
            self.messages.push(Message::new("user", prompt));
            self.engine.template(ModelId::FIRST)?.encode(
                tokenizer,
                &self.messages,
                true,
                &mut tokens,
            )?;
        }
        if tokens.is_empty() {
            return Err(Error::new(
                Kind::Usage,
                "the prompt has no tokens",
                "give a longer prompt",
            ));
        }
        Ok(tokens)
    }

    fn generate(&mut self) -> Result<End> {
        let mut text = Utf8Stream::new();
        let mut answer = String::new();
        let mut stdout = io::stdout().lock();
        let limit = self.run.max_tokens.unwrap_or(usize::MAX);
        let mut count = 0;
        // A reader that went away (`| head`) ends the answer like Ctrl-C does.
        let mut gone = false;
        let end = loop {
            if count == limit {
                break End::Limit;
            }
            if self.stop.asked() || gone {
                break End::Stopped;
            }
            let begun = self.engine.trace().begin();
            let logits = self.engine.logits(ModelId::FIRST, 0);
            let token = self.sampler.sample(logits, &mut self.scratch);
            self.sampler.accept(token);
            self.engine.trace().end(begun, What::Sample);
            let tokenizer = self.engine.tokenizer(ModelId::FIRST)?;
            if tokenizer.is_eog(token) {
                break End::Token;
            }
            text.push(tokenizer.token_bytes(token, false), |piece| {
                answer.push_str(piece);
                gone |= stdout
                    .write_all(piece.as_bytes())
                    .and_then(|()| stdout.flush())
                    .is_err();
            });
            count += 1;
            if self.engine.session_len(ModelId::FIRST, 0)
                == self.engine.plan(ModelId::FIRST).context
            {
                break End::Context;
            }
            self.engine
                .decode(ModelId::FIRST, 0, token, &mut self.total.decode)?;
            self.held.push(token);
        };
        text.finish(|piece| {
            answer.push_str(piece);
            gone |= stdout
                .write_all(piece.as_bytes())
                .and_then(|()| stdout.flush())
                .is_err();
        });
        self.messages.push(Message::new("assistant", answer));
        Ok(end)
    }

    /// Where memory and time went.
    fn summary(&self) -> String {
        let plan = self.engine.plan(ModelId::FIRST);
        let store = self.engine.store();
        let weights = self.engine.weight_bytes(ModelId::FIRST);
        let resident = store.resident_bytes().min(weights);
        let mut text = format!("\n{}", report::budget(plan));
        text += &format!(
            "resident  {:.0}% of {} that a token needs, in {} slots of {}\n",
            100.0 * resident as f64 / weights as f64,
            report::bytes(weights),
            plan.slots,
            report::bytes(plan.slot_bytes as u64)
        );
        for (name, spent) in [
            ("prefill", &self.total.prefill),
            ("decode", &self.total.decode),
        ] {
            if spent.rows == 0 {
                continue;
            }
            text += &format!(
                "{name:<9} {} tokens in {} sweeps, {:.1} tok/s; {} read per token, NVMe {:.2} GB/s, {:.0}% stalled on reads\n",
                spent.rows,
                spent.sweeps,
                report::per_second(spent),
                report::bytes(spent.read_bytes / spent.rows),
                report::disk_rate(spent) / 1e9,
                100.0 * report::stalled_share(spent)
            );
        }
        text += &format!(
            "compute   {}; {}\n",
            self.engine.device().describe(),
            store.io_description()
        );
        let Total {
            prefill,
            decode,
            prefill_energy,
            decode_energy,
        } = self.total;
        text += &board::energy_line((prefill_energy, prefill.rows), (decode_energy, decode.rows));
        text
    }
}
