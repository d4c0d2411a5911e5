//! Boards as they show themselves: which one it is, what it draws, how warm it is, in which mode; and what that costs.

#[path = "support/board_trees.rs"]
mod trees;

use std::path::Path;
use std::time::{Duration, Instant};

use airstream::board::config::Board;
use airstream::board::governor::{Goals, HeldBy};
use airstream::board::monitor::SAMPLE_EVERY;
use airstream::board::sensors::{DISCOVER_EVERY_S, Sensors, current_mode};
use airstream::board::{GiveUp, Limits, Monitor, detect};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;

fn board(root: &Path) -> Board {
    detect::board(root, None).expect("sound")
}

fn near(a: Option<f64>, b: f64) -> bool {
    a.is_some_and(|a| (a - b).abs() < 1e-6)
}

/// Every tree: the board it is, the rails that add up, their watts, the junction, and the mode.
#[test]
fn each_tree_is_recognised_and_read() {
    let vdd = 5.032 * 1.2;
    let agx = 6.0 + 2.0 + 4.5;
    let cases = [
        (
            "orin-nano-8gb-super",
            "orin-nano-8gb-super",
            vdd,
            49.125,
            Some("15W"),
        ),
        (
            "orin-nano-8gb-jp5",
            "orin-nano-8gb",
            5.0,
            49.125,
            Some("15W"),
        ),
        ("orin-nano-4gb", "orin-nano-4gb", vdd, 49.125, None),
        ("orin-nx-16gb", "orin-nx-16gb", vdd, 49.125, None),
        ("orin-nx-8gb-super", "orin-nx-8gb-super", vdd, 49.125, None),
        ("agx-orin-64gb", "agx-orin-64gb", agx, 49.125, Some("MAXN")),
        ("agx-orin-32gb", "agx-orin-32gb", agx, 49.125, None),
        ("thor-t5000", "thor-t5000", 23.0, 55.1, Some("120W")),
        ("thor-t4000", "thor-t4000", 13.0, 55.1, None),
    ];
    for (tree, name, watts, junction, mode) in cases {
        let root = trees::root(tree);
        let board = board(root.path());
        assert_eq!(board.name, name, "{tree}");
        let mut sensors = Sensors::new(&board, root.path(), 0.0);
        let reading = sensors.sample(0.2);
        assert!(near(reading.power_w, watts), "{tree}: {reading:?}");
        assert!(near(reading.junction_c, junction), "{tree}: {reading:?}");
        let rails: Vec<&str> = sensors
            .rails()
            .iter()
            .map(|rail| rail.name.as_str())
            .collect();
        assert!(
            !rails.contains(&"NC") && !rails.iter().any(|r| r.starts_with("sum")),
            "{rails:?}"
        );
        let found = current_mode(root.path(), &board);
        assert_eq!(found.map(|mode| mode.name).as_deref(), mode, "{tree}");
    }
}

#[test]
fn clocks_and_budgets_are_those_of_the_hardware() {
    let root = trees::root("orin-nano-8gb-super");
    let board = board(root.path());
    let reading = Sensors::new(&board, root.path(), 0.0).sample(0.2);
    // Not what the governor of the clocks asked for (1728 MHz), and of the GPU, not of the video engine.
    assert_eq!(reading.cpu_mhz, Some(1497));
    assert_eq!(reading.gpu_mhz, Some(612));
    assert_eq!(reading.emc_mhz, Some(2133));
    let mode = current_mode(root.path(), &board).expect("nvpmodel");
    assert_eq!((mode.id, mode.budget_w), (0, Some(15.0)));
    std::fs::remove_file(root.path().join("var/lib/nvpmodel/status")).expect("removed");
    let booted = current_mode(root.path(), &board).expect("nvpmodel");
    assert_eq!((booted.id, booted.budget_w), (1, Some(25.0)));
}

#[test]
fn over_current_events_are_counted_from_the_first_look() {
    let root = trees::root("orin-nx-16gb");
    let mut sensors = Sensors::new(&board(root.path()), root.path(), 0.0);
    let count = |n: u32| {
        trees::write(
            &root.path().join("sys/class/hwmon/hwmon0/oc3_event_cnt"),
            &n.to_string(),
        )
    };
    let mut events = |at| sensors.sample(at).over_current_events;
    assert_eq!(events(0.2), 0, "12 from before");
    assert_eq!(events(0.4), 0);
    count(14);
    assert_eq!(events(0.6), 2);
    count(1);
    assert_eq!(events(0.8), 0, "a reset is no event");
    count(2);
    assert_eq!(events(1.0), 1);
}

