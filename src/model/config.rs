//! What a model is: its shape and its variations on the transformer, read from the GGUF.

use crate::device::cpu::{Activation, RopePairing};
use crate::error::{Error, Kind, Result};
use crate::format::gguf::Gguf;
use crate::model::arch;
use crate::model::rope::Rope;

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSpec {
    /// How many positions a row sees, itself included; all if none.
    pub window: Option<u32>,
    /// Index into [`Config::ropes`].
    pub rope: usize,
}

/// Shape and variations of a model.
#[derive(Debug, Clone)]
pub struct Config {
    /// `general.architecture`.
    pub arch: &'static str,
    /// Values of a row between layers.
    pub dim: usize,
    /// Values inside the feed-forward part.
    pub ff: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// The longest context the model was made for, by training or by stretching its rotary embedding.
    pub context_max: usize,
    /// Added to the mean square in norms.
    pub norm_eps: f32,
    /// Which dimensions rotate together.
    pub pairing: RopePairing,
    /// How many dimensions of a head rotate.
    pub rope_dims: usize,
    /// The rotary embeddings in use.
    pub ropes: Vec<Rope>,
    /// One per layer.
    pub layers: Vec<LayerSpec>,
    /// The gate's activation.
    pub activation: Activation,
    /// Embeddings are multiplied by this.
    pub embed_scale: f32,
    /// Attention scores are multiplied by this.
    pub attention_scale: f32,
    /// Logits are softly capped to this, if given.
    pub logit_softcap: Option<f32>,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// q and k are normed per head.
    pub qk_norm: bool,
    /// The outputs of attention and feed-forward are normed before they are added.
    pub post_norms: bool,
}

impl Config {
    /// Reads the shape of the model in `gguf`.
    ///
    /// # Errors
    /// The architecture is not supported (the error lists those that are), or a key is missing or makes no sense.
    pub fn read(gguf: &Gguf) -> Result<Config> {
        let name = gguf
            .str("general.architecture")?
            .ok_or_else(|| missing("general.architecture"))?;
        let architecture = arch::ALL.iter().find(|a| a.name == name).ok_or_else(|| {
            let known: Vec<&str> = arch::ALL.iter().map(|a| a.name).collect();
            Error::new(
                Kind::Unsupported,
                format!("the model's architecture is {name}, which airstream does not run"),
                format!(
                    "use a model of one of these architectures: {}",
                    known.join(", ")
                ),
            )
        })?;
        let mut config = Config::common(gguf, architecture.name)?;
        (architecture.configure)(gguf, &mut config)?;
        config.check()?;
        Ok(config)
    }

