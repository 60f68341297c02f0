//! Fake trees of proc and cgroup files for the reader; a simulated machine for the controller.

use std::fs;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const STEP: Duration = Duration::from_millis(100);
const NO_LIMIT_V1: &str = "9223372036854771712\n";

/// Writes files below a fresh folder.
fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let file = root.path().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
    root
}

fn write(root: &tempfile::TempDir, path: &str, text: &str) {
    fs::write(root.path().join(path), text).unwrap();
}

fn psi(total: u64) -> String {
    format!(
        "some avg10=1.00 avg60=0.50 avg300=0.10 total={total}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"
    )
}

const MEMINFO: (&str, &str) =
    ("proc/meminfo", "MemTotal:       8000000 kB\nMemFree:         100000 kB\nMemAvailable:   4000000 kB\n");
const MOUNT_V2: (&str, &str) = (
    "proc/self/mountinfo",
    "22 27 0:21 / /proc rw,relatime - proc proc rw\n\
     31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
);

#[test]
fn nested_groups_of_version_2_count_and_the_tightest_wins() {
    let root = tree(&[
        MEMINFO,
        MOUNT_V2,
        ("proc/self/cgroup", "0::/user/job:1/leaf\n"),
        ("proc/pressure/memory", &psi(5)),
        ("sys/fs/cgroup/memory.pressure", &psi(6)),
        ("sys/fs/cgroup/user/memory.max", "1000000\n"),
        ("sys/fs/cgroup/user/memory.current", "900000\n"),
        ("sys/fs/cgroup/user/memory.stat", "anon 1\ninactive_file 50000\nactive_file 7\n"),
        ("sys/fs/cgroup/user/job:1/memory.max", "max\n"),
        ("sys/fs/cgroup/user/job:1/memory.high", "max\n"),
        ("sys/fs/cgroup/user/job:1/memory.current", "800000\n"),
        ("sys/fs/cgroup/user/job:1/leaf/memory.max", "700000\n"),
        ("sys/fs/cgroup/user/job:1/leaf/memory.high", "600000\n"),
        ("sys/fs/cgroup/user/job:1/leaf/memory.current", "400000\n"),
        ("sys/fs/cgroup/user/job:1/leaf/memory.stat", "inactive_file 100000\n"),
        ("sys/fs/cgroup/user/job:1/leaf/memory.pressure", &psi(7)),
    ]);
    let reader = Reader::at(root.path());
    // The leaf has the smallest limit and leaves 300,000; its grandparent leaves only 150,000.
    let crowded = Readings {
        available: ByteCount(4_000_000 << 10),
        limit: Some(ByteCount(1_000_000)),
        group_used: Some(ByteCount(850_000)),
        stalled_us: Some(7),
    };
    assert_eq!(reader.read(), crowded);
    write(&root, "sys/fs/cgroup/user/memory.current", "500000\n");
    let leaf = Readings { limit: Some(ByteCount(600_000)), group_used: Some(ByteCount(300_000)), ..crowded };
    assert_eq!(reader.read(), leaf, "memory.high below memory.max is the limit");
    fs::remove_file(root.path().join("sys/fs/cgroup/user/job:1/leaf/memory.pressure")).unwrap();
    assert_eq!(reader.read().stalled_us, Some(6), "the nearest ancestor that has it");
    fs::remove_file(root.path().join("sys/fs/cgroup/memory.pressure")).unwrap();
    assert_eq!(reader.read().stalled_us, Some(5), "else the machine's");
    write(&root, "proc/self/cgroup", "0::/\n");
    assert_eq!((reader.read().limit, reader.read().group_used), (None, None), "moved to the root group");
}

#[test]
fn version_1_beside_a_version_2_without_the_memory_controller() {
    let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                  35 31 0:32 / /sys/fs/cgroup/me\\040mory rw,relatime - cgroup cgroup rw,memory\n\
                  41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
    let group = "sys/fs/cgroup/me mory/api/one";
    let root = tree(&[
        MEMINFO,
        ("proc/self/mountinfo", mounts),
        ("proc/self/cgroup", "9:name=systemd:/memory\n4:hugetlb,memory:/api/one\n1:cpu:/\n0::/\n"),
        ("sys/fs/cgroup/me mory/memory.limit_in_bytes", NO_LIMIT_V1),
        ("sys/fs/cgroup/me mory/api/memory.limit_in_bytes", NO_LIMIT_V1),
        (&format!("{group}/memory.limit_in_bytes"), "5000000\n"),
        (&format!("{group}/memory.usage_in_bytes"), "3000000\n"),
        (&format!("{group}/memory.stat"), "inactive_file 1\ntotal_inactive_file 200000\n"),
        ("sys/fs/cgroup/unified/memory.pressure", &psi(42)),
    ]);
    let reader = Reader::at(root.path());
    let want = Readings {
        available: ByteCount(4_000_000 << 10),
        limit: Some(ByteCount(5_000_000)),
        group_used: Some(ByteCount(2_800_000)),
        stalled_us: Some(42),
    };
    assert_eq!(reader.read(), want);
    write(&root, &format!("{group}/memory.limit_in_bytes"), NO_LIMIT_V1);
    assert_eq!(reader.read().limit, None, "the largest number of version 1 is no limit");
}

