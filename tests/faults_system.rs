//! A real engine on a real file while the system misbehaves: it goes on with one line in the log, or fails with a
//! clear error and works again when the fault is gone. Tokens are right or do not come.
#![allow(unsafe_code)]

#[path = "support/broken.rs"]
mod broken;
#[path = "support/engine.rs"]
mod engine;
#[path = "support/greedy.rs"]
mod greedy;
#[path = "support/mounts.rs"]
mod mounts;
#[path = "support/restrict.rs"]
mod restrict;
mod support;

use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use airstream::engine::{Engine, ModelId, ModelOptions, Options, Spent};
use airstream::format::gguf::Gguf;
use airstream::io::Backend;
use engine::open;
use greedy::{argmax, greedy};
use support::synth;

const TOKENS: usize = 24;
const PROMPT: [u32; 5] = [3, 141, 59, 26, 5];

/// A model of some MiB with random weights, of which about half streams.
fn write_model(path: &Path) {
    let (_, mut spec) = synth::all_specs()
        .into_iter()
        .find(|(name, _)| name == "llama-q4_0")
        .expect("there is one");
    (spec.layers, spec.embd, spec.ffn) = (8, 512, 1536);
    (spec.heads, spec.kv_heads, spec.head_dim) = (8, 2, 64);
    synth::write(&spec, path).expect("space for a model");
}

/// A folder of its own with the model and a cache.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place::in_folder(Path::new(env!("CARGO_TARGET_TMPDIR")))
    }

    fn in_folder(folder: &Path) -> Place {
        let dir = tempfile::tempdir_in(folder).expect("a scratch folder");
        let place = Place { dir };
        write_model(&place.model());
        place
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model.gguf")
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn options(&self) -> Options {
        Options {
            cache: Some(self.cache()),
            ..options(&self.model())
        }
    }

    /// An engine that streams, some tokens into an answer.
    fn engine(&self, options: &Options) -> (Engine, Vec<u32>) {
        let mut engine = open(&self.model(), options);
        assert!(
            engine.plan(ModelId::FIRST).residency.given_up() > 10,
            "the model streams"
        );
        let tokens = greedy(&mut engine, &PROMPT, TOKENS / 2);
        assert_eq!(tokens, EXPECTED[..TOKENS / 2]);
        (engine, tokens)
    }
}

fn options(model: &Path) -> Options {
    let bytes = fs::metadata(model).expect("the model is there").len();
    Options {
        memory: Some(bytes * 6 / 10),
        model: ModelOptions {
            context: Some(128),
            rows: Some(16),
            ..ModelOptions::default()
        },
        threads: Some(1),
        ..Options::default()
    }
}

/// What the model says when nothing goes wrong.
static EXPECTED: LazyLock<Vec<u32>> = LazyLock::new(|| {
    let place = Place::new();
    let resident = Options {
        memory: None,
        verify: false,
        ..place.options()
    };
    greedy(&mut open(&place.model(), &resident), &PROMPT, TOKENS)
});

/// Goes on with the answer that `tokens` begins; an error leaves what is there.
fn go_on(engine: &mut Engine, tokens: &mut Vec<u32>) -> airstream::Result<()> {
    while tokens.len() < TOKENS {
        engine.decode(
            ModelId::FIRST,
            0,
            tokens[tokens.len() - 1],
            &mut Spent::default(),
        )?;
        tokens.push(argmax(engine.logits(ModelId::FIRST, 0)));
    }
    Ok(())
}

/// The fault is gone: the answer goes on where it was, and the next one is right too.
fn check_recovery(engine: &mut Engine, mut tokens: Vec<u32>) {
    go_on(engine, &mut tokens).expect("the fault is gone");
    assert_eq!(tokens, *EXPECTED, "the answer that was interrupted");
    engine.clear(ModelId::FIRST, 0);
    assert_eq!(
        greedy(engine, &PROMPT, TOKENS),
        *EXPECTED,
        "the next answer"
    );
}

/// Changes a file and sets its time of change back, as if the disk had lost the bytes by itself.
fn change_unseen(path: &Path, change: impl FnOnce(&File)) {
    let file = OpenOptions::new()
        .write(true)
        .read(true)
        .open(path)
        .expect("the model");
    let modified = file
        .metadata()
        .and_then(|m| m.modified())
        .expect("a time of change");
    change(&file);
    file.set_times(FileTimes::new().set_modified(modified))
        .expect("our own file");
    file.sync_all().expect("a sound disk");
}