#[test]
fn energy_counters_wrap_around() {
    let root = trees::root("pc-rapl");
    let board = board(root.path());
    assert_eq!(board.name, "generic");
    let mut sensors = Sensors::new(&board, root.path(), 0.0);
    assert_eq!(sensors.total_rails(), ["package-0"]);
    assert_eq!(
        sensors.sample(1.0).power_w,
        None,
        "one look at a counter says nothing"
    );
    let energy = root
        .path()
        .join("sys/class/powercap/intel-rapl:0/energy_uj");
    trees::write(&energy, "262143320000");
    let reading = sensors.sample(1.1);
    assert!(near(reading.power_w, 3.2), "{reading:?}");
    assert!(near(reading.junction_c, 61.0));
    assert_eq!(reading.cpu_mhz, Some(3600));
    // 8850 uJ to the end of the range, and 991150 from its beginning.
    trees::write(&energy, "991150");
    assert!(near(sensors.sample(1.2).power_w, 10.0));
}

#[test]
fn what_vanishes_is_left_out_and_found_again_at_a_bounded_rate() {
    let root = trees::root("orin-nano-8gb-super");
    let mut sensors = Sensors::new(&board(root.path()), root.path(), 0.0);
    assert!(sensors.sample(1.0).power_w.is_some());
    let hwmon = root.path().join("sys/class/hwmon/hwmon1");
    std::fs::remove_dir_all(&hwmon).expect("removed");
    let reading = sensors.sample(2.0);
    assert_eq!(reading.power_w, None);
    assert!(near(reading.junction_c, 49.125));
    // It comes back under another number, which nobody looks for before its time.
    trees::plant("nano-rails", root.path());
    std::fs::rename(&hwmon, root.path().join("sys/class/hwmon/hwmon7")).expect("renamed");
    assert_eq!(sensors.sample(3.0).power_w, None);
    assert_eq!(sensors.sample(DISCOVER_EVERY_S - 0.1).power_w, None);
    assert!(near(
        sensors.sample(DISCOVER_EVERY_S + 0.1).power_w,
        5.032 * 1.2
    ));
    // Everything gone for good is no reason to stop, or to look all the time.
    std::fs::remove_dir_all(root.path().join("sys")).expect("removed");
    for i in 0..200 {
        let reading = sensors.sample(20.0 + f64::from(i));
        assert_eq!((reading.power_w, reading.junction_c), (None, None));
    }
}

#[test]
fn drivers_that_are_loaded_late_are_found() {
    let root = trees::root("orin-nano-8gb-super");
    let board = board(root.path());
    let hwmon = root.path().join("sys/class/hwmon/hwmon1");
    std::fs::remove_dir_all(&hwmon).expect("removed");
    let mut sensors = Sensors::new(&board, root.path(), 0.0);
    assert_eq!(sensors.sample(1.0).power_w, None);
    trees::plant("nano-rails", root.path());
    assert_eq!(sensors.sample(2.0).power_w, None);
    let reading = sensors.sample(DISCOVER_EVERY_S + 0.1);
    assert!(near(reading.power_w, 5.032 * 1.2));
}

#[test]
fn a_zone_that_wakes_up_counts_from_then_on() {
    let root = trees::root("thor-t5000");
    let mut sensors = Sensors::new(&board(root.path()), root.path(), 0.0);
    assert!(near(sensors.sample(0.2).junction_c, 55.1));
    trees::write(
        &root.path().join("sys/class/thermal/thermal_zone1/temp"),
        "71000",
    );
    assert!(near(sensors.sample(0.4).junction_c, 71.0));
    trees::write(
        &root.path().join("sys/class/thermal/thermal_zone1/temp"),
        "-256000",
    );
    assert!(
        near(sensors.sample(0.6).junction_c, 55.1),
        "nonsense is no temperature"
    );
}

#[test]
fn a_monitor_sums_up_energy() {
    let root = trees::root("orin-nano-8gb-super");
    let board = board(root.path());
    let monitor = Monitor::start(&board, root.path(), None);
    let outer = Instant::now();
    let before = monitor.energy();
    let inner = Instant::now();
    std::thread::sleep(Duration::from_millis(300));
    let least = inner.elapsed().as_secs_f64();
    let energy = monitor.energy().since(&before);
    let most = outer.elapsed().as_secs_f64();
    // Two looks within a hundredth of a second are one.
    let counted = least - 0.02..=most + 0.02;
    assert!(
        counted.contains(&energy.seconds),
        "{energy:?} in {counted:?} s"
    );
    let watts = energy.average_w().expect("measured");
    assert!((watts - 5.032 * 1.2).abs() < 1e-6, "{watts}");
    assert_eq!(energy.peak_c, Some(49.125));
    assert!(near(energy.joules_per_token(10), energy.joules / 10.0));
    assert_eq!(monitor.pace().limits().duty, 1.0);
    // A host without sensors has no energy, and without a governor no thread that looks for it.
    let empty = tempfile::tempdir().expect("a temporary folder");
    let monitor = Monitor::start(&board, empty.path(), None);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(monitor.energy().average_w(), None);
}

