//! Small models with random weights from a seed: every architecture, every weight type.
//!
//! They are complete for llama.cpp too (vocabulary model `no_vocab`, so tokens are plain numbers),
//! which is how the reference logits of the forward pass are made. Metadata keys and tensor names
//! are those of llama.cpp's `llama-arch.cpp`. The same spec gives the same bytes everywhere.

use std::path::Path;

use airstream::format::quant::QuantType;

use super::gguf_writer::{GgufWriter, array};
use super::weights::{Rng, random_blocks};

/// The architectures, by their GGUF names in lower case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    Llama,
    Qwen2,
    Qwen3,
    Gemma3,
}

/// Which tensors deviate from a spec's `qtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    /// None: every matrix has it.
    None,
    /// As Q4_K_M files do: Q6_K for the embeddings, the output, and `attn_v` and `ffn_down` of every other layer.
    MoreBits,
    /// As files do whose rows are no multiple of 256: Q8_0 embeddings and `attn_v`, Q5_0 `attn_k`.
    SmallBlocks,
}

/// A small model. Sizes are in values, as in the metadata.
#[derive(Debug, Clone)]
pub struct SynthSpec {
    pub arch: Arch,
    pub qtype: QuantType,
    pub mix: Mix,
    pub seed: u64,
    pub layers: u32,
    pub embd: u32,
    pub ffn: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub vocab: u32,
    /// Without `output.weight`: the embeddings are the output matrix too.
    pub tied: bool,
    /// With `rope_freqs.weight`, Llama 3's scaling of the rotation frequencies.
    pub rope_factors: bool,
    /// Changes the metadata to what sets a variant apart.
    pub metadata: fn(&mut GgufWriter),
}

impl SynthSpec {
    /// The architecture's usual shape in small.
    pub fn new(arch: Arch, qtype: QuantType, seed: u64) -> Self {
        let (layers, heads, kv_heads, head_dim) = match arch {
            Arch::Llama => (2, 8, 2, 32),
            Arch::Qwen2 => (3, 4, 2, 64),
            Arch::Qwen3 => (2, 4, 2, 128),
            // Layers 0 to 4 and 6 see a window, layer 5 everything.
            Arch::Gemma3 => (7, 2, 1, 256),
        };
        SynthSpec {
            arch,
            qtype,
            mix: Mix::None,
            seed,
            layers,
            embd: 256,
            ffn: 512,
            heads,
            kv_heads,
            head_dim,
            vocab: 320,
            tied: arch == Arch::Gemma3,
            rope_factors: false,
            metadata: |_| (),
        }
    }

    fn type_of(&self, tensor: &str, layer: u32) -> QuantType {
        let embeddings = matches!(tensor, "token_embd" | "output");
        match (self.mix, tensor) {
            (Mix::MoreBits, _) if embeddings => QuantType::Q6_K,
            (Mix::MoreBits, "attn_v" | "ffn_down") if layer.is_multiple_of(2) => QuantType::Q6_K,
            (Mix::SmallBlocks, _) if embeddings => QuantType::Q8_0,
            (Mix::SmallBlocks, "attn_v") => QuantType::Q8_0,
            (Mix::SmallBlocks, "attn_k") => QuantType::Q5_0,
            _ => self.qtype,
        }
    }
}

