//! The page cache: what is resident, over all mappings, within budgets.
//!
//! Two budgets hold at once: one of the process and one per memory object. A load *reserves* what
//! it will take (its page and the buffers it passes through) before it touches memory, so that
//! the sum never exceeds a budget; when there is no room, pages are evicted first, and when
//! nothing can be evicted because every page is on its way, the reservation waits for one.
//!
//! What is known *of* pages takes memory too: page tables, tables of swap slots, the policy's lists. It
//! cannot be evicted, so it is not asked whether there is room, but leaves less of the budget to pages.
//! A floor stays theirs in any case, without which no load could be made, and who faults would wait for
//! ever: what a budget must hold when a mapping is opened, and what is pinned.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::sys::futex;
use crate::units::ByteCount;

/// How long a load that finds nothing to evict waits before it looks again.
const PATIENCE: Duration = Duration::from_millis(1);

/// Bytes charged against a budget.
#[derive(Debug)]
pub struct Account {
    budget: AtomicU64,
    used: AtomicU64,
    peak: AtomicU64,
    metadata: AtomicU64,
    floor: AtomicU64,
    pinned: AtomicU64,
}

impl Account {
    /// An empty account.
    pub const fn new(budget: ByteCount) -> Self {
        Account {
            budget: AtomicU64::new(budget.0),
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            metadata: AtomicU64::new(0),
            floor: AtomicU64::new(0),
            pinned: AtomicU64::new(0),
        }
    }

    /// The budget.
    pub fn budget(&self) -> ByteCount {
        ByteCount(self.budget.load(Ordering::Relaxed))
    }

    /// Changes the budget; what is over it goes with the next reservations.
    pub fn set_budget(&self, budget: ByteCount) {
        self.budget.store(budget.0, Ordering::Relaxed);
    }

    /// Bytes that are left to pages and buffers whatever else takes room, beside pinned pages.
    pub fn set_floor(&self, floor: ByteCount) {
        self.floor.store(floor.0, Ordering::Relaxed);
    }

    /// Bytes that tables and lists take now, which count in the budget.
    pub fn metadata(&self) -> ByteCount {
        ByteCount(self.metadata.load(Ordering::Relaxed))
    }

    /// Bytes that are pinned now.
    pub fn pinned(&self) -> ByteCount {
        ByteCount(self.pinned.load(Ordering::Relaxed))
    }

    /// What no budget may go below: the floor, and what is pinned.
    pub fn least(&self) -> ByteCount {
        ByteCount(self.floor.load(Ordering::Relaxed) + self.pinned().0)
    }

    /// Bytes more that could be pinned now.
    pub fn room_for_pins(&self) -> ByteCount {
        ByteCount(self.budget().0.saturating_sub(self.least().0))
    }

    fn try_pin(&self, bytes: ByteCount) -> bool {
        let most = self.budget().0.saturating_sub(self.floor.load(Ordering::Relaxed));
        let next = |pinned: u64| pinned.checked_add(bytes.0).filter(|sum| *sum <= most);
        self.pinned.fetch_update(Ordering::AcqRel, Ordering::Relaxed, next).is_ok()
    }

    /// Bytes of pages and buffers that may be charged now.
    pub fn most(&self) -> ByteCount {
        ByteCount(self.budget().0.saturating_sub(self.metadata().0).max(self.least().0))
    }

    /// Bytes that must go before so many can be charged.
    pub fn shortage(&self, bytes: ByteCount) -> ByteCount {
        ByteCount((self.used().0 + bytes.0).saturating_sub(self.most().0))
    }

    /// Bytes of pages and buffers charged now.
    pub fn used(&self) -> ByteCount {
        ByteCount(self.used.load(Ordering::Relaxed))
    }

    /// The most that was ever charged.
    pub fn peak(&self) -> ByteCount {
        ByteCount(self.peak.load(Ordering::Relaxed))
    }

