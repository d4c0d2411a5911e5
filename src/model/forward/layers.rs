//! What a sweep computes: from the tokens through the layers to the logits.
#![allow(unsafe_code)]

use std::ptr;

use super::{Model, Row, Wanted};
use crate::device::cpu::{
    self, Activations, Added, AttentionRow, AttentionShape, Heads, KvPlace, Residual, TileView,
};
use crate::device::{Device, LIKELIEST};
use crate::error::Result;
use crate::format::quant;
use crate::model::kv::{self, Session};
use crate::model::weights::{MatrixPlan, Vectors};
use crate::store::{RowBytes, Store};
use crate::trace::What;

impl Model {
    /// Everything from the tokens to the logits.
    pub(super) fn compute(
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
    pub(super) fn place_rows(
        &mut self,
        rows: &[Row],
        sessions: &mut [Session],
        store: &mut Store,
        device: &Device,
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
        for (base, rotation) in self.rotations.iter().enumerate() {
            for (index, &position) in self.positions.iter().enumerate() {
                let range = index * pairs..(index + 1) * pairs;
                rotation.angles(
                    position,
                    &mut self.cos[base][range.clone()],
                    &mut self.sin[base][range],
                );
            }
            for angles in [&self.cos[base], &self.sin[base]] {
                device.upload(&angles[..rows.len() * pairs]);
            }
        }
        Ok(())
    }

    /// x = embeddings of the tokens.
    fn embed(&mut self, store: &mut Store, device: &Device) -> Result<()> {
        let matrix = self.plan.embed;
        let (qtype, dim) = (self.plan.matrices[matrix].qtype, self.config.dim);
        let (x, plain) = (&mut self.x, self.embed_row.as_mut_slice());
        let on_device = &mut self.rows_on_device;
        on_device.clear();
        on_device.resize(self.tokens.len(), ptr::null());
        store.rows(matrix, &self.tokens, |index, row| {
            let bytes = match row {
                RowBytes::Plain(bytes) => bytes,
                RowBytes::Packed { strip, lane } => {
                    cpu::unpack_row(qtype, strip, lane, plain);
                    &*plain
                }
                RowBytes::OnDevice(data) => {
                    on_device[index] = data.as_ptr().cast_const();
                    return;
                }
            };
            quant::dequantize_row(qtype, bytes, &mut x[index * dim..][..dim]);
        })?;
        let x = &mut self.x[..self.tokens.len() * dim];
        if self.rows_on_device.iter().any(|row| row.is_null()) {
            device.upload(x);
        }
        // SAFETY: rows of `dim` values, whose tiles stay until the device has done what it is given here.
        unsafe { device.embed(&self.rows_on_device, qtype, x) };
        if self.config.embed_scale != 1.0 {
            device.scale(x, self.config.embed_scale);
        }
        Ok(())
    }

    /// y = attention(norm(x += y)).
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
        let (dim, q_dim, kv_dim) = (config.dim, config.q_dim(), config.kv_dim());
        let (spec, matrices) = (config.layers[layer], self.plan.layers[layer]);
        let vectors = &self.vectors.layers[layer];
        let [q, k, v] = &mut self.qkv;
        let (q, k, v) = (
            &mut q[..count * q_dim],
            &mut k[..count * kv_dim],
            &mut v[..count * kv_dim],
        );

        let before = layer.checked_sub(1);
        let residual = Residual {
            x: &mut self.x[..count * dim],
            added: before.map(|layer| added(&self.y, &self.vectors, (layer, 1), count * dim)),
            weight: &vectors.attn_norm,
            eps: config.norm_eps,
        };
        let kinds = self.plan.kinds(matrices.q..matrices.q + 3);
        device.norm_quantize(residual, kinds, &mut self.activations);
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
        let begun = store.trace().begin();
        let positions = || rows.iter().zip(&self.positions);
        self.places.clear();
        self.places.extend(positions().map(|(row, &position)| {
            let (page, index) = sessions[row.session].place(layer, position as usize);
            KvPlace { page, index }
        }));
        let angles = count * config.rope_dims / 2;
        let biases = vectors.qkv_bias.as_ref();
        let norms = vectors.qk_norm.as_ref();
        let heads = Heads {
            q: &mut *q,
            k,
            v,
            biases: biases.map(|all| all.each_ref().map(|bias| &**bias)),
            norms: norms.map(|all| all.each_ref().map(|norm| &**norm)),
            eps: config.norm_eps,
            cos: &self.cos[spec.rope][..angles],
            sin: &self.sin[spec.rope][..angles],
            pairing: config.pairing,
        };
        // SAFETY: `place_rows` took pages for all positions of the batch, and each position has its own place.
        unsafe { device.place_heads(heads, &self.layout, &self.places) };

        let attended = self.attended.as_mut_ptr();
        self.attention_rows.clear();
        self.attention_rows
            .extend(positions().enumerate().map(|(index, (row, &position))| {
                let window = spec.window.unwrap_or(u32::MAX);
                AttentionRow {
                    q: q[index * q_dim..].as_ptr(),
                    out: attended.wrapping_add(index * q_dim),
                    pages: sessions[row.session].pages(layer),
                    position,
                    start: (position + 1).saturating_sub(window),
                }
            }));
        let shape = AttentionShape {
            layout: self.layout,
            heads: config.heads,
            scale: config.attention_scale,
            softcap: None,
        };
        let kinds = self.plan.kinds(matrices.o..matrices.o + 1);
        let (rows, activations) = (&self.attention_rows, &mut self.activations);
        // SAFETY: everything from a row's `start` on was appended by this sweep or earlier ones; outputs are disjoint
        // rows.
        unsafe { device.attention_quantize(rows, &shape, kinds, activations) };
        store.trace().end(begun, What::Attention(layer as u32));
        self.product(matrices.o, store, device)
    }

