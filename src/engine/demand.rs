//! How often each model is going to be swept: the number that residency ranks its tiles by. Pure: sweeps are the clock.
//!
//! Only the order of the rates counts, so they are told per sweep of any model and not per second: nothing changes
//! while nobody asks.
//!
//! A model in its sweep could have all of the pool at once: what it lacks is read anyway, and to keep that instead of
//! dropping it only costs another model's tiles. These are read again when that model's turn comes, once. So a run
//! of sweeps of one model is worth the pool if it is long: if at least [`REMAINING_LEAST`] are to come after this one. How
//! long a run will be is told by earlier ones of the model, or by its own length so far, whichever is more. Runs that
//! are shorter (two models that take turns sweep by sweep) leave the order as it is: then a fixed set of tiles
//! stays, and as many bytes are read whichever model they belong to.

/// Sweeps over which the share of a model is averaged.
const MEMORY_SWEEPS: f32 = 16.0;
/// A model with a smaller share of the sweeps is idle: nothing is held ready for it that others could use.
const IDLE_SHARE: f32 = 1.0 / 64.0;
/// The model that has the pool loses it to the others when its share falls below this.
const FRONT_SHARE: f32 = 1.0 / 8.0;
/// The rate of the model that has the pool: more than any share.
const FRONT_RATE: f32 = 2.0;
/// A share counts as another only if it changes by this factor, so that the order is the same for long.
const STEP: f32 = 1.5;
/// Sweeps of the same model that must be expected after this one for it to take the pool over.
const REMAINING_LEAST: f32 = 1.0;
/// The length of run that is expected of a model that was never swept.
const RUN_FIRST: f32 = 8.0;

#[derive(Debug, Clone, Copy)]
struct Model {
    /// Its sweeps, where older ones count less.
    sweeps: f32,
    /// Its share of all models' latest sweeps.
    share: f32,
    /// That share when its rate was last changed.
    ranked: f32,
    /// Sweeps in a row, averaged over its runs; none if no run has ended yet.
    run: Option<f32>,
}

impl Model {
    /// Sweeps in a row that a run is expected to have.
    fn run(&self) -> f32 {
        self.run.unwrap_or(RUN_FIRST)
    }
}

/// What is known of the models' sweeps so far.
#[derive(Debug, Clone, Default)]
pub struct Demand {
    models: Vec<Model>,
    rates: Vec<f32>,
    /// The model of the latest sweep, and how many there were in a row.
    latest: Option<usize>,
    run: u32,
    /// The model that has taken the pool over.
    front: Option<usize>,
}

impl Demand {
    /// A model comes, behind the others.
    pub fn add(&mut self) {
        self.models.push(Model {
            sweeps: 0.0,
            share: 0.0,
            ranked: 0.0,
            run: None,
        });
        self.rates.push(0.0);
    }

    /// A model goes; those behind it move up.
    pub fn remove(&mut self, place: usize) {
        self.models.remove(place);
        self.rates.remove(place);
        let moved = |at: usize| match at.cmp(&place) {
            std::cmp::Ordering::Less => Some(at),
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Greater => Some(at - 1),
        };
        self.latest = self.latest.and_then(moved);
        self.front = self.front.and_then(moved);
        self.rank();
    }

    /// A model's sweep begins; `next` is the model after it, if that is known. The rates from now on. Allocates nothing.
    pub fn begin(&mut self, place: usize, next: Option<usize>) -> &[f32] {
        if self.latest == Some(place) {
            self.run += 1;
        } else {
            if let Some(model) = self.latest.map(|latest| &mut self.models[latest]) {
                let run = self.run as f32;
                model.run = Some(model.run.map_or(run, |before| (before + run) / 2.0));
            }
            (self.latest, self.run) = (Some(place), 1);
        }
        for model in &mut self.models {
            model.sweeps -= model.sweeps / MEMORY_SWEEPS;
        }
        self.models[place].sweeps += 1.0;
        let all: f32 = self.models.iter().map(|model| model.sweeps).sum();
        for model in &mut self.models {
            model.share = model.sweeps / all;
        }

        let ends = next.is_some_and(|next| next != place);
        let so_far = self.run as f32;
        let remaining = (self.models[place].run() - so_far).max(so_far / 2.0);
        if remaining >= REMAINING_LEAST && !ends {
            self.front = Some(place);
        }
        // The last sweep of a run makes room for the next one already: each tile's slot is free once it is used.
        if let Some(next) = next.filter(|_| ends)
            && self.models[next].run() - 1.0 >= REMAINING_LEAST
        {
            self.front = Some(next);
        }
        let front_is_idle = |front: usize| {
            front != place && Some(front) != next && self.models[front].share < FRONT_SHARE
        };
        if self.front.is_some_and(front_is_idle) {
            self.front = None;
        }
        self.rank();
        &self.rates
    }

    fn rank(&mut self) {
        for (place, model) in self.models.iter_mut().enumerate() {
            let share = match model.share {
                share if share < IDLE_SHARE => 0.0,
                share => share,
            };
            if share == 0.0 || share > STEP * model.ranked || share * STEP < model.ranked {
                model.ranked = share;
            }
            self.rates[place] = match self.front == Some(place) {
                true => FRONT_RATE,
                false => model.ranked,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(models: usize) -> Demand {
        let mut demand = Demand::default();
        (0..models).for_each(|_| demand.add());
        demand
    }

    /// How often the order of two models changes while they are swept so.
    fn changes(demand: &mut Demand, sweeps: impl Iterator<Item = usize>) -> usize {
        let mut before = None;
        sweeps
            .filter(|&place| {
                let rates = demand.begin(place, None);
                let order = Some(rates[0] > rates[1]);
                std::mem::replace(&mut before, order) != order
            })
            .count()
    }

    #[test]
    fn a_burst_takes_the_pool_at_once() {
        let mut demand = demand(2);
        for place in [0, 1, 0, 1] {
            for sweep in 0..30 {
                let rates = demand.begin(place, None);
                assert!(rates[place] > rates[1 - place], "{place} {sweep}");
            }
        }
    }

    #[test]
    fn models_that_take_turns_keep_their_places() {
        let mut demand = demand(2);
        changes(&mut demand, (0..20).map(|i| i % 2));
        assert_eq!(changes(&mut demand, (0..500).map(|i| i % 2)), 1);
        // One of four sweeps is the other model's.
        changes(&mut demand, (0..100).map(|i| usize::from(i % 4 == 0)));
        assert_eq!(
            changes(&mut demand, (0..500).map(|i| usize::from(i % 4 == 0))),
            1
        );
        assert!(demand.rates[0] > demand.rates[1]);
    }

    #[test]
    fn a_known_end_of_a_burst_makes_room_for_the_next() {
        let mut demand = demand(2);
        (0..10).for_each(|_| {
            demand.begin(0, Some(0));
        });
        let rates = demand.begin(0, Some(1));
        assert!(rates[1] > rates[0]);
    }

    #[test]
    fn an_idle_model_fades_and_a_busy_one_takes_its_place() {
        let mut demand = demand(3);
        (0..50).for_each(|_| {
            demand.begin(0, None);
        });
        for _ in 0..10 {
            demand.begin(1, None);
            demand.begin(2, None);
        }
        for _ in 0..60 {
            demand.begin(1, None);
            demand.begin(2, None);
        }
        assert_eq!(demand.rates[0], 0.0);
        demand.remove(0);
        assert!(demand.rates.len() == 2 && demand.rates.iter().all(|&rate| rate > 0.0));
    }
}
