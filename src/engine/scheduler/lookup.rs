//! What is likely to come next in a conversation because it came next in it before: drafts that cost no memory and no
//! model. Pure.
//!
//! Prompt lookup decoding (Saxena, 2023): where the last tokens stood before, what followed them there is drafted. The
//! sweep that computes the last token's row computes the drafts' rows beside it, and each draft that the sampler would
//! have chosen anyway saves a sweep (speculative decoding, arXiv 2211.17192). A row's logits do not depend on its
//! neighbours in the batch, so neither do the tokens.

/// Tokens that must have stood together before.
const MATCH_MIN: usize = 2;
/// Tokens that are compared at most: more tell nothing more.
const MATCH_MAX: usize = 16;

/// A place in a conversation that was like its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Match {
    /// Where what followed begins.
    from: usize,
    /// Where the conversation ended.
    end: usize,
    /// How many tokens before both are the same.
    len: usize,
}

impl Match {
    /// The place most like the end of `tokens`: the longest match, of equals the latest.
    pub(super) fn find(tokens: &[u32]) -> Option<Match> {
        let (&last, before) = tokens.split_last()?;
        let end = tokens.len();
        let (mut from, mut longest) = (0, MATCH_MIN - 1);
        for (at, _) in before.iter().enumerate().rev().filter(|(_, t)| **t == last) {
            let ends = tokens[..=at].iter().rev().zip(tokens.iter().rev());
            let len = ends.take(MATCH_MAX).take_while(|(a, b)| a == b).count();
            if len > longest {
                (from, longest) = (at + 1, len);
                if len == MATCH_MAX {
                    break;
                }
            }
        }
        (longest >= MATCH_MIN).then_some(Match {
            from,
            end,
            len: longest,
        })
    }

    /// The `index`-th draft: what followed there, and where that reaches the conversation's end, the same again.
    pub(super) fn draft(&self, tokens: &[u32], index: usize) -> u32 {
        tokens[self.from + index % (self.end - self.from)]
    }
}

/// How much one draft that is seen to be right or wrong moves what is believed of the next.
const WEIGHT: f32 = 0.1;
/// Matches shorter than each of these are believed differently from longer ones.
const CLASSES: [usize; 2] = [4, 8];

/// How likely a draft is right, by how much of what came before it is a match. Learnt from every token that is chosen
/// where there was a match, whether its draft was computed or not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trust([f32; CLASSES.len() + 1]);

impl Default for Trust {
    fn default() -> Trust {
        Trust([0.3, 0.5, 0.7])
    }
}

impl Trust {
    fn class(found: &Match, index: usize) -> usize {
        let matched = found.len + index;
        CLASSES.iter().filter(|&&class| matched >= class).count()
    }

    /// How likely the `index`-th draft is right if those before it are.
    pub(super) fn of(&self, found: &Match, index: usize) -> f32 {
        self.0[Trust::class(found, index)]
    }

    /// Takes into account that the `index`-th draft was right, or was not.
    pub(super) fn learn(&mut self, found: &Match, index: usize, right: bool) {
        let trust = &mut self.0[Trust::class(found, index)];
        *trust += WEIGHT * (f32::from(u8::from(right)) - *trust);
    }
}

/// A request that could have drafts.
pub(super) struct Candidate {
    /// Its place among the requests of the sweep.
    pub(super) at: usize,
    pub(super) found: Match,
    pub(super) trust: Trust,
    /// Drafts that it may have.
    pub(super) most: usize,
    /// Drafts that it is given.
    pub(super) given: usize,
}

