//! Draft models: a small model that says what a larger one of the same vocabulary is likely to say next.
//!
//! It is a model of the engine like others, but belongs to the larger one: it comes and goes with it, has as many
//! sessions, stays in memory, and no client sees it. The larger one's sweep computes the drafts' rows beside the row
//! that it has to compute anyway, and each draft that it would have said itself saves a sweep (speculative decoding,
//! arXiv 2211.17192).

use std::path::Path;

use super::loaded::{Loaded, ModelOptions};
use super::plan::CONTEXT_DEFAULT;
use super::scheduler::DRAFTS_MAX;
use crate::error::{Error, Kind, Result};
use crate::text::Tokenizer;

/// What a draft model gets beside a model that gets `main`; `contexts` are what that one and itself were made for.
fn wishes(main: &ModelOptions, contexts: [usize; 2]) -> ModelOptions {
    let [mains, its] = contexts;
    let short = (mains < CONTEXT_DEFAULT).then_some(mains);
    ModelOptions {
        context: main.context.or(short).map(|wanted| wanted.min(its)),
        sessions: main.sessions,
        logits_rows: main.sessions,
        drafts: Some(0),
        // Read again for every draft, it would save nothing.
        resident: true,
        rewinds: DRAFTS_MAX,
        activations: main.activations,
        ..ModelOptions::default()
    }
}

/// Reads a draft model for the model `main`, and says what it gets.
///
/// # Errors
/// It is not a sound GGUF of a supported model, or its vocabulary is another one.
pub(super) fn read(
    path: &Path,
    main: &Loaded,
    wanted: &ModelOptions,
) -> Result<(Loaded, ModelOptions)> {
    let mut drafter = Loaded::read(path)?;
    if let (Some(ours), Some(its)) = (&main.tokenizer, &drafter.tokenizer)
        && let Some(token) = first_difference(ours, its)
    {
        return Err(Error::new(
            Kind::Usage,
            format!(
                "{} cannot draft for this model: token {token} is another one in its vocabulary",
                path.display()
            ),
            "name a smaller model of the same family as the draft model, or a coarser quantization of the same model",
        ));
    }
    // Its tokens are the other model's, so nobody asks for its own words.
    drafter.tokenizer = None;
    let contexts = [main, &drafter].map(|model| model.config.context_max);
    let wishes = wishes(wanted, contexts);
    Ok((drafter, wishes))
}

/// The first token that both vocabularies have with different texts. One may have more tokens than the other, and control
/// tokens may have other names: neither makes a draft wrong.
fn first_difference(ours: &Tokenizer, its: &Tokenizer) -> Option<u32> {
    let both = ours.len().min(its.len()) as u32;
    (0..both).find(|&token| ours.token_bytes(token, false) != its.token_bytes(token, false))
}
