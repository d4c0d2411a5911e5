//! A model comes to an engine in four steps, of which only the short ones hold up the sweeps of the others.
//!
//! | step | where | what |
//! |---|---|---|
//! | [`Opening::read`] | any thread | metadata, tokenizer, chat template, files |
//! | [`Engine::reserve`] | between sweeps | the pool gives up what the model takes for itself |
//! | [`Reserved::build`] | any thread | buffers, vectors, checksums, the cut into tiles |
//! | [`Engine::admit`] | between sweeps | its tiles and sessions join those of the others |

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::plan::Plan;
use super::pool::{self, Pool};
use super::{Engine, Hosted, Loaded, ModelId, ModelOptions, Options, Role};
use crate::arena::Reservation;
use crate::device::cpu::Precision;
use crate::device::{Device, Placement};
use crate::error::{Error, Kind, Result};
use crate::format::tile;
use crate::io::{self, Access, Files, Identity};
use crate::model::forward::Model;
use crate::model::kv::Session;
use crate::store::integrity::Integrity;
use crate::store::{Weights, sidecar};
use crate::text::{ChatTemplate, Tokenizer};

/// A model file, read and found sound, before it has any memory of an engine.
pub struct Opening {
    pub(super) loaded: Loaded,
    template: Option<ChatTemplate>,
    pub(super) files: Arc<Files>,
    pub(super) wishes: ModelOptions,
    drafter: Option<Box<Opening>>,
}

/// A model that an engine has made room for.
pub struct Reserved {
    opening: Opening,
    plan: Plan,
    verify: bool,
    cache: Option<PathBuf>,
    drafter: Option<Box<Reserved>>,
}

/// A model with all that is its own, but none of its weights.
pub struct Built {
    model: Model,
    weights: Weights,
    tokenizer: Option<Arc<Tokenizer>>,
    template: Option<Arc<ChatTemplate>>,
    sessions: Vec<Session>,
    plan: Plan,
    files: Arc<Files>,
    drafter: Option<Box<Built>>,
}

impl Opening {
    /// Reads a model file (any file of a split one), and that of its draft model if one is wished for.
    ///
    /// # Errors
    /// One is not a sound GGUF of a supported model, or their vocabularies differ.
    pub fn read(path: &Path, wishes: &ModelOptions) -> Result<Opening> {
        let loaded = Loaded::read(path)?;
        let drafter = match loaded.read_drafter(wishes)? {
            Some((drafter, wishes)) => Some(Box::new(Opening::new(drafter, &wishes)?)),
            None => None,
        };
        Ok(Opening {
            drafter,
            ..Opening::new(loaded, wishes)?
        })
    }

    /// The model, and its draft model if it has one.
    pub(super) fn all(&self) -> impl Iterator<Item = &Opening> + Clone {
        std::iter::once(self).chain(self.drafter.as_deref())
    }

    /// Opens the files of a model that was read. It has no draft model then.
    ///
    /// # Errors
    /// They are not the ones any more that were read.
    pub fn new(loaded: Loaded, wishes: &ModelOptions) -> Result<Opening> {
        let template = match &loaded.tokenizer {
            Some(tokenizer) => Some(ChatTemplate::from_gguf(&loaded.gguf, tokenizer)?),
            None => None,
        };
        Ok(Opening {
            files: open_files(&loaded)?,
            loaded,
            template,
            wishes: wishes.clone(),
            drafter: None,
        })
    }

    /// Whether the device computes what the model is to be computed with.
    pub(super) fn check_device(&self, device: &Device) -> Result<()> {
        let activations = self.wishes.activations;
        match device {
            Device::Cuda(_) if activations != Precision::Bits12 => Err(Error::new(
                Kind::Unsupported,
                format!("the GPU's kernels do not round activations to {activations} bits"),
                "leave activations at 12 bits, or give --device cpu",
            )),
            _ => Ok(()),
        }
    }