/// Flips a bit in every 16 KiB of the second half of the file; doing it twice changes nothing.
fn flip_bits(file: &File) {
    let len = file.metadata().expect("it is open").len();
    for at in (len / 2..len).step_by(16 << 10) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)
            .expect("inside of the file");
        file.write_all_at(&[byte[0] ^ 0x10], at)
            .expect("a sound disk");
    }
}

#[test]
fn rotten_bits_never_become_tokens() {
    for backend in [Backend::Uring, Backend::Pread] {
        let place = Place::new();
        let options = Options {
            backend: Some(backend),
            ..place.options()
        };
        let (mut engine, mut tokens) = place.engine(&options);
        change_unseen(&place.model(), flip_bits);
        let error = go_on(&mut engine, &mut tokens)
            .expect_err("wrong bytes")
            .to_string();
        assert!(
            error.contains("model.gguf") && error.contains("checksum"),
            "{error}"
        );
        assert!(error.contains(".weight at offset "), "{error}");
        assert_eq!(
            tokens,
            EXPECTED[..tokens.len()],
            "tokens that were sent stay right"
        );
        change_unseen(&place.model(), flip_bits);
        check_recovery(&mut engine, tokens);
    }
}

#[test]
fn bits_that_rot_between_two_runs_are_noticed() {
    let place = Place::new();
    let (engine, _) = place.engine(&place.options());
    drop(engine);
    change_unseen(&place.model(), flip_bits);
    let spent = &mut Spent::default();
    // A norm may be among what has rotten: then there is not even an engine.
    let error = match Engine::open(&place.model(), &place.options()) {
        Err(error) => error.to_string(),
        Ok(mut engine) => engine
            .prefill(ModelId::FIRST, 0, &PROMPT, spent, |_| true)
            .expect_err("wrong bytes")
            .to_string(),
    };
    let checksums = place.cache().join("checksums");
    assert!(error.contains("checksum"), "{error}");
    assert!(
        error.contains(&format!("remove {}", checksums.display())),
        "{error}"
    );
    // The remedy works, as does a file of checksums that is rotten itself.
    for text in [None, Some("rubbish")] {
        for entry in fs::read_dir(&checksums).expect("checksums were kept") {
            let path = entry.expect("an entry").path();
            match text {
                Some(text) => fs::write(path, text).expect("our own file"),
                None => fs::remove_file(path).expect("our own file"),
            }
        }
        let mut engine = open(&place.model(), &place.options());
        engine
            .prefill(ModelId::FIRST, 0, &PROMPT, spent, |_| true)
            .expect("the bytes as they are now");
    }
}

#[test]
fn a_norm_that_rots_between_two_runs_is_named() {
    let place = Place::new();
    let (engine, _) = place.engine(&place.options());
    drop(engine);
    let name = "blk.3.ffn_norm.weight";
    let gguf = Gguf::open(&place.model()).expect("the model");
    let at = gguf.tensor(name).expect("there is one").offset + 9;
    drop(gguf);
    let flip = |file: &File| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)
            .expect("inside of the file");
        file.write_all_at(&[byte[0] ^ 1], at).expect("a sound disk");
    };
    change_unseen(&place.model(), flip);
    let error = Engine::open(&place.model(), &place.options());
    let error = error.err().expect("one wrong bit").to_string();
    assert!(
        error.contains(name) && error.contains("checksum"),
        "{error}"
    );
    change_unseen(&place.model(), flip);
    place.engine(&place.options());
}

#[test]
fn a_truncated_file_is_an_error_until_it_is_whole_again() {
    for verify in [true, false] {
        let place = Place::new();
        let options = Options {
            verify,
            ..place.options()
        };
        let (mut engine, mut tokens) = place.engine(&options);
        let bytes = fs::read(place.model()).expect("the model");
        change_unseen(&place.model(), |file| {
            file.set_len(bytes.len() as u64 / 3 + 77)
                .expect("our own file");
        });
        let error = go_on(&mut engine, &mut tokens).expect_err("a third of the file");
        let text = error.to_string();
        assert!(
            text.contains("model.gguf was changed") || text.contains("it was changed"),
            "{text}"
        );
        assert_eq!(
            tokens,
            EXPECTED[..tokens.len()],
            "tokens that were sent stay right"
        );
        go_on(&mut engine, &mut tokens).expect_err("still a third of the file");
        change_unseen(&place.model(), |file| {
            file.write_all_at(&bytes, 0).expect("a sound disk");
        });
        check_recovery(&mut engine, tokens);
    }
}

