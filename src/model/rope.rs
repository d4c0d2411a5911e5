//! Rotary embeddings (RoFormer, <https://arxiv.org/abs/2104.09864>) and how they are stretched to longer contexts:
//! linearly, or by YaRN (<https://arxiv.org/abs/2309.00071>), both as llama.cpp computes them.
//!
//! Llama 3's way is a tensor of factors, `rope_freqs.weight`.

use crate::error::{Error, Kind, Result};
use crate::format::gguf::Gguf;

/// YaRN leaves a pair alone that turns this often, or more often, within the original context.
const YARN_TURNS_FAST: f32 = 32.0;
/// It scales a pair in full that turns this often, or less often, and the pairs between in part.
const YARN_TURNS_SLOW: f32 = 1.0;

/// One rotary embedding of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub base: f32,
    /// Positions are multiplied by this: original context / longer context.
    pub scale: f32,
    /// The original context, in positions, if pairs are scaled by YaRN; else all are scaled alike.
    pub yarn_context: Option<u32>,
    /// Cosines and sines are multiplied by this, and by YaRN's own factor besides.
    pub attention_factor: f32,
}

impl Rope {
    /// Rotation as it was first defined.
    pub fn unscaled(base: f32) -> Rope {
        Rope {
            base,
            scale: 1.0,
            yarn_context: None,
            attention_factor: 1.0,
        }
    }

    /// Reads `{arch}.rope.*` as llama.cpp does: a factor alone is linear, 0 is none, and YaRN's original context is
    /// `context` positions if the file does not say.
    ///
    /// `rope.scaling.yarn_*` are not read, since llama.cpp reads them for other architectures only: a converter may
    /// write a `yarn_attn_factor` that says again what YaRN's own factor is.
    ///
    /// # Errors
    /// The kind of scaling is another one.
    pub fn read(gguf: &Gguf, arch: &str, context: u32) -> Result<Rope> {
        let key = |name: &str| format!("{arch}.rope.{name}");
        let mut rope = Rope::unscaled(gguf.f32(&key("freq_base"))?.unwrap_or(10_000.0));
        if let Some(factor) = gguf.f32(&key("scaling.attn_factor"))? {
            rope.attention_factor = factor;
        }
        let factor = match gguf.f32(&key("scaling.factor"))? {
            Some(factor) => Some(factor),
            None => gguf.f32(&key("scale_linear"))?,
        };
        if let Some(factor) = factor.filter(|&factor| factor != 0.0) {
            rope.scale = 1.0 / factor;
        }
        match gguf.str(&key("scaling.type"))?.unwrap_or("linear") {
            "none" => rope.scale = 1.0,
            "linear" => (),
            "yarn" => {
                let original = gguf.u32(&key("scaling.original_context_length"))?;
                rope.yarn_context = Some(original.filter(|&c| c > 0).unwrap_or(context));
            }
            other => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "the model's context is scaled by {other}, which airstream does not compute"
                    ),
                    "use a model whose context is scaled linearly, by YaRN, as in Llama 3, or not at all",
                ));
            }
        }
        Ok(rope)
    }

    /// Positions that YaRN stretches the original context to; none if it does not.
    pub fn yarn_reach(&self) -> Option<usize> {
        let context = self.yarn_context?;
        Some((f64::from(context) / f64::from(self.scale)).round() as usize)
    }

    /// Whether the numbers can be computed with.
    pub fn is_sound(&self) -> bool {
        [self.base, self.scale, self.attention_factor]
            .iter()
            .all(|value| value.is_finite() && *value > 0.0)
    }

    /// How much of pair `pair`'s own frequency stays, from 0 to 1; the rest is scaled.
    fn kept(&self, pair: usize, dims: usize) -> f32 {
        let Some(context) = self.yarn_context else {
            return 0.0;
        };
        // The pair, as a fraction, that turns so often in the original context. In f32 as llama.cpp has it: rounded
        // another way, the bounds could be other pairs.
        let turning = |turns: f32| {
            let wave = context as f32 / (turns * 2.0 * std::f32::consts::PI);
            dims as f32 * wave.ln() / (2.0 * self.base.ln())
        };
        let low = turning(YARN_TURNS_FAST).floor().max(0.0);
        let high = turning(YARN_TURNS_SLOW).ceil().min(dims as f32 - 1.0);
        1.0 - ((pair as f32 - low) / (high - low).max(0.001)).clamp(0.0, 1.0)
    }

    /// What cosines and sines are multiplied by. YaRN's part makes up for the flatter attention of a longer context.
    fn magnitude(&self) -> f32 {
        match self.yarn_context {
            Some(_) if self.scale < 1.0 => {
                self.attention_factor * (1.0 + 0.1 * (1.0 / self.scale).ln())
            }
            _ => self.attention_factor,
        }
    }
}

