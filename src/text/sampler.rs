//! Choosing the next token from the logits.
//!
//! The order is llama.cpp's: bias, penalties, top-k, top-p, min-p, temperature,
//! then one random number. Nothing is allocated after construction, and the
//! vocabulary is never sorted: one pass finds the few candidates that matter.
//! What is large is [`SamplerScratch`], which the samplers of all sessions share.

use super::rng::Rng;
use std::cmp::Ordering;
use std::sync::Arc;

/// How to choose. The default is what llama.cpp's tools use.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerOptions {
    /// Flattens (above 1) or sharpens the distribution; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Only the likeliest `top_k` tokens are candidates; 0 for all.
    pub top_k: usize,
    /// Only the fewest tokens that are together at least this likely; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest; 0 for all.
    pub min_p: f32,
    /// Divides the logit of a token that was said lately; 1 for none.
    pub repeat_penalty: f32,
    /// Taken from the logit for each time that a token was said lately.
    pub frequency_penalty: f32,
    /// Taken from the logit of a token that was said lately at all.
    pub presence_penalty: f32,
    /// How many tokens back is lately, for the three penalties.
    pub penalty_window: usize,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed chooses the same tokens.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_window: 64,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A token that may be chosen.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    logit: f32,
    id: u32,
}

impl Candidate {
    fn new(logit: f32, id: u32) -> Self {
        // No zero is less than the other.
        let logit = if logit == 0.0 { 0.0 } else { logit };
        Candidate { logit, id }
    }

    /// Likeliest first; of equals, the lowest id first.
    fn order(&self, other: &Self) -> Ordering {
        other
            .logit
            .total_cmp(&self.logit)
            .then(self.id.cmp(&other.id))
    }
}

/// Memory that choosing a token takes, and nothing that lasts from one token to the next.
pub struct SamplerScratch {
    candidates: Vec<Candidate>,
}

impl SamplerScratch {
    /// Enough for rows of `vocab` logits and any options.
    pub fn new(vocab: usize) -> Self {
        SamplerScratch {
            candidates: Vec::with_capacity(vocab),
        }
    }

    /// Bytes of the scratch for rows of `vocab` logits.
    pub const fn bytes(vocab: usize) -> usize {
        vocab * size_of::<Candidate>()
    }
}

/// One answer's sampler: options, random numbers and the tokens said lately.
pub struct Sampler {
    options: Arc<SamplerOptions>,
    rng: Rng,
    /// A ring of the last tokens, and the same sorted for counting.
    history: Vec<u32>,
    history_at: usize,
    sorted: Vec<u32>,
}

impl Sampler {
    /// All memory is taken here.
    pub fn new(options: SamplerOptions) -> Self {
        let window = if options.penalizes() {
            options.penalty_window
        } else {
            0
        };
        Sampler {
            rng: Rng::new(options.seed),
            history: Vec::with_capacity(window),
            history_at: 0,
            sorted: Vec::with_capacity(window),
            options: Arc::new(options),
        }
    }

    /// Chooses a token. The logits (one a token) are changed by bias and penalties;
    /// a logit that is not a number is never chosen.
    ///
    /// None if the model has failed: no logit is a number above minus infinity, or one is infinite that no bias has
    /// made so.
    ///
    /// # Panics
    /// There are more logits than the scratch was made for.
    pub fn sample(&mut self, logits: &mut [f32], scratch: &mut SamplerScratch) -> Option<u32> {
        let candidates = &mut scratch.candidates;
        assert!(
            logits.len() <= candidates.capacity(),
            "{} logits",
            logits.len()
        );
        for &(id, bias) in &self.options.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        self.penalize(logits);
        if self.options.temperature <= 0.0 {
            return self.certain(likeliest(logits)?);
        }
        gather(candidates, logits, self.options.top_k);
        self.choose(candidates)
    }

    /// How many of the likeliest tokens are all that it looks at; none if it needs to see all logits.
    pub fn looks_at(&self) -> Option<usize> {
        let options = &self.options;
        if options.penalizes() || !options.logit_bias.is_empty() {
            return None;
        }
        match options.top_k {
            _ if options.temperature <= 0.0 => Some(1),
            0 => None,
            top_k => Some(top_k),
        }
    }

