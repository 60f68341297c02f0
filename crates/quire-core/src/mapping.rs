//! A mapping: what the interpreter's side holds. Opens a map entry over a store and closes it.
#![allow(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::counters::{Counters, RETIRED, RETIRED_FETCHED, add};
use crate::daemon;
use crate::errors::{FaultCode, MapError, OpenError, StoreError};
use crate::interrupt::{self, PageError};
use crate::laundry;
use crate::memory_object::{Condition, InFlight, MemoryObject, Plan};
use crate::page::PageState;
use crate::page_cache::{Account, PAGE_CACHE};
use crate::pageout;
use crate::pager::{Pager, swap::SwapPager};
use crate::pmap::{self, Kind, RunningPmap, Tracking};
use crate::policy;
use crate::readahead::Advice;
use crate::residency::{self, PinError};
use crate::runtime;
use crate::space::{MapEntry, SPACE};
use crate::store::Store;
use crate::swap::{BLOCK_BYTES, Compression, Swap, SwapOptions};
use crate::sys::fork::ForkCell;
use crate::sys::lock::Mutex;
use crate::sys::memory::{self, HUGE_BYTES, Range, Touch, page_bytes};
use crate::units::{ByteCount, ByteOffset, PageIndex};

/// Granule of stores that read any length equally well, and of remote ones, where a request costs
/// as much as many bytes. Chosen by `bench/granule.py`.
const GRANULE_FAST: ByteCount = ByteCount(64 << 10);
const GRANULE_SLOW: ByteCount = ByteCount(256 << 10);
/// Smaller frames are filled several at a time.
const GRANULE_ZSTD_LEAST: u64 = 64 << 10;
/// Smallest granule that is made part of huge pages.
const GRANULE_HUGE_LEAST: ByteCount = ByteCount(16 << 10);
/// A granule chosen by default takes at most this part of the budget.
const GRANULE_SHARE: u64 = 16;

/// What becomes of writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// There are none.
    #[default]
    ReadOnly,
    /// They go to the store.
    Shared,
    /// They stay in this mapping, and go to swap.
    Private,
}

/// How to map.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What becomes of writes.
    pub mode: Mode,
    /// Bytes that may be resident; the process-wide budget alone when absent.
    pub budget: Option<ByteCount>,
    /// Bytes of a granule; chosen by the store when absent.
    pub granule: Option<ByteCount>,
    /// Name of the pmap, and how it notices writes where that is not to be the best that works
    /// ("uffd:wp-sync"); the best that works when absent.
    pub pmap: Option<String>,
    /// Further tries of a read that fails in a way that may pass.
    pub retries: u32,
    /// Name of the replacement policy; CLOCK when absent.
    pub policy: Option<String>,
    /// Where private pages go.
    pub swap: Swapping,
}

/// How private pages are swapped.
#[derive(Clone, Debug, Default)]
pub struct Swapping {
    /// Folder of the swap file; a temporary one when absent.
    pub folder: Option<PathBuf>,
    /// Bytes it may take; enough for all pages when absent.
    pub limit: Option<ByteCount>,
    /// How pages are made smaller.
    pub compression: Compression,
    /// Whether they are encrypted.
    pub encrypt: bool,
}

/// A mapped store; unmapped on drop.
pub struct Mapping {
    range: Range,
    object: Arc<MemoryObject>,
    kind: Kind,
    tracking: Tracking,
    writable: bool,
    watches: bool,
    /// Gone when unmapped, and with it the pmap's descriptors.
    entry: Mutex<Option<Arc<MapEntry>>>,
}

