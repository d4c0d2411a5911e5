//! A hash index of ids that holds no keys: four bytes a slot, the keys stay where they are.

use std::hash::{BuildHasher, Hash, RandomState};

const EMPTY: u32 = u32::MAX;

/// Open addressing over `u32` ids. The hash is keyed at random, so that a model
/// file cannot be crafted to make loading it quadratic.
pub(super) struct Index {
    slots: Box<[u32]>,
    hasher: RandomState,
}

impl Index {
    /// An index for at most `entries` ids, at most three quarters full.
    pub(super) fn new(entries: usize) -> Self {
        let slots = (entries + entries / 3 + 1).next_power_of_two();
        Index {
            slots: vec![EMPTY; slots].into_boxed_slice(),
            hasher: RandomState::new(),
        }
    }

    /// The id stored for `key`; `same` tells whether the key of an id equals it.
    pub(super) fn find<K: Hash + ?Sized>(
        &self,
        key: &K,
        same: impl Fn(u32) -> bool,
    ) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let mut at = self.hasher.hash_one(key) as usize & mask;
        while self.slots[at] != EMPTY {
            if same(self.slots[at]) {
                return Some(self.slots[at]);
            }
            at = (at + 1) & mask;
        }
        None
    }

    /// Stores `id` for `key` unless an equal key is there already.
    pub(super) fn insert<K: Hash + ?Sized>(
        &mut self,
        key: &K,
        id: u32,
        same: impl Fn(u32) -> bool,
    ) {
        let mask = self.slots.len() - 1;
        let mut at = self.hasher.hash_one(key) as usize & mask;
        while self.slots[at] != EMPTY {
            if same(self.slots[at]) {
                return;
            }
            at = (at + 1) & mask;
        }
        self.slots[at] = id;
    }

    /// Bytes of memory the slots take.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.slots)
    }
}
