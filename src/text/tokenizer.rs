//! Text to tokens and back, with exactly llama.cpp's ids.

use super::bpe::{self, Bpe};
use super::ending;
use super::merge::Merger;
use super::pretokenize::PreTokenizer;
use super::special::{Part, Specials};
use super::spm::{self, Spm};
use super::vocab::{TokenKind, Vocab};
use crate::error::{Error, Kind, Result};

/// What a tokenizer is made of, however it is stored. `T` and `M` iterate over byte strings.
pub struct Parts<'a, T, M> {
    /// `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: &'a str,
    /// The name of the pre-tokenizer, for `gpt2`.
    pub pre: &'a str,
    /// The tokens as the vocabulary writes them.
    pub tokens: T,
    /// The merge list, for `gpt2`.
    pub merges: M,
    /// One score a token, for `llama`.
    pub scores: Box<[f32]>,
    /// One kind a token; if there are fewer, the rest are normal.
    pub kinds: Box<[TokenKind]>,
    /// The token that starts a text.
    pub bos: Option<u32>,
    /// Tokens that the file names as ends of a text or a turn; the first is the one of a text.
    pub ends: Vec<u32>,
    /// The token for what cannot be said.
    pub unknown: Option<u32>,
    /// Whether a text starts with BOS; without it, what is usual for the model.
    pub add_bos: Option<bool>,
    /// Whether `llama` puts a space before a text; without it, yes.
    pub add_space_prefix: Option<bool>,
}

/// Turns text into token ids, and ids into bytes.
pub struct Tokenizer {
    vocab: Vocab,
    specials: Specials,
    model: Model,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Tokens after which generation ends, ascending.
    eog: Box<[u32]>,
    add_bos: bool,
}

enum Model {
    Bpe(Bpe),
    Spm { spm: Spm, space_prefix: bool },
}

/// What stands before a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// BOS, if the vocabulary has one.
    Bos,
    /// Nothing.
    New,
    /// Other text, which has its tokens already: no space is put in between.
    Within,
}

