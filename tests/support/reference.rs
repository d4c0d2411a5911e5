//! llama.cpp's stored distributions (`tests/reference/logits.py` writes and describes the files),
//! and how far ours is from them.

use std::fs;
use std::path::Path;

/// What llama.cpp said at every position of one text.
pub struct Reference {
    /// Width of a row of logits.
    pub vocabulary: usize,
    /// One entry per position, in order.
    pub positions: Vec<Position>,
}

/// llama.cpp's distribution of the token after one position: its most probable tokens and the rest as one mass.
pub struct Position {
    /// The token at this position.
    pub token: u32,
    /// Log-probability of the token that follows in the text; NaN at the last position.
    pub next_log_prob: f32,
    /// Log of the probability of all tokens that are not kept.
    pub tail_log_mass: f32,
    /// Kept tokens, most probable first, with their log-probabilities.
    pub kept: Vec<(u32, f32)>,
}

/// How far our distributions are from the reference, over all its positions.
#[derive(Debug)]
pub struct Agreement {
    /// Mean over positions of KL(reference || ours), in nats, over the kept tokens and the tail as one event.
    /// (Merging the tail can only lower a KL divergence; the kept tokens carry all but the tail's mass.)
    pub kl_mean: f64,
    /// The worst position's KL divergence.
    pub kl_max: f64,
    /// Share of positions whose most probable token is the same.
    pub top1: f64,
    /// Our perplexity of the text.
    pub perplexity: f64,
    /// llama.cpp's perplexity of the same positions.
    pub reference_perplexity: f64,
}

const MAGIC: &[u8; 8] = b"ASREF\0\0\x01";

impl Reference {
    /// Read a file that `tests/reference/logits.py` wrote; a damaged one is a panic, since it is a fixture.
    pub fn read(path: &Path) -> Reference {
        let bytes =
            fs::read(path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
        Reference::parse(&bytes).unwrap_or_else(|what| panic!("{}: {what}", path.display()))
    }

    /// Parse the bytes of such a file.
    pub fn parse(bytes: &[u8]) -> Result<Reference, String> {
        let body = bytes
            .strip_prefix(MAGIC)
            .ok_or("not a reference file of this version")?;
        if body.len() % 4 != 0 || body.len() < 12 {
            return Err("truncated".into());
        }
        let mut words = body
            .chunks_exact(4)
            .map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
        let mut next = || words.next().ok_or("truncated");
        let (count, vocabulary, keep) = (next()? as usize, next()? as usize, next()? as usize);
        if (body.len() - 12) / 4 != count * (3 + 2 * keep) {
            return Err(format!(
                "{} bytes are not {count} positions of {keep} tokens",
                bytes.len()
            ));
        }
        let mut positions = Vec::with_capacity(count);
        for _ in 0..count {
            let (token, next_log_prob, tail_log_mass) =
                (next()?, f32::from_bits(next()?), f32::from_bits(next()?));
            let ids = (0..keep).map(|_| next()).collect::<Result<Vec<_>, _>>()?;
            let log_probs = (0..keep)
                .map(|_| next().map(f32::from_bits))
                .collect::<Result<Vec<_>, _>>()?;
            let kept = ids.into_iter().zip(log_probs).collect();
            positions.push(Position {
                token,
                next_log_prob,
                tail_log_mass,
                kept,
            });
        }
        Ok(Reference {
            vocabulary,
            positions,
        })
    }

    /// The token ids of the text, one per position.
    pub fn tokens(&self) -> Vec<u32> {
        self.positions.iter().map(|p| p.token).collect()
    }

    /// Compare with our logits, row-major: positions x vocabulary.
    pub fn agreement(&self, logits: &[f32]) -> Agreement {
        assert_eq!(
            logits.len(),
            self.positions.len() * self.vocabulary,
            "logits of every position are needed"
        );
        let (mut kl_sum, mut kl_max, mut same) = (0.0f64, 0.0f64, 0usize);
        let (mut nll, mut reference_nll) = (0.0f64, 0.0f64);
        for (i, (position, row)) in self
            .positions
            .iter()
            .zip(logits.chunks_exact(self.vocabulary))
            .enumerate()
        {
            let log_mass = log_sum_exp(row);
            let kl = position.kl(row, log_mass);
            kl_sum += kl;
            kl_max = kl_max.max(kl);
            same += usize::from(argmax(row) == position.kept[0].0 as usize);
            if let Some(next) = self.positions.get(i + 1) {
                nll += log_mass - f64::from(row[next.token as usize]);
                reference_nll -= f64::from(position.next_log_prob);
            }
        }
        let count = self.positions.len() as f64;
        Agreement {
            kl_mean: kl_sum / count,
            kl_max,
            top1: same as f64 / count,
            perplexity: (nll / (count - 1.0)).exp(),
            reference_perplexity: (reference_nll / (count - 1.0)).exp(),
        }
    }
}

impl Position {
    /// KL(reference || ours) in nats; `log_mass` is the log-sum-exp of our `row` of logits.
    fn kl(&self, row: &[f32], log_mass: f64) -> f64 {
        let (mut kl, mut ours_kept) = (0.0f64, 0.0f64);
        for &(token, reference) in &self.kept {
            let (reference, ours) = (
                f64::from(reference),
                f64::from(row[token as usize]) - log_mass,
            );
            kl += reference.exp() * (reference - ours);
            ours_kept += ours.exp();
        }
        let tail = f64::from(self.tail_log_mass);
        // Rounding may leave our kept tokens with a hair more than 1; a NaN passes through max unseen,
        // but then kl is already NaN.
        kl + tail.exp() * (tail - (1.0 - ours_kept).max(1e-12).ln())
    }
}

/// The tokens that `tests/reference/synthetic.py` runs a synthetic model on.
pub fn synthetic_tokens(vocabulary: u32) -> Vec<u32> {
    (0..40).map(|i| (i * 7919 + 13) % vocabulary).collect()
}

/// llama.cpp's logits of the synthetic model `name` after each of those tokens, positions x vocabulary.
pub fn synthetic_logits(folder: &Path, name: &str, vocabulary: u32) -> Vec<f32> {
    let path = folder.join(format!("{name}.f32"));
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
    let values: Vec<f32> = bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    assert_eq!(
        values.len(),
        synthetic_tokens(vocabulary).len() * vocabulary as usize,
        "{name}"
    );
    values
}

/// KL(reference || ours) in nats between two whole rows of logits.
pub fn kl_of_logits(reference: &[f32], ours: &[f32]) -> f64 {
    assert_eq!(reference.len(), ours.len());
    let (a, b) = (log_sum_exp(reference), log_sum_exp(ours));
    let pairs = reference.iter().zip(ours);
    pairs
        .map(|(&r, &o)| (f64::from(r) - a).exp() * ((f64::from(r) - a) - (f64::from(o) - b)))
        .sum()
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max)
        + row
            .iter()
            .map(|&x| f64::from(x - max).exp())
            .sum::<f64>()
            .ln()
}

fn argmax(row: &[f32]) -> usize {
    // The first of equals, as a greedy sampler takes it.
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
