//! Whose turn it is among models that have work. Pure.
//!
//! Each model has a clock that its sweeps move on by the time that they took, divided by its priority. The model whose
//! clock is furthest behind is next, so over time each busy one has a share of the machine as large as its priority.

/// The models' clocks.
#[derive(Debug, Default)]
pub struct Turns {
    models: Vec<Clock>,
    /// Where the model that ran last stood: who has been idle begins there, and does not make up for it.
    now: f64,
}

#[derive(Debug)]
struct Clock {
    seconds: f64,
    priority: f64,
    busy: bool,
}

impl Turns {
    /// Adds a model. One of priority 2 has twice the share of one of priority 1.
    pub fn add(&mut self, priority: u8) {
        self.models.push(Clock {
            seconds: self.now,
            priority: f64::from(priority.max(1)),
            busy: false,
        });
    }

    /// Takes a model out; those after it move up.
    pub fn remove(&mut self, model: usize) {
        self.models.remove(model);
    }

    /// Changes a model's priority.
    pub fn set_priority(&mut self, model: usize, priority: u8) {
        self.models[model].priority = f64::from(priority.max(1));
    }

    /// The model whose turn it is, of those with work; `busy` says for each whether it has some.
    pub fn next(&mut self, busy: impl Fn(usize) -> bool) -> Option<usize> {
        for (index, clock) in self.models.iter_mut().enumerate() {
            let was = std::mem::replace(&mut clock.busy, busy(index));
            if clock.busy && !was {
                clock.seconds = clock.seconds.max(self.now);
            }
        }
        let waiting = self
            .models
            .iter()
            .enumerate()
            .filter(|(_, clock)| clock.busy);
        let (index, clock) = waiting.min_by(|(_, a), (_, b)| a.seconds.total_cmp(&b.seconds))?;
        self.now = clock.seconds;
        Some(index)
    }

    /// The model whose turn it is after a sweep of `model` that takes `seconds`, as far as one can tell now.
    pub fn after(&self, model: usize, seconds: f64) -> usize {
        let then = |index: usize, clock: &Clock| match index == model {
            true => clock.seconds + seconds / clock.priority,
            false => clock.seconds,
        };
        let waiting = (self.models.iter().enumerate()).filter(|(_, clock)| clock.busy);
        let next = waiting.min_by(|(i, a), (j, b)| then(*i, a).total_cmp(&then(*j, b)));
        next.map_or(model, |(index, _)| index)
    }

    /// A sweep of the model took `seconds`.
    pub fn swept(&mut self, model: usize, seconds: f64) {
        let clock = &mut self.models[model];
        clock.seconds += seconds / clock.priority;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds that each model had of `sweeps` sweeps, which take each model so long.
    fn shares(turns: &mut Turns, seconds: &[f64], sweeps: usize) -> Vec<f64> {
        let mut had = vec![0.0; seconds.len()];
        let mut foreseen = None;
        for _ in 0..sweeps {
            let model = turns.next(|_| true).expect("all are busy");
            assert!(foreseen.is_none_or(|foreseen| foreseen == model));
            foreseen = Some(turns.after(model, seconds[model]));
            turns.swept(model, seconds[model]);
            had[model] += seconds[model];
        }
        had
    }

    #[test]
    fn busy_models_share_the_time_by_their_priorities() {
        let mut turns = Turns::default();
        [1, 1, 4].iter().for_each(|&priority| turns.add(priority));
        let had = shares(&mut turns, &[0.5, 0.01, 0.1], 10_000);
        let total: f64 = had.iter().sum();
        for (had, share) in had.iter().zip([1.0, 1.0, 4.0]) {
            assert!((had / total - share / 6.0).abs() < 0.01, "{had} of {total}");
        }
    }

    #[test]
    fn who_was_idle_does_not_make_up_for_it() {
        let mut turns = Turns::default();
        [1, 1].iter().for_each(|&priority| turns.add(priority));
        for _ in 0..100 {
            assert_eq!(turns.next(|model| model == 0), Some(0));
            turns.swept(0, 1.0);
        }
        let had = shares(&mut turns, &[1.0, 1.0], 10);
        assert!((had[0] - had[1]).abs() <= 1.0, "{had:?}");
        assert_eq!(turns.next(|_| false), None);
    }
}