    /// y = matrix(activations): what is added to x before the next norm.
    fn product(&mut self, matrix: usize, store: &mut Store, device: &Device) -> Result<()> {
        matmul(
            matrix,
            &[(self.y.as_mut_ptr(), self.config.dim)],
            &self.plan,
            &self.activations,
            &mut self.tiles,
            store,
            device,
        )
    }

    /// y = down(act(gate(h)) * up(h)) of h = norm(x += y).
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

        let residual = Residual {
            x: &mut self.x[..count * dim],
            added: Some(added(&self.y, &self.vectors, (layer, 0), count * dim)),
            weight: &vectors.ffn_norm,
            eps: config.norm_eps,
        };
        let kinds = self.plan.kinds(matrices.gate..matrices.gate + 2);
        device.norm_quantize(residual, kinds, &mut self.activations);
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
        let kinds = self.plan.kinds(matrices.down..matrices.down + 1);
        device.gate_quantize(
            config.activation,
            (gate, up),
            ff,
            kinds,
            &mut self.activations,
        );
        self.product(matrices.down, store, device)
    }

    /// logits = head(norm(x += y)) of the rows that want to know of their next token.
    fn head(&mut self, rows: &[Row], store: &mut Store, device: &Device) -> Result<()> {
        let (dim, vocab) = (self.config.dim, self.config.vocab);
        self.wanted.clear();
        for (index, row) in rows.iter().enumerate() {
            if row.wanted == Wanted::Nothing {
                continue;
            }
            let count = self.wanted.len();
            // Nobody needs the others any more.
            if index != count {
                for all in [&mut self.x, &mut self.y] {
                    let (to, from) = all.split_at_mut(index * dim);
                    device.copy(&from[..dim], &mut to[count * dim..][..dim]);
                }
            }
            self.wanted.push(row.wanted);
        }
        let count = self.wanted.len();
        assert!(count <= self.limits.logits_rows, "{count} rows want logits");
        if count == 0 {
            return Ok(());
        }
        let last = self.config.layers.len().checked_sub(1);
        let residual = Residual {
            x: &mut self.x[..count * dim],
            added: last.map(|layer| added(&self.y, &self.vectors, (layer, 1), count * dim)),
            weight: &self.vectors.output_norm,
            eps: self.config.norm_eps,
        };
        let kinds = self.plan.kinds(self.plan.head..self.plan.head + 1);
        device.norm_quantize(residual, kinds, &mut self.activations);
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
        let likeliest = &mut self.likeliest[..count * LIKELIEST];
        let some = self.wanted.contains(&Wanted::Likeliest);
        if !(some && device.likeliest(logits, vocab, likeliest)) {
            self.wanted.fill(Wanted::Logits);
        }
        // A row of logits may be a megabyte: only those travel that somebody looks at.
        let mut row = 0;
        for run in self.wanted.chunk_by(|a, b| a == b) {
            match run[0] {
                Wanted::Logits => device.download(&mut logits[row * vocab..][..run.len() * vocab]),
                _ => device.download(&mut likeliest[row * LIKELIEST..][..run.len() * LIKELIEST]),
            }
            row += run.len();
        }
        Ok(())
    }
}

/// The product `y`, of `len` values, that ended part `part` of `layer` and is not yet in the stream; some models norm it.
fn added<'a>(
    y: &'a [f32],
    vectors: &'a Vectors,
    (layer, part): (usize, usize),
    len: usize,
) -> Added<'a> {
    let norms = vectors.layers[layer].post_norms.as_ref();
    Added {
        y: &y[..len],
        weight: norms.map(|norms| &*norms[part]),
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
