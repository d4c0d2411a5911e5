//! The forward pass: one sweep through all layers for a batch of rows.
//!
//! Shapes in comments are rows x values. All buffers are spans of the arena,
//! carved for the most rows that a sweep may have.
#![allow(unsafe_code)]

mod layers;

use crate::arena::{Reservation, Span};
use crate::device::cpu::{Activations, AttentionRow, KvLayout, KvPlace, Precision, TileView};
use crate::device::cuda::Buffers;
use crate::device::{Device, LIKELIEST, Likely};
use crate::error::Result;
use crate::format::gguf::Gguf;
use crate::model::config::Config;
use crate::model::kv::Session;
use crate::model::rope::Rotation;
use crate::model::weights::{MatrixPlan, Vectors};
use crate::store::Store;
use crate::trace::What;

/// One token position of one session in a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Which session, as an index into the slice given to [`Model::sweep`].
    pub session: usize,
    /// The token at this position.
    pub token: u32,
    /// What is wanted to know of the token after this one.
    pub wanted: Wanted,
}

/// What is wanted to know of a row's next token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// It is known: nothing.
    Nothing,
    /// The [`LIKELIEST`] likeliest tokens, or as well all logits: whatever is sooner there.
    Likeliest,
    /// All logits.
    Logits,
}

/// What a row's next token is chosen from.
#[derive(Debug)]
pub enum Choices<'a> {
    /// The likeliest tokens, likeliest first; behind the last one that there is, tokens of minus infinity.
    Likeliest(&'a [Likely]),
    /// A logit for each token; a sampler may change them.
    Logits(&'a mut [f32]),
}

/// How large the batches are that the buffers are made for, and how finely their rows are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Rows in a sweep.
    pub rows: usize,
    /// Rows of a sweep of whose next token something is wanted.
    pub logits_rows: usize,
    /// How finely activations are rounded.
    pub activations: Precision,
}

/// A model ready to run: its small vectors, the plan of its matrices and the buffers of a sweep.
pub struct Model {
    config: Config,
    plan: MatrixPlan,
    pub(super) vectors: Vectors,
    layout: KvLayout,
    limits: BatchLimits,
    /// One per rotary embedding.
    rotations: Vec<Rotation>,
    /// rows x dim: the residual stream.
    x: Span<f32>,
    /// rows x dim: what a part has made, until the next norm adds it to the residual stream.
    y: Span<f32>,
    /// rows x q_dim: what attention gave.
    attended: Span<f32>,
    /// rows x q_dim, rows x kv_dim, rows x kv_dim.
    qkv: [Span<f32>; 3],
    /// rows x ff, twice.
    gate: Span<f32>,
    up: Span<f32>,
    /// Per rotary embedding: rows x rope_dims/2.
    cos: Vec<Span<f32>>,
    sin: Vec<Span<f32>>,
    /// logits_rows x vocab.
    logits: Span<f32>,
    /// logits_rows x LIKELIEST.
    likeliest: Span<Likely>,
    /// Of the rows of the last sweep that wanted something: what there is now.
    wanted: Vec<Wanted>,
    /// The bytes behind `activations`, which is a view of them.
    _quantized: Span<u8>,
    activations: Activations,
    /// One row of a packed tile, back in the file's order.
    embed_row: Vec<u8>,
    /// Of each row, where a GPU's own memory has its token's embedding; null if it does not.
    rows_on_device: Vec<*const u8>,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    tiles: Vec<TileView>,
    places: Vec<KvPlace>,
    attention_rows: Vec<AttentionRow>,
}

// SAFETY: the pointers in it are to its own buffers, or to tiles and pages that only the sweep that listed them looks at.
// It is sent to another thread between sweeps, if at all.
unsafe impl Send for Model {}

impl Model {
    /// Carves the buffers of a model from the arena and loads its small vectors.
    ///
    /// `tiles_max` is the number of all tiles, `layout` that of the sessions' pages.
    pub fn new(
        gguf: &Gguf,
        config: Config,
        plan: MatrixPlan,
        limits: BatchLimits,
        layout: KvLayout,
        tiles_max: usize,
        arena: &mut Reservation,
    ) -> Result<Model> {
        let vectors = Vectors::load(gguf, &config, arena)?;
        let rows = limits.rows;
        let mut floats = |len: usize| arena.carve::<f32>(len);
        // First what the processor touches whatever the device.
        let x = floats(rows * config.dim)?;
        let pairs = config.rope_dims / 2;
        let mut angles = || {
            config
                .ropes
                .iter()
                .map(|_| floats(rows * pairs))
                .collect::<Result<Vec<_>>>()
        };
        let (cos, sin) = (angles()?, angles()?);
        let logits = floats(limits.logits_rows * config.vocab)?;
        let likeliest = arena.carve(limits.logits_rows * LIKELIEST)?;
        let mut floats = |len: usize| arena.carve::<f32>(len);
        let y = floats(rows * config.dim)?;
        let attended = floats(rows * config.q_dim())?;
        let qkv = [
            floats(rows * config.q_dim())?,
            floats(rows * config.kv_dim())?,
            floats(rows * config.kv_dim())?,
        ];
        let (gate, up) = (floats(rows * config.ff)?, floats(rows * config.ff)?);
        let mut quantized =
            arena.carve::<u8>(plan.activation_bytes(&config, rows, limits.activations))?;
        // SAFETY: the span is moved into the model with the view, nobody else has it, and spans are aligned to 64.
        let activations = unsafe {
            Activations::new(quantized.as_mut_ptr(), quantized.len(), limits.activations)
        };
        let rotations = config
            .ropes
            .iter()
            .enumerate()
            // Llama 3's factors belong to the model's only rotary embedding.
            .map(|(i, r)| {
                Rotation::new(
                    r,
                    config.rope_dims,
                    if i == 0 { &vectors.rope_factors } else { &[] },
                )
            })
            .collect();
        Ok(Model {
            embed_row: vec![0; plan.matrices[plan.embed].row_bytes()],
            rows_on_device: Vec::with_capacity(rows),
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            tiles: Vec::with_capacity(tiles_max),
            places: Vec::with_capacity(rows),
            attention_rows: Vec::with_capacity(rows),
            wanted: Vec::with_capacity(limits.logits_rows),
            config,
            plan,
            vectors,
            layout,
            limits,
            rotations,
            x,
            y,
            attended,
            qkv,
            gate,
            up,
            cos,
            sin,
            logits,
            likeliest,
            _quantized: quantized,
            activations,
        })
    }

