//! A daemon whose GPU fails: every client is told so, and the process ends with an error, so that it is started again.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use airstream::board::{Board, Monitor};
use airstream::engine::Engine;
use airstream::format::quant::QuantType;
use airstream::serve::config::Config;
use airstream::serve::daemon;
use airstream::serve::engine::{Setup, options};
use serde_json::{Value, json};

use super::fake_gpu::FakeGpu;
use super::support::synth::{Arch, SynthSpec, write};

fn connect(socket: &Path) -> BufReader<UnixStream> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return BufReader::new(stream),
            Err(e) => assert!(begun.elapsed() < Duration::from_secs(60), "{e}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn send(client: &mut BufReader<UnixStream>, id: u32, max_tokens: u32) {
    let generate = json!({ "prompt": { "tokens": [1, 2, 3] }, "max_tokens": max_tokens });
    let line = json!({ "id": id, "generate": generate });
    writeln!(client.get_mut(), "{line}").expect("the daemon reads");
}

fn next(client: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    client.read_line(&mut line).expect("the daemon writes");
    serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
}

#[test]
fn all_requests_are_told_that_the_gpu_has_failed_and_the_daemon_ends_with_an_error() {
    let Some(gpu) = FakeGpu::new(6) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let (model, socket) = (
        folder.path().join("model.gguf"),
        folder.path().join("a.sock"),
    );
    let spec = SynthSpec::new(Arch::Llama, QuantType::Q4_0, 2);
    write(&spec, &model).expect("the folder can be written");
    let text = format!(
        "memory = \"64MiB\"\n[[model]]\nname = \"small\"\npath = \"{}\"\ncontext = 512\n\
         [[socket]]\npath = \"{}\"\n",
        model.display(),
        socket.display()
    );
    let path = folder.path().join("airstream.toml");
    let config = Config::parse(&text, &path).expect("sound");
    let breaks = gpu.breaks();
    let daemon = std::thread::spawn(move || {
        let board = Board::named("generic").expect("known");
        let setup = Setup {
            options: options(&config),
            open: Box::new(|models, options| Engine::new_on(models, options, Some(Arc::new(gpu)))),
            watch: Box::new(move |_| Monitor::start(&board, Path::new("/"), None)),
        };
        daemon::run(config, &path, setup)
    });

    let mut clients = [connect(&socket), connect(&socket)];
    send(&mut clients[0], 1, 3);
    while next(&mut clients[0]).get("done").is_none() {}
    for client in &mut clients {
        send(client, 2, 500);
        assert!(next(client).get("accepted").is_some());
    }
    assert!(
        next(&mut clients[1]).get("token").is_some(),
        "both are on their way"
    );
    breaks.store(true, Ordering::Relaxed);
    for client in &mut clients {
        let error = loop {
            let reply = next(client);
            if let Some(error) = reply.get("error") {
                break error.clone();
            }
        };
        let word = |key: &str| error[key].as_str().expect("a text").to_owned();
        assert!(word("text").starts_with("the GPU has failed: "), "{error}");
        assert!(word("remedy").contains("send the request again"), "{error}");
    }
    let ended = daemon.join().expect("it does not panic");
    let error = ended.expect_err("who started it is to start it again");
    assert!(
        error.to_string().contains("the GPU cannot go on"),
        "{error}"
    );
}
