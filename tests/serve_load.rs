//! Many clients at once who behave well and badly, for half a minute: nothing leaks, nobody is told another's words,
//! and every request ends. `AIRSTREAM_LOAD_S=600` makes it the ten minutes of `tests/serve_load_10_minutes`.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/models.rs"]
mod models;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use daemon::{Client, Daemon, generate, is_last};

const CLIENTS: usize = 24;
/// What resident memory may grow by between a quarter of the time and the end.
const GROWN_BYTES_MAX: u64 = 6 << 20;

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % end
    }
}

/// A question and its greedy answer, which does not depend on who else asks.
struct Known {
    question: String,
    answer: String,
}

const ANSWER_TOKENS: u32 = 32;

#[derive(Default)]
struct Seen {
    whole: AtomicU64,
    cancelled: AtomicU64,
    left: AtomicU64,
    stalled: AtomicU64,
    http: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn a_mixed_load_leaks_nothing_mixes_nothing_and_ends_everything() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let seconds = std::env::var("AIRSTREAM_LOAD_S")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(30);
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        free.local_addr().expect("an address").port()
    };
    let daemon = Daemon::start(
        &model,
        &format!(
            "[http]\nlisten = \"127.0.0.1:{port}\"\n[limits]\nclients = 64\nsessions = 8\nqueue = 64\nstalled_s = 2\noutbox_events = 8\n"
        ),
    );
    let mut client = daemon.connect();
    let known: Vec<Known> = (0..CLIENTS)
        .map(|number| {
            let question =
                format!("Tell me a story about robot number {number} and its {number} friends.");
            let (answer, _) = client.answer(&generate(1, &question, ANSWER_TOKENS));
            Known { question, answer }
        })
        .collect();
    let overhead_ms = overhead_ms(&mut client);
    let descriptors = daemon.descriptors().len();
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let seen = Seen::default();
    let mut early_bytes = 0;
    std::thread::scope(|scope| {
        for (number, known) in known.iter().enumerate() {
            let (daemon, seen) = (&daemon, &seen);
            scope.spawn(move || behave(daemon, port, known, number, end, seen));
        }
        std::thread::sleep(Duration::from_secs(seconds) / 4);
        early_bytes = daemon.resident_bytes();
    });
    let settled = Instant::now();
    let status = loop {
        let status = client.ask(&json!({ "id": 1, "status": {} }))["status"].clone();
        if status["clients"] == 1 && status["running"] == 0 && status["waiting"] == 0 {
            break status;
        }
        assert!(
            settled.elapsed() < Duration::from_secs(20),
            "{status} {}",
            daemon.log()
        );
        std::thread::sleep(Duration::from_millis(50));
    };
    println!(
        "{seconds} s: {seen:?}, resident {} then {} bytes, overhead {overhead_ms:.2} ms, {}",
        early_bytes,
        daemon.resident_bytes(),
        status["total"],
        seen = [
            &seen.whole,
            &seen.cancelled,
            &seen.left,
            &seen.stalled,
            &seen.http
        ],
    );
    assert_eq!(
        status["total"]["requests"], status["total"]["ended"],
        "{status}"
    );
    assert_eq!(daemon.descriptors().len(), descriptors);
    let grown = daemon.resident_bytes().saturating_sub(early_bytes);
    assert!(
        grown < GROWN_BYTES_MAX,
        "resident memory grew by {grown} bytes"
    );
    assert!(
        daemon.resident_bytes() < daemon::BUDGET_BYTES + (24 << 20),
        "more than the budget and 24 MiB"
    );
    for counter in [
        &seen.whole,
        &seen.cancelled,
        &seen.left,
        &seen.stalled,
        &seen.http,
    ] {
        assert!(counter.load(Ordering::Relaxed) > 0, "{status}");
    }
    assert!(
        overhead_ms < 5.0,
        "{overhead_ms} ms from request to first row and from last row to reply"
    );
    fill_every_session(&mut client);
}

