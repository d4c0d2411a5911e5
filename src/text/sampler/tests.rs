//! Every option against small distributions that can be worked out by hand.

use super::{Sampler, SamplerOptions, SamplerScratch, gather};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Everything off but the random choice.
fn open() -> SamplerOptions {
    SamplerOptions {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 7,
        ..SamplerOptions::default()
    }
}

/// How often each token is chosen in `draws`.
fn counts(options: SamplerOptions, logits: &[f32], draws: usize) -> BTreeMap<u32, usize> {
    let mut sampler = Sampler::new(options);
    let mut scratch = SamplerScratch::new(logits.len());
    let mut counts = BTreeMap::new();
    for _ in 0..draws {
        *counts
            .entry(
                sampler
                    .sample(&mut logits.to_vec(), &mut scratch)
                    .expect("a token"),
            )
            .or_default() += 1;
    }
    counts
}

fn chosen(options: SamplerOptions, logits: &[f32]) -> Vec<u32> {
    counts(options, logits, 2000).into_keys().collect()
}

/// Logits of these probabilities.
fn logits_of(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

#[test]
fn greedy_takes_the_first_of_the_likeliest() {
    let options = SamplerOptions {
        temperature: 0.0,
        ..SamplerOptions::default()
    };
    let (mut sampler, mut scratch) = (Sampler::new(options), SamplerScratch::new(1000));
    let mut logits = vec![-1.0; 1000];
    assert_eq!(sampler.sample(&mut logits, &mut scratch), Some(0));
    (logits[10], logits[700], logits[999]) = (f32::NAN, 3.5, 3.5);
    assert_eq!(sampler.sample(&mut logits, &mut scratch), Some(700));
}

#[test]
fn another_that_follows_chooses_what_the_first_one_would_and_takes_nothing_from_it() {
    let options = SamplerOptions {
        repeat_penalty: 1.3,
        penalty_window: 5,
        seed: 9,
        ..SamplerOptions::default()
    };
    let mut scratch = SamplerScratch::new(12);
    let logits: Vec<f32> = (0..12).map(|i| (i * 7 % 5) as f32 / 2.0).collect();
    let mut next = |sampler: &mut Sampler| {
        let token = sampler.sample(&mut logits.clone(), &mut scratch);
        sampler.accept(token.expect("a token"));
        token
    };
    let (mut first, mut alone) = (Sampler::new(options.clone()), Sampler::new(options));
    let mut another = first.another();
    for _ in 0..20 {
        another.follow(&first);
        let ahead: Vec<_> = (0..7).map(|_| next(&mut another)).collect();
        let came: Vec<_> = (0..3).map(|_| next(&mut first)).collect();
        assert_eq!(came, ahead[..3]);
        assert_eq!(came, [(); 3].map(|()| next(&mut alone)));
    }
}

/// What a damaged file gives, by every way to a token: there is nothing to choose then, and no token is as good as
/// any other.
#[test]
fn logits_that_are_not_finite_give_no_token() {
    let bias = |bias| vec![(1, bias)];
    let ways = [
        SamplerOptions {
            temperature: 0.0,
            ..open()
        },
        open(),
        SamplerOptions::default(),
        SamplerOptions { top_k: 1, ..open() },
        SamplerOptions {
            repeat_penalty: 1.1,
            ..SamplerOptions::default()
        },
        SamplerOptions {
            logit_bias: bias(40.0),
            ..SamplerOptions::default()
        },
    ];
    let mut scratch = SamplerScratch::new(400);
    for options in ways {
        let mut sampler = Sampler::new(options.clone());
        sampler.accept(1);
        for (bad, wanted) in [
            ([f32::NAN; 3], None),
            ([f32::NEG_INFINITY; 3], None),
            ([f32::NAN, f32::NEG_INFINITY, -f32::NAN], None),
            ([-1.0, 2.0, f32::INFINITY], None),
            // One token's weights alone are damaged.
            ([f32::NAN, 2.0, f32::NEG_INFINITY], Some(1)),
        ] {
            let mut logits = [f32::NEG_INFINITY; 400];
            logits[..3].copy_from_slice(&bad);
            let likeliest = likeliest_of(&logits, 64);
            let from_all = sampler.sample(&mut logits, &mut scratch);
            assert_eq!(from_all, wanted, "{bad:?}, {options:?}");
            if sampler.looks_at().is_some_and(|count| count <= 64) {
                let from_few = sampler.sample_likeliest(likeliest.into_iter(), &mut scratch);
                assert_eq!(from_few, wanted, "{bad:?}, {options:?}");
            }
        }
    }
    let forced = SamplerOptions {
        logit_bias: bias(f32::INFINITY),
        ..open()
    };
    let token = Sampler::new(forced).sample(&mut [1.0, 2.0], &mut scratch);
    assert_eq!(token, Some(1), "a bias forces it");
}

#[test]
fn draws_follow_the_distribution() {
    let probabilities = [0.1, 0.2, 0.4, 0.3];
    let counts = counts(open(), &logits_of(&probabilities), 40_000);
    for (id, p) in (0..).zip(probabilities) {
        let share = counts[&id] as f32 / 40_000.0;
        assert!((share - p).abs() < 0.01, "{id}: {share} for {p}");
    }
}

#[test]
fn temperature_sharpens() {
    let options = SamplerOptions {
        temperature: 0.5,
        ..open()
    };
    // Squared and normalised: 0.2 and 0.8.
    let counts = counts(options, &logits_of(&[1.0 / 3.0, 2.0 / 3.0]), 20_000);
    assert!((counts[&1] as f32 / 20_000.0 - 0.8).abs() < 0.015);
}

#[test]
fn top_k_keeps_exactly_k_and_the_lower_ids_of_equals() {
    let logits = [1.0, 2.0, 2.0, 0.5, 2.0, 3.0];
    let options = |top_k| SamplerOptions { top_k, ..open() };
    assert_eq!(chosen(options(1), &logits), [5]);
    assert_eq!(chosen(options(3), &logits), [1, 2, 5]);
    assert_eq!(chosen(options(100), &logits), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn top_p_keeps_the_fewest_that_suffice() {
    let logits = logits_of(&[0.15, 0.5, 0.05, 0.3]);
    let options = |top_p| SamplerOptions { top_p, ..open() };
    assert_eq!(chosen(options(0.1), &logits), [1]);
    assert_eq!(chosen(options(0.6), &logits), [1, 3]);
    assert_eq!(chosen(options(0.9), &logits), [0, 1, 3]);
    assert_eq!(chosen(options(1.0), &logits), [0, 1, 2, 3]);
}

#[test]
fn top_p_over_a_large_vocabulary_needs_no_sorting() {
    let logits = vec![0.0; 20_000];
    let options = SamplerOptions {
        top_p: 0.5,
        ..open()
    };
    let highest = counts(options, &logits, 300).into_keys().max();
    assert!(
        highest.is_some_and(|id| (9_000..=10_000).contains(&id)),
        "{highest:?}"
    );
}

#[test]
fn min_p_compares_with_the_likeliest() {
    let logits = logits_of(&[0.5, 0.3, 0.11, 0.09]);
    let options = |min_p| SamplerOptions { min_p, ..open() };
    assert_eq!(chosen(options(0.2), &logits), [0, 1, 2]);
    assert_eq!(chosen(options(0.59), &logits), [0, 1]);
    assert_eq!(chosen(options(1.0), &logits), [0]);
}

#[test]
fn the_same_seed_chooses_the_same_tokens() {
    let logits: Vec<f32> = (0..5000)
        .map(|i| (i * 7919 % 1000) as f32 / 200.0)
        .collect();
    let mut scratch = SamplerScratch::new(5000);
    let mut run = |sampler: &mut Sampler| -> Vec<Option<u32>> {
        (0..50)
            .map(|_| sampler.sample(&mut logits.clone(), &mut scratch))
            .collect()
    };
    let seeded = |seed| {
        Sampler::new(SamplerOptions {
            seed,
            ..SamplerOptions::default()
        })
    };
    let (mut sampler, mut other) = (seeded(1), seeded(2));
    let first = run(&mut sampler);
    assert_ne!(first, run(&mut other));
    assert_ne!(first, run(&mut sampler));
    sampler.reset();
    assert_eq!(first, run(&mut sampler));
}

#[test]
fn penalties_count_what_was_said_in_the_window() {
    let options = SamplerOptions {
        temperature: 0.0,
        repeat_penalty: 2.0,
        frequency_penalty: 0.25,
        presence_penalty: 0.5,
        penalty_window: 3,
        ..SamplerOptions::default()
    };
    let (mut sampler, mut scratch) = (Sampler::new(options), SamplerScratch::new(4));
    for token in [0, 1, 1, 3] {
        sampler.accept(token);
    }
    let mut logits = [4.0, 4.0, 3.0, -1.0];
    assert_eq!(sampler.sample(&mut logits, &mut scratch), Some(0));
    assert_eq!(
        logits,
        [4.0, 4.0 / 2.0 - 2.0 * 0.25 - 0.5, 3.0, -2.0 - 0.75]
    );
    sampler.reset();
    let mut logits = [4.0, 5.0, 3.0, -1.0];
    sampler.accept(99);
    assert_eq!(sampler.sample(&mut logits, &mut scratch), Some(1));
    assert_eq!(logits, [4.0, 5.0, 3.0, -1.0]);
}

#[test]
fn bias_bans_and_forces() {
    let bias = |logit_bias| SamplerOptions {
        logit_bias,
        ..open()
    };
    let logits = [1.0, 2.0, 3.0];
    assert_eq!(
        chosen(bias(vec![(2, f32::NEG_INFINITY), (9, 1.0)]), &logits),
        [0, 1]
    );
    assert_eq!(chosen(bias(vec![(0, f32::INFINITY)]), &logits), [0]);
}

#[test]
fn samplers_that_share_scratch_do_not_feel_each_other() {
    let logits: Vec<f32> = (0..3000).map(|i| (i * 7919 % 997) as f32 / 99.0).collect();
    let options = [0, 1, 40].map(|top_k| SamplerOptions { top_k, ..open() });
    let alone = options.clone().map(|options| {
        let (mut sampler, mut scratch) = (Sampler::new(options), SamplerScratch::new(3000));
        [(); 20].map(|()| sampler.sample(&mut logits.clone(), &mut scratch))
    });
    let (mut samplers, mut scratch) = (options.map(Sampler::new), SamplerScratch::new(3000));
    let together = [(); 20].map(|()| {
        samplers
            .each_mut()
            .map(|sampler| sampler.sample(&mut logits.clone(), &mut scratch))
    });
    for (index, alone) in alone.iter().enumerate() {
        assert_eq!(*alone, together.map(|tokens| tokens[index]));
    }
}

#[test]
fn neither_zero_is_likelier_than_the_other() {
    let logits = [-1.0, -0.0, 0.0, -2.0, -0.0];
    for top_k in [1, 2, 4] {
        let mut scratch = SamplerScratch::new(logits.len());
        gather(&mut scratch.candidates, &logits, top_k);
        let ids: Vec<u32> = scratch.candidates.iter().map(|c| c.id).collect();
        assert_eq!(ids, [1, 2, 4, 0][..top_k]);
    }
    let greedy = SamplerOptions {
        temperature: 0.0,
        ..open()
    };
    assert_eq!(chosen(greedy, &logits), [1]);
}

#[test]
fn what_changes_single_logits_needs_all_of_them() {
    let looks_at = |options| Sampler::new(options).looks_at();
    let usual = SamplerOptions::default;
    assert_eq!(looks_at(usual()), Some(40));
    let greedy = SamplerOptions {
        temperature: 0.0,
        top_k: 0,
        ..usual()
    };
    assert_eq!(looks_at(greedy), Some(1));
    let needy = [
        SamplerOptions {
            top_k: 0,
            ..usual()
        },
        SamplerOptions {
            repeat_penalty: 1.1,
            ..usual()
        },
        SamplerOptions {
            frequency_penalty: 0.1,
            ..usual()
        },
        SamplerOptions {
            presence_penalty: -0.1,
            ..usual()
        },
        SamplerOptions {
            logit_bias: vec![(3, 1.0)],
            ..usual()
        },
    ];
    for options in needy {
        assert_eq!(looks_at(options.clone()), None, "{options:?}");
    }
}

/// The `count` likeliest tokens, found by sorting, and what stands behind them where there are fewer.
fn likeliest_of(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut tokens: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    tokens.retain(|(_, logit)| *logit > f32::NEG_INFINITY);
    // A stable sort: of equals the lowest comes first.
    tokens.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("numbers"));
    tokens.resize(tokens.len().max(count), (0, f32::NEG_INFINITY));
    tokens.truncate(count);
    tokens
}

/// A logit as a model may give it, or such as it should not.
fn any_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -9.0f32..9.0,
        4 => (-3i8..3).prop_map(f32::from),
        1 => Just(-0.0f32),
        1 => any::<u32>().prop_map(f32::from_bits),
        1 => prop_oneof![Just(f32::NAN), Just(f32::NEG_INFINITY), Just(f32::MIN)],
    ]
}

