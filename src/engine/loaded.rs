//! A model file as read, and the options it is opened with: all that is known before memory is taken.

use std::path::{Path, PathBuf};

use super::plan::{Plan, Request};
use crate::board::detect::memory_available;
use crate::device::cpu::{Cpu, Isa};
use crate::error::Result;
use crate::format::gguf::Gguf;
use crate::io::Backend;
use crate::model::config::Config;
use crate::model::weights::MatrixPlan;
use crate::text::Tokenizer;

/// What one model gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelOptions {
    /// Positions of a session; chosen if none.
    pub context: Option<usize>,
    /// Sessions at a time.
    pub sessions: usize,
    /// The most rows in a sweep; chosen if none.
    pub rows: Option<usize>,
    /// Rows that want logits in one sweep.
    pub logits_rows: usize,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions {
            context: None,
            sessions: 1,
            rows: None,
            logits_rows: 1,
        }
    }
}

/// How to open an engine.
#[derive(Debug, Clone)]
pub struct Options {
    /// The memory budget; all the model needs, within what is free, if none.
    pub memory: Option<u64>,
    /// The most to take where `memory` is none; most of what is free if none.
    pub memory_most: Option<u64>,
    /// What the model gets.
    pub model: ModelOptions,
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
            memory_most: None,
            model: ModelOptions::default(),
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
            context: options.model.context,
            sessions: options.model.sessions,
            rows: options.model.rows,
            logits_rows: options.model.logits_rows,
            threads: threads(options),
            tokenizer_bytes: self.tokenizer.as_ref().map_or(0, Tokenizer::table_bytes),
        };
        let unlimited = options.memory.is_none();
        let plan = Plan::new(&self.config, &self.matrices, &request)?;
        if !unlimited {
            return Ok(plan);
        }
        // Nobody gave a budget: take what the model needs, and leave the rest to others.
        let most = options.memory_most.unwrap_or_else(memory_most);
        let memory = plan.total_bytes().min(most);
        Plan::new(&self.config, &self.matrices, &Request { memory, ..request })
    }
}

/// Threads that compute: as asked, or all that this process may use.
pub fn threads(options: &Options) -> usize {
    options
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Four fifths of what is free, or of a cautious guess.
fn memory_most() -> u64 {
    memory_available(Path::new("/")).unwrap_or(1 << 30) / 5 * 4
}
