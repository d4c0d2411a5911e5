//! A ring that cannot be made while the budget changes or a model comes: nothing is lost, and nothing gets slower. Alone
//! in its process, which has no file descriptor left for a while.

mod support;

use airstream::engine::{Engine, ModelOptions, Opening, Options};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::synth::{all_specs, write};

const MIB: u64 = 1 << 20;

#[test]
fn a_ring_that_cannot_be_made_leaves_all_as_it_was() {
    let dir = tempfile::tempdir().expect("a folder");
    let [path, another] = ["a.gguf", "b.gguf"].map(|name| dir.path().join(name));
    let (_, spec) = &all_specs()[0];
    write(spec, &path).expect("a model");
    write(spec, &another).expect("a model");
    let wishes = ModelOptions {
        context: Some(64),
        rows: Some(8),
        ..ModelOptions::default()
    };
    let options = Options {
        memory: Some(16 * MIB),
        model: wishes.clone(),
        threads: Some(1),
        cache: Some(dir.path().to_owned()),
        ..Options::default()
    };
    let mut engine = Engine::open(&path, &options).expect("it fits");
    let before = engine.store().io_description().to_owned();
    let opening = Opening::read(&another, &wishes).expect("it is sound");
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("Linux");
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard).expect("lower");
    let smaller = engine.set_memory(6 * MIB);
    let refused = engine.reserve(opening);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("as before");
    smaller.expect("it takes no new ring");
    assert_eq!(engine.store().io_description(), before);
    if before.contains("io_uring") {
        let refused = refused.err().expect("it takes a new ring");
        assert!(refused.remedy().contains("ulimit -n"), "{refused}");
        assert_eq!(engine.pool().memory, 6 * MIB);
        engine.load(&another, &wishes).expect("there is room");
        assert_eq!(engine.store().io_description(), before);
    }
}
