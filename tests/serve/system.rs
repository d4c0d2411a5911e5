//! The daemon and the system: its start and end, signals, the service manager, and what a killed one leaves behind.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::daemon::{self, Client, Daemon, PATIENCE, config, generate};
use super::models;

impl Daemon {
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("it runs");
    }

    /// Gives it another configuration, and waits until its log says `until`.
    pub fn reload(&self, config: &str, until: &str) {
        std::fs::write(self.path("airstream.toml"), config).expect("a file");
        self.signal(Signal::SIGHUP);
        let begun = Instant::now();
        while !self.log().contains(until) {
            assert!(begun.elapsed() < PATIENCE, "{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it without a word, and starts another one in the same folder.
    pub fn kill_and_restart(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("its end");
        self.child = daemon::spawn(self.folder.path(), &mut |_| {});
    }

    /// Waits for its end: the exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("its child") {
                return status.code();
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "it does not end: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn airstream() -> Command {
    Command::new(assert_cmd::cargo::cargo_bin("airstream"))
}

#[test]
fn a_second_daemon_is_refused_and_a_killed_one_replaced() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let mut daemon = Daemon::start(&model, "");
    daemon.connect().ask(&generate(1, "Hello", 1));
    let second = airstream()
        .args(["serve", "--config"])
        .arg(daemon.path("airstream.toml"))
        .output()
        .expect("it starts");
    assert!(!second.status.success());
    let told = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(told.contains("another daemon serves"), "{told}");

    let mut client = daemon.connect();
    client.send(&generate(1, "Tell me a long story.", 300));
    while client.next().get("token").is_none() {}
    daemon.kill_and_restart();
    while client.try_next().is_some() {}
    assert!(
        daemon
            .connect()
            .ask(&generate(1, "Hello", 2))
            .get("done")
            .is_some()
    );
}

#[test]
fn sigterm_lets_short_answers_end_and_cancels_long_ones() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let mut daemon = Daemon::start(&model, "[limits]\nstop_s = 2\n");
    let (mut short, mut long) = (daemon.connect(), daemon.connect());
    long.send(&generate(
        1,
        "Tell me a very long story about the sea.",
        480,
    ));
    while long.next().get("token").is_none() {}
    short.send(&generate(1, "Hello", 3));
    while short.next().get("accepted").is_none() {}
    daemon.signal(Signal::SIGTERM);
    // The long answer is read as it comes: a client that does not read is not waited for.
    let last_of = |client: &mut Client| {
        let mut last = json!(null);
        while let Some(reply) = client.try_next() {
            last = reply;
        }
        last
    };
    let last = last_of(&mut long);
    assert_eq!(last_of(&mut short)["done"]["reason"], "length");
    assert!(
        ["cancelled", "end", "length", "context"]
            .iter()
            .any(|reason| last["done"]["reason"] == *reason),
        "{last}"
    );
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log());
    assert!(!daemon.socket().exists());
}

#[test]
fn sighup_takes_over_what_may_change_and_says_what_may_not() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "");
    let mut client = daemon.connect();
    client.ask(&generate(1, "Hello", 1));
    let file = daemon.path("airstream.toml");
    let text = std::fs::read_to_string(&file).expect("its configuration");
    let reload = |text: &str, until: &str| daemon.reload(text, until);
    let changed = text
        .replace("146800640", "130MiB")
        .replace("threads = 2", "threads = 1");
    reload(&changed, "read again");
    assert!(
        daemon
            .log()
            .contains("`threads` changes at the next start only"),
        "{}",
        daemon.log()
    );
    let status = client.ask(&json!({ "id": 2, "status": {} }));
    assert_eq!(status["status"]["budget_bytes"], 130 << 20);
    // More than the budget was divided for.
    let more = changed + "[limits]\nclients = 500\n";
    reload(&more, "a larger `clients` changes at the next start only");
    reload("memroy = 1\n", "unknown field `memroy`");
    assert!(client.ask(&generate(3, "Hello", 2)).get("done").is_some());
}

#[test]
fn check_tells_the_plan_or_what_is_wrong() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("airstream.toml");
    let check = |text: &str| {
        std::fs::write(&file, text).expect("a file");
        airstream()
            .args(["serve", "--check", "--config"])
            .arg(&file)
            .output()
            .expect("it starts")
    };
    let sound = check(&config(&model, folder.path()));
    let plan = String::from_utf8_lossy(&sound.stdout).into_owned();
    assert!(
        sound.status.success() && plan.contains("slots: weights") && plan.contains("8 sessions"),
        "{plan}"
    );
    assert!(plan.contains("clients and their requests"), "{plan}");
    assert!(!folder.path().join("a.sock").exists());
    for (text, told) in [
        (config(Path::new("/none.gguf"), folder.path()), "/none.gguf"),
        (
            config(&model, folder.path()).replace("146800640", "5MiB"),
            "remedy: give `memory` ",
        ),
        (
            config(&model, folder.path()) + "modee = 1\n",
            "line 9: unknown field `modee`",
        ),
        (config(&model, &folder.path().join("none")), "the folder of"),
        (
            config(&model, folder.path()) + "group = \"no such group\"\n",
            "there is no group",
        ),
        (
            config(&model, folder.path()) + "[[serial]]\ndevice = \"/dev/ttyS0\"\nbaud = 115201\n",
            "`baud` 115201 is no usual speed",
        ),
        (
            config(&model, folder.path())
                + "[http]\nlisten = \"127.0.0.1:1\"\ntoken_file = \"/none\"\n",
            "cannot read /none",
        ),
    ] {
        let output = check(&text);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(told), "{error}");
    }
}

