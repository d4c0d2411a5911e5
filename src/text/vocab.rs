//! The token table: one blob of bytes, offsets into it, kinds, and an index from bytes to id.

use super::index::Index;
use crate::error::{Error, Kind, Result};

/// What a token is for (`tokenizer.ggml.token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// Stands for what the vocabulary cannot say.
    Unknown,
    /// Steers the model (begin, end, roles); never read from a user's text.
    Control,
    /// A piece of text that is recognised before anything is split.
    UserDefined,
    /// One byte, for text that no piece covers.
    Byte,
}

impl TokenKind {
    /// The kind with number `ggml_type` in a GGUF file; unused and undefined tokens are text.
    pub fn from_ggml(ggml_type: u32) -> Self {
        match ggml_type {
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            6 => TokenKind::Byte,
            _ => TokenKind::Normal,
        }
    }

    /// Whether the token is cut out of the text before the rest is tokenized.
    pub fn is_special(self) -> bool {
        matches!(
            self,
            TokenKind::Unknown | TokenKind::Control | TokenKind::UserDefined
        )
    }

    /// Whether the token means something to the model that no user's text may say.
    pub fn is_control(self) -> bool {
        matches!(self, TokenKind::Unknown | TokenKind::Control)
    }
}

/// How a token of the file is kept in the table.
pub(super) struct Spelling {
    pub(super) kind: TokenKind,
    /// Whether merging text can end at this token, so that it must be found by its bytes.
    pub(super) indexed: bool,
}

/// Every token's bytes (as they are put out), kind, and id by bytes.
pub(super) struct Vocab {
    bytes: Box<[u8]>,
    /// Where the tokens end in `bytes`: `tokens` entries.
    ends: Box<[u32]>,
    kinds: Box<[TokenKind]>,
    index: Index,
    len_max: usize,
}

impl Vocab {
    /// Reads the tokens twice: once to size the blob, so that nothing grows while loading.
    ///
    /// `spell(id, text, out)` appends to `out` at most as many bytes as `text` has.
    pub(super) fn build<'a>(
        tokens: impl Iterator<Item = &'a [u8]> + Clone,
        mut spell: impl FnMut(u32, &[u8], &mut Vec<u8>) -> Spelling,
    ) -> Result<Self> {
        let count = tokens.clone().count();
        let total: usize = tokens.clone().map(<[u8]>::len).sum();
        if count == 0 || u32::try_from(total).is_err() || u32::try_from(count).is_err() {
            return Err(Error::new(
                Kind::Format,
                format!("the vocabulary has {count} tokens of {total} bytes in all"),
                "get the model file again: its tokenizer is damaged",
            ));
        }
        let mut bytes = Vec::with_capacity(total);
        let mut ends = Vec::with_capacity(count);
        let mut kinds = Vec::with_capacity(count);
        let mut index = Index::new(count);
        let mut len_max = 0;
        for (id, text) in (0u32..).zip(tokens) {
            let start = bytes.len();
            let spelling = spell(id, text, &mut bytes);
            ends.push(bytes.len() as u32);
            kinds.push(spelling.kind);
            if spelling.indexed && start < bytes.len() {
                len_max = len_max.max(bytes.len() - start);
                let token = &bytes[start..];
                index.insert(token, id, |other| slice(&bytes, &ends, other) == token);
            }
        }
        bytes.shrink_to_fit();
        Ok(Vocab {
            bytes: bytes.into(),
            ends: ends.into(),
            kinds: kinds.into(),
            index,
            len_max,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of token `id`, nothing if there is no such token.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        if (id as usize) < self.len() {
            slice(&self.bytes, &self.ends, id)
        } else {
            &[]
        }
    }

    pub(super) fn kind(&self, id: u32) -> TokenKind {
        self.kinds[id as usize]
    }

    /// The token that merging can form from exactly these bytes.
    pub(super) fn find(&self, token: &[u8]) -> Option<u32> {
        if token.len() > self.len_max {
            return None;
        }
        self.index.find(token, |id| self.bytes(id) == token)
    }

    /// The ids of the tokens that are cut out of the text before the rest is tokenized.
    pub(super) fn specials(&self) -> impl Iterator<Item = u32> + '_ {
        (0u32..)
            .zip(&self.kinds)
            .filter(|(_, kind)| kind.is_special())
            .map(|(id, _)| id)
    }

    /// Bytes of memory the tables take.
    pub(super) fn table_bytes(&self) -> usize {
        self.bytes.len() + size_of_val(&*self.ends) + size_of_val(&*self.kinds) + self.index.bytes()
    }
}

fn slice<'a>(bytes: &'a [u8], ends: &[u32], id: u32) -> &'a [u8] {
    let id = id as usize;
    let start = if id == 0 { 0 } else { ends[id - 1] as usize };
    &bytes[start..ends[id] as usize]
}
