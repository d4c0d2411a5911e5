//! Which tensors a model has: matrices to stream, and small vectors that stay.

use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::arena::{Reservation, Span};
use crate::device::cpu::{Activations, Kinds, Precision};
use crate::error::{Error, Kind, Result};
use crate::format::checksum::{self, Seen};
use crate::format::gguf::{Gguf, TensorInfo};
use crate::format::quant;
use crate::format::tile::{Matrix, Use};
use crate::model::config::{Config, missing};

/// The matrices of a layer, as indices into the list in sweep order.
#[derive(Debug, Clone, Copy)]
pub struct LayerMatrices {
    /// Queries; keys and values follow it.
    pub q: usize,
    /// Output of attention.
    pub o: usize,
    /// Gate; up follows it.
    pub gate: usize,
    /// Output of the feed-forward part.
    pub down: usize,
}

/// All matrices in the order of the sweep, and where the forward pass finds them.
#[derive(Debug, Clone)]
pub struct MatrixPlan {
    /// In the order of the sweep.
    pub matrices: Vec<Matrix>,
    /// Of each layer.
    pub layers: Vec<LayerMatrices>,
    /// The embedding table (the head, when they are tied).
    pub embed: usize,
    /// The output head.
    pub head: usize,
}

impl MatrixPlan {
    /// Finds the matrices of the model and checks their shapes.
    pub fn new(gguf: &Gguf, config: &Config) -> Result<MatrixPlan> {
        let mut matrices = Vec::with_capacity(config.layers.len() * 7 + 2);
        let mut add = |name: &str, rows: usize, cols: usize, used: Use| -> Result<usize> {
            matrices.push(Matrix::new(find(gguf, name, rows, cols)?, used));
            Ok(matrices.len() - 1)
        };
        let tied = gguf.tensor("output.weight").is_none();
        let mut layers = Vec::with_capacity(config.layers.len());
        for layer in 0..config.layers.len() {
            let mut part = |name: &str, rows, cols| {
                add(
                    &format!("blk.{layer}.{name}.weight"),
                    rows,
                    cols,
                    Use::EverySweep,
                )
            };
            let q = part("attn_q", config.q_dim(), config.dim)?;
            part("attn_k", config.kv_dim(), config.dim)?;
            part("attn_v", config.kv_dim(), config.dim)?;
            let o = part("attn_output", config.dim, config.q_dim())?;
            let gate = part("ffn_gate", config.ff, config.dim)?;
            part("ffn_up", config.ff, config.dim)?;
            let down = part("ffn_down", config.dim, config.ff)?;
            layers.push(LayerMatrices { q, o, gate, down });
        }
        let head_name = if tied {
            "token_embd.weight"
        } else {
            "output.weight"
        };
        let head = add(head_name, config.vocab, config.dim, Use::EverySweep)?;
        // Last of all: where there is room for a table of which single rows are used, it is read when all else is in
        // memory, and the first token does not wait for it.
        let embed = match tied {
            true => head,
            false => add("token_embd.weight", config.vocab, config.dim, Use::ByRow)?,
        };
        Ok(MatrixPlan {
            matrices,
            layers,
            embed,
            head,
        })
    }

    /// Bytes of all weights that every sweep uses.
    pub fn sweep_bytes(&self) -> u64 {
        self.matrices
            .iter()
            .filter(|m| m.used == Use::EverySweep)
            .map(Matrix::bytes)
            .sum()
    }
}

impl MatrixPlan {
    /// What the weights of a run of matrices want to be multiplied with.
    pub fn kinds(&self, matrices: Range<usize>) -> Kinds {
        self.matrices[matrices]
            .iter()
            .fold(Kinds::NONE, |all, matrix| all | Kinds::of(matrix.qtype))
    }

    /// Bytes of quantized rows, enough for every group of matrices.
    pub fn activation_bytes(&self, config: &Config, rows: usize, precision: Precision) -> usize {
        let groups = self.layers.iter().flat_map(|layer| {
            [
                (config.dim, layer.q..layer.q + 3),
                (config.q_dim(), layer.o..layer.o + 1),
                (config.dim, layer.gate..layer.gate + 2),
                (config.ff, layer.down..layer.down + 1),
            ]
        });
        groups
            .chain([(config.dim, self.head..self.head + 1)])
            .map(|(cols, matrices)| Activations::bytes(rows, cols, self.kinds(matrices), precision))
            .max()
            .unwrap_or(0)
    }
}

fn find<'a>(gguf: &'a Gguf, name: &str, rows: usize, cols: usize) -> Result<&'a TensorInfo> {
    let tensor = gguf.tensor(name).ok_or_else(|| missing(name))?;
    if (tensor.rows, tensor.cols) != (rows, cols) {
        return Err(Error::new(
            Kind::Format,
            format!(
                "{name} is {} x {} where the model's shape asks for {rows} x {cols}",
                tensor.rows, tensor.cols
            ),
            "convert or download the model again",
        ));
    }
    Ok(tensor)
}

