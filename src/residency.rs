//! The policy: which tiles stay in memory, and what is read next. Pure: no I/O, no clock.
//!
//! Each tile has an expected use rate (uses per sweep). The pool keeps the
//! highest and streams the rest. Among tiles of one rate (all of a dense
//! model) the kept set is fixed, because their order of use is cyclic and LRU
//! would never hit, and the streamed ones are spread evenly over the sweep, so
//! that reads and compute overlap from the first layer to the last with a
//! small window of slots in flight.

/// 2^64 divided by the golden ratio: multiples of it, modulo 2^64, are the most even
/// spread there is for every prefix length (at most three distinct gaps, by the three-gap theorem).
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The plan for one pool of slots: a queue of tiles by worth, and how much of it fits.
#[derive(Debug, Clone)]
pub struct Residency {
    /// Place of each tile in the queue: 0 is given up first.
    rank: Vec<u32>,
    /// The tile at each place.
    queue: Vec<u32>,
    /// Tiles at the front of the queue that are not worth streaming: they are read only to be kept.
    by_row: u32,
    /// Slots that hold weights.
    capacity: u32,
    /// Of those, slots that streamed tiles pass through.
    window: u32,
}

impl Residency {
    /// A plan for tiles with the given use rates per sweep, in the order of the sweep.
    ///
    /// Tiles of a rate under 1 are never streamed, only kept when all others are.
    pub fn new(rates: &[f32], capacity: u32, window: u32) -> Self {
        let mut queue: Vec<u32> = (0..rates.len() as u32).collect();
        queue.sort_by(|&a, &b| {
            let by_rate = rates[a as usize].total_cmp(&rates[b as usize]);
            by_rate.then_with(|| {
                (u64::from(a).wrapping_mul(GOLDEN)).cmp(&u64::from(b).wrapping_mul(GOLDEN))
            })
        });
        let mut rank = vec![0; queue.len()];
        for (place, &tile) in queue.iter().enumerate() {
            rank[tile as usize] = place as u32;
        }
        let by_row = rates.iter().filter(|&&r| r < 1.0).count() as u32;
        Residency {
            rank,
            queue,
            by_row,
            capacity,
            window,
        }
    }

    /// How many tiles there are.
    pub fn tiles(&self) -> u32 {
        self.rank.len() as u32
    }

    /// Slots that weights may take at present.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Slots that streamed tiles pass through, when any are streamed.
    pub fn window(&self) -> u32 {
        self.window
    }

    /// Changes how many slots weights may take (KV pages come and go).
    pub fn set_capacity(&mut self, capacity: u32) {
        self.capacity = capacity;
    }

    /// How many tiles are not kept.
    pub fn given_up(&self) -> u32 {
        let tiles = self.tiles();
        if self.capacity >= tiles {
            0
        } else if self.capacity >= tiles - self.by_row {
            // Everything that is used each sweep fits, so nothing streams and no window is needed.
            tiles - self.capacity
        } else {
            tiles - self.capacity.saturating_sub(self.window)
        }
    }

    /// Whether the tile stays in memory once it was read.
    pub fn keeps(&self, tile: u32) -> bool {
        self.rank[tile as usize] >= self.given_up()
    }

    /// Whether the tile is worth a read in this sweep: it is used, or will be kept.
    pub fn reads(&self, tile: u32) -> bool {
        self.rank[tile as usize] >= self.given_up().min(self.by_row)
    }

    /// Whether any tile passes through the window in every sweep.
    pub fn streams(&self) -> bool {
        self.given_up() > self.by_row
    }

    /// Tiles that pass through the window in every sweep.
    pub fn streamed(&self) -> impl Iterator<Item = u32> + '_ {
        let places = self.given_up().min(self.by_row) as usize..self.given_up() as usize;
        self.queue[places].iter().copied()
    }

    /// The kept tile that is worth least: the next to go when a KV page needs a slot.
    pub fn least_kept(&self) -> Option<u32> {
        self.queue.get(self.given_up() as usize).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_kept_when_all_fits() {
        let plan = Residency::new(&[1.0; 10], 10, 3);
        assert!((0..10).all(|t| plan.keeps(t)));
        assert_eq!(plan.streamed().count(), 0);
    }

    #[test]
    fn the_streamed_set_is_nested_and_evenly_spread() {
        let tiles = 1000;
        let mut before: Vec<u32> = Vec::new();
        for capacity in (100..1000).rev() {
            let plan = Residency::new(&vec![1.0; tiles], capacity, 8);
            let mut streamed: Vec<u32> = plan.streamed().collect();
            assert_eq!(streamed.len() as u32, plan.given_up());
            assert!(
                before.iter().all(|t| !plan.keeps(*t)),
                "a tile came back as memory shrank"
            );
            streamed.sort_unstable();
            // In any run of tiles the number streamed is near its share.
            let share = streamed.len() as f64 / tiles as f64;
            let mut seen = 0;
            for tile in 0..tiles as u32 {
                seen += usize::from(!plan.keeps(tile));
                assert!(
                    (seen as f64 - share * f64::from(tile + 1)).abs() < 4.0,
                    "{capacity} {tile}"
                );
            }
            before = streamed;
        }
    }

    #[test]
    fn rows_by_demand_go_first_and_are_never_streamed() {
        let rates = [0.01, 0.01, 1.0, 1.0, 1.0, 1.0];
        let plan = Residency::new(&rates, 5, 2);
        assert_eq!((plan.given_up(), plan.streamed().count()), (1, 0));
        assert_eq!((0..6).filter(|&t| plan.reads(t)).count(), 5);
        let plan = Residency::new(&rates, 3, 2);
        assert_eq!(plan.streamed().count(), 3);
        assert!(!plan.reads(0) && !plan.reads(1) && !plan.keeps(0));
    }
}
