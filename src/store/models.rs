//! The models whose tiles are in the store: they come and go between sweeps.

use std::ops::Range;
use std::path::PathBuf;

use super::integrity::Integrity;
use super::order::Order;
use super::staging::Place;
use super::{Moved, Phase, Store, TileState, tile_uses};
use crate::error::Result;
use crate::format::tile::{Matrix, Tile};
use crate::io::Io;
use crate::residency::Rate;

/// Names a model for as long as the process runs; never given to another one later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(u32);

impl ModelId {
    /// The model that came first.
    pub const FIRST: ModelId = ModelId(0);
}

/// The weights of one model, as they come to a store.
pub struct Weights {
    /// Its matrices in the order of the sweep.
    pub matrices: Vec<Matrix>,
    /// What [`cut`](crate::format::tile::cut) made of them.
    pub tiles: Vec<Tile>,
    /// The tiles of each matrix.
    pub ranges: Vec<Range<u32>>,
    /// Its files, for error messages.
    pub paths: Vec<PathBuf>,
    /// What is known of its tiles' contents.
    pub integrity: Integrity,
    /// Whether all its tiles have to stay in memory.
    pub resident: bool,
}

/// A model in the store: which part of each table is its own.
pub(super) struct Member {
    pub(super) id: ModelId,
    pub(super) tiles: Range<u32>,
    pub(super) matrices: Range<u32>,
    pub(super) files: Range<u16>,
    pub(super) integrity: Integrity,
    /// Whether all its tiles have to stay in memory.
    resident: bool,
    /// Reads of its files that finished.
    pub(super) reads: u64,
    /// As many when its files were last looked at.
    pub(super) reads_looked_at: u64,
}

impl Store {
    /// Adds a model behind those that there are. It is never swept so far, as the policy sees it.
    ///
    /// The store's [`Io`] must know the model's files already, behind those of the other models
    /// ([`resize`](Self::resize) replaces it).
    pub fn add(&mut self, weights: Weights) -> ModelId {
        let rate = 0.0;
        self.push(weights, rate)
    }

    pub(super) fn push(&mut self, weights: Weights, rate: f32) -> ModelId {
        assert!(self.acquired.is_empty() && self.waiting == 0);
        let Weights {
            matrices,
            tiles,
            ranges,
            paths,
            integrity,
            resident,
        } = weights;
        let id = ModelId(self.models_ever);
        self.models_ever += 1;
        let (tile, matrix) = (self.tiles.len() as u32, self.matrices.len() as u32);
        let file = self.paths.len() as u16;
        let uses = tile_uses(&matrices, &tiles, resident);
        self.residency.add(&uses, rate);
        self.models.push(Member {
            id,
            tiles: tile..tile + tiles.len() as u32,
            matrices: matrix..matrix + matrices.len() as u32,
            files: file..file + paths.len() as u16,
            integrity,
            resident,
            reads: 0,
            reads_looked_at: 0,
        });
        self.tiles.extend(tiles.into_iter().map(|t| Tile {
            matrix: t.matrix + matrix,
            file: t.file + file,
            ..t
        }));
        self.ranges
            .extend(ranges.iter().map(|r| r.start + tile..r.end + tile));
        self.matrices.extend(matrices.into_iter().map(|m| Matrix {
            file: m.file + file,
            ..m
        }));
        self.paths.extend(paths);
        self.states.resize(self.tiles.len(), TileState::ABSENT);
        if let Some(staging) = &mut self.staging {
            staging.places.resize(self.tiles.len(), Place::ABSENT);
        }
        self.acquired.reserve(self.tiles.len());
        self.set_order();
        id
    }

    /// Removes a model between sweeps, and changes the slots in use and the window as [`resize`](Self::resize) does.
    ///
    /// Its pages must be free already, and `io` knows the files of the other models only.
    ///
    /// # Errors
    /// As of `resize`; the model is still there then.
    pub fn remove(
        &mut self,
        model: ModelId,
        (slots, window): (u32, u32),
        io: Box<dyn Io>,
    ) -> Result<Vec<Moved>> {
        let place = self.place(model);
        self.drain()?;
        self.give_up_all(place);
        let moved = self.resize(slots, window, Some(io))?;
        let gone = self.models.remove(place);
        let (tiles, matrices) = (gone.tiles.len() as u32, gone.matrices.len() as u32);
        let files = gone.files.len() as u16;
        let of = |range: &Range<u32>| range.start as usize..range.end as usize;
        self.tiles.drain(of(&gone.tiles));
        self.states.drain(of(&gone.tiles));
        if let Some(staging) = &mut self.staging {
            staging.places.drain(of(&gone.tiles));
        }
        self.matrices.drain(of(&gone.matrices));
        self.ranges.drain(of(&gone.matrices));
        let paths = usize::from(gone.files.start)..usize::from(gone.files.end);
        self.paths.drain(paths);
        for tile in &mut self.tiles[gone.tiles.start as usize..] {
            (tile.matrix, tile.file) = (tile.matrix - matrices, tile.file - files);
        }
        for matrix in &mut self.matrices[gone.matrices.start as usize..] {
            matrix.file -= files;
        }
        for range in &mut self.ranges[gone.matrices.start as usize..] {
            *range = range.start - tiles..range.end - tiles;
        }
        for member in &mut self.models[place..] {
            member.tiles = member.tiles.start - tiles..member.tiles.end - tiles;
            member.matrices = member.matrices.start - matrices..member.matrices.end - matrices;
            member.files = member.files.start - files..member.files.end - files;
        }
        self.residency.remove(place);
        self.current = 0..0;
        self.sweeping = 0;
        self.set_order();
        self.restart_ahead();
        Ok(moved)
    }

