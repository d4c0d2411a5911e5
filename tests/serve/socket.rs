//! Clients on the UNIX socket: what they may ask, and what they may do to the daemon.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::json;

use super::daemon::{Client, Daemon, generate, is_last};
use super::models;

#[test]
fn several_answers_on_one_connection_are_told_apart_and_are_those_of_each_alone() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "");
    let mut client = daemon.connect();
    let prompts = [
        "Name three colours.",
        "What is a robot?",
        "Count to five.",
        "Say hello.",
    ];
    let alone: Vec<String> = prompts
        .iter()
        .map(|prompt| client.answer(&generate(1, prompt, 12)).0)
        .collect();
    for (index, prompt) in prompts.iter().enumerate() {
        client.send(&generate(10 + index as u32, prompt, 12));
    }
    let mut texts = vec![String::new(); prompts.len()];
    let mut next = vec![0; prompts.len()];
    let mut ended = 0;
    while ended < prompts.len() {
        let reply = client.next();
        let which = reply["id"].as_u64().expect("an id") as usize - 10;
        if let Some(token) = reply.get("token") {
            assert_eq!(token["index"], next[which]);
            next[which] += 1;
            texts[which].push_str(token["text"].as_str().expect("a text"));
        }
        ended += usize::from(is_last(&reply));
    }
    assert_eq!(texts, alone);
}

#[test]
fn a_session_is_remembered_and_can_be_reset() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "");
    let mut client = daemon.connect();
    let mut ask = |id: u32, text: &str| {
        let mut request = generate(id, text, 8);
        request["generate"]["session"] = json!("arm");
        client.ask(&request)["done"]["counts"].clone()
    };
    let first = ask(1, "My name is Rosie.");
    let second = ask(2, "What is my name?");
    assert!(
        second["cached"].as_u64() > first["prompt"].as_u64(),
        "{first} {second}"
    );
    let reset = client.ask(&json!({ "id": 3, "reset": { "session": "arm" } }));
    assert!(reset.get("ok").is_some(), "{reset}");
    let again = client.ask(&json!({ "id": 4, "reset": { "session": "arm" } }));
    assert!(
        again["error"]["text"]
            .as_str()
            .expect("an error")
            .contains("no session"),
        "{again}"
    );
    let status = client.ask(&json!({ "id": 5, "status": {} }));
    assert_eq!(status["status"]["models"][0]["state"], "ready");
    assert_eq!(status["status"]["clients"], 1);
    assert_eq!(
        status["status"]["sessions"]
            .as_array()
            .expect("a list")
            .len(),
        0
    );
}

