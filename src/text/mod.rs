//! Text in and out: tokenizer, chat template, sampler.

mod bpe;
mod ending;
mod index;
mod load;
mod merge;
mod pretokenize;
mod special;
mod spm;
mod tokenizer;
mod utf8;
mod vocab;

pub use tokenizer::{Parts, Tokenizer};
pub use utf8::Utf8Stream;
pub use vocab::TokenKind;
