//! The policy: which tiles stay in memory, and what is read next. Pure: no I/O, no clock.
//!
//! Each tile has an expected use rate: its uses in a sweep of its model, times
//! the rate of such sweeps, which whoever schedules them estimates. The pool keeps the
//! highest and streams the rest. Among tiles of one rate (all of a dense
//! model) the kept set is fixed, because their order of use is cyclic and LRU
//! would never hit, and the streamed ones are spread evenly over the sweep, so
//! that reads and compute overlap from the first layer to the last with a
//! small window of slots in flight.
//!
//! A device with memory of its own is one more level above the processor's memory: it keeps the
//! tiles of the highest worth, and the same rule decides at each level about the tiles that the one
//! above it does not keep. A tile is kept at one level at most.

use std::ops::Range;

/// 2^64 divided by the golden ratio: multiples of it, modulo 2^64, are the most even
/// spread there is for every prefix length (at most three distinct gaps, by the three-gap theorem).
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// What is expected of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Its sweeps per time; the unit is the same for all models, and which it is does not matter.
    pub sweeps: f32,
    /// The share of its tiles that must be there when they are used. The others are worth less than any of these of
    /// whatever model: they can be read while the sweep computes.
    pub held: f32,
}

impl Rate {
    /// A model that is swept so often, and wants to have all its tiles.
    pub const fn of_all(sweeps: f32) -> Rate {
        Rate { sweeps, held: 1.0 }
    }

    /// What a tile is worth by its place in the order in which a model's tiles are given up, from 0 to 2^64.
    fn worth(self, spread: u64) -> f32 {
        let held = spread as f64 >= (1.0 - f64::from(self.held)) * 2f64.powi(64);
        match held {
            true => self.sweeps,
            false => self.sweeps.min(f32::MIN_POSITIVE),
        }
    }
}

/// The tiles of one model.
#[derive(Debug, Clone)]
struct Share {
    tiles: Range<u32>,
    rate: Rate,
    /// Tiles that are given up and used in every sweep: they pass through the window.
    streamed: u32,
}

/// A level of memory: what the levels above it do not keep comes to it.
#[derive(Debug, Clone, Copy, Default)]
struct Level {
    /// Slots that hold weights.
    capacity: u32,
    /// Of those, slots that tiles pass through which do not stay.
    window: u32,
    /// Places at the front of the queue whose tiles are not kept here.
    given_up: u32,
}

impl Level {
    /// How many of the first `coming` places of the queue are not kept here; tiles from place `first_streamed` on are
    /// used in every sweep.
    fn cut(&self, coming: u32, first_streamed: u32) -> u32 {
        let without_window = coming.saturating_sub(self.capacity);
        if without_window <= first_streamed {
            // All that is used each sweep fits, so nothing streams and no window is needed.
            without_window
        } else {
            coming.saturating_sub(self.capacity.saturating_sub(self.window))
        }
    }
}

/// The plan for the pools of slots: a queue of the tiles of all models by worth, and how much of it fits.
#[derive(Debug, Clone)]
pub struct Residency {
    models: Vec<Share>,
    /// Uses of each tile in a sweep of its model.
    uses: Vec<f32>,
    /// Place of each tile in the queue: 0 is given up first.
    rank: Vec<u32>,
    /// The tile at each place.
    queue: Vec<u32>,
    /// The first place of a tile that would have to be streamed.
    first_streamed: u32,
    /// The device's own memory: without slots where it computes in the processor's.
    device: Level,
    /// The processor's memory, which reads land in.
    host: Level,
}

impl Residency {
    /// A plan for no tiles yet.
    pub fn empty(capacity: u32, window: u32) -> Self {
        Residency {
            models: Vec::new(),
            uses: Vec::new(),
            rank: Vec::new(),
            queue: Vec::new(),
            first_streamed: 0,
            device: Level::default(),
            host: Level {
                capacity,
                window,
                given_up: 0,
            },
        }
    }

    /// A plan for one model, whose tiles have the given uses per sweep, in the order of the sweep.
    ///
    /// Tiles used less than once per sweep are never streamed, only kept when there is room.
    pub fn new(uses: &[f32], capacity: u32, window: u32) -> Self {
        let mut plan = Residency::empty(capacity, window);
        plan.add(uses, 1.0);
        plan
    }