#[test]
fn an_answer_can_be_cancelled_and_others_go_on() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "");
    let mut client = daemon.connect();
    client.send(&generate(
        1,
        "Tell me a very long story about the sea.",
        400,
    ));
    client.send(&generate(2, "Say hello.", 20));
    while client.next()["token"]["index"] != 2 {}
    let begun = Instant::now();
    client.send(&json!({ "id": 3, "cancel": { "request": 1 } }));
    let mut reasons = vec![None; 4];
    while reasons.iter().flatten().count() < 3 {
        let reply = client.next();
        if is_last(&reply) {
            let id = reply["id"].as_u64().expect("an id") as usize;
            reasons[id] = Some(reply["done"]["reason"].as_str().unwrap_or("ok").to_owned());
        }
    }
    assert_eq!(reasons[1].as_deref(), Some("cancelled"));
    assert_ne!(reasons[2].as_deref(), Some("cancelled"));
    assert_eq!(reasons[3].as_deref(), Some("ok"));
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn hostile_lines_get_an_error_and_cost_no_memory() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "[limits]\nrequest_bytes = \"64KiB\"\n");
    let mut client = daemon.connect();
    client.ask(&generate(1, "Hello", 2));
    let before = daemon.resident_bytes();
    let deep = format!("{{\"id\":7,\"generate\":{}", "[".repeat(60_000));
    let long_number = format!(
        "{{\"id\":7,\"cancel\":{{\"request\":{}}}}}",
        "9".repeat(50_000)
    );
    let seven_deep = format!("{{\"id\":7,\"x\":{}1{}}}", "[".repeat(120), "]".repeat(120));
    for (line, id) in [
        (&b"{"[..], 0),
        (b"\xff\xfe\xfd", 0),
        (b"{\"id\":7,\"generate\":{\"prompt\":{\"text\":\"\xff\"}}}", 7),
        (b"null", 0),
        (b"{\"id\":7,\"genrate\":{}}", 7),
        (b"{\"id\":7,\"generate\":{\"prompt\":{\"text\":\"x\"},\"max_tokens\":1e400}}", 7),
        (b"{\"id\":7,\"generate\":{\"prompt\":{\"text\":\"x\"},\"max_tokens\":-1}}", 7),
        (b"{\"id\":7,\"generate\":{\"prompt\":{\"text\":\"x\"},\"sampling\":{\"temperature\":-5}}}", 7),
        (b"{\"id\":7,\"generate\":{\"prompt\":{\"text\":\"x\"},\"model\":\"none\"}}", 7),
        (b"{\"id\":7,\"generate\":{\"prompt\":{\"tokens\":[4000000000]}}}", 7),
        (b"{\"id\":7,\"load\":{\"model\":\"none\"}}", 7),
        (b"{\"id\":7,\"set_budget\":{\"bytes\":1}}", 7),
        (deep.as_bytes(), 0),
        (long_number.as_bytes(), 7),
        (seven_deep.as_bytes(), 7),
    ] {
        client.send_raw(line);
        client.send_raw(b"\n");
        let reply = client.next();
        let error = &reply["error"];
        assert!(error["remedy"].is_string(), "{}: {reply}", String::from_utf8_lossy(&line[..line.len().min(80)]));
        assert_eq!(reply["id"], id, "{reply}");
    }
    // 100 MB without a newline: skipped as they come.
    let chunk = vec![b'x'; 1 << 20];
    for _ in 0..100 {
        client.send_raw(&chunk);
    }
    client.send_raw(b"\n");
    let reply = client.next();
    assert!(
        reply["error"]["text"]
            .as_str()
            .expect("an error")
            .contains("more than"),
        "{reply}"
    );
    // Short messages take more memory than they took on the line.
    let message = json!({ "role": "", "content": "" });
    let prompt = json!({ "messages": vec![message; 2_300] });
    let many = client.ask(&json!({ "id": 8, "generate": { "prompt": prompt } }));
    let told = many["error"]["text"].as_str().expect("an error");
    assert!(told.contains("bytes of memory"), "{many}");
    // A prompt that cannot fit is told so.
    let long = client.ask(&generate(8, &"word ".repeat(2_000), 2));
    assert!(long["error"]["remedy"].is_string(), "{long}");
    assert!(client.ask(&generate(9, "Hello", 2)).get("done").is_some());
    let grown = daemon.resident_bytes().saturating_sub(before);
    assert!(grown < 8 << 20, "grew by {grown} bytes");
}

#[test]
fn random_bytes_do_no_harm() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "");
    let request = generate(1, "Hello", 1).to_string().into_bytes();
    let mut state = 1u64;
    let mut random = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize
    };
    for _ in 0..40 {
        let mut client = daemon.connect();
        for _ in 0..20 {
            let mut line = request.clone();
            for _ in 0..1 + random() % 4 {
                let at = random() % line.len();
                line[at] = random() as u8;
            }
            // The daemon may have something to say first; that it is not read yet is its affair.
            let _ = client
                .stream
                .write_all(&line)
                .and_then(|()| client.stream.write_all(b"\n"));
        }
    }
    let mut client = daemon.connect();
    assert!(client.ask(&generate(1, "Hello", 2)).get("done").is_some());
}

#[test]
fn a_client_that_reads_nothing_delays_nobody_and_is_dropped() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(
        &model,
        "[limits]\nstalled_s = 2\noutbox_events = 4\nsessions = 2\n",
    );
    let mut stalled = daemon.connect();
    // More than the socket's buffers hold.
    let question = generate(0, "Count from one to a thousand.", 400);
    let status = |id| json!({ "id": id, "status": {} });
    let asked = [question].into_iter().chain((1..1000).map(status));
    let asked: String = asked.map(|request| format!("{request}\n")).collect();
    stalled.send_raw(asked.as_bytes());
    let mut client = daemon.connect();
    let begun = Instant::now();
    let mut answered = 0;
    while begun.elapsed() < Duration::from_secs(4) {
        let reply = client.ask(&generate(1, "Hello", 4));
        assert!(reply.get("done").is_some(), "{reply}");
        answered += 1;
    }
    assert!(answered > 3, "{answered}");
    let everything = stalled.drain();
    assert!(!everything.is_empty());
}

