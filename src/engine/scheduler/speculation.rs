//! Drafts, how likely they are right, and how many of them pay. Pure.
//!
//! The sweep that computes an answer's last token computes the drafts' rows beside it, and each draft that the sampler
//! would have chosen anyway saves a sweep (speculative decoding, arXiv 2211.17192). A row's logits do not depend on its
//! neighbours in the batch, so neither do the tokens.

use heapless::Vec;

/// Drafts of an answer in a sweep, at most.
pub const DRAFTS_MAX: usize = 64;

/// How much one draft that is seen to be right or wrong moves what is believed of the next.
const WEIGHT: f32 = 0.1;
/// How much what is believed of a draft model comes back to what it was at first, where that keeps it from drafting.
const FORGETTING: f32 = 0.01;

/// What tells drafts of different worth apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Class(u8);

/// The conversation repeats itself for at least so many tokens before a draft: 2, 4 and 8 are told apart.
const MATCHED: [usize; 2] = [4, 8];
/// The draft model gives a draft's logit such a lead before the best of the others: what has less, and what has more, are
/// told apart.
const LEADS: [f32; 5] = [0.0, 0.5, 1.5, 3.0, 5.0];
const CLASSES: usize = MATCHED.len() + 1 + LEADS.len() + 1 + 1;

impl Class {
    /// What the draft model says first, before it has.
    pub(super) const UNSEEN: Class = Class(CLASSES as u8 - 1);

    /// The draft follows `len` tokens that followed each other before.
    pub(super) fn matched(len: usize) -> Class {
        Class(MATCHED.iter().filter(|&&class| len >= class).count() as u8)
    }

    /// The draft model gives the draft this lead.
    pub(super) fn lead(lead: f32) -> Class {
        let leads = LEADS.iter().filter(|&&class| lead >= class).count();
        Class((MATCHED.len() + 1 + leads) as u8)
    }

    /// Whether a draft model has made the draft.
    pub(super) fn is_models(self) -> bool {
        usize::from(self.0) > MATCHED.len()
    }
}

/// A token that is likely to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Draft {
    pub(super) token: u32,
    pub(super) class: Class,
}

/// Tokens that are likely to come one after the other.
pub(super) type Drafts = Vec<Draft, DRAFTS_MAX>;

/// How likely a draft is right if those before it are, by its class. Learnt from every token that is chosen where there
/// was a draft of it, whether that was computed or not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trust([f32; CLASSES]);

impl Default for Trust {
    fn default() -> Trust {
        let repeated = [0.3, 0.5, 0.7];
        // What the leads of a 4-bit quantization of SmolLM2 were worth for the model itself.
        let leads = [0.25, 0.45, 0.65, 0.85, 0.95, 0.98];
        let mut trust = [0.65; CLASSES];
        trust[..repeated.len()].copy_from_slice(&repeated);
        trust[repeated.len()..][..leads.len()].copy_from_slice(&leads);
        Trust(trust)
    }
}

impl Trust {
    /// How likely a draft of this class is right.
    pub(super) fn of(&self, class: Class) -> f32 {
        self.0[usize::from(class.0)]
    }

    /// Takes into account that a draft of this class was right, or was not.
    pub(super) fn learn(&mut self, class: Class, right: bool) {
        let trust = &mut self.0[usize::from(class.0)];
        *trust += WEIGHT * (f32::from(u8::from(right)) - *trust);
    }

    /// What was learnt of a draft model was in another part of the text, the longer ago the more.
    pub(super) fn forget_models(&mut self) {
        let unseen = usize::from(Class::UNSEEN.0);
        self.0[unseen] += FORGETTING * (Trust::default().0[unseen] - self.0[unseen]);
    }
}

/// What a sweep brings and takes so far, in shares of one without drafts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bargain {
    /// Tokens that come of it, as far as one can tell.
    tokens: f32,
    /// Its time.
    time: f32,
}

impl Bargain {
    /// A sweep of so many answers' rows, each of which surely gives a token.
    pub(super) fn new(decoders: usize) -> Bargain {
        Bargain {
            tokens: decoders as f32,
            time: 1.0,
        }
    }