impl Mapping {
    /// Maps all of `store`.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn open(store: Arc<dyn Store>, options: &Options) -> Result<Self, MapError> {
        let writable = options.mode != Mode::ReadOnly;
        let (kind, tracking) = choose(options.pmap.as_deref(), writable)?;
        let own = options.budget.unwrap_or(ByteCount(u64::MAX));
        let budget = own.min(PAGE_CACHE.account.budget());
        let most = kind.granules_max(writable);
        let granule = granule(&*store, options.granule, budget, most)?;
        let slow = store.is_slow();
        let policy = policy_name(options.policy.as_deref())?;
        let private = options.mode == Mode::Private;
        let swap = private.then(|| open_swap(&*store, granule, &options.swap)).transpose()?;
        let pager = Pager::new(store, granule, swap, options.retries);
        let object = MemoryObject::new(pager, &Plan { granule, budget: own, policy })?;
        let (pmap, fill) = runtime::acquire(kind, tracking, slow)?;
        let huge = !writable && kind.has_huge_pages() && may_be_huge(&object);
        let range = match reserve_and_prepare(object.mapped, huge, writable, &*pmap) {
            Ok(range) => range,
            Err(error) => {
                drop(pmap);
                runtime::release();
                return Err(error);
            }
        };
        let entry = Arc::new(MapEntry {
            range,
            object: Arc::clone(&object),
            pmap: ForkCell::new(pmap),
            fill: ForkCell::new(fill),
            writable,
            huge,
            armed: AtomicBool::new(true),
            closing: AtomicBool::new(false),
        });
        SPACE.insert(Arc::clone(&entry));
        if slow {
            interrupt::watch();
        }
        let entry = Mutex::new(Some(entry));
        Ok(Mapping { range, object, kind, tracking, writable, watches: slow, entry })
    }

    /// The addresses of the data, its length rounded up to hardware pages.
    pub fn range(&self) -> Range {
        self.range
    }

    /// The object mapped.
    pub fn object(&self) -> &Arc<MemoryObject> {
        &self.object
    }

    /// The pmap in use.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How writes are noticed; `None` for a read-only mapping.
    pub fn tracking(&self) -> Option<Tracking> {
        self.writable.then_some(self.tracking)
    }

    fn entry(&self) -> Option<Arc<MapEntry>> {
        self.entry.lock().clone()
    }

    /// Writes back what is dirty in these bytes and makes it durable. Nothing to do where writes do
    /// not go to a store.
    ///
    /// # Errors
    /// The first failure; what is not durable stays dirty and is written by the next call.
    pub fn sync(&self, within: std::ops::Range<u64>) -> Result<(), StoreError> {
        let Some(entry) = self.entry() else { return Ok(()) };
        if !entry.writable || entry.object.pager.swap().is_some() {
            return Ok(());
        }
        if !entry.armed.load(Ordering::Acquire) {
            return Err(not_here(within.start));
        }
        let _in_flight = entry.object.enter();
        let end = within.end.min(entry.object.mapped.0);
        laundry::sync(&entry, within.start.min(end)..end)
    }

    /// Why the mapping has failed, when it has; an interrupt is no failure.
    pub fn failure(&self) -> Option<PageError> {
        let failed = self.object.condition() == Condition::Failed;
        failed.then(|| self.object.failure()).flatten()
    }

    /// The entry, in use, while it can be used: not unmapped, and not of the parent of a fork.
    fn in_use(&self) -> Option<(Arc<MapEntry>, InFlight)> {
        let entry = self.entry().filter(|entry| entry.armed.load(Ordering::Acquire))?;
        let in_flight = entry.object.enter();
        Some((entry, in_flight))
    }

    /// As [`Mapping::in_use`], for a call that must not pretend to have done something.
    fn here(&self, offset: u64) -> Result<(Arc<MapEntry>, InFlight), StoreError> {
        self.in_use().ok_or_else(|| not_here(offset))
    }

    /// Copies bytes of the mapping; see [`residency::read`].
    ///
    /// # Errors
    /// Why a page could not be had.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let (entry, _in_flight) = self.here(offset)?;
        residency::read(&entry, offset, buf)
    }

    /// Copies bytes into the mapping; see [`residency::write`].
    ///
    /// # Errors
    /// Why a page could not be had.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let (entry, _in_flight) = self.here(offset)?;
        residency::write(&entry, offset, bytes)
    }

    /// Has the pages of these bytes resident; see [`residency::populate`].
    ///
    /// # Errors
    /// Why a page could not be had.
    pub fn populate(&self, span: std::ops::Range<u64>) -> Result<(), StoreError> {
        let (entry, _in_flight) = self.here(span.start)?;
        residency::populate(&entry, span)
    }

    /// How the mapping is going to be touched.
    pub fn advise(&self, advice: Advice) {
        self.object.readahead.lock().set_advice(advice);
    }

    /// Starts to fill the pages of these bytes and does not wait.
    pub fn will_need(&self, span: std::ops::Range<u64>) {
        if let Some((entry, _in_flight)) = self.in_use() {
            let granule = entry.object.granule.0;
            let room = entry.object.budget().0 / 2 / granule;
            let pages = residency::pages_of(&entry.object, span);
            let run = entry.run_pages().max((1 << 20) / granule);
            residency::submit(&entry, pages.start..pages.end.min(pages.start + room), run);
        }
    }

    /// Pins the pages of these bytes, open to writes in a writable mapping; see [`residency::pin`].
    ///
    /// # Errors
    /// [`PinError`].
    pub fn pin(&self, span: std::ops::Range<u64>) -> Result<(), PinError> {
        let (entry, _in_flight) = self.here(span.start).map_err(PinError::Page)?;
        residency::pin(&entry, span, Touch::Write)
    }

    /// Ends one pin of the same bytes.
    pub fn unpin(&self, span: std::ops::Range<u64>) {
        if let Some((entry, _in_flight)) = self.in_use() {
            residency::unpin(&entry, span);
        }
    }

    /// Evicts the pages of these bytes; see [`residency::evict`].
    ///
    /// # Errors
    /// A dirty page could not be written back.
    pub fn evict(&self, span: std::ops::Range<u64>) -> Result<ByteCount, StoreError> {
        let (entry, _in_flight) = self.here(span.start)?;
        residency::evict(&entry, span)
    }

    /// Bytes that are dirty now; see [`laundry::dirty_bytes`].
    pub fn dirty_bytes(&self) -> ByteCount {
        let in_use = self.in_use().filter(|(entry, _in_flight)| entry.writable);
        in_use.map_or(ByteCount(0), |(entry, _in_flight)| laundry::dirty_bytes(&entry))
    }

    /// One byte per granule: 1 resident or standing by, 0 not.
    pub fn resident(&self) -> Vec<u8> {
        let pages = &self.object.pages;
        let here = |p| matches!(pages.state(PageIndex(p)), PageState::Resident | PageState::Held);
        let mut resident: Vec<u8> = (0..pages.len() as u64).map(|p| u8::from(here(p))).collect();
        self.object.standby.pages().iter().for_each(|page| resident[page.0 as usize] = 1);
        resident
    }

    /// Changes the mapping's own budget.
    ///
    /// # Errors
    /// `MapError::Budget` when a load would not fit it.
    pub fn set_budget(&self, budget: ByteCount) -> Result<(), MapError> {
        self.object.check_budget(budget)?;
        self.object.account.set_budget(budget);
        if let Some((entry, _in_flight)) = self.in_use() {
            // What cannot go now (on its way, or not to be written back) goes with the next loads.
            let over = || self.object.account.shortage(ByteCount(0));
            while over().0 > 0 && pageout::shrink(&entry, over()) {}
        }
        Ok(())
    }

    /// Ends it: what is dirty is written back, waits that hang end, pages go, threads stop with the
    /// last mapping. The caller has made sure that nothing refers to the addresses any more.
    ///
    /// # Errors
    /// What was dirty and could not be written back is lost.
    pub fn unmap(&self) -> Result<(), StoreError> {
        let here = self.entry().is_some_and(|entry| entry.armed.load(Ordering::Acquire));
        let synced = if here { self.sync(0..u64::MAX) } else { Ok(()) };
        let Some(entry) = self.entry.lock().take() else { return Ok(()) };
        entry.closing.store(true, Ordering::Release);
        SPACE.remove(&entry);
        entry.object.pager.store().close();
        entry.object.wait_idle();
        let armed = entry.armed.load(Ordering::Acquire);
        if armed {
            entry.pmap.get().leave(entry.range);
        }
        // SAFETY: our own range; no fault or load is under way, no reference is left (contract).
        unsafe { memory::unmap(entry.range) };
        if let Some(swap) = self.object.pager.swap() {
            swap.swap().end();
        }
        self.object.end();
        add(&RETIRED_FETCHED, self.object.pager.store().bytes_fetched());
        RETIRED.lock().get_or_insert_default().absorb(&entry.object.counters);
        if self.watches {
            interrupt::unwatch();
        }
        drop(entry);
        if armed {
            runtime::release();
        }
        synced
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Who can be told has called `unmap` before.
        let _ = self.unmap();
    }
}

