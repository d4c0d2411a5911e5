//! The likeliest tokens of rows of logits: what sorting them finds.

use super::ORDERS;
use super::launch::{Memory, Runner, launch};
use crate::support::weights::Rng;

/// Groups, threads that lead one in a block, and tokens that are found: as in `kernels/top_k.cu`.
const GROUPS: usize = 2048;
const LEADERS: usize = 64;
const K: usize = 64;

/// `Likely` of the kernel, by its bits.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Likely {
    logit: u32,
    id: u32,
}

/// The tokens in the sampler's order: what is a number above minus infinity, by size, equal ones by id.
fn sorted(row: &[f32]) -> Vec<Likely> {
    let mut tokens: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
    tokens.retain(|(_, logit)| *logit > f32::NEG_INFINITY);
    tokens.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("numbers"));
    // One zero is as good as the other.
    let likely = |(id, logit): (u32, f32)| Likely {
        logit: if logit == 0.0 { 0 } else { logit.to_bits() },
        id,
    };
    let none = Likely {
        logit: f32::NEG_INFINITY.to_bits(),
        id: 0,
    };
    let tokens = tokens.into_iter().map(likely);
    tokens.chain(std::iter::repeat(none)).take(K).collect()
}

fn found(gpu: &'static dyn Runner, order: u64, logits: &[f32], vocab: usize) -> Vec<Likely> {
    let rows = logits.len() / vocab;
    let logits = Memory::of(gpu, logits);
    // What was in either before is nothing that they read.
    let leaders = Memory::of(gpu, &vec![u64::MAX; rows * GROUPS]);
    let out = Memory::of(gpu, &vec![Likely { logit: 7, id: 7 }; rows * K]);
    launch!(
        gpu, order, "leaders", [(GROUPS / LEADERS) as u32, rows as u32, 1], LEADERS as u32;
        logits.at(0), vocab as u32, leaders.at(0)
    );
    launch!(
        gpu, order, "top_k", [1, rows as u32, 1], (GROUPS / K * 32) as u32;
        logits.at(0), vocab as u32, leaders.at(0), out.at(0)
    );
    out.values()
}

fn assert_found(gpu: &'static dyn Runner, order: u64, logits: &[f32], vocab: usize, what: &str) {
    let got = found(gpu, order, logits, vocab);
    for (row, got) in logits.chunks(vocab).zip(got.chunks(K)) {
        let expected = sorted(row);
        let wrong = got.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(got, expected, "{what}: {vocab} tokens, place {wrong:?}");
    }
}

#[test]
fn the_likeliest_tokens_are_those_that_sorting_finds() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(11);
    // As wide as a vocabulary is, with groups of several sizes and without some.
    let widths = [
        (1, 2),
        (63, 1),
        (65, 3),
        (320, 2),
        (2047, 1),
        (2049, 2),
        (9001, 2),
        (49_152, 1),
        (2048 * 130 + 5, 1),
    ];
    for (case, (vocab, rows)) in widths.into_iter().enumerate() {
        let order = ORDERS[case % 3];
        let logits: Vec<f32> = (0..rows * vocab).map(|_| random.range(-9.0, 9.0)).collect();
        assert_found(gpu, order, &logits, vocab, "any");
        // A few values, so that nearly all are equal to others.
        let equal: Vec<f32> = logits.iter().map(|x| (x / 4.0).round()).collect();
        assert_found(gpu, order, &equal, vocab, "equal ones");
    }
}

#[test]
fn likely_tokens_may_stand_together_anywhere() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(12);
    const VOCAB: usize = 70 * GROUPS + 3;
    let few = GROUPS / 100;
    type Logit<'a> = &'a mut dyn FnMut(usize) -> f32;
    let kinds: [(&str, Logit<'_>); 7] = [
        ("one value", &mut |_| 1.5),
        ("rising", &mut |id| id as f32),
        ("falling", &mut |id| -(id as f32)),
        // So that some warps find all and others nothing.
        ("one group, rising", &mut |id| {
            if id % GROUPS == 77 { id as f32 } else { -1.0 }
        }),
        // The last of them comes alone: the first lane has nothing of those before.
        ("one group, falling", &mut |id| {
            if id % GROUPS == 77 && id > GROUPS {
                (VOCAB - id) as f32
            } else {
                -1.0
            }
        }),
        ("few groups", &mut |id| {
            (if id % GROUPS < few { 100.0 } else { 0.0 }) + random.range(0.0, 50.0)
        }),
        ("one large", &mut |id| f32::from(u8::from(id == 31_999))),
    ];
    for (case, (what, logit)) in kinds.into_iter().enumerate() {
        let logits: Vec<f32> = (0..VOCAB).map(logit).collect();
        assert_found(gpu, ORDERS[case % 3], &logits, VOCAB, what);
    }
}

#[test]
fn what_is_no_number_is_never_likely() {
    let Some(gpu) = crate::runner() else { return };
    let mut random = Rng(13);
    let odd = [
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        f32::MIN,
        f32::MAX,
        f32::from_bits(1),
        -f32::from_bits(1),
    ];
    let mut odd_of = |kinds: &[f32]| kinds[random.next() as usize % kinds.len()];
    for (case, vocab) in [1, 40, 300, 5003].into_iter().enumerate() {
        let order = ORDERS[case % 3];
        let any: Vec<f32> = (0..2 * vocab).map(|_| odd_of(&odd)).collect();
        assert_found(gpu, order, &any, vocab, "odd ones");
        let zeros: Vec<f32> = (0..vocab).map(|_| odd_of(&[0.0, -0.0])).collect();
        assert_found(gpu, order, &zeros, vocab, "zeros");
        let none: Vec<f32> = (0..vocab).map(|_| odd_of(&[odd[0], odd[3]])).collect();
        assert_found(gpu, order, &none, vocab, "none");
        // Fewer than are looked for.
        let rare = |id: usize| if id % 97 == 3 { -5.0 } else { f32::NAN };
        let some: Vec<f32> = (0..vocab).map(rare).collect();
        assert_found(gpu, order, &some, vocab, "a few");
    }
    let mut bits = Rng(14);
    let any: Vec<f32> = (0..6000)
        .map(|_| f32::from_bits(bits.next() as u32))
        .collect();
    assert_found(gpu, 5, &any, 3000, "any bits");
}