    /// Whether so many more tokens are worth so much more time: they add a larger share to the tokens.
    pub(super) fn is_better(&self, tokens: f32, time: f32) -> bool {
        tokens / self.tokens > time / self.time
    }

    /// Takes that offer.
    pub(super) fn add(&mut self, tokens: f32, time: f32) {
        (self.tokens, self.time) = (self.tokens + tokens, self.time + time);
    }
}

/// A request that could have drafts in a sweep.
pub(super) struct Candidate {
    /// Its place among the requests of the sweep.
    pub(super) at: usize,
    /// How likely each of its drafts is right with all before it, as far as it may have them.
    pub(super) chances: Vec<f32, DRAFTS_MAX>,
    /// Drafts that it may have.
    pub(super) most: usize,
    /// Drafts that it is given.
    pub(super) given: usize,
}

impl Candidate {
    /// Of these drafts, as trusted.
    pub(super) fn weigh(&mut self, drafts: &[Draft], trust: &Trust) {
        let mut chance = 1.0;
        self.chances.clear();
        self.chances
            .extend(drafts.iter().take(self.most).map(|draft| {
                chance *= trust.of(draft.class);
                chance
            }));
    }
}

/// Shares out at most `rows` drafts so that the most tokens come in a second.
///
/// `decoders` is how many rows there are without drafts, and `cost` what a draft adds to the sweep, as a share of a sweep
/// without. Every next draft is the likeliest that there is; it is given while it pays.
pub(super) fn share_out(candidates: &mut [Candidate], rows: usize, decoders: usize, cost: f32) {
    let mut bargain = Bargain::new(decoders);
    for _ in 0..rows {
        let open = candidates.iter_mut().filter(|c| c.given < c.chances.len());
        let likeliest = open.max_by(|a, b| a.chances[a.given].total_cmp(&b.chances[b.given]));
        let Some(likeliest) = likeliest else {
            return;
        };
        let chance = likeliest.chances[likeliest.given];
        if !bargain.is_better(chance, cost) {
            return;
        }
        likeliest.given += 1;
        bargain.add(chance, cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(at: usize, most: usize, trust: f32) -> Candidate {
        let class = Class::matched(2);
        let draft = Draft { token: 1, class };
        let mut candidate = Candidate {
            at,
            chances: Vec::new(),
            most,
            given: 0,
        };
        candidate.weigh(&[draft; 9], &Trust([trust; CLASSES]));
        candidate
    }

    /// Drafts of each request, where each may have 7 and all `rows`.
    fn given(trusts: &[f32], rows: usize, cost: f32) -> std::vec::Vec<usize> {
        let candidates = trusts.iter().enumerate();
        let mut candidates: std::vec::Vec<_> =
            candidates.map(|(at, t)| candidate(at, 7, *t)).collect();
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
    }

    #[test]
    fn trust_follows_what_is_seen_of_each_class() {
        let mut trust = Trust::default();
        let classes = [Class::matched(2), Class::matched(9), Class::lead(0.1)];
        for _ in 0..60 {
            trust.learn(classes[0], false);
            trust.learn(classes[1], true);
            trust.learn(classes[2], true);
        }
        assert!(trust.of(classes[0]) < 0.01 && trust.of(classes[1]) > 0.99);
        for other in [Class::matched(4), Class::lead(0.5), Class::lead(9.0)] {
            assert_eq!(trust.of(other), Trust::default().of(other));
        }
        let told = |class: Class| class.is_models();
        assert_eq!(classes.map(told), [false, false, true]);
        assert!(Class::UNSEEN.is_models() && Class::lead(f32::INFINITY) != Class::UNSEEN);
    }

    #[test]
    fn a_draft_model_that_was_wrong_is_asked_again_later() {
        let mut trust = Trust::default();
        for _ in 0..100 {
            trust.learn(Class::UNSEEN, false);
        }
        let before = trust.of(Class::UNSEEN);
        for _ in 0..100 {
            trust.forget_models();
        }
        let after = trust.of(Class::UNSEEN);
        assert!(before < 0.01 && (0.3..0.6).contains(&after), "{after}");
    }
}
