//! Boards from the command line: the doctor's list, plans for boards, and a run that keeps within their limits.

#[path = "support/board_trees.rs"]
mod trees;

#[path = "support/models.rs"]
mod models;

use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;

fn airstream(args: &[&str]) -> Output {
    let mut command = Command::cargo_bin("airstream").expect("the binary is built");
    command.args(args).output().expect("it starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_str(&stdout(output)).unwrap_or_else(|e| panic!("{e}: {}", stderr(output)))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

fn golden(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/board");
    folder.join(format!("doctor-{name}.txt"))
}

#[test]
fn the_doctor_says_of_each_board_what_is_written_down() {
    for (name, trees) in [
        ("orin-nano-untidy", &["orin-nano-8gb-super", "untidy"][..]),
        ("agx-orin-tidy", &["agx-orin-64gb", "tidy"]),
        ("thor", &["thor-t5000", "tidy"]),
        ("pc", &["pc-rapl", "tidy"]),
    ] {
        let root = tempfile::tempdir().expect("a temporary folder");
        trees
            .iter()
            .for_each(|tree| trees::plant(tree, root.path()));
        let output = airstream(&["doctor", "--root", text(root.path())]);
        let expected = std::fs::read_to_string(golden(name)).unwrap_or_default();
        assert_eq!(stdout(&output), expected, "{name}");
        assert_eq!(output.status.code(), Some(0), "warnings break nothing");
        let as_json = json(&airstream(&[
            "doctor",
            "--json",
            "--root",
            text(root.path()),
        ]));
        let checks = as_json["checks"].as_array().expect("a list");
        assert!(
            checks
                .iter()
                .all(|check| expected.contains(check["found"].as_str().expect("text")))
        );
        // Whatever is wrong comes with a remedy.
        let told = |check: &&serde_json::Value| {
            check["status"] == "warning" || check["status"] == "broken"
        };
        assert!(
            checks
                .iter()
                .filter(told)
                .all(|check| check["remedy"].is_string())
        );
    }
}

#[test]
fn the_doctor_tells_scripts_when_something_is_broken() {
    let root = trees::root("orin-nano-8gb-super");
    let check =
        |memory: &str| airstream(&["doctor", "--root", text(root.path()), "--memory", memory]);
    assert_eq!(check("5GiB").status.code(), Some(0));
    let broken = check("7GiB");
    assert_eq!(broken.status.code(), Some(1));
    assert!(
        stdout(&broken).contains("BROKEN   free memory"),
        "{}",
        stdout(&broken)
    );
}

/// On this machine, whatever it is, the drive is really read.
#[test]
fn the_doctor_tries_things_out_on_the_running_system() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("model");
    std::fs::write(&file, vec![7; 4 << 20]).expect("written");
    let output = airstream(&[
        "doctor",
        "--json",
        "--model",
        text(&file),
        "--memory",
        "64MiB",
    ]);
    let found = json(&output);
    let check = |name: &str| {
        let checks = found["checks"].as_array().expect("a list");
        checks
            .iter()
            .find(|check| check["name"] == name)
            .cloned()
            .expect(name)
    };
    for name in ["io_uring", "O_DIRECT", "disk speed"] {
        assert_ne!(check(name)["status"], "skipped", "{found}");
    }
    assert!(
        check("disk speed")["found"]
            .as_str()
            .expect("text")
            .contains("GB/s")
    );
    let gone = airstream(&[
        "doctor",
        "--model",
        "/nonexistent.gguf",
        "--memory",
        "64MiB",
    ]);
    assert_eq!(gone.status.code(), Some(1));
}

/// What the daemon will run with is looked at as the daemon does.
#[test]
fn the_doctor_reads_the_daemons_configuration() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("airstream.toml");
    let (here, model) = (text(folder.path()), text(&model));
    let sound = format!(
        "memory = \"300MiB\"\nthreads = 2\n[[model]]\nname = \"small\"\npath = \"{model}\"\ncontext = 8192\n\
         [[socket]]\npath = \"{here}/s\"\n[http]\nlisten = \"127.0.0.1:0\"\n\
         [limits]\nsessions = 1\nclients = 4\nqueue = 2\n"
    );
    let doctor = |config: &str| {
        std::fs::write(&file, config).expect("written");
        let output = airstream(&["doctor", "--json", "--config", text(&file)]);
        (json(&output), output.status.code())
    };
    let line = |found: &serde_json::Value, name: &str| {
        let checks = found["checks"].as_array().expect("a list");
        let line = checks.iter().find(|check| check["name"] == name);
        line.unwrap_or_else(|| panic!("no {name}: {found}")).clone()
    };
    let (found, code) = doctor(&sound);
    assert_eq!((found["memory"].as_u64(), code), (Some(300 << 20), Some(0)));
    for name in ["configuration", "socket", "http", "model", "budget"] {
        let checks = found["checks"].as_array().expect("a list");
        let last = checks.iter().rfind(|check| check["name"] == name);
        let last = last.unwrap_or_else(|| panic!("no {name}: {found}"));
        assert_eq!(last["status"], "ok", "{last}");
    }
    for (from, to, name, status, says) in [
        ("threads", "treads", "configuration", "broken", "line 2"),
        (
            model,
            "/nonexistent.gguf",
            "model",
            "broken",
            "/nonexistent.gguf",
        ),
        ("300MiB", "3MiB", "budget", "broken", "give `memory` "),
        ("300MiB", "900000GiB", "free memory", "broken", "900000"),
        (
            "127.0.0.1",
            "192.0.2.1\"\ntoken = \"t",
            "configuration",
            "broken",
            "listen",
        ),
        (
            "8192",
            "8193",
            "context",
            "warning",
            "the 8192 that the model was made for",
        ),
        (
            "threads = 2",
            "device = \"cuda\"",
            "CUDA",
            "broken",
            "device",
        ),
    ] {
        let (found, code) = doctor(&sound.replacen(from, to, 1));
        let line = line(&found, name);
        assert_eq!(line["status"], status, "{line}");
        assert!(line.to_string().contains(says), "{line}");
        assert_eq!(code, Some(i32::from(status == "broken")), "{found}");
    }
    // Named, it has to be there.
    let gone = airstream(&["doctor", "--json", "--config", "/nonexistent.toml"]);
    assert_eq!(line(&json(&gone), "configuration")["status"], "broken");
}

