//! The models that an engine begins with, the pool that they share, and how they go. [`loading`](super::loading) tells how
//! others come.
//!
//! Each model takes what is its own out of the budget (vectors, buffers, logits, tables), and the pool has so many slots
//! fewer; its weights then share the pool with those of the others. Slots keep the size that
//! was chosen for the models of the start.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::demand::Demand;
use super::loading::Opening;
use super::plan::{Line, Plan};
use super::pool::Pool;
use super::{Engine, Hosted, Loaded, ModelId, ModelOptions, Options, Role, Row, threads};
use crate::arena::Reservation;
use crate::device::Device;
use crate::device::cpu::{Cpu, Isa};
use crate::device::cuda::driver::Driver;
use crate::device::cuda::{self, Cuda, Sizes};
use crate::error::Result;
use crate::io::{self, Files, Io, Region};
use crate::model::kv;
use crate::store::{Moved, Store};

/// What a model or the pool has of the budget, for listings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Whose it is; none for what all models share.
    pub model: Option<ModelId>,
    /// Whether it is this model's draft model that has it.
    pub drafter: bool,
    /// Line by line.
    pub lines: Vec<Line>,
    /// Of the budget of a GPU's own memory, if one computes there.
    pub gpu_lines: Vec<Line>,
}

impl Engine {
    /// Opens an engine with one model (any file of a split one).
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub fn open(path: &Path, options: &Options) -> Result<Engine> {
        Engine::new(&[(path.to_owned(), options.model.clone())], options)
    }

    /// Opens an engine with some models. Slots are chosen for these; others can be loaded later.
    ///
    /// # Errors
    /// A file is not a sound GGUF of a supported model, the budget cannot hold the minimum, or the system refuses
    /// memory or files.
    pub fn new(models: &[(PathBuf, ModelOptions)], options: &Options) -> Result<Engine> {
        Engine::new_on(models, options, options.device.open()?)
    }

    /// As [`new`](Self::new), on a GPU whose driver is open already, or on the CPU if there is none.
    ///
    /// # Errors
    /// As of [`new`](Self::new), or the driver refuses.
    pub fn new_on(
        models: &[(PathBuf, ModelOptions)],
        options: &Options,
        gpu: Option<Arc<dyn Driver>>,
    ) -> Result<Engine> {
        let openings: Vec<Opening> = models
            .iter()
            .map(|(path, wishes)| Opening::read(path, wishes))
            .collect::<Result<_>>()?;
        let all: Vec<&Opening> = openings.iter().flat_map(Opening::all).collect();
        let loaded: Vec<&Loaded> = all.iter().map(|opening| &opening.loaded).collect();
        let wishes: Vec<&ModelOptions> = all.iter().map(|opening| &opening.wishes).collect();
        let placement = match &gpu {
            Some(driver) => Some(options.placement_on(driver.as_ref())?),
            None => None,
        };
        let (pool, plans) = super::loaded::divide(&loaded, &wishes, options, placement)?;
        let isa = options.isa.unwrap_or_else(Isa::detect);
        let mut device = match gpu {
            Some(driver) => Device::Cuda(Box::new(Cuda::new(driver)?)),
            None => Device::Cpu(Cpu::new(threads(options), isa, pool.row_bytes_max())?),
        };

        let opened = all.iter().map(|opening| &opening.files);
        let files = Arc::new(Files::together(opened));
        let slots = Reservation::new(pool.reserved_bytes())?.seal(pool.slot_bytes);
        let in_use = pool.slots as u32;
        let regions: Vec<Region> = slots
            .regions(in_use)
            .map(|(start, len)| Region { start, len })
            .collect();
        let (io, backend) = io::choose(&files, &regions, pool.depth(), options.backend)?;
        let mut store = Store::empty(slots, in_use, io, pool.window);
        store.set_plain(!device.packs());
        match (&pool.gpu, &mut device) {
            (Some(gpu), Device::Cuda(cuda)) => {
                let (slots, copies) = cuda.take_slots(pool.slot_bytes, gpu.slots as u32)?;
                store.set_device(slots, gpu.window, copies);
            }
            (None, Device::Cuda(cuda)) => store.set_fence(cuda.fence()),
            (_, Device::Cpu(_)) => {}
        }
        let mut engine = Engine {
            hosted: Vec::new(),
            device,
            store,
            pool,
            demand: Demand::default(),
            next: None,
            batch: Vec::new(),
            files,
            // Whatever comes later is read in the same way: what fails then may work a moment later.
            options: Options {
                backend: Some(backend),
                ..options.clone()
            },
            pace: None,
            before: None,
        };
        let mut plans = plans.into_iter();
        for opening in openings {
            opening.check_device(&engine.device)?;
            let built = opening.planned(&mut plans, options).build()?;
            engine.take_in(built);
        }
        engine.device.finish(&mut || ())?;
        Ok(engine)
    }

    /// Unloads a model with its draft model, between sweeps: its sessions end, and all its memory goes to the others. A
    /// trace begins anew.
    ///
    /// # Errors
    /// The system refuses, or another model is being loaded; the model is still there then, but its conversations and its
    /// draft model may not be.
    pub fn unload(&mut self, model: ModelId) -> Result<()> {
        self.check_nothing_is_reserved()?;
        let drafter = self.drafter(model);
        // The pools without them have no room for their conversations.
        for model in [drafter, Some(model)].into_iter().flatten() {
            for session in 0..self.sessions(model) {
                self.forget(model, session);
            }
        }
        if let Some(drafter) = drafter {
            self.remove(drafter)?;
            let place = self.place(model);
            self.hosted[place].role = Role::Answers { drafter: None };
        }
        self.remove(model)
    }

