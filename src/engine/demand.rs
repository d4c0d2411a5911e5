//! How often each model is going to be swept: the number that residency ranks its tiles by. Pure: sweeps are the clock.
//!
//! Only the order of the rates counts, so they are told per sweep of any model and not per second: nothing changes
//! while nobody asks.
//!
//! # Who has the pool
//!
//! Two models that do not fit together may share the pool, each reading the rest of its tiles in every sweep. Or the
//! one in its sweep has the pool: then its first sweep brings what it lacks, and later ones read nothing, but the
//! other one must read as much again when its turn comes. Sharing costs `missing` (what does not fit, as a share of
//! all) in every sweep, having the pool twice that in the first. So the pool is worth having if more than one sweep
//! is still to come; and if a part `hidden` of the model can be read while a sweep computes, which costs nothing, if
//! more than `1 / (1 - hidden / missing)` are. That part need not be held by whoever has the pool either.
//!
//! How many sweeps are to come is told by the model's latest runs of sweeps: by those that were at least as long as the
//! one at hand. If nearly all of these ended where this one is now, it is expected to end too, and tiles of the model
//! that came next last time are read while it is computed.
//!
//! What this reaches, and what no policy can that does not know the future, is computed by `tests/bursts.rs`.

use heapless::HistoryBuf;

use crate::residency::Rate;

/// Sweeps over which the share of a model is averaged.
const MEMORY_SWEEPS: f32 = 16.0;
/// A model with a smaller share of the sweeps is idle: nothing is held ready for it that others could use.
const IDLE_SHARE: f32 = 1.0 / 64.0;
/// The model that has the pool loses it to the others when its share falls below this.
const FRONT_SHARE: f32 = 1.0 / 8.0;
/// The rate of the model that has the pool: more than any share.
const FRONT_RATE: f32 = 2.0;
/// The rate of a draft model: it is swept several times for each sweep of the model that it drafts for.
const DRAFTER_RATE: f32 = 4.0;
/// Shares are told in powers of this, so that models of about the same share have the same rate...
const STEP: f32 = 2.0;
/// ...and change only if they are off by so many powers, so that the order is the same for long.
const OFF_MOST: f32 = 0.75;
/// Runs that are remembered.
const RUNS: usize = 8;
/// A run that every model is said to have had before its first.
const RUN_FIRST: u32 = 4;
/// What is said to be read while a sweep computes is this part of what was: disks are not always as fast.
const HIDDEN_MARGIN: f32 = 0.8;
/// Of a model that has the pool, whole parts of this size are left to be read.
const HIDDEN_STEP: f32 = 1.0 / 16.0;
/// A sweep that waited for less of its time did not show how fast the disk is.
const STALLED_LEAST: f32 = 0.1;

#[derive(Debug, Clone)]
struct Model {
    /// Its sweeps, where older ones count less.
    sweeps: f32,
    /// Its share of all models' latest sweeps.
    share: f32,
    /// The power of [`STEP`] that it is told as.
    power: f32,
    /// Sweeps in a row, of its latest runs.
    runs: HistoryBuf<u32, RUNS>,
    /// The model that was swept after its latest run.
    then: Option<usize>,
    /// The part of its bytes that is read while one of its sweeps computes.
    hidden: f32,
    /// That part, as it is told.
    left: f32,
    /// The model that it drafts for, if it does: it has no sweeps of its own to be counted.
    drafts_for: Option<usize>,
}

impl Model {
    fn new() -> Model {
        let mut runs = HistoryBuf::new();
        runs.write(RUN_FIRST);
        Model {
            sweeps: 0.0,
            share: 0.0,
            power: 0.0,
            runs,
            then: None,
            hidden: 0.0,
            left: 0.0,
            drafts_for: None,
        }
    }

    /// Runs that were at least so long.
    fn as_long(&self, run: u32) -> impl Iterator<Item = u32> + '_ {
        self.runs
            .iter()
            .copied()
            .filter(move |&length| length >= run)
    }

    /// Sweeps that are expected after the `run`-th in a row.
    fn remaining(&self, run: u32) -> f32 {
        let (count, sweeps) = self.as_long(run).fold((0, 0), |(count, sum), length| {
            (count + 1, sum + length - run)
        });
        match count {
            // Longer than any: what has lasted long goes on for long.
            0 => run as f32 / 2.0,
            _ => sweeps as f32 / count as f32,
        }
    }

    /// Whether it pays to take the `run`-th sweep in a row for the last one: if it is, `hidden` need not be read later; if
    /// not, all that a run reads is read once more.
    fn ends(&self, run: u32, missing: f32) -> bool {
        let count = self.as_long(run).count();
        let ended = self.as_long(run).filter(|&length| length == run).count();
        // The chances, by Laplace's rule of succession.
        let (ends, goes_on) = (ended + 1, count - ended + 1);
        ends as f32 * self.hidden > goes_on as f32 * 2.0 * missing
    }

    /// Whether it is worth having the pool for so many sweeps after one.
    fn is_worth(&self, remaining: f32, missing: f32) -> bool {
        remaining * (1.0 - self.hidden / missing) > 1.0
    }
}

