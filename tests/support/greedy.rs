//! The most likely tokens, one after the other.

use airstream::engine::{Engine, ModelId, Spent};

/// The `count` most likely tokens after `prompt`, one after the other.
pub fn greedy(engine: &mut Engine, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut spent = Spent::default();
    engine
        .prefill(ModelId::FIRST, 0, prompt, &mut spent, |_| true)
        .expect("prefill");
    let mut tokens = Vec::with_capacity(count);
    loop {
        tokens.push(argmax(engine.logits(ModelId::FIRST, 0)));
        if tokens.len() == count {
            return tokens;
        }
        engine
            .decode(ModelId::FIRST, 0, tokens[tokens.len() - 1], &mut spent)
            .expect("decode");
    }
}

/// The index of the largest value, the lowest of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, value) in logits.iter().enumerate() {
        if *value > logits[best] {
            best = i;
        }
    }
    best as u32
}
