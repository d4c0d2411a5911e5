//! The forward pass: one sweep through all layers for a batch of rows.
//!
//! Shapes in comments are rows x values. All buffers are spans of the arena,
//! carved for the most rows that a sweep may have.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use crate::arena::{Reservation, Span};
use crate::device::Device;
use crate::device::cpu::{self, Activations, AttentionRow, KvLayout, KvRow, TileView};
use crate::error::Result;
use crate::format::gguf::Gguf;
use crate::format::quant;
use crate::model::config::{Activation, Config};
use crate::model::kv::{self, Session};
use crate::model::rope;
use crate::model::weights::{MatrixPlan, Vectors};
use crate::store::{RowBytes, Store};
use crate::trace::What;

/// One token position of one session in a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Which session, as an index into the slice given to [`Model::sweep`].
    pub session: usize,
    /// The token at this position.
    pub token: u32,
    /// Whether the logits after this token are wanted.
    pub logits: bool,
}

/// How large the batches are that the buffers are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Rows in a sweep.
    pub rows: usize,
    /// Rows of a sweep that want logits.
    pub logits_rows: usize,
}

/// A model ready to run: its small vectors, the plan of its matrices and the buffers of a sweep.
pub struct Model {
    config: Config,
    plan: MatrixPlan,
    pub(super) vectors: Vectors,
    layout: KvLayout,
    limits: BatchLimits,
    /// Per rotary embedding: angle per position of each pair.
    frequencies: Vec<Vec<f32>>,
    /// rows x dim: the residual stream.
    x: Span<f32>,
    /// rows x max(dim, q_dim): a normed row, or what attention gave.
    h: Span<f32>,
    /// rows x dim: what a part adds to the residual stream.
    y: Span<f32>,
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
    /// The bytes behind `activations`, which is a view of them.
    _quantized: Span<u8>,
    activations: Activations,
    /// One row of a packed tile, back in the file's order.
    embed_row: Vec<u8>,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    tiles: Vec<TileView>,
    kv_rows: Vec<KvRow>,
    attention_rows: Vec<AttentionRow>,
}

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
        let x = floats(rows * config.dim)?;
        let h = floats(rows * config.dim.max(config.q_dim()))?;
        let y = floats(rows * config.dim)?;
        let qkv = [
            floats(rows * config.q_dim())?,
            floats(rows * config.kv_dim())?,
            floats(rows * config.kv_dim())?,
        ];
        let (gate, up) = (floats(rows * config.ff)?, floats(rows * config.ff)?);
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
        let mut quantized = arena.carve::<u8>(plan.activation_bytes(&config, rows))?;
        // SAFETY: the span is moved into the model with the view, nobody else has it, and spans are aligned to 64.
        let activations = unsafe { Activations::new(quantized.as_mut_ptr(), quantized.len()) };
        let frequencies = config
            .ropes
            .iter()
            .enumerate()
            // Llama 3's factors belong to the model's only rotary embedding.
            .map(|(i, r)| {
                rope::frequencies(
                    r,
                    config.rope_dims,
                    if i == 0 { &vectors.rope_factors } else { &[] },
                )
            })
            .collect();
        Ok(Model {
            embed_row: vec![0; plan.matrices[plan.embed].row_bytes()],
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            tiles: Vec::with_capacity(tiles_max),
            kv_rows: Vec::with_capacity(rows),
            attention_rows: Vec::with_capacity(rows),
            config,
            plan,
            vectors,
            layout,
            limits,
            frequencies,
            x,
            h,
            y,
            qkv,
            gate,
            up,
            cos,
            sin,
            logits,
            _quantized: quantized,
            activations,
        })
    }

    /// Bytes of the arena's fixed part that a model takes: (small vectors, buffers of a sweep, logits).
    pub fn carved_bytes(
        config: &Config,
        plan: &MatrixPlan,
        limits: BatchLimits,
    ) -> (usize, usize, usize) {
        let of = |len: usize| Reservation::carved_size::<f32>(len);
        let rows = limits.rows;
        let buffers = 2 * of(rows * config.dim)
            + of(rows * config.dim.max(config.q_dim()))
            + of(rows * config.q_dim())
            + 2 * of(rows * config.kv_dim())
            + 2 * of(rows * config.ff)
            + 2 * config.ropes.len() * of(rows * config.rope_dims / 2)
            + Reservation::carved_size::<u8>(plan.activation_bytes(config, rows));
        (
            Vectors::bytes(config),
            buffers,
            of(limits.logits_rows * config.vocab),
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

    /// The memory that everything of it is in but weights and pages.
    pub fn memory(&self) -> (NonNull<u8>, usize) {
        self.x.mapping()
    }

    /// The largest batch.
    pub fn limits(&self) -> BatchLimits {
        self.limits
    }

    /// The layout of the sessions' pages.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The logits of the `index`-th row of the last sweep that wanted them.
    pub fn logits(&mut self, index: usize) -> &mut [f32] {
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
        self.place_rows(rows, sessions, store)?;
        let computed = self.compute(rows, sessions, store, device);
        // Even after an error: what a GPU still works on must not be touched by the next sweep.
        let finished = device.finish(&mut || ());
        computed.and(finished)?;
        store.finish_sweep()?;
        for (index, session) in sessions.iter_mut().enumerate() {
            session.advance(rows.iter().filter(|row| row.session == index).count());
        }
        store.trace().end(begun, What::Sweep(count as u32));
        Ok(())
    }

    /// Everything from the tokens to the logits.
    fn compute(
        &mut self,
        rows: &[Row],
        sessions: &[Session],
        store: &mut Store,
        device: &Device,
    ) -> Result<()> {
        let begun = store.trace().begin();
        self.embed(store, device)?;
        store.trace().end(begun, What::Embed);
        for layer in 0..self.config.layers.len() {
            self.attend(layer, rows, sessions, store, device)?;
            self.feed_forward(layer, rows.len(), store, device)?;
        }
        self.head(rows, store, device)
    }

    /// Finds each row's position, the pages for it and its rotary angles.
    fn place_rows(
        &mut self,
        rows: &[Row],
        sessions: &mut [Session],
        store: &mut Store,
    ) -> Result<()> {
        self.positions.clear();
        self.tokens.clear();
        for index in 0..sessions.len() {
            let new = rows.iter().filter(|row| row.session == index).count();
            if new > 0 {
                kv::extend(sessions, index, &self.config.layers, new, store)?;
            }
        }
        for (index, row) in rows.iter().enumerate() {
            let before = rows[..index]
                .iter()
                .filter(|other| other.session == row.session)
                .count();
            self.positions
                .push((sessions[row.session].len() + before) as u32);
            self.tokens.push(row.token);
        }
        let pairs = self.config.rope_dims / 2;
        for (base, frequencies) in self.frequencies.iter().enumerate() {
            for (index, &position) in self.positions.iter().enumerate() {
                let range = index * pairs..(index + 1) * pairs;
                rope::angles(
                    frequencies,
                    position,
                    &mut self.cos[base][range.clone()],
                    &mut self.sin[base][range],
                );
            }
        }
        Ok(())
    }

    /// x = embeddings of the tokens.
    fn embed(&mut self, store: &mut Store, device: &Device) -> Result<()> {
        let matrix = self.plan.embed;
        let (qtype, dim) = (self.plan.matrices[matrix].qtype, self.config.dim);
        let (x, plain) = (&mut self.x, self.embed_row.as_mut_slice());
        store.rows(matrix, &self.tokens, |index, row| {
            let bytes = match row {
                RowBytes::Plain(bytes) => bytes,
                RowBytes::Packed { strip, lane } => {
                    cpu::unpack_row(qtype, strip, lane, plain);
                    &*plain
                }
            };
            quant::dequantize_row(qtype, bytes, &mut x[index * dim..][..dim]);
        })?;
        if self.config.embed_scale != 1.0 {
            device.scale(
                &mut self.x[..self.tokens.len() * dim],
                self.config.embed_scale,
            );
        }
        Ok(())
    }

    /// x += attention(norm(x)).
    fn attend(
        &mut self,
        layer: usize,
        rows: &[Row],
        sessions: &[Session],
        store: &mut Store,
        device: &Device,
    ) -> Result<()> {
        let count = rows.len();
        let config = &self.config;
        let (dim, q_dim, kv_dim, head_dim) =
            (config.dim, config.q_dim(), config.kv_dim(), config.head_dim);
        let (spec, matrices) = (config.layers[layer], self.plan.layers[layer]);
        let vectors = &self.vectors.layers[layer];
        let [q, k, v] = &mut self.qkv;
        let (q, k, v) = (
            &mut q[..count * q_dim],
            &mut k[..count * kv_dim],
            &mut v[..count * kv_dim],
        );

        let h = &mut self.h[..count * dim];
        device.rms_norm(
            &self.x[..count * dim],
            &vectors.attn_norm,
            config.norm_eps,
            h,
        );
        let kinds = self.plan.kinds(matrices.q..matrices.q + 3);
        device.quantize(h, dim, kinds, &mut self.activations);
        let outs = [
            (q.as_mut_ptr(), q_dim),
            (k.as_mut_ptr(), kv_dim),
            (v.as_mut_ptr(), kv_dim),
        ];
        matmul(
            matrices.q,
            &outs,
            &self.plan,
            &self.activations,
            &mut self.tiles,
            store,
            device,
        )?;
        if let Some(biases) = &vectors.qkv_bias {
            device.add(q, &biases[0]);
            device.add(k, &biases[1]);
            device.add(v, &biases[2]);
        }
        if let Some(norms) = &vectors.qk_norm {
            device.rms_norm_in_place(q, &norms[0], config.norm_eps);
            device.rms_norm_in_place(k, &norms[1], config.norm_eps);
        }
        let angles = count * config.rope_dims / 2;
        let (cos, sin) = (
            &self.cos[spec.rope][..angles],
            &self.sin[spec.rope][..angles],
        );
        device.rope(q, count, head_dim, cos, sin, config.pairing);
        device.rope(k, count, head_dim, cos, sin, config.pairing);

        let begun = store.trace().begin();
        let out = &mut self.h[..count * q_dim];
        self.kv_rows.clear();
        self.attention_rows.clear();
        for (index, (row, &position)) in rows.iter().zip(&self.positions).enumerate() {
            let session = &sessions[row.session];
            let (page, place) = session.place(layer, position as usize);
            let at = index * kv_dim;
            self.kv_rows.push(KvRow {
                page,
                index: place,
                k: k[at..].as_ptr(),
                v: v[at..].as_ptr(),
            });
            self.attention_rows.push(AttentionRow {
                q: q[index * q_dim..].as_ptr(),
                out: out[index * q_dim..].as_mut_ptr(),
                pages: session.pages(layer),
                position,
                start: spec
                    .window
                    .map_or(0, |window| (position + 1).saturating_sub(window)),
            });
        }
        // SAFETY: `place_rows` took pages for all positions of the batch, each position has its own place, and
        // everything from a row's `start` on was appended by this sweep or earlier ones; outputs are disjoint rows.
        unsafe {
            device.kv_append(&self.layout, &self.kv_rows);
            device.attention(
                &self.attention_rows,
                &self.layout,
                config.heads,
                config.attention_scale,
                None,
            );
        }
        store.trace().end(begun, What::Attention(layer as u32));

        let kinds = self.plan.kinds(matrices.o..matrices.o + 1);
        device.quantize(out, q_dim, kinds, &mut self.activations);
        let y = &mut self.y[..count * dim];
        matmul(
            matrices.o,
            &[(y.as_mut_ptr(), dim)],
            &self.plan,
            &self.activations,
            &mut self.tiles,
            store,
            device,
        )?;
        if let Some(norms) = &vectors.post_norms {
            device.rms_norm_in_place(y, &norms[0], config.norm_eps);
        }
        device.add(&mut self.x[..count * dim], y);
        Ok(())
    }

    /// x += down(act(gate(norm(x))) * up(norm(x))).
    fn feed_forward(
        &mut self,
        layer: usize,
        count: usize,
        store: &mut Store,
        device: &Device,
    ) -> Result<()> {
        let config = &self.config;
        let (dim, ff) = (config.dim, config.ff);
        let matrices = self.plan.layers[layer];
        let vectors = &self.vectors.layers[layer];
        let (gate, up) = (&mut self.gate[..count * ff], &mut self.up[..count * ff]);

        let h = &mut self.h[..count * dim];
        device.rms_norm(
            &self.x[..count * dim],
            &vectors.ffn_norm,
            config.norm_eps,
            h,
        );
        device.quantize(
            h,
            dim,
            self.plan.kinds(matrices.gate..matrices.gate + 2),
            &mut self.activations,
        );
        let outs = [(gate.as_mut_ptr(), ff), (up.as_mut_ptr(), ff)];
        matmul(
            matrices.gate,
            &outs,
            &self.plan,
            &self.activations,
            &mut self.tiles,
            store,
            device,
        )?;
        match config.activation {
            Activation::Silu => device.silu_mul(gate, up),
            Activation::GeluTanh => device.gelu_tanh_mul(gate, up),
        }
        device.quantize(
            gate,
            ff,
            self.plan.kinds(matrices.down..matrices.down + 1),
            &mut self.activations,
        );
        let y = &mut self.y[..count * dim];
        matmul(
            matrices.down,
            &[(y.as_mut_ptr(), dim)],
            &self.plan,
            &self.activations,
            &mut self.tiles,
            store,
            device,
        )?;
        if let Some(norms) = &vectors.post_norms {
            device.rms_norm_in_place(y, &norms[1], config.norm_eps);
        }
        device.add(&mut self.x[..count * dim], y);
        Ok(())
    }

    /// logits = head(norm(x)) of the rows that want them.
    fn head(&mut self, rows: &[Row], store: &mut Store, device: &Device) -> Result<()> {
        let (dim, vocab) = (self.config.dim, self.config.vocab);
        let mut count = 0;
        for (index, _) in rows.iter().enumerate().filter(|(_, row)| row.logits) {
            let from = &self.x[index * dim..][..dim];
            device.copy(from, &mut self.y[count * dim..][..dim]);
            count += 1;
        }
        assert!(count <= self.limits.logits_rows, "{count} rows want logits");
        if count == 0 {
            return Ok(());
        }
        let h = &mut self.h[..count * dim];
        device.rms_norm(
            &self.y[..count * dim],
            &self.vectors.output_norm,
            self.config.norm_eps,
            h,
        );
        device.quantize(
            h,
            dim,
            self.plan.kinds(self.plan.head..self.plan.head + 1),
            &mut self.activations,
        );
        let logits = &mut self.logits[..count * vocab];
        let outs = [(logits.as_mut_ptr(), vocab)];
        matmul(
            self.plan.head,
            &outs,
            &self.plan,
            &self.activations,
            &mut self.tiles,
            store,
            device,
        )?;
        if let Some(cap) = self.config.logit_softcap {
            device.softcap(logits, cap);
        }
        Ok(())
    }
}

/// Multiplies the activations with `outs.len()` successive matrices, tile by tile as they are in memory.
///
/// `outs` holds for each matrix the first output value and the values from one row to the next.
fn matmul(
    first: usize,
    outs: &[(*mut f32, usize)],
    plan: &MatrixPlan,
    activations: &Activations,
    tiles: &mut Vec<TileView>,
    store: &mut Store,
    device: &Device,
) -> Result<()> {
    let begun = store.trace().begin();
    let sums = store.sums();
    let first_tile = store.tiles_of(0).start;
    let inspect = &|id: u32, strip, bytes: &[u8]| sums.inspect(id - first_tile, strip, bytes);
    store.begin(store.tiles_of(first).start..store.tiles_of(first + outs.len() - 1).end);
    while store.acquire()? > 0 {
        tiles.clear();
        for &id in store.acquired() {
            let tile = store.tile(id);
            let index = tile.matrix as usize - store.first_matrix();
            let matrix = &plan.matrices[index];
            let memory = store.memory(id);
            let (out, out_stride) = outs[index - first];
            tiles.push(TileView {
                id,
                data: memory.data.as_ptr(),
                qtype: matrix.qtype,
                cols: matrix.cols,
                rows: tile.rows as usize,
                packed: memory.packed,
                keep: memory.keep,
                // SAFETY: the tile's rows are outputs of its matrix, so this stays within the first row of `out`.
                out: unsafe { out.add(tile.first_row as usize) },
                out_stride,
            });
        }
        let computed = store.trace().begin();
        // SAFETY: acquired tiles are the device's until they are released, tiles have disjoint rows, and each
        // buffer holds `out_stride` values for every row.
        unsafe { device.matmul(tiles, activations, inspect, &mut || store.feed()) };
        store
            .trace()
            .end(computed, What::Compute(tiles.len() as u32));
        store.release()?;
    }
    let first = (store.first_matrix() + first) as u32;
    store
        .trace()
        .end(begun, What::Matrices(first, outs.len() as u32));
    Ok(())
}
