//! `airstream run`: answers a prompt, or chats.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use super::args::{EngineArgs, TraceArgs};
use super::board::{self, BoardArgs};
use super::lines::Lines;
use super::question::{self, INTERRUPTED, Question};
use super::stop::Stop;
use super::{fetch, progress, report};
use crate::board::{Energy, Monitor};
use crate::engine::request::{Event, Generate, Reason, Tag};
use crate::engine::scheduler::{Flow, Limits, Scheduler, Step};
use crate::engine::{Engine, ModelId, Spent};
use crate::error::{Error, Kind, Result};

/// Answer a prompt, or chat.
///
/// With a prompt (as arguments, or piped to stdin) streams the answer to stdout. With neither, on a terminal, chats
/// until end of input (Ctrl-D); Ctrl-C stops an answer, which without a chat is exit code 130. Where the time went is
/// told on stderr at the end.
#[derive(Args)]
pub struct Run {
    /// The GGUF file (any part of a split one). Default: SmolLM2-135M-Instruct, fetched once.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// A GGUF file of a smaller model of the same vocabulary (Llama-3.2-1B beside Llama-3.1-8B, or a coarser quantization
    /// of the same model): it stays in memory and drafts what is likely to come, which saves sweeps of the large model
    /// and never changes the answer.
    #[arg(long, value_name = "FILE")]
    draft_model: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    board: BoardArgs,
    #[command(flatten)]
    trace: TraceArgs,
    #[command(flatten)]
    question: Question,
}

/// The conversation's name for the scheduler.
const SESSION: &str = "run";
/// While weights are on their way, they are looked after again within this time.
const SOON: Duration = Duration::from_millis(10);

/// What the whole run took.
#[derive(Default)]
struct Total {
    prefill: Spent,
    decode: Spent,
    prefill_energy: Energy,
    decode_energy: Energy,
}

/// A scheduler with one client, who has one session.
struct Conversation<'a> {
    scheduler: Scheduler,
    started: Instant,
    monitor: Monitor,
    stop: Stop,
    run: &'a Run,
    /// Requests so far.
    requests: u32,
    total: Total,
}

/// What came of an answer so far.
#[derive(Default)]
struct Answer {
    begun: bool,
    /// Text that was not printed yet.
    text: String,
    ended: Option<Result<Reason>>,
    /// The reader of stdout went away (`| head`): that ends the answer like Ctrl-C does.
    gone: bool,
}

impl Answer {
    fn take(&mut self, event: &Event<'_>) {
        self.begun |= !matches!(event, Event::Accepted { .. });
        match event {
            Event::Accepted { .. } => {}
            Event::Token { text, .. } => self.text.push_str(text),
            Event::Done { reason, .. } => self.ended = Some(Ok(*reason)),
            Event::Error { code, text, remedy } => {
                let error = Error::new(*code, text.as_ref(), remedy.as_ref());
                self.ended = Some(Err(error));
            }
        }
    }

    fn print(&mut self) {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(self.text.as_bytes());
        self.gone |= written.and_then(|()| stdout.flush()).is_err();
        self.text.clear();
    }
}

impl Run {
    pub(super) fn run(self) -> Result<ExitCode> {
        let prompt = self.read_prompt()?;
        let model = match &self.model {
            Some(path) => path.clone(),
            None => fetch::fetch(&fetch::SMOLLM2_135M)?,
        };
        let mut options = self.engine.options();
        options.model.draft_model.clone_from(&self.draft_model);
        let board = self.board.apply(&mut options)?;
        let mut engine = Engine::open(&model, &options)?;
        let monitor = self.board.watch(&board, &mut engine);
        self.trace.start(&mut engine);
        let limits = Limits {
            // Nobody else wants the session.
            idle: Duration::MAX,
            ..Limits::default()
        };
        let mut conversation = Conversation {
            scheduler: Scheduler::new(engine, &[("model", 1)], limits),
            started: Instant::now(),
            monitor,
            stop: Stop::install(),
            run: &self,
            requests: 0,
            total: Total::default(),
        };
        let mut code = ExitCode::SUCCESS;
        match prompt {
            Some(prompt) => {
                let reason = conversation.answer(prompt)?;
                // Its reader may be gone, and the summary is to come.
                let _ = writeln!(io::stdout());
                if reason == Reason::Context {
                    question::tell_cut_short("give a larger --ctx, or more --memory");
                }
                if conversation.stop.asked() {
                    code = ExitCode::from(INTERRUPTED);
                }
            }
            None => conversation.chat()?,
        }
        eprint!("{}", conversation.summary());
        self.trace
            .finish(&mut conversation.scheduler.into_engine())?;
        Ok(code)
    }

