//! The address space: map entries ordered by address.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard};

use crate::fill::FillPool;
use crate::memory_object::{InFlight, MemoryObject};
use crate::page::{HUGE, PageState};
use crate::page_cache::PAGE_CACHE;
use crate::pmap::kernel::Region;
use crate::pmap::{Pmap, frames::Frames};
use crate::sys::fork::{ForkCell, HeldGuard};
use crate::sys::lock::RwLock;
use crate::sys::memory::{HUGE_BYTES, Range};
use crate::units::{ByteCount, PageIndex};

/// A huge page takes at most this part of a budget.
const HUGE_SHARE: u64 = 16;

/// A range of addresses that shows a memory object through a pmap.
pub struct MapEntry {
    /// The addresses.
    pub range: Range,
    /// What they show.
    pub object: Arc<MemoryObject>,
    /// What makes translations.
    pub pmap: ForkCell<Arc<dyn Pmap>>,
    /// Threads that fill pages on nobody's stack.
    pub fill: ForkCell<Arc<FillPool>>,
    /// Whether its memory may be written.
    pub writable: bool,
    /// Whether all of it fits the budgets, so that its pages may become huge ones.
    pub huge: bool,
    /// False in the child of a fork until the range is made ready there.
    pub armed: AtomicBool,
    /// Set when the entry is being unmapped: nothing is filled ahead any more.
    pub closing: AtomicBool,
}

impl MapEntry {
    /// The granule that shows `address`, which lies in the entry.
    pub fn page_at(&self, address: usize) -> PageIndex {
        PageIndex((address - self.range.start) as u64 / self.object.granule.0)
    }

    /// The addresses of a granule.
    pub fn page_range(&self, page: PageIndex) -> Range {
        let start = self.range.start + page.offset(self.object.granule).0 as usize;
        Range { start, len: self.object.page_len(page) }
    }

    /// The granules of the huge page around a granule, where it is a part of one or may become that.
    pub fn huge_block(&self, page: PageIndex) -> Option<std::ops::Range<u64>> {
        let huge = self.huge || self.object.pages.has(page, HUGE);
        huge.then(|| self.object.block_of(page)).flatten()
    }

    /// What moves huge pages into this entry and out of it, where they are. Not where writes are noticed:
    /// one between a page's move and its protection would be lost.
    pub fn huge_frames(&self) -> Option<&Frames> {
        self.pmap.get().frames().filter(|frames| !self.writable && frames.moves_huge_pages())
    }

    /// Whether a reader in order gets huge pages: the store is fast, and the budgets hold enough of them.
    pub fn loads_huge_pages(&self) -> bool {
        let budget = self.object.budget();
        let roomy = budget.0 / HUGE_SHARE >= HUGE_BYTES as u64;
        roomy && !self.object.pager.store().is_slow() && self.huge_frames().is_some()
    }

    /// Granules that the store likes to be read at once.
    pub fn store_run_pages(&self) -> u64 {
        (self.object.pager.store().run().0 / self.object.granule.0).max(1)
    }

    /// Granules to load at once when a reader goes in order: as the store likes it, or those of a huge
    /// page.
    pub fn run_pages(&self) -> u64 {
        let run = self.store_run_pages();
        let block = self.object.block_of(PageIndex(0)).filter(|_| self.loads_huge_pages());
        block.map_or(run, |block| run.max(block.end))
    }

    /// Moves a page whose load is not going to happen back to ABSENT; who waits for it tries itself.
    pub fn give_up(&self, page: PageIndex) {
        self.object.pages.finish(page, PageState::Absent, 0);
        self.pmap.get().wake(self.page_range(page));
    }

    /// Whether the entry is being unmapped.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }
}

/// All map entries of the process by start address.
pub struct Space {
    entries: RwLock<BTreeMap<usize, Arc<MapEntry>>>,
    kernel: RwLock<BTreeMap<usize, Region>>,
}

/// Who holds it sees no entry come or go.
pub type Entries<'a> = RwLockReadGuard<'a, BTreeMap<usize, Arc<MapEntry>>>;
/// The ranges that the kernel pages, to be changed.
pub type Regions<'a> = RwLockWriteGuard<'a, BTreeMap<usize, Region>>;