    /// Adds the tiles of a model behind those that there are, all of which it wants; `sweeps` is how often it is swept.
    pub fn add(&mut self, uses: &[f32], sweeps: f32) {
        let first = self.tiles();
        self.uses.extend_from_slice(uses);
        self.queue.extend(first..self.uses.len() as u32);
        self.rank.resize(self.uses.len(), 0);
        self.models.push(Share {
            tiles: first..self.tiles(),
            rate: Rate::of_all(sweeps),
            streamed: 0,
        });
        self.order();
    }

    /// Removes the model at a place; tiles and models behind it move up.
    pub fn remove(&mut self, place: usize) {
        let gone = self.models.remove(place).tiles;
        let count = gone.len() as u32;
        for model in &mut self.models[place..] {
            model.tiles = model.tiles.start - count..model.tiles.end - count;
        }
        self.uses.drain(gone.start as usize..gone.end as usize);
        self.rank.truncate(self.uses.len());
        self.queue.clear();
        self.queue.extend(0..self.uses.len() as u32);
        self.order();
    }

    /// How many tiles there are.
    pub fn tiles(&self) -> u32 {
        self.uses.len() as u32
    }

    /// Slots that weights may take at present.
    pub fn capacity(&self) -> u32 {
        self.host.capacity
    }

    /// Slots that streamed tiles pass through, when any are streamed.
    pub fn window(&self) -> u32 {
        self.host.window
    }

    /// Changes how many slots weights may take (KV pages come and go).
    pub fn set_capacity(&mut self, capacity: u32) {
        self.host.capacity = capacity;
        self.settle();
    }

    /// Changes how many slots streamed tiles pass through.
    pub fn set_window(&mut self, window: u32) {
        self.host.window = window;
        self.settle();
    }

    /// Slots of the device's own memory that weights may take at present.
    pub fn device_capacity(&self) -> u32 {
        self.device.capacity
    }

    /// Of those, slots that tiles pass through which do not stay on the device.
    pub fn device_window(&self) -> u32 {
        self.device.window
    }

    /// Changes how many slots of the device's own memory weights may take.
    pub fn set_device_capacity(&mut self, capacity: u32) {
        self.device.capacity = capacity;
        self.settle();
    }

    /// Changes how many of them tiles pass through.
    pub fn set_device_window(&mut self, window: u32) {
        self.device.window = window;
        self.settle();
    }

    /// What is expected of the model at a place.
    pub fn rate(&self, place: usize) -> Rate {
        self.models[place].rate
    }

    /// Changes what is expected of the models, in the order of their places; whether anything did change. Allocates
    /// nothing.
    ///
    /// Tiles of a model that is never swept (0) are kept where there is room, and nothing waits for them: they are
    /// not streamed.
    pub fn set_rates(&mut self, rates: &[Rate]) -> bool {
        assert_eq!(rates.len(), self.models.len(), "a rate for each model");
        let same = |(model, &rate): (&Share, &Rate)| model.rate == rate;
        if self.models.iter().zip(rates).all(same) {
            return false;
        }
        for (model, &rate) in self.models.iter_mut().zip(rates) {
            model.rate = rate;
        }
        self.order();
        true
    }