    /// The prompt from the arguments or from a pipe; none on a terminal.
    fn read_prompt(&self) -> Result<Option<String>> {
        let first = self.question.words().first();
        let first = first.filter(|_| self.model.is_none());
        if let Some(file) =
            first.filter(|word| word.ends_with(".gguf") && Path::new(word).is_file())
        {
            return Err(Error::new(
                Kind::Usage,
                format!("{file} is a model file, and stands where the prompt does"),
                format!("say --model {file}"),
            ));
        }
        self.question.text()
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
            let line = lines.next(|| self.rest()).map_err(unreadable)?;
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
                Ok(Reason::Context) => {
                    println!();
                    question::tell_cut_short("a new conversation begins");
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

    /// Lets weights arrive while somebody types; whether more are to come. If they cannot, the answer will say why.
    fn rest(&mut self) -> bool {
        let now = self.started.elapsed();
        let step = self.scheduler.step(now, &mut |_, _| Flow::Taken);
        matches!(step, Step::Idle { until: Some(until) } if until < now + SOON)
    }

    /// Begins anew.
    fn forget(&mut self) {
        // What was too long for the first question has begun no session.
        let _ = self.scheduler.reset(None, SESSION);
    }

    /// Streams the model's answer to stdout; why it ended.
    fn answer(&mut self, prompt: String) -> Result<Reason> {
        let vocabulary = self.scheduler.vocabulary(None)?;
        let prepared = vocabulary.prepare(&Generate {
            session: Some(SESSION.to_owned()),
            ..self.run.question.request(prompt)
        })?;
        self.requests += 1;
        let tag = Tag {
            client: 0,
            request: self.requests,
        };
        let mut answer = Answer::default();
        let energy = self.monitor.energy();
        let spent = self.scheduler.spent(None)?;
        self.scheduler
            .submit(tag, prepared, self.started.elapsed())?;
        let arrived = self.scheduler.engine().store().arrived_bytes();
        progress::while_reading(arrived, || {
            while !answer.begun {
                self.step(tag, &mut answer);
            }
        });
        let (energy_between, between) = (self.monitor.energy(), self.scheduler.spent(None)?);
        answer.print();
        while answer.ended.is_none() {
            self.step(tag, &mut answer);
            answer.print();
        }
        let total = &mut self.total;
        total.prefill = total.prefill.plus(&between.since(&spent));
        let decode = self.scheduler.spent(None)?.since(&between);
        total.decode = total.decode.plus(&decode);
        total.prefill_energy = total.prefill_energy.plus(&energy_between.since(&energy));
        let decode_energy = self.monitor.energy().since(&energy_between);
        total.decode_energy = total.decode_energy.plus(&decode_energy);
        answer.ended.unwrap_or(Ok(Reason::Cancelled))
    }

    /// One sweep for the request, unless Ctrl-C ends it.
    fn step(&mut self, tag: Tag, answer: &mut Answer) {
        let now = self.started.elapsed();
        if self.stop.asked() || answer.gone {
            self.scheduler.cancel(tag, now);
        }
        self.scheduler.step(now, &mut |_, event| {
            answer.take(event);
            Flow::Taken
        });
    }

    /// Where memory and time went.
    fn summary(&self) -> String {
        let engine = self.scheduler.engine();
        let plan = engine.plan(ModelId::FIRST);
        let store = engine.store();
        let weights = engine.weight_bytes(ModelId::FIRST);
        let resident = store.resident_bytes_of(ModelId::FIRST).min(weights);
        let mut text = format!("\n{}", report::shares(engine));
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
            let tokens = spent.tokens();
            if tokens == 0 {
                continue;
            }
            text += &format!(
                "{name:<9} {tokens} tokens in {} sweeps, {:.1} tok/s; {} read per token, NVMe {:.2} GB/s, {:.0}% stalled on reads\n",
                spent.sweeps,
                report::per_second(spent),
                report::bytes(spent.read_bytes / tokens),
                report::disk_rate(spent) / 1e9,
                100.0 * report::stalled_share(spent)
            );
            if spent.drafts > 0 {
                text += &format!(
                    "drafts    {} of {} came true{}\n",
                    spent.drafts_right,
                    spent.drafts,
                    match report::drafting_share(spent) {
                        0.0 => String::new(),
                        share =>
                            format!(", {:.0}% of the time was the draft model's", 100.0 * share),
                    }
                );
            }
        }
        if plan.gpu_memory.is_some() && self.total.decode.sweeps > 0 {
            let copied = self.total.decode.copied_bytes / self.total.decode.sweeps;
            text += &format!(
                "GPU       {} slots of its own, {} copied there in each sweep of decode\n",
                plan.gpu_slots,
                report::bytes(copied)
            );
        }
        text += &format!(
            "compute   {}; {}\n",
            engine.device().describe(),
            store.io_description()
        );
        let Total {
            prefill,
            decode,
            prefill_energy,
            decode_energy,
        } = self.total;
        text += &board::energy_line(
            (prefill_energy, prefill.tokens()),
            (decode_energy, decode.tokens()),
        );
        text
    }
}
