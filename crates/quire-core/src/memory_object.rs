//! A memory object: what can be mapped. It owns the states of its pages, knows its pager, keeps
//! its own account within the page cache, and remembers when it has failed.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::counters::{Counters, add};
use crate::dirty::Dirty;
use crate::errors::{FaultCode, MapError, StoreError};
use crate::interrupt::{self, PageError};
use crate::page::{HUGE, PageState, PageTable};
use crate::page_cache::{Account, PAGE_CACHE};
use crate::pager::{Pager, swap::SwapPager};
use crate::policy::{self, Policy};
use crate::readahead::Readahead;
use crate::standby::Standby;
use crate::sys::fork::ForkMutex;
use crate::sys::futex;
use crate::sys::memory::{HUGE_BYTES, page_bytes};
use crate::units::{ByteCount, PageCount, PageIndex};

/// Whether pages can still be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Condition {
    /// Yes.
    Healthy = 0,
    /// A wait was interrupted, or there was no room; faults give filler until the interpreter has
    /// acted on it.
    Interrupted = 1,
    /// The store failed; faults give filler for ever, and every call says so.
    Failed = 2,
}

/// What a memory object is made with.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Bytes in which pages are filled, installed and evicted.
    pub granule: ByteCount,
    /// Bytes that may be resident.
    pub budget: ByteCount,
    /// Name of the replacement policy, one of [`policy::NAMES`].
    pub policy: &'static str,
}

/// What a page costs that stands by and is touched again: the fault, and two copies of its bytes, one of
/// them by the kernel.
const SOFT_FAULT_NS: u64 = 4000;
const COPIED_PER_NS: u64 = 2;
/// So many times as much is dear: about every third of the pages that stand by is touched again, and half
/// of these would have stayed without a fault had no page stood by.
const DEAR: u64 = 6;

/// A moving average after one more reading; 0 before the first. Each weighs an eighth, and none counts for
/// more than four times the average: that a thread lost its CPU meanwhile says nothing of the pager.
fn averaged(mean: u64, ns: u64) -> u64 {
    let next = if mean == 0 { ns } else { mean - mean / 8 + ns.min(4 * mean) / 8 };
    next.max(8) // less would not grow again
}

fn new_policy(name: &str) -> Box<dyn Policy> {
    policy::by_name(name).expect("the name is one of `policy::NAMES`")
}

/// Pages, pager, account and condition.
pub struct MemoryObject {
    /// Unique in the process.
    pub id: u64,
    /// Bytes in which pages are filled, installed and evicted.
    pub granule: ByteCount,
    /// States of the granules.
    pub pages: PageTable,
    /// Where pages come from.
    pub pager: Pager,
    /// What is resident and on its way.
    pub account: Account,
    /// What happened.
    pub counters: Counters,
    /// Which resident page goes next.
    pub policy: ForkMutex<Box<dyn Policy>>,
    /// Pages that the policy gave up and that are not dropped yet.
    pub standby: Standby,
    /// Its name.
    pub policy_name: &'static str,
    /// Which pages to fill ahead.
    pub readahead: ForkMutex<Readahead>,
    /// Pages that hold filler or poison.
    pub filler: ForkMutex<Vec<PageIndex>>,
    /// How often pages are pinned, those that are.
    pub pins: ForkMutex<HashMap<PageIndex, u32>>,
    /// Dirty pages on their way back.
    pub dirty: Dirty,
    /// Bytes of the mapping: the data rounded up to hardware pages.
    pub mapped: ByteCount,
    /// Bytes that the policy takes.
    policy_bytes: AtomicU64,
    /// Time in which the pager gets one page, on average of late; 0 before the first.
    fill_ns: AtomicU64,
    condition: AtomicU8,
    /// Set when the pmap refused even filler, from when on it is not asked any more.
    pub covered: AtomicBool,
    failure: ForkMutex<Option<PageError>>,
    in_flight: AtomicU32,
}

