//! The binary as a person or a script uses it.

#[path = "support/models.rs"]
mod models;

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn airstream(args: &[&str]) -> Output {
    Command::cargo_bin("airstream")
        .expect("the binary is built")
        .args(args)
        .output()
        .expect("it starts")
}

fn stdout(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// A small file with some text.
fn file_with(content: &str, folder: &Path) -> PathBuf {
    let path = folder.join("text");
    std::fs::write(&path, content).expect("a temporary file");
    path
}

#[test]
fn the_same_seed_gives_the_same_answer_and_a_pipe_is_a_prompt() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let args = [
        "run",
        "--model",
        text(&model),
        "--memory",
        "64MiB",
        "-n",
        "16",
        "--seed",
        "7",
        "--temp",
        "0.9",
    ];
    let mut with_prompt = args.to_vec();
    with_prompt.push("Tell me about robots.");
    let first = stdout(&airstream(&with_prompt));
    assert_eq!(first, stdout(&airstream(&with_prompt)));
    let piped = Command::cargo_bin("airstream")
        .expect("built")
        .args(args)
        .write_stdin("Tell me about robots.")
        .output();
    assert_eq!(first, stdout(&piped.expect("it starts")));
}

#[test]
fn a_budget_that_is_too_small_is_refused_with_the_minimum_that_works() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let run = |memory: &str| {
        airstream(&[
            "run",
            "--model",
            text(&model),
            "--memory",
            memory,
            "-n",
            "2",
            "--ctx",
            "256",
            "Hi",
        ])
    };
    let refused = run("8MiB");
    assert!(!refused.status.success());
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    let minimum = message
        .split("--memory ")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next());
    let minimum = minimum.unwrap_or_else(|| panic!("no minimum in: {message}"));
    stdout(&run(minimum));
}

#[test]
fn what_makes_no_sense_is_an_error_with_a_remedy() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let tokens = file_with("1\n2\n999999\n", folder.path());
    for (args, says) in [
        (
            &[
                "perplexity",
                text(&model),
                "--memory",
                "64MiB",
                "--tokens",
                text(&tokens),
            ][..],
            "give one number below 49152 a line",
        ),
        (
            &["bench", "--io", text(&model), "--seconds=-1"],
            "0.01 to 3600",
        ),
        (&["run", text(&model), "Hi"], "say --model"),
    ] {
        let output = airstream(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(says), "{args:?}: {said}");
        assert!(
            matches!(output.status.code(), Some(1 | 2)),
            "{args:?}: {:?}",
            output.status
        );
    }
}

#[test]
fn plan_inspect_and_bench_print_json() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let parse = |output: Output| -> serde_json::Value {
        serde_json::from_str(&stdout(&output)).expect("JSON")
    };
    let model = text(&model);
    let plan = parse(airstream(&[
        "plan",
        model,
        "--memory",
        "64MiB",
        "--nvme-gbps",
        "1",
        "--dram-gbps",
        "20",
        "--json",
    ]));
    let streamed = plan["decode"][0]["streamed_bytes"]
        .as_f64()
        .expect("a number");
    assert!(streamed > 1e6 && streamed < 92e6, "{plan}");
    let tok_s = plan["decode"][0]["tok_s"].as_f64().expect("a number");
    assert!(
        (tok_s * streamed / 1e9 - 1.0).abs() < 0.01,
        "bound by the disk: {plan}"
    );
    let lines: f64 = plan["lines"]
        .as_array()
        .expect("lines")
        .iter()
        .filter_map(|l| l["bytes"].as_f64())
        .sum();
    assert!(lines <= (64 << 20) as f64);

    let inspect = parse(airstream(&[
        "inspect", model, "--memory", "64MiB", "--json",
    ]));
    assert_eq!(inspect["architecture"], "llama");
    assert_eq!(inspect["tensors"].as_array().map(Vec::len), Some(272));

    let bench = airstream(&[
        "bench",
        model,
        "--memory",
        "64MiB",
        "-p",
        "64",
        "-n",
        "8",
        "-r",
        "2",
        "--json",
        "--nvme-gbps",
        "1",
        "--dram-gbps",
        "20",
    ]);
    let bench = parse(bench);
    let read = bench["tg"]["disk_bytes_per_token"]
        .as_f64()
        .expect("a number");
    assert!(
        (read / streamed - 1.0).abs() < 0.05,
        "bench reads {read}, plan says {streamed}"
    );
    assert!(bench["pp"]["median_tok_s"].as_f64() > bench["tg"]["median_tok_s"].as_f64());

    // Where the disk is measured between slices of decoding, what that reads is nobody's token.
    let bench = parse(airstream(&[
        "bench", model, "--memory", "64MiB", "-p", "0", "-n", "8", "-r", "1", "--ctx", "64",
        "--json",
    ]));
    let read = &bench["tg"]["disk_bytes_per_token"];
    let planned = &bench["roofline"]["streamed_bytes"];
    let ratio = read.as_f64().expect("a number") / planned.as_f64().expect("a number");
    assert!(
        (ratio - 1.0).abs() < 0.01,
        "bench reads {read}, its roofline says {planned}"
    );
}