/// Changes the process-wide budget.
///
/// # Errors
/// `MapError::Budget` when what the open mappings hold for good, and a load of one, would not fit.
pub fn set_process_budget(budget: ByteCount) -> Result<(), MapError> {
    let least = PAGE_CACHE.account.least();
    if budget < least {
        return Err(MapError::Budget(format!(
            "a process-wide budget of {budget} bytes cannot hold the open mappings' buffers, pinned pages and \
             pages in flight: at least {least} bytes are needed; close some mappings or end some pins first"
        )));
    }
    PAGE_CACHE.account.set_budget(budget);
    daemon::shrink();
    Ok(())
}

/// Counters of all mappings, present and past.
pub fn process_counters() -> Counters {
    let sum = Counters::default();
    SPACE.kernel().values().for_each(|region| add(&sum.errors, region.errors.load(Ordering::Relaxed)));
    if let Some(retired) = RETIRED.lock().as_ref() {
        sum.absorb(retired);
    }
    SPACE.all().iter().for_each(|(entry, _)| sum.absorb(&entry.object.counters));
    sum
}

/// Bytes that are dirty now in all mappings.
pub fn process_dirty_bytes() -> ByteCount {
    let ready = |entry: &MapEntry| entry.writable && entry.armed.load(Ordering::Acquire);
    let all = SPACE.all();
    let writable = all.iter().filter(|(entry, _)| ready(entry));
    ByteCount(writable.map(|(entry, _)| laundry::dirty_bytes(entry).0).sum())
}