impl MemoryObject {
    /// Bytes of a mapping of `size` bytes: whole hardware pages.
    ///
    /// # Errors
    /// `Invalid` when they are too many for an address space.
    pub fn mapped_bytes(size: ByteCount) -> Result<ByteCount, MapError> {
        ByteCount(size.0.max(1)) // no bytes at all take a page of zeros
            .checked_round_up(ByteCount(page_bytes() as u64))
            .filter(|mapped| mapped.0 < 1 << 47)
            .ok_or_else(|| MapError::Invalid(format!("{size} bytes cannot be mapped")))
    }

    /// An object over all of a pager's store, all absent.
    ///
    /// # Errors
    /// `MapError::Budget` when `budget` cannot hold one load, `Invalid` when the store is too large.
    pub fn new(pager: Pager, plan: &Plan) -> Result<Arc<Self>, MapError> {
        let Plan { granule, budget, policy } = *plan;
        let mapped = Self::mapped_bytes(pager.store().size())?;
        let object = MemoryObject {
            id: interrupt::new_mapping_id(),
            granule,
            pages: PageTable::new(mapped.pages(granule))?,
            account: Account::new(budget),
            counters: Counters::default(),
            policy: ForkMutex::new(new_policy(policy)),
            standby: Standby::new(granule),
            policy_bytes: AtomicU64::new(0),
            fill_ns: AtomicU64::new(0),
            policy_name: policy,
            readahead: ForkMutex::new(Readahead::default()),
            filler: ForkMutex::new(Vec::new()),
            pins: ForkMutex::default(),
            dirty: Dirty::default(),
            mapped,
            condition: AtomicU8::new(Condition::Healthy as u8),
            covered: AtomicBool::new(false),
            failure: ForkMutex::new(None),
            in_flight: AtomicU32::new(0),
            pager,
        };
        object.check_budget(budget)?;
        object.check_budget(PAGE_CACHE.account.budget())?;
        object.account.set_floor(object.least_budget());
        let standing = object.pager.standing_bytes();
        if standing.0 > 0 && !PAGE_CACHE.try_reserve(&object.account, standing) {
            return Err(MapError::Budget(format!(
                "the process-wide budget has no room for {standing} bytes of buffers; raise it with set_budget"
            )));
        }
        Ok(Arc::new(object))
    }

    /// The budget that holds: the smaller of the object's own and the process's.
    pub fn budget(&self) -> ByteCount {
        self.account.budget().min(PAGE_CACHE.account.budget())
    }

    /// Whether `budget` can hold what the store keeps for good, two loads, and what is pinned.
    ///
    /// # Errors
    /// `MapError::Budget`, with what is needed.
    pub fn check_budget(&self, budget: ByteCount) -> Result<(), MapError> {
        let pinned = self.account.pinned();
        let least = self.least_budget().0.saturating_add(pinned.0);
        if budget.0 >= least {
            return Ok(());
        }
        let beside = if pinned.0 == 0 { String::new() } else { format!(" beside {pinned} that are pinned") };
        Err(MapError::Budget(format!(
            "a budget of {budget} bytes cannot hold the pages in flight{beside}: at least {least} bytes are \
             needed for granules of {} bytes; raise the budget, or choose a smaller granule or frame",
            self.granule
        )))
    }

    /// What the store keeps for good, and two loads.
    fn least_budget(&self) -> ByteCount {
        let standing = self.pager.standing_bytes();
        ByteCount(standing.0.saturating_add(self.load_cost().0.saturating_mul(2)))
    }

    /// Notes what the policy takes now.
    pub fn note_policy(&self, policy: &dyn Policy) {
        self.policy_bytes.store(policy.metadata_bytes() as u64, Ordering::Relaxed);
    }

    /// Has the accounts know what is taken now by what is known of pages.
    pub fn note_metadata(&self) {
        let slots = self.pager.swap().map_or(0, SwapPager::table_bytes);
        let policy = self.policy_bytes.load(Ordering::Relaxed);
        let bytes = ByteCount(self.pages.bytes() + slots + policy + self.standby.list_bytes());
        if bytes != self.account.metadata() {
            PAGE_CACHE.set_metadata(&self.account, bytes);
        }
    }