#[test]
fn a_file_written_to_is_an_error_even_without_checksums() {
    let place = Place::new();
    let options = Options {
        verify: false,
        ..place.options()
    };
    let (mut engine, mut tokens) = place.engine(&options);
    let file = OpenOptions::new()
        .write(true)
        .read(true)
        .open(place.model())
        .expect("the model");
    flip_bits(&file);
    let error = go_on(&mut engine, &mut tokens)
        .expect_err("another file now")
        .to_string();
    assert!(error.contains("changed after it was opened"), "{error}");
    assert!(error.contains("start again"), "{error}");
    assert_eq!(
        tokens,
        EXPECTED[..tokens.len()],
        "tokens that were sent stay right"
    );
}

#[test]
fn a_file_replaced_or_removed_is_read_to_the_end() {
    let (place, other) = (Place::new(), Place::new());
    let (mut engine, tokens) = place.engine(&place.options());
    fs::rename(other.model(), place.model()).expect("the same file system");
    check_recovery(&mut engine, tokens);
    fs::remove_file(place.model()).expect("our own file");
    engine.clear(ModelId::FIRST, 0);
    assert_eq!(greedy(&mut engine, &PROMPT, TOKENS), *EXPECTED);
    drop(engine);
    let error = Engine::open(&place.model(), &options(&other_model(&place)));
    assert!(
        error
            .err()
            .expect("there is none")
            .to_string()
            .contains("check the path")
    );
}

/// Any model, to take a budget from.
fn other_model(place: &Place) -> PathBuf {
    let path = place.dir.path().join("other.gguf");
    write_model(&path);
    path
}

#[test]
fn memory_file_systems_serve_too() {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        eprintln!("skipped: no /dev/shm here");
        return;
    }
    let place = Place::in_folder(shm);
    let (mut engine, tokens) = place.engine(&place.options());
    check_recovery(&mut engine, tokens);
}

#[test]
fn an_overlay_without_direct_reads_serves_too() {
    let place = Place::new();
    let (said, warnings) = run(child(&place, &["OVERLAY"]));
    if let Some((_, why)) = said.split_once("no overlay: ") {
        eprintln!("skipped: this user may not mount one ({})", why.trim());
        return;
    }
    assert!(said.contains(&expected()), "{said}");
    assert!(said.contains("buffered"), "{said}");
    assert_eq!(warnings.len(), 1, "one line: {warnings:?}");
    assert!(
        warnings[0].contains("no direct reads on its file system"),
        "{warnings:?}"
    );
}

/// What the tests below run in a child process, whose system refuses or disturbs something.
#[test]
fn child_answers_with_what_it_gets() {
    let Some(mut model) = std::env::var_os("AIRSTREAM_TEST_MODEL").map(PathBuf::from) else {
        return;
    };
    let asked = |what: &str| std::env::var(format!("AIRSTREAM_TEST_{what}")).is_ok();
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Warn)
        .init();
    if asked("OVERLAY") {
        let folder = model.with_file_name("overlay");
        model = match mounts::overlay_without_direct_reads(&model, &folder) {
            Ok(path) => path,
            Err(e) => return println!("\nno overlay: {e}"),
        };
    }
    let budget = options(&model);
    if asked("NOBODY") {
        const NOBODY: libc::uid_t = 65534;
        // SAFETY: plain values.
        let rc = unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) };
        assert_eq!(rc, 0, "only root asks for it");
    }
    if asked("STORM") {
        restrict::start_signal_storm();
    }
    let mut engine = match Engine::open(&model, &budget) {
        Ok(engine) => engine,
        Err(e) => return println!("\nrefused: {e}"),
    };
    println!("\nio: {}", engine.store().io_description());
    if asked("PAUSE") {
        println!("waiting");
        std::io::stdin()
            .read_line(&mut String::new())
            .expect("the parent answers");
    }
    let mut answer = || {
        engine.clear(ModelId::FIRST, 0);
        let mut tokens = Vec::new();
        engine.prefill(ModelId::FIRST, 0, &PROMPT, &mut Spent::default(), |_| true)?;
        tokens.push(argmax(engine.logits(ModelId::FIRST, 0)));
        go_on(&mut engine, &mut tokens)?;
        Ok::<_, airstream::Error>(tokens)
    };
    let rounds = if asked("STORM") || asked("LONG") {
        20
    } else {
        1
    };
    for _ in 0..rounds {
        match answer() {
            Ok(tokens) => println!("tokens: {tokens:?}"),
            Err(e) => println!("failed: {e}"),
        }
    }
    println!("signals: {}", restrict::signals());
    drop(engine);
    if asked("PAUSE")
        && let Err(e) = Engine::open(&model, &budget)
    {
        println!("afterwards: {e}");
    }
}

