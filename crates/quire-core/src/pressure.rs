//! How much memory quire may hold when nobody said: `budget="auto"`.
//!
//! [`Reader`] asks the system, [`Controller`] decides; the caller steps it about ten times a second
//! from a thread that may read files and allocate, never from a signal handler.
//!
//! # What is read
//!
//! - `MemAvailable` of /proc/meminfo (proc(5)).
//! - Limit and use of the process's cgroup *and of every ancestor that is mounted*, as "when a
//!   controller is enabled on a nested cgroup, it always restricts the resource distribution further"
//!   (Documentation/admin-guide/cgroup-v2.rst). `memory.high` counts as a limit: above it "processes
//!   of the cgroup are throttled and put under heavy reclaim pressure". Version 1 has
//!   `memory.limit_in_bytes` (admin-guide/cgroup-v1/memory.rst). Of a group's use its inactive file
//!   pages are taken off, the page cache that the kernel drops first (kubelet's "working set" too).
//! - `total=` of the line `some` of `memory.pressure`, else of /proc/pressure/memory: microseconds in
//!   which a task waited for memory, brought up to date by each reading, "to allow detection of latency
//!   spikes which wouldn't necessarily make a dent in the time averages" (Documentation/accounting/psi.rst).
//!   A kernel without PSI has none; headroom alone decides then.
//!
//! # The rules
//!
//! *Reach* is what quire could hold if it took all that is free: what it holds now plus the least that
//! the machine and the groups have left. Part of it is the others' *reserve*: a tenth, at least 64 MiB,
//! at most a quarter.
//!
//! 1. Start at half of the reach.
//! 2. A budget above `reach - reserve` falls at once to `reach - 1.5 reserve`.
//! 3. Stalls above 5 % of the last second or so cost a quarter of the budget, again and again while they
//!    last (systemd acts at 10 % of 2 s, GLib's memory monitor warns at 3.5 %, lmkd at 7 % of 1 s).
//! 4. After 2 s without either and with hardly a stall the budget grows by 1/64 of the reach a second,
//!    up to `reach - 2 reserve`. Between 2 and 4 lies one reserve in which nothing moves.
//! 5. A budget that stalled stays under 7/8 of what it was for 30 s, for twice as long when the stalls
//!    return, up to 8 min: a machine that stalls at a certain size is asked again ever more rarely.
//!    Senpai (Meta) likewise probes slowly and backs off fast around a target of pressure.
//! 6. Never below 16 MiB, even where less is free: quire would read every page again and again.
//!
//! Who holds more has the larger reserve and yields first, so where several processes run this none
//! ends with more than about twice another's share (9 : 4, from rules 2 and 4).

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::units::ByteCount;

/// The least budget.
const FLOOR: u64 = 16 << 20;
/// The least reserve, where the reach is four times as much.
const RESERVE: u64 = 64 << 20;
/// The budget where the system tells nothing (no /proc).
const BLIND: u64 = 256 << 20;
/// Parts of the reach that the budget grows by in a second.
const GROWTH: u64 = 64;
/// Time over which stalls are averaged.
const WINDOW: Duration = Duration::from_secs(1);
/// Share of time stalled above which the budget shrinks.
const STALLED: f64 = 0.05;
/// Share of time stalled below which it may grow.
const CALM: f64 = 0.01;
/// Rest after a shrink.
const REST: Duration = Duration::from_secs(2);
/// How long a size that stalled is not tried again: the first time, and at most.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(480));

/// What the machine says of memory now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readings {
    /// Bytes the machine can give without swapping; `u64::MAX` where it does not tell.
    pub available: ByteCount,
    /// Limit of the cgroup, among the process's own and its ancestors, that leaves the least.
    pub limit: Option<ByteCount>,
    /// Bytes that group uses and cannot simply drop.
    pub group_used: Option<ByteCount>,
    /// Microseconds in which some task waited for memory, since the group or the machine began.
    pub stalled_us: Option<u64>,
}

impl Readings {
    /// Bytes quire, which holds `own_used`, could hold if it took all that is free to it.
    fn reach(&self, own_used: u64) -> Option<u64> {
        let machine = (self.available.0 != u64::MAX).then_some(self.available.0);
        let group = self.limit.map(|limit| {
            let used = self.group_used.map_or(own_used, |used| used.0);
            limit.0.saturating_sub(used)
        });
        let free = [machine, group].into_iter().flatten().min()?;
        Some(own_used.saturating_add(free))
    }
}

/// Where a cgroup hierarchy is mounted.
struct Hierarchy {
    /// The group that shows at `point`, as /proc/self/cgroup names it.
    group: PathBuf,
    point: PathBuf,
    files: &'static Files,
}