    /// What is left to do once there is room for the model: the next of `plans` is its own, then comes its draft model's.
    pub(super) fn planned(
        mut self,
        plans: &mut impl Iterator<Item = Plan>,
        options: &Options,
    ) -> Reserved {
        let plan = plans.next().expect("a plan for each model");
        let drafter = self.drafter.take();
        Reserved {
            drafter: drafter.map(|drafter| Box::new(drafter.planned(plans, options))),
            opening: self,
            plan,
            verify: options.verify,
            cache: options.cache.clone().or_else(sidecar::cache_folder),
        }
    }
}

/// Opens the files of a model for reads of its weights.
///
/// # Errors
/// The system refuses, or another file has the place of one meanwhile, or one was written to.
fn open_files(loaded: &Loaded) -> Result<Arc<Files>> {
    let files = io::open_model(loaded.gguf.files(), Access::Direct)?;
    for ((_, file), read) in files.iter().zip(loaded.gguf.opened()) {
        if file.identity() != Identity::of(&read.metadata) {
            return Err(Error::new(
                Kind::Io,
                format!("{} changed while it was loaded", file.path().display()),
                "load it again",
            ));
        }
    }
    Ok(Arc::new(files))
}

impl Reserved {
    /// Takes the model's own memory, and reads what stays there; the same for its draft model.
    ///
    /// # Errors
    /// The system refuses memory, or the file is not what it was.
    pub fn build(self) -> Result<Built> {
        let Reserved {
            opening,
            plan,
            verify,
            cache,
            drafter,
        } = self;
        let Loaded {
            gguf,
            config,
            matrices,
            tokenizer,
        } = opening.loaded;
        let list = matrices.matrices.clone();
        let layers = config.layers.len();
        let mut arena = Reservation::new(plan.fixed_bytes)?;
        let model = Model::new(
            &gguf,
            config,
            matrices,
            plan.limits,
            plan.layout,
            plan.tiles.len(),
            &mut arena,
        )?;
        let paths = gguf.files().to_vec();
        if let Some(beyond) = model.config().beyond(plan.context) {
            log::warn!("{}: {beyond}", paths[0].display());
        }
        // Nothing looks at the metadata from here on, and its mapping is memory beside the budget.
        drop(gguf);
        let (tiles, ranges) = tile::cut(&list, plan.slot_bytes);
        let integrity = Integrity::new(
            Arc::clone(&opening.files),
            &list,
            &tiles,
            model.vectors_seen(),
            verify,
            cache.as_deref(),
        )?;
        // Pages are planned for sweeps of so many rows.
        let rewinds = opening.wishes.rewinds.min(plan.limits.rows);
        let sessions = (0..opening.wishes.sessions)
            .map(|_| Session::new(layers, plan.layout, plan.context).keeping(rewinds))
            .collect();
        Ok(Built {
            model,
            weights: Weights {
                matrices: list,
                tiles,
                ranges,
                paths,
                integrity,
                resident: opening.wishes.resident,
            },
            tokenizer: tokenizer.map(Arc::new),
            template: opening.template.map(Arc::new),
            sessions,
            plan,
            files: opening.files,
            drafter: match drafter {
                Some(drafter) => Some(Box::new(drafter.build()?)),
                None => None,
            },
        })
    }
}

impl Engine {
    /// Loads one more model (and its draft model), between sweeps, all steps one after the other. The sessions of the others go on; the pool is
    /// smaller by what the new model takes for itself.
    ///
    /// # Errors
    /// As of the steps. Everything is as it was then.
    pub fn load(&mut self, path: &Path, wishes: &ModelOptions) -> Result<ModelId> {
        let opening = Opening::read(path, wishes)?;
        let built = self.reserve(opening)?.build();
        self.admit(built)
    }