/// The test above as a child process.
fn child(place: &Place, asks: &[&str]) -> Command {
    let mut child = Command::new(std::env::current_exe().expect("this test"));
    child.args(["child_answers_with_what_it_gets", "--exact", "--nocapture"]);
    child.env("AIRSTREAM_TEST_MODEL", place.model());
    child.env("XDG_CACHE_HOME", place.cache());
    for ask in asks {
        child.env(format!("AIRSTREAM_TEST_{ask}"), "1");
    }
    child
}

/// Runs a child to its end; returns what it said on stdout, and the warnings on stderr.
fn run(mut child: Command) -> (String, Vec<String>) {
    let output = child.output().expect("the child runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}{log}");
    let warnings = log
        .lines()
        .filter(|line| line.contains("WARN"))
        .map(str::to_owned);
    (said, warnings.collect())
}

fn expected() -> String {
    format!("tokens: {:?}", *EXPECTED)
}

/// A child under a restriction answers all the same, and says `warning` once.
fn check_restricted(restrict: fn() -> std::io::Result<()>, io: &str, warning: &str) {
    let place = Place::new();
    let mut child = child(&place, &[]);
    // SAFETY: the functions of `restrict` make system calls only, as a forked child may.
    unsafe { child.pre_exec(restrict) };
    let (said, warnings) = run(child);
    assert!(said.contains(&expected()) && said.contains(io), "{said}");
    assert_eq!(warnings.len(), 1, "one line: {warnings:?}");
    assert!(warnings[0].contains(warning), "{warnings:?}");
}

#[test]
fn without_io_uring_the_answer_is_the_same() {
    check_restricted(
        restrict::forbid_io_uring,
        "io: positioned reads",
        "io_uring",
    );
}

#[test]
fn without_lockable_memory_the_answer_is_the_same() {
    check_restricted(
        restrict::forbid_locking,
        "unregistered",
        "RLIMIT_MEMLOCK is 64 KiB",
    );
}

#[test]
fn where_nothing_can_be_written_the_answer_is_the_same() {
    check_restricted(broken::forbid_writing, "io: ", "cannot keep checksums");
}

#[test]
fn a_full_cache_folder_is_one_line_in_the_log() {
    let place = Place::new();
    fs::create_dir(place.cache()).expect("a folder");
    let at = std::ffi::CString::new(place.cache().into_os_string().into_encoded_bytes());
    let at = at.expect("no zero byte");
    let mut child = child(&place, &[]);
    // SAFETY: system calls only.
    unsafe { child.pre_exec(move || mounts::full_file_system(&at)) };
    match child.output() {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
            eprintln!("skipped: this user may not mount a small file system ({e})");
        }
        Err(e) => panic!("the child does not run: {e}"),
        Ok(_) => {
            let (said, warnings) = run(child);
            assert!(said.contains(&expected()), "{said}");
            assert_eq!(warnings.len(), 1, "one line: {warnings:?}");
            assert!(
                warnings[0].contains("cannot keep checksums"),
                "{warnings:?}"
            );
        }
    }
}