#[test]
fn only_listed_users_may_use_the_socket() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "allow_uids = [4242]\n");
    let mut client: Client = daemon.connect();
    let refused = client.next();
    assert!(
        refused["error"]["text"]
            .as_str()
            .expect("an error")
            .contains("may not use"),
        "{refused}"
    );
    assert!(client.try_next().is_none());
    assert!(
        daemon.log().contains("not in allow_uids"),
        "{}",
        daemon.log()
    );
}

#[test]
fn there_are_only_so_many_clients() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "[limits]\nclients = 2\n");
    let mut kept: Vec<Client> = Vec::new();
    while kept.len() < 2 {
        let mut client = daemon.connect();
        client.send(&json!({ "id": 1, "status": {} }));
        // The connection that waited for the daemon's start may still be counted.
        match client.next().get("status") {
            Some(_) => kept.push(client),
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    let refused = daemon.connect().next();
    assert!(
        refused["error"]["text"]
            .as_str()
            .expect("an error")
            .contains("2 clients"),
        "{refused}"
    );
}

#[test]
fn a_model_comes_and_goes_while_another_answers() {
    let (Some(model), Some(other)) = (models::smollm2(), models::gemma3()) else {
        return;
    };
    let rest = format!(
        "[[model]]\nname = \"other\"\npath = \"{}\"\ncontext = 256\nload = \"demand\"\n[limits]\nsessions = 2\n",
        other.display()
    );
    let daemon = Daemon::start(&model, &rest);
    let mut client = daemon.connect();
    let alone = client.answer(&generate(1, "Name three colours.", 8)).0;
    let mut ask_other = generate(2, "Hello", 4);
    ask_other["generate"]["model"] = json!("other");
    let refused = client.ask(&ask_other);
    assert!(
        refused["error"]["remedy"]
            .as_str()
            .expect("an error")
            .contains("load"),
        "{refused}"
    );
    client.send(&generate(
        3,
        "Tell me a very long story about the sea.",
        100,
    ));
    let loaded = client.ask(&json!({ "id": 4, "load": { "model": "other" } }));
    assert!(loaded.get("ok").is_some(), "{loaded}");
    assert_eq!(client.ask(&ask_other)["done"]["counts"]["answer"], 4);
    let status = client.ask(&json!({ "id": 5, "status": {} }));
    assert_eq!(status["status"]["models"][1]["state"], "ready");
    assert_eq!(
        client.answer(&generate(1, "Name three colours.", 8)).0,
        alone
    );
    let unloaded = client.ask(&json!({ "id": 6, "unload": { "model": "other" } }));
    assert!(unloaded.get("ok").is_some(), "{unloaded}");
    assert!(client.ask(&ask_other).get("error").is_some());
    assert_eq!(
        client.answer(&generate(1, "Name three colours.", 8)).0,
        alone
    );
    let smaller = client.ask(&json!({ "id": 7, "set_budget": { "bytes": 120 << 20 } }));
    assert!(smaller.get("ok").is_some(), "{smaller}");
    assert_eq!(
        client.answer(&generate(1, "Name three colours.", 8)).0,
        alone
    );
    let status = client.ask(&json!({ "id": 8, "status": {} }));
    assert_eq!(status["status"]["budget_bytes"], 120 << 20);
}

#[test]
fn one_client_cannot_fill_the_queue() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let daemon = Daemon::start(&model, "[limits]\nsessions = 2\nclient_requests = 3\n");
    let (mut greedy, mut modest) = (daemon.connect(), daemon.connect());
    for id in 0..5 {
        greedy.send(&generate(
            id,
            "Tell me a very long story about the sea.",
            400,
        ));
    }
    let mut refused = Vec::new();
    while refused.len() < 2 {
        let reply = greedy.next();
        if let Some(error) = reply.get("error") {
            assert_eq!(error["code"], "busy", "{reply}");
            refused.push(reply["id"].clone());
        }
    }
    assert_eq!(refused, [3, 4]);
    // Cancelling again and again is no work for the engine, and makes room all the same.
    for _ in 0..2000 {
        for id in 0..3 {
            greedy.send(&json!({ "id": 100 + id, "cancel": { "request": id } }));
            while greedy.next()["id"] != 100 + id {}
        }
    }
    assert_eq!(
        modest.ask(&generate(1, "Hello", 2))["done"]["counts"]["answer"],
        2
    );
    assert_eq!(
        greedy.ask(&generate(6, "Hello", 2))["done"]["counts"]["answer"],
        2
    );
}