/// All specs under the names of their files, without extension.
pub fn all_specs() -> Vec<(String, SynthSpec)> {
    let mut specs: Vec<(String, SynthSpec)> = Vec::new();
    let mut add = |arch, qtype: QuantType, note: &str, change: fn(&mut SynthSpec)| {
        let mut spec = SynthSpec::new(arch, qtype, 1 + specs.len() as u64);
        change(&mut spec);
        let arch = format!("{arch:?}").to_lowercase();
        specs.push((
            format!("{arch}-{}{note}", qtype.name().to_lowercase()),
            spec,
        ));
    };
    for qtype in QuantType::ALL {
        add(Arch::Llama, qtype, "", |_| ());
    }
    add(Arch::Llama, QuantType::Q8_0, "-tied", |s| s.tied = true);
    add(Arch::Llama, QuantType::Q5_K, "-rope-factors", |s| {
        s.rope_factors = true;
        s.kv_heads = 1;
    });
    add(Arch::Llama, QuantType::Q4_K, "-more-bits", |s| {
        s.mix = Mix::MoreBits;
        s.kv_heads = 8;
    });
    // Numbers of rows that are no multiple of 16, with and without quant blocks.
    add(Arch::Llama, QuantType::Q4_K, "-odd-vocab", |s| {
        s.vocab = 331
    });
    add(Arch::Llama, QuantType::F16, "-odd-rows", |s| {
        s.ffn = 500;
        s.vocab = 331;
    });
    // Rows that are no multiple of 256, as in SmolLM2.
    add(Arch::Llama, QuantType::Q4_1, "-narrow", |s| {
        s.mix = Mix::SmallBlocks;
        (s.embd, s.heads, s.kv_heads, s.ffn) = (288, 9, 3, 480);
        s.tied = true;
    });
    add(Arch::Qwen2, QuantType::Q8_0, "", |_| ());
    add(Arch::Qwen2, QuantType::Q5_1, "-tied", |s| s.tied = true);
    add(Arch::Qwen2, QuantType::Q4_K, "-more-bits", |s| {
        s.mix = Mix::MoreBits
    });
    add(Arch::Qwen3, QuantType::Q4_0, "", |_| ());
    add(Arch::Qwen3, QuantType::BF16, "", |_| ());
    add(Arch::Qwen3, QuantType::Q5_K, "-more-bits-tied", |s| {
        s.mix = Mix::MoreBits;
        s.tied = true;
        (s.heads, s.kv_heads) = (6, 3);
    });
    add(Arch::Gemma3, QuantType::Q8_0, "", |_| ());
    add(Arch::Gemma3, QuantType::Q4_K, "-small-blocks", |s| {
        s.mix = Mix::SmallBlocks
    });
    add(Arch::Gemma3, QuantType::Q6_K, "-gqa", |s| {
        (s.heads, s.kv_heads, s.head_dim) = (4, 2, 128)
    });
    // Other layers with a window than the architecture's default says, and none.
    add(Arch::Gemma3, QuantType::Q8_0, "-no-window", |s| {
        s.metadata = |file| {
            let window = "gemma3.attention.sliding_window";
            file.entries.retain(|(name, _, _)| name != window);
        }
    });
    add(Arch::Gemma3, QuantType::Q8_0, "-third-global", |s| {
        s.metadata = |file| {
            file.u32("gemma3.attention.sliding_window_pattern", 3);
            file.f32("gemma3.rope.freq_base_swa", 500.0);
        }
    });
    add(Arch::Gemma3, QuantType::Q8_0, "-window-by-layer", |s| {
        s.metadata = |file| {
            let local = array(7, 7, &[1, 0, 0, 1, 0, 1, 1]);
            file.entry("gemma3.attention.sliding_window_pattern", 9, &local);
        }
    });
    // Contexts stretched by YaRN: 40 tokens are far beyond an original context of 16, where all but a few pairs
    // are scaled; in one of 1024, some are left as they are.
    add(Arch::Qwen3, QuantType::BF16, "-yarn", |s| {
        s.metadata = |file| yarn(file, "qwen3", 4.0, 16)
    });
    add(Arch::Llama, QuantType::F16, "-yarn", |s| {
        s.metadata = |file| {
            yarn(file, "llama", 8.0, 16);
            file.f32("llama.rope.scaling.attn_factor", 0.9);
        }
    });
    add(Arch::Qwen2, QuantType::F16, "-yarn-ramp", |s| {
        s.metadata = |file| yarn(file, "qwen2", 4.0, 1024)
    });
    add(Arch::Gemma3, QuantType::F16, "-yarn", |s| {
        s.metadata = |file| yarn(file, "gemma3", 4.0, 64)
    });
    specs
}

