//! A model is loaded while another one answers.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use airstream::board::{Board, Monitor};
use airstream::engine::Engine;
use airstream::serve::engine::{Answering, Setup};
use airstream::serve::status::{ModelState, Status};
use airstream::serve::worker::Worker;
use airstream::serve::{self, config::Config};
use serde_json::{Value, json};

use super::daemon::{Client, Daemon, config, generate, is_last};
use super::models;

/// The longest time between two tokens while the other model comes. Reading its vocabulary alone takes longer.
const GAP_MAX: Duration = Duration::from_millis(150);
/// What the service manager is told to wait for a sign of life.
const WATCHDOG: Duration = Duration::from_millis(400);

fn load() -> Value {
    json!({ "id": 4, "load": { "model": "other" } })
}

/// Asks again and again until `over`; the longest time between two tokens of an answer.
fn longest_gap(client: &mut Client, over: &AtomicBool) -> Duration {
    let mut longest = Duration::ZERO;
    while !over.load(Ordering::Relaxed) {
        client.send(&generate(1, "Tell me a long story about the sea.", 200));
        let mut before: Option<Instant> = None;
        loop {
            let reply = client.next();
            if reply.get("token").is_some() {
                let now = Instant::now();
                let gap = before.replace(now).map_or(Duration::ZERO, |at| now - at);
                longest = longest.max(gap);
            }
            if is_last(&reply) {
                assert!(reply.get("done").is_some(), "{reply}");
                break;
            }
        }
    }
    longest
}

/// The longest time between two signs of life until `over`.
fn longest_silence(manager: &UnixDatagram, over: &AtomicBool) -> Duration {
    let (mut longest, mut before) = (Duration::ZERO, Instant::now());
    let mut buffer = [0; 4096];
    manager.set_read_timeout(Some(WATCHDOG)).expect("a socket");
    while !over.load(Ordering::Relaxed) {
        let len = manager.recv(&mut buffer).unwrap_or(0);
        if buffer[..len].starts_with(b"WATCHDOG=1") {
            longest = longest.max(before.elapsed());
            before = Instant::now();
        }
    }
    longest
}

#[test]
fn answers_and_signs_of_life_go_on_while_another_model_is_loaded() {
    let (Some(model), Some(other)) = (models::smollm2(), models::gemma3()) else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let address = folder.path().join("notify");
    let manager = UnixDatagram::bind(&address).expect("a socket");
    let rest = format!(
        "[[model]]\nname = \"other\"\npath = \"{}\"\ncontext = 256\nload = \"demand\"\n[limits]\nsessions = 2\n",
        other.display()
    );
    let daemon = Daemon::start_with(&model, &rest, &mut |command| {
        command
            .env("NOTIFY_SOCKET", &address)
            .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
    });
    let (mut asks, mut loads) = (daemon.connect(), daemon.connect());
    let (alone, _) = asks.answer(&generate(1, "Name three colours.", 8));
    let over = AtomicBool::new(false);
    let (gap, silence) = std::thread::scope(|scope| {
        let gap = scope.spawn(|| longest_gap(&mut asks, &over));
        let silence = scope.spawn(|| longest_silence(&manager, &over));
        for _ in 0..3 {
            // In the middle of an answer.
            std::thread::sleep(Duration::from_millis(200));
            let loaded = loads.ask(&load());
            assert!(loaded.get("ok").is_some(), "{loaded}");
            let unloaded = loads.ask(&json!({ "id": 6, "unload": { "model": "other" } }));
            assert!(unloaded.get("ok").is_some(), "{unloaded}");
        }
        over.store(true, Ordering::Relaxed);
        let joined = "nobody panics";
        (gap.join().expect(joined), silence.join().expect(joined))
    });
    println!("{gap:?} between two tokens, {silence:?} between two signs of life");
    assert!(gap < GAP_MAX, "{gap:?} between two tokens");
    assert!(silence < WATCHDOG, "{silence:?} without a sign of life");
    assert_eq!(asks.answer(&generate(1, "Name three colours.", 8)).0, alone);
}