#[test]
fn a_container_sees_its_own_group_at_the_mount() {
    let limits = [("sys/fs/cgroup/memory.max", "7000\n"), ("sys/fs/cgroup/memory.current", "10\n")];
    for (mounted, path) in [("/docker/abc", "/docker/abc"), ("/docker/abc", "/other"), ("/", "/../host")] {
        let mounts = format!("31 23 0:28 {mounted} /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
        let root = tree(&[MEMINFO, ("proc/self/mountinfo", &mounts), limits[0], limits[1]]);
        write(&root, "proc/self/cgroup", &format!("0::{path}\n"));
        let readings = Reader::at(root.path()).read();
        assert_eq!(readings.limit, Some(ByteCount(7000)), "{mounted} {path}");
        assert_eq!(readings.group_used, Some(ByteCount(10)), "no memory.stat: nothing to take off");
    }
}

#[test]
fn without_mountinfo_the_usual_places_are_read() {
    let group = ("proc/self/cgroup", "4:memory:/a\n0::/b\n");
    let v1 = tree(&[MEMINFO, group, ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "111\n")]);
    assert_eq!(Reader::at(v1.path()).read().limit, Some(ByteCount(111)));
    let v2 = tree(&[MEMINFO, group, ("sys/fs/cgroup/b/memory.max", "222\n")]);
    assert_eq!(Reader::at(v2.path()).read().limit, Some(ByteCount(222)));
}

#[test]
fn no_groups_and_nothing_at_all() {
    let root = tree(&[MEMINFO]);
    let bare =
        Readings { available: ByteCount(4_000_000 << 10), limit: None, group_used: None, stalled_us: None };
    assert_eq!(Reader::at(root.path()).read(), bare);
    write(&root, "proc/meminfo", "MemTotal: 1 kB\nMemAvailable: many kB\n");
    let silent = Readings { available: ByteCount(u64::MAX), ..bare };
    assert_eq!(Reader::at(root.path()).read(), silent);
    let mut controller = Controller::new(&silent, ByteCount(0));
    assert_eq!(controller.budget(), ByteCount(BLIND));
    assert_eq!(controller.step(&silent, ByteCount(0), STEP), ByteCount(BLIND), "unknown: as before");
}

#[test]
fn the_live_machine_is_sane() {
    let reader = Reader::new();
    let readings = reader.read();
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let total = value_of(&text, "MemTotal:").unwrap() << 10;
    assert!((1..=total).contains(&readings.available.0), "{readings:?}");
    let psi = fs::read_to_string("/proc/pressure/memory").is_ok();
    assert!(readings.stalled_us.is_some() || !psi, "{readings:?}");
    let mut controller = Controller::new(&readings, ByteCount(0));
    let budget = controller.step(&reader.read(), ByteCount(0), STEP);
    assert!((FLOOR..=total).contains(&budget.0), "{budget} {readings:?}");
    assert!(reader.read().stalled_us >= readings.stalled_us, "a total never falls");
}

/// A machine with neighbours and processes that fill their budgets and evict over some time.
struct Machine {
    total: u64,
    neighbour: u64,
    stalled_us: Option<u64>,
    /// Use of the whole machine above which every step stalls for a fifth of its time.
    comfort: u64,
    processes: Vec<(Controller, u64)>,
}

impl Machine {
    fn new(total: u64, neighbour: u64, processes: usize) -> Self {
        let mut machine =
            Machine { total, neighbour, stalled_us: None, comfort: u64::MAX, processes: Vec::new() };
        for _ in 0..processes {
            let controller = Controller::new(&machine.readings(), ByteCount(0));
            machine.processes.push((controller, 0));
        }
        machine
    }

    fn used(&self) -> u64 {
        self.neighbour + self.processes.iter().map(|(_, held)| held).sum::<u64>()
    }

