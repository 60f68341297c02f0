//! The address space: map entries ordered by address.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLockWriteGuard};

use crate::fill::FillPool;
use crate::memory_object::{InFlight, MemoryObject};
use crate::page::PageState;
use crate::pmap::Pmap;
use crate::sys::fork::{ForkCell, HeldGuard};
use crate::sys::lock::RwLock;
use crate::sys::memory::{HUGE_BYTES, Range};
use crate::units::PageIndex;

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

    /// The granules of the huge page around a granule, where the entry has huge pages and that one
    /// lies wholly inside.
    pub fn huge_block(&self, page: PageIndex) -> Option<std::ops::Range<u64>> {
        let granule = self.object.granule.0;
        if !self.huge || !(HUGE_BYTES as u64).is_multiple_of(granule) {
            return None;
        }
        let pages = HUGE_BYTES as u64 / granule;
        let first = page.0 / pages * pages;
        ((first + pages) * granule <= self.range.len as u64).then_some(first..first + pages)
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
}

/// The one space of the process.
pub static SPACE: Space = Space { entries: RwLock::new(BTreeMap::new()) };

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
        self.entries.write().insert(entry.range.start, entry);
    }

    /// Removes a map entry.
    pub fn remove(&self, entry: &MapEntry) {
        self.entries.write().remove(&entry.range.start);
    }

    /// All entries now, in use as in [`Space::find`].
    pub fn all(&self) -> Vec<(Arc<MapEntry>, InFlight)> {
        self.entries.read().values().map(|entry| (Arc::clone(entry), entry.object.enter())).collect()
    }

    /// All entries, in the child of a fork, where what was in use is not any more.
    pub fn entries_in_child(&self) -> Vec<Arc<MapEntry>> {
        self.entries.read().values().cloned().collect()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.read().len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the lock and keeps it.
    ///
    /// # Safety
    /// Only in the handler before a fork.
    #[allow(unsafe_code)]
    pub unsafe fn lock_for_fork(&'static self) {
        // SAFETY: the guard of this lock, in the handler before a fork (contract).
        unsafe { HELD.keep(self.entries.write()) }
    }

    /// Gives back what [`Space::lock_for_fork`] took.
    ///
    /// # Safety
    /// Only in the handlers after a fork.
    #[allow(unsafe_code)]
    pub unsafe fn unlock_after_fork(&self) {
        // SAFETY: in the handlers after a fork (contract).
        unsafe { HELD.let_go() }
    }
}

static HELD: HeldGuard<RwLockWriteGuard<'static, BTreeMap<usize, Arc<MapEntry>>>> = HeldGuard::new();
