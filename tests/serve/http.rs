//! Clients over HTTP. The stock `openai` client is tried by `tests/serve/openai_client.py`.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::daemon::{Daemon, PATIENCE, generate, stream_to};
use super::models;

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

struct Response {
    status: u16,
    head: String,
    body: String,
}

impl Response {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The JSON of each server-sent event but the last, which is `[DONE]`.
    fn events(&self) -> Vec<Value> {
        let data = self
            .body
            .lines()
            .filter_map(|line| line.strip_prefix("data: "));
        let mut events: Vec<&str> = data.collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{}", self.body);
        events
            .into_iter()
            .map(|event| serde_json::from_str(event).expect("JSON"))
            .collect()
    }
}

/// One request on a connection of its own.
fn request(mut stream: impl Read + Write, head: &str, body: &str) -> Response {
    let length = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    let text = format!("{head}\r\nHost: robot\r\nConnection: close\r\n{length}\r\n{body}");
    stream.write_all(text.as_bytes()).expect("the daemon reads");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("a response");
    let text = String::from_utf8(bytes).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").expect("a response");
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .expect("a status");
    let chunked = head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked");
    let body = if chunked {
        dechunk(body)
    } else {
        body.to_owned()
    };
    Response {
        status,
        head: head.to_owned(),
        body,
    }
}

fn dechunk(mut text: &str) -> String {
    let mut body = String::new();
    while let Some((size, rest)) = text.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a chunk's size");
        body.push_str(&rest[..size]);
        text = rest[size..].trim_start_matches("\r\n");
        if size == 0 {
            return body;
        }
    }
    panic!("the response broke off");
}

/// A daemon that serves HTTP on a port; `rest` goes below `[http]`.
fn start(rest: &str) -> Option<(Daemon, impl Fn(&str, &str) -> Response)> {
    let port = free_port();
    let model = models::smollm2()?;
    let daemon = Daemon::start(
        &model,
        &format!("[http]\nlisten = \"127.0.0.1:{port}\"\n{rest}"),
    );
    let send = move |head: &str, body: &str| {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        request(stream, head, body)
    };
    Some((daemon, send))
}

fn chat(rest: &Value) -> String {
    let mut request = json!({
        "model": "small",
        "messages": [{ "role": "user", "content": "Name three colours." }],
        "temperature": 0, "max_tokens": 12,
    });
    for (key, value) in rest.as_object().expect("an object") {
        request[key] = value.clone();
    }
    request.to_string()
}

