//! A smaller budget gives memory back to the system, as a memory cgroup counts it: huge pages that are part of what
//! left are split, and nothing holds on to them. Alone in its process, which moves into the cgroup.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/models.rs"]
mod models;

use std::path::PathBuf;

use airstream::engine::{ModelId, ModelOptions, Options, Spent};
use airstream::io::Backend;
use engine::open;

const MIB: u64 = 1 << 20;

/// A memory cgroup that this process is in, alone.
struct Charged {
    folder: PathBuf,
    usage: &'static str,
}

impl Charged {
    /// None where this user may not make one.
    fn new() -> Option<Charged> {
        let name = format!("airstream-test-{}", std::process::id());
        let found = [
            ("/sys/fs/cgroup/memory", "memory.usage_in_bytes"),
            ("/sys/fs/cgroup", "memory.current"),
        ];
        found.into_iter().find_map(|(root, usage)| {
            let folder = PathBuf::from(root).join(&name);
            std::fs::create_dir(&folder).ok()?;
            let charged = Charged { folder, usage };
            charged.mib()?;
            charged.enter("").ok()?;
            Some(charged)
        })
    }

    fn enter(&self, of: &str) -> std::io::Result<()> {
        let procs = self.folder.join(of).join("cgroup.procs");
        std::fs::write(procs, std::process::id().to_string())
    }

    fn mib(&self) -> Option<u64> {
        let bytes = std::fs::read_to_string(self.folder.join(self.usage)).ok()?;
        Some(bytes.trim().parse::<u64>().ok()? / MIB)
    }
}

impl Drop for Charged {
    fn drop(&mut self) {
        let _ = self.enter("..");
        let _ = std::fs::remove_dir(&self.folder);
    }
}

#[test]
fn what_leaves_the_budget_is_no_longer_charged() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let Some(charged) = Charged::new() else {
        println!("no memory cgroup can be made here: nothing was tested");
        return;
    };
    let mib = || charged.mib().expect("it could be read before");
    for backend in [Backend::Uring, Backend::Pread] {
        let options = Options {
            memory: Some(130 * MIB),
            model: ModelOptions {
                context: Some(256),
                ..ModelOptions::default()
            },
            threads: Some(1),
            backend: Some(backend),
            ..Options::default()
        };
        let mut engine = open(&model, &options);
        let decode = |engine: &mut airstream::engine::Engine| {
            for token in 5..8 {
                let spent = &mut Spent::default();
                engine
                    .decode(ModelId::FIRST, 0, token, spent)
                    .expect("a sweep");
            }
            while engine.idle().expect("the disk is well") {}
        };
        decode(&mut engine);
        let all = mib();
        assert!(all > 90, "the weights are in memory: {all} MiB");
        engine.set_memory(60 * MIB).expect("it is enough");
        decode(&mut engine);
        let left = mib();
        assert!(
            left + 55 < all,
            "{backend:?}: {all} MiB charged at first, {left} MiB after the budget went from 130 to 60 MiB"
        );
    }
}