#[test]
fn the_exit_status_says_whether_another_start_may_succeed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, model) = (
        folder.path().join("airstream.toml"),
        folder.path().join("a"),
    );
    let check = |option: &str, text: &str| {
        std::fs::write(&file, text).expect("a file");
        let mut command = airstream();
        let command = command.args(["serve", option, "--config"]).arg(&file);
        command.output().expect("it starts").status.code()
    };
    let sound = config(&model, folder.path());
    for option in ["--check", "--check-config"] {
        let wrong = check(option, &sound.replace("threads", "treads"));
        assert_eq!(wrong, Some(78), "{option}");
        let missing = check(option, &sound);
        assert_eq!(missing, Some(1), "a drive may come late: {option}");
    }
    // Of a model's content nothing is said by the check that takes no memory.
    std::fs::write(&model, "no GGUF").expect("a file");
    assert_eq!(check("--check-config", &sound), Some(0));
    assert_eq!(check("--check", &sound), Some(78));
    let on_gpu = format!("device = \"gpu\"\n{sound}");
    assert_eq!(check("--check-config", &on_gpu), Some(78));
}

/// What the daemon tells a service manager until it has said all of `wanted`.
fn told(manager: &UnixDatagram, wanted: &[&str]) -> Vec<String> {
    manager.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut all: Vec<String> = Vec::new();
    let mut buffer = [0; 4096];
    while !wanted
        .iter()
        .all(|wanted| all.iter().any(|line| line.starts_with(wanted)))
    {
        let len = manager
            .recv(&mut buffer)
            .unwrap_or_else(|e| panic!("{e}; so far {all:?}"));
        let message = String::from_utf8_lossy(&buffer[..len]).into_owned();
        all.extend(message.lines().map(str::to_owned));
    }
    all
}

#[test]
fn the_service_manager_hears_of_the_start_the_sweeps_and_the_end() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let address = folder.path().join("notify");
    let manager = UnixDatagram::bind(&address).expect("a socket");
    let mut daemon = Daemon::start_with(&model, "", &mut |command| {
        command
            .env("NOTIFY_SOCKET", &address)
            .env("WATCHDOG_USEC", "300000");
    });
    let start = told(&manager, &["READY=1"]);
    assert!(
        start
            .iter()
            .any(|line| line.starts_with("EXTEND_TIMEOUT_USEC=")),
        "{start:?}"
    );
    assert!(
        start.iter().any(|line| line.starts_with("STATUS=")),
        "{start:?}"
    );
    // Idle, it is alive.
    told(&manager, &["WATCHDOG=1"]);
    daemon.connect().ask(&generate(1, "Hello", 4));
    // Stopped in mid-air, it must not seem alive.
    daemon.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_millis(50));
    manager.set_nonblocking(true).expect("a socket");
    while manager.recv(&mut [0; 4096]).is_ok() {}
    std::thread::sleep(Duration::from_millis(400));
    assert!(
        manager.recv(&mut [0; 4096]).is_err(),
        "fed by something that does not sweep"
    );
    manager.set_nonblocking(false).expect("a socket");
    daemon.signal(Signal::SIGCONT);
    told(&manager, &["WATCHDOG=1"]);
    daemon.signal(Signal::SIGHUP);
    told(&manager, &["RELOADING=1", "MONOTONIC_USEC=", "READY=1"]);
    daemon.signal(Signal::SIGTERM);
    told(&manager, &["STOPPING=1"]);
    assert_eq!(daemon.wait(), Some(0));
}

#[test]
fn a_socket_of_the_service_manager_is_taken_over() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("a.sock");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let file = folder.path().join("airstream.toml");
    std::fs::write(&file, config(&model, folder.path())).expect("a file");
    // As the manager does: descriptor 3, and the variables that tell of it. The shell knows its own number.
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\" \"$@\" 3<&0 0</dev/null";
    let mut command = Command::new("sh");
    command
        .args(["-c", script])
        .arg(airstream().get_program())
        .args(["serve", "--config"])
        .arg(&file)
        .stdin(OwnedFd::from(listener))
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    let mut client = Daemon::client_of(&socket);
    assert!(client.ask(&generate(1, "Hello", 2)).get("done").is_some());
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("it runs");
    let status = child.wait().expect("its end");
    let mut log = String::new();
    child
        .stderr
        .take()
        .expect("piped")
        .read_to_string(&mut log)
        .expect("UTF-8");
    assert!(status.success(), "{log}");
    assert!(socket.exists(), "the socket is the manager's");
}

