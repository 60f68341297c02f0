//! The one way a fault is resolved.
//!
//! A fault arrives either at a handler thread (`serve`, pmap `uffd`) or in a signal handler of the
//! faulting thread (`on_signal`: pmap `inline`, poisoned pages, writes to a read-only mapping, the
//! child of a fork). Both find the map entry and look at the page's state; the one that moves the
//! page from ABSENT to LOADING owns it and loads it, all others wait for that page only.
//!
//! Loading itself, and what a page shows that cannot be loaded, is in `load.rs`.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::counters::{add, count};
use crate::errors::{FaultCode, StoreError};
use crate::fill::{Task, Work};
use crate::interrupt;
use crate::load;
use crate::memory_object::Condition;
use crate::page::{DIRTY, PageState, REFERENCED};
use crate::page_cache::PAGE_CACHE;
use crate::pageout;
use crate::pmap::kernel::{self, Mended};
use crate::readahead::{Fault, Limits};
use crate::runtime;
use crate::space::{MapEntry, SPACE};
use crate::sys::memory::{self, Touch};
use crate::sys::thread;
use crate::units::{ByteCount, ByteOffset, PageIndex};

/// One look at a page that another thread moves on; it is woken sooner.
const WAIT: Duration = Duration::from_millis(50);
/// Filled ahead at most: so many granules, or so many of the store's runs when that is more.
const WINDOW_MAX: u64 = 16;
const RUNS_MAX: u64 = 8;
/// The same of granules in a row, in runs that may be huge pages.
const ROW_RUNS: u64 = 4;
/// Granules evicted when a write cannot be let through for want of map entries.
const REFUSED_GIVES: u64 = 16;
/// Touches of one address in a row that raise SIGSEGV though its page can be read: a write, where the
/// machine does not say.
const REPEATED: u32 = 8;
/// Faults in a row at one address of a kernel mapping for which no reason is to be found.
const REPEATED_KERNEL: u32 = 1000;

/// Resolves a fault on behalf of a `thread` that waits in the kernel. Called by handler threads;
/// `may_wait` says that another of them is free, so that this one may wait for a slow store.
pub fn serve(address: usize, touch: Touch, thread: u64, started_ns: u64, may_wait: bool) {
    // Not found: it was unmapped meanwhile, which woke the thread.
    let Some((entry, in_flight)) = SPACE.find(address) else {
        return;
    };
    let (object, page) = (&entry.object, entry.page_at(address));
    loop {
        match object.pages.state(page) {
            PageState::Absent => {
                if !object.pages.claim(page, PageState::Absent, PageState::Loading) {
                    continue;
                }
                let block = fill_ahead(&entry, address, thread, true);
                if block.is_some_and(|block| load::load_block(&entry, block, page, started_ns)) {
                    return;
                }
                let waits = object.pager.store().is_slow()
                    && object.condition() == Condition::Healthy
                    && !object.standby.holds(page);
                if waits && !may_wait {
                    let work = Work::Demand { page, touch, started_ns };
                    entry.fill.get().submit(Task { entry: Arc::clone(&entry), work, in_flight });
                } else {
                    load::load(&entry, page, touch, started_ns);
                    collapse_later(&entry, page);
                }
                return;
            }
            PageState::Loading => {
                if object.pages.count_waiter(page, PageState::Loading) {
                    count(&object.counters.waits);
                    fill_ahead(&entry, address, thread, false);
                    return; // the owner wakes the thread
                }
            }
            PageState::Resident if touch == Touch::Write && entry.writable => {
                if note_write(&entry, page) {
                    return;
                }
            }
            PageState::Resident | PageState::Poisoned => {
                entry.pmap.get().wake(entry.page_range(page));
                return;
            }
            state @ (PageState::Evicting | PageState::Held) => object.pages.wait_left(page, state, WAIT),
        }
    }
}