    /// Takes a model without conversations out.
    fn remove(&mut self, model: ModelId) -> Result<()> {
        let place = self.place(model);
        let others = || {
            let others = self.hosted.iter().enumerate();
            others
                .filter(move |(at, _)| *at != place)
                .map(|(_, hosted)| hosted)
        };
        let pool = match others().next() {
            Some(_) => self.pool.shared_by(others().map(|hosted| &hosted.plan))?,
            // The last one leaves an empty pool behind, which others may come to.
            None => self.pool,
        };
        let files = Arc::new(Files::together(others().map(|hosted| &hosted.files)));
        self.store.save_checksums();
        let io = self.open_io(&files, &pool)?;
        let size = (pool.slots as u32, pool.window);
        let moved = self.store.remove(model, size, io)?;
        // Tiles and matrices have other numbers now.
        self.store.trace().clear();
        self.demand.remove(place);
        // A GPU sees its memory until `settle`.
        let gone = self.hosted.remove(place);
        self.follow(&moved);
        (self.pool, self.files) = (pool, files);
        self.settle();
        drop(gone);
        Ok(())
    }

    /// Changes the memory budget between sweeps, down or up to what the engine was opened with.
    ///
    /// Conversations go on, and their contexts can still grow to what was planned. Fewer or more weights stay in
    /// memory from the next sweep on.
    ///
    /// # Errors
    /// The budget cannot hold the buffers, the planned contexts and a window of reads, or the conversations hold more than
    /// was planned, or it is larger than that of the start, or a model is being loaded; nothing has changed then.
    pub fn set_memory(&mut self, memory: u64) -> Result<()> {
        let pool = self.pool_within(memory)?;
        self.change_pool(pool, Arc::clone(&self.files))
    }

    /// The pool that [`set_memory`](Self::set_memory) makes.
    pub(super) fn pool_within(&self, memory: u64) -> Result<Pool> {
        self.check_nothing_is_reserved()?;
        let pool = self.pool.within(memory)?;
        pool.shared_by(self.hosted.iter().map(|hosted| &hosted.plan))
    }

    /// Whether the conversations of the moment hold more pages than such a pool could have beside its window.
    pub(super) fn crowds(&self, pool: &Pool) -> bool {
        self.store.pages_over(pool.slots as u32, pool.window) > 0
    }

    /// The pool that all models share.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// How the whole budget is divided: what each model has for itself, then what all share.
    pub fn budget(&self) -> Vec<Share> {
        let plans: Vec<&Plan> = self.hosted.iter().map(|hosted| &hosted.plan).collect();
        let owner = |hosted: &Hosted| match hosted.role {
            Role::Answers { .. } => (Some(hosted.id), false),
            Role::Drafts { of } => (Some(of), true),
        };
        let owners = self.hosted.iter().map(owner).chain([(None, false)]);
        let shares = self.pool.shares(&plans).into_iter().zip(owners);
        let share = |([lines, gpu_lines], (model, drafter)): ([Vec<Line>; 2], _)| Share {
            model,
            drafter,
            lines,
            gpu_lines,
        };
        shares.map(share).collect()
    }

    /// The files of each model.
    pub(super) fn opened(&self) -> impl Iterator<Item = &Arc<Files>> {
        self.hosted.iter().map(|hosted| &hosted.files)
    }

    /// Changes the slots in use, and the files that reads know; nothing if it fails.
    pub(super) fn change_pool(&mut self, pool: Pool, files: Arc<Files>) -> Result<()> {
        let same = Arc::ptr_eq(&files, &self.files) && pool.depth() == self.pool.depth();
        let io = match same {
            true => None,
            false => Some(self.open_io(&files, &pool)?),
        };
        let moved = self.store.resize(pool.slots as u32, pool.window, io)?;
        self.follow(&moved);
        if let Some(gpu) = &pool.gpu {
            self.store.set_device_window(gpu.window);
        }
        (self.pool, self.files) = (pool, files);
        self.settle();
        Ok(())
    }

    /// Another way to read, for these files; the store registers its memory there.
    fn open_io(&self, files: &Arc<Files>, pool: &Pool) -> Result<Box<dyn Io>> {
        let (io, _) = io::choose(files, &[], pool.depth(), self.options.backend)?;
        Ok(io)
    }

    /// Has all sessions find their pages where these lie now.
    fn follow(&mut self, moved: &[Moved]) {
        for hosted in &mut self.hosted {
            kv::follow(&mut hosted.sessions, moved, &self.store);
        }
    }

    /// Sees to what depends on all models together.
    pub(super) fn settle(&mut self) {
        let pool = self.pool;
        for hosted in &mut self.hosted {
            hosted.plan.move_to(&pool);
        }
        match &mut self.device {
            Device::Cpu(cpu) => cpu.set_row_bytes_max(pool.row_bytes_max()),
            Device::Cuda(gpu) => {
                let sizes = self.hosted.iter().filter_map(|hosted| hosted.plan.gpu);
                let own = self.hosted.iter().map(|hosted| hosted.model.memory());
                let slots = self.store.pieces(cuda::PIECE_BYTES_MAX);
                // SAFETY: the memory is the models' and the store's, which call this whenever it changes, and goes
                // after the device, or after the next call.
                unsafe {
                    gpu.fit(
                        sizes.fold(Sizes::default(), Sizes::max),
                        own.collect(),
                        slots,
                    )
                };
            }
        }
        let rows = self.hosted.iter().map(|hosted| hosted.plan.limits.rows);
        self.batch = Vec::<Row>::with_capacity(rows.max().unwrap_or(0));
    }
}
