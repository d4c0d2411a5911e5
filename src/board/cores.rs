//! Which processors compute, and how many of them there are at present: a power mode takes some away, and gives them back.

use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::config::Board;
use super::files;

/// Keeps the calling thread, and all that it starts from now on, off CPU 0 where the drive's interrupts keep that busy
/// and another is left. Call it before an engine is opened without a number of threads.
pub fn leave_interrupts_alone(board: &Board) {
    if !board.cpu.leave_cpu0 {
        return;
    }
    let Ok(mut set) = sched_getaffinity(Pid::from_raw(0)) else {
        return;
    };
    let others = (1..CpuSet::count()).any(|i| set.is_set(i) == Ok(true));
    if !others {
        return;
    }
    let left = set
        .unset(0)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(e) = left {
        log::debug!("cannot leave CPU 0 to interrupts: {e}");
    }
}

/// The processors that this process may use, as far as they are online.
#[derive(Debug)]
pub struct Online {
    allowed: CpuSet,
    at_start: u32,
    now: u32,
}

impl Online {
    /// Counts those of the system whose files lie under `root`, for the calling thread and all that it starts.
    pub fn new(root: &Path) -> Online {
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        let now = count(root, &allowed).unwrap_or(0);
        Online {
            allowed,
            at_start: now,
            now,
        }
    }

    /// Counts again; whether there are other many.
    pub fn look(&mut self, root: &Path) -> bool {
        let before = self.now;
        self.now = count(root, &self.allowed).unwrap_or(before);
        self.now != before
    }

    /// How many there are.
    pub fn now(&self) -> u32 {
        self.now
    }

    /// Threads that may compute at most. Where none has gone since the start it is for the user to say, even if there are
    /// more threads than processors.
    pub fn threads_max(&self) -> u32 {
        match self.now < self.at_start {
            true => self.now.max(1),
            false => u32::MAX,
        }
    }
}

/// How many of these processors are online; none if the system does not say.
fn count(root: &Path, allowed: &CpuSet) -> Option<u32> {
    let text = files::text(&root.join("sys/devices/system/cpu/online"))?;
    // `0-3,6`
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?)
    };
    let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
    let ranges = ranges?;
    let online = |cpu: &usize| ranges.iter().any(|range| range.contains(cpu));
    let usable = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu) == Ok(true));
    Some(usable.filter(online).count() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_that_go_take_threads_with_them_and_bring_them_back() {
        let root = tempfile::tempdir().expect("a folder");
        let file = root.path().join("sys/devices/system/cpu/online");
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        let write = |text: &str| std::fs::write(&file, text).expect("written");
        let mut online = Online::new(root.path());
        for cpu in 0..CpuSet::count() {
            let allowed = (1..8).contains(&cpu);
            let set = match allowed {
                true => online.allowed.set(cpu),
                false => online.allowed.unset(cpu),
            };
            set.expect("it is within the set");
        }
        // Before the system said anything.
        assert_eq!((online.now(), online.threads_max()), (0, u32::MAX));
        assert!(!online.look(root.path()));
        write("0-7\n");
        assert!(online.look(root.path()));
        online.at_start = online.now();
        for (text, now, threads_max) in [
            ("0-7", 7, u32::MAX),
            ("0-3", 3, 3),
            ("0-1,4,6-7", 4, 4),
            ("0", 0, 1),
            ("nonsense", 0, 1),
            ("0-11", 7, u32::MAX),
        ] {
            write(text);
            let before = online.now();
            assert_eq!(online.look(root.path()), now != before, "{text}");
            assert_eq!((online.now(), online.threads_max()), (now, threads_max));
        }
    }

    #[test]
    fn a_thread_leaves_cpu_0_only_where_the_board_says_so() {
        // The affinity is the thread's own, so no other test notices.
        let check = || {
            let now = || sched_getaffinity(Pid::from_raw(0)).expect("readable");
            let before = now();
            leave_interrupts_alone(&Board::named("generic").expect("sound"));
            assert_eq!(now(), before);
            leave_interrupts_alone(&Board::named("orin-nx-16gb").expect("sound"));
            let others = (1..CpuSet::count()).any(|i| before.is_set(i) == Ok(true));
            assert!(!others || now().is_set(0) == Ok(false));
        };
        std::thread::spawn(check).join().expect("as it should be");
    }
}
