//! Engines with small models on the GPU: the same checks as with the fake driver.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::agreement::assert_synthetic_agrees;
use crate::checks::{self, Gpu, assert_same, logits, on_cpu, on_gpu, options, tokens};
use crate::likeliest_checks::answers_are_the_cpus;
use crate::staged_checks::{self, BUDGETS, expected_of, moves_what_is_planned};
use crate::support::synth::all_specs;
use crate::{gpu, say};

/// Does something for each of several cases, and fails at the end if it did for any, with all their names.
fn each<T>(cases: impl IntoIterator<Item = (String, T)>, check: impl Fn(&str, T)) {
    let mut failed = Vec::new();
    for (name, case) in cases {
        if catch_unwind(AssertUnwindSafe(|| check(&name, case))).is_err() {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "failed: {}", failed.join(", "));
}

/// Whether a GPU has memory of its own; says so where a check is for the other kind.
fn is_staged(gpu: &Gpu, wanted: bool) -> bool {
    let staged = !gpu.facts().integrated;
    if staged != wanted {
        say(
            "SKIPPED: this is for the other kind of GPU, of those that share the processor's memory and those that do not",
        );
    }
    staged == wanted
}

#[test]
fn logits_are_the_cpus_bit_for_bit_for_every_architecture_and_weight_type() {
    let Some((gpu, _alone)) = gpu() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    each(all_specs(), |name, spec| {
        checks::logits_are_the_cpus(name, &spec, folder.path(), &gpu);
    });
}

#[test]
fn every_architecture_and_weight_type_agrees_with_llama_cpp() {
    let Some((gpu, _alone)) = gpu() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    each(all_specs(), |name, spec| {
        assert_synthetic_agrees(name, &spec, folder.path(), |model, options| {
            on_gpu(model, options, &gpu)
        });
    });
}

#[test]
fn beyond_a_split_logits_are_close_and_do_not_depend_on_the_batch() {
    let Some((gpu, _alone)) = gpu() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    checks::beyond_a_split(folder.path(), &gpu);
}

#[test]
fn answers_are_the_cpus_and_those_of_all_logits() {
    let Some((gpu, _alone)) = gpu() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    answers_are_the_cpus(folder.path(), &gpu);
}

#[test]
fn budgets_and_models_change() {
    let Some((gpu, _alone)) = gpu() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let (model, other) = checks::models(folder.path());
    match gpu.facts().integrated {
        true => checks::budgets_and_models_change((&model, &other), &gpu),
        false => staged_checks::models_come_and_go((&model, &other), &gpu),
    }
}

#[test]
fn shared_memory_in_a_small_budget_and_chunks_do_not_change_the_logits() {
    let Some((gpu, _alone)) = gpu() else { return };
    if !is_staged(&gpu, false) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (model, _) = checks::models(folder.path());
    let cpu = &mut on_cpu(&model, &options(16, 128));
    let expected = logits(cpu, 0, &tokens(20), 16).expect("a sweep");
    let least = checks::with_least(&model, &options(16, 128), &gpu);
    for chunk in [1, 7, 16] {
        let engine = &mut on_gpu(&model, &least, &gpu);
        let got = logits(engine, 0, &tokens(20), chunk).expect("a sweep");
        assert_same(&got, &expected, &format!("chunks of {chunk}"));
    }
}

#[test]
fn budgets_of_both_memories_change_what_moves_and_not_the_logits() {
    let Some((gpu, _alone)) = gpu() else { return };
    if !is_staged(&gpu, true) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (model, _) = checks::models(folder.path());
    let expected = expected_of(&model);
    let cases = BUDGETS.map(|budgets| (format!("{budgets:?}"), budgets));
    each(cases, |_, budgets| {
        moves_what_is_planned(&model, budgets, &expected, &gpu);
    });
}

#[test]
fn conversations_share_and_forget_pages() {
    let Some((gpu, _alone)) = gpu() else { return };
    if !is_staged(&gpu, true) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (model, _) = checks::models(folder.path());
    staged_checks::conversations_share_and_forget(&model, &gpu);
}

#[test]
fn tokens_without_an_allocation() {
    let Some((gpu, _alone)) = gpu() else { return };
    if !is_staged(&gpu, true) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (model, _) = checks::models(folder.path());
    staged_checks::tokens_without_an_allocation(&model, &gpu);
}