/// Names of one version's files.
struct Files {
    version: u8,
    limits: &'static [&'static str],
    used: &'static str,
    /// The line of `memory.stat`, descendants included.
    reclaimable: &'static str,
}

static V1: Files = Files {
    version: 1,
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
static V2: Files = Files {
    version: 2,
    limits: &["memory.max", "memory.high"],
    used: "memory.current",
    reclaimable: "inactive_file",
};

/// Reads what the system says of memory. Mounts are looked up once, the process's cgroup each time.
pub struct Reader {
    root: PathBuf,
    hierarchies: Vec<Hierarchy>,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// A reader of this machine.
    pub fn new() -> Self {
        Self::at(Path::new("/"))
    }

    /// A reader of the files below `root`, as if they were the machine's.
    pub fn at(root: &Path) -> Self {
        let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
        let mut hierarchies: Vec<Hierarchy> =
            mounts.lines().filter_map(|line| hierarchy_of(root, line)).collect();
        if hierarchies.is_empty() {
            let usual = [("sys/fs/cgroup", &V2), ("sys/fs/cgroup/memory", &V1)];
            hierarchies.extend(usual.map(|(point, files)| Hierarchy {
                group: "/".into(),
                point: root.join(point),
                files,
            }));
        }
        Reader { root: root.to_owned(), hierarchies }
    }

    /// What the system says now; what it does not tell, or what cannot be read, is left out.
    pub fn read(&self) -> Readings {
        let groups = fs::read_to_string(self.root.join("proc/self/cgroup")).unwrap_or_default();
        let folders: Vec<(PathBuf, &Files)> = self
            .hierarchies
            .iter()
            .filter_map(|mounted| Some((mounted, group_of(&groups, mounted.files.version)?)))
            .flat_map(|(mounted, group)| {
                folders(mounted, group).into_iter().map(|folder| (folder, mounted.files))
            })
            .collect();
        let tightest = folders
            .iter()
            .filter_map(|(folder, files)| limit_and_use(folder, files))
            .min_by_key(|(limit, used)| (limit.saturating_sub(used.unwrap_or(0)), *limit));
        let stalled = folders.iter().filter(|(_, files)| files.version == 2);
        Readings {
            available: ByteCount(self.available().unwrap_or(u64::MAX)),
            limit: tightest.map(|(limit, _)| ByteCount(limit)),
            group_used: tightest.and_then(|(_, used)| used).map(ByteCount),
            stalled_us: stalled
                .map(|(folder, _)| folder.join("memory.pressure"))
                .find_map(|file| stalled_us(&file))
                .or_else(|| stalled_us(&self.root.join("proc/pressure/memory"))),
        }
    }

    fn available(&self) -> Option<u64> {
        let text = fs::read_to_string(self.root.join("proc/meminfo")).ok()?;
        value_of(&text, "MemAvailable:")?.checked_mul(1 << 10)
    }
}

/// The hierarchy with the memory controller, or of version 2, that a line of mountinfo shows (proc(5)):
/// `36 35 98:0 /group /point options [tags] - type source super,options`.
fn hierarchy_of(root: &Path, line: &str) -> Option<Hierarchy> {
    let (mount, system) = line.split_once(" - ")?;
    let mut system = system.split(' ');
    let files = match system.next()? {
        "cgroup2" => &V2,
        "cgroup" if system.nth(1)?.split(',').any(|option| option == "memory") => &V1,
        _ => return None,
    };
    let mut fields = mount.split(' ').skip(3).map(unescape);
    let group = PathBuf::from(fields.next()?);
    let point = fields.next()?;
    Some(Hierarchy { group, point: root.join(point.trim_start_matches('/')), files })
}

/// A field of mountinfo, in which space, tab, newline and backslash are octal.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (code, sign)| text.replace(code, sign))
}

/// The process's group in the hierarchy of memory, from /proc/self/cgroup (`number:controllers:path`).
fn group_of(groups: &str, version: u8) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let found = match version {
            1 => controllers.split(',').any(|name| name == "memory"),
            _ => number == "0" && controllers.is_empty(),
        };
        found.then_some(path)
    })
}

/// Folders of a group and of its ancestors, its own first. In a container the path may lie outside of
/// what is mounted; the mount then shows the container's own group.
fn folders(mounted: &Hierarchy, group: &str) -> Vec<PathBuf> {
    let below = Path::new(group).strip_prefix(&mounted.group).unwrap_or(Path::new(""));
    let outside = below.components().any(|part| part == Component::ParentDir);
    let below = if outside { Path::new("") } else { below };
    below.ancestors().map(|part| mounted.point.join(part)).collect()
}