#[test]
fn what_changes_memory_waits_until_a_model_is_there() {
    let (Some(model), Some(other)) = (models::smollm2(), models::gemma3()) else {
        return;
    };
    let rest = format!(
        "[[model]]\nname = \"other\"\npath = \"{}\"\ncontext = 256\nload = \"demand\"\n[[model]]\nname = \"broken\"\npath = \"/nowhere.gguf\"\nload = \"demand\"\n[limits]\nsessions = 2\n",
        other.display()
    );
    let daemon = Daemon::start(&model, &rest);
    let mut client = daemon.connect();
    let broken = json!({ "id": 1, "load": { "model": "broken" } });
    for request in [
        load(),
        broken.clone(),
        json!({ "id": 5, "set_budget": { "bytes": 130 << 20 } }),
        json!({ "id": 6, "unload": { "model": "other" } }),
        json!({ "id": 7, "load": { "model": "other" } }),
        json!({ "id": 8, "load": { "model": "other" } }),
    ] {
        client.send(&request);
    }
    let ended: Vec<u64> = (0..6)
        .map(|_| {
            let reply = client.next();
            let id = reply["id"].as_u64().expect("an id");
            assert_eq!(reply.get("ok").is_some(), id != 1, "{reply}");
            id
        })
        .collect();
    assert_eq!(ended, [4, 1, 5, 6, 7, 8]);
    let status = client.ask(&json!({ "id": 9, "status": {} }))["status"].clone();
    let states: Vec<&str> = (0..3)
        .filter_map(|model| status["models"][model]["state"].as_str())
        .collect();
    assert_eq!(states, ["ready", "ready", "failed"]);
    assert_eq!(status["budget_bytes"], 130 << 20);
    let mut ask = generate(2, "Hello", 4);
    ask["generate"]["model"] = json!("other");
    assert_eq!(client.ask(&ask)["done"]["counts"]["answer"], 4);
    // What a model did stays done when it is gone.
    let before = client.ask(&json!({ "id": 9, "status": {} }))["status"].clone();
    let unloaded = client.ask(&json!({ "id": 6, "unload": { "model": "other" } }));
    assert!(unloaded.get("ok").is_some(), "{unloaded}");
    let after = client.ask(&json!({ "id": 9, "status": {} }))["status"].clone();
    for count in ["sweeps", "sweep_s", "read_bytes", "answer_tokens"] {
        let [before, after] = [&before, &after].map(|s| s["total"][count].as_f64());
        assert!(
            before > Some(0.0) && after >= before,
            "{count}: {after:?} after {before:?}"
        );
    }
    assert!(
        after["recent"]["read_bytes"].as_f64() < Some(1e12),
        "{after}"
    );
    let refused = client.ask(&ask);
    assert_eq!(refused["error"]["code"], "busy", "{refused}");
}

/// As a draft model a model is as good as itself, but no smaller.
#[test]
fn a_draft_model_comes_and_goes_with_its_model() {
    let (Some(model), Some(other)) = (models::smollm2(), models::gemma3()) else {
        return;
    };
    let text = |folder: &Path| {
        let drafted = |name: &str, drafter: &Path| {
            format!(
                "[[model]]\nname = \"{name}\"\npath = \"{}\"\ndraft_model = \"{}\"\ncontext = 256\nload = \"demand\"\n",
                model.display(),
                drafter.display()
            )
        };
        let models = drafted("drafted", &model) + &drafted("mixed", &other);
        config(&model, folder).replace("146800640", "400MiB") + &models + "[limits]\nsessions = 2\n"
    };
    let daemon = Daemon::start_as(text, &mut |_| ());
    let mut client = daemon.connect();
    let ask = |model: &str| {
        let mut ask = generate(2, "Name three colours.", 16);
        ask["generate"]["model"] = json!(model);
        ask
    };
    let (alone, _) = client.answer(&ask("small"));
    for _ in 0..2 {
        let loaded = client.ask(&json!({ "id": 4, "load": { "model": "drafted" } }));
        assert!(loaded.get("ok").is_some(), "{loaded}");
        assert_eq!(client.answer(&ask("drafted")).0, alone);
        let status = client.ask(&json!({ "id": 9, "status": {} }))["status"].to_string();
        assert!(status.contains("drafted's draft model: "), "{status}");
        let unloaded = client.ask(&json!({ "id": 6, "unload": { "model": "drafted" } }));
        assert!(unloaded.get("ok").is_some(), "{unloaded}");
        let status = client.ask(&json!({ "id": 9, "status": {} }))["status"].to_string();
        assert!(!status.contains("draft model: "), "{status}");
    }
    let refused = client.ask(&json!({ "id": 4, "load": { "model": "mixed" } }));
    let what = refused["error"]["text"].as_str().expect("an error");
    assert!(what.contains("cannot draft for this model"), "{refused}");
    assert_eq!(client.answer(&ask("small")).0, alone);
}

#[test]
fn the_first_model_answers_before_the_weights_of_others_are_read() {
    let (Some(model), Some(other)) = (models::smollm2(), models::gemma3()) else {
        return;
    };
    let text = config(&model, Path::new("/unused")).replace("146800640", "400MiB")
        + &format!(
            "[[model]]\nname = \"other\"\npath = \"{}\"\ncontext = 256\n[limits]\nsessions = 2\n",
            other.display()
        );
    let config = Config::parse(&text, Path::new("test")).expect("sound");
    let models = serve::status::models(&config);
    let worker = Worker::new(
        8,
        Status {
            models,
            ..Status::default()
        },
    );
    let board = Board::named("generic").expect("known");
    let setup = Setup {
        options: serve::engine::options(&config),
        open: Box::new(Engine::new),
        watch: Box::new(move |_| Monitor::start(&board, Path::new("/"), None)),
    };
    let _answering = Answering::open(Arc::new(config), setup, worker.clone()).expect("it opens");
    let status = worker.last_status();
    let [first, second] = [0, 1].map(|model| &status.models[model]);
    let states = [first.state, second.state];
    assert_eq!(states, [ModelState::Ready; 2]);
    assert_eq!(first.resident_bytes, first.weight_bytes);
    // What is read ahead while the first is being read.
    let ahead = second.weight_bytes / 10;
    assert!(second.resident_bytes < ahead, "{}", second.resident_bytes);
}