    /// Bytes of the arena's fixed part that a model takes: (small vectors, buffers of a sweep, logits and
    /// likely tokens).
    pub fn carved_bytes(
        config: &Config,
        plan: &MatrixPlan,
        limits: BatchLimits,
    ) -> (usize, usize, usize) {
        let of = |len: usize| Reservation::carved_size::<f32>(len);
        let rows = limits.rows;
        let buffers = 2 * of(rows * config.dim)
            + 2 * of(rows * config.q_dim())
            + 2 * of(rows * config.kv_dim())
            + 2 * of(rows * config.ff)
            + 2 * config.ropes.len() * of(rows * config.rope_dims / 2)
            + Reservation::carved_size::<u8>(plan.activation_bytes(
                config,
                rows,
                limits.activations,
            ));
        (
            Vectors::bytes(config),
            buffers,
            of(limits.logits_rows * config.vocab)
                + Reservation::carved_size::<Likely>(limits.logits_rows * LIKELIEST),
        )
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its matrices, in the order of the sweep.
    pub fn matrices(&self) -> &MatrixPlan {
        &self.plan
    }

    /// The memory that everything of it is in that a GPU works on, but weights and pages.
    pub fn memory(&self) -> Buffers {
        let (base, _) = self.x.mapping();
        let start = |address: usize| address - base.addr().get();
        Buffers {
            base,
            bytes: start(self._quantized.as_ptr().addr()),
            front: start(self.y.as_ptr().addr()),
        }
    }

    /// Bytes of [`memory`](Self::memory): of all, and at the front.
    pub fn memory_bytes(config: &Config, plan: &MatrixPlan, limits: BatchLimits) -> (usize, usize) {
        let of = |len: usize| Reservation::carved_size::<f32>(len);
        let (vectors, buffers, logits) = Model::carved_bytes(config, plan, limits);
        let quantized = plan.activation_bytes(config, limits.rows, limits.activations);
        let rows = limits.rows;
        let front = vectors
            + of(rows * config.dim)
            + 2 * config.ropes.len() * of(rows * config.rope_dims / 2)
            + logits;
        let quantized = Reservation::carved_size::<u8>(quantized);
        (vectors + buffers + logits - quantized, front)
    }

    /// The largest batch.
    pub fn limits(&self) -> BatchLimits {
        self.limits
    }

    /// The layout of the sessions' pages.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// What the next token of the `index`-th row of the last sweep that wanted to know of it is chosen from.
    pub fn choices(&mut self, index: usize) -> Choices<'_> {
        match self.wanted.get(index) {
            Some(Wanted::Likeliest) => {
                Choices::Likeliest(&self.likeliest[index * LIKELIEST..][..LIKELIEST])
            }
            _ => Choices::Logits(self.logits(index)),
        }
    }

    /// The logits of that row, which wanted them.
    pub fn logits(&mut self, index: usize) -> &mut [f32] {
        let wanted = self.wanted.get(index);
        assert_ne!(wanted, Some(&Wanted::Likeliest), "not all were wanted");
        &mut self.logits[index * self.config.vocab..][..self.config.vocab]
    }

    /// Runs one sweep. Rows of one session must stand in the order of their positions.
    ///
    /// # Errors
    /// A read failed, a file was changed, or a session's context is full. No session has advanced then, and the sweep may be tried again.
    pub fn sweep(
        &mut self,
        rows: &[Row],
        sessions: &mut [Session],
        store: &mut Store,
        device: &Device,
    ) -> Result<()> {
        let count = rows.len();
        assert!(
            count > 0 && count <= self.limits.rows,
            "a sweep of {count} rows"
        );
        let begun = store.trace().begin();
        self.place_rows(rows, sessions, store, device)?;
        let computed = self.compute(rows, sessions, store, device);
        // Even after an error: what a GPU still works on must not be touched by the next sweep.
        let finished = device.finish(&mut || store.feed());
        computed.and(finished)?;
        store.finish_sweep()?;
        for (index, session) in sessions.iter_mut().enumerate() {
            session.advance(rows.iter().filter(|row| row.session == index).count());
        }
        store.trace().end(begun, What::Sweep(count as u32));
        Ok(())
    }
}