/// A folder that another user may look into. Only root can become another user; for others the child is the same
/// user, who is bound by permissions anyway.
fn place_for_nobody() -> (Place, &'static [&'static str]) {
    let place = Place::in_folder(&std::env::temp_dir());
    fs::set_permissions(place.dir.path(), Permissions::from_mode(0o755)).expect("our own");
    // SAFETY: no argument, no effect.
    let root = unsafe { libc::geteuid() } == 0;
    (
        place,
        if root {
            &["NOBODY", "PAUSE"]
        } else {
            &["PAUSE"]
        },
    )
}

#[test]
fn a_cache_folder_without_permission_is_one_line_in_the_log() {
    let (place, asks) = place_for_nobody();
    fs::create_dir(place.cache()).expect("a folder");
    fs::set_permissions(place.cache(), Permissions::from_mode(0o555)).expect("our own");
    let mut child = child(&place, &asks[..asks.len() - 1]);
    child.stdin(Stdio::null());
    let (said, warnings) = run(child);
    if said.contains("refused: ") {
        eprintln!("skipped: another user does not reach the model ({said})");
        return;
    }
    assert!(said.contains(&expected()), "{said}");
    assert_eq!(warnings.len(), 1, "one line: {warnings:?}");
    assert!(
        warnings[0].contains("cannot keep checksums"),
        "{warnings:?}"
    );
}

#[test]
fn permissions_revoked_in_mid_run_matter_to_the_next_run() {
    let (place, asks) = place_for_nobody();
    fs::create_dir(place.cache()).expect("a folder");
    fs::set_permissions(place.cache(), Permissions::from_mode(0o777)).expect("our own");
    let mut child = child(&place, asks);
    child
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = child.spawn().expect("the child runs");
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    let mut said = String::new();
    while !said.contains("waiting\n") {
        if stdout.read_line(&mut said).expect("the child speaks") == 0 {
            assert!(said.contains("refused: "), "{said}");
            eprintln!("skipped: another user does not reach the model ({said})");
            child.wait().expect("it ended");
            return;
        }
    }
    fs::set_permissions(place.model(), Permissions::from_mode(0o000)).expect("our own");
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(b"go\n")
        .expect("the child listens");
    stdout.read_to_string(&mut said).expect("the child speaks");
    assert!(child.wait().expect("it ended").success(), "{said}");
    assert!(
        said.contains(&expected()),
        "an open file stays readable: {said}"
    );
    assert!(
        said.contains("afterwards: ") && said.contains("permission"),
        "{said}"
    );
}

#[test]
fn bad_sectors_are_named() {
    let place = Place::new();
    let mut child = child(&place, &[]);
    // SAFETY: system calls only.
    unsafe { child.pre_exec(broken::break_disk) };
    let (said, _) = run(child);
    assert!(
        said.contains("failed: cannot read ") && said.contains("model.gguf"),
        "{said}"
    );
    let (_, rest) = said
        .split_once(".weight at offset ")
        .expect("the tensor is named");
    let offset: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let offset: u32 = offset.parse().expect("the offset is named");
    let near = broken::BROKEN.start - (1 << 20)..broken::BROKEN.end;
    assert!(
        near.contains(&offset) && said.contains("I/O error"),
        "{said}"
    );
}

#[test]
fn a_storm_of_signals_changes_no_token() {
    let place = Place::new();
    let (said, warnings) = run(child(&place, &["STORM"]));
    assert_eq!(said.matches(&expected()).count(), 20, "{said}");
    assert!(!said.contains("signals: 0"), "{said}");
    assert_eq!(warnings.len(), 0, "{warnings:?}");
}

#[test]
fn a_process_stopped_for_a_while_goes_on() {
    let place = Place::new();
    let mut child = child(&place, &["LONG"]);
    child.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = child.spawn().expect("the child runs");
    let pid = child.id() as libc::pid_t;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(60));
        for (signal, pause_ms) in [(libc::SIGSTOP, 40), (libc::SIGCONT, 0)] {
            // SAFETY: plain values; the child was not waited for, so the number is still its own.
            unsafe { libc::kill(pid, signal) };
            std::thread::sleep(Duration::from_millis(pause_ms));
        }
    }
    let mut said = String::new();
    child
        .stdout
        .take()
        .expect("piped")
        .read_to_string(&mut said)
        .expect("the child speaks");
    assert!(child.wait().expect("it ended").success(), "{said}");
    assert_eq!(said.matches(&expected()).count(), 20, "{said}");
}
