//! The page daemon: one thread that evicts, and launders, ahead of need, so that a thread that faults
//! finds room (as in 4.3BSD and Mach). It is rung when a load leaves less than the low watermark free,
//! and works until the high watermark is free again. A thread that finds no room all the same evicts
//! by itself.
//!
//! Only mappings that are larger than what they may keep are its business: one that fits is full
//! without harm. See `watermark.rs` for those that are not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::counters::count;
use crate::page_cache::{Account, PAGE_CACHE};
use crate::pageout;
use crate::pressure::{Controller, Reader};
use crate::space::SPACE;
use crate::sys::fork::ForkMutex;
use crate::sys::lock::Mutex;
use crate::sys::thread;
use crate::units::ByteCount;
use crate::watermark::{BELL, LOW_SHARE, exceeds, is_for_daemon, is_short};

/// How often an automatic budget looks at the machine.
const LOOK: Duration = Duration::from_millis(100);

static AUTOMATIC: AtomicBool = AtomicBool::new(false);
/// Held while the daemon sets an automatic budget; new in the child of a fork, which has none.
pub static STEP: ForkMutex<()> = ForkMutex::new(());

/// Has the process-wide budget follow what the machine has free, or no longer from when this returns.
pub fn set_automatic(on: bool) {
    AUTOMATIC.store(on, Ordering::Release);
    drop(STEP.lock());
    BELL.ring();
}

/// Whether the process-wide budget is automatic.
pub fn is_automatic() -> bool {
    AUTOMATIC.load(Ordering::Acquire)
}

/// The thread.
#[derive(Default)]
pub struct Daemon {
    stop: std::sync::Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Daemon {
    /// Starts it.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start() -> std::io::Result<Self> {
        let daemon = Daemon::default();
        let stop = std::sync::Arc::clone(&daemon.stop);
        let started = thread::spawn("quire-pageout", move || serve(&stop))?;
        *daemon.thread.lock() = Some(started);
        Ok(daemon)
    }

    /// Ends it and waits for that.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        BELL.ring();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join(); // a panic would have aborted the process
        }
    }
}

fn serve(stop: &AtomicBool) {
    let mut budget = AutoBudget::default();
    while !stop.load(Ordering::Acquire) {
        BELL.hush();
        budget.follow();
        if !work() && !stop.load(Ordering::Acquire) {
            let limit = if is_automatic() { LOOK } else { Duration::from_secs(3600) };
            BELL.wait(limit);
        }
    }
}

/// One round; whether anything was freed and more is to do.
fn work() -> bool {
    let mut again = false;
    let whole = &PAGE_CACHE.account;
    let over = is_short(whole, LOW_SHARE / 2);
    let all = SPACE.all();
    let most = all.iter().map(|(entry, _)| entry.object.account.used().0).max().unwrap_or(0);
    for (entry, _in_flight) in &all {
        let own = &entry.object.account;
        let short = is_short(own, LOW_SHARE / 2) && exceeds(entry, own);
        // Who holds most pays for a shortage of the process.
        let pays = over && exceeds(entry, whole) && own.used().0 >= most / 2;
        if is_for_daemon(entry) && (short || pays) {
            let missing = |account: &Account| {
                let most = account.most().0;
                account.used().0.saturating_sub(most - most / (LOW_SHARE / 2))
            };
            let target = if short { missing(own) } else { missing(whole) };
            count(&entry.object.counters.daemon_rounds);
            let (freed, _) = pageout::evict(entry, ByteCount(target.max(1)));
            again |= freed.0 > 0 && freed.0 < target;
        }
    }
    again
}

/// Steps the process-wide budget, at most every [`LOOK`].
#[derive(Default)]
struct AutoBudget {
    running: Option<(Reader, Controller, Instant)>,
}

impl AutoBudget {
    fn follow(&mut self) {
        if self.is_changed() {
            shrink();
        }
    }

    fn is_changed(&mut self) -> bool {
        let _step = STEP.lock();
        if !is_automatic() {
            self.running = None; // it begins anew when it is asked for again
            return false;
        }
        self.step()
    }

    fn step(&mut self) -> bool {
        let used = ByteCount(PAGE_CACHE.account.used().0 + PAGE_CACHE.account.metadata().0);
        let (reader, controller, looked) = self.running.get_or_insert_with(|| {
            let reader = Reader::new();
            let controller = Controller::new(&reader.read(), used);
            (reader, controller, Instant::now())
        });
        let elapsed = looked.elapsed();
        if elapsed < LOOK {
            return false;
        }
        *looked = Instant::now();
        let budget = controller.step(&reader.read(), used, elapsed);
        PAGE_CACHE.account.set_budget(budget.max(PAGE_CACHE.account.least()));
        true
    }
}

/// Evicts until the process-wide budget holds, or nothing more can go.
pub fn shrink() {
    let account = &PAGE_CACHE.account;
    loop {
        let over = account.shortage(ByteCount(0));
        if over.0 == 0 {
            return;
        }
        let mut all = SPACE.all();
        all.sort_by_key(|(entry, _)| std::cmp::Reverse(entry.object.account.used()));
        if !all.iter().any(|(entry, _)| pageout::shrink(entry, over)) {
            return;
        }
    }
}