#[test]
fn the_units_are_sound() {
    let found = Command::new("systemd-analyze")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !found.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no systemd-analyze");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("cross/systemd");
    for unit in ["airstream.service", "airstream.socket"] {
        let text = std::fs::read_to_string(units.join(unit)).expect("a unit");
        // Nothing is installed here.
        let binary = airstream()
            .get_program()
            .to_str()
            .expect("UTF-8")
            .to_owned();
        std::fs::write(
            folder.path().join(unit),
            text.replace("/usr/bin/airstream", &binary),
        )
        .expect("a file");
    }
    let verify = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args([
            folder.path().join("airstream.service"),
            folder.path().join("airstream.socket"),
        ])
        .output()
        .expect("it starts");
    let told = String::from_utf8_lossy(&verify.stderr).into_owned();
    assert!(
        verify.status.success() && !told.contains("airstream.s"),
        "{told}"
    );
}

#[test]
fn ask_and_status_are_clients() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "");
    let run = |args: &[&str]| {
        let output = airstream()
            .args(args)
            .arg("--socket")
            .arg(daemon.socket())
            .output()
            .expect("it starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            told,
        )
    };
    let ask = ["ask", "--temp", "0", "-n", "12", "Name three colours."];
    let (ok, answer, told) = run(&ask);
    assert!(ok && !answer.trim().is_empty(), "{told}");
    assert_eq!(answer, run(&ask).1);
    // As `airstream run` says it and has it, which takes the same options.
    let (ok, likeliest, told) = run(&["ask", "--top-k", "1", "-n", "12", "Name three colours."]);
    assert!(ok && likeliest == answer, "{likeliest}, {told}");
    let on_and_on = ["ask", "--raw", "--temp", "0", "1, 2, 3, 4, 5, 6, 7,"];
    let (ok, _, told) = run(&on_and_on);
    assert!(ok && told.contains("the answer is cut short"), "{told}");
    let (ok, _, told) = run(&["ask", "--model", "none", "Hi"]);
    assert!(!ok && told.contains("remedy: name one of small"), "{told}");
    let (ok, text, _) = run(&["status"]);
    for word in [
        "budget",
        "slots: weights",
        "small",
        "ready",
        "queue",
        "tok/s",
        "NVMe",
    ] {
        assert!(ok && text.contains(word), "{word} is not in {text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&run(&["status", "--json"]).1).expect("JSON");
    assert_eq!(json["total"]["requests"], 4);
    assert_eq!(json["models"][0]["name"], "small");

    let (ok, _, told) = run(&["ask", "-n", "1", "--session", "arm", "Hi"]);
    assert!(ok, "{told}");
    for (ends_well, command) in [
        (true, &["reset", "arm"][..]),
        (false, &["reset", "arm"]),
        (true, &["budget", "130MiB"]),
        (false, &["budget", "1MiB"]),
        (true, &["unload", "small"]),
        (true, &["load", "small"]),
        (false, &["load", "none"]),
        (false, &["load", "small", "--model", "small"]),
    ] {
        let (ok, _, told) = run(&[&["tell"], command].concat());
        assert_eq!(ok, ends_well, "{command:?}: {told}");
        assert!(ok || told.contains("remedy: "), "{command:?}: {told}");
    }
}

#[test]
fn the_journal_is_told_how_grave_a_line_is() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start_with(&model, "allow_uids = [4242]\n", &mut |command| {
        command.env("JOURNAL_STREAM", "1:1");
    });
    let mut refused = daemon.connect();
    while refused.try_next().is_some() {}
    let log = daemon.log();
    assert!(log.lines().any(|line| line.starts_with("<4>uid ")), "{log}");
    assert!(log.lines().all(|line| line.starts_with('<')), "{log}");
}

/// `airstream ask`, in the middle of a long answer.
fn asking(daemon: &Daemon) -> Child {
    let mut child = airstream()
        .args([
            "ask",
            "--temp",
            "0",
            "Tell me a very long story about the sea.",
            "--socket",
        ])
        .arg(daemon.socket())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let stdout = child.stdout.as_mut().expect("piped");
    stdout.read_exact(&mut [0; 1]).expect("an answer begins");
    child
}

#[test]
fn a_daemon_that_cuts_an_answer_short_is_no_success() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let mut daemon = Daemon::start(&model, "[limits]\nstop_s = 0\n");
    let mut child = asking(&daemon);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(child.wait().expect("its end").code(), Some(1));
    assert_eq!(daemon.wait(), Some(0));
}

#[test]
fn ctrl_c_ends_an_answer() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "");
    let mut child = asking(&daemon);
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).expect("it runs");
    assert_eq!(child.wait().expect("its end").code(), Some(130));
    let status = daemon.connect().ask(&json!({ "id": 1, "status": {} }));
    assert_eq!(status["status"]["running"], 0);
}