    /// Puts the tiles in the order of their worth.
    fn order(&mut self) {
        let (models, uses) = (&self.models, &self.uses);
        let worth = |tile: u32| {
            let model = model_of(models, tile);
            let spread = u64::from(tile - model.tiles.start).wrapping_mul(GOLDEN);
            let worth = model.rate.worth(spread) * uses[tile as usize];
            (worth, spread, tile)
        };
        self.queue.sort_unstable_by(|&a, &b| {
            let (a, b) = (worth(a), worth(b));
            a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2)))
        });
        for (place, &tile) in self.queue.iter().enumerate() {
            self.rank[tile as usize] = place as u32;
        }
        let first = self.queue.iter().position(|&tile| {
            self.uses[tile as usize] >= 1.0 && model_of(&self.models, tile).rate.sweeps > 0.0
        });
        self.first_streamed = first.map_or(self.tiles(), |place| place as u32);
        for model in &mut self.models {
            model.streamed = 0;
        }
        (self.device.given_up, self.host.given_up) = (0, 0);
        self.settle();
    }

    /// Finds how many tiles are given up at each level, and which of them are streamed.
    fn settle(&mut self) {
        self.device.given_up = self.device.cut(self.tiles(), self.first_streamed);
        let given_up = self.host.cut(self.device.given_up, self.first_streamed);
        let before = self.host.given_up;
        for place in given_up.min(before)..given_up.max(before) {
            let tile = self.queue[place as usize];
            if self.uses[tile as usize] >= 1.0 {
                let model = self.models.iter_mut().find(|m| m.tiles.contains(&tile));
                let streamed = &mut model.expect("each tile has a model").streamed;
                *streamed = if given_up > before {
                    *streamed + 1
                } else {
                    *streamed - 1
                };
            }
        }
        self.host.given_up = given_up;
    }

    /// How many tiles are not kept in memory.
    pub fn given_up(&self) -> u32 {
        self.host.given_up
    }

    /// Whether the tile stays in the processor's memory once it was read.
    pub fn keeps(&self, tile: u32) -> bool {
        let kept = self.host.given_up..self.device.given_up;
        kept.contains(&self.rank[tile as usize])
    }

    /// Whether the tile stays in the device's own memory once it was copied there.
    pub fn keeps_on_device(&self, tile: u32) -> bool {
        self.rank[tile as usize] >= self.device.given_up
    }

    /// Whether the tile is worth a read in a sweep of its model: it is used, or will be kept.
    pub fn reads(&self, tile: u32) -> bool {
        self.uses[tile as usize] >= 1.0 || self.rank[tile as usize] >= self.host.given_up
    }

    /// Whether the tile is worth a copy to the device in a sweep of its model: it is used, or will be kept there.
    pub fn copies(&self, tile: u32) -> bool {
        self.uses[tile as usize] >= 1.0 || self.keeps_on_device(tile)
    }

    /// Whether any tile of the model at a place passes through the window in every sweep.
    pub fn streams(&self, place: usize) -> bool {
        self.models[place].streamed > 0
    }

    /// Tiles that pass through the window in every sweep of their model.
    pub fn streamed(&self) -> impl Iterator<Item = u32> + '_ {
        self.passing(&self.host)
    }

    /// Tiles that are copied to the device in every sweep of their model.
    pub fn copied(&self) -> impl Iterator<Item = u32> + '_ {
        self.passing(&self.device)
    }

    fn passing(&self, level: &Level) -> impl Iterator<Item = u32> + '_ {
        let given_up = self.queue[..level.given_up as usize].iter().copied();
        given_up.filter(|&tile| self.uses[tile as usize] >= 1.0)
    }

    /// The kept tile that is worth least: the next to go when a KV page needs a slot.
    pub fn least_kept(&self) -> Option<u32> {
        self.queue.get(self.host.given_up as usize).copied()
    }

    /// The same of those that the device keeps.
    pub fn least_kept_on_device(&self) -> Option<u32> {
        self.queue.get(self.device.given_up as usize).copied()
    }
}