#[test]
fn an_answer_is_the_same_whole_and_streamed_and_by_the_socket() {
    let Some((daemon, send)) = start("") else {
        return;
    };
    let whole = send("POST /v1/chat/completions HTTP/1.1", &chat(&json!({})));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let options = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let streamed = send("POST /v1/chat/completions HTTP/1.1", &chat(&options));
    assert!(
        streamed
            .head
            .to_ascii_lowercase()
            .contains("content-type: text/event-stream"),
        "{}",
        streamed.head
    );
    let events = streamed.events();
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(whole["choices"][0]["message"]["content"], text.as_str());
    assert_eq!(
        events.last().expect("events")["usage"]["completion_tokens"],
        12
    );
    let by_socket = daemon.connect().answer(&json!({ "id": 1, "generate": {
        "prompt": { "messages": [{ "role": "user", "content": "Name three colours." }] },
        "max_tokens": 12, "sampling": { "temperature": 0.0 },
    }}));
    assert_eq!(by_socket.0, text);

    let raw = json!({ "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0 })
        .to_string();
    let completion = send("POST /v1/completions HTTP/1.1", &raw).json();
    assert!(
        completion["choices"][0]["text"]
            .as_str()
            .expect("a text")
            .contains("Paris"),
        "{completion}"
    );
}

#[test]
fn what_watches_the_daemon_is_answered() {
    let Some((_daemon, send)) = start("") else {
        return;
    };
    send(
        "POST /v1/chat/completions HTTP/1.1",
        &chat(&json!({ "max_tokens": 2 })),
    );
    assert_eq!(send("GET /health HTTP/1.1", "").json()["status"], "ok");
    assert_eq!(
        send("GET /v1/models HTTP/1.1", "").json()["data"][0]["id"],
        "small"
    );
    assert_eq!(
        send("GET /v1/models/small HTTP/1.1", "").json()["id"],
        "small"
    );
    let metrics = send("GET /metrics HTTP/1.1", "").body;
    assert!(
        metrics.contains("airstream_answer_tokens_total 2\n"),
        "{metrics}"
    );
    for (head, body, status) in [
        ("GET /none HTTP/1.1", "", 404),
        ("GET /v1/models/none HTTP/1.1", "", 404),
        ("GET /v1/chat/completions HTTP/1.1", "", 405),
        ("POST /v1/chat/completions HTTP/1.1", "{", 400),
        ("POST /v1/chat/completions HTTP/1.1", "{}", 400),
        (
            "POST /v1/chat/completions HTTP/1.1",
            &chat(&json!({ "model": "none" })),
            404,
        ),
        (
            "POST /v1/chat/completions HTTP/1.1",
            &chat(&json!({ "n": 2 })),
            400,
        ),
        (
            "POST /v1/chat/completions HTTP/1.1",
            &chat(&json!({ "temperature": -1 })),
            400,
        ),
        (
            "POST /v1/chat/completions HTTP/1.1\r\nOrigin: null",
            &chat(&json!({})),
            403,
        ),
        (
            "POST /v1/chat/completions HTTP/1.1",
            &"x".repeat(1 << 20),
            413,
        ),
    ] {
        let response = send(head, body);
        assert_eq!(response.status, status, "{head} {}", response.body);
        assert!(
            response.json()["error"]["message"].is_string(),
            "{}",
            response.body
        );
    }
}

#[test]
fn a_token_is_asked_for_and_a_unix_socket_served() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(
        &model,
        "[http]\nlisten = \"unix:{folder}/h.sock\"\ntoken = \"open-sesame\"\n",
    );
    let send = |head: &str| request(stream_to(&daemon.path("h.sock")), head, "");
    // Open to whatever watches it; 503 while the model is being loaded.
    assert!([200, 503].contains(&send("GET /health HTTP/1.1").status));
    let refused = send("GET /v1/models HTTP/1.1");
    assert_eq!(refused.status, 401);
    assert!(
        refused.head.contains("connection: close"),
        "{}",
        refused.head
    );
    assert_eq!(
        send("GET /v1/models HTTP/1.1\r\nAuthorization: Bearer open-sesam").status,
        401
    );
    assert_eq!(
        send("GET /v1/models HTTP/1.1\r\nAuthorization: Bearer open-sesame").status,
        200
    );
    // Another token counts from SIGHUP on; a file that cannot be read leaves the old one.
    let (file, secret) = (daemon.path("airstream.toml"), daemon.path("token"));
    let text = std::fs::read_to_string(&file).expect("its configuration");
    let token_file = format!("token_file = \"{}\"", secret.display());
    let reload = |text: &str, until: &str| daemon.reload(text, until);
    let with_file = text.replace("token = \"open-sesame\"", &token_file);
    reload(&with_file, "cannot read");
    let shown = |token: &str| {
        send(&format!(
            "GET /v1/models HTTP/1.1\r\nAuthorization: Bearer {token}"
        ))
        .status
    };
    assert_eq!((shown("open-sesame"), shown("barley")), (200, 401));
    std::fs::write(&secret, "barley\n").expect("a file");
    reload(&with_file, "read again");
    assert_eq!((shown("open-sesame"), shown("barley")), (401, 200));
    // What another address needs no longer is not taken from this one.
    let elsewhere = text.replace("h.sock\"\ntoken = \"open-sesame\"", "i.sock\"");
    reload(
        &elsewhere,
        "`listen` of [http] changes at the next start only",
    );
    assert_eq!(shown("barley"), 200);
    assert_eq!(send("GET /v1/models HTTP/1.1").status, 401);
}

/// The address that a daemon of [`start`] listens on.
fn address(daemon: &Daemon) -> String {
    let config = std::fs::read_to_string(daemon.path("airstream.toml")).expect("its configuration");
    let address = config
        .rsplit_once("listen = \"")
        .and_then(|(_, rest)| rest.split('"').next());
    address.expect("an address").to_owned()
}

#[test]
fn a_client_that_reads_nothing_does_not_keep_its_connection() {
    let Some((daemon, _)) = start("[limits]\nclients = 2\nstalled_s = 1\n") else {
        return;
    };
    let address = address(&daemon);
    let asks = "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000);
    let deaf: Vec<TcpStream> = (0..2)
        .map(|_| {
            let mut deaf = TcpStream::connect(&address).expect("it listens");
            deaf.set_nonblocking(true).expect("a socket");
            // More than all buffers on the way hold; the daemon stops reading when it cannot write.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(300) {
                if deaf.write(asks.as_bytes()).is_err() {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            deaf
        })
        .collect();
    let (begun, mut refused) = (Instant::now(), 0);
    loop {
        let mut stream = TcpStream::connect(&address).expect("it listens");
        let ask = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let mut reply = Vec::new();
        // A connection that is refused may break off in the middle of the request.
        let _ = stream.write_all(ask.as_bytes()).and_then(|()| {
            stream.read_to_end(&mut reply)?;
            Ok(())
        });
        if reply.starts_with(b"HTTP/1.1 200") {
            break;
        }
        refused += usize::from(reply.starts_with(b"HTTP/1.1 503"));
        assert!(begun.elapsed() < Duration::from_secs(10), "still refused");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(refused > 0, "there was room for three");
    drop(deaf);
}

#[test]
fn a_body_in_the_smallest_pieces_takes_no_more_memory() {
    let Some((daemon, _)) = start("") else { return };
    let address = address(&daemon);
    daemon.connect().ask(&generate(1, "Hello", 2));
    let before = daemon.resident_bytes();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let pieces = "1\r\nx\r\n".repeat(60_000);
    let halves: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = TcpStream::connect(&address).expect("it listens");
            stream.write_all(head.as_bytes()).expect("the daemon reads");
            stream
                .write_all(pieces.as_bytes())
                .expect("the daemon reads");
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let grown = daemon.resident_bytes().saturating_sub(before);
    // So much is set aside for each: half of it is the request.
    assert!(grown < 8 * (128 << 10) + (1 << 20), "grew by {grown} bytes");
    drop(halves);
}

#[test]
fn a_client_that_hangs_up_ends_its_answer() {
    let Some((daemon, _)) = start("") else { return };
    let address = address(&daemon);
    for stream in [false, true] {
        let body = chat(&json!({ "max_tokens": 480, "stream": stream, "messages": [
            { "role": "user", "content": "Tell me a very long story about the sea." }
        ]}));
        let mut connection = TcpStream::connect(&address).expect("it listens");
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        connection
            .write_all((head + &body).as_bytes())
            .expect("the daemon reads");
        let mut client = daemon.connect();
        let running = |client: &mut super::daemon::Client| {
            client.ask(&json!({ "id": 1, "status": {} }))["status"]["running"]
                .as_u64()
                .expect("a number")
        };
        while running(&mut client) == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(connection);
        let begun = Instant::now();
        while running(&mut client) != 0 {
            assert!(
                begun.elapsed() < Duration::from_secs(1),
                "it goes on for nobody"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
