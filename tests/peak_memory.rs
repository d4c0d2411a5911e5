//! The promise of `--memory`, seen from outside. A test of its own, since the system tells only the largest peak of all
//! children that a process has had.

#[path = "support/models.rs"]
mod models;

use assert_cmd::Command;
use nix::sys::resource::{UsageWho, getrusage};

#[test]
fn answers_within_the_memory_it_was_given() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let gemma = models::gemma3();
    let mut cases = vec![(&model, 64), (&model, 40), (&model, 120)];
    if let Some(gemma) = &gemma {
        cases.push((gemma, 130));
    }
    // Smallest budget first: the system keeps only the largest peak.
    cases.sort_by_key(|(_, mib)| *mib);
    for (model, mib) in cases {
        let memory = format!("{mib}MiB");
        let args = [
            "run",
            "--model",
            model.to_str().expect("a UTF-8 path"),
            "--memory",
            &memory,
            "--temp",
            "0",
            "-n",
            "12",
            "Name a colour.",
        ];
        let output = Command::cargo_bin("airstream")
            .expect("the binary is built")
            .args(args)
            .output()
            .expect("it starts");
        let summary = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{summary}");
        assert!(!output.stdout.trim_ascii().is_empty());
        let peak_kib = getrusage(UsageWho::RUSAGE_CHILDREN)
            .expect("getrusage")
            .max_rss();
        assert!(
            peak_kib <= (mib + 24) * 1024,
            "{mib} MiB: peak {} KiB",
            peak_kib
        );
        for word in ["budget", "resident", "prefill", "decode", "NVMe", "stalled"] {
            assert!(
                summary.contains(word),
                "{word} is not in the summary: {summary}"
            );
        }
    }
}