/// The one space of the process.
pub static SPACE: Space =
    Space { entries: RwLock::new(BTreeMap::new()), kernel: RwLock::new(BTreeMap::new()) };

impl Space {
    /// The entry that holds `address`, in use: it is not unmapped before the guard is dropped. It
    /// is counted as used under the lock, which a removal takes before it waits for users.
    pub fn find(&self, address: usize) -> Option<(Arc<MapEntry>, InFlight)> {
        let entries = self.entries.read();
        let (_, entry) = entries.range(..=address).next_back()?;
        entry.range.contains(address).then(|| (Arc::clone(entry), entry.object.enter()))
    }

    /// Enters a map entry.
    pub fn insert(&self, entry: Arc<MapEntry>) {
        let mut entries = self.entries.write();
        entries.insert(entry.range.start, entry);
        PAGE_CACHE.account.set_floor(least_budget(&entries));
    }

    /// Removes a map entry.
    pub fn remove(&self, entry: &MapEntry) {
        let mut entries = self.entries.write();
        entries.remove(&entry.range.start);
        PAGE_CACHE.account.set_floor(least_budget(&entries));
    }

    /// The ranges that the kernel pages, to change them while no entry comes or goes; no guard of
    /// entries where one shows any of these addresses.
    pub fn claim(&self, addresses: std::ops::Range<usize>) -> (Option<Entries<'_>>, Regions<'_>) {
        let entries = self.entries.read();
        let free = |entry: &Arc<MapEntry>| {
            entry.range.end() <= addresses.start || addresses.end <= entry.range.start
        };
        let all_free = entries.values().all(free);
        (all_free.then_some(entries), self.kernel.write())
    }

    /// The ranges that the kernel pages (pmap `kernel`), by start address. Whoever holds the lock
    /// touches no memory of a mapping.
    pub fn kernel(&self) -> RwLockReadGuard<'_, BTreeMap<usize, Region>> {
        self.kernel.read()
    }

    /// As [`Space::kernel`], to change them.
    pub fn kernel_mut(&self) -> Regions<'_> {
        self.kernel.write()
    }

    /// All entries now, in use as in [`Space::find`].
    pub fn all(&self) -> Vec<(Arc<MapEntry>, InFlight)> {
        self.entries.read().values().map(|entry| (Arc::clone(entry), entry.object.enter())).collect()
    }

    /// All entries, in the child of a fork, where what was in use is not any more.
    pub fn entries_in_child(&self) -> Vec<Arc<MapEntry>> {
        self.entries.read().values().cloned().collect()
    }

    /// Number of entries, those that the kernel pages not counted.
    pub fn len(&self) -> usize {
        self.entries.read().len()
    }

    /// Whether nothing at all is mapped.
    pub fn is_empty(&self) -> bool {
        self.len() == 0 && self.kernel().is_empty()
    }

    /// Takes the lock and keeps it.
    ///
    /// # Safety
    /// Only in the handler before a fork.
    #[allow(unsafe_code)]
    pub unsafe fn lock_for_fork(&'static self) {
        // SAFETY: the guards of these locks, in the handler before a fork (contract).
        unsafe {
            HELD.keep(self.entries.write());
            KERNEL_HELD.keep(self.kernel.write());
        }
    }

    /// Gives back what [`Space::lock_for_fork`] took.
    ///
    /// # Safety
    /// Only in the handlers after a fork.
    #[allow(unsafe_code)]
    pub unsafe fn unlock_after_fork(&self) {
        // SAFETY: in the handlers after a fork (contract).
        unsafe {
            KERNEL_HELD.let_go();
            HELD.let_go();
        }
    }
}

/// What all stores keep for good, and two of the largest loads.
fn least_budget(entries: &BTreeMap<usize, Arc<MapEntry>>) -> ByteCount {
    let objects = || entries.values().map(|entry| &entry.object);
    let standing: u64 = objects().map(|object| object.pager.standing_bytes().0).sum();
    let load = objects().map(|object| 2 * object.load_cost().0).max().unwrap_or(0);
    ByteCount(standing + load)
}

static HELD: HeldGuard<RwLockWriteGuard<'static, BTreeMap<usize, Arc<MapEntry>>>> = HeldGuard::new();
static KERNEL_HELD: HeldGuard<RwLockWriteGuard<'static, BTreeMap<usize, Region>>> = HeldGuard::new();