/// A write to a resident page of a writable mapping, of which it may be the first: the page is dirty
/// from here on, and open to writes. False when the page was not free to be held.
pub fn note_write(entry: &MapEntry, page: PageIndex) -> bool {
    let pages = &entry.object.pages;
    if !pages.claim(page, PageState::Resident, PageState::Held) {
        return false;
    }
    count(&entry.object.counters.write_faults);
    // Before it is open: the thread may write, and call sync, before the page is let go.
    pages.mark(page, DIRTY, 0);
    // Fails where the process has no map entry left (mprotect): the write faults again, and by then
    // pages that were evicted have given some back.
    let opened = entry.pmap.get().protect(entry.page_range(page), false);
    pages.keep(page, DIRTY | REFERENCED);
    if opened.is_err() {
        pageout::give_back(entry, ByteCount(entry.object.granule.0 * REFUSED_GIVES));
    }
    true
}

/// Resolves a fault that arrived as a signal in the faulting thread; false when the address is not
/// quire's, or nothing can be done.
pub fn on_signal(signal: i32, address: usize, touch: Touch) -> bool {
    let started_ns = thread::now_ns();
    let Some((entry, _in_flight)) = SPACE.find(address) else {
        return on_kernel_signal(signal, address, touch);
    };
    if !entry.armed.load(Ordering::Acquire) {
        return arm_or_fill(&entry, address);
    }
    let page = entry.page_at(address);
    let pmap = entry.pmap.get();
    // What filler covered is inaccessible once it is gone.
    let hidden = signal == libc::SIGSEGV && entry.object.covered.load(Ordering::Acquire);
    let (signals, segv) = (pmap.faults_are_signals() || hidden, pmap.absent_is_segv() || hidden);
    let stray = signal == libc::SIGSEGV && touch != Touch::Read && !entry.writable;
    let mended = if segv && signal != libc::SIGSEGV {
        false // the kernel's own: memory that has gone bad
    } else if segv && stray {
        load_or_allow(&entry, page, address, touch, started_ns)
    } else if stray {
        allow_stray_write(&entry, page, address)
    } else if signals {
        resolve_here(&entry, address, touch, started_ns)
    } else if signal == libc::SIGSEGV {
        true // the range was inaccessible when it was touched and has been made ready since
    } else {
        unpoison(&entry, page)
    };
    if let Some(failure) = entry.object.failure() {
        interrupt::raise_here(&failure);
    }
    mended
}

/// The same of a range that the kernel pages.
fn on_kernel_signal(signal: i32, address: usize, touch: Touch) -> bool {
    let (last, times) = REPEAT.get();
    let times = if last == address { times + 1 } else { 1 };
    REPEAT.set((address, times));
    let fault = kernel::Fault { signal, address, touch, insists: times > REPEATED_KERNEL };
    let mut answer = None;
    let mended = loop {
        match mend_kernel(fault, answer.take().as_ref()) {
            Ok(mended) => break mended,
            Err(question) => answer = Some(question.ask()),
        }
    };
    match mended {
        // What the thread was told of the page before has been delivered since: it gets on.
        Mended::Told(error) => {
            REPEAT.set((address, 0));
            kernel::tell(&error);
            true
        }
        // Not a page that cannot be had, but for instance code that cannot be executed.
        _ if times > 2 * REPEATED_KERNEL => false,
        Mended::No => false,
        Mended::Again => true,
        Mended::ToldAgain(error) => {
            kernel::tell(&error);
            true
        }
    }
}

fn mend_kernel(fault: kernel::Fault, answer: Option<&kernel::Answer>) -> Result<Mended, kernel::Question> {
    let mut regions = SPACE.kernel_mut();
    let Some(start) = kernel::arena::region_at(&mut regions, fault.address).map(|region| region.range.start)
    else {
        return Ok(Mended::No);
    };
    let gap = kernel::arena::gap_at(&regions, start, fault.address);
    regions.get_mut(&start).map_or(Ok(Mended::No), |region| region.mend(fault, gap, answer))
}

