//! Which rows go into a sweep. Pure: it sees numbers of rows only.

/// What one request has to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Rows until its next token can be chosen, at least 1; the last of them wants logits.
    pub rows: usize,
    /// It is choosing tokens already: somebody watches it word by word.
    pub decoding: bool,
}

/// How many rows there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// In all.
    pub rows: usize,
    /// That want logits.
    pub logits_rows: usize,
    /// Of prompts, beside the decoding ones.
    pub prefill_rows: usize,
}

/// Decides how many rows each of `wants` has in the next sweep; `takes` has the same length.
///
/// Each decoding request has its row. What `prefill_rows` allows is shared evenly among the prompts, what one does not
/// need going to the others. Where there is not enough for all, those who are first change with `turn`, which counts
/// sweeps, so everybody's turn comes.
pub fn compose(wants: &[Want], limits: Limits, turn: usize, takes: &mut [usize]) {
    takes.fill(0);
    let count = wants.len();
    let mut left = limits;
    for index in (0..count).map(|index| (index + turn) % count) {
        if wants[index].decoding && left.rows > 0 && left.logits_rows > 0 {
            takes[index] = 1;
            left.rows -= 1;
            left.logits_rows -= 1;
        }
    }
    let mut budget = left.prefill_rows.min(left.rows);
    let mut prompts = wants.iter().filter(|want| !want.decoding).count();
    // Shares are even if those who need less than theirs are served first; so many passes are enough, because each
    // but the last serves somebody whole.
    while budget > 0 && prompts > 0 {
        let share = budget / prompts;
        let mut whole = 0;
        for (want, take) in wants.iter().zip(takes.iter_mut()) {
            if !want.decoding && *take == 0 && want.rows <= share {
                *take = want.rows;
                budget -= want.rows;
                whole += 1;
            }
        }
        prompts -= whole;
        if whole == 0 {
            share_out(wants, &mut budget, share, turn, takes);
            break;
        }
    }
    // A prompt that would be done, but could have no logits, keeps its last row for the next sweep.
    for index in (0..count).map(|index| (index + turn) % count) {
        let want = wants[index];
        if !want.decoding && takes[index] == want.rows {
            if left.logits_rows > 0 {
                left.logits_rows -= 1;
            } else {
                takes[index] -= 1;
            }
        }
    }
}

/// Gives every prompt without rows its share, and what division leaves over to the first ones.
fn share_out(wants: &[Want], budget: &mut usize, share: usize, turn: usize, takes: &mut [usize]) {
    let count = wants.len();
    let prompts = (wants.iter().zip(&*takes))
        .filter(|(want, take)| !want.decoding && **take == 0)
        .count();
    let mut over = *budget - share * prompts;
    for index in (0..count).map(|index| (index + turn) % count) {
        if !wants[index].decoding && takes[index] == 0 {
            takes[index] = share + usize::from(over > 0);
            over = over.saturating_sub(1);
            *budget -= takes[index];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DECODE: Want = Want {
        rows: 1,
        decoding: true,
    };

    fn prompt(rows: usize) -> Want {
        Want {
            rows,
            decoding: false,
        }
    }

    fn composed(wants: &[Want], limits: (usize, usize, usize), turn: usize) -> Vec<usize> {
        let mut takes = vec![9; wants.len()];
        let limits = Limits {
            rows: limits.0,
            logits_rows: limits.1,
            prefill_rows: limits.2,
        };
        compose(wants, limits, turn, &mut takes);
        takes
    }

    #[test]
    fn decoders_come_first_and_prompts_share_what_may_delay_them() {
        let wants = [prompt(100), DECODE, prompt(3), DECODE, prompt(50)];
        assert_eq!(composed(&wants, (64, 5, 20), 0), [9, 1, 3, 1, 8]);
        assert_eq!(composed(&wants, (64, 5, 20), 4), [8, 1, 3, 1, 9]);
        assert_eq!(composed(&wants, (64, 5, 0), 0), [0, 1, 0, 1, 0]);
        assert_eq!(composed(&wants, (4, 5, 20), 0), [1, 1, 1, 1, 0]);
        assert_eq!(composed(&[prompt(700)], (512, 1, 512), 3), [512]);
    }

    #[test]
    fn rows_without_logits_wait() {
        assert_eq!(composed(&[prompt(10), DECODE], (64, 1, 64), 0), [9, 1]);
        assert_eq!(composed(&[prompt(1), DECODE], (64, 1, 64), 0), [0, 1]);
        assert_eq!(composed(&[DECODE, DECODE], (64, 1, 64), 1), [0, 1]);
    }

    fn wants() -> impl Strategy<Value = Vec<Want>> {
        let want = prop_oneof![Just(DECODE), (1usize..600).prop_map(prompt)];
        prop::collection::vec(want, 1..24)
    }

    proptest! {
        #[test]
        fn no_limit_is_passed_and_nothing_is_left_idle(
            wants in wants(),
            (rows, logits, prefill) in (1usize..128, 1usize..24, 0usize..128),
            turn in 0usize..1000,
        ) {
            let takes = composed(&wants, (rows, logits, prefill), turn);
            let sum = |decoding: bool| -> usize {
                (wants.iter().zip(&takes)).filter(|(w, _)| w.decoding == decoding).map(|(_, t)| t).sum()
            };
            let logits_taken = wants.iter().zip(&takes).filter(|(w, t)| w.rows == **t).count();
            prop_assert!(wants.iter().zip(&takes).all(|(w, t)| *t <= w.rows));
            prop_assert!(sum(true) + sum(false) <= rows);
            prop_assert!(sum(false) <= prefill);
            prop_assert!(logits_taken <= logits);
            let decoders = wants.iter().filter(|w| w.decoding).count();
            prop_assert_eq!(sum(true), decoders.min(rows).min(logits));
            // Prompts get all that is allowed, but for last rows that could have no logits.
            let wanted: usize = wants.iter().filter(|w| !w.decoding).map(|w| w.rows).sum();
            let prompts = wants.len() - decoders;
            prop_assert!(sum(false) + prompts >= wanted.min(prefill).min(rows - sum(true)));
            if logits >= wants.len() {
                prop_assert_eq!(sum(false), wanted.min(prefill).min(rows - sum(true)));
                // Nobody has two rows more than another who wanted more.
                for (a, ta) in wants.iter().zip(&takes).filter(|(w, _)| !w.decoding) {
                    for (_, tb) in wants.iter().zip(&takes).filter(|(w, _)| !w.decoding) {
                        prop_assert!(*ta == a.rows || ta + 1 >= *tb);
                    }
                }
            }
        }

        #[test]
        fn nobody_starves(wants in wants(), rows in 1usize..40, logits in 1usize..24, prefill in 1usize..40) {
            let mut left: Vec<usize> = wants.iter().map(|w| w.rows).collect();
            // With more decoders than rows prompts wait for ever, unless decoders are done some time: here, at once.
            let total: usize = left.iter().sum();
            let mut turn = 0;
            while left.iter().any(|&rows| rows > 0) {
                let at: Vec<usize> = (0..wants.len()).filter(|&i| left[i] > 0).collect();
                let now: Vec<Want> = at.iter().map(|&i| Want { rows: left[i], ..wants[i] }).collect();
                for (&i, take) in at.iter().zip(composed(&now, (rows, logits, prefill), turn)) {
                    left[i] -= take;
                }
                turn += 1;
                prop_assert!(turn <= total, "{left:?} left after {turn} sweeps");
            }
        }
    }
}