/// The whole way from files to what the engine asks: a board that draws twice what it may is held down within seconds.
#[test]
fn a_monitor_holds_the_engine_down() {
    let root = trees::root("orin-nano-8gb-super");
    let goals = Goals {
        power_w: Some(3.0),
        follows_mode: false,
        target_c: 92.0,
        give_up: GiveUp::Throughput,
    };
    let full = Limits {
        threads: 5,
        reads: 16,
        rows: 512,
        drafts: 4,
        precision_drop: 0,
        duty: 1.0,
    };
    let board = board(root.path());
    let monitor = Monitor::start(&board, root.path(), Some((goals, full)));
    let pace = monitor.pace();
    assert_eq!(pace.rest(), Duration::ZERO, "nothing was swept yet");
    let began = Instant::now();
    while pace.limits().threads > 2 {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{:?}",
            pace.limits()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let latest = monitor.latest();
    let governed = latest.governed.expect("a governor");
    assert_eq!(
        (governed.limit_w, governed.held_by),
        (Some(3.0), HeldBy::Power)
    );
    assert!(governed.effort < 0.6, "{governed:?}");
    assert_eq!(latest.over_current_events, Some(0));
    let limits = pace.limits();
    assert!(limits.rows < 300 && limits.duty <= 1.0, "{limits:?}");
    let sweep = Duration::from_millis(100);
    pace.begins();
    std::thread::sleep(sweep);
    pace.ended();
    let began = Instant::now();
    pace.rest();
    // The pause may have changed meanwhile, but not by more than a sample changes it.
    let pause_s = limits.pause_s(sweep.as_secs_f64());
    assert!(
        began.elapsed().as_secs_f64() >= 0.5 * pause_s,
        "{pause_s} s"
    );
}

#[test]
fn another_power_mode_is_another_limit_unless_one_was_asked_for() {
    let root = trees::root("orin-nano-8gb-super");
    let board = board(root.path());
    let start = |limit_w| {
        let goals = Goals::of_board(&board, root.path(), limit_w, GiveUp::Latency);
        let goals = goals.expect("a board with modes");
        Monitor::start(&board, root.path(), Some((goals, Limits::NONE)))
    };
    let (follows, asked) = (start(None), start(Some(9.0)));
    let limit_w = |monitor: &Monitor| monitor.latest().governed.and_then(|g| g.limit_w);
    assert_eq!(limit_w(&follows), Some(15.0));
    trees::write(&root.path().join("var/lib/nvpmodel/status"), "pmode:0001");
    let began = Instant::now();
    while limit_w(&follows) != Some(25.0) {
        let waited = began.elapsed();
        assert!(waited < Duration::from_secs(20), "{:?}", limit_w(&follows));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(limit_w(&asked), Some(9.0));
}

#[test]
fn a_power_mode_with_fewer_cores_leaves_fewer_threads() {
    let all = sched_getaffinity(Pid::from_raw(0)).expect("readable");
    let usable = (0..CpuSet::count()).filter(|&cpu| all.is_set(cpu) == Ok(true));
    let usable: Vec<String> = usable.map(|cpu| cpu.to_string()).collect();
    if usable.len() < 2 {
        return;
    }
    let root = trees::root("orin-nano-8gb-super");
    let board = board(root.path());
    let online = root.path().join("sys/devices/system/cpu/online");
    trees::write(&online, &usable.join(","));
    let goals = Goals::of_board(&board, root.path(), None, GiveUp::Latency);
    let threads = usable.len() as u32;
    let full = Limits {
        threads,
        ..Limits::NONE
    };
    let governed = goals.map(|goals| (goals, full));
    let [governed, watched] =
        [governed, None].map(|govern| Monitor::start(&board, root.path(), govern));
    let wait_for = |monitor: &Monitor, threads: u32| {
        let began = Instant::now();
        while monitor.pace().limits().threads != threads {
            let waited = began.elapsed();
            let limits = monitor.pace().limits();
            assert!(waited < Duration::from_secs(20), "{threads}: {limits:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    for (text, of_governed, of_watched) in [
        (&usable[0], 1, 1),
        (&usable.join(","), threads, u32::MAX),
        (&usable[1], 1, 1),
    ] {
        trees::write(&online, text);
        wait_for(&governed, of_governed);
        wait_for(&watched, of_watched);
    }
}

/// Half a percent of a core, at the rate at which the monitor samples.
#[test]
fn sampling_costs_little() {
    let root = trees::root("agx-orin-64gb");
    let mut sensors = Sensors::new(&board(root.path()), root.path(), 0.0);
    let thread_seconds = || {
        let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("getrusage");
        (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
    };
    let before = thread_seconds();
    let samples = 2000;
    for i in 0..samples {
        sensors.sample(f64::from(i) * SAMPLE_EVERY.as_secs_f64());
    }
    let each = (thread_seconds() - before) / f64::from(samples);
    let share = each / SAMPLE_EVERY.as_secs_f64();
    println!(
        "a sample takes {:.1} us: {:.4}% of a core",
        1e6 * each,
        100.0 * share
    );
    assert!(share < 0.005, "{:.3}% of a core", 100.0 * share);
}
