//! Text in and out: tokenizer, chat template, sampler.

mod bpe;
mod chat;
mod chat_defaults;
mod ending;
mod index;
mod load;
mod merge;
mod pretokenize;
mod rng;
mod sampler;
mod special;
mod spm;
mod strftime;
mod tokenizer;
mod utf8;
mod vocab;

pub use chat::{ChatTemplate, Message};
pub use sampler::{Sampler, SamplerOptions};
pub use tokenizer::{Parts, Tokenizer};
pub use utf8::Utf8Stream;
pub use vocab::TokenKind;