    /// Forgets all pages and takes all charges back, when the object is unmapped: no fault or load is under
    /// way, and none will come.
    #[allow(unsafe_code)]
    pub fn end(&self) {
        self.standby.clear();
        *self.policy.lock() = new_policy(self.policy_name);
        // SAFETY: no fault or load uses the words (contract), and who only looks at them reads zero.
        unsafe { self.pages.reset() }
        PAGE_CACHE.end(&self.account);
    }

    /// Bytes a load takes at most: its page, the buffer it is filled in, the store's buffers.
    pub fn load_cost(&self) -> ByteCount {
        self.run_cost(1)
    }

    /// As [`MemoryObject::load_cost`], for a load of several pages by one read.
    pub fn run_cost(&self, pages: u64) -> ByteCount {
        let read = ByteCount(pages * self.granule.0);
        ByteCount(2 * read.0 + self.pager.buffer_bytes(read).0)
    }

    /// Notes how long the pager took for one page.
    pub fn note_fill(&self, ns: u64) {
        let mean = self.fill_ns.load(Ordering::Relaxed);
        self.fill_ns.store(averaged(mean, ns), Ordering::Relaxed); // of two at once one is lost: no harm
    }

    /// Whether to get a page again costs so much more than to have it stand by that evicted pages should.
    pub fn is_dear_to_fill(&self) -> bool {
        let standby_ns = SOFT_FAULT_NS + self.granule.0 / COPIED_PER_NS;
        self.fill_ns.load(Ordering::Relaxed) > DEAR * standby_ns
    }

    /// Pages that the policy knows, and those of the huge pages that they stand for, in order.
    pub fn resident_pages(&self) -> Vec<PageIndex> {
        let mut pages = Vec::new();
        self.policy.lock().retain(&mut |page| {
            let block = self.block_of(page).filter(|_| self.pages.has(page, HUGE));
            pages.extend(block.unwrap_or(page.0..page.0 + 1).map(PageIndex));
            true
        });
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// Claims a page that is to be filled ahead of need; false where it is not absent, or stands by.
    pub fn claim_ahead(&self, page: PageIndex) -> bool {
        !self.standby.holds(page) && self.pages.claim(page, PageState::Absent, PageState::Loading)
    }

    /// The granules that share the addresses of a huge page with a granule, where all of them lie in the
    /// mapping.
    pub fn block_of(&self, page: PageIndex) -> Option<std::ops::Range<u64>> {
        let (huge, granule) = (HUGE_BYTES as u64, self.granule.0);
        if !huge.is_multiple_of(granule) {
            return None;
        }
        let pages = huge / granule;
        let first = page.0 / pages * pages;
        ((first + pages) * granule <= self.mapped.0).then_some(first..first + pages)
    }

    /// Number of granules.
    pub fn page_count(&self) -> PageCount {
        PageCount(self.pages.len() as u64)
    }

    /// Bytes of one granule that are mapped: all, but for the last.
    pub fn page_len(&self, page: PageIndex) -> usize {
        let start = page.offset(self.granule).0;
        ByteCount(self.granule.0.min(self.mapped.0 - start)).as_usize()
    }

    /// The condition now.
    pub fn condition(&self) -> Condition {
        match self.condition.load(Ordering::Acquire) {
            0 => Condition::Healthy,
            1 => Condition::Interrupted,
            _ => Condition::Failed,
        }
    }

    /// Why pages cannot be had, when they cannot.
    pub fn failure(&self) -> Option<PageError> {
        if self.condition() == Condition::Healthy { None } else { self.failure.lock().clone() }
    }

    /// Notes a failure; false when it was an interrupt that is over. The first real failure stays;
    /// an interrupt passes.
    pub fn fail(&self, page: PageIndex, error: StoreError) -> bool {
        add(&self.counters.errors, 1);
        let next = if error.code.is_passing() { Condition::Interrupted } else { Condition::Failed };
        let mut failure = self.failure.lock();
        if error.code == FaultCode::Interrupted && !interrupt::pending() {
            return false; // it was acted on meanwhile: the page can be had again
        }
        if next as u8 > self.condition.load(Ordering::Acquire) {
            let source = error.source_in(self.pager.store().label()).into();
            *failure = Some(PageError { error, source, page: page.0, mapping: self.id });
            self.condition.store(next as u8, Ordering::Release);
        }
        true
    }

    /// Ends a condition that passes, of an interrupt or of another cause, whichever is meant; false
    /// when there was none.
    pub fn resume(&self, interrupt: bool) -> bool {
        let mut failure = self.failure.lock();
        let cause = failure.as_ref().is_some_and(|f| (f.error.code == FaultCode::Interrupted) == interrupt);
        let interrupted = self.condition() == Condition::Interrupted && cause;
        if interrupted {
            *failure = None;
            self.condition.store(Condition::Healthy as u8, Ordering::Release);
        }
        interrupted
    }

    /// Counts a fault or load that uses this object until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        InFlight(Arc::clone(self))
    }