    fn readings(&self) -> Readings {
        Readings {
            available: ByteCount(64 << 40),
            limit: Some(ByteCount(self.total)),
            group_used: Some(ByteCount(self.used())),
            stalled_us: self.stalled_us,
        }
    }

    /// One tenth of a second: every process steps, then fills or evicts towards its budget.
    fn step(&mut self) {
        if self.used() > self.comfort {
            self.stalled_us = self.stalled_us.map(|total| total + STEP.as_micros() as u64 / 5);
        }
        for index in 0..self.processes.len() {
            let readings = self.readings();
            let (controller, held) = &mut self.processes[index];
            let budget = controller.step(&readings, ByteCount(*held), STEP).0;
            let reach = *held + self.total.saturating_sub(readings.group_used.unwrap().0);
            assert!(budget <= reach.max(FLOOR), "budget {budget} of {reach} in reach");
            *held = if budget > *held {
                budget.min(*held + 60 * MIB)
            } else {
                budget.max(held.saturating_sub(GIB))
            };
        }
    }

    /// Steps for `seconds`; the least and the greatest budget of the first process.
    fn run(&mut self, seconds: u64) -> (u64, u64) {
        (0..seconds * 10).fold((u64::MAX, 0), |(least, most), _| {
            let budget = self.run_step();
            (least.min(budget), most.max(budget))
        })
    }

    fn run_step(&mut self) -> u64 {
        self.step();
        self.budget(0)
    }

    fn budget(&self, index: usize) -> u64 {
        self.processes[index].0.budget().0
    }
}

#[test]
fn it_starts_at_half_and_takes_four_fifths_in_the_end() {
    let mut machine = Machine::new(16 * GIB, 0, 1);
    assert_eq!(machine.budget(0), 8 * GIB);
    machine.run(120);
    assert!(machine.budget(0).abs_diff(16 * GIB / 5 * 4) < MIB, "{}", machine.budget(0));
}

#[test]
fn it_yields_to_a_neighbour_at_once_and_recovers_when_it_leaves() {
    let mut machine = Machine::new(16 * GIB, 0, 1);
    machine.run(120);
    // The neighbour takes 400 MiB a second until it has 12 GiB: at no time is there less than nothing.
    while machine.neighbour < 12 * GIB {
        machine.neighbour += 40 * MIB;
        machine.step();
        assert!(machine.used() < machine.total, "{} used", machine.used());
    }
    let (_, most) = machine.run(1);
    assert!(most < 4 * GIB, "{most}");
    machine.neighbour = 0;
    let (least, most) = machine.run(120);
    assert!(least >= 2 * GIB && most.abs_diff(16 * GIB / 5 * 4) < MIB, "{least}..{most}");
}

#[test]
fn it_rests_between_growing_and_shrinking() {
    let mut machine = Machine::new(16 * GIB, 4 * GIB, 1);
    machine.run(200);
    let settled = machine.budget(0);
    // A neighbour that breathes by less than the reserve moves nothing.
    for second in 0..60 {
        machine.neighbour = 4 * GIB + (second % 5) * 200 * MIB;
        let seen = machine.run(1);
        assert_eq!(seen, (settled, settled), "second {second}");
    }
    machine.neighbour = 6 * GIB;
    let (least, _) = machine.run(1);
    assert!(least < settled, "more than the reserve does");
    // Having yielded it is not nibbled at, and growing waits until the neighbour has been gone for 2 s.
    machine.neighbour += 300 * MIB;
    assert_eq!(machine.run(30), (least, least));
    machine.neighbour += 3 * GIB;
    machine.step();
    let yielded = machine.budget(0);
    assert!(yielded < least);
    machine.neighbour = 0;
    assert_eq!((0..19).map(|_| machine.run_step()).max(), Some(yielded));
    assert!(machine.run(1).1 > yielded);
}

#[test]
fn who_holds_more_yields_to_who_holds_less() {
    let mut machine = Machine::new(16 * GIB, GIB, 1);
    machine.run(120);
    machine.processes.push((Controller::new(&machine.readings(), ByteCount(0)), 0));
    let (late, early) = (machine.budget(1), machine.budget(0));
    machine.run(600);
    let (first, second) = (machine.budget(0), machine.budget(1));
    assert!(second > late && first < early, "from {early} {late} to {first} {second}");
    assert!(first <= second / 4 * 9 + MIB, "{first} {second}");
    assert!(machine.used() < machine.total && machine.used() > machine.total / 5 * 4);
}

