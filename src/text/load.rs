//! A tokenizer from the metadata of a GGUF file. Nothing of the file is kept.

use super::tokenizer::{Parts, Tokenizer};
use super::vocab::TokenKind;
use crate::error::{Error, Kind, Result};
use crate::format::gguf::Gguf;

impl Tokenizer {
    /// Builds the tokenizer that the file's `tokenizer.ggml.*` keys describe.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let array = |key: &str| gguf.array(&format!("tokenizer.ggml.{key}"));
        let id = |key: &str| gguf.u32(&format!("tokenizer.ggml.{key}_token_id"));
        let missing = |key: &str| {
            Error::new(
                Kind::Format,
                format!("the model file has no tokenizer.ggml.{key}"),
                "use a GGUF file that carries its tokenizer",
            )
        };
        let model = gguf
            .str("tokenizer.ggml.model")?
            .ok_or_else(|| missing("model"))?;
        let tokens = array("tokens")?
            .ok_or_else(|| missing("tokens"))?
            .strings()?;
        let merges = match array("merges")? {
            Some(merges) => Some(merges.strings()?),
            None if model == "gpt2" => return Err(missing("merges")),
            None => None,
        };
        // The largest vocabularies have two or three merges a token.
        if merges.as_ref().is_some_and(|m| m.len() > 8 * tokens.len()) {
            return Err(Error::new(
                Kind::Format,
                "the tokenizer has far more merges than tokens",
                "get the model file again: its tokenizer is damaged",
            ));
        }
        let scores = match array("scores")? {
            Some(scores) if model != "gpt2" => scores.f32s()?.collect(),
            _ => Box::default(),
        };
        let kinds = match array("token_type")? {
            Some(types) => types.u32s()?.map(TokenKind::from_ggml).collect(),
            None => Box::default(),
        };
        // The ids that llama.cpp takes where the file says nothing.
        let (bos, eos, unknown) = match model {
            "llama" => (Some(1), Some(2), Some(0)),
            _ => (Some(11), Some(11), None),
        };
        let mut ends: Vec<u32> = id("eos")?.or(eos).into_iter().collect();
        for end in ["eot", "eom", "fim_pad", "fim_rep", "fim_sep"] {
            ends.extend(id(end)?);
        }
        Tokenizer::from_parts(Parts {
            model,
            pre: gguf.str("tokenizer.ggml.pre")?.unwrap_or_default(),
            tokens,
            merges: merges.into_iter().flatten(),
            scores,
            kinds,
            bos: id("bos")?.or(bos),
            ends,
            unknown: id("unknown")?.or(unknown),
            add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?,
            add_space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?,
        })
    }
}