#[test]
fn plans_for_boards_are_the_same_on_any_machine() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let model = text(&model);
    let args = [
        "plan",
        model,
        "--board",
        "orin-nano-8gb-super",
        "--memory",
        "64MiB",
        "--json",
    ];
    let plan = json(&airstream(&args));
    let modes = plan["modes"].as_array().expect("modes");
    let names: Vec<&str> = modes
        .iter()
        .filter_map(|mode| mode["mode"].as_str())
        .collect();
    assert_eq!(names, ["15W", "25W", "MAXN_SUPER", "7W"]);
    let streamed = plan["streamed_bytes"].as_f64().expect("a number");
    assert!(streamed > 1e6 && plan["resident_share"].as_f64() < Some(1.0));
    for mode in modes {
        for device in mode["devices"].as_array().expect("devices") {
            // Half of it streams from a drive that does 3.3 GB/s.
            assert_eq!(device["decode"]["bound"], "NVMe", "{device}");
            let tok_s = device["decode"]["tok_s"].as_f64().expect("a number");
            assert!((tok_s * streamed / 3.3e9 - 1.0).abs() < 1e-6, "{tok_s}");
            if device["device"] == "cpu" {
                assert_eq!(device["prefill"]["bound"], "compute", "{device}");
            }
        }
    }
    let one = json(&airstream(&[&args[..], &["--mode", "7w"]].concat()));
    assert_eq!(one["modes"].as_array().map(Vec::len), Some(1));
    assert_eq!(one["modes"][0], modes[3]);
    // With all that the board has to give nothing streams to speak of.
    let all = json(&airstream(&["plan", model, "--all-boards", "--json"]));
    let boards = all.as_array().expect("boards");
    assert_eq!(boards.len(), 12);
    assert!(
        boards
            .iter()
            .all(|board| board["resident_share"].as_f64() > Some(0.95))
    );
    for wrong in [
        &["plan", model, "--board", "toaster"][..],
        &["plan", model, "--board", "generic"],
        &["plan", model, "--board", "orin-nx-8gb", "--mode", "90W"],
        &["plan", model, "--board", "orin-nx-8gb", "--memory", "9GiB"],
    ] {
        let output = airstream(wrong);
        assert!(
            !output.status.success() && stderr(&output).contains("remedy:"),
            "{wrong:?}"
        );
    }
}