    /// Chooses the token that [`sample`](Self::sample) would choose, from the likeliest tokens and their logits alone:
    /// likeliest first, of equals the lowest id first. There are as many as it [looks at](Self::looks_at), or all that
    /// may be chosen; behind those may come tokens of minus infinity.
    ///
    /// # Panics
    /// It needs to see all logits, or there are more tokens than the scratch was made for.
    pub fn sample_likeliest(
        &mut self,
        tokens: impl Iterator<Item = (u32, f32)>,
        scratch: &mut SamplerScratch,
    ) -> Option<u32> {
        let count = self.looks_at().expect("a sampler that needs few tokens");
        let candidates = &mut scratch.candidates;
        candidates.clear();
        for (id, logit) in tokens.take(count) {
            if logit > f32::NEG_INFINITY {
                assert!(candidates.len() < candidates.capacity(), "too many tokens");
                candidates.push(Candidate::new(logit, id));
            }
        }
        self.choose(candidates)
    }

    /// Chooses one of the candidates, of which the first is the likeliest.
    fn choose(&mut self, candidates: &mut Vec<Candidate>) -> Option<u32> {
        let &best = candidates.first()?;
        if self.options.temperature <= 0.0 || best.logit == f32::INFINITY {
            return self.certain(best);
        }
        cut_top_p(candidates, self.options.top_p);
        cut_min_p(candidates, self.options.min_p);
        Some(draw(candidates, self.options.temperature, &mut self.rng))
    }

    /// The likeliest token, unless it is infinitely likely by a failure of the model's.
    fn certain(&self, best: Candidate) -> Option<u32> {
        let mut biases = self.options.logit_bias.iter();
        let sound = best.logit < f32::INFINITY || biases.any(|(_, bias)| *bias == f32::INFINITY);
        sound.then_some(best.id)
    }

    /// Tells the sampler that the token was said, by the model or in the prompt.
    pub fn accept(&mut self, token: u32) {
        if self.history.len() < self.history.capacity().min(self.options.penalty_window) {
            self.history.push(token);
        } else if let Some(oldest) = self.history.get_mut(self.history_at) {
            *oldest = token;
            self.history_at = (self.history_at + 1) % self.history.len();
        }
    }

    /// Another sampler with the same options, which can [follow](Self::follow) this one. All memory is taken here.
    pub fn another(&self) -> Sampler {
        let history = || Vec::with_capacity(self.history.capacity());
        Sampler {
            options: Arc::clone(&self.options),
            rng: self.rng.clone(),
            history: history(),
            history_at: 0,
            sorted: history(),
        }
    }

    /// Comes to where `other`, of which it is [another](Self::another), stands: what it chooses then is what that one
    /// would.
    pub fn follow(&mut self, other: &Sampler) {
        self.rng = other.rng.clone();
        self.history.clear();
        self.history.extend_from_slice(&other.history);
        self.history_at = other.history_at;
    }

    /// Starts over: nothing said, and the same random numbers again.
    pub fn reset(&mut self) {
        self.rng = Rng::new(self.options.seed);
        self.history.clear();
        self.history_at = 0;
    }

    fn penalize(&mut self, logits: &mut [f32]) {
        let SamplerOptions {
            repeat_penalty,
            frequency_penalty,
            presence_penalty,
            ..
        } = *self.options;
        self.sorted.clear();
        self.sorted.extend_from_slice(&self.history);
        self.sorted.sort_unstable();
        for same in self.sorted.chunk_by(|a, b| a == b) {
            let Some(logit) = logits.get_mut(same[0] as usize) else {
                continue;
            };
            *logit = if *logit <= 0.0 {
                *logit * repeat_penalty
            } else {
                *logit / repeat_penalty
            };
            *logit -= same.len() as f32 * frequency_penalty + presence_penalty;
        }
    }
}

