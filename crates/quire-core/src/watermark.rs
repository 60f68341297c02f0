//! When the page daemon is rung: a load has left less than the low watermark of a budget free.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::page_cache::{Account, PAGE_CACHE};
use crate::pmap::Tracking;
use crate::space::MapEntry;
use crate::sys::futex;

/// Below this part of a budget free, the daemon is rung; it stops at twice that.
pub const LOW_SHARE: u64 = 32;
/// Smaller budgets are left to the threads that fault: there is no room to keep some free.
const BUDGET_LEAST: u64 = 8 << 20;

const ASLEEP: u32 = 0;
const RUNG: u32 = 1;

/// What wakes the daemon.
pub struct Bell(AtomicU32);

/// The one bell.
pub static BELL: Bell = Bell(AtomicU32::new(RUNG));

impl Bell {
    /// Wakes the daemon, or has it look again.
    pub fn ring(&self) {
        if self.0.swap(RUNG, Ordering::AcqRel) == ASLEEP {
            futex::wake_all(&self.0);
        }
    }

    /// From here on it can be rung again. For the daemon, before it looks.
    pub fn hush(&self) {
        self.0.store(ASLEEP, Ordering::Release);
    }

    /// Waits until it is rung, at most `limit`.
    pub fn wait(&self, limit: Duration) {
        futex::wait(&self.0, ASLEEP, limit);
    }
}

/// Whether less than a part of what the budget leaves to pages is free.
pub fn is_short(account: &Account, share: u64) -> bool {
    let most = account.most().0;
    most >= BUDGET_LEAST && account.used().0 > most - most / share
}

/// Whether a mapping could not be resident as a whole.
pub fn exceeds(entry: &MapEntry, account: &Account) -> bool {
    entry.object.mapped.0.saturating_add(entry.object.load_cost().0) > account.most().0
}

/// Whether the daemon may evict pages of a mapping. Not where each page is moved out, which costs the
/// other CPUs an interrupt for every page: the thread that faults evicts twice as fast by itself
/// (`bench/writes.py`).
pub fn is_for_daemon(entry: &MapEntry) -> bool {
    !(entry.writable && entry.pmap.get().tracking() == Tracking::WpAsync)
}

/// Rings the daemon when a load of `entry` has left too little room.
pub fn note_load(entry: &MapEntry) {
    let own = &entry.object.account;
    let short = is_short(own, LOW_SHARE) && exceeds(entry, own)
        || is_short(&PAGE_CACHE.account, LOW_SHARE) && exceeds(entry, &PAGE_CACHE.account);
    if short && is_for_daemon(entry) && BELL.0.load(Ordering::Relaxed) == ASLEEP {
        BELL.ring();
    }
}