/// Shares out at most `rows` drafts so that the most tokens come in a second.
///
/// `decoders` is how many rows there are without drafts, each of which surely gives a token, and `cost` what a draft adds
/// to the sweep, as a share of a sweep without. Every next draft is the likeliest that there is; it pays while it adds a
/// larger share to the tokens than to the time.
pub(super) fn share_out(candidates: &mut [Candidate], rows: usize, decoders: usize, cost: f32) {
    let (mut tokens, mut time) = (decoders as f32, 1.0);
    for _ in 0..rows {
        // How likely the next draft is right, with all before it.
        let chance = |c: &Candidate| -> f32 {
            (0..=c.given)
                .map(|index| c.trust.of(&c.found, index))
                .product()
        };
        let open = candidates.iter_mut().filter(|c| c.given < c.most);
        let likeliest = open.max_by(|a, b| chance(a).total_cmp(&chance(b)));
        let Some(likeliest) = likeliest else {
            return;
        };
        let chance = chance(likeliest);
        if chance / tokens <= cost / time {
            return;
        }
        likeliest.given += 1;
        (tokens, time) = (tokens + chance, time + cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drafts(tokens: &[u32], count: usize) -> Option<Vec<u32>> {
        let found = Match::find(tokens)?;
        Some((0..count).map(|i| found.draft(tokens, i)).collect())
    }

    #[test]
    fn what_followed_the_longest_match_is_drafted_and_of_equals_the_latest() {
        assert_eq!(drafts(&[1, 2, 3, 4, 9, 1, 2], 2), Some(vec![3, 4]));
        let longer_first = [7, 1, 2, 3, 0, 8, 1, 2, 4, 0, 7, 1, 2];
        assert_eq!(drafts(&longer_first, 2), Some(vec![3, 0]));
        let equals = [1, 2, 3, 0, 1, 2, 4, 0, 1, 2];
        assert_eq!(drafts(&equals, 1), Some(vec![4]));
    }

    #[test]
    fn one_token_that_came_before_is_no_match() {
        for tokens in [&[][..], &[1], &[1, 2, 1], &[5, 1, 3, 2, 1]] {
            assert_eq!(drafts(tokens, 1), None, "{tokens:?}");
        }
    }

    #[test]
    fn what_repeats_itself_is_drafted_to_go_on() {
        assert_eq!(drafts(&[0, 6, 6, 6], 4), Some(vec![6; 4]));
        assert_eq!(drafts(&[1, 2, 3, 1, 2, 3], 5), Some(vec![1, 2, 3, 1, 2]));
    }

    fn candidate(at: usize, most: usize, trust: f32) -> Candidate {
        Candidate {
            at,
            found: Match::find(&[1, 2, 1, 2]).expect("it repeats"),
            trust: Trust([trust; CLASSES.len() + 1]),
            most,
            given: 0,
        }
    }

    /// Drafts of each request, where each may have 7 and all `rows`.
    fn given(trusts: &[f32], rows: usize, cost: f32) -> Vec<usize> {
        let candidates = trusts.iter().enumerate();
        let mut candidates: Vec<_> = candidates.map(|(at, t)| candidate(at, 7, *t)).collect();
        share_out(&mut candidates, rows, trusts.len(), cost);
        candidates.iter().map(|c| c.given).collect()
    }

    #[test]
    fn drafts_go_as_far_as_they_pay() {
        assert_eq!(
            given(&[0.9], 7, 0.0),
            [7],
            "reading weights takes all the time"
        );
        assert_eq!(given(&[0.1], 7, 0.2), [0]);
        assert_eq!(
            given(&[0.5], 7, 0.25),
            [1],
            "the second adds a sixth of the tokens and a fifth of the time"
        );
        assert_eq!(given(&[0.9, 0.6], 6, 0.02), [5, 1]);
        assert_eq!(given(&[0.9, 0.9], 5, 0.01), [2, 3]);
        assert_eq!(given(&[], 5, 0.0), [] as [usize; 0]);
    }

    proptest! {
        #[test]
        fn no_other_number_of_drafts_gives_more_tokens_in_the_same_time(trust in 0.01f32..0.99, cost in 0.001f32..0.5) {
            let rate = |drafts: usize| {
                let tokens: f32 = (0..=drafts).map(|i| trust.powi(i as i32)).sum();
                tokens / (1.0 + cost * drafts as f32)
            };
            let chosen = given(&[trust], 7, cost)[0];
            for other in 0..=7 {
                prop_assert!(rate(other) <= rate(chosen) * 1.0001, "{chosen} instead of {other}");
            }
        }

        #[test]
        fn a_match_is_where_it_says(tokens in prop::collection::vec(0u32..4, 0..64)) {
            let Some(found) = Match::find(&tokens) else {
                if let [before @ .., _] = &tokens[..] {
                    let end = &tokens[before.len().saturating_sub(1)..];
                    prop_assert!(end.len() < 2 || !before.windows(2).any(|two| two == end));
                }
                return Ok(());
            };
            prop_assert!(found.from < found.end && found.end == tokens.len());
            prop_assert!(found.len >= MATCH_MIN && found.len <= found.from);
            prop_assert_eq!(&tokens[found.from - found.len..found.from], &tokens[found.end - found.len..]);
        }
    }

    #[test]
    fn trust_follows_what_is_seen_and_a_longer_match_has_its_own() {
        let (short, long) = (
            Match {
                from: 1,
                end: 9,
                len: 2,
            },
            Match {
                from: 9,
                end: 20,
                len: 9,
            },
        );
        let mut trust = Trust::default();
        for _ in 0..60 {
            trust.learn(&short, 0, false);
            trust.learn(&long, 0, true);
        }
        assert!(trust.of(&short, 0) < 0.01 && trust.of(&long, 0) > 0.99);
        assert_eq!(
            trust.of(&short, 2),
            Trust::default().of(&short, 2),
            "it is as if four were the same"
        );
    }
}