    /// Makes room for a model, between sweeps. Until it is [admitted](Self::admit) no other model comes or goes, and the
    /// budget stays as it is.
    ///
    /// # Errors
    /// The budget cannot hold the minimum, the arena's slots are too small for the model, the system refuses, or another
    /// model is being loaded. Everything is as it was then.
    pub fn reserve(&mut self, opening: Opening) -> Result<Reserved> {
        let (pool, plans) = self.pool_with(&opening)?;
        let new = opening.all().map(|opening| &opening.files);
        let files = Arc::new(Files::together(self.opened().chain(new)));
        let before = (self.pool, Arc::clone(&self.files));
        self.change_pool(pool, files)?;
        self.before = Some(before);
        Ok(opening.planned(&mut plans.into_iter(), &self.options))
    }

    /// The pool that [`reserve`](Self::reserve) makes, and the plans in it of the model and its draft model.
    pub(super) fn pool_with(&self, opening: &Opening) -> Result<(Pool, Vec<Plan>)> {
        self.check_nothing_is_reserved()?;
        opening.check_device(&self.device)?;
        let gpu = match (&self.device, &self.pool.gpu) {
            (Device::Cpu(_), _) => None,
            (Device::Cuda(_), None) => Some(Placement::Direct {
                context: self.pool.gpu_context,
            }),
            (Device::Cuda(_), Some(gpu)) => Some(Placement::Staged { memory: gpu.memory }),
        };
        let slots = self.pool.gpu.map_or(self.pool.slots, |gpu| gpu.slots);
        let pages_max = slots / 2 / (self.hosted.len() + opening.all().count());
        let request = |opening: &Opening| {
            let loaded = &opening.loaded;
            loaded.request(&opening.wishes, self.pool.memory, &self.options, gpu)
        };
        pool::with_most_rows(&request(opening), |rows_most| {
            let plan = |opening: &Opening| {
                let (loaded, request) = (&opening.loaded, request(opening));
                Plan::in_slots(
                    &loaded.config,
                    &loaded.matrices,
                    &request,
                    rows_most,
                    (self.pool.slot_bytes, pages_max),
                )
            };
            let plans: Vec<Plan> = opening.all().map(plan).collect::<Result<_>>()?;
            let others = self.hosted.iter().map(|hosted| &hosted.plan);
            let pool = self.pool.shared_by(others.chain(&plans))?;
            Ok((pool, plans))
        })
    }

    /// Takes in the model that room was made for, between sweeps. If it could not be built, the others have the room back
    /// (if any was made).
    ///
    /// # Errors
    /// Why it could not be built.
    pub fn admit(&mut self, built: Result<Built>) -> Result<ModelId> {
        let before = self.before.take();
        match (built, before) {
            (Ok(built), _) => Ok(self.take_in(built)),
            (Err(error), Some((pool, files))) => {
                self.change_pool(pool, files)?;
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    /// Takes a model in with its draft model, whose files the store's reads know already and for whose own parts there is
    /// room.
    pub(super) fn take_in(&mut self, mut built: Built) -> ModelId {
        let drafter = built.drafter.take();
        let place = self.hosted.len();
        let id = self.host(built, Role::Answers { drafter: None });
        self.demand.add();
        if let Some(drafter) = drafter {
            let drafter = self.host(*drafter, Role::Drafts { of: id });
            self.demand.add_drafter(place);
            self.hosted[place].role = Role::Answers {
                drafter: Some(drafter),
            };
        }
        self.settle();
        id
    }

    fn host(&mut self, built: Built, role: Role) -> ModelId {
        let id = self.store.add(built.weights);
        self.hosted.push(Hosted {
            id,
            role,
            tokenizer: built.tokenizer,
            template: built.template,
            model: built.model,
            sessions: built.sessions,
            plan: built.plan,
            files: built.files,
        });
        id
    }

    pub(super) fn check_nothing_is_reserved(&self) -> Result<()> {
        match self.before {
            None => Ok(()),
            Some(_) => Err(Error::new(
                Kind::Busy,
                "a model is being loaded",
                "try again when it is there",
            )),
        }
    }
}