fn resolve_here(entry: &Arc<MapEntry>, address: usize, touch: Touch, started_ns: u64) -> bool {
    let (object, page) = (&entry.object, entry.page_at(address));
    let mut waited = false;
    loop {
        match object.pages.state(page) {
            PageState::Absent => {
                if object.pages.claim(page, PageState::Absent, PageState::Loading) {
                    let block = fill_ahead(entry, address, thread::key(), true);
                    if block.is_some_and(|block| load::load_block(entry, block, page, started_ns)) {
                        return true;
                    }
                    let loaded = load::load(entry, page, touch, started_ns);
                    collapse_later(entry, page);
                    return loaded;
                }
            }
            PageState::Resident if touch != Touch::Read && entry.writable => {
                if note_write(entry, page) {
                    return true;
                }
            }
            PageState::Resident => return true,
            state => {
                if !waited && state == PageState::Loading {
                    waited = true;
                    count(&object.counters.waits);
                    fill_ahead(entry, address, thread::key(), false);
                }
                object.pages.wait_left(page, state, WAIT);
            }
        }
    }
}

/// Puts filler in place of poison, when all threads that waited for the page have met it: one that
/// is slow to wake would otherwise read filler and not be told.
fn unpoison(entry: &MapEntry, page: PageIndex) -> bool {
    let object = &entry.object;
    let mut met = false;
    loop {
        match object.pages.state(page) {
            PageState::Poisoned if !met => {
                met = true;
                if object.pages.met_poison(page) > 0 {
                    object.pages.wait_left(page, PageState::Poisoned, WAIT);
                }
            }
            PageState::Poisoned => {
                if object.pages.claim(page, PageState::Poisoned, PageState::Loading) {
                    let cost = object.load_cost();
                    if pageout::reserve(entry, page, cost).is_err() {
                        PAGE_CACHE.charge(&object.account, cost);
                    }
                    entry.pmap.get().remove(&[entry.page_range(page)]);
                    return load::install_filler(entry, page, cost);
                }
            }
            PageState::Resident | PageState::Absent => return true, // the instruction runs again
            state => object.pages.wait_left(page, state, WAIT),
        }
    }
}

thread_local! {
    /// The address of this thread's last fault for which nothing was to be done, and how often in a
    /// row.
    static REPEAT: Cell<(usize, u32)> = const { Cell::new((0, 0)) };
}

/// A touch, not known to be a read, of a read-only mapping whose absent pages raise SIGSEGV too: the
/// page is loaded first (filler, after a write), and becomes writable when it is there and the fault
/// comes again. Where the machine does not say what the touch was, a read that met the page just
/// before it came looks the same as a write; but that does not happen time and again.
fn load_or_allow(
    entry: &Arc<MapEntry>,
    page: PageIndex,
    address: usize,
    touch: Touch,
    started_ns: u64,
) -> bool {
    let pages = &entry.object.pages;
    if pages.state(page) != PageState::Resident {
        REPEAT.set((0, 0));
        if touch == Touch::Write {
            fail_stray_write(entry, page, address);
        }
        return resolve_here(entry, address, touch, started_ns);
    }
    let (last, times) = REPEAT.get();
    REPEAT.set((address, if last == address { times + 1 } else { 1 }));
    if touch == Touch::Unknown && REPEAT.get().1 < REPEATED {
        return true;
    }
    // Held, so that it is not evicted meanwhile: an absent page that can be touched reads as zeros.
    if !pages.claim(page, PageState::Resident, PageState::Held) {
        return true;
    }
    let allowed = allow_stray_write(entry, page, address);
    pages.keep(page, 0);
    allowed || pageout::evict(entry, ByteCount(entry.object.granule.0 * REFUSED_GIVES)).0.0 > 0
}

/// A store to a read-only mapping by code that ignored the array's flag: the mapping fails, and
/// the page becomes writable so that the thread can go on to the exception.
#[allow(unsafe_code)]
fn allow_stray_write(entry: &MapEntry, page: PageIndex, address: usize) -> bool {
    fail_stray_write(entry, page, address);
    // A whole granule: the kernel installs pages only within one of its own map entries.
    // SAFETY: a granule of our own mapping; only its protection changes.
    unsafe { memory::protect(entry.page_range(page), libc::PROT_READ | libc::PROT_WRITE) }.is_ok()
}

fn fail_stray_write(entry: &MapEntry, page: PageIndex, address: usize) {
    let offset = ByteOffset((address - entry.range.start) as u64);
    let message = "a write to a mapping that was opened with mode \"r\" (read-only)";
    entry.object.fail(page, StoreError::new(FaultCode::Protection, offset, message));
}