/// Fills `candidates` with the `top_k` likeliest tokens (0 for all), likeliest first.
fn gather(candidates: &mut Vec<Candidate>, logits: &[f32], top_k: usize) {
    let (kept, room) = match top_k {
        0 => (logits.len(), logits.len()),
        // Room to gather more than is kept, so that cutting back is rare.
        _ => (
            top_k.min(logits.len()),
            (top_k.saturating_mul(4)).max(256).min(logits.len()),
        ),
    };
    candidates.clear();
    let mut threshold = f32::NEG_INFINITY;
    let mut first = 0u32;
    for chunk in logits.chunks(CHUNK) {
        if any_above(chunk, threshold) {
            for (id, &logit) in (first..).zip(chunk) {
                if logit > threshold {
                    if candidates.len() == room {
                        threshold = cut_to(candidates, kept);
                        if logit <= threshold {
                            continue;
                        }
                    }
                    candidates.push(Candidate::new(logit, id));
                }
            }
        }
        first += CHUNK as u32;
    }
    cut_to(candidates, kept);
    // With all tokens as candidates, sorting them would cost more than all the rest.
    match top_k {
        0 => sort_first(candidates, SORTED_AT_FIRST),
        _ => candidates.sort_unstable_by(Candidate::order),
    }
}

/// Brings the `count` likeliest candidates to the front, in order.
fn sort_first(candidates: &mut [Candidate], count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, Candidate::order);
        candidates[..count].sort_unstable_by(Candidate::order);
    } else {
        candidates.sort_unstable_by(Candidate::order);
    }
}

fn cut_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let best = candidates[0].logit;
    let weight = |candidate: &Candidate| f64::from((candidate.logit - best).exp());
    let enough = f64::from(top_p) * candidates.iter().map(weight).sum::<f64>();
    let (mut sum, mut kept, mut sorted) = (0.0, 0, SORTED_AT_FIRST);
    while kept < candidates.len() {
        if kept == sorted {
            sorted *= 8;
            sort_first(candidates, sorted);
        }
        sum += weight(&candidates[kept]);
        kept += 1;
        if sum >= enough {
            break;
        }
    }
    candidates.truncate(kept);
}

fn cut_min_p(candidates: &mut Vec<Candidate>, min_p: f32) {
    if min_p > 0.0 {
        let least = candidates[0].logit + min_p.ln();
        let best = candidates[0].id;
        candidates.retain(|candidate| candidate.logit >= least || candidate.id == best);
    }
}

fn draw(candidates: &[Candidate], temperature: f32, rng: &mut Rng) -> u32 {
    let best = candidates[0];
    let weight =
        |candidate: &Candidate| f64::from(((candidate.logit - best.logit) / temperature).exp());
    let sum: f64 = candidates.iter().map(weight).sum();
    let mut left = rng.next() * sum;
    for candidate in candidates {
        left -= weight(candidate);
        if left < 0.0 {
            return candidate.id;
        }
    }
    // Rounding may leave a rest; the likeliest token has the most right to it.
    best.id
}

impl SamplerOptions {
    fn penalizes(&self) -> bool {
        self.repeat_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

/// Logits looked at together: enough for wide vectors, few enough that most are passed over.
const CHUNK: usize = 64;

/// Candidates sorted before any is asked for, where all tokens are candidates.
const SORTED_AT_FIRST: usize = 1024;

/// Whether any logit is above the threshold; written without an early exit, so that it vectorises.
fn any_above(logits: &[f32], threshold: f32) -> bool {
    logits
        .iter()
        .fold(false, |any, &logit| any | (logit > threshold))
}

/// Keeps the `count` likeliest candidates, in any order; the logit of the last of them if any went.
fn cut_to(candidates: &mut Vec<Candidate>, count: usize) -> f32 {
    if candidates.len() <= count {
        return f32::NEG_INFINITY;
    }
    let (_, last, _) = candidates.select_nth_unstable_by(count - 1, Candidate::order);
    let threshold = last.logit;
    candidates.truncate(count);
    threshold
}

/// The token with the highest logit, of equals the lowest; none if no logit is a number above -inf.
fn likeliest(logits: &[f32]) -> Option<Candidate> {
    let (mut best, mut best_id) = (f32::NEG_INFINITY, 0);
    for (chunk_at, chunk) in logits.chunks(CHUNK).enumerate() {
        if any_above(chunk, best) {
            for (at, &logit) in chunk.iter().enumerate() {
                if logit > best {
                    (best, best_id) = (logit, chunk_at * CHUNK + at);
                }
            }
        }
    }
    (best > f32::NEG_INFINITY).then(|| Candidate::new(best, best_id as u32))
}

#[cfg(test)]
mod tests;
