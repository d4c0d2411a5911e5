//! The daemon's engine thread allocates nothing while it answers: orders come and outboxes fill up in memory that is
//! there already.

#[path = "support/counting_thread.rs"]
mod counting_thread;
#[path = "support/models.rs"]
mod models;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use airstream::board::{Board, Monitor};
use airstream::engine::Engine;
use airstream::engine::request::{Generate, Prompt, Sampling, Tag};
use airstream::serve::engine::{Answering, Setup};
use airstream::serve::outbox::Outbox;
use airstream::serve::status::Status;
use airstream::serve::worker::{Order, Worker};
use airstream::serve::{self, config::Config};
use counting_thread::{allocations, counted};

const REQUESTS: u32 = 12;

#[test]
fn the_engines_thread_answers_without_an_allocation() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let text = format!(
        "memory = \"140MiB\"\nthreads = 2\n[[model]]\nname = \"small\"\npath = \"{}\"\ncontext = 512\n\
         [[socket]]\npath = \"/unused\"\n",
        model.display()
    );
    let config = Config::parse(&text, Path::new("test")).expect("sound");
    let status = Status {
        models: serve::status::models(&config),
        ..Status::default()
    };
    let worker = Worker::new(64, status);
    let (told, opened) = std::sync::mpsc::channel();
    let engine = {
        let worker = worker.clone();
        std::thread::spawn(move || {
            let board = Board::named("generic").expect("known");
            let setup = Setup {
                options: serve::engine::options(&config),
                open: Box::new(Engine::new),
                watch: Box::new(move |_| Monitor::start(&board, Path::new("/"), None)),
            };
            let answering = Answering::open(Arc::new(config), setup, worker).expect("it opens");
            told.send(()).expect("the test waits");
            counted(true);
            answering.run().expect("it ends well");
            counted(false);
        })
    };
    opened.recv().expect("it opens");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    // The first round finds out how much room everything needs; the pool of weights settles too.
    let mut fewest = usize::MAX;
    for round in 0..4 {
        let before = allocations();
        answer_all(&worker, &runtime, round);
        let in_round = allocations() - before;
        if round > 0 {
            fewest = fewest.min(in_round);
        }
    }
    worker.order_always(Order::Stop);
    engine.join().expect("it ends");
    assert_eq!(fewest, 0, "allocations in a round of {REQUESTS} requests");
}

/// Some requests of one client with a small outbox, which is emptied slowly at first.
fn answer_all(worker: &Worker, runtime: &tokio::runtime::Runtime, round: u32) {
    let outbox = Arc::new(Outbox::new(4));
    let (mut cancelled, mut statuses) = (None, 0);
    for request in 0..REQUESTS {
        let generate = Generate {
            session: (request % 4 == 0).then(|| format!("s{request} {round}")),
            sampling: Sampling {
                temperature: (request % 2) as f32,
                ..Sampling::default()
            },
            max_tokens: Some(24),
            ..Generate::new(Prompt::Text(format!("Say {request} in words.")))
        };
        let prepared = runtime
            .block_on(worker.prepare("small", generate))
            .expect("sound");
        let tag = Tag {
            client: round,
            request,
        };
        let outbox = Arc::clone(&outbox);
        worker
            .order(Order::Generate {
                tag,
                outbox,
                prepared,
                place: None,
            })
            .expect("room");
        cancelled = Some(tag);
        let status = runtime.block_on(worker.status());
        statuses += usize::from(status.running > 0 && !status.sessions.is_empty());
    }
    assert!(statuses > 0, "nobody was told of what is being answered");
    worker.order_always(Order::Cancel(cancelled.expect("there are some")));
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    let mut ended = 0;
    while ended < REQUESTS {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{ended} of {REQUESTS} ended"
        );
        match outbox.take() {
            Some((taken, wake)) => {
                ended += u32::from(taken.answer().is_last());
                if wake {
                    worker.wake();
                }
            }
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