/// In the child of a fork: makes the range ready; where that is refused, the touch gets filler and
/// the error.
#[allow(unsafe_code)]
fn arm_or_fill(entry: &Arc<MapEntry>, address: usize) -> bool {
    let message = if entry.object.pager.swap().is_some() {
        "anonymous memory and changes of mode \"c\" are not inherited by the child of a fork: make them \
         in the child, and hand data over in a file, or in a copy (numpy.array) made before the fork"
            .to_string()
    } else if entry.writable {
        "a writable mapping is not inherited by the child of a fork, which would not see what its parent \
         writes: open it again in the child"
            .to_string()
    } else {
        match runtime::rearm() {
            Ok(()) => return true,
            Err(error) => format!("the mapping could not be made ready in the child of a fork: {error}"),
        }
    };
    let offset = ByteOffset((address - entry.range.start) as u64);
    let page = entry.page_at(address);
    entry.object.fail(page, StoreError::new(FaultCode::Io, offset, message));
    let filled = load::cover_with_filler(entry.page_range(page));
    entry.object.filler.lock().push(page); // it goes when the error was delivered
    if let Some(failure) = entry.object.failure() {
        interrupt::raise_here(&failure);
    }
    filled
}

/// Tells readahead of a fault, on a page that was `missing` or on its way, and hands what it asks for to
/// the fill threads, in runs that are best loaded at once. Returns the run that makes a huge page with the
/// missing one, all of it claimed, for the caller to load.
fn fill_ahead(
    entry: &Arc<MapEntry>,
    address: usize,
    thread: u64,
    missing: bool,
) -> Option<std::ops::Range<u64>> {
    let object = &entry.object;
    let granule = object.granule.0;
    let run = entry.run_pages();
    let most = object.budget().0 / (8 * granule);
    let window = (RUNS_MAX * entry.store_run_pages()).max(WINDOW_MAX).min(most);
    let row = window.max((ROW_RUNS * run).min(most));
    let limits = Limits { granule, window, row, end: object.page_count().0, unit: run };
    let fault = Fault { offset: (address - entry.range.start) as u64, thread, missing };
    let ahead = object.readahead.lock().note(fault, limits);
    add(&object.counters.readahead_hits, ahead.hits);
    add(&object.counters.readahead_wasted, ahead.wasted);
    let page = entry.page_at(address).0;
    let block = object.block_of(PageIndex(page)).filter(|_| missing && entry.loads_huge_pages());
    let mut claimed = None;
    for run in ahead.runs(run).take_while(|_| !entry.is_closing()) {
        let rest = block.as_ref().filter(|block| {
            let both = run.start.min(page)..run.end.max(page + 1);
            **block == both && run.end - run.start + 1 == both.end - both.start
        });
        if submit_ahead(entry, run, rest.is_some()) {
            claimed = rest.cloned();
        }
    }
    claimed
}

/// Has those of a run of pages filled that are absent. Where the caller loads the run if it gets `all` of
/// it, they are only claimed then; true in that case.
fn submit_ahead(entry: &Arc<MapEntry>, mut run: std::ops::Range<u64>, mut all: bool) -> bool {
    let object = &entry.object;
    while run.start < run.end {
        let claimed = (run.clone()).take_while(|page| object.claim_ahead(PageIndex(*page))).count() as u64;
        if all && run.start + claimed == run.end {
            return true;
        }
        all = false;
        if claimed > 0 {
            let work = Work::Ahead { first: PageIndex(run.start), count: claimed };
            let in_flight = object.enter();
            entry.fill.get().submit(Task { entry: Arc::clone(entry), work, in_flight });
        }
        run.start += claimed.max(1);
    }
    false
}

/// Has the huge page around a new resident page made, when it was the last that was missing.
fn collapse_later(entry: &Arc<MapEntry>, page: PageIndex) {
    if load::completes_huge_page(entry, page) {
        let in_flight = entry.object.enter();
        let work = Work::Collapse { page };
        entry.fill.get().submit(Task { entry: Arc::clone(entry), work, in_flight });
    }
}
