//! Angles of the rotary embeddings (RoFormer, <https://arxiv.org/abs/2104.09864>).

use crate::model::config::RopeBase;

/// Angle per position of each rotating pair: `scale / (base^(2i/dims) * factors[i])`.
///
/// `factors` are Llama 3's, one per pair, or empty.
pub fn frequencies(rope: &RopeBase, dims: usize, factors: &[f32]) -> Vec<f32> {
    (0..dims / 2)
        .map(|i| {
            let wave = f64::from(rope.base).powf(2.0 * i as f64 / dims as f64);
            let factor = factors.get(i).copied().unwrap_or(1.0);
            (f64::from(rope.scale) / (wave * f64::from(factor))) as f32
        })
        .collect()
}

/// Writes cosine and sine of `position`'s angle for each pair.
pub fn angles(frequencies: &[f32], position: u32, cos: &mut [f32], sin: &mut [f32]) {
    for ((frequency, cos), sin) in frequencies.iter().zip(cos).zip(sin) {
        (*sin, *cos) = (position as f32 * frequency).sin_cos();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_follow_the_definition() {
        let rope = RopeBase {
            base: 10000.0,
            scale: 0.5,
        };
        let table = frequencies(&rope, 8, &[1.0, 2.0, 1.0, 1.0]);
        assert_eq!(table.len(), 4);
        assert!((table[0] - 0.5).abs() < 1e-7 && (table[1] - 0.025).abs() < 1e-7);
        let (mut cos, mut sin) = ([0.0; 4], [0.0; 4]);
        angles(&table, 3, &mut cos, &mut sin);
        assert!((cos[0] - 1.5f32.cos()).abs() < 1e-6 && (sin[1] - 0.075f32.sin()).abs() < 1e-6);
    }
}