proptest! {
    #[test]
    fn the_likeliest_tokens_give_what_all_logits_give(
        logits in prop::collection::vec(any_logit(), 1..700),
        (temperature, top_k) in (prop_oneof![Just(0.0f32), 0.1f32..2.0], 1usize..=64),
        (top_p, min_p) in (0.0f32..1.1, 0.0f32..1.1),
        (seed, spare) in (any::<u64>(), 0usize..20),
    ) {
        let options = SamplerOptions { temperature, top_k, top_p, min_p, seed, ..open() };
        let (mut whole, mut few) = (Sampler::new(options.clone()), Sampler::new(options));
        let mut scratch = SamplerScratch::new(logits.len());
        let count = few.looks_at().expect("few are enough") + spare;
        let likeliest = likeliest_of(&logits, count);
        for _ in 0..8 {
            let expected = whole.sample(&mut logits.clone(), &mut scratch);
            let got = few.sample_likeliest(likeliest.iter().copied(), &mut scratch);
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn top_k_agrees_with_sorting(
        logits in prop::collection::vec(prop_oneof![-4i8..4, any::<i8>()], 1..3000),
        top_k in 1usize..80,
    ) {
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        let mut scratch = SamplerScratch::new(logits.len());
        gather(&mut scratch.candidates, &logits, top_k);
        let got: Vec<u32> = scratch.candidates.iter().map(|candidate| candidate.id).collect();
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        ids.truncate(top_k);
        prop_assert_eq!(got, ids);
    }

    #[test]
    fn any_logits_and_options_give_one_of_the_tokens_or_none(
        bits in prop::collection::vec(any::<u32>(), 1..400),
        (temperature, top_k, top_p, min_p) in (0.0f32..3.0, 0usize..50, 0.0f32..1.1, 0.0f32..1.1),
    ) {
        let mut logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let options = SamplerOptions { temperature, top_k, top_p, min_p, ..open() };
        let mut scratch = SamplerScratch::new(logits.len());
        let token = Sampler::new(options).sample(&mut logits, &mut scratch);
        prop_assert!(token.is_none_or(|token| (token as usize) < logits.len()));
    }
}