    /// Charges `bytes` if the budget has room.
    pub fn try_charge(&self, bytes: ByteCount) -> bool {
        let most = self.most().0;
        let charged = self.used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |used| {
            used.checked_add(bytes.0).filter(|sum| *sum <= most)
        });
        if let Ok(before) = charged {
            self.peak.fetch_max(before + bytes.0, Ordering::Relaxed);
        }
        charged.is_ok()
    }

    /// Charges `bytes` whether the budget has room or not: what cannot be done without.
    pub fn charge(&self, bytes: ByteCount) {
        let before = self.used.fetch_add(bytes.0, Ordering::AcqRel);
        self.peak.fetch_max(before + bytes.0, Ordering::Relaxed);
    }

    /// Takes a charge back.
    pub fn release(&self, bytes: ByteCount) {
        let before = self.used.fetch_sub(bytes.0, Ordering::AcqRel);
        assert!(before >= bytes.0, "released {} of {before} bytes", bytes.0);
    }

    /// Forgets all charges, in the child of a fork, where nothing is resident.
    pub fn reset(&self) {
        for bytes in [&self.used, &self.peak, &self.metadata, &self.pinned] {
            bytes.store(0, Ordering::Relaxed);
        }
    }
}

/// What came of an attempt to make room.
#[derive(Debug)]
pub enum Room<Refusal> {
    /// Some was made.
    Made,
    /// All pages are on their way: there will be some.
    NoneYet,
    /// Pages that should go could not be written back.
    Refused(Refusal),
}

/// The process-wide account and the bell that rings when room is made.
pub struct PageCache {
    /// Charges of all memory objects.
    pub account: Account,
    freed: AtomicU32,
    waiters: AtomicU32,
}

/// The one page cache of the process.
pub static PAGE_CACHE: PageCache = PageCache {
    account: Account::new(ByteCount(u64::MAX)),
    freed: AtomicU32::new(0),
    waiters: AtomicU32::new(0),
};

impl PageCache {
    /// Charges `object` and the process, or neither.
    pub fn try_reserve(&self, object: &Account, bytes: ByteCount) -> bool {
        if !object.try_charge(bytes) {
            return false;
        }
        if self.account.try_charge(bytes) {
            return true;
        }
        object.release(bytes);
        false
    }

    /// Charges both, calling `make_room` for as long as there is none. `make_room` is told whether
    /// it is the object's own budget that is short.
    ///
    /// # Errors
    /// What stood in the way of making room.
    pub fn reserve<Refusal>(
        &self,
        object: &Account,
        bytes: ByteCount,
        mut make_room: impl FnMut(bool) -> Room<Refusal>,
    ) -> Result<(), Refusal> {
        while !self.try_reserve(object, bytes) {
            let own = object.shortage(bytes).0 > 0;
            match make_room(own) {
                Room::Made => {}
                Room::Refused(error) => return Err(error),
                Room::NoneYet if self.wait_reserved(object, bytes) => return Ok(()),
                Room::NoneYet => {}
            }
        }
        Ok(())
    }

    /// Has both know what the tables and lists of the object take now.
    pub fn set_metadata(&self, object: &Account, bytes: ByteCount) {
        let before = object.metadata.swap(bytes.0, Ordering::AcqRel);
        self.account.metadata.fetch_add(bytes.0.wrapping_sub(before), Ordering::AcqRel);
        if bytes.0 < before {
            self.ring();
        }
    }

    /// Has both know of so many bytes more that are pinned, if both budgets hold them beside their floors.
    pub fn try_pin(&self, object: &Account, bytes: ByteCount) -> bool {
        if !object.try_pin(bytes) {
            return false;
        }
        let pinned = self.account.try_pin(bytes);
        if !pinned {
            object.pinned.fetch_sub(bytes.0, Ordering::AcqRel);
        }
        pinned
    }

    /// Takes back what [`PageCache::try_pin`] noted.
    pub fn unpin(&self, object: &Account, bytes: ByteCount) {
        object.pinned.fetch_sub(bytes.0, Ordering::AcqRel);
        self.account.pinned.fetch_sub(bytes.0, Ordering::AcqRel);
    }

    /// Takes all charges of an object back, which ends.
    pub fn end(&self, object: &Account) {
        self.set_metadata(object, ByteCount(0));
        self.unpin(object, ByteCount(object.pinned.load(Ordering::Relaxed)));
        self.release(object, object.used());
    }

    /// Charges both beyond their budgets.
    pub fn charge(&self, object: &Account, bytes: ByteCount) {
        object.charge(bytes);
        self.account.charge(bytes);
    }