/// Adds YaRN's metadata.
fn yarn(file: &mut GgufWriter, arch: &str, factor: f32, context: u32) {
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    file.str(&key("type"), "yarn");
    file.f32(&key("factor"), factor);
    file.u32(&key("original_context_length"), context);
    // llama.cpp does not take these from files of these architectures.
    file.f32(&key("yarn_attn_factor"), 1.5);
    file.f32(&key("yarn_beta_fast"), 16.0);
}

/// Writes the model of `spec` to `path`.
pub fn write(spec: &SynthSpec, path: &Path) -> std::io::Result<()> {
    write_with(spec, path, |_| ())
}

/// The same with more metadata.
pub fn write_with(
    spec: &SynthSpec,
    path: &Path,
    add: impl FnOnce(&mut GgufWriter),
) -> std::io::Result<()> {
    std::fs::write(path, file_of(spec, add).to_bytes())
}

/// The file of `spec`'s model, with more metadata.
pub fn file_of(spec: &SynthSpec, add: impl FnOnce(&mut GgufWriter)) -> GgufWriter {
    let mut model = Model {
        spec,
        rng: Rng(spec.seed),
        file: GgufWriter::new(),
    };
    model.metadata();
    add(&mut model.file);
    model.weights();
    model.file
}

struct Model<'a> {
    spec: &'a SynthSpec,
    rng: Rng,
    file: GgufWriter,
}