    /// What all architectures share: the keys under the architecture's name.
    fn common(gguf: &Gguf, arch: &'static str) -> Result<Config> {
        let key = |name: &str| format!("{arch}.{name}");
        let needed = |name: &str| -> Result<usize> {
            let value = gguf.u32(&key(name))?.ok_or_else(|| missing(&key(name)))?;
            Ok(value as usize)
        };
        let optional =
            |name: &str| -> Result<Option<usize>> { Ok(gguf.u32(&key(name))?.map(|v| v as usize)) };
        if optional("expert_count")?.is_some_and(|n| n > 0) {
            return Err(Error::new(
                Kind::Unsupported,
                format!("this {arch} model is a mixture of experts"),
                "use a dense model: experts are not supported yet",
            ));
        }
        let layers = needed("block_count")?;
        if layers == 0 || layers > 1024 {
            return Err(unsound(format!("{layers} layers")));
        }
        let alike = |name: &str| same_for_all_layers(gguf, &key(name), layers);
        let needed_alike =
            |name: &str| -> Result<usize> { alike(name)?.ok_or_else(|| missing(&key(name))) };
        let dim = needed("embedding_length")?;
        let heads = needed_alike("attention.head_count")?;
        if dim == 0 || heads == 0 {
            return Err(unsound(format!("{dim} dimensions and {heads} heads")));
        }
        let head_dim = optional("attention.key_length")?.unwrap_or(dim / heads);
        if optional("attention.value_length")?.is_some_and(|v| v != head_dim) {
            return Err(Error::new(
                Kind::Unsupported,
                "keys and values have heads of different length",
                "use a model whose attention.key_length and attention.value_length agree",
            ));
        }
        let embeddings = gguf
            .tensor("token_embd.weight")
            .ok_or_else(|| missing("token_embd.weight"))?;
        let context = needed("context_length")?;
        let rope = Rope::read(gguf, arch, context as u32)?;
        let norm_eps = key("attention.layer_norm_rms_epsilon");
        Ok(Config {
            arch,
            dim,
            ff: needed_alike("feed_forward_length")?,
            heads,
            kv_heads: alike("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab: embeddings.rows,
            // Some files tell the context before YaRN stretched it, some the one after.
            context_max: rope
                .yarn_reach()
                .map_or(context, |reach| reach.max(context)),
            norm_eps: gguf.f32(&norm_eps)?.ok_or_else(|| missing(&norm_eps))?,
            pairing: RopePairing::Halves,
            rope_dims: optional("rope.dimension_count")?.unwrap_or(head_dim),
            ropes: vec![rope],
            layers: vec![
                LayerSpec {
                    window: None,
                    rope: 0
                };
                layers
            ],
            activation: Activation::Silu,
            embed_scale: 1.0,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            logit_softcap: gguf
                .f32(&key("final_logit_softcapping"))?
                .filter(|&cap| cap > 0.0),
            qkv_bias: false,
            qk_norm: false,
            post_norms: false,
        })
    }

    fn check(&self) -> Result<()> {
        let sound = self.ff > 0
            && self.vocab > 0
            && self.context_max > 0
            && self.kv_heads > 0
            && self.heads.is_multiple_of(self.kv_heads)
            && self.rope_dims <= self.head_dim
            && self.rope_dims.is_multiple_of(2)
            && self.norm_eps > 0.0
            && self.ropes.iter().all(Rope::is_sound);
        if !sound {
            return Err(unsound(format!(
                "{} heads, {} key heads, {} of {} head values rotating, {} tokens, context {}",
                self.heads,
                self.kv_heads,
                self.rope_dims,
                self.head_dim,
                self.vocab,
                self.context_max
            )));
        }
        if !self.head_dim.is_multiple_of(16) || self.head_dim > 512 {
            return Err(Error::new(
                Kind::Unsupported,
                format!("heads of {} values", self.head_dim),
                "use a model whose head length is a multiple of 16, at most 512",
            ));
        }
        Ok(())
    }

    /// What is wrong with sessions of `context` positions, if that is more than the model was made for: nothing fails
    /// there, so nobody would notice.
    pub fn beyond(&self, context: usize) -> Option<String> {
        (context > self.context_max).then(|| {
            format!(
                "a context of {context} tokens is more than the {} that the model was made for: answers get worse beyond \
                 those",
                self.context_max
            )
        })
    }

    /// Values of all query heads of a row.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Values of all key (or value) heads of a row.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Products of a weight and an activation in a sweep of so many rows, of which some want logits, for the roofline.
    pub fn products(&self, rows: u64, logits_rows: u64) -> u64 {
        let layer = self.dim * (2 * self.q_dim() + 2 * self.kv_dim() + 3 * self.ff);
        rows * (self.layers.len() * layer) as u64 + logits_rows * (self.dim * self.vocab) as u64
    }
}

/// The value of `key`, which may be an array of one value per layer. Layers that differ are not supported.
fn same_for_all_layers(gguf: &Gguf, key: &str, layers: usize) -> Result<Option<usize>> {
    // Of a single value, the usual case, this is an error.
    let Ok(Some(array)) = gguf.array(key) else {
        return Ok(gguf.u32(key)?.map(|value| value as usize));
    };
    let values = array.u32s()?;
    if values.len() != layers {
        return Err(unsound(format!(
            "{} values of {key} for {layers} layers",
            values.len()
        )));
    }
    let mut values = values.map(|value| value as usize);
    let first = values.next();
    if values.any(|value| Some(value) != first) {
        return Err(Error::new(
            Kind::Unsupported,
            format!("the model's layers differ in {key}"),
            "use a model whose layers are all alike",
        ));
    }
    Ok(first)
}

/// The error for a key or tensor that a sound model has.
pub(super) fn missing(what: &str) -> Error {
    Error::new(
        Kind::Format,
        format!("the model has no {what}"),
        "convert or download the model again",
    )
}

/// The error for metadata that contradicts itself.
pub(super) fn unsound(what: String) -> Error {
    Error::new(
        Kind::Format,
        format!("the model's shape makes no sense: {what}"),
        "convert or download the model again",
    )
}