#[test]
fn an_answer_that_does_not_come_to_its_end_says_so() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let run = ["run", "--model", text(&model), "--memory", "64MiB"];
    let short = [
        "--ctx",
        "48",
        "--temp",
        "0",
        "--raw",
        "1, 2, 3, 4, 5, 6, 7,",
    ];
    let output = airstream(&[&run[..], &short].concat());
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert!(
        told.contains("the answer is cut short") && told.contains("larger --ctx"),
        "{told}"
    );
    // Ctrl-C ends the answer, and not the account of it.
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_airstream"))
        .args(run)
        .arg("Tell me a very long story about the sea.")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut begun = [0];
    let stdout = child.stdout.as_mut().expect("piped");
    stdout.read_exact(&mut begun).expect("an answer begins");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).expect("it runs");
    let done = child.wait_with_output().expect("it ends");
    let told = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(130), "{told}");
    assert!(told.contains("prefill"), "{told}");
}

/// SmolLM2 was trained on 8192 tokens. Beyond those its answers only get worse, so somebody has to say it.
#[test]
fn a_context_beyond_what_the_model_was_made_for_is_warned_of() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let tokens = file_with("1000\n2000\n3000\n", folder.path());
    let model = text(&model);
    let machine = ["--nvme-gbps", "1", "--dram-gbps", "20"];
    let plan = [&["plan", model][..], &machine].concat();
    let board = ["plan", model, "--board", "orin-nano-8gb-super"];
    let perplexity = ["perplexity", model, "--tokens", text(&tokens)];
    let of = |command: &[&str], context: &str| {
        let output = airstream(&[command, &["--memory", "400MiB", "--ctx", context]].concat());
        stdout(&output) + &String::from_utf8_lossy(&output.stderr)
    };
    for command in [&plan[..], &board, &["inspect", model], &perplexity] {
        let said = of(command, "8193");
        let wanted = "a context of 8193 tokens is more than the 8192 that the model was made for";
        assert_eq!(said.matches(wanted).count(), 1, "{command:?}: {said}");
        let said = of(command, "8192");
        assert!(!said.contains("made for"), "{command:?}: {said}");
    }
}

/// `airstream plan --all-boards FILE | head -1` ends without a word about the pipe, and an answer with its summary.
#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let model = text(&model);
    let report: &[_] = &["plan", "--all-boards", model];
    let answer: &[_] = &["run", "--memory", "64MiB", "--model", model, "Say a word."];
    for (args, signal) in [(report, Some(13)), (answer, None)] {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_airstream"))
            .args(args)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("the binary starts");
        drop(child.stdout.take());
        let done = child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(done.status.signal(), signal, "{said}");
        assert_eq!(said.contains("prefill"), signal.is_none(), "{said}");
    }
}

#[test]
fn perplexity_writes_every_logit() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let tokens = file_with("1000\n2000\n3000\n4000\n", folder.path());
    let logits = folder.path().join("logits");
    let args = [
        "perplexity",
        text(&model),
        "--tokens",
        text(&tokens),
        "--logits",
        text(&logits),
        "--memory",
        "64MiB",
    ];
    assert!(stdout(&airstream(&args)).starts_with("perplexity "));
    assert_eq!(
        std::fs::metadata(&logits).expect("written").len(),
        4 * 49152 * 4
    );
}

#[test]
fn errors_name_the_remedy() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let not_a_model = file_with("this is not a GGUF", folder.path());
    for args in [
        vec!["run", "--model", "/nonexistent.gguf", "hi"],
        vec!["inspect", text(&not_a_model)],
        vec!["plan", text(&not_a_model), "--memory", "64MiB"],
    ] {
        let output = airstream(&args);
        assert!(!output.status.success());
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("remedy:"),
            "{args:?}"
        );
    }
    for args in [
        vec!["run", "--memory", "64XB", "hi"],
        vec!["bench"],
        vec!["nonsense"],
        // A text that goes on as it is has no system's part.
        vec!["run", "--raw", "--system", "Be brief.", "hi"],
        vec!["ask", "--raw", "--system", "Be brief.", "hi"],
    ] {
        assert_eq!(airstream(&args).status.code(), Some(2), "{args:?}");
    }
}