/// The limit of a group, if it has one, and what it uses without its inactive file pages.
fn limit_and_use(folder: &Path, files: &Files) -> Option<(u64, Option<u64>)> {
    let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    // Version 2 says "max" for none, version 1 the largest multiple of a page.
    let limit = files.limits.iter().filter_map(|name| number(name)).filter(|limit| *limit < 1 << 62).min()?;
    let used = number(files.used).map(|used| {
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        used.saturating_sub(value_of(&stat, files.reclaimable).unwrap_or(0))
    });
    Some((limit, used))
}

/// `total=` of the line `some` of a PSI file.
fn stalled_us(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let some = text.lines().find(|line| line.starts_with("some "))?;
    some.split(' ').find_map(|field| field.strip_prefix("total="))?.parse().ok()
}

/// The number after `key` on a line of its own.
fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == key).then(|| words.next()?.parse().ok())?
    })
}

/// Chooses the budget from readings; pure, so that a simulated machine can test it.
#[derive(Debug)]
pub struct Controller {
    budget: u64,
    /// The last total of stalls.
    stalled_us: Option<u64>,
    /// Share of time stalled, averaged over [`WINDOW`].
    stall: f64,
    since_shrink: Duration,
    since_stall: Duration,
    /// The budget stays below this for `patience` after a stall.
    lid: u64,
    patience: Duration,
}

impl Controller {
    /// Starts at half of what quire, which holds `own_used`, could hold.
    pub fn new(readings: &Readings, own_used: ByteCount) -> Self {
        let budget = readings.reach(own_used.0).map_or(BLIND, |reach| reach / 2);
        Controller {
            budget: budget.max(FLOOR),
            stalled_us: readings.stalled_us,
            stall: 0.0,
            since_shrink: Duration::MAX,
            since_stall: Duration::MAX,
            lid: u64::MAX,
            patience: PATIENCE.0,
        }
    }

    /// The budget now.
    pub fn budget(&self) -> ByteCount {
        ByteCount(self.budget)
    }

    /// One step, `elapsed` since the last; the new budget.
    pub fn step(&mut self, readings: &Readings, own_used: ByteCount, elapsed: Duration) -> ByteCount {
        self.since_shrink = self.since_shrink.saturating_add(elapsed);
        self.since_stall = self.since_stall.saturating_add(elapsed);
        self.note_stall(readings.stalled_us, elapsed);
        if self.stall > STALLED {
            self.shrink_by_stall(own_used.0);
        }
        // Where nothing could be read (no descriptor free, say) the last budget holds.
        if let Some(reach) = readings.reach(own_used.0) {
            let reserve = (reach / 10).max(RESERVE.min(reach / 4));
            if self.budget > reach - reserve {
                self.budget = reach - reserve - reserve / 2;
                self.since_shrink = Duration::ZERO;
            } else {
                self.grow(reach, reach - 2 * reserve, elapsed);
            }
        }
        self.budget = self.budget.max(FLOOR);
        self.budget()
    }

    /// Averages the share of time stalled. A total that fell is another group's: the process moved.
    fn note_stall(&mut self, total: Option<u64>, elapsed: Duration) {
        let last = std::mem::replace(&mut self.stalled_us, total);
        let more = total.zip(last).and_then(|(now, before)| now.checked_sub(before));
        if elapsed.is_zero() {
            self.stalled_us = last;
            return;
        }
        let share = (more.unwrap_or(0) as f64 / (elapsed.as_secs_f64() * 1e6)).min(1.0);
        let keep = (-elapsed.as_secs_f64() / WINDOW.as_secs_f64()).exp();
        self.stall = self.stall * keep + share * (1.0 - keep);
    }

    /// Gives back a quarter of what is held, or of half the budget where less is held.
    fn shrink_by_stall(&mut self, own_used: u64) {
        let held = own_used.max(self.budget / 2).min(self.budget);
        if self.since_stall >= REST {
            let again = self.since_stall < 4 * self.patience;
            self.patience = if again { (2 * self.patience).min(PATIENCE.1) } else { PATIENCE.0 };
        }
        self.budget = held / 4 * 3;
        self.lid = held / 8 * 7;
        (self.since_shrink, self.since_stall) = (Duration::ZERO, Duration::ZERO);
        // The next shrink wants stalls of its own.
        self.stall = 0.0;
    }

    fn grow(&mut self, reach: u64, most: u64, elapsed: Duration) {
        if self.since_shrink < REST || self.stall > CALM {
            return;
        }
        let most = if self.since_stall < self.patience { most.min(self.lid) } else { most };
        // A process that was stopped for an hour does not take an hour's growth at once.
        let elapsed_us = elapsed.min(Duration::from_secs(1)).as_micros() as u64;
        let more = (reach / GROWTH).min(u64::MAX / 1_000_000) * elapsed_us / 1_000_000;
        self.budget = self.budget.max(self.budget.saturating_add(more).min(most));
    }
}

#[cfg(test)]
mod tests;
