//! What a person sees of the pipeline: a trace of a real run, and the disk's speed.

#[path = "support/models.rs"]
mod models;

use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

fn airstream(args: &[&str]) -> Vec<u8> {
    // What one run keeps of a disk or a file must not change other tests' plans.
    let cache = tempfile::tempdir().expect("a temporary folder");
    airstream_with(args, cache.path())
}

fn airstream_with(args: &[&str], cache: &Path) -> Vec<u8> {
    let done = Command::cargo_bin("airstream")
        .expect("the binary is built")
        .env("XDG_CACHE_HOME", cache)
        .args(args)
        .output()
        .expect("it starts");
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    done.stdout
}

#[test]
fn a_trace_shows_reads_beside_the_sweeps() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("trace.json");
    let (model, trace) = (
        model.to_str().expect("UTF-8"),
        path.to_str().expect("UTF-8"),
    );
    let common = ["--memory", "60MiB", "--ctx", "128", "--trace", trace];
    let run = [
        "run", "--model", model, "-n", "3", "--temp", "0", "--raw", "One two",
    ];
    let bench = [
        "bench",
        model,
        "-p",
        "0",
        "-n",
        "3",
        "-r",
        "1",
        "--nvme-gbps",
        "1",
    ];
    for command in [&run[..], &bench[..]] {
        airstream(&[command, &common[..]].concat());
        let text = std::fs::read(&path).expect("the trace was written");
        let json: Value = serde_json::from_slice(&text).expect("valid JSON");
        let events = json["traceEvents"].as_array().expect("a list of events");
        let named = |name: &str| events.iter().filter(|e| e["name"] == name).count();
        assert!(named("sweep") >= 3 && named("attention") >= 90 && named("compute") > 0);
        assert_eq!(named("sample") > 0, command[0] == "run");
        let read: u64 = events
            .iter()
            .filter_map(|e| e["args"]["bytes"].as_u64())
            .sum();
        assert!(
            read > 100 << 20,
            "{read} bytes read in three sweeps that stream"
        );
        // Reads of the next tiles begin before the sweep that uses the present ones has ended.
        let lanes: std::collections::BTreeSet<u64> = events
            .iter()
            .filter(|e| e["args"]["bytes"].is_u64())
            .filter_map(|e| e["tid"].as_u64())
            .collect();
        assert!(lanes.len() > 1, "reads overlap");
    }
}

#[test]
fn the_disk_is_measured_and_values_are_recommended() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let model = model.to_str().expect("UTF-8");
    let json = airstream(&["bench", "--io", model, "--seconds", "0.5", "--json"]);
    let json: Value = serde_json::from_slice(&json).expect("valid JSON");
    let points = json["points"].as_array().expect("a list");
    assert!(points.len() > 30);
    let best = |key: &str| json["recommended"][key].as_f64().expect("a number");
    assert!(best("gb_s") > 0.0 && best("read_bytes") >= 65536.0 && best("depth") >= 1.0);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let text = airstream_with(&["bench", "--io", model, "--seconds", "0.5"], cache.path());
    let text = String::from_utf8_lossy(&text);
    assert!(
        text.contains("recommended: reads of ") && text.contains("kept in "),
        "{text}"
    );
    // Later plans heed what was kept, and hold their budget whatever it says.
    let plan = [
        "plan",
        model,
        "--memory",
        "60MiB",
        "--nvme-gbps",
        "1",
        "--dram-gbps",
        "9",
    ];
    airstream_with(&plan, cache.path());
}
