//! Gemma 3: norms on both sides of each part, q and k normed, five layers with a sliding window to one without.
//!
//! Gemma 3 technical report, <https://arxiv.org/abs/2503.19786>. The GGUF's norm weights hold 1 + w already.

use super::Architecture;
use crate::device::cpu::Activation;
use crate::model::config::{LayerSpec, RopeBase};

/// Every sixth layer sees the whole context.
const GLOBAL_EVERY: usize = 6;
/// The base of the windowed layers' rotary embedding; the file has that of the others.
const LOCAL_ROPE_BASE: f32 = 10_000.0;
/// The 27B model (the one of 62 layers) scales scores by its row length per head instead of the head length.
const LAYERS_27B: usize = 62;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "gemma3",
    configure: |gguf, config| {
        let window = gguf
            .u32("gemma3.attention.sliding_window")?
            .filter(|&w| w > 0);
        config.ropes.push(RopeBase {
            base: LOCAL_ROPE_BASE,
            scale: 1.0,
        });
        for (index, layer) in config.layers.iter_mut().enumerate() {
            if (index + 1) % GLOBAL_EVERY != 0 {
                *layer = LayerSpec { window, rope: 1 };
            }
        }
        config.activation = Activation::GeluTanh;
        config.embed_scale = (config.dim as f32).sqrt();
        if config.layers.len() == LAYERS_27B {
            config.attention_scale = 1.0 / ((config.dim / config.heads) as f32).sqrt();
        }
        config.qk_norm = true;
        config.post_norms = true;
        Ok(())
    },
};