    /// Waits for others to give charges back, for a while in which what is resident is left to those
    /// who have just got it; true when the charge was made.
    fn wait_reserved(&self, object: &Account, bytes: ByteCount) -> bool {
        let end = Instant::now() + PATIENCE;
        loop {
            let seen = self.freed.load(Ordering::Acquire);
            if self.try_reserve(object, bytes) {
                return true;
            }
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return false;
            }
            self.waiters.fetch_add(1, Ordering::AcqRel);
            futex::wait(&self.freed, seen, rest);
            self.waiters.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Takes a charge back from both and tells who waits for room.
    pub fn release(&self, object: &Account, bytes: ByteCount) {
        object.release(bytes);
        self.account.release(bytes);
        self.ring();
    }

    /// Tells who waits for room that some may have come (a page became evictable).
    pub fn ring(&self) {
        self.freed.fetch_add(1, Ordering::AcqRel);
        if self.waiters.load(Ordering::Acquire) != 0 {
            futex::wake_all(&self.freed);
        }
    }

    /// Forgets all charges and waiters, in the child of a fork.
    pub fn reset(&self) {
        self.account.reset();
        self.waiters.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_never_exceeds_its_budget() {
        let account = Account::new(ByteCount(1000));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        if account.try_charge(ByteCount(300)) {
                            assert!(account.used().0 <= 1000);
                            account.release(ByteCount(300));
                        }
                    }
                });
            }
        });
        assert_eq!(account.used(), ByteCount(0));
        assert!(account.peak().0 <= 1000 && account.peak().0 >= 300);
    }

    fn page_cache(budget: u64) -> PageCache {
        PageCache {
            account: Account::new(ByteCount(budget)),
            freed: AtomicU32::new(0),
            waiters: AtomicU32::new(0),
        }
    }

    #[test]
    fn metadata_takes_room_from_pages_down_to_the_floor() {
        let (cache, object) = (page_cache(1000), Account::new(ByteCount(100)));
        object.set_floor(ByteCount(40));
        cache.set_metadata(&object, ByteCount(30));
        assert!(cache.try_reserve(&object, ByteCount(70)) && !cache.try_reserve(&object, ByteCount(1)));
        cache.set_metadata(&object, ByteCount(500));
        assert_eq!(object.shortage(ByteCount(0)), ByteCount(30), "no more than to the floor");
        cache.release(&object, ByteCount(70));
        assert!(cache.try_reserve(&object, ByteCount(40)) && !cache.try_reserve(&object, ByteCount(1)));
        assert!(cache.try_pin(&object, ByteCount(20)) && !cache.try_pin(&object, ByteCount(41)));
        assert!(cache.try_reserve(&object, ByteCount(20)) && !cache.try_reserve(&object, ByteCount(1)));
        assert_eq!(cache.account.most(), ByteCount(500));
        cache.end(&object);
        let rest = [&object, &cache.account].map(|account| account.used().0 + account.metadata().0);
        assert_eq!((rest, cache.account.most()), ([0, 0], ByteCount(1000)));
    }

    #[test]
    fn what_is_pinned_fits_both_budgets() {
        let (cache, objects) = (page_cache(100), [(); 2].map(|()| Account::new(ByteCount(80))));
        cache.account.set_floor(ByteCount(10));
        assert!(cache.try_pin(&objects[0], ByteCount(60)));
        assert!(!cache.try_pin(&objects[1], ByteCount(60)), "the process has room for 30");
        assert_eq!((objects[1].pinned(), cache.account.room_for_pins()), (ByteCount(0), ByteCount(30)));
        assert!(cache.try_pin(&objects[1], ByteCount(30)));
        cache.unpin(&objects[0], ByteCount(60));
        assert_eq!(cache.account.least(), ByteCount(40));
    }

    #[test]
    fn a_reservation_does_not_wait_for_what_metadata_will_never_give() {
        let (cache, object) = (page_cache(1000), Account::new(ByteCount(100)));
        object.set_floor(ByteCount(40));
        cache.set_metadata(&object, ByteCount(100));
        let reserved = cache.reserve::<()>(&object, ByteCount(40), |_| unreachable!("there is room"));
        assert_eq!(reserved, Ok(()));
    }

    #[test]
    fn reserve_asks_for_room_and_both_accounts_are_charged() {
        let (cache, object) = (page_cache(100), Account::new(ByteCount(60)));
        assert!(cache.try_reserve(&object, ByteCount(60)));
        let mut asked = Vec::new();
        let reserved = cache.reserve::<()>(&object, ByteCount(50), |own| {
            asked.push(own);
            cache.release(&object, ByteCount(60));
            Room::Made
        });
        assert_eq!(reserved, Ok(()));
        assert_eq!(asked, [true]);
        assert_eq!((object.used(), cache.account.used()), (ByteCount(50), ByteCount(50)));
    }
}