impl Tokenizer {
    /// Builds the tables; nothing of `parts` is kept.
    pub fn from_parts<'a, T, M>(parts: Parts<'_, T, M>) -> Result<Self>
    where
        T: Iterator<Item = &'a [u8]> + Clone,
        M: Iterator<Item = &'a [u8]> + Clone,
    {
        let spell = match parts.model {
            "gpt2" => bpe::spell,
            "llama" => spm::spell,
            other => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("the tokenizer of the model is '{other}'"),
                    "use a model whose tokenizer.ggml.model is gpt2 (byte-level BPE) or llama (SentencePiece)",
                ));
            }
        };
        let mut eog = parts.ends.clone();
        let vocab = Vocab::build(parts.tokens, |id, text, out| {
            let declared = parts
                .kinds
                .get(id as usize)
                .copied()
                .unwrap_or(TokenKind::Normal);
            if ending::ends_generation(text) {
                eog.push(id);
            }
            spell(text, ending::kind(text, declared), out)
        })?;
        let known = |id: &u32| (*id as usize) < vocab.len();
        let (bos, unknown) = (parts.bos.filter(known), parts.unknown.filter(known));
        let eos = parts.ends.first().copied().filter(known);
        eog.retain(known);
        eog.sort_unstable();
        eog.dedup();
        ending::drop_false_ends(&mut eog, |id| vocab.bytes(id));
        let pre_add_bos;
        let model = if parts.model == "gpt2" {
            let pre = PreTokenizer::named(parts.pre)?;
            pre_add_bos = pre.add_bos;
            Model::Bpe(Bpe::new(&vocab, parts.merges, pre))
        } else {
            if parts.scores.len() < vocab.len() {
                return Err(Error::new(
                    Kind::Format,
                    format!(
                        "the tokenizer has {} scores for {} tokens",
                        parts.scores.len(),
                        vocab.len()
                    ),
                    "get the model file again: its tokenizer is damaged",
                ));
            }
            pre_add_bos = true;
            let spm = Spm::new(&vocab, parts.scores, unknown);
            Model::Spm {
                spm,
                space_prefix: parts.add_space_prefix.unwrap_or(true),
            }
        };
        let add_bos = parts.add_bos.unwrap_or(pre_add_bos) && bos.is_some();
        let specials = Specials::new(&vocab);
        Ok(Tokenizer {
            vocab,
            specials,
            model,
            bos,
            eos,
            eog: eog.into(),
            add_bos,
        })
    }

    /// Appends the tokens of `text` to `out`.
    ///
    /// `add_bos` puts BOS before them (the caller's choice; see [`add_bos_default`]).
    /// `parse_special` reads the texts of control tokens as these tokens: only for text
    /// that is trusted, such as a chat template's.
    ///
    /// [`add_bos_default`]: Tokenizer::add_bos_default
    pub fn encode(&self, text: &str, add_bos: bool, parse_special: bool, out: &mut Vec<u32>) {
        let start = if add_bos { Start::Bos } else { Start::New };
        self.encode_parts(text, start, parse_special, None, out);
    }

    /// Appends the tokens of `text` where it goes on with a text.
    ///
    /// `parse_special` is that of [`encode`](Tokenizer::encode).
    pub fn encode_on(&self, text: &str, parse_special: bool, out: &mut Vec<u32>) {
        self.encode_parts(text, Start::Within, parse_special, None, out);
    }

    /// As [`encode`](Tokenizer::encode), but `marker` is taken out of the text
    /// once the special tokens are cut out.
    pub(super) fn encode_parts(
        &self,
        text: &str,
        start: Start,
        parse_special: bool,
        marker: Option<char>,
        out: &mut Vec<u32>,
    ) {
        if let Some(bos) = self.bos.filter(|_| start == Start::Bos) {
            out.push(bos);
        }
        let mut merger = Merger::default();
        let mut after_special = start != Start::Within;
        let mut buffer = String::new();
        for part in self
            .specials
            .cut(&self.vocab, text.as_bytes(), parse_special)
        {
            let range = match part {
                Part::Token(id) => {
                    out.push(id);
                    after_special = true;
                    continue;
                }
                Part::Text(range) => range,
            };
            let mut part = &text[range];
            if let Some(marker) = marker.filter(|&marker| part.contains(marker)) {
                buffer.clear();
                buffer.extend(part.chars().filter(|&c| c != marker));
                part = &buffer;
            }
            if part.is_empty() {
                continue;
            }
            match &self.model {
                Model::Bpe(bpe) => bpe.encode(&self.vocab, part, &mut merger, out),
                Model::Spm { spm, space_prefix } => {
                    spm.encode(
                        &self.vocab,
                        part,
                        *space_prefix && after_special,
                        &mut merger,
                        out,
                    );
                }
            }
            after_special = false;
        }
    }

    /// `content` with `marker` inside of every text of a control token, so that none is
    /// read as one when [`encode_parts`](Tokenizer::encode_parts) is given the marker.
    pub(super) fn break_controls(&self, content: &str, marker: char) -> String {
        let mut broken = String::with_capacity(content.len() + 16);
        let mut from = 0;
        for start in self.specials.controls_in(&self.vocab, content) {
            let first = content[start..].chars().next().map_or(0, char::len_utf8);
            broken.push_str(&content[from..start + first]);
            broken.push(marker);
            from = start + first;
        }
        broken.push_str(&content[from..]);
        broken
    }

    /// Whether the model wants BOS before a text.
    pub fn add_bos_default(&self) -> bool {
        self.add_bos
    }

    /// The bytes of a token's text. They need not be whole characters: see [`Utf8Stream`].
    ///
    /// Control tokens have no text unless `special` asks for their names; a token that
    /// does not exist has none.
    ///
    /// [`Utf8Stream`]: super::Utf8Stream
    pub fn token_bytes(&self, id: u32, special: bool) -> &[u8] {
        if (id as usize) < self.len() && !special && self.vocab.kind(id).is_control() {
            return &[];
        }
        self.vocab.bytes(id)
    }

    /// Whether generation ends with this token: the end of the text or of a turn.
    pub fn is_eog(&self, id: u32) -> bool {
        self.eog.binary_search(&id).is_ok()
    }

    /// The token that starts a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The control token whose text is `text`.
    pub fn control(&self, text: &str) -> Option<u32> {
        match self.specials.cut(&self.vocab, text.as_bytes(), true)[..] {
            [Part::Token(id)] => Some(id),
            _ => None,
        }
    }

    /// The number of tokens.
    #[allow(clippy::len_without_is_empty)] // A vocabulary is never empty.
    pub fn len(&self) -> usize {
        self.vocab.len()
    }

    /// Bytes of memory the tables take: a line of the budget.
    pub fn table_bytes(&self) -> usize {
        let model = match &self.model {
            Model::Bpe(bpe) => bpe.table_bytes(),
            Model::Spm { spm, .. } => spm.table_bytes(),
        };
        self.vocab.table_bytes() + self.specials.table_bytes() + model + size_of_val(&*self.eog)
    }
}

#[cfg(test)]
mod tests;
