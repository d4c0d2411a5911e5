//! The engine: one model, its sessions, and sweeps over batches of their rows.
//!
//! [`Engine::open`] divides the budget, reserves the arena, loads what is
//! small and starts the reads; after that nothing is allocated between tokens.
#![allow(unsafe_code)]

pub mod plan;
pub mod roofline;

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::arena::Reservation;
use crate::device::cpu::{Cpu, Isa};
use crate::error::{Error, Kind, Result};
use crate::format::gguf::Gguf;
use crate::format::tile;
use crate::io::{self, Access, Backend, Files, Region};
use crate::model::config::Config;
use crate::model::forward::Model;
use crate::model::kv::Session;
use crate::model::weights::MatrixPlan;
use crate::store::integrity::Integrity;
use crate::store::{Counters, Store, sidecar};
use crate::text::{ChatTemplate, Tokenizer};
use crate::trace::Trace;

pub use crate::model::forward::Row;
pub use plan::{Line, Plan, Request};

/// How to open a model.
#[derive(Debug, Clone)]
pub struct Options {
    /// The memory budget; all the model needs, within what is free, if none.
    pub memory: Option<u64>,
    /// Positions of a session; chosen if none.
    pub context: Option<usize>,
    /// Sessions at a time.
    pub sessions: usize,
    /// The most rows in a sweep; chosen if none.
    pub rows: Option<usize>,
    /// Rows that want logits in one sweep.
    pub logits_rows: usize,
    /// Threads that compute; all that this process may use if none.
    pub threads: Option<usize>,
    /// The instruction set; the best there is if none.
    pub isa: Option<Isa>,
    /// How to read; the best there is if none.
    pub backend: Option<Backend>,
    /// Whether tiles must agree with their checksums each time they are read.
    pub verify: bool,
    /// The folder that keeps checksums between runs; the user's cache folder if none.
    pub cache: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            memory: None,
            context: None,
            sessions: 1,
            rows: None,
            logits_rows: 1,
            threads: None,
            isa: None,
            backend: None,
            verify: true,
            cache: None,
        }
    }
}

/// A model file as read: everything known of it before memory is taken.
pub struct Loaded {
    /// The metadata.
    pub gguf: Gguf,
    /// The model's shape.
    pub config: Config,
    /// Its matrices in the order of the sweep.
    pub matrices: MatrixPlan,
    /// Its tokenizer; none if the file has no vocabulary.
    pub tokenizer: Option<Tokenizer>,
}

impl Loaded {
    /// Reads the metadata of a GGUF.
    pub fn read(path: &Path) -> Result<Loaded> {
        let gguf = Gguf::open(path)?;
        let config = Config::read(&gguf)?;
        let matrices = MatrixPlan::new(&gguf, &config)?;
        for matrix in &matrices.matrices {
            Cpu::check_matrix(matrix.qtype, matrix.cols)?;
        }
        let vocabulary = gguf
            .str("tokenizer.ggml.model")?
            .filter(|&kind| kind != "no_vocab" && kind != "none");
        let tokenizer = match vocabulary {
            Some(_) => Some(Tokenizer::from_gguf(&gguf)?),
            None => None,
        };
        Ok(Loaded {
            gguf,
            config,
            matrices,
            tokenizer,
        })
    }

    /// Divides a budget for this model.
    pub fn plan(&self, options: &Options) -> Result<Plan> {
        let request = Request {
            memory: options.memory.unwrap_or(u64::MAX >> 1),
            context: options.context,
            sessions: options.sessions,
            rows: options.rows,
            logits_rows: options.logits_rows,
            threads: threads(options),
            tokenizer_bytes: self.tokenizer.as_ref().map_or(0, Tokenizer::table_bytes),
        };
        let unlimited = options.memory.is_none();
        let plan = Plan::new(&self.config, &self.matrices, &request)?;
        if !unlimited {
            return Ok(plan);
        }
        // Nobody gave a budget: take what the model needs, but leave a fifth of the free memory to others.
        let memory = plan.total_bytes().min(memory_available() / 5 * 4);
        Plan::new(&self.config, &self.matrices, &Request { memory, ..request })
    }
}

