//! The stored distributions of llama.cpp: that they can be read, and that the measures over them are right.

#[path = "support/models.rs"]
mod models;
#[path = "support/reference.rs"]
mod reference;

use std::path::{Path, PathBuf};

use reference::{Reference, kl_of_logits, synthetic_logits, synthetic_tokens};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference")
}

fn fixture(name: &str) -> Reference {
    Reference::read(&folder().join(name))
}

/// Logits that give exactly the reference's kept log-probabilities, with the tail spread evenly.
fn logits_of(reference: &Reference) -> Vec<f32> {
    let mut logits = Vec::new();
    for (i, position) in reference.positions.iter().enumerate() {
        let others = (reference.vocabulary - position.kept.len()) as f32;
        let mut row = vec![position.tail_log_mass - others.ln(); reference.vocabulary];
        if let Some(next) = reference.positions.get(i + 1) {
            row[next.token as usize] = position.next_log_prob;
        }
        for &(token, log_prob) in &position.kept {
            // Any constant may be added to a row of logits.
            row[token as usize] = log_prob;
        }
        logits.extend(row.iter().map(|x| x + 3.0));
    }
    logits
}

#[test]
fn a_distribution_agrees_with_itself_and_not_with_a_flat_one() {
    for (name, vocabulary) in [("smollm2-135m", 49152), ("gemma3-270m", 262144)] {
        let exact = fixture(&format!("{name}-exact.ref"));
        assert_eq!((exact.positions.len(), exact.vocabulary), (288, vocabulary));
        let mut short = Reference {
            vocabulary,
            positions: exact.positions,
        };
        short.positions.truncate(40);
        let logits = logits_of(&short);
        let same = short.agreement(&logits);
        assert!(
            same.kl_mean.abs() < 1e-6 && same.kl_max < 1e-5 && same.top1 == 1.0,
            "{same:?}"
        );
        assert!(
            (same.perplexity / same.reference_perplexity - 1.0).abs() < 1e-3,
            "{same:?}"
        );

        let flat = short.agreement(&vec![0.5; logits.len()]);
        assert!(flat.kl_mean > 1.0 && flat.top1 < 0.2, "{flat:?}");
        assert!(
            (flat.perplexity / vocabulary as f64 - 1.0).abs() < 1e-3,
            "{flat:?}"
        );
    }
}

#[test]
fn how_far_eight_bit_activations_are_from_exact_ones() {
    // llama.cpp's default run against its run on the same weights expanded to F32. What an engine
    // that rounds activations as ggml does can expect, and the reason not to ask less of it.
    for (name, least, most) in [("smollm2-135m", 0.002, 0.008), ("gemma3-270m", 0.003, 0.02)] {
        let exact = fixture(&format!("{name}-exact.ref"));
        let default = fixture(&format!("{name}-default.ref"));
        assert_eq!(exact.tokens(), default.tokens());
        let found = exact.agreement(&logits_of(&default));
        println!("{name}: {found:?}");
        assert!(found.kl_mean > least && found.kl_mean < most, "{found:?}");
    }
}

#[test]
fn synthetic_logits_are_whole_and_their_positions_differ() {
    let synthetic = folder().join("synthetic");
    let files: Vec<PathBuf> = std::fs::read_dir(&synthetic)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(files.len() >= 20);
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let vocabulary =
            std::fs::metadata(&file).unwrap().len() / 4 / synthetic_tokens(1).len() as u64;
        let logits = synthetic_logits(&synthetic, name, vocabulary as u32);
        let rows: Vec<&[f32]> = logits.chunks_exact(vocabulary as usize).collect();
        assert!(logits.iter().all(|x| x.is_finite()), "{name}");
        assert!(kl_of_logits(rows[0], rows[0]).abs() < 1e-9, "{name}");
        // So that a position taken for another one is noticed.
        assert!(kl_of_logits(rows[0], rows[1]) > 0.1, "{name}");
    }
}
