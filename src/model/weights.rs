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

    /// Checks that the file has no tensor that the forward pass knows nothing of: an answer that leaves it out would be
    /// another model's.
    ///
    /// # Errors
    /// There is one; the error names it.
    pub fn check_complete(&self, gguf: &Gguf, config: &Config) -> Result<()> {
        let vectors = layer_vectors(config);
        let of_layer = |name: &str| -> Option<bool> {
            let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
            let within = layer.parse::<usize>().ok()? < config.layers.len();
            Some(within && vectors.iter().any(|&(vector, _)| vector == part))
        };
        let known = |name: &str| {
            let of_all = ["output_norm.weight", "rope_freqs.weight"].contains(&name);
            of_all || of_layer(name) == Some(true) || self.matrices.iter().any(|m| m.name == name)
        };
        match gguf.tensors().iter().find(|tensor| !known(&tensor.name)) {
            None => Ok(()),
            Some(tensor) => Err(Error::new(
                Kind::Unsupported,
                format!(
                    "the model has a tensor {}, which airstream's {} does not compute with",
                    tensor.name, config.arch
                ),
                "use a model of that architecture without such additions",
            )),
        }
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

/// The vectors of a layer, in the order in which [`Vectors::load`] reads them: their names and lengths.
fn layer_vectors(config: &Config) -> Vec<(&'static str, usize)> {
    let dim = config.dim;
    let mut vectors = vec![("attn_norm.weight", dim), ("ffn_norm.weight", dim)];
    if config.qkv_bias {
        vectors.push(("attn_q.bias", config.q_dim()));
        vectors.push(("attn_k.bias", config.kv_dim()));
        vectors.push(("attn_v.bias", config.kv_dim()));
    }
    if config.qk_norm {
        vectors.push(("attn_q_norm.weight", config.head_dim));
        vectors.push(("attn_k_norm.weight", config.head_dim));
    }
    if config.post_norms {
        vectors.push(("post_attention_norm.weight", dim));
        vectors.push(("post_ffw_norm.weight", dim));
    }
    vectors
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
        let layer: usize = layer_vectors(config).iter().map(|&(_, len)| of(len)).sum();
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
            let mut vectors = layer_vectors(config).into_iter();
            let mut next = || -> Result<Span<f32>> {
                let (part, len) = vectors.next().expect("a layer's vectors are listed");
                carve(format!("blk.{layer}.{part}"), len)
            };
            layers.push(LayerVectors {
                attn_norm: next()?,
                ffn_norm: next()?,
                qkv_bias: match config.qkv_bias {
                    true => Some([next()?, next()?, next()?]),
                    false => None,
                },
                qk_norm: match config.qk_norm {
                    true => Some([next()?, next()?]),
                    false => None,
                },
                post_norms: match config.post_norms {
                    true => Some([next()?, next()?]),
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
