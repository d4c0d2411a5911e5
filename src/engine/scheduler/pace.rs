//! How many prompt rows a sweep may have: beside decoding ones, for the sake of those who wait for the next token, and
//! in all, for whoever comes meanwhile; and what drafts cost. Learnt from how long sweeps take. Pure.

/// Share of the limit that is aimed at: sweeps vary, and most of them are to stay within it.
const MARGIN: f32 = 0.85;
/// How much one sweep moves an estimate; one that shows a prompt row to cost more than was thought moves it all the
/// way, because the next sweep would pass the limit too.
const WEIGHT: f32 = 0.2;
/// Prompt rows there are always, so that no prompt waits for ever.
const ROWS_LEAST: usize = 2;
/// Prompt rows of the first mixed sweep, when nothing is known.
const ROWS_FIRST: usize = 8;
/// Seconds that a sweep may compute: a newcomer, a cancellation and the service manager's watchdog wait for its end.
pub const COMPUTING_S_MAX: f32 = 10.0;
/// Bytes of weights times rows that even a board with few cores computes with in a second; taken until it is known.
const BYTE_ROWS_PER_S: f32 = 1e10;
/// Rows of a sweep that tells what a row of many costs. In one of fewer rows that is mostly reading weights.
const ROWS_TELLING: usize = 16;
/// Mixed sweeps after which one without prompt rows shows again what decoding alone takes.
const MIXED_MAX: u32 = 128;
/// Sweeps with drafts after which one without shows the same.
const DRAFTED_MAX: u32 = 64;
/// What each row after the first adds to a sweep as long as it is not known, as a share of one of one row.
const DRAFT_COST_FIRST: f32 = 0.1;

/// Estimates of a model's sweep times.
#[derive(Debug)]
pub struct Pace {
    /// How many times as long as without prompt rows a sweep may take.
    factor: f32,
    /// Seconds of a sweep of so many decode rows alone, by their number less one; 0 where not known.
    alone_s: Vec<f32>,
    /// Seconds that a prompt row adds to a sweep; 0 if not known.
    row_s: f32,
    /// Seconds that a row of a sweep with many takes all threads to compute.
    computing_row_s: f32,
    /// Prompt rows of the last mixed sweep.
    last_rows: usize,
    /// Mixed sweeps since one without prompt rows.
    mixed: u32,
    /// Seconds that a draft adds to a sweep, if that is known.
    draft_s: Option<f32>,
    /// Sweeps with drafts since one without.
    drafted: u32,
}

impl Pace {
    /// Nothing is known. `decoders` is how many decode rows a sweep has at most, and `sweep_bytes` what it uses of
    /// weights.
    pub fn new(factor: f32, decoders: usize, sweep_bytes: u64) -> Pace {
        Pace {
            factor,
            alone_s: vec![0.0; decoders],
            row_s: 0.0,
            computing_row_s: sweep_bytes as f32 / BYTE_ROWS_PER_S,
            last_rows: ROWS_FIRST / 2,
            mixed: 0,
            draft_s: None,
            drafted: 0,
        }
    }

    /// Seconds that a row of a sweep with many takes all threads to compute.
    pub fn computing_row_s(&self) -> f32 {
        self.computing_row_s
    }

    /// Seconds of a sweep of so many decode rows alone, if that is known.
    pub fn alone_s(&self, decoders: usize) -> Option<f32> {
        let alone_s = *self.alone_s.get(decoders.checked_sub(1)?)?;
        (alone_s > 0.0).then_some(alone_s)
    }

    /// What a draft adds to a sweep of so many decode rows, as a share of one without; none if it is time to see again
    /// how long one without takes.
    pub fn draft_cost(&self, decoders: usize) -> Option<f32> {
        let alone_s = self.alone_s(decoders)?;
        let first = DRAFT_COST_FIRST / (1.0 + DRAFT_COST_FIRST * (decoders - 1) as f32);
        let cost = self.draft_s.map_or(first, |draft_s| draft_s / alone_s);
        (self.drafted < DRAFTED_MAX).then_some(cost)
    }

    /// A sweep of so many decode rows and `drafts` drafts took `seconds`.
    pub fn drafted(&mut self, decoders: usize, drafts: usize, seconds: f32) {
        let alone_s = self.alone_s[decoders - 1];
        // A sweep that waited for something else says nothing of drafts.
        let draft_s = ((seconds - alone_s) / drafts as f32).clamp(0.0, alone_s);
        let before = self.draft_s.unwrap_or(DRAFT_COST_FIRST * alone_s);
        self.draft_s = Some(before + WEIGHT * (draft_s - before));
        self.drafted += 1;
    }