/// Threads that compute: as asked, or all that this process may use.
pub fn threads(options: &Options) -> usize {
    options
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// `MemAvailable`, or a cautious guess where there is no such line.
fn memory_available() -> u64 {
    let kib = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find(|line| line.starts_with("MemAvailable:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
    kib.map_or(1 << 30, |kib| kib << 10)
}

/// Where the time and the bytes of some sweeps went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    /// Rows computed.
    pub rows: u64,
    /// Sweeps made.
    pub sweeps: u64,
    /// Time in sweeps.
    pub time: Duration,
    /// Of that, waiting for reads with nothing to compute.
    pub stalled: Duration,
    /// Bytes that arrived from disk.
    pub read_bytes: u64,
}

/// One model in one arena.
pub struct Engine {
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    model: Model,
    sessions: Vec<Session>,
    store: Store,
    cpu: Cpu,
    plan: Plan,
    batch: Vec<Row>,
    files: Arc<Files>,
    backend: Option<Backend>,
}

impl Engine {
    /// Opens a model file (any part of a split one).
    ///
    /// # Errors
    /// The file is not a sound GGUF of a supported model, the budget cannot hold the minimum, or the system refuses
    /// memory or files.
    pub fn open(path: &Path, options: &Options) -> Result<Engine> {
        let loaded = Loaded::read(path)?;
        let plan = loaded.plan(options)?;
        let Loaded {
            gguf,
            config,
            matrices,
            tokenizer,
        } = loaded;
        let template = match &tokenizer {
            Some(tokenizer) => Some(ChatTemplate::from_gguf(&gguf, tokenizer)?),
            None => None,
        };
        let row_bytes_max = matrices
            .matrices
            .iter()
            .map(|m| m.row_bytes())
            .max()
            .unwrap_or(0);
        let cpu = Cpu::new(
            threads(options),
            options.isa.unwrap_or_else(Isa::detect),
            row_bytes_max,
        )?;

        let mut arena = Reservation::new(plan.arena_bytes())?;
        let layers = config.layers.len();
        let list = matrices.matrices.clone();
        let model = Model::new(
            &gguf,
            config,
            matrices,
            plan.limits,
            plan.layout,
            plan.tiles.len(),
            &mut arena,
        )?;
        let paths: Vec<PathBuf> = gguf.files().to_vec();
        // The metadata's mapping goes before the arena fills, so that both never count at once.
        drop(gguf);
        let slots = arena.seal(plan.slot_bytes);
        let regions: Vec<Region> = slots
            .regions(|_| true)
            .into_iter()
            .map(|(start, len)| Region { start, len })
            .collect();
        let files = Arc::new(io::open_model(&paths, Access::Direct)?);
        let io = io::choose(&files, &regions, plan.depth(), options.backend)?;
        let cut = tile::cut(&list, plan.slot_bytes);
        let cache = options.cache.clone().or_else(sidecar::cache_folder);
        let integrity =
            Integrity::new(Arc::clone(&files), &cut.0, options.verify, cache.as_deref());
        let store = Store::new(list, cut, paths, slots, io, plan.window).with_integrity(integrity);
        let sessions = (0..options.sessions)
            .map(|_| Session::new(layers, plan.layout, plan.context))
            .collect();
        Ok(Engine {
            tokenizer,
            template,
            batch: Vec::with_capacity(plan.limits.rows),
            model,
            sessions,
            store,
            cpu,
            plan,
            files,
            backend: options.backend,
        })
    }

    /// How the budget was divided.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Changes the memory budget between sweeps, down or up to what the engine was opened with.
    ///
    /// Conversations go on, and their contexts can still grow to what was planned. Fewer or more weights stay in
    /// memory from the next sweep on.
    ///
    /// # Errors
    /// The budget cannot hold the buffers, the full context and a window of reads; nothing has changed then.
    pub fn set_memory(&mut self, memory: u64) -> Result<()> {
        let plan = self.plan.resized(memory)?;
        let (files, backend) = (&self.files, self.backend);
        let reopen = |regions: &[Region]| io::choose(files, regions, plan.depth(), backend);
        self.store.resize(plan.slots as u32, reopen)?;
        self.plan = plan;
        Ok(())
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        self.model.config()
    }

    /// Bytes of all weights that a sweep uses.
    pub fn weight_bytes(&self) -> u64 {
        self.model.matrices().sweep_bytes()
    }

    /// The weights in memory and on their way.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Where what happens is recorded; off until [`start_trace`](Self::start_trace).
    pub fn trace(&mut self) -> &mut Trace {
        self.store.trace()
    }

    /// Records reads, stalls and ops from now on, in [`Trace::BYTES`] of memory beside the budget.
    pub fn start_trace(&mut self) {
        *self.store.trace() = Trace::on();
    }

    /// Writes what was recorded as Chrome trace-event JSON.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_trace(&mut self, path: &Path) -> Result<()> {
        let trace = std::mem::take(self.store.trace());
        let store = &self.store;
        let written = std::fs::File::create(path).and_then(|file| {
            let mut out = BufWriter::new(file);
            let name = |matrix: u32| store.matrices()[matrix as usize].name.clone();
            let gone = trace.write(&mut out, |tile| store.tile(tile).matrix, name)?;
            out.flush().map(|()| gone)
        });
        let gone = written.map_err(|e| Error::file(path, "write", &e))?;
        if gone > 0 {
            log::warn!(
                "{}: the first {gone} events are left out, only the newest had room",
                path.display()
            );
        }
        Ok(())
    }

    /// The device.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// The model file has no vocabulary.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(no_vocabulary)
    }

    /// The chat template.
    ///
    /// # Errors
    /// The model file has no vocabulary.
    pub fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(no_vocabulary)
    }

    /// Positions that a session has so far.
    pub fn session_len(&self, session: usize) -> usize {
        self.sessions[session].len()
    }

    /// Forgets a session's conversation, and remembers for later runs what was learnt of the files meanwhile.
    pub fn clear(&mut self, session: usize) {
        self.sessions[session].clear(&mut self.store);
        self.store.save_checksums();
    }

    /// Runs one sweep over `rows`, at most as many as the plan's limits; adds to `spent` what it took.
    pub fn sweep(&mut self, rows: &[Row], spent: &mut Spent) -> Result<()> {
        for row in rows {
            if row.token as usize >= self.config().vocab {
                return Err(Error::new(
                    Kind::Usage,
                    format!(
                        "token {} is not in the vocabulary of {}",
                        row.token,
                        self.config().vocab
                    ),
                    "use the tokenizer of this model",
                ));
            }
        }
        let before: Counters = self.store.counters();
        let start = Instant::now();
        self.model
            .sweep(rows, &mut self.sessions, &mut self.store, &self.cpu)?;
        let after = self.store.counters();
        spent.rows += rows.len() as u64;
        spent.sweeps += 1;
        spent.time += start.elapsed();
        spent.stalled += after.stalled - before.stalled;
        spent.read_bytes += after.read_bytes - before.read_bytes;
        Ok(())
    }

    /// Adds `tokens` to a session in as few sweeps as the batch allows; the last one's logits are there afterwards.
    ///
    /// `each` is called after every sweep with the tokens done so far; if it returns false, the rest is left out and
    /// so is the answer true.
    pub fn prefill(
        &mut self,
        session: usize,
        tokens: &[u32],
        spent: &mut Spent,
        mut each: impl FnMut(usize) -> bool,
    ) -> Result<bool> {
        let mut done = 0;
        for chunk in tokens.chunks(self.plan.limits.rows) {
            let mut batch = std::mem::take(&mut self.batch);
            batch.clear();
            batch.extend(chunk.iter().map(|&token| Row {
                session,
                token,
                logits: false,
            }));
            done += chunk.len();
            if let Some(last) = batch.last_mut() {
                last.logits = done == tokens.len();
            }
            let swept = self.sweep(&batch, spent);
            self.batch = batch;
            swept?;
            if !each(done) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Adds one token to a session.
    pub fn decode(&mut self, session: usize, token: u32, spent: &mut Spent) -> Result<()> {
        self.sweep(
            &[Row {
                session,
                token,
                logits: true,
            }],
            spent,
        )
    }

    /// The logits of the `index`-th row of the last sweep that wanted them; a sampler may change them.
    pub fn logits(&mut self, index: usize) -> &mut [f32] {
        self.model.logits(index)
    }
}

fn no_vocabulary() -> Error {
    Error::new(
        Kind::Unsupported,
        "the model file has no vocabulary",
        "give token ids where the command takes them, or use a model file with a tokenizer",
    )
}
