//! A model file as read, and the options it is opened with: all that is known before memory is taken.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::drafter;
use super::plan::{self, Plan, Request};
use super::pool::{self, Pool, Subject};
use crate::board::detect::memory_available;
use crate::device::cpu::THREADS_MAX;
use crate::device::cpu::{Cpu, Isa, Precision};
use crate::device::cuda::driver::Driver;
use crate::device::{DeviceChoice, Placement};
use crate::error::{Error, Kind, Result};
use crate::format::gguf::Gguf;
use crate::io::Backend;
use crate::io::advice::Advice;
use crate::model::config::Config;
use crate::model::weights::MatrixPlan;
use crate::store::sidecar;
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
    /// Rows that want logits in one sweep, drafts aside.
    pub logits_rows: usize,
    /// Rows in a sweep at most that the scheduler computes for tokens that are only likely to come; chosen if none.
    pub drafts: Option<usize>,
    /// How finely activations are rounded before they are multiplied with weights. The tokens depend on it.
    pub activations: Precision,
    /// Whether all weights have to stay in memory.
    pub resident: bool,
    /// Positions that a session can be taken back by at any time without being computed again.
    pub rewinds: usize,
    /// A smaller model of the same vocabulary that says what is likely to come.
    pub draft_model: Option<PathBuf>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions {
            context: None,
            sessions: 1,
            rows: None,
            logits_rows: 1,
            drafts: None,
            activations: Precision::default(),
            resident: false,
            rewinds: 0,
            draft_model: None,
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
    /// The budget of the memory of a GPU that has its own; what is free there, less a margin, if none.
    pub gpu_memory: Option<u64>,
    /// What the model gets.
    pub model: ModelOptions,
    /// What computes.
    pub device: DeviceChoice,
    /// Threads that compute; all that this process may use if none.
    pub threads: Option<usize>,
    /// Bytes of the budget that are for the clients of a daemon: their connections and requests.
    pub clients_bytes: u64,
    /// The instruction set; the best there is if none.
    pub isa: Option<Isa>,
    /// How to read; the best there is if none.
    pub backend: Option<Backend>,
    /// Whether tiles must agree with their checksums each time they are read.
    pub verify: bool,
    /// The folder that keeps checksums and what was measured of disks between runs; the user's cache folder if none.
    pub cache: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            memory: None,
            memory_most: None,
            gpu_memory: None,
            model: ModelOptions::default(),
            device: DeviceChoice::default(),
            threads: None,
            clients_bytes: 0,
            isa: None,
            backend: None,
            verify: true,
            cache: None,
        }
    }
}

impl Options {
    /// The most to take where nobody gave a budget: as told, or four fifths of what is free (or of a cautious guess).
    fn memory_most(&self, placement: Option<Placement>) -> u64 {
        // What the GPU's driver has taken is in the budget too.
        let taken = placement.map_or(0, Placement::context_bytes);
        let free = || memory_available(Path::new("/")).unwrap_or(1 << 30) + taken;
        self.memory_most.unwrap_or_else(|| free() / 5 * 4)
    }
}

/// What is left of a GPU's free memory where nobody gave a budget, for the driver and for others: so much, and at least
/// this part of it.
const GPU_MARGIN_BYTES: u64 = 256 << 20;
const GPU_MARGIN_SHARE: u64 = 16;

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

impl Options {
    /// Where a GPU would compute, as far as that is known without asking one.
    pub fn placement(&self) -> Option<Placement> {
        match (self.device, self.gpu_memory) {
            (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, None) => None,
            (_, Some(memory)) => Some(Placement::Staged { memory }),
            (DeviceChoice::Cuda, None) => Some(Placement::Direct { context: 0 }),
        }
    }

    /// Where this GPU computes.
    pub(super) fn placement_on(&self, driver: &dyn Driver) -> Result<Placement> {
        let facts = driver.facts();
        if facts.integrated {
            if self.gpu_memory.is_some() {
                log::warn!(
                    "{} has no memory of its own: --memory bounds all, and --gpu-memory nothing",
                    facts.name
                );
            }
            return Ok(Placement::Direct {
                context: facts.context_bytes,
            });
        }
        let memory = match self.gpu_memory {
            Some(memory) => memory,
            None => {
                let free = driver.free_bytes()?;
                free.saturating_sub(GPU_MARGIN_BYTES.max(free / GPU_MARGIN_SHARE))
            }
        };
        Ok(Placement::Staged { memory })
    }
}