/// What is known of the models' sweeps so far.
#[derive(Debug, Clone, Default)]
pub struct Demand {
    models: Vec<Model>,
    rates: Vec<Rate>,
    /// The model of the latest sweep, and how many there were in a row.
    latest: Option<usize>,
    run: u32,
    /// The model that has the pool.
    front: Option<usize>,
}

impl Demand {
    /// A model comes, behind the others.
    pub fn add(&mut self) {
        self.models.push(Model::new());
        self.rates.push(Rate::of_all(0.0));
    }

    /// A draft model comes, behind the others: it has all it wants for as long as the model at `place` is not idle.
    pub fn add_drafter(&mut self, place: usize) {
        self.add();
        self.models.last_mut().expect("it came").drafts_for = Some(place);
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
        for model in &mut self.models {
            model.then = model.then.and_then(moved);
            model.drafts_for = model.drafts_for.and_then(moved);
        }
        self.rank();
    }

    /// A model's sweep begins; `next` is the model after it, if another one waits. `missing` is the share of all tiles
    /// that memory does not hold. The model that is expected after this sweep. Allocates nothing.
    pub fn begin(&mut self, place: usize, next: Option<usize>, missing: f32) -> usize {
        if self.latest == Some(place) {
            self.run += 1;
        } else {
            if let Some(model) = self.latest.map(|latest| &mut self.models[latest]) {
                model.runs.write(self.run);
                model.then = Some(place);
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

        let model = &self.models[place];
        let another = next.filter(|&next| next != place);
        let next = another.or(model.then.filter(|_| model.ends(self.run, missing)));
        // The last sweep of a run makes room for the next one already: each tile's slot is free once it is used.
        let (wants, remaining) = match next {
            Some(next) => (next, self.models[next].remaining(1)),
            None => (place, model.remaining(self.run)),
        };
        let deserves = |front: usize| {
            let model = &self.models[front];
            let is_idle = Some(front) != next && model.share < FRONT_SHARE;
            // Nobody gains by what the model in its sweep would drop.
            front == place || !is_idle && model.is_worth(model.remaining(1), missing)
        };
        self.front = match self.models[wants].is_worth(remaining, missing) {
            true => Some(wants),
            false => self.front.filter(|&front| deserves(front)),
        };
        self.rank();
        next.unwrap_or(place)
    }

    /// A model's sweep is over. It waited for the disk for the share `stalled` of its time, and `read` is what arrived
    /// meanwhile, in units of the model's own bytes.
    pub fn end(&mut self, place: usize, stalled: f32, read: f32) {
        let model = &mut self.models[place];
        let hidden = HIDDEN_MARGIN * (1.0 - stalled) * read;
        model.hidden = match stalled >= STALLED_LEAST {
            true if model.hidden == 0.0 => hidden,
            true => (model.hidden + hidden) / 2.0,
            // The disk could have delivered more.
            false => model.hidden.max(hidden),
        };
        if (model.hidden - model.left).abs() >= HIDDEN_STEP {
            model.left = (model.hidden / HIDDEN_STEP).floor().min(8.0) * HIDDEN_STEP;
        }
    }

    /// What is expected of each model.
    pub fn rates(&self) -> &[Rate] {
        &self.rates
    }

    fn rank(&mut self) {
        let busy = self.models.iter().filter(|model| model.share >= IDLE_SHARE);
        // Memory that nobody else could use is not left to anybody.
        let alone = busy.count() < 2;
        for place in 0..self.models.len() {
            if let Some(main) = self.models[place].drafts_for {
                let idle = self.models[main].share < IDLE_SHARE;
                self.rates[place] = Rate::of_all(if idle { 0.0 } else { DRAFTER_RATE });
                continue;
            }
            let model = &mut self.models[place];
            let power = model.share.max(IDLE_SHARE).log(STEP);
            if (power - model.power).abs() > OFF_MOST {
                model.power = power.round();
            }
            self.rates[place] = if self.front == Some(place) {
                Rate {
                    sweeps: FRONT_RATE,
                    held: if alone { 1.0 } else { 1.0 - model.left },
                }
            } else if model.share < IDLE_SHARE {
                Rate::of_all(0.0)
            } else {
                Rate::of_all(STEP.powf(model.power))
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two models that are 1.6 times the memory.
    const MISSING: f32 = 0.375;

    fn demand(models: usize) -> Demand {
        let mut demand = Demand::default();
        (0..models).for_each(|_| demand.add());
        demand
    }

    /// Which of two models has the pool.
    fn holder(demand: &Demand) -> Option<usize> {
        let [a, b] = [0, 1].map(|place| demand.rates()[place].sweeps);
        a.partial_cmp(&b).and_then(|order| match order {
            std::cmp::Ordering::Less => Some(1),
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Greater => Some(0),
        })
    }

    /// Runs of two models in turns; who has the pool after each sweep began, and who was expected next.
    fn runs(demand: &mut Demand, lengths: &[usize]) -> Vec<(Option<usize>, usize)> {
        let sweeps = lengths
            .iter()
            .enumerate()
            .flat_map(|(run, &length)| std::iter::repeat_n(run % 2, length));
        sweeps
            .map(|place| {
                let next = demand.begin(place, None, MISSING);
                (holder(demand), next)
            })
            .collect()
    }

    #[test]
    fn a_burst_takes_the_pool_at_once() {
        for (index, (holder, _)) in runs(&mut demand(2), &[30; 4]).into_iter().enumerate() {
            assert_eq!(holder, Some(index / 30 % 2), "{index}");
        }
    }

    #[test]
    fn models_that_take_turns_share_the_pool() {
        for lengths in [[1, 1], [2, 2], [1, 2]] {
            let mut demand = demand(2);
            runs(&mut demand, &lengths.repeat(12));
            let mut holders = runs(&mut demand, &lengths.repeat(100)).into_iter();
            assert!(holders.all(|(holder, _)| holder.is_none()), "{lengths:?}");
        }
        // One of eight sweeps is the other model's.
        let mut demand = demand(2);
        runs(&mut demand, &[7, 1].repeat(20));
        let holders = runs(&mut demand, &[7, 1].repeat(20)).into_iter();
        assert!(holders.map(|(holder, _)| holder).all(|h| h == Some(0)));
    }

    #[test]
    fn the_end_of_a_run_is_told_or_foreseen() {
        let mut told = demand(2);
        (0..10).for_each(|_| {
            told.begin(0, Some(0), MISSING);
        });
        assert_eq!(told.begin(0, Some(1), MISSING), 1);
        assert_eq!(holder(&told), Some(1));

        // A disk so fast that something is gained by foresight.
        let regular = |lengths: &[usize]| {
            let mut demand = demand(2);
            demand
                .models
                .iter_mut()
                .for_each(|model| model.hidden = 0.25);
            runs(&mut demand, lengths)
        };
        let seen = regular(&[6; 12]);
        for (index, &(holder, next)) in seen[48..].iter().enumerate() {
            let expected = (index + 1) / 6 % 2;
            assert_eq!((holder, next), (Some(expected), expected), "{index}");
        }
        // Runs that are at times longer are not thought to be over.
        let irregular = regular(&[6, 6, 6, 9, 9, 6, 6, 7, 6]);
        assert_eq!(irregular[irregular.len() - 1], (Some(0), 0));
    }

    #[test]
    fn a_fast_disk_makes_sharing_cheap() {
        let mut demand = demand(2);
        let sweeps = |demand: &mut Demand, lengths: &[usize]| {
            for (run, &length) in lengths.iter().enumerate() {
                for _ in 0..length {
                    demand.begin(run % 2, None, MISSING);
                    // The disk reads 0.3 / 0.8 of a model while a sweep computes, and the sweep waits for as much.
                    demand.end(run % 2, 0.5, 0.75);
                }
            }
        };
        sweeps(&mut demand, &[4; 8]);
        assert_eq!(holder(&demand), None, "four sweeps are too few");
        sweeps(&mut demand, &[40, 40, 40, 40, 40, 40, 20]);
        assert_eq!(holder(&demand), Some(0));
        // And what it can read in time is left to the other.
        assert_eq!(demand.rates()[0].held, 1.0 - 0.25);
        // Nobody else is left.
        (0..80).for_each(|_| {
            demand.begin(0, None, MISSING);
        });
        assert_eq!(demand.rates()[0].held, 1.0);
    }

    #[test]
    fn a_draft_model_has_all_it_wants_until_its_model_is_idle() {
        let mut demand = demand(2);
        demand.add_drafter(1);
        demand.add();
        let drafter = |demand: &Demand| demand.rates()[2].sweeps;
        assert_eq!(drafter(&demand), 0.0, "nobody was swept");
        for place in [1, 0, 3, 1] {
            demand.begin(place, None, MISSING);
        }
        let others = [0, 1, 3].map(|place| demand.rates()[place].sweeps);
        assert!(others.iter().all(|&rate| rate < drafter(&demand)));
        (0..100).for_each(|_| {
            demand.begin(3, None, MISSING);
        });
        assert_eq!(drafter(&demand), 0.0);
        // A model before them goes.
        demand.remove(0);
        demand.begin(0, None, MISSING);
        assert_eq!(demand.rates()[1].sweeps, DRAFTER_RATE);
    }

    #[test]
    fn an_idle_model_fades_and_a_busy_one_takes_its_place() {
        let mut demand = demand(3);
        (0..50).for_each(|_| {
            demand.begin(0, None, MISSING);
        });
        for _ in 0..70 {
            demand.begin(1, None, MISSING);
            demand.begin(2, None, MISSING);
        }
        assert_eq!(demand.rates()[0], Rate::of_all(0.0));
        demand.remove(0);
        assert!(demand.rates().len() == 2 && demand.rates().iter().all(|rate| rate.sweeps > 0.0));
    }
}
