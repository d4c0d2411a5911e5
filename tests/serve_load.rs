//! Many clients at once who behave well and badly, for a quarter of a minute: nothing leaks, nobody is told another's words,
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
/// What the most of resident memory may grow by between the second quarter of the time and the last.
const GROWN_BYTES_MAX: u64 = 2 << 20;
/// A client that reads nothing is dropped after so long.
const STALLED_S: u64 = 4;
/// The longest time between two tokens of a client that reads: had anybody waited for one that does not, it would be
/// more than [`STALLED_S`]. Alone on two cores it is a tenth of a second; this leaves room for a machine that does other
/// things too.
const GAP_MAX: Duration = Duration::from_secs(3);
/// The budget goes down to this and up again, which opens all rings and registers all memory anew.
const BUDGET_BYTES_LEAST: u64 = daemon::BUDGET_BYTES - (12 << 20);

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
    /// The answer to [`AGAIN`] after it, and without it.
    again: String,
    alone: String,
}

const ANSWER_TOKENS: u32 = 32;
/// What follows in a session.
const AGAIN: &str = "And then?";

/// What happened, how often.
#[derive(Debug, Default)]
struct Seen {
    whole: AtomicU64,
    cancelled: AtomicU64,
    left: AtomicU64,
    stalled: AtomicU64,
    http: AtomicU64,
    /// Two questions in a session, and how many of these had to make way for others in between.
    talks: AtomicU64,
    displaced: AtomicU64,
    /// Changes of the budget.
    budgets: AtomicU64,
    /// Milliseconds between two tokens of a client that reads.
    gap_ms_max: AtomicU64,
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
        .unwrap_or(15);
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        free.local_addr().expect("an address").port()
    };
    let daemon = Daemon::start(
        &model,
        &format!(
            "[http]\nlisten = \"127.0.0.1:{port}\"\n[limits]\nclients = 64\nsessions = 8\nqueue = 64\nstalled_s = {STALLED_S}\noutbox_events = 8\n"
        ),
    );
    let mut client = daemon.connect();
    let (alone, _) = client.answer(&generate(1, AGAIN, ANSWER_TOKENS));
    let known: Vec<Known> = (0..CLIENTS)
        .map(|number| learn(&mut client, number, &alone))
        .collect();
    let overhead_ms = overhead_ms(&mut client);
    let weights_before = resident_weights(&mut client, "before");
    let (descriptors, threads_before) = (daemon.descriptors().len(), threads(&daemon));

    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let seen = Seen::default();
    let mut resident: Vec<u64> = Vec::new();
    std::thread::scope(|scope| {
        for (number, known) in known.iter().enumerate() {
            let (daemon, seen) = (&daemon, &seen);
            scope.spawn(move || behave(daemon, port, known, number, end, seen));
        }
        scope.spawn(|| operate(&daemon, port, end, &seen));
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(200));
            resident.push(daemon.resident_bytes());
        }
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
    let quarter = resident.len() / 4;
    let most = |of: &[u64]| of.iter().copied().max().unwrap_or(0);
    let (early, late) = (
        most(&resident[quarter..2 * quarter]),
        most(&resident[3 * quarter..]),
    );
    println!(
        "{seconds} s: {seen:?}, resident {early} then {late} bytes, of weights beside full contexts {weights_before}, overhead {overhead_ms:.2} ms, {}",
        status["total"],
    );
    assert_eq!(
        status["total"]["requests"], status["total"]["ended"],
        "{status}"
    );
    assert_eq!(daemon.descriptors().len(), descriptors);
    // Those that turn prompts into tokens come and go.
    assert!(threads(&daemon) <= threads_before + 2);
    assert!(
        late < early + GROWN_BYTES_MAX,
        "resident memory grew from {early} to {late} bytes"
    );
    assert!(
        most(&resident) < daemon::BUDGET_BYTES + (24 << 20),
        "more than the budget and 24 MiB"
    );
    for counter in [
        &seen.whole,
        &seen.cancelled,
        &seen.left,
        &seen.stalled,
        &seen.http,
        &seen.talks,
        &seen.budgets,
    ] {
        assert!(counter.load(Ordering::Relaxed) > 0, "{seen:?}");
    }
    let gap = Duration::from_millis(seen.gap_ms_max.load(Ordering::Relaxed));
    assert!(gap < GAP_MAX, "{gap:?} between two tokens");
    assert!(
        overhead_ms < 5.0,
        "{overhead_ms} ms from request to first row and from last row to reply"
    );
    let weights = resident_weights(&mut client, "after");
    assert_eq!(weights, weights_before, "bytes of weights in memory");
}

/// Threads of the daemon's process.
fn threads(daemon: &Daemon) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.child.id()));
    tasks.expect("it runs").count()
}

/// A client's question, its answer, and that to the question after it.
fn learn(client: &mut Client, number: usize, alone: &str) -> Known {
    let question = format!("Tell me a story about robot number {number} and its {number} friends.");
    let (answer, _) = client.answer(&talk(number, &question));
    let (again, _) = client.answer(&talk(number, AGAIN));
    Known {
        question,
        answer,
        again,
        alone: alone.to_owned(),
    }
}

