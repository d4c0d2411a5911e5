//! The order in which tiles are used next, and how far ahead of their use reads have got.
//!
//! Tiles of the model in its sweep come first, from the range at hand on, then
//! those of the model that is swept next, and so on around: a ring of one model or two. Tiles of
//! other models come after all these. Positions are counted from the range at
//! hand on, so that a position is how soon its tile is used.

use std::ops::Range;

/// Where reads are in the order of use.
#[derive(Debug, Clone, Default)]
pub(super) struct Order {
    /// The tiles of one model, then those of another (or none).
    ring: [Range<u32>; 2],
    /// Tiles of all models.
    tiles: u32,
    /// The first tile of the range at hand; one of the ring.
    first: u32,
    /// Positions of the ring that were considered for reading.
    considered: u32,
    /// Tiles outside the ring below this one were considered too, after the ring.
    considered_outside: u32,
    /// No position from this one on holds a tile that is outside the plan.
    stale: u32,
    /// No tile outside the ring below this one is outside the plan.
    stale_outside: u32,
}

impl Order {
    /// Tiles are used by a sweep over `now` and one over `next` (which may be the same), in turns; `tiles` are all.
    pub(super) fn set_models(&mut self, now: &Range<u32>, next: &Range<u32>, tiles: u32) {
        let next = if now == next { &(0..0) } else { next };
        let same = tiles == self.tiles
            && ([now, next] == [&self.ring[0], &self.ring[1]]
                || [next, now] == [&self.ring[0], &self.ring[1]]);
        if !same {
            self.ring = [now.clone(), next.clone()];
            self.tiles = tiles;
            if !now.contains(&self.first) {
                self.first = now.start;
            }
            self.restart();
        }
    }

    /// How many positions were considered for reading.
    pub(super) fn considered(&self) -> u32 {
        self.considered
    }

    /// How many tiles the ring has.
    pub(super) fn len(&self) -> u32 {
        (self.ring[0].len() + self.ring[1].len()) as u32
    }

    /// Whether a tile is used by one of the sweeps at hand.
    pub(super) fn contains(&self, tile: u32) -> bool {
        self.ring.iter().any(|range| range.contains(&tile))
    }

    /// Where a tile of the ring stands in it, counted from the ring's first.
    fn place(&self, tile: u32) -> u32 {
        if self.ring[0].contains(&tile) {
            tile - self.ring[0].start
        } else {
            debug_assert!(self.ring[1].contains(&tile));
            self.ring[0].len() as u32 + tile - self.ring[1].start
        }
    }

    /// The tile at a position.
    pub(super) fn at(&self, position: u32) -> u32 {
        let (first, len) = (self.ring[0].len() as u32, self.len());
        let place = (self.place(self.first) + position) % len;
        if place < first {
            self.ring[0].start + place
        } else {
            self.ring[1].start + place - first
        }
    }

    /// The range at hand begins at `first` from now on.
    pub(super) fn advance_to(&mut self, first: u32) {
        if self.len() == 0 {
            return;
        }
        let moved = (self.place(first) + self.len() - self.place(self.first)) % self.len();
        self.first = first;
        if moved == 0 || moved > self.considered {
            self.restart();
        } else {
            self.considered -= moved;
            self.stale = self.stale.saturating_sub(moved);
        }
    }

    /// Tiles are considered from the range at hand on again.
    pub(super) fn restart(&mut self) {
        (self.considered, self.considered_outside) = (0, 0);
        (self.stale, self.stale_outside) = (self.len(), 0);
    }

    /// The tile to be considered next, and whether the ring has it.
    pub(super) fn next(&mut self) -> Option<(u32, bool)> {
        if self.considered < self.len() {
            return Some((self.at(self.considered), true));
        }
        let mut outside = self.considered_outside..self.tiles;
        let tile = outside.find(|&tile| !self.contains(tile));
        self.considered_outside = tile.unwrap_or(self.tiles);
        tile.map(|tile| (tile, false))
    }

    /// The tile that [`next`](Self::next) gave has been considered.
    pub(super) fn step(&mut self) {
        if self.considered < self.len() {
            self.considered += 1;
        } else {
            self.considered_outside += 1;
        }
    }

    /// The tile used last of those that `is_stale` and are used after the one that is considered next.
    ///
    /// Allocates nothing, and looks at each tile once until the next restart.
    pub(super) fn last_stale(&mut self, is_stale: impl Fn(u32) -> bool) -> Option<u32> {
        while self.stale_outside < self.tiles {
            let tile = self.stale_outside;
            self.stale_outside += 1;
            if !self.contains(tile) && is_stale(tile) {
                return Some(tile);
            }
        }
        while self.stale > self.considered + 1 {
            self.stale -= 1;
            let tile = self.at(self.stale);
            if is_stale(tile) {
                return Some(tile);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(order: &mut Order) -> Vec<u32> {
        let mut tiles = Vec::new();
        while let Some((tile, _)) = order.next() {
            tiles.push(tile);
            order.step();
        }
        tiles
    }

    #[test]
    fn the_rest_of_the_sweep_then_the_next_then_around() {
        let mut order = Order::default();
        order.set_models(&(0..4), &(0..4), 9);
        order.advance_to(2);
        assert_eq!(walk(&mut order), [2, 3, 0, 1, 4, 5, 6, 7, 8]);
        order.set_models(&(0..4), &(6..9), 9);
        assert_eq!(walk(&mut order), [2, 3, 6, 7, 8, 0, 1, 4, 5]);
    }

    #[test]
    fn what_was_considered_is_not_considered_again() {
        let mut order = Order::default();
        order.set_models(&(0..4), &(4..6), 6);
        assert_eq!(walk(&mut order), [0, 1, 2, 3, 4, 5]);
        order.advance_to(2);
        assert_eq!(
            walk(&mut order),
            [0, 1],
            "used a moment ago, and needed again"
        );
        // The other model's sweep begins: the same ring, only further on.
        order.set_models(&(4..6), &(0..4), 6);
        order.advance_to(4);
        assert_eq!(walk(&mut order), [2, 3]);
        order.set_models(&(4..6), &(4..6), 6);
        assert_eq!(walk(&mut order), [4, 5, 0, 1, 2, 3]);
    }

    #[test]
    fn the_stale_tile_used_last_goes_first_and_none_used_before_the_read() {
        let mut order = Order::default();
        order.set_models(&(0..4), &(0..4), 6);
        order.advance_to(1);
        let stale = |tile| [1, 2, 0, 5].contains(&tile);
        order.step();
        assert_eq!(order.next(), Some((2, true)));
        let found: Vec<u32> = std::iter::from_fn(|| order.last_stale(stale)).collect();
        assert_eq!(found, [5, 0]);
    }
}
