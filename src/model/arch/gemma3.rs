//! Gemma 3: norms on both sides of each part, q and k normed, five layers with a sliding window to one without.
//!
//! Gemma 3 technical report, <https://arxiv.org/abs/2503.19786>. The GGUF's norm weights hold 1 + w already.

use super::Architecture;
use crate::device::cpu::Activation;
use crate::error::Result;
use crate::format::gguf::Gguf;
use crate::model::config::{LayerSpec, missing, unsound};
use crate::model::rope::Rope;

/// Every sixth layer sees the whole context, if the file does not say otherwise.
const GLOBAL_EVERY: u32 = 6;
/// The base of the windowed layers' rotary embedding, if the file does not say otherwise.
const LOCAL_ROPE_BASE: f32 = 10_000.0;
/// The 27B model (the one of 62 layers) scales scores by its row length per head instead of the head length.
const LAYERS_27B: usize = 62;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "gemma3",
    configure: |gguf, config| {
        // The default of other architectures would be wrong for every Gemma 3.
        if gguf.f32("gemma3.rope.freq_base")?.is_none() {
            return Err(missing("gemma3.rope.freq_base"));
        }
        let window = gguf.u32("gemma3.attention.sliding_window")?;
        // Without a window all layers are global ones.
        if let Some(window) = window.filter(|&positions| positions > 0) {
            config.ropes.push(Rope {
                base: gguf
                    .f32("gemma3.rope.freq_base_swa")?
                    .unwrap_or(LOCAL_ROPE_BASE),
                // The window is shorter than any context, and never scaled.
                scale: 1.0,
                yarn_context: None,
                ..config.ropes[0]
            });
            let local = local_layers(gguf, config.layers.len())?;
            for (layer, _) in config
                .layers
                .iter_mut()
                .zip(local)
                .filter(|(_, local)| *local)
            {
                *layer = LayerSpec {
                    window: Some(window),
                    rope: 1,
                };
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

/// Which layers have the window: the file tells layer by layer, or after how many layers the next global one comes.
fn local_layers(gguf: &Gguf, layers: usize) -> Result<Vec<bool>> {
    const PATTERN: &str = "gemma3.attention.sliding_window_pattern";
    // Of a single value this is an error.
    if let Ok(Some(array)) = gguf.array(PATTERN) {
        let local: Vec<bool> = array.bools()?.collect();
        if local.len() != layers {
            return Err(unsound(format!(
                "{} values of {PATTERN} for {layers} layers",
                local.len()
            )));
        }
        return Ok(local);
    }
    let period = gguf.u32(PATTERN)?.unwrap_or(GLOBAL_EVERY) as usize;
    // As in llama.cpp, a period of 0 is one without end.
    Ok((1..=layers)
        .map(|layer| period == 0 || !layer.is_multiple_of(period))
        .collect())
}