/// The angles of one rotary embedding at any position.
pub struct Rotation {
    /// Angle per position of each pair of dimensions that rotates.
    frequencies: Vec<f32>,
    magnitude: f32,
}

impl Rotation {
    /// For heads of which `dims` dimensions rotate. `factors` are Llama 3's divisors, one per pair, or empty.
    pub fn new(rope: &Rope, dims: usize, factors: &[f32]) -> Rotation {
        let frequency = |pair: usize| {
            let wave = f64::from(rope.base).powf(2.0 * pair as f64 / dims as f64);
            let factor = factors.get(pair).copied().unwrap_or(1.0);
            let kept = f64::from(rope.kept(pair, dims));
            let scale = f64::from(rope.scale) * (1.0 - kept) + kept;
            (scale / (wave * f64::from(factor))) as f32
        };
        Rotation {
            frequencies: (0..dims / 2).map(frequency).collect(),
            magnitude: rope.magnitude(),
        }
    }

    /// Writes cosine and sine of `position`'s angle for each pair.
    pub fn angles(&self, position: u32, cos: &mut [f32], sin: &mut [f32]) {
        for ((frequency, cos), sin) in self.frequencies.iter().zip(cos).zip(sin) {
            let (s, c) = (position as f32 * frequency).sin_cos();
            (*sin, *cos) = (s * self.magnitude, c * self.magnitude);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_follow_the_definition() {
        let rope = Rope {
            scale: 0.5,
            ..Rope::unscaled(10_000.0)
        };
        let rotation = Rotation::new(&rope, 8, &[1.0, 2.0, 1.0, 1.0]);
        let table = &rotation.frequencies;
        assert_eq!(table.len(), 4);
        assert!((table[0] - 0.5).abs() < 1e-7 && (table[1] - 0.025).abs() < 1e-7);
        let (mut cos, mut sin) = ([0.0; 4], [0.0; 4]);
        rotation.angles(3, &mut cos, &mut sin);
        assert!((cos[0] - 1.5f32.cos()).abs() < 1e-6 && (sin[1] - 0.075f32.sin()).abs() < 1e-6);
    }

    #[test]
    fn yarn_scales_long_wavelengths_and_leaves_short_ones() {
        let plain = Rope::unscaled(10_000.0);
        let yarn = Rope {
            scale: 0.25,
            yarn_context: Some(2048),
            ..plain
        };
        // Of 64 pairs, those below 16.1 turn more than 32 times in 2048 positions, those above 40.2 less than once;
        // the bounds are rounded outwards.
        let shares = |pair| yarn.kept(pair, 128);
        assert_eq!([0, 15, 16].map(shares), [1.0; 3]);
        assert_eq!([41, 63].map(shares), [0.0; 2]);
        assert_eq!(shares(26), 0.6);
        let (own, scaled) = (
            Rotation::new(&plain, 128, &[]),
            Rotation::new(&yarn, 128, &[]),
        );
        let ratio = |pair: usize| scaled.frequencies[pair] / own.frequencies[pair];
        for (pair, wanted) in [(0, 1.0), (16, 1.0), (26, 0.7), (41, 0.25), (63, 0.25)] {
            assert!(
                (ratio(pair) - wanted).abs() < 1e-6,
                "{pair}: {}",
                ratio(pair)
            );
        }
        // 1 + 0.1 ln 4, on cosines and sines.
        let (mut cos, mut sin) = ([0.0; 64], [0.0; 64]);
        scaled.angles(0, &mut cos, &mut sin);
        assert!(cos.iter().all(|c| (c - 1.138_629_4).abs() < 1e-6) && sin == [0.0; 64]);
        own.angles(0, &mut cos, &mut sin);
        assert_eq!(cos, [1.0; 64]);
    }
}
