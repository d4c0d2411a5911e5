//! Byte-level BPE: pairs of tokens are joined in the order of the merge list
//! (`tokenizer.ggml.model = gpt2`).

use super::index::Index;
use super::merge::{Merger, NONE, Symbol};
use super::pretokenize::PreTokenizer;
use super::vocab::{Spelling, TokenKind, Vocab};

/// One merge: the pair and what it becomes. Its place in the list is its rank.
struct Merge {
    left: u32,
    right: u32,
    merged: u32,
}

/// The merge list, and how text is cut into words first.
pub(super) struct Bpe {
    merges: Box<[Merge]>,
    index: Index,
    byte_tokens: Box<[u32; 256]>,
    pre: PreTokenizer,
}

/// The byte that GPT-2's vocabulary writes as the printable character `c`:
/// printable Latin-1 is itself, the other 68 bytes follow from U+0100 on.
pub(super) fn byte_of(c: char) -> Option<u8> {
    match c as u32 {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Appends the bytes that `text` of the vocabulary or the merge list stands for, if it does.
fn decode(text: &[u8], out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let Ok(text) = std::str::from_utf8(text) else {
        return false;
    };
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                return false;
            }
        }
    }
    true
}

/// Appends a token's bytes as they are put out.
pub(super) fn spell(text: &[u8], kind: TokenKind, out: &mut Vec<u8>) -> Spelling {
    if kind.is_special() {
        out.extend_from_slice(text);
        // A word can only be spelt like a special token whose text is its own spelling.
        let indexed = kind == TokenKind::UserDefined && text.iter().all(u8::is_ascii_graphic);
        return Spelling { kind, indexed };
    }
    let indexed = decode(text, out);
    if !indexed {
        out.extend_from_slice(text);
    }
    Spelling { kind, indexed }
}

impl Bpe {
    /// `merges` are the lines of the merge list: left, a space, right.
    pub(super) fn new<'a>(
        vocab: &Vocab,
        merges: impl Iterator<Item = &'a [u8]> + Clone,
        pre: PreTokenizer,
    ) -> Self {
        let mut list = Vec::with_capacity(merges.clone().count());
        let mut pair = Vec::new();
        let mut useless = 0;
        for line in merges {
            pair.clear();
            // The first byte may itself be a space, so the separator is looked for after it.
            let space = line
                .iter()
                .skip(1)
                .position(|&byte| byte == b' ')
                .map(|at| at + 1);
            let merge = space.and_then(|space| {
                decode(&line[..space], &mut pair).then_some(())?;
                let middle = pair.len();
                decode(&line[space + 1..], &mut pair).then_some(())?;
                let (left, right) = pair.split_at(middle);
                Some(Merge {
                    left: vocab.find(left)?,
                    right: vocab.find(right)?,
                    merged: vocab.find(&pair)?,
                })
            });
            match merge {
                Some(merge) => list.push(merge),
                None => useless += 1,
            }
        }
        if useless > 0 {
            log::warn!("tokenizer: {useless} merges name tokens that the vocabulary does not have");
        }
        let mut index = Index::new(list.len());
        for (rank, merge) in (0u32..).zip(&list) {
            let pair = (merge.left, merge.right);
            index.insert(&pair, rank, |other| list[other as usize].pair() == pair);
        }
        let mut byte_tokens = Box::new([NONE; 256]);
        for byte in 0..=255u8 {
            byte_tokens[byte as usize] = vocab.find(&[byte]).unwrap_or(NONE);
        }
        Bpe {
            merges: list.into(),
            index,
            byte_tokens,
            pre,
        }
    }

    /// Appends the tokens of `text` to `out`. A byte that the vocabulary lacks is left out.
    pub(super) fn encode(
        &self,
        vocab: &Vocab,
        text: &str,
        merger: &mut Merger,
        out: &mut Vec<u32>,
    ) {
        self.pre.split(text, &mut |word| {
            if self.pre.whole_words
                && let Some(id) = vocab.find(word.as_bytes())
            {
                return out.push(id);
            }
            merger.clear();
            for byte in word.bytes() {
                merger.push(1, self.byte_tokens[byte as usize]);
            }
            merger.run(
                |left, right| self.join(left, right),
                |symbol| {
                    if symbol.id != NONE {
                        out.push(symbol.id);
                    }
                },
            );
        });
    }

    fn join(&self, left: &Symbol, right: &Symbol) -> Option<(u32, u32)> {
        let pair = (left.id, right.id);
        let rank = self
            .index
            .find(&pair, |rank| self.merges[rank as usize].pair() == pair)?;
        Some((rank, self.merges[rank as usize].merged))
    }

    /// Bytes of memory the tables take.
    pub(super) fn table_bytes(&self) -> usize {
        size_of_val(&*self.merges) + self.index.bytes() + size_of_val(&*self.byte_tokens)
    }
}

impl Merge {
    fn pair(&self) -> (u32, u32) {
        (self.left, self.right)
    }
}
