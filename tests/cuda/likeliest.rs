//! Answers chosen from the likeliest tokens, which the GPU finds: the same as those chosen from all logits, which then
//! stay where they are.

use std::sync::Arc;

use airstream::engine::{Choices, ModelId, Row, Spent, Wanted};

use super::checks::{Gpu, PLENTY, assert_same, logits, on_cpu, on_gpu, tokens};
use super::fake_gpu::FakeGpu;
use super::likeliest_checks::{VOCAB, answers_are_the_cpus, model, options};

/// What travels of a row whose likeliest tokens are enough, and of one of which all logits are wanted.
const LIKELIEST_BYTES: u64 = 64 * 8;
const LOGITS_BYTES: u64 = 4 * VOCAB as u64;

#[test]
fn answers_are_the_cpus_and_those_of_all_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    for staged in [false, true] {
        let Some(gpu) = FakeGpu::new(21) else { return };
        let gpu = match staged {
            true => gpu.with_memory(PLENTY as usize),
            false => gpu,
        };
        let seen = gpu.seen();
        let tokens = answers_are_the_cpus(folder.path(), &(Arc::new(gpu) as Gpu));
        let travelled = seen.lock().expect("nobody panics with it").answer_bytes;
        assert_eq!(travelled, tokens * (LIKELIEST_BYTES + LOGITS_BYTES));
    }
}

#[test]
fn only_the_logits_travel_that_somebody_looks_at() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, prompt) = (model(folder.path()), tokens(6));
    let Some(gpu) = FakeGpu::new(23) else { return };
    let gpu = gpu.with_memory(PLENTY as usize);
    let seen = gpu.seen();
    let gpu: Gpu = Arc::new(gpu);
    let mut engine = on_gpu(&model, &options(&gpu), &gpu);
    let mut cpu = on_cpu(&model, &super::checks::options(16, 128));
    let expected = logits(&mut cpu, 0, &prompt, 6).expect("a sweep");
    let (l, b) = (Wanted::Logits, Wanted::Likeliest);
    let cases = [
        [b, b, b, b, b, b],
        [Wanted::Nothing, l, b, l, l, b],
        [l, l, l, l, l, l],
    ];
    for wanted in cases {
        let before = seen.lock().expect("nobody panics with it").answer_bytes;
        let row = |(&token, wanted)| Row {
            session: 0,
            token,
            wanted,
        };
        let rows: Vec<Row> = prompt.iter().zip(wanted).map(row).collect();
        engine.clear(ModelId::FIRST, 0);
        engine
            .sweep(ModelId::FIRST, &rows, &mut Spent::default())
            .expect("a sweep");
        let after = seen.lock().expect("nobody panics with it").answer_bytes;
        let asked = wanted.iter().zip(expected.chunks(VOCAB));
        let asked: Vec<_> = asked.filter(|(w, _)| **w != Wanted::Nothing).collect();
        let bytes = asked.iter().map(|(wanted, _)| match wanted {
            Wanted::Logits => LOGITS_BYTES,
            _ => LIKELIEST_BYTES,
        });
        assert_eq!(after - before, bytes.sum::<u64>(), "{wanted:?}");
        for (index, (wanted, logits)) in asked.into_iter().enumerate() {
            match (engine.choices(ModelId::FIRST, index), wanted) {
                (Choices::Logits(got), Wanted::Logits) => {
                    assert_same(got, logits, "whole");
                }
                (Choices::Likeliest(got), Wanted::Likeliest) => {
                    let mut ids: Vec<u32> = (0..VOCAB as u32).collect();
                    ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
                    let got_ids: Vec<u32> = got.iter().map(|token| token.id).collect();
                    assert_eq!(got_ids, ids[..64]);
                    assert_eq!(got[63].logit.to_bits(), logits[ids[63] as usize].to_bits());
                }
                (other, wanted) => panic!("{wanted:?}: {other:?}"),
            }
        }
    }
    // On the processor all logits are at hand whatever is asked for.
    let row = Row {
        session: 0,
        token: 1,
        wanted: b,
    };
    cpu.sweep(ModelId::FIRST, &[row], &mut Spent::default())
        .expect("a sweep");
    assert!(matches!(cpu.choices(ModelId::FIRST, 0), Choices::Logits(_)));
}
