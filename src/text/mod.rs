//! Text in and out: tokenizer, chat template, sampler.
//!
//! [`ChatTemplate`] turns messages into tokens by way of the [`Tokenizer`], [`Sampler`]
//! chooses the next token from a row of logits, [`Utf8Stream`] puts the bytes of
//! tokens together to characters, and [`Stops`] ends the text at a stop string. Choosing a token and putting out its text allocates
//! nothing; reading a text does, and is done outside of the sweeps.
//!
//! The tokenizer is our own because its tables are a line of the memory budget: for
//! Gemma's 262,144 tokens they take 6.6 MB. Hugging Face's `tokenizers` 0.23, built from
//! the same vocabulary and its 513,511 merges, takes 95 MiB, and 370 MiB while it loads.

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
mod stops;
mod strftime;
mod tokenizer;
mod utf8;
mod vocab;

pub use chat::{ChatTemplate, Message};
pub use sampler::{Sampler, SamplerOptions, SamplerScratch};
pub use stops::Stops;
pub use tokenizer::{Parts, Tokenizer};
pub use utf8::Utf8Stream;
pub use vocab::TokenKind;
