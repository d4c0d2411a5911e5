//! What is likely to come next in a conversation because it came next in it before: drafts that cost no memory and no
//! model. Pure.
//!
//! Prompt lookup decoding (Saxena, 2023): where the last tokens stood before, what followed them there is drafted.

use super::speculation::{Class, Draft};

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

    /// What followed there, and where that reaches the conversation's end, the same again; without an end.
    pub(super) fn drafts<'a>(&'a self, tokens: &'a [u32]) -> impl Iterator<Item = Draft> + 'a {
        let again = tokens[self.from..self.end].iter().cycle();
        again.enumerate().map(|(index, &token)| Draft {
            token,
            class: Class::matched(self.len + index),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drafts(tokens: &[u32], count: usize) -> Option<Vec<u32>> {
        let found = Match::find(tokens)?;
        let drafts = found.drafts(tokens).take(count);
        Some(drafts.map(|draft| draft.token).collect())
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

    proptest! {
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
    fn a_longer_match_is_trusted_like_one_and_what_it_drafts_makes_it_longer() {
        let tokens = [1, 2, 3, 4, 5, 1, 2];
        let found = Match::find(&tokens).expect("it repeats");
        let classes: Vec<Class> = found.drafts(&tokens).take(7).map(|d| d.class).collect();
        let expected: Vec<Class> = (2..9).map(Class::matched).collect();
        assert_eq!(classes, expected);
        assert!(classes[0] != classes[2] && classes[2] != classes[6]);
    }
}