impl Loaded {
    /// Reads the metadata of a GGUF.
    pub fn read(path: &Path) -> Result<Loaded> {
        let gguf = Gguf::open(path)?;
        let config = Config::read(&gguf)?;
        let matrices = MatrixPlan::new(&gguf, &config)?;
        matrices.check_complete(&gguf, &config)?;
        for matrix in &matrices.matrices {
            Cpu::check_matrix(matrix.qtype, matrix.cols)?;
        }
        let tokens = gguf.array("tokenizer.ggml.tokens")?;
        if let Some(tokens) = tokens
            && tokens.len() > config.vocab
        {
            let what = format!(
                "the vocabulary has {} tokens, but there are embeddings of {} only",
                tokens.len(),
                config.vocab
            );
            let remedy = "convert or download the model again";
            return Err(Error::new(Kind::Format, what, remedy));
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

    /// Reads the draft model that is wished for beside this one, if any, and says what it gets.
    ///
    /// # Errors
    /// It is not a sound GGUF of a supported model, or its vocabulary is another one.
    pub fn read_drafter(&self, wishes: &ModelOptions) -> Result<Option<(Loaded, ModelOptions)>> {
        let path = wishes.draft_model.as_deref();
        path.map(|path| drafter::read(path, self, wishes))
            .transpose()
    }

    /// Divides a budget for this model alone.
    pub fn plan(&self, options: &Options) -> Result<Plan> {
        let memory = options.memory.unwrap_or(UNLIMITED);
        let request = self.request(&options.model, memory, options, options.placement());
        let plan = Plan::new(&self.config, &self.matrices, &request)?;
        if options.memory.is_some() {
            return Ok(plan);
        }
        // Nobody gave a budget: take what the model needs, and leave the rest to others.
        let memory = plan
            .total_bytes()
            .min(options.memory_most(options.placement()));
        Plan::new(&self.config, &self.matrices, &Request { memory, ..request })
    }

    /// What to plan for, in a budget of `memory`; `gpu` is where a GPU computes.
    pub(super) fn request(
        &self,
        wishes: &ModelOptions,
        memory: u64,
        options: &Options,
        gpu: Option<Placement>,
    ) -> Request {
        Request {
            memory,
            context: wishes.context,
            sessions: wishes.sessions,
            rows: wishes.rows,
            logits_rows: wishes.logits_rows,
            drafts: wishes.drafts,
            drafted: wishes.draft_model.is_some(),
            activations: wishes.activations,
            resident: wishes.resident,
            threads: threads(options),
            clients_bytes: options.clients_bytes,
            gpu,
            tokenizer_bytes: self.tokenizer.as_ref().map_or(0, Tokenizer::table_bytes),
            disk: self.disk_advice(options),
        }
    }

    /// What `bench --io` found for the disk that the model is on.
    fn disk_advice(&self, options: &Options) -> Option<Advice> {
        let cache = options.cache.clone().or_else(sidecar::cache_folder)?;
        let file = std::fs::metadata(self.gguf.files().first()?).ok()?;
        Advice::load(&cache, file.dev())
    }
}

/// Divides a budget for some models, and chooses the slots that suit them all.
///
/// # Errors
/// The budget cannot hold the minimum; the error says what the minimum is.
pub fn divide(
    models: &[&Loaded],
    wishes: &[&ModelOptions],
    options: &Options,
    gpu: Option<Placement>,
) -> Result<(Pool, Vec<Plan>)> {
    let within = |memory: u64| -> Result<(Pool, Vec<Plan>)> {
        let requests: Vec<Request> = models
            .iter()
            .zip(wishes)
            .map(|(model, wishes)| model.request(wishes, memory, options, gpu))
            .collect();
        let subjects: Vec<Subject> = models
            .iter()
            .zip(&requests)
            .map(|(model, request)| (&model.config, &model.matrices, request))
            .collect();
        pool::divide(&subjects)
    };
    if let Some(memory) = options.memory {
        return within(memory).map_err(|error| match (gpu, models) {
            // A plan for one model says itself what would do, and that of a GPU's own memory may be what is too little.
            (Some(Placement::Staged { .. }), _) | (_, [_]) => error,
            _ => {
                // What is made larger where there is more of it makes it more than the first error says.
                let enough = plan::least_mib(memory, |memory| within(memory).is_ok());
                let remedy =
                    format!("give --memory {enough}MiB or more, smaller contexts, or fewer models");
                Error::new(error.kind(), error.what(), remedy)
            }
        });
    }
    let (pool, plans) = within(UNLIMITED)?;
    within(pool.total_bytes(&plans).min(options.memory_most(gpu)))
}

/// A budget that leaves nothing to be desired.
const UNLIMITED: u64 = u64::MAX >> 1;

/// Threads that compute: as asked, or all that this process may use, as far as one pool can have them.
pub fn threads(options: &Options) -> usize {
    let usable = || std::thread::available_parallelism().map_or(1, usize::from);
    options.threads.unwrap_or_else(|| usable().min(THREADS_MAX))
}