/// Huge pages are for mappings that nothing of will be evicted: evicting a part of one frees no
/// memory. Small granules would look for complete huge pages too often.
fn may_be_huge(object: &MemoryObject) -> bool {
    let roomy = |account: &Account| object.mapped.0 + object.load_cost().0 <= account.budget().0;
    object.granule >= GRANULE_HUGE_LEAST && roomy(&object.account) && roomy(&PAGE_CACHE.account)
}

fn not_here(offset: u64) -> StoreError {
    let message = "the mapping is closed, or belongs to the parent of this process: open it again";
    StoreError::new(FaultCode::Closed, ByteOffset(offset), message)
}

fn policy_name(asked: Option<&str>) -> Result<&'static str, MapError> {
    let asked = asked.unwrap_or("clock");
    let known = policy::NAMES.into_iter().find(|name| *name == asked);
    known.ok_or_else(|| {
        MapError::Invalid(format!(
            "there is no replacement policy {asked:?}; there are: {}",
            policy::NAMES.join(", ")
        ))
    })
}

/// A swap for all pages of a store. Its limit leaves room for the older copy of a page beside the
/// newer one, and for what encryption adds.
fn open_swap(store: &dyn Store, granule: ByteCount, swapping: &Swapping) -> Result<SwapPager, MapError> {
    let mapped = MemoryObject::mapped_bytes(store.size())?;
    let pages = mapped.pages(granule);
    let roomy = ByteCount((pages.0 + 64).saturating_mul(granule.0 + 2 * BLOCK_BYTES));
    let options = SwapOptions {
        folder: swapping.folder.clone(),
        limit: swapping.limit.unwrap_or(roomy),
        compression: swapping.compression,
        encrypt: swapping.encrypt,
    };
    let swap = Swap::open(&options).map_err(|error| match error {
        OpenError::Io { errno, message } => {
            MapError::Sys { call: "opening the swap file", errno: errno.unwrap_or(0), message }
        }
        OpenError::Format(message) => MapError::Invalid(message),
    })?;
    SwapPager::new(swap, pages)
}

fn reserve_and_prepare(
    len: ByteCount,
    huge: bool,
    writable: bool,
    pmap: &dyn RunningPmap,
) -> Result<Range, MapError> {
    let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    let range = memory::reserve_aligned(len.as_usize(), HUGE_BYTES, prot)?;
    runtime::prepare(range, huge, writable, pmap).inspect_err(|_| {
        // SAFETY: reserved above, nothing refers to it.
        unsafe { memory::unmap(range) }
    })?;
    Ok(range)
}