    /// Waits until nothing uses the object.
    pub fn wait_idle(&self) {
        loop {
            match self.in_flight.load(Ordering::Acquire) {
                0 => return,
                seen => futex::wait(&self.in_flight, seen, Duration::from_millis(20)),
            }
        }
    }

    /// Forgets all that is resident, every waiter and every lock, in the child of a fork.
    ///
    /// # Safety
    /// Only in the child of a fork while it has one thread, which is in no call of this object.
    #[allow(unsafe_code)]
    pub unsafe fn reset_in_child(&self) {
        // SAFETY: one thread, in no call of ours (contract): no guard, borrow or page is in use.
        unsafe {
            self.policy.replace_in_child(new_policy(self.policy_name));
            self.readahead.replace_in_child(Readahead::default()); // its advice goes too: a hint
            self.standby.reset_in_child();
            self.filler.replace_in_child(Vec::new());
            self.dirty.reset_in_child();
            self.pins.replace_in_child(HashMap::new());
            let failed = self.condition() == Condition::Failed;
            let note = failed.then(|| self.note_for_child());
            self.failure.replace_in_child(note);
            self.pages.reset();
        }
        if self.condition() == Condition::Interrupted {
            self.condition.store(Condition::Healthy as u8, Ordering::Release);
        }
        self.in_flight.store(0, Ordering::Relaxed);
        self.policy_bytes.store(0, Ordering::Relaxed);
        self.account.reset();
        // SAFETY: one thread (contract).
        unsafe { self.pager.after_fork_in_child() };
        // What the process-wide budget could not hold beside this stays uncharged: the parent held it.
        let _ = PAGE_CACHE.try_reserve(&self.account, self.pager.standing_bytes());
    }

    /// The parent's failure may be half-written at fork; the child says what is certain.
    fn note_for_child(&self) -> PageError {
        PageError {
            error: StoreError::new(
                FaultCode::Io,
                crate::units::ByteOffset(0),
                "the mapping had failed before this process was forked",
            ),
            source: self.pager.store().label().into(),
            page: 0,
            mapping: self.id,
        }
    }
}

impl Drop for MemoryObject {
    fn drop(&mut self) {
        PAGE_CACHE.end(&self.account);
    }
}

/// Keeps [`MemoryObject::wait_idle`] waiting.
pub struct InFlight(Arc<MemoryObject>);

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::AcqRel) == 1 {
            futex::wake_all(&self.0.in_flight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(mean: u64, readings: &[u64]) -> u64 {
        readings.iter().fold(mean, |mean, ns| averaged(mean, *ns))
    }

    #[test]
    fn an_average_follows_the_pager_and_no_outlier() {
        assert_eq!(after(0, &[7000]), 7000);
        assert!(after(7000, &[50_000_000]) < 10_000, "one thread that lost its CPU");
        assert!(after(7000, &[1_000_000; 40]) > 900_000, "it has become slow");
        assert!(after(1_000_000, &[7000; 60]) < 10_000, "and fast again");
        assert!(after(0, &[0; 100]) > 0 && after(after(0, &[0; 100]), &[100_000; 60]) > 80_000);
    }
}