/// The small vectors of a layer; empty where the architecture has none.
pub struct LayerVectors {
    /// Before attention, of `dim`.
    pub attn_norm: Span<f32>,
    /// Before the feed-forward part, of `dim`.
    pub ffn_norm: Span<f32>,
    /// Biases of q, k and v.
    pub qkv_bias: Option<[Span<f32>; 3]>,
    /// Per head, of `head_dim`: for q and for k.
    pub qk_norm: Option<[Span<f32>; 2]>,
    /// After attention and after the feed-forward part, of `dim`.
    pub post_norms: Option<[Span<f32>; 2]>,
}

/// All small vectors; they stay in the arena's fixed part.
pub struct Vectors {
    /// Of each layer.
    pub layers: Vec<LayerVectors>,
    /// Before the head, of `dim`.
    pub output_norm: Span<f32>,
    /// Llama 3's divisors of the rotary frequencies, one per pair; empty if the model has none.
    pub rope_factors: Vec<f32>,
    /// What was read, all of it.
    pub seen: Vec<Seen>,
}

impl Vectors {
    /// Bytes that they take in the arena.
    pub fn bytes(config: &Config) -> usize {
        let of = |len: usize| Reservation::carved_size::<f32>(len);
        let mut layer = 2 * of(config.dim);
        if config.qkv_bias {
            layer += of(config.q_dim()) + 2 * of(config.kv_dim());
        }
        if config.qk_norm {
            layer += 2 * of(config.head_dim);
        }
        if config.post_norms {
            layer += 2 * of(config.dim);
        }
        config.layers.len() * layer + of(config.dim)
    }

    /// Reads them from the model's files into the arena.
    pub fn load(gguf: &Gguf, config: &Config, arena: &mut Reservation) -> Result<Vectors> {
        let mut seen = Vec::new();
        let mut read = |name: &str, len: usize| -> Result<Vec<f32>> {
            let tensor = find(gguf, name, 1, len)?;
            let mut raw = vec![0; tensor.bytes as usize];
            let opened = &gguf.opened()[tensor.file];
            opened
                .file
                .read_exact_at(&mut raw, tensor.offset)
                .map_err(|e| Error::file(&gguf.files()[tensor.file], "read", &e))?;
            seen.push(Seen {
                name: name.to_owned(),
                file: tensor.file as u16,
                offset: tensor.offset,
                sum: checksum::of(&raw),
            });
            let mut values = vec![0.0; len];
            quant::dequantize_row(tensor.qtype, &raw, &mut values);
            Ok(values)
        };
        let mut carve = |name: String, len: usize| -> Result<Span<f32>> {
            let mut span = arena.carve::<f32>(len)?;
            span.copy_from_slice(&read(&name, len)?);
            Ok(span)
        };
        let mut layers = Vec::with_capacity(config.layers.len());
        for layer in 0..config.layers.len() {
            let name = |part: &str| format!("blk.{layer}.{part}");
            layers.push(LayerVectors {
                attn_norm: carve(name("attn_norm.weight"), config.dim)?,
                ffn_norm: carve(name("ffn_norm.weight"), config.dim)?,
                qkv_bias: match config.qkv_bias {
                    true => Some([
                        carve(name("attn_q.bias"), config.q_dim())?,
                        carve(name("attn_k.bias"), config.kv_dim())?,
                        carve(name("attn_v.bias"), config.kv_dim())?,
                    ]),
                    false => None,
                },
                qk_norm: match config.qk_norm {
                    true => Some([
                        carve(name("attn_q_norm.weight"), config.head_dim)?,
                        carve(name("attn_k_norm.weight"), config.head_dim)?,
                    ]),
                    false => None,
                },
                post_norms: match config.post_norms {
                    true => Some([
                        carve(name("post_attention_norm.weight"), config.dim)?,
                        carve(name("post_ffw_norm.weight"), config.dim)?,
                    ]),
                    false => None,
                },
            });
        }
        let output_norm = carve("output_norm.weight".into(), config.dim)?;
        let rope_factors = match gguf.tensor("rope_freqs.weight") {
            Some(_) => read("rope_freqs.weight", config.rope_dims / 2)?,
            None => Vec::new(),
        };
        Ok(Vectors {
            layers,
            output_norm,
            rope_factors,
            seen,
        })
    }
}

impl super::forward::Model {
    /// The small vectors as they were read, to be compared with earlier runs.
    pub fn vectors_seen(&self) -> &[Seen] {
        &self.vectors.seen
    }
}