impl Model<'_> {
    fn metadata(&mut self) {
        let s = self.spec;
        let arch = format!("{:?}", s.arch).to_lowercase();
        let file = &mut self.file;
        file.str("general.architecture", &arch);
        file.str("general.name", &format!("random {arch}, seed {}", s.seed));
        for (key, value) in [
            ("vocab_size", s.vocab),
            ("context_length", 4096),
            ("embedding_length", s.embd),
            ("block_count", s.layers),
            ("feed_forward_length", s.ffn),
            ("attention.head_count", s.heads),
            ("attention.head_count_kv", s.kv_heads),
        ] {
            file.u32(&format!("{arch}.{key}"), value);
        }
        let (eps, rope_base) = match s.arch {
            Arch::Llama => (1e-5, if s.rope_factors { 500_000.0 } else { 10_000.0 }),
            Arch::Qwen2 | Arch::Qwen3 | Arch::Gemma3 => (1e-6, 1_000_000.0),
        };
        file.f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), eps);
        file.f32(&format!("{arch}.rope.freq_base"), rope_base);
        match s.arch {
            Arch::Llama => file.u32(&format!("{arch}.rope.dimension_count"), s.head_dim),
            Arch::Qwen2 => (),
            Arch::Qwen3 | Arch::Gemma3 => {
                file.u32(&format!("{arch}.attention.key_length"), s.head_dim);
                file.u32(&format!("{arch}.attention.value_length"), s.head_dim);
            }
        }
        if s.arch == Arch::Gemma3 {
            // So small that a short text already leaves it. The pattern (each sixth layer sees all)
            // and the windowed layers' rope base of 10000 are the architecture's defaults.
            file.u32(&format!("{arch}.attention.sliding_window"), 24);
        }
        file.str("tokenizer.ggml.model", "no_vocab");
        (s.metadata)(file);
    }

    fn weights(&mut self) {
        let s = self.spec;
        let (q_dim, kv_dim) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        self.matrix("token_embd", None, s.embd, s.vocab, 1.0);
        if s.rope_factors {
            self.rope_factors();
        }
        for layer in 0..s.layers {
            self.norm("attn_norm", Some(layer), s.embd);
            self.matrix("attn_q", Some(layer), s.embd, q_dim, 1.5);
            self.matrix("attn_k", Some(layer), s.embd, kv_dim, 1.5);
            self.matrix("attn_v", Some(layer), s.embd, kv_dim, 1.0);
            self.matrix("attn_output", Some(layer), q_dim, s.embd, 1.0);
            match s.arch {
                Arch::Llama => (),
                Arch::Qwen2 => {
                    for (name, rows) in [("attn_q", q_dim), ("attn_k", kv_dim), ("attn_v", kv_dim)]
                    {
                        self.vector(&format!("blk.{layer}.{name}.bias"), rows, |r| {
                            r.range(-0.5, 0.5)
                        });
                    }
                }
                Arch::Qwen3 | Arch::Gemma3 => {
                    self.norm("attn_q_norm", Some(layer), s.head_dim);
                    self.norm("attn_k_norm", Some(layer), s.head_dim);
                }
            }
            if s.arch == Arch::Gemma3 {
                self.norm("post_attention_norm", Some(layer), s.embd);
            }
            self.norm("ffn_norm", Some(layer), s.embd);
            self.matrix("ffn_gate", Some(layer), s.embd, s.ffn, 1.0);
            self.matrix("ffn_up", Some(layer), s.embd, s.ffn, 1.0);
            self.matrix("ffn_down", Some(layer), s.ffn, s.embd, 1.0);
            if s.arch == Arch::Gemma3 {
                self.norm("post_ffw_norm", Some(layer), s.embd);
            }
        }
        // Large, so that the logits differ clearly; of both signs, or a model whose output matrix is
        // its embeddings would answer every token with itself.
        self.vector("output_norm.weight", s.embd, |r| {
            let sign = if r.next().is_multiple_of(2) {
                1.0
            } else {
                -1.0
            };
            sign * r.range(1.5, 2.5)
        });
        if !s.tied {
            self.matrix("output", None, s.embd, s.vocab, 1.0);
        }
    }

    /// A matrix whose product with a vector of deviation 1 has deviation `gain`.
    fn matrix(&mut self, name: &str, layer: Option<u32>, cols: u32, rows: u32, gain: f32) {
        let qtype = self.spec.type_of(name, layer.unwrap_or(0));
        let values = cols as usize * rows as usize;
        let deviation = gain / (cols as f32).sqrt();
        let data = random_blocks(&mut self.rng, qtype, values, deviation);
        self.file.tensor(
            &full_name(name, layer),
            &[cols.into(), rows.into()],
            qtype,
            data,
        );
    }

    /// The weights of an RMS norm.
    fn norm(&mut self, name: &str, layer: Option<u32>, len: u32) {
        self.vector(&full_name(name, layer), len, |r| r.range(0.75, 1.25));
    }

    fn vector(&mut self, name: &str, len: u32, mut value: impl FnMut(&mut Rng) -> f32) {
        let data = (0..len)
            .flat_map(|_| value(&mut self.rng).to_le_bytes())
            .collect();
        self.file.tensor(name, &[len.into()], QuantType::F32, data);
    }

    /// Llama 3's divisors of the rotation frequencies, as its converter computes them, with a factor
    /// of 8 and a first context of 64 positions, so that they matter in a short text.
    fn rope_factors(&mut self) {
        let (factor, low, high, context) = (8.0, 1.0, 4.0, 64.0);
        let head_dim = self.spec.head_dim;
        let mut i = 0;
        self.vector("rope_freqs.weight", head_dim / 2, |_| {
            let wave_length =
                std::f64::consts::TAU * 500_000f64.powf(f64::from(2 * i) / f64::from(head_dim));
            i += 1;
            let waves: f64 = context / wave_length;
            let smooth = ((waves - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        });
    }
}

fn full_name(name: &str, layer: Option<u32>) -> String {
    match layer {
        Some(layer) => format!("blk.{layer}.{name}.weight"),
        None => format!("{name}.weight"),
    }
}