/// The pmap of a name, or the best, and how it notices writes.
fn choose(asked: Option<&str>, writable: bool) -> Result<(Kind, Tracking), MapError> {
    let ladder = pmap::probe();
    let known = ladder.iter().map(|rung| rung.kind.name()).collect::<Vec<_>>().join(", ");
    let (name, wanted) = match asked.map(|asked| asked.split_once(':').unwrap_or((asked, ""))) {
        Some((name, tracking)) => (Some(name), Some(tracking).filter(|tracking| !tracking.is_empty())),
        None => (None, None),
    };
    let rung = match name {
        Some(name) => ladder
            .into_iter()
            .find(|rung| rung.kind.name() == name)
            .ok_or_else(|| MapError::Pmap(format!("there is no pmap {name:?}; there are: {known}")))?,
        None => ladder.into_iter().find(|rung| rung.works).ok_or_else(|| {
            MapError::Pmap(format!(
                "no pmap works here (tried {known}); `quire doctor` says why and how to enable one"
            ))
        })?,
    };
    if !rung.works {
        return Err(MapError::Pmap(format!(
            "pmap {:?} does not work here: {}; {}",
            rung.kind.name(),
            rung.reason,
            rung.remedy
        )));
    }
    let tracking = match wanted {
        Some(name) => rung.trackings.iter().find(|tracking| tracking.name() == name),
        None => rung.trackings.first(),
    };
    match tracking {
        Some(tracking) => Ok((rung.kind, *tracking)),
        None if !writable && wanted.is_none() => Ok((rung.kind, Tracking::None)),
        None => {
            let known = rung.trackings.iter().map(|tracking| tracking.name()).collect::<Vec<_>>().join(", ");
            Err(MapError::Pmap(format!(
                "pmap {:?} cannot notice writes {}: here it knows {known:?}; use another pmap",
                rung.kind.name(),
                wanted.map_or("to a writable mapping".into(), |name| format!("by {name:?}"))
            )))
        }
    }
}

/// Bytes of a granule, whole hardware pages.
///
/// Asked for: these, or the whole store where that is less. By default:
/// - of a store that reads any length equally well, [`GRANULE_FAST`], or [`GRANULE_SLOW`] where each read
///   has to wait; but no more than the part [`GRANULE_SHARE`] of the budget, rounded up;
/// - of frames that are whole hardware pages, as many as [`GRANULE_ZSTD_LEAST`] holds, one at least;
/// - of other frames, one, rounded up;
/// - and a power of two times that, where more than `most` would be resident at once.
///
/// # Errors
/// `Invalid` when asked for what is not a positive number of hardware pages.
fn granule(
    store: &dyn Store,
    asked: Option<ByteCount>,
    budget: ByteCount,
    most: Option<u64>,
) -> Result<ByteCount, MapError> {
    let page = page_bytes() as u64;
    let grain = store.grain().0.max(1);
    if let Some(asked) = asked {
        if asked.0 == 0 || !asked.0.is_multiple_of(page) {
            return Err(MapError::Invalid(format!(
                "a granule of {asked} bytes is not a positive multiple of the page size, {page}"
            )));
        }
        // A larger one than the whole is the whole.
        let whole = store.size().checked_round_up(ByteCount(page)).unwrap_or(asked).0.max(page);
        return Ok(ByteCount(asked.0.min(whole)));
    }
    let rounded = |bytes: u64| bytes.div_ceil(page) * page;
    let few = |bytes: u64| {
        let granules = budget.0.min(store.size().0).div_ceil(bytes);
        let times = most.map_or(1, |most| granules.div_ceil(most).max(1).next_power_of_two());
        ByteCount(bytes * times)
    };
    if grain == 1 {
        let best = if store.is_slow() { GRANULE_SLOW } else { GRANULE_FAST };
        return Ok(few(rounded(best.0.min((budget.0 / GRANULE_SHARE).max(1)))));
    }
    let frames = if grain.is_multiple_of(page) { (GRANULE_ZSTD_LEAST / grain).max(1) } else { 1 };
    Ok(few(rounded(frames * grain)))
}

#[cfg(test)]
mod tests;
