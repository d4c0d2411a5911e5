//! Which processors compute.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::config::Board;

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

#[cfg(test)]
mod tests {
    use super::*;

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