    /// Begins a sweep of a model: calls that take the number of a matrix mean this model's from now on.
    ///
    /// `next` is the model that is swept then: its tiles are read ahead when those of this sweep are in memory. If
    /// nobody knows, it is taken to be the same model.
    pub fn begin_sweep(&mut self, model: ModelId, next: Option<ModelId>) {
        self.sweeping = self.place(model);
        let next = next.map_or(self.sweeping, |next| self.place(next));
        self.set_models(next);
    }

    /// The order of use is that of the model in its sweep, and then of the one at the place `next`.
    fn set_models(&mut self, next: usize) {
        let tiles = self.tiles.len() as u32;
        let (now, next) = (&self.models[self.sweeping].tiles, &self.models[next].tiles);
        self.order.set_models(now, next, tiles);
        if let Some(staging) = &mut self.staging {
            staging.order.set_models(now, next, tiles);
        }
    }

    /// The number in the table of all matrices of the first one of the model in its sweep.
    pub fn first_matrix(&self) -> usize {
        self.models[self.sweeping].matrices.start as usize
    }

    /// Says what is expected of each model, in the order in which they came; between sweeps. Allocates nothing.
    pub fn set_rates(&mut self, rates: &[Rate]) {
        assert!(self.acquired.is_empty(), "the plan changes between passes");
        if self.residency.set_rates(rates) {
            self.restart_ahead();
        }
    }

    /// Ends a sweep; until then its results do not count.
    ///
    /// # Errors
    /// A file was changed, so what this sweep read of it may be anything. All tiles of the model are forgotten; later
    /// sweeps of it fail too, unless the file is put back as it was.
    pub fn finish_sweep(&mut self) -> Result<()> {
        let member = &mut self.models[self.sweeping];
        if member.reads == member.reads_looked_at {
            return Ok(());
        }
        member.reads_looked_at = member.reads;
        let looked = member.integrity.look();
        if looked.is_err() {
            self.forget();
        }
        looked
    }

    /// After an error: if a file of the model was changed, nothing that was read of it meanwhile may stay.
    pub(super) fn forget_if_changed(&mut self) {
        if self.models[self.sweeping].integrity.look().is_err() {
            self.forget();
        }
    }

    /// Drops every tile of the model in its sweep, and all that is known of their contents.
    fn forget(&mut self) {
        assert!(
            self.acquired.is_empty(),
            "files are looked at between passes"
        );
        if let Err(error) = self.drain().and(self.wait_for_readers()) {
            log::debug!("while all tiles are forgotten: {error}");
        }
        self.give_up_all(self.sweeping);
        self.models[self.sweeping].integrity.forget();
    }

    /// Drops every tile of the model at a place that lies idle.
    fn give_up_all(&mut self, place: usize) {
        for tile in self.models[place].tiles.clone() {
            if self.states[tile as usize].phase == Phase::Ready {
                self.give_up(tile);
            }
        }
        self.give_up_on_device(self.models[place].tiles.clone());
        self.restart_ahead();
    }

    /// Writes checksums that were learnt into the user's cache folder; not for the hot path. Dropping the store
    /// does it too.
    pub fn save_checksums(&mut self) {
        for member in &mut self.models {
            member.integrity.save();
        }
    }

    /// Weight bytes of a model in memory now.
    pub fn resident_bytes_of(&self, model: ModelId) -> u64 {
        self.resident_bytes_in(self.models[self.place(model)].tiles.clone())
    }

    /// Slots that can be spared of so many that weights have: a window of reads stays, and tiles that have to.
    pub(super) fn spare(&self, capacity: u32, window: u32) -> u32 {
        let stay = self.models.iter().filter(|model| model.resident);
        let stay: u32 = stay.map(|model| model.tiles.len() as u32).sum();
        capacity.saturating_sub(window.min(self.residency.tiles()) + stay)
    }

    /// Where a model stands in the order in which they came.
    fn place(&self, model: ModelId) -> usize {
        let place = self.models.iter().position(|member| member.id == model);
        place.unwrap_or_else(|| panic!("the store has no {model:?}"))
    }

    /// The model whose file it is.
    pub(super) fn member_with(&self, file: u16) -> &Member {
        let member = self.models.iter().find(|m| m.files.contains(&file));
        member.expect("each file has a model")
    }

    /// The models have changed: until a sweep begins, the first one's is expected.
    fn set_order(&mut self) {
        self.order = Order::default();
        if let Some(staging) = &mut self.staging {
            staging.order = Order::default();
        }
        if self.sweeping < self.models.len() {
            self.set_models(self.sweeping);
        }
    }
}