/// A request in the client's own session.
fn talk(number: usize, text: &str) -> Value {
    let mut request = generate(1, text, ANSWER_TOKENS);
    request["generate"]["session"] = format!("talk {number}").into();
    request
}

/// Bytes of the model's weights that are in memory beside as many full contexts as there may be: a page that was not
/// given back is a slot that weights have no more.
fn resident_weights(client: &mut Client, round: &str) -> u64 {
    fill_every_session(client, round);
    let mut before = 0;
    loop {
        let status = client.ask(&json!({ "id": 1, "status": {} }));
        let bytes = &status["status"]["models"][0]["resident_bytes"];
        let bytes = bytes.as_u64().expect("a number");
        // While nobody asks, weights fill what is free.
        if bytes == before {
            return bytes;
        }
        before = bytes;
        std::thread::sleep(Duration::from_millis(200));
    }
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

/// If slots or sessions had leaked, not all sessions could have a full context.
fn fill_every_session(client: &mut Client, round: &str) {
    let long = "word ".repeat(430);
    for id in 0..8 {
        let mut request = generate(id, &format!("{id} {long}"), 16);
        request["generate"]["session"] = format!("{round} {id}").into();
        client.send(&request);
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
            0..6 => whole(daemon, known, &mut random, seen),
            6..8 => talks(daemon, known, number, &mut random, seen),
            8..12 => cancelled(daemon, known, &mut random, seen),
            12..15 => left(daemon, known, &mut random, seen),
            15 if number.is_multiple_of(6) => stalled(daemon, known, seen),
            _ => http(port, known, random.below(3) == 0, seen),
        }
    }
}

/// Looks at everything now and then, and changes the budget under way.
fn operate(daemon: &Daemon, port: u16, end: Instant, seen: &Seen) {
    let mut client = daemon.connect();
    let budgets = [BUDGET_BYTES_LEAST, daemon::BUDGET_BYTES];
    for bytes in budgets.into_iter().cycle() {
        let budget = json!({ "id": 1, "set_budget": { "bytes": bytes } });
        let reply = client.ask(&budget);
        assert!(reply.get("ok").is_some(), "{reply}");
        let status = client.ask(&json!({ "id": 2, "status": {} }));
        assert!(status["status"]["sessions"].is_array(), "{status}");
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        let request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).expect("it reads");
        let metrics = std::io::read_to_string(stream).expect("text");
        assert!(metrics.contains("airstream_"), "{metrics}");
        count(&seen.budgets);
        // The last change is the one up.
        if bytes == daemon::BUDGET_BYTES && Instant::now() >= end {
            return;
        }
        std::thread::sleep(Duration::from_millis(1500));
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
    let mut tokens = vec![0; count_of];
    let mut latest = vec![None::<Instant>; count_of];
    let mut ended = 0;
    while ended < count_of {
        let reply = client.next();
        let id = reply["id"].as_u64().expect("an id") as usize;
        if let Some(text) = reply["token"]["text"].as_str() {
            texts[id].push_str(text);
            is_prefix(&texts[id], known);
            assert_eq!(reply["token"]["index"], tokens[id], "{reply}");
            tokens[id] += 1;
            let now = Instant::now();
            if let Some(before) = latest[id].replace(now) {
                let gap_ms = (now - before).as_millis() as u64;
                seen.gap_ms_max.fetch_max(gap_ms, Ordering::Relaxed);
            }
        }
        if is_last(&reply) {
            assert!(reply.get("done").is_some(), "{reply}");
            assert_eq!(reply["done"]["counts"]["answer"], tokens[id], "{reply}");
            assert_eq!(texts[id], known.answer);
            ended += 1;
        }
    }
    count(&seen.whole);
}

/// Two questions in a session. It may make way for another in between, unless the second one waits already.
fn talks(daemon: &Daemon, known: &Known, number: usize, random: &mut Random, seen: &Seen) {
    let mut client = daemon.connect();
    // There may be none to forget.
    client.ask(&json!({ "id": 1, "reset": { "session": format!("talk {number}") } }));
    let at_once = random.below(2) == 0;
    client.send(&talk(number, &known.question));
    let mut second = talk(number, AGAIN);
    second["id"] = 2.into();
    if at_once {
        client.send(&second);
    }
    let mut texts = [String::new(), String::new()];
    for id in [1, 2] {
        if id == 2 && !at_once {
            client.send(&second);
        }
        loop {
            let reply = client.next();
            assert_eq!(reply["id"], id, "{reply}");
            texts[id - 1].push_str(reply["token"]["text"].as_str().unwrap_or_default());
            if is_last(&reply) {
                assert!(reply.get("done").is_some(), "{reply}");
                break;
            }
        }
    }
    assert_eq!(texts[0], known.answer);
    if texts[1] != known.again {
        assert!(!at_once, "a conversation that went on made way");
        assert_eq!(texts[1], known.alone);
        count(&seen.displaced);
    }
    count(&seen.talks);
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