fn model_of(models: &[Share], tile: u32) -> &Share {
    let found = models.iter().find(|model| model.tiles.contains(&tile));
    found.expect("each tile has a model")
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

    #[test]
    fn each_tile_is_kept_at_one_level_and_what_streams_is_spread_evenly() {
        let mut plan = Residency::new(&[1.0; 1000], 320, 20);
        plan.set_device_capacity(420);
        plan.set_device_window(20);
        let count = |of: &dyn Fn(u32) -> bool| (0..1000).filter(|&tile| of(tile)).count();
        assert_eq!(count(&|t| plan.keeps_on_device(t)), 400);
        assert_eq!(count(&|t| plan.keeps(t)), 300);
        assert_eq!(count(&|t| plan.keeps(t) && plan.keeps_on_device(t)), 0);
        assert_eq!((plan.copied().count(), plan.streamed().count()), (600, 300));
        let mut before = 0;
        for tile in (0..1000).filter(|&t| !plan.keeps(t) && !plan.keeps_on_device(t)) {
            assert!(tile - before < 8, "{before} {tile}");
            before = tile;
        }
        // A page on the device pushes a tile down, and that one another out of memory.
        plan.set_device_capacity(419);
        assert_eq!((plan.copied().count(), plan.streamed().count()), (601, 301));
        // What is on the device needs no slot of the processor's, not even a window.
        plan.set_device_capacity(1000);
        assert_eq!((plan.copied().count(), plan.given_up()), (0, 0));
        assert_eq!(count(&|t| plan.keeps(t)), 0);
    }

    fn kept(plan: &Residency, tiles: Range<u32>) -> usize {
        tiles.filter(|&tile| plan.keeps(tile)).count()
    }

    #[test]
    fn the_busy_model_pushes_the_idle_one_out() {
        let mut plan = Residency::new(&[1.0; 80], 100, 5);
        plan.add(&[1.0; 80], 0.0);
        assert_eq!((kept(&plan, 0..80), kept(&plan, 80..160)), (80, 20));
        assert!(
            !plan.streams(0) && plan.given_up() == 60,
            "no window for what nobody uses"
        );

        let rates = [0.25, 1.0].map(Rate::of_all);
        assert!(plan.set_rates(&rates));
        assert_eq!((kept(&plan, 0..80), kept(&plan, 80..160)), (15, 80));
        assert!(plan.streams(0) && !plan.streams(1));
        assert!(!plan.set_rates(&rates), "nothing has changed");

        // What the idle model keeps is spread as evenly as ever.
        let places: Vec<u32> = (0..80).filter(|&t| plan.keeps(t)).collect();
        assert!(
            places.windows(2).all(|p| (2..=9).contains(&(p[1] - p[0]))),
            "{places:?}"
        );
    }

    #[test]
    fn what_a_busy_model_can_read_in_time_makes_room_for_others() {
        let mut plan = Residency::new(&[1.0; 80], 105, 5);
        plan.add(&[1.0; 80], 0.0);
        let busy = Rate {
            sweeps: 2.0,
            held: 0.75,
        };
        plan.set_rates(&[busy, Rate::of_all(0.5)]);
        assert_eq!((kept(&plan, 0..80), kept(&plan, 80..160)), (59, 41));
        let before: Vec<u32> = (0..80).filter(|&t| plan.keeps(t)).collect();
        // Before a model that nobody asks it has all its tiles, and no window is needed.
        plan.set_rates(&[busy, Rate::of_all(0.0)]);
        assert_eq!((kept(&plan, 0..80), kept(&plan, 80..160)), (80, 25));
        plan.set_rates(&[Rate::of_all(0.5), Rate::of_all(2.0)]);
        assert!((0..80).all(|t| !plan.keeps(t) || before.contains(&t)));
    }

    #[test]
    fn equal_models_give_up_equal_shares() {
        let mut plan = Residency::new(&[1.0; 300], 205, 5);
        plan.add(&[1.0; 100], 1.0);
        assert_eq!((kept(&plan, 0..300), kept(&plan, 300..400)), (150, 50));
        assert!(plan.streams(0) && plan.streams(1));
    }

    #[test]
    fn a_model_goes_and_the_others_stay_as_they_were() {
        let mut plan = Residency::new(&[1.0; 30], 60, 5);
        plan.add(&[0.01, 1.0, 1.0], 3.0);
        plan.add(&[1.0; 40], 2.0);
        plan.remove(0);
        let mut alone = Residency::empty(60, 5);
        alone.add(&[0.01, 1.0, 1.0], 3.0);
        alone.add(&[1.0; 40], 2.0);
        assert_eq!((plan.tiles(), plan.given_up()), (43, 0));
        plan.set_capacity(20);
        alone.set_capacity(20);
        assert!((0..43).all(|t| plan.keeps(t) == alone.keeps(t)));
        assert_eq!((plan.streams(0), plan.streams(1)), (false, true));
        assert!(
            !plan.keeps(0),
            "single rows of a busy model are worth less than tiles of another"
        );
    }

    #[test]
    fn counts_of_streamed_tiles_follow_the_capacity() {
        let mut plan = Residency::new(&[1.0; 50], 200, 4);
        plan.add(&[1.0; 50], 0.5);
        for capacity in (4..=100).chain((4..100).rev()) {
            plan.set_capacity(capacity);
            for place in 0..2 {
                let tiles = place as u32 * 50..(place as u32 + 1) * 50;
                let streamed = plan.streamed().filter(|t| tiles.contains(t)).count();
                assert_eq!(plan.models[place].streamed as usize, streamed);
            }
        }
    }
}
