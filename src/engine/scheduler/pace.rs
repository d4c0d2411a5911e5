//! How many prompt rows a sweep may have beside decoding ones, learnt from how long sweeps take. Pure.

/// Share of the limit that is aimed at: sweeps vary, and most of them are to stay within it.
const MARGIN: f32 = 0.85;
/// How much one sweep moves an estimate; one that shows a prompt row to cost more than was thought moves it all the
/// way, because the next sweep would pass the limit too.
const WEIGHT: f32 = 0.2;
/// Prompt rows there are always, so that no prompt waits for ever.
const ROWS_LEAST: usize = 2;
/// Prompt rows of the first mixed sweep, when nothing is known.
const ROWS_FIRST: usize = 8;
/// Mixed sweeps after which one without prompt rows shows again what decoding alone takes.
const MIXED_MAX: u32 = 128;

/// Estimates of a model's sweep times.
#[derive(Debug)]
pub struct Pace {
    /// How many times as long as without prompt rows a sweep may take.
    factor: f32,
    /// Seconds of a sweep of so many decode rows alone, by their number less one; 0 where not known.
    alone_s: Vec<f32>,
    /// Seconds that a prompt row adds to a sweep; 0 if not known.
    row_s: f32,
    /// Prompt rows of the last mixed sweep.
    last_rows: usize,
    /// Mixed sweeps since one without prompt rows.
    mixed: u32,
}

impl Pace {
    /// Nothing is known. `decoders` is how many decode rows a sweep has at most.
    pub fn new(factor: f32, decoders: usize) -> Pace {
        Pace {
            factor,
            alone_s: vec![0.0; decoders],
            row_s: 0.0,
            last_rows: ROWS_FIRST / 2,
            mixed: 0,
        }
    }

    /// Prompt rows that the next sweep may have beside `decoders` decode rows, of at most `rows` in all.
    ///
    /// None once in a while, to see how long decoding takes alone.
    pub fn prefill_rows(&self, decoders: usize, rows: usize) -> usize {
        let most = rows.saturating_sub(decoders);
        let Some(&alone_s) = decoders.checked_sub(1).and_then(|at| self.alone_s.get(at)) else {
            return most;
        };
        if alone_s == 0.0 || self.mixed >= MIXED_MAX {
            return 0;
        }
        let fitting = if self.row_s > 0.0 {
            ((self.factor * MARGIN - 1.0).max(0.0) * alone_s / self.row_s) as usize
        } else {
            ROWS_FIRST
        };
        // An estimate from few rows says little of many: go up step by step.
        fitting.min(self.last_rows * 2).max(ROWS_LEAST).min(most)
    }

    /// A sweep of so many rows took `seconds`.
    pub fn swept(&mut self, decoders: usize, prefill_rows: usize, seconds: f32) {
        let known = |old: f32, new: f32| match old {
            0.0 => new,
            _ => old + WEIGHT * (new - old),
        };
        let alone_s = decoders
            .checked_sub(1)
            .and_then(|at| self.alone_s.get_mut(at));
        match (alone_s, prefill_rows) {
            (_, 0) if decoders == 0 => {}
            (Some(alone_s), 0) => {
                *alone_s = known(*alone_s, seconds);
                self.mixed = 0;
            }
            (Some(alone_s), _) => {
                // A row that seems to cost nothing still has a cost: the estimate must not become 0.
                let row_s = ((seconds - *alone_s) / prefill_rows as f32).max(seconds * 1e-4);
                self.row_s = known(self.row_s, row_s).max(row_s);
                self.last_rows = prefill_rows;
                self.mixed += 1;
            }
            (None, _) => {
                if self.row_s == 0.0 {
                    self.row_s = seconds / prefill_rows as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sweeps of a machine for which `seconds(decoders, prompt rows)` holds, with prompts waiting all the time; the
    /// prompt rows of the last.
    fn settle(pace: &mut Pace, decoders: usize, seconds: impl Fn(usize, usize) -> f32) -> usize {
        let mut last = 0;
        for _ in 0..400 {
            let rows = pace.prefill_rows(decoders, 512);
            pace.swept(decoders, rows, seconds(decoders, rows));
            if rows > 0 {
                last = rows;
            }
        }
        last
    }

    #[test]
    fn the_delay_comes_near_the_limit_and_stays_below() {
        // Bound by arithmetic, by memory up to 20 rows, and by a slow disk.
        let machines: [fn(usize, usize) -> f32; 3] = [
            |d, p| 0.003 + 0.0005 * (d + p) as f32,
            |d, p| (0.1_f32).max(0.005 * (d + p) as f32),
            |d, p| (0.8_f32).max(0.002 * (d + p) as f32),
        ];
        for (machine, seconds) in machines.iter().enumerate() {
            for decoders in [1, 4, 8] {
                let mut pace = Pace::new(2.0, 8);
                let rows = settle(&mut pace, decoders, seconds);
                let slowed = seconds(decoders, rows) / seconds(decoders, 0);
                let full = rows + decoders == 512;
                assert!(slowed < 2.0, "machine {machine}: {slowed}");
                assert!(
                    slowed > 1.4 || full,
                    "machine {machine}: {slowed}, {rows} rows"
                );
            }
        }
    }

    #[test]
    fn what_decoding_takes_alone_is_seen_first_and_now_and_then() {
        let mut pace = Pace::new(2.0, 2);
        assert_eq!(pace.prefill_rows(0, 64), 64, "nobody is delayed");
        assert_eq!(pace.prefill_rows(1, 64), 0);
        pace.swept(1, 0, 0.01);
        assert_eq!(pace.prefill_rows(1, 64), ROWS_FIRST);
        assert_eq!(pace.prefill_rows(2, 64), 0);
        let mut alone = 0;
        for _ in 0..1000 {
            let rows = pace.prefill_rows(1, 64);
            alone += usize::from(rows == 0);
            pace.swept(1, rows, 0.01);
        }
        assert!((5..20).contains(&alone), "{alone}");
    }

    #[test]
    fn a_machine_that_cannot_keep_the_limit_still_goes_on() {
        let mut pace = Pace::new(1.1, 1);
        assert_eq!(settle(&mut pace, 1, |_, p| 0.01 + p as f32), ROWS_LEAST);
    }
}
