//! A disk that fails in the middle of an answer and is well again later: pread(2) is this test's own.
#![allow(unsafe_code)]

#[path = "support/engine.rs"]
mod engine;
#[path = "support/greedy.rs"]
mod greedy;
mod support;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use airstream::engine::{ModelId, ModelOptions, Options, Spent};
use airstream::io::Backend;
use engine::open;
use greedy::{argmax, greedy};
use support::synth;

/// Every long read fails with EIO. Short ones are not of tiles.
static BROKEN: AtomicBool = AtomicBool::new(false);
const SHORT_MAX: usize = 16 << 10;

/// Takes the place of libc's for everything in this process.
///
/// # Safety
/// As pread(2) asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread64(
    fd: libc::c_int,
    into: *mut libc::c_void,
    len: libc::size_t,
    offset: libc::off64_t,
) -> libc::ssize_t {
    if BROKEN.load(Ordering::SeqCst) && len > SHORT_MAX {
        // SAFETY: the place of this thread's errno.
        unsafe { *libc::__errno_location() = libc::EIO };
        return -1;
    }
    // SAFETY: the caller keeps pread's promises.
    unsafe { libc::syscall(libc::SYS_pread64, fd, into, len, offset) as libc::ssize_t }
}

#[test]
fn an_answer_goes_on_and_the_next_one_is_right_after_a_disk_failed() {
    const PROMPT: [u32; 4] = [7, 3, 99, 12];
    let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("a folder");
    let path = dir.path().join("model.gguf");
    let (_, mut spec) = synth::all_specs()
        .into_iter()
        .find(|(name, _)| name == "llama-q4_0")
        .expect("there is one");
    (spec.layers, spec.embd, spec.ffn) = (8, 512, 1536);
    (spec.heads, spec.kv_heads, spec.head_dim) = (8, 2, 64);
    synth::write(&spec, &path).expect("space for a model");
    let bytes = std::fs::metadata(&path).expect("just written").len();
    let options = |memory| Options {
        memory,
        model: ModelOptions {
            context: Some(128),
            rows: Some(16),
            ..ModelOptions::default()
        },
        threads: Some(1),
        backend: Some(Backend::Pread),
        cache: Some(dir.path().join("cache")),
        ..Options::default()
    };
    let expected = greedy(&mut open(&path, &options(None)), &PROMPT, 20);

    let mut engine = open(&path, &options(Some(bytes * 6 / 10)));
    let mut tokens = greedy(&mut engine, &PROMPT, 10);
    BROKEN.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let last = tokens[tokens.len() - 1];
        let error = engine
            .decode(ModelId::FIRST, 0, last, &mut Spent::default())
            .expect_err("no tile can be read")
            .to_string();
        assert!(
            error.contains("I/O error") && error.contains("model.gguf"),
            "{error}"
        );
        assert!(error.contains(".weight at offset "), "{error}");
    }
    BROKEN.store(false, Ordering::SeqCst);
    while tokens.len() < expected.len() {
        let last = tokens[tokens.len() - 1];
        engine
            .decode(ModelId::FIRST, 0, last, &mut Spent::default())
            .expect("the disk is well again");
        tokens.push(argmax(engine.logits(ModelId::FIRST, 0)));
    }
    assert_eq!(tokens, expected, "the answer that was interrupted");
    engine.clear(ModelId::FIRST, 0);
    assert_eq!(greedy(&mut engine, &PROMPT, 20), expected, "the next one");
}