    /// Prompt rows that the next sweep may have beside `decoders` decode rows, of at most `rows` in all, and of what all
    /// threads would compute in `computing_s` seconds ([`COMPUTING_S_MAX`], or what of that few threads do).
    ///
    /// None once in a while, to see how long decoding takes alone.
    pub fn prefill_rows(&self, decoders: usize, rows: usize, computing_s: f32) -> usize {
        let in_time = self.rows_in(computing_s);
        let most = rows.min(in_time).saturating_sub(decoders);
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

    /// Rows that all threads compute in so many seconds.
    fn rows_in(&self, computing_s: f32) -> usize {
        ((computing_s / self.computing_row_s) as usize).max(ROWS_LEAST)
    }

    /// A sweep of so many rows took `seconds`, and neither paused nor waited for reads for `computing` seconds; where few
    /// threads might compute, for what of them all would have taken.
    pub fn swept(&mut self, decoders: usize, prefill_rows: usize, seconds: f32, computing: f32) {
        let known = |old: f32, new: f32| match old {
            0.0 => new,
            _ => old + WEIGHT * (new - old),
        };
        let rows = decoders + prefill_rows;
        if rows >= ROWS_TELLING.min(self.rows_in(COMPUTING_S_MAX)) {
            self.computing_row_s = computing.max(f32::EPSILON) / rows as f32;
        }
        let alone_s = decoders
            .checked_sub(1)
            .and_then(|at| self.alone_s.get_mut(at));
        match (alone_s, prefill_rows) {
            (_, 0) if decoders == 0 => {}
            (Some(alone_s), 0) => {
                *alone_s = known(*alone_s, seconds);
                (self.mixed, self.drafted) = (0, 0);
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
mod governed;

#[cfg(test)]
mod tests {
    use super::*;

    /// Sweeps of a machine for which `seconds(decoders, prompt rows)` holds, with prompts waiting all the time; the
    /// prompt rows of the last.
    fn settle(pace: &mut Pace, decoders: usize, seconds: impl Fn(usize, usize) -> f32) -> usize {
        let mut last = 0;
        for _ in 0..400 {
            let rows = pace.prefill_rows(decoders, 512, COMPUTING_S_MAX);
            let took = seconds(decoders, rows);
            pace.swept(decoders, rows, took, took);
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
                let mut pace = Pace::new(2.0, 8, 1000);
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
        let mut pace = Pace::new(2.0, 2, 1000);
        assert_eq!(
            pace.prefill_rows(0, 64, COMPUTING_S_MAX),
            64,
            "nobody is delayed"
        );
        assert_eq!(pace.prefill_rows(1, 64, COMPUTING_S_MAX), 0);
        pace.swept(1, 0, 0.01, 0.01);
        assert_eq!(pace.prefill_rows(1, 64, COMPUTING_S_MAX), ROWS_FIRST);
        assert_eq!(pace.prefill_rows(2, 64, COMPUTING_S_MAX), 0);
        let mut alone = 0;
        for _ in 0..1000 {
            let rows = pace.prefill_rows(1, 64, COMPUTING_S_MAX);
            alone += usize::from(rows == 0);
            pace.swept(1, rows, 0.01, 0.01);
        }
        assert!((5..20).contains(&alone), "{alone}");
    }

    #[test]
    fn what_drafts_cost_is_learnt_and_one_slow_sweep_does_not_end_them() {
        let mut pace = Pace::new(2.0, 2, 1000);
        assert_eq!(pace.draft_cost(1), None, "a sweep without is seen first");
        pace.swept(1, 0, 0.1, 0.1);
        assert_eq!(pace.draft_cost(1), Some(DRAFT_COST_FIRST));
        assert_eq!(pace.draft_cost(2), None);
        for _ in 0..60 {
            pace.drafted(1, 4, 0.104);
        }
        let cost = pace.draft_cost(1).expect("it is known");
        assert!((cost - 0.01).abs() < 1e-3, "{cost}");
        pace.drafted(1, 4, 30.0);
        assert!(pace.draft_cost(1).is_some_and(|cost| cost < 0.25));
        for _ in 0..DRAFTED_MAX {
            pace.drafted(1, 4, 0.104);
        }
        assert_eq!(pace.draft_cost(1), None, "a sweep without is seen again");
    }

    #[test]
    fn a_machine_that_cannot_keep_the_limit_still_goes_on() {
        let mut pace = Pace::new(1.1, 1, 1000);
        assert_eq!(settle(&mut pace, 1, |_, p| 0.01 + p as f32), ROWS_LEAST);
    }

    #[test]
    fn a_long_prompt_alone_takes_no_sweep_of_minutes() {
        // The 8B on a small board, a 70B there, and a model for which no sweep is long.
        for (sweep_bytes, row_s, reading_s) in [
            (4_200_000_000, 0.22, 1.0),
            (40_000_000_000, 2.0, 20.0),
            (100_000_000, 0.001, 0.0),
        ] {
            let mut pace = Pace::new(2.0, 8, sweep_bytes);
            for sweep in 0..20 {
                let rows = pace.prefill_rows(0, 512, COMPUTING_S_MAX);
                // A sweep reads all weights, however few its rows.
                let computing = (row_s * rows as f32).max(sweep_bytes as f32 / 30e9);
                assert!(computing < 1.5 * COMPUTING_S_MAX, "{rows} rows at first");
                if sweep > 5 {
                    let full = rows == 512;
                    assert!(full || computing > 0.6 * COMPUTING_S_MAX, "{rows} rows");
                }
                pace.swept(0, rows, computing + reading_s, computing);
            }
        }
    }
}
