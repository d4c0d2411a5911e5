//! SentencePiece by scores: the neighbours whose join is the best-scored token are joined first
//! (`tokenizer.ggml.model = llama`: Llama 2, Mistral, Gemma).

use super::merge::{Merger, NONE, Symbol};
use super::vocab::{Spelling, TokenKind, Vocab};

/// What SentencePiece writes for a space.
const SPACE: &[u8] = "\u{2581}".as_bytes();

/// Scores of the tokens, and the tokens that stand for single bytes.
pub(super) struct Spm {
    scores: Box<[f32]>,
    byte_tokens: Box<[u32; 256]>,
}

/// Appends a token's bytes as they are put out: spaces for U+2581, the byte of a byte token.
pub(super) fn spell(text: &[u8], kind: TokenKind, out: &mut Vec<u8>) -> Spelling {
    match kind {
        // Merging must not form these out of a user's text.
        TokenKind::Control | TokenKind::Unknown => {
            out.extend_from_slice(text);
            Spelling {
                kind,
                indexed: false,
            }
        }
        TokenKind::Byte => {
            match byte_of(text) {
                Some(byte) => out.push(byte),
                None => out.extend_from_slice(text),
            }
            Spelling {
                kind,
                indexed: false,
            }
        }
        TokenKind::Normal | TokenKind::UserDefined => {
            let escaped = text.windows(SPACE.len()).any(|part| part == SPACE);
            unescape(text, out);
            // A literal space is only ever matched before splitting, U+2581 only by merging.
            let kind = if escaped { TokenKind::Normal } else { kind };
            Spelling {
                kind,
                indexed: !text.contains(&b' '),
            }
        }
    }
}

/// Appends `text` with U+2581 turned into spaces.
fn unescape(text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    while let Some(&byte) = rest.first() {
        if let Some(after) = rest.strip_prefix(SPACE) {
            out.push(b' ');
            rest = after;
        } else {
            out.push(byte);
            rest = &rest[1..];
        }
    }
}

/// The byte that `<0x0A>` stands for.
fn byte_of(text: &[u8]) -> Option<u8> {
    let digits = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    let digits = std::str::from_utf8(digits)
        .ok()
        .filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

impl Spm {
    /// `unknown` stands for the bytes that have no token.
    pub(super) fn new(vocab: &Vocab, scores: Box<[f32]>, unknown: Option<u32>) -> Self {
        let mut byte_tokens = Box::new([unknown.unwrap_or(NONE); 256]);
        for byte in 0..=255u8 {
            if let Some(id) = vocab.find(&[byte]) {
                byte_tokens[byte as usize] = id;
            }
        }
        for id in 0..vocab.len() as u32 {
            if let (TokenKind::Byte, &[byte]) = (vocab.kind(id), vocab.bytes(id)) {
                byte_tokens[byte as usize] = id;
            }
        }
        Spm {
            scores,
            byte_tokens,
        }
    }

    /// Appends the tokens of `text` to `out`, as if a space stood before it if `space_before`.
    pub(super) fn encode(
        &self,
        vocab: &Vocab,
        text: &str,
        space_before: bool,
        merger: &mut Merger,
        out: &mut Vec<u32>,
    ) {
        let mut unescaped = String::with_capacity(text.len() + 1);
        if space_before {
            unescaped.push(' ');
        }
        unescaped.extend(text.chars().map(|c| if c == '\u{2581}' { ' ' } else { c }));
        let bytes = unescaped.as_bytes();
        merger.clear();
        for (at, c) in unescaped.char_indices() {
            let token = &bytes[at..at + c.len_utf8()];
            merger.push(token.len(), vocab.find(token).unwrap_or(NONE));
        }
        let join = |left: &Symbol, right: &Symbol| {
            let id = vocab.find(&bytes[left.start as usize..(right.start + right.len) as usize])?;
            Some((descending(self.scores[id as usize]), id))
        };
        merger.run(join, |symbol| {
            if symbol.id != NONE {
                return out.push(symbol.id);
            }
            let bytes = &bytes[symbol.start as usize..(symbol.start + symbol.len) as usize];
            let tokens = bytes.iter().map(|&byte| self.byte_tokens[byte as usize]);
            out.extend(tokens.filter(|&id| id != NONE));
        });
    }

    /// Bytes of memory the tables take.
    pub(super) fn table_bytes(&self) -> usize {
        size_of_val(&*self.scores) + size_of_val(&*self.byte_tokens)
    }
}

/// A number that is lower for a higher score.
fn descending(score: f32) -> u32 {
    // Adding zero makes -0.0 and 0.0 the same.
    let bits = (score + 0.0).to_bits();
    let ascending = if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    };
    !ascending
}
