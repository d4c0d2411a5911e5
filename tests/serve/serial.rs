//! Clients on serial lines, which are pseudo-terminals here, with somebody in between who damages bytes.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use airstream::board::{Board, Monitor};
use airstream::engine::request::{Event, Generate, Prompt, Reason, Sampling};
use airstream::error::{Error, Kind};
use airstream::serve;
use airstream::serve::client::Connection;
use airstream::serve::config::{Config, FlowControl};
use airstream::serve::engine::Setup;
use airstream::serve::message::{Answer, Cancel, Command, Nothing, Reply, Request};
use airstream::serve::status::ModelState;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::ttyname;

use super::daemon::{Daemon, PATIENCE, generate};
use super::models;

/// A terminal device and the end that a test holds.
struct Pty {
    master: OwnedFd,
    /// Kept open, so that the device stays while nobody else uses it.
    _slave: OwnedFd,
    device: PathBuf,
}

impl Pty {
    fn new() -> Pty {
        let pair = openpty(None, None).expect("a pseudo-terminal");
        let mut mode = tcgetattr(&pair.slave).expect("a terminal");
        cfmakeraw(&mut mode);
        tcsetattr(&pair.slave, SetArg::TCSANOW, &mode).expect("a terminal");
        let device = ttyname(&pair.slave).expect("a name");
        Pty {
            master: pair.master,
            _slave: pair.slave,
            device,
        }
    }

    fn read(&self, patience: Duration) -> Vec<u8> {
        let mut ready = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).expect("a short time");
        if poll(&mut ready, timeout).expect("poll") == 0 {
            return Vec::new();
        }
        let mut bytes = vec![0; 256];
        let len = nix::unistd::read(&self.master, &mut bytes).unwrap_or(0);
        bytes.truncate(len);
        bytes
    }

    fn write(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let len = nix::unistd::write(&self.master, bytes).expect("the line takes bytes");
            bytes = &bytes[len..];
        }
    }
}

/// A line between two devices; so many bytes of a thousand are flipped, lost or inserted. Bytes that suffered.
fn line(a: Pty, b: Pty, damage_per_mille: u64, seed: u64) -> Arc<AtomicU64> {
    let damaged = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&damaged);
    std::thread::spawn(move || {
        let mut state = seed;
        let mut random = move || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            state >> 33
        };
        // Ends with the test's process.
        loop {
            for (from, to) in [(&a, &b), (&b, &a)] {
                let mut out = Vec::new();
                for byte in from.read(Duration::from_millis(1)) {
                    if random() % 1000 >= damage_per_mille {
                        out.push(byte);
                        continue;
                    }
                    counted.fetch_add(1, Ordering::Relaxed);
                    match random() % 3 {
                        0 => out.push(byte ^ (1 << (random() % 8))),
                        1 => {}
                        _ => out.extend([byte, random() as u8]),
                    }
                }
                to.write(&out);
            }
        }
    });
    damaged
}

fn question(id: u32, text: &str, max_tokens: u32) -> Request {
    let command = Command::Generate(Box::new(Generate {
        sampling: Sampling::greedy(),
        max_tokens: Some(max_tokens),
        ..Generate::new(Prompt::Text(text.to_owned()))
    }));
    Request { id, command }
}

