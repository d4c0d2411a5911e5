//! Joining neighbouring symbols, best pair first: the loop that byte-level BPE and SentencePiece share.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The end of the chain, and the id of a symbol that is no token.
pub(super) const NONE: u32 = u32::MAX;

/// A run of bytes of the text that is, so far, one token.
#[derive(Clone, Copy)]
pub(super) struct Symbol {
    pub(super) start: u32,
    /// 0 once the symbol was joined to the one on its left.
    pub(super) len: u32,
    /// The token with these bytes, or [`NONE`].
    pub(super) id: u32,
    prev: u32,
    next: u32,
}

/// A pair worth joining: lowest priority first, then leftmost.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    priority: u32,
    left: u32,
    right: u32,
    /// Bytes of both when the pair was found; another number later means that it is out of date.
    len: u32,
    id: u32,
}

/// Scratch for merging, reused from word to word.
#[derive(Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Pair>>,
}

impl Merger {
    pub(super) fn clear(&mut self) {
        self.symbols.clear();
        self.queue.clear();
    }

    /// Appends the next symbol of the text, `len` bytes.
    pub(super) fn push(&mut self, len: usize, id: u32) {
        let at = self.symbols.len() as u32;
        let start = self.symbols.last().map_or(0, |last| last.start + last.len);
        if let Some(last) = self.symbols.last_mut() {
            last.next = at;
        }
        self.symbols.push(Symbol {
            start,
            len: len as u32,
            id,
            prev: at.wrapping_sub(1),
            next: NONE,
        });
    }

    /// Joins pairs until `join` (left, right -> priority and token of the pair) finds none,
    /// then calls `each` for the symbols that are left, in order.
    pub(super) fn run(
        &mut self,
        join: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>,
        mut each: impl FnMut(&Symbol),
    ) {
        for right in 1..self.symbols.len() as u32 {
            self.consider(right - 1, right, &join);
        }
        while let Some(Reverse(pair)) = self.queue.pop() {
            let (left, right) = (
                self.symbols[pair.left as usize],
                self.symbols[pair.right as usize],
            );
            if left.len == 0 || right.len == 0 || left.len + right.len != pair.len {
                continue;
            }
            let merged = &mut self.symbols[pair.left as usize];
            merged.len = pair.len;
            merged.id = pair.id;
            merged.next = right.next;
            self.symbols[pair.right as usize].len = 0;
            if right.next != NONE {
                self.symbols[right.next as usize].prev = pair.left;
                self.consider(pair.left, right.next, &join);
            }
            if left.prev != NONE {
                self.consider(left.prev, pair.left, &join);
            }
        }
        self.symbols
            .iter()
            .filter(|symbol| symbol.len > 0)
            .for_each(&mut each);
    }

    fn consider(
        &mut self,
        left: u32,
        right: u32,
        join: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>,
    ) {
        let (l, r) = (&self.symbols[left as usize], &self.symbols[right as usize]);
        if let Some((priority, id)) = join(l, r) {
            self.queue.push(Reverse(Pair {
                priority,
                left,
                right,
                len: l.len + r.len,
                id,
            }));
        }
    }
}