/// What a request takes beside its sweeps when nobody else asks: the lower quartile of some.
fn overhead_ms(client: &mut Client) -> f64 {
    let mut times: Vec<f64> = (0..40)
        .map(|_| {
            let begun = Instant::now();
            client.send(&generate(1, "Hello", 1));
            let mut first = None;
            loop {
                let reply = client.next();
                if reply.get("token").is_some() {
                    first.get_or_insert(begun.elapsed());
                }
                if let Some(done) = reply.get("done") {
                    let prefill_ms = done["timings"]["prefill_ms"].as_f64().expect("a time");
                    let first = first.expect("a token before the end");
                    return first.as_secs_f64() * 1e3 - prefill_ms;
                }
            }
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 4]
}

/// If slots or sessions had leaked, not all sessions could have a full context now.
fn fill_every_session(client: &mut Client) {
    let long = "word ".repeat(430);
    for id in 0..8 {
        client.send(&generate(id, &format!("{id} {long}"), 16));
    }
    let mut ended = 0;
    while ended < 8 {
        let reply = client.next();
        if is_last(&reply) {
            assert!(reply.get("done").is_some(), "{reply}");
            ended += 1;
        }
    }
}

/// One client until the time is over.
fn behave(daemon: &Daemon, port: u16, known: &Known, number: usize, end: Instant, seen: &Seen) {
    let mut random = Random(number as u64);
    while Instant::now() < end {
        match random.below(20) {
            0..8 => whole(daemon, known, &mut random, seen),
            8..12 => cancelled(daemon, known, &mut random, seen),
            12..15 => left(daemon, known, &mut random, seen),
            15 if number.is_multiple_of(6) => stalled(daemon, known, seen),
            _ => http(port, known, random.below(3) == 0, seen),
        }
    }
}

fn is_prefix(text: &str, known: &Known) {
    assert!(
        known.answer.starts_with(text),
        "{text:?} does not begin {:?}",
        known.answer
    );
}

/// Several requests on one connection, all read to their ends.
fn whole(daemon: &Daemon, known: &Known, random: &mut Random, seen: &Seen) {
    let mut client = daemon.connect();
    let count_of = 1 + random.below(2) as usize;
    for id in 0..count_of {
        client.send(&generate(id as u32, &known.question, ANSWER_TOKENS));
    }
    let mut texts = vec![String::new(); count_of];
    let mut ended = 0;
    while ended < count_of {
        let reply = client.next();
        let id = reply["id"].as_u64().expect("an id") as usize;
        if let Some(text) = reply["token"]["text"].as_str() {
            texts[id].push_str(text);
            is_prefix(&texts[id], known);
        }
        if is_last(&reply) {
            assert!(reply.get("done").is_some(), "{reply}");
            assert_eq!(texts[id], known.answer);
            ended += 1;
        }
    }
    count(&seen.whole);
}

/// Reads some tokens, then cancels, and waits for the end.
fn cancelled(daemon: &Daemon, known: &Known, random: &mut Random, seen: &Seen) {
    let mut client = daemon.connect();
    client.send(&generate(1, &known.question, ANSWER_TOKENS));
    let mut text = String::new();
    for _ in 0..random.below(6) {
        let reply = client.next();
        text.push_str(reply["token"]["text"].as_str().unwrap_or_default());
    }
    client.send(&json!({ "id": 2, "cancel": { "request": 1 } }));
    let (mut ended, mut acknowledged) = (false, false);
    while !(ended && acknowledged) {
        let reply: Value = client.next();
        text.push_str(reply["token"]["text"].as_str().unwrap_or_default());
        ended |= reply["id"] == 1 && is_last(&reply);
        acknowledged |= reply["id"] == 2 && is_last(&reply);
    }
    is_prefix(&text, known);
    count(&seen.cancelled);
}

/// Goes away in the middle.
fn left(daemon: &Daemon, known: &Known, random: &mut Random, seen: &Seen) {
    let mut client = daemon.connect();
    client.send(&generate(1, &known.question, 400));
    for _ in 0..random.below(8) {
        client.next();
    }
    count(&seen.left);
}

/// Asks for more than the socket's buffers hold, and reads nothing until it is dropped.
fn stalled(daemon: &Daemon, known: &Known, seen: &Seen) {
    let mut client = daemon.connect();
    client.send(&generate(1, &known.question, 400));
    let status = json!({ "id": 2, "status": {} }).to_string() + "\n";
    // Ends when the daemon, which waits for us, does not read any more: it then drops the connection.
    for _ in 0..100_000 {
        if client.stream.write_all(status.as_bytes()).is_err() {
            break;
        }
    }
    client.drain();
    count(&seen.stalled);
}

/// Streams over HTTP; may hang up in the middle.
fn http(port: u16, known: &Known, hangs_up: bool, seen: &Seen) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream
        .set_read_timeout(Some(daemon::PATIENCE))
        .expect("a socket");
    let body = json!({
        "messages": [{ "role": "user", "content": known.question }],
        "max_tokens": ANSWER_TOKENS, "temperature": 0, "stream": true,
    })
    .to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream
        .write_all((head + &body).as_bytes())
        .expect("the daemon reads");
    let mut text = String::new();
    for line in BufReader::new(stream).lines() {
        let line = line.expect("a line");
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        if data == "[DONE]" {
            assert_eq!(text, known.answer);
            count(&seen.http);
            return;
        }
        let event: Value = serde_json::from_str(data).expect("JSON");
        text.push_str(
            event["choices"][0]["delta"]["content"]
                .as_str()
                .unwrap_or_default(),
        );
        is_prefix(&text, known);
        if hangs_up && text.len() > 20 {
            return;
        }
    }
    panic!("the stream broke off after {text:?}");
}