/// Asks, and puts the answer together from its tokens, none of which may be missing.
async fn answer(connection: &mut Connection, id: u32, text: &str, max_tokens: u32) -> String {
    connection
        .send(&question(id, text, max_tokens))
        .await
        .expect("a line");
    let (mut whole, mut next) = (String::new(), 0);
    loop {
        let Reply { id: of, answer } = connection.next().await.expect("a reply");
        assert_eq!(of, id);
        match answer {
            Answer::Event(Event::Token { index, text, .. }) => {
                assert_eq!(index, next);
                next += 1;
                whole.push_str(&text);
            }
            Answer::Event(Event::Done { counts, .. }) => {
                assert_eq!(counts.answer, next);
                return whole;
            }
            Answer::Event(Event::Accepted { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

async fn connect(device: &Path) -> Connection {
    Connection::serial(device, 115_200, FlowControl::None)
        .await
        .expect("a line")
}

#[test]
fn every_answer_is_intact_on_a_line_that_damages_a_byte_in_a_hundred() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let (near, far) = (Pty::new(), Pty::new());
    let serial = format!("[[serial]]\ndevice = \"{}\"\n", near.device.display());
    let device = far.device.clone();
    let daemon = Daemon::start(&model, &serial);
    let damaged = line(near, far, 10, 7);
    let mut socket = daemon.connect();
    runtime().block_on(async {
        let mut connection = connect(&device).await;
        for (id, prompt) in ["Name three colours.", "What is a robot?", "Count to ten."]
            .iter()
            .enumerate()
        {
            let wanted = socket.answer(&generate(1, prompt, 24)).0;
            assert_eq!(answer(&mut connection, id as u32, prompt, 24).await, wanted);
        }
        // A long request takes many frames.
        let long = "All work and no play makes a dull robot. ".repeat(20);
        let wanted = socket.answer(&generate(1, &long, 8)).0;
        assert_eq!(answer(&mut connection, 9, &long, 8).await, wanted);
        connection.finish().await;
    });
    assert!(damaged.load(Ordering::Relaxed) > 40, "{damaged:?}");
}

#[test]
fn a_peer_that_restarts_in_an_answer_does_not_hear_its_rest() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let (near, far) = (Pty::new(), Pty::new());
    let serial = format!("[[serial]]\ndevice = \"{}\"\n", near.device.display());
    let device = far.device.clone();
    let _daemon = Daemon::start(&model, &serial);
    line(near, far, 5, 1);
    runtime().block_on(async {
        let mut first = connect(&device).await;
        first
            .send(&question(1, "Tell me a very long story.", 300))
            .await
            .expect("a line");
        for _ in 0..4 {
            first.next().await.expect("a reply");
        }
        drop(first);
        let mut second = connect(&device).await;
        assert!(!answer(&mut second, 1, "Hello", 6).await.is_empty());
        second.finish().await;
    });
}

#[test]
fn a_plug_that_is_pulled_and_put_back_is_survived() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "[[serial]]\ndevice = \"{folder}/tty\"\n");
    let link = daemon.path("tty");
    let pulled = Pty::new();
    std::os::unix::fs::symlink(&pulled.device, &link).expect("a link");
    let begun = Instant::now();
    while !daemon.descriptors().contains(&pulled.device) {
        assert!(begun.elapsed() < PATIENCE, "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(pulled);
    std::fs::remove_file(&link).expect("a link");
    while !daemon.log().contains("waiting for it to come back") {
        assert!(begun.elapsed() < PATIENCE, "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    let (near, far) = (Pty::new(), Pty::new());
    std::os::unix::fs::symlink(&near.device, &link).expect("a link");
    let device = far.device.clone();
    line(near, far, 0, 1);
    runtime().block_on(async {
        let mut connection = connect(&device).await;
        assert!(!answer(&mut connection, 1, "Hello", 6).await.is_empty());
        connection.finish().await;
    });
}

#[test]
fn a_person_can_type_on_a_terminal() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let pty = Pty::new();
    let serial = format!(
        "[[serial]]\ndevice = \"{}\"\nmode = \"text\"\n",
        pty.device.display()
    );
    let _daemon = Daemon::start(&model, &serial);
    let shown = std::cell::RefCell::new(String::new());
    let wait_for = |text: &str| {
        let begun = Instant::now();
        while !shown.borrow().contains(text) {
            assert!(
                begun.elapsed() < PATIENCE,
                "{text:?} is not in {:?}",
                shown.borrow()
            );
            shown.borrow_mut().push_str(&String::from_utf8_lossy(
                &pty.read(Duration::from_millis(20)),
            ));
        }
        shown.take()
    };
    wait_for("> ");
    // There is no conversation to forget, and there is none afterwards.
    pty.write(b"/new\r");
    wait_for("done\r\n> ");
    pty.write(b"Name a coloxx\x7f\x7fur.\r");
    let answer = wait_for("\r\n> ");
    let echo = "Name a coloxx\x08 \x08\x08 \x08ur.\r\n";
    assert!(answer.starts_with(echo), "{answer:?}");
    // However short the answer is, there is one.
    let said = answer[echo.len()..].trim_end_matches("\r\n> ");
    assert!(!said.is_empty(), "{answer:?}");
    pty.write(b"Tell me a very long story about the sea.\r");
    wait_for("sea.\r\n");
    // Typed during an answer: dropped, so there is nothing to take back later.
    pty.write(b"xyzzy");
    pty.write(b"\x03");
    wait_for("> ");
    pty.write(b"\x15/new\r");
    assert_eq!(wait_for("done\r\n> "), "/new\r\ndone\r\n> ");
    pty.write(b"/status\r");
    assert!(wait_for("so far").contains("slots: weights"));
}

/// A daemon that opens its model for as long as the sender lives. It ends with an error then.
fn opening(serials: &str) -> (Sender<()>, JoinHandle<()>) {
    let text = format!("[[model]]\nname = \"small\"\npath = \"/unused\"\n{serials}");
    let config = Config::parse(&text, Path::new("test")).expect("sound");
    let (sender, waits) = std::sync::mpsc::channel();
    let daemon = std::thread::spawn(move || {
        let board = Board::named("generic").expect("known");
        let setup = Setup {
            options: serve::engine::options(&config),
            open: Box::new(move |_, _| {
                // Nothing is ever sent.
                let _ = waits.recv();
                Err(Error::new(Kind::Io, "the test is over", "none"))
            }),
            watch: Box::new(move |_| Monitor::start(&board, Path::new("/"), None)),
        };
        let ended = serve::daemon::run(config, Path::new("test"), setup);
        assert!(ended.is_err_and(|e| e.what() == "the test is over"));
    });
    (sender, daemon)
}

#[test]
fn a_line_is_heard_while_a_request_waits_for_the_model() {
    let (near, far, typed) = (Pty::new(), Pty::new(), Pty::new());
    let serials = format!(
        "[[serial]]\ndevice = \"{}\"\n[[serial]]\ndevice = \"{}\"\nmode = \"text\"\n",
        near.device.display(),
        typed.device.display()
    );
    let device = far.device.clone();
    let (opens, daemon) = opening(&serials);
    line(near, far, 0, 1);
    runtime().block_on(async {
        let mut connection = connect(&device).await;
        connection.send(&question(1, "Hi", 4)).await.expect("sent");
        let (status, cancel) = (Command::Status(Nothing {}), Cancel { request: 1 });
        let request = Request {
            id: 2,
            command: status,
        };
        connection.send(&request).await.expect("sent");
        let reply = connection.next().await.expect("a reply");
        let Answer::Status(status) = reply.answer else {
            panic!("{reply:?}");
        };
        assert_eq!(status.models[0].state, ModelState::Loading);
        let request = Request {
            id: 3,
            command: Command::Cancel(cancel),
        };
        connection.send(&request).await.expect("sent");
        assert_eq!(connection.next().await.expect("a reply").id, 3);
        let reply = connection.next().await.expect("a reply");
        let cancelled = matches!(
            reply.answer,
            Answer::Event(Event::Done {
                reason: Reason::Cancelled,
                ..
            })
        );
        assert!(cancelled && reply.id == 1, "{reply:?}");
        connection.finish().await;
    });
    let mut shown = String::new();
    let mut wait_for = |text: &str| {
        let begun = Instant::now();
        while !shown.contains(text) {
            assert!(begun.elapsed() < PATIENCE, "{text:?} is not in {shown:?}");
            shown += &String::from_utf8_lossy(&typed.read(Duration::from_millis(20)));
        }
    };
    typed.write(b"Hi\r");
    wait_for("Hi\r\n");
    typed.write(b"\x03");
    wait_for("(stopped)\r\n> ");
    typed.write(b"/help\r");
    wait_for("/status tells");
    drop(opens);
    daemon.join().expect("it ends");
}

#[test]
fn noise_alone_is_answered_by_silence() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let pty = Pty::new();
    let serial = format!("[[serial]]\ndevice = \"{}\"\n", pty.device.display());
    let daemon = Daemon::start(&model, &serial);
    let mut noise = std::fs::File::open("/dev/urandom")
        .expect("noise")
        .take(200_000);
    let mut bytes = Vec::new();
    noise.read_to_end(&mut bytes).expect("noise");
    for chunk in bytes.chunks(2000) {
        pty.write(chunk);
        assert!(pty.read(Duration::from_millis(1)).is_empty());
    }
    assert!(pty.read(Duration::from_millis(100)).is_empty());
    assert!(
        daemon
            .connect()
            .ask(&generate(1, "Hello", 1))
            .get("done")
            .is_some()
    );
}