/// The kernel would kill somebody in the end, so it is said at the start; of memory that others hold it is warned.
#[test]
fn a_budget_beyond_the_machine_is_refused() {
    let root = trees::root("orin-nano-8gb-super");
    let file = root.path().join("airstream.toml");
    let serve = |memory: &str| {
        let config = format!(
            "memory = \"{memory}\"\n[[model]]\nname = \"a\"\npath = \"/none.gguf\"\n[http]\nlisten = \"127.0.0.1:1\"\n"
        );
        std::fs::write(&file, config).expect("written");
        let root = text(root.path());
        airstream(&["serve", "--check", "--config", text(&file), "--root", root])
    };
    let output = serve("8GiB");
    assert_eq!(output.status.code(), Some(78));
    let error = stderr(&output);
    assert!(
        error.contains("more than the 7.44 GiB of this machine"),
        "{error}"
    );
    assert!(
        error.contains("remedy: give `memory` 4915MiB or less"),
        "{error}"
    );
    let warned = stderr(&serve("7GiB"));
    assert!(
        warned.contains("more than the 6.00 GiB that are free now"),
        "{warned}"
    );
    assert!(!stderr(&serve("5GiB")).contains("free now"));
}

/// A board that is hot answers as ever, slowly.
#[test]
fn a_run_keeps_within_heat_and_answers_the_same() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let root = trees::root("orin-nano-8gb-super");
    let run = |extra: &[&str]| {
        let args = [
            "run",
            "--model",
            text(&model),
            "--memory",
            "64MiB",
            "--temp",
            "0",
            "-n",
            "3",
            "--threads",
            "2",
            "--root",
            text(root.path()),
        ];
        let output = airstream(&[&args[..], extra, &["--raw", "A colour is"]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let summary = stderr(&output);
        let rate = summary
            .lines()
            .find(|line| line.starts_with("decode"))
            .and_then(|line| {
                let before = line.split(" tok/s").next()?;
                before.rsplit(' ').next()?.parse::<f64>().ok()
            });
        (stdout(&output), rate.expect("a rate"), summary)
    };
    let (answer, free, summary) = run(&["--power-limit", "none"]);
    let watts = 5.032 * 1.2;
    assert!(
        summary.contains(&format!("energy    {watts:.1} W on average")),
        "{summary}"
    );
    assert!(
        summary.contains("J per token answered; at most 49.1 C"),
        "{summary}"
    );
    let zone = root.path().join("sys/class/thermal/thermal_zone8/temp");
    trees::write(&zone, "97000");
    let (hot_answer, hot, summary) = run(&[]);
    assert_eq!(hot_answer, answer);
    assert!(hot < 0.5 * free, "{hot} of {free} tok/s\n{summary}");
    assert!(summary.contains("at most 97.0 C"), "{summary}");
    // Without --memory it takes four fifths of what is free here.
    let meminfo = root.path().join("proc/meminfo");
    trees::write(&meminfo, "MemAvailable: 102400 kB");
    let args = [
        "run",
        "-n",
        "1",
        "--raw",
        "--model",
        text(&model),
        "--root",
        text(root.path()),
        "A",
    ];
    let small = airstream(&args);
    assert!(
        stderr(&small).contains(" of 80.0 MiB"),
        "{}",
        stderr(&small)
    );
}

#[test]
fn the_bench_tells_energy_as_json() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let root = trees::root("agx-orin-64gb");
    let bench = json(&airstream(&[
        "bench",
        text(&model),
        "--memory",
        "64MiB",
        "-p",
        "32",
        "-n",
        "8",
        "-r",
        "2",
        "--json",
        "--nvme-gbps",
        "1",
        "--dram-gbps",
        "20",
        "--root",
        text(root.path()),
        "--power-limit",
        "none",
    ]));
    assert_eq!(bench["board"], "agx-orin-64gb");
    // The board's interrupts have CPU 0 to themselves, where there is another.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    assert_eq!(bench["threads"].as_u64(), Some((cores - 1).max(1) as u64));
    assert_eq!(bench["peak_c"], 49.125);
    for test in ["pp", "tg"] {
        let number = |key: &str| {
            bench[test][key]
                .as_f64()
                .unwrap_or_else(|| panic!("{key} in {bench}"))
        };
        assert!((number("average_w") - 12.5).abs() < 1e-6);
        assert!(number("joules_per_token") > 0.0);
    }
    let decode = bench["tg"]["joules_per_token"].as_f64();
    assert!(
        decode > bench["pp"]["joules_per_token"].as_f64(),
        "a token of a prompt costs less: {bench}"
    );
}