#[test]
fn stalls_shrink_fast_and_are_sought_ever_more_rarely() {
    let mut machine = Machine::new(16 * GIB, 0, 1);
    machine.stalled_us = Some(1000);
    machine.comfort = 6 * GIB;
    let mut shrunk = Vec::new();
    let mut last = machine.budget(0);
    for tenth in 0..36_000 {
        machine.step();
        if machine.budget(0) < last {
            shrunk.push(tenth / 10);
        }
        last = machine.budget(0);
        assert!(tenth < 300 || machine.used() < 7 * GIB, "far over what stalls");
        assert!(tenth < 300 || machine.used() > 3 * GIB, "far under what stalls");
    }
    let late = shrunk.iter().filter(|second| **second >= 1800).count();
    assert!(!shrunk.is_empty() && late <= 4, "shrinks at seconds {shrunk:?}");
    machine.comfort = u64::MAX;
    let (_, most) = machine.run(700);
    assert!(most.abs_diff(16 * GIB / 5 * 4) < MIB, "it recovers when nothing stalls: {most}");
}

#[test]
fn a_stalled_machine_is_left_to_the_others_in_seconds() {
    let mut machine = Machine::new(16 * GIB, 0, 1);
    machine.run(120);
    (machine.stalled_us, machine.comfort) = (Some(0), 0);
    let before = machine.budget(0);
    machine.run(2);
    assert!(machine.budget(0) < before / 2, "{before} -> {}", machine.budget(0));
    let (least, _) = machine.run(30);
    assert_eq!(least, FLOOR);
}

#[test]
fn a_single_short_stall_or_another_groups_total_changes_little() {
    let readings =
        |stalled_us| Readings { available: ByteCount(8 * GIB), limit: None, group_used: None, stalled_us };
    let mut controller = Controller::new(&readings(Some(1_000_000)), ByteCount(0));
    let start = controller.budget();
    // 20 ms of 100 are 2 % of a second: the budget stays; a total that fell is no stall.
    assert_eq!(controller.step(&readings(Some(1_020_000)), ByteCount(0), STEP), start);
    let after = controller.step(&readings(Some(7)), ByteCount(0), Duration::from_secs(3));
    assert!(after > start, "{after}");
    // PSI that comes and goes, and two steps at one time, are no stalls either.
    assert!(controller.step(&readings(None), ByteCount(0), STEP) >= after);
    assert!(controller.step(&readings(Some(5_000_000)), ByteCount(0), STEP) >= after);
    assert!(controller.step(&readings(Some(9_000_000)), ByteCount(0), Duration::ZERO) >= after);
    // A stop of an hour grows the budget by a second's share.
    let before = controller.budget().0;
    let later = controller.step(&readings(Some(5_000_000)), ByteCount(0), Duration::from_secs(3600)).0;
    assert_eq!(later - before, 8 * GIB / GROWTH);
    // A tenth of a second of nothing but stall costs one quarter, of half the budget where nothing is held.
    let mut controller = Controller::new(&readings(Some(0)), ByteCount(4 * GIB));
    assert_eq!(controller.budget().0, 6 * GIB);
    assert_eq!(controller.step(&readings(Some(100_000)), ByteCount(4 * GIB), STEP).0, 3 * GIB);
    assert_eq!(controller.step(&readings(Some(100_000)), ByteCount(3 * GIB), STEP).0, 3 * GIB);
    assert_eq!(controller.step(&readings(Some(200_000)), ByteCount(0), STEP).0, 3 * GIB / 8 * 3);
}

proptest! {
    /// Whatever the neighbour did, the budget settles once it stands still, uses most of the rest and
    /// leaves the reserve; nothing is over the limit for more than the steps that evicting takes.
    #[test]
    fn it_settles_after_any_neighbour(
        total in 64 * MIB..64 * GIB,
        moves in prop::collection::vec((0.0..0.95f64, 1..300u32), 1..12),
        processes in 1..3usize,
    ) {
        let mut machine = Machine::new(total, 0, processes);
        for (share, steps) in moves {
            machine.neighbour = (total as f64 * share) as u64;
            let evicting = total / GIB + 20;
            for step in 0..u64::from(steps) {
                machine.step();
                let floors = machine.neighbour + FLOOR * processes as u64;
                prop_assert!(step < evicting || machine.used() <= total.max(floors));
            }
        }
        machine.run(600);
        let (least, most) = machine.run(60);
        prop_assert_eq!(least, most, "it still moves");
        let rest = total - machine.neighbour;
        let held = machine.used() - machine.neighbour;
        prop_assert!(held <= (rest - rest / 20).max(FLOOR * processes as u64), "{} of {}", held, rest);
        prop_assert!(held >= rest / 3, "{} of {}", held, rest);
    }
}
