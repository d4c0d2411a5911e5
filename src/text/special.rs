//! Special tokens: cut out of the text, longest first, before the rest is tokenized.

use super::index::Index;
use super::vocab::Vocab;
use std::ops::Range;

/// A part of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    /// Bytes of the text that are still to be tokenized.
    Text(Range<usize>),
    /// A special token.
    Token(u32),
}

/// The special tokens of a vocabulary, found by their text.
pub(super) struct Specials {
    /// Their lengths in bytes, longest first.
    lens: Box<[usize]>,
    index: Index,
    /// Whether a special token starts with this byte.
    starts: [bool; 256],
}

impl Specials {
    pub(super) fn new(vocab: &Vocab) -> Self {
        // Only whole characters may be cut out of a text.
        let specials = || {
            let text =
                |&id: &u32| std::str::from_utf8(vocab.bytes(id)).is_ok_and(|text| !text.is_empty());
            vocab.specials().filter(text)
        };
        let mut index = Index::new(specials().count());
        let mut starts = [false; 256];
        let mut lens = Vec::new();
        for id in specials() {
            let text = vocab.bytes(id);
            starts[text[0] as usize] = true;
            if !lens.contains(&text.len()) {
                lens.push(text.len());
            }
            index.insert(text, id, |other| vocab.bytes(other) == text);
        }
        lens.sort_unstable_by(|a, b| b.cmp(a));
        Specials {
            lens: lens.into(),
            index,
            starts,
        }
    }

    /// Cuts `text` into special tokens and the text between them; `controls` says whether
    /// tokens of control kinds are cut out too, or only user-defined ones.
    pub(super) fn cut(&self, vocab: &Vocab, text: &[u8], controls: bool) -> Vec<Part> {
        let mut parts = Vec::new();
        if !text.is_empty() {
            parts.push(Part::Text(0..text.len()));
        }
        if !text.iter().any(|&byte| self.starts[byte as usize]) {
            return parts;
        }
        // Longest first over the whole text, not leftmost first: what a long token takes is
        // no longer there for a short one that starts before it.
        for &len in &self.lens {
            let mut cut = Vec::with_capacity(parts.len());
            for part in parts {
                let Part::Text(range) = part else {
                    cut.push(part);
                    continue;
                };
                let (mut from, mut at) = (range.start, range.start);
                while at + len <= range.end {
                    match self.token(vocab, &text[at..at + len], controls) {
                        Some(id) => {
                            if from < at {
                                cut.push(Part::Text(from..at));
                            }
                            cut.push(Part::Token(id));
                            at += len;
                            from = at;
                        }
                        None => at += 1,
                    }
                }
                if from < range.end {
                    cut.push(Part::Text(from..range.end));
                }
            }
            parts = cut;
        }
        parts
    }

    /// The positions of `text` at which the text of a control token starts.
    pub(super) fn controls_in<'a>(
        &'a self,
        vocab: &'a Vocab,
        text: &'a str,
    ) -> impl Iterator<Item = usize> + 'a {
        text.char_indices().map(|(at, _)| at).filter(move |&at| {
            let rest = &text.as_bytes()[at..];
            self.lens.iter().any(|&len| {
                let token = rest
                    .get(..len)
                    .and_then(|token| self.token(vocab, token, true));
                token.is_some_and(|id| vocab.kind(id).is_control())
            })
        })
    }

    fn token(&self, vocab: &Vocab, text: &[u8], controls: bool) -> Option<u32> {
        if !self.starts[text[0] as usize] {
            return None;
        }
        let id = self.index.find(text, |id| vocab.bytes(id) == text)?;
        (controls || !vocab.kind(id).is_control()).then_some(id)
    }

    /// Bytes of memory the tables take.
    pub(super) fn table_bytes(&self) -> usize {
        self.index.bytes() + size_of_val(&*self.lens) + size_of_val(&self.starts)
    }
}
