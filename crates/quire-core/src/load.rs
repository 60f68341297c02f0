//! Loads pages that their caller owns (LOADING) and moves them on.
//!
//! A page that cannot be filled: the object is marked, the error goes to every thread that
//! touches it from then on, and the page shows 0xFF filler (NaN, −1, invalid UTF-8: never
//! plausible zeros) for the rest of the C call that touched it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::buffers;
use crate::counters::{STALL_NS, add, count};
use crate::errors::{FaultCode, StoreError};
use crate::interrupt;
use crate::memory_object::Condition;
use crate::page::{AHEAD, BAD, COVERED, DIRTY, HUGE, PageState, REFERENCED};
use crate::page_cache::PAGE_CACHE;
use crate::pageout;
use crate::pmap::Tracking;
use crate::pmap::kernel::Region;
use crate::space::{MapEntry, SPACE};
use crate::sys::memory::{self, HUGE_BYTES, Range, Touch};
use crate::sys::thread;
use crate::units::{ByteCount, PageIndex};
use crate::watermark;

const FILLER: u8 = 0xFF;
const INSTALL_TRIES: u32 = 50;

/// Loads a page that a thread touched at `started_ns` of the monotonic clock. False only when not
/// even filler could be installed.
pub fn load(entry: &MapEntry, page: PageIndex, touch: Touch, started_ns: u64) -> bool {
    let object = &entry.object;
    let cost = object.load_cost();
    let protection = Protection::of(entry, page, touch);
    if bring_back(entry, page, &protection) {
        note_resolved(entry, started_ns);
        return true;
    }
    let reserved = pageout::reserve(entry, page, cost);
    let room_ns = thread::now_ns();
    let filled = reserved
        .inspect(|()| watermark::note_load(entry))
        .inspect_err(|_| PAGE_CACHE.charge(&object.account, cost)) // what shows the error must fit
        .and_then(|()| {
            // Before it is open to writes: the thread may have written, and called sync, before the
            // page is counted as resident.
            object.pages.mark(page, protection.flags & DIRTY, 0);
            fill_and_install(entry, page, 1, protection.protected).map_err(|stopped| stopped.error)
        });
    let done = match filled {
        Ok(huge) => {
            finish_filled(entry, page, REFERENCED | protection.flags | huge, cost);
            true
        }
        Err(error) => {
            object.pages.mark(page, 0, DIRTY);
            cannot_fill(entry, page, error, cost)
        }
    };
    let now_ns = note_resolved(entry, started_ns);
    if now_ns.saturating_sub(room_ns) > STALL_NS {
        count(&object.counters.store_stalls);
        add(&object.counters.store_stall_ns, now_ns - room_ns);
    }
    done
}

/// Counts a fault that was resolved; returns the time now.
fn note_resolved(entry: &MapEntry, started_ns: u64) -> u64 {
    let now_ns = thread::now_ns();
    count(&entry.object.counters.faults);
    entry.object.counters.fault_latency.record(now_ns.saturating_sub(started_ns));
    now_ns
}

/// Shows a page again that stands by. False where it does not, or where there is no room: to wait for
/// room with its frame in hand could be to wait for itself, so it is dropped then.
fn bring_back(entry: &MapEntry, page: PageIndex, protection: &Protection) -> bool {
    let object = &entry.object;
    let Some(frame) = object.standby.take(page) else { return false };
    let room = object.granule;
    let mut shown = object.condition() == Condition::Healthy && pageout::try_reserve(entry, room);
    if shown {
        watermark::note_load(entry);
        object.pages.mark(page, protection.flags & DIRTY, 0); // as in `load`
        let bytes = &frame.bytes()[..object.page_len(page)];
        shown = install(entry, page, bytes, protection.protected).is_ok();
        if !shown {
            object.pages.mark(page, 0, DIRTY);
            entry.pmap.get().remove(&[entry.page_range(page)]);
            PAGE_CACHE.release(&object.account, room);
        }
    }
    object.standby.give(frame);
    if shown {
        count(&object.counters.second_chance_hits);
        make_resident(entry, page, REFERENCED | protection.flags, room);
    }
    shown
}

/// How a page is installed.
struct Protection {
    /// The next write is noticed.
    protected: bool,
    /// Flags of the page.
    flags: u32,
}

impl Protection {
    /// What a touch asks for: a page that is about to be written is left open to it where all of
    /// it is then taken to be dirty in any case.
    fn of(entry: &MapEntry, page: PageIndex, touch: Touch) -> Self {
        let asynchronous = entry.pmap.get().tracking() == Tracking::WpAsync;
        let whole = !asynchronous || entry.object.page_len(page) == memory::page_bytes();
        let open = entry.writable && touch == Touch::Write && whole;
        let flags = if open && !asynchronous { DIRTY } else { 0 };
        Protection { protected: entry.writable && !open, flags }
    }
}

/// Loads `pages` from `first` on ahead of need, by one read. Gives up without a word when there is
/// no room or an error: a thread that needs a page of them meets the error itself.
pub fn load_ahead(entry: &MapEntry, first: PageIndex, pages: u64) {
    load_run(entry, first, pages, None);
}

/// Loads a huge page around a page that a thread touched at `started_ns`, all of which the caller owns.
/// False when that page was not loaded: the caller owns it still, and none of the others.
pub fn load_block(entry: &MapEntry, block: std::ops::Range<u64>, page: PageIndex, started_ns: u64) -> bool {
    let loaded = load_run(entry, PageIndex(block.start), block.end - block.start, Some(page));
    if loaded {
        note_resolved(entry, started_ns);
    }
    loaded
}

/// As [`load_ahead`]; false when the page that was `touched` was not loaded, which is not given up.
fn load_run(entry: &MapEntry, first: PageIndex, pages: u64, touched: Option<PageIndex>) -> bool {
    let object = &entry.object;
    let run = (first.0..first.0 + pages).map(PageIndex);
    let cost = object.run_cost(pages);
    // Evicted between the look and the claim.
    run.clone().filter_map(|page| object.standby.take(page)).for_each(|frame| object.standby.give(frame));
    let wanted = !entry.is_closing() && object.condition() == Condition::Healthy;
    if !wanted || !pageout::try_reserve(entry, cost) {
        run.filter(|page| Some(*page) != touched).for_each(|page| entry.give_up(page));
        return false;
    }
    watermark::note_load(entry);
    let filled = fill_and_install(entry, first, pages, entry.writable);
    // Each page keeps its own share; what the buffers took is given back with the first.
    let share = ByteCount(object.granule.0);
    PAGE_CACHE.release(&object.account, ByteCount(cost.0 - pages * share.0));
    let (installed, huge, stop) = match filled {
        Ok(huge) => (pages, huge, None),
        Err(Stopped { installed, error }) => (installed, 0, Some(error)),
    };
    // What is installed stays: a thread may have written to it.
    for page in run.clone().take(installed as usize) {
        if Some(page) == touched {
            finish_filled(entry, page, REFERENCED | huge, share);
        } else {
            count(&object.counters.readahead_fills);
            finish_filled(entry, page, AHEAD | huge, share);
        }
    }
    let mut loaded = true;
    for page in run.skip(installed as usize) {
        if Some(page) == touched {
            PAGE_CACHE.release(&object.account, share);
            loaded = false;
        } else if let Some(error) =
            stop.as_ref().filter(|_| page.0 == first.0 + installed && is_begun(entry, page))
        {
            cannot_fill(entry, page, error.clone(), share);
        } else {
            entry.pmap.get().remove(&[entry.page_range(page)]);
            entry.give_up(page);
            PAGE_CACHE.release(&object.account, share);
        }
    }
    loaded
}

/// Whether a part of a page that could not be installed as a whole is open to writes, which its removal
/// would lose.
fn is_begun(entry: &MapEntry, page: PageIndex) -> bool {
    let hidden = entry.pmap.get().absent_is_segv();
    entry.writable && !hidden && memory::is_present(entry.page_range(page).start) == Some(true)
}

/// Why not all pages of a run were installed.
struct Stopped {
    /// Those that were, from the first on.
    installed: u64,
    error: StoreError,
}

/// Reads `pages` from `first` on and installs them; their states do not change. Returns further flags
/// for them.
fn fill_and_install(entry: &MapEntry, first: PageIndex, pages: u64, protected: bool) -> Result<u32, Stopped> {
    let object = &entry.object;
    let offset = first.offset(object.granule);
    let at_once = |error| Stopped { installed: 0, error };
    if let Some(failure) = object.failure() {
        return Err(at_once(failure.error));
    }
    let len = ByteCount((pages * object.granule.0).min(object.mapped.0 - offset.0)).as_usize();
    if let Some(moved) = fill_and_move(entry, first, len) {
        return moved;
    }
    let mut buffer = buffers::take(ByteCount(pages * object.granule.0))
        .map_err(|error| at_once(StoreError::new(FaultCode::Io, offset, error.to_string())))?;
    let bytes = buffer.slice_mut(len);
    let started_ns = thread::now_ns();
    let filled = object.pager.get_page(offset, bytes, &object.counters).map_err(at_once);
    if pages == 1 && filled.is_ok() {
        object.note_fill(thread::now_ns().saturating_sub(started_ns));
    }
    let installed = filled.and_then(|()| install_from(entry, first, bytes, 0, protected));
    buffers::give(buffer);
    installed.map(|()| 0)
}

/// As [`fill_and_install`], for a range of whole huge pages: they are filled elsewhere and moved in, which
/// costs microseconds where a copy of so many pages costs most of a millisecond. None where that cannot be
/// done.
fn fill_and_move(entry: &MapEntry, first: PageIndex, len: usize) -> Option<Result<u32, Stopped>> {
    let object = &entry.object;
    let start = entry.page_range(first).start;
    if !len.is_multiple_of(HUGE_BYTES) || !start.is_multiple_of(HUGE_BYTES) {
        return None;
    }
    let frames = entry.huge_frames()?;
    let mut staging = frames.take_staging(len).ok()?;
    let offset = first.offset(object.granule);
    let filled = object.pager.get_page(offset, staging.slice_mut(len), &object.counters);
    let installed = filled.map_err(|error| Stopped { installed: 0, error }).and_then(|()| {
        let moved = frames.move_in(start, &mut staging, len);
        let rest = moved / object.granule.as_usize() * object.granule.as_usize();
        install_from(entry, first, staging.slice_mut(len), rest, false)?;
        Ok(if moved == len && object.block_of(first).is_some() { HUGE } else { 0 })
    });
    frames.give_scratch(staging, len);
    Some(installed)
}

/// Installs the pages from `first` on that `bytes` holds; those in the first `done` bytes are.
fn install_from(
    entry: &MapEntry,
    first: PageIndex,
    bytes: &[u8],
    done: usize,
    protected: bool,
) -> Result<(), Stopped> {
    let granule = entry.object.granule.as_usize();
    for (index, chunk) in bytes.chunks(granule).enumerate().skip(done / granule) {
        install(entry, PageIndex(first.0 + index as u64), chunk, protected)
            .map_err(|error| Stopped { installed: index as u64, error })?;
    }
    Ok(())
}

fn finish_filled(entry: &MapEntry, page: PageIndex, flags: u32, cost: ByteCount) {
    let object = &entry.object;
    count(&object.counters.fills);
    add(&object.counters.fill_bytes, object.page_len(page) as u64);
    make_resident(entry, page, flags, cost);
}

/// Whether `page` lies in an aligned range of granules that could be one huge page and are all
/// resident.
pub fn completes_huge_page(entry: &MapEntry, page: PageIndex) -> bool {
    let resident = |page: u64| entry.object.pages.state(PageIndex(page)) == PageState::Resident;
    let small = entry.huge && !entry.object.pages.has(page, HUGE);
    small && entry.object.block_of(page).is_some_and(|block| block.into_iter().all(resident))
}

/// Makes a huge page of the granules around `page`: scattered small pages cost a reader of the
/// whole array up to twice the time, as measured by `bench/hot_rows.py`.
#[allow(unsafe_code)]
pub fn collapse(entry: &MapEntry, page: PageIndex) {
    if let Some(block) = entry.object.block_of(page).filter(|_| completes_huge_page(entry, page)) {
        let start = entry.page_range(PageIndex(block.start)).start;
        // SAFETY: part of our own mapping, which the task's guard keeps mapped.
        unsafe { memory::collapse(Range { start, len: memory::HUGE_BYTES }) }
    }
}

/// The last resort: plain memory full of filler in place of a range of ours, out of reach of the
/// pmap until [`pageout::hide`] makes it inaccessible.
#[allow(unsafe_code)]
pub fn cover_with_filler(range: Range) -> bool {
    // SAFETY: a range of our own mapping that holds no data (not resident, owned by the caller);
    // the memory is fresh, writable and as long as the fill.
    unsafe {
        memory::reserve_at(range, libc::PROT_READ | libc::PROT_WRITE).is_ok_and(|()| {
            std::ptr::write_bytes(range.start as *mut u8, FILLER, range.len);
            true
        })
    }
}

fn install(entry: &MapEntry, page: PageIndex, bytes: &[u8], protected: bool) -> Result<(), StoreError> {
    let range = entry.page_range(page);
    for _ in 0..INSTALL_TRIES {
        match entry.pmap.get().install(range.start, bytes, protected) {
            Ok(()) => return Ok(()),
            Err(libc::ENOMEM) => {
                // A limit outside of our budgets (memory of a cgroup, map entries): give back what
                // we can.
                pageout::give_back(entry, ByteCount(bytes.len() as u64 * 4));
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(errno) => return Err(refused(entry, page, errno)),
        }
    }
    Err(refused(entry, page, libc::ENOMEM))
}

fn refused(entry: &MapEntry, page: PageIndex, errno: i32) -> StoreError {
    StoreError {
        code: FaultCode::Io,
        offset: page.offset(entry.object.granule),
        errno: Some(errno),
        message: format!("the kernel refused a page: {}", crate::sys::errno_message(errno)),
        part: None,
    }
}

fn make_resident(entry: &MapEntry, page: PageIndex, flags: u32, cost: ByteCount) {
    let object = &entry.object;
    if object.pages.finish(page, PageState::Resident, flags) {
        // They may have met the page write-protected, after the installation had woken them.
        entry.pmap.get().wake(entry.page_range(page));
    }
    // The first granule of a huge page stands for all of it.
    let stands = flags & HUGE == 0 || object.block_of(page).is_none_or(|block| block.start == page.0);
    if stands {
        let mut policy = object.policy.lock();
        policy.insert(page);
        object.note_policy(&**policy);
    }
    PAGE_CACHE.release(&object.account, ByteCount(cost.0 - object.page_len(page) as u64));
}

/// A page on demand that cannot be filled: the object is marked, the page poisoned or filled with
/// filler.
fn cannot_fill(entry: &MapEntry, page: PageIndex, error: StoreError, cost: ByteCount) -> bool {
    let pmap = entry.pmap.get();
    pmap.remove(&[entry.page_range(page)]); // what an installation that failed half-way left
    if !entry.object.fail(page, error) {
        entry.give_up(page);
        PAGE_CACHE.release(&entry.object.account, cost);
        return true; // the instruction runs again
    }
    if pmap.faults_are_signals() || pmap.poison(entry.page_range(page)).is_err() {
        return install_filler(entry, page, cost);
    }
    entry.object.pages.finish_poisoned(page);
    PAGE_CACHE.release(&entry.object.account, cost);
    list_filler(entry, page);
    pmap.wake(entry.page_range(page));
    true
}

/// Lists a page that shows filler or poison; if the interrupt it stands for was acted on
/// meanwhile, it goes again.
fn list_filler(entry: &MapEntry, page: PageIndex) {
    entry.object.filler.lock().push(page);
    if entry.object.condition() == Condition::Healthy {
        drop_filler(entry);
    }
}

/// Installs filler in a page that the caller owns, charged with `cost`; false when not even that
/// is possible.
pub fn install_filler(entry: &MapEntry, page: PageIndex, cost: ByteCount) -> bool {
    let object = &entry.object;
    let refusal = show_filler(entry, page).err();
    let flags = if refusal.is_none() { BAD | REFERENCED } else { BAD | REFERENCED | COVERED };
    if let Some(error) = refusal {
        // What makes pages visible would show other memory than the pmap's from here on: no data any more.
        object.covered.store(true, Ordering::Release);
        object.fail(page, error);
        if !cover_with_filler(entry.page_range(page)) {
            entry.give_up(page);
            PAGE_CACHE.release(&object.account, cost);
            return false;
        }
    }
    make_resident(entry, page, flags, cost);
    list_filler(entry, page);
    true
}

fn show_filler(entry: &MapEntry, page: PageIndex) -> Result<(), StoreError> {
    let object = &entry.object;
    let none = |_| refused(entry, page, libc::ENOMEM);
    if object.covered.load(Ordering::Acquire) {
        return Err(refused(entry, page, libc::EIO));
    }
    let mut buffer = buffers::take(object.granule).map_err(none)?;
    let bytes = buffer.slice_mut(object.page_len(page));
    bytes.fill(FILLER);
    let shown = install(entry, page, bytes, false);
    buffers::give(buffer);
    shown
}

/// The interpreter has acted on an interrupt: filler goes, and pages can be had again.
pub fn resume() {
    interrupt::clear();
    for (entry, _in_flight) in SPACE.all() {
        if entry.object.resume(true) {
            drop_filler(&entry);
        }
    }
}

/// An error of this mapping was delivered: the filler goes, so that the next touch, by this thread
/// or another, meets the error again rather than the filler, or, where what stood in the way has
/// gone, the page.
pub fn delivered(mapping: u64) {
    for (entry, _in_flight) in SPACE.all() {
        if entry.object.id == mapping {
            entry.object.resume(false);
            drop_filler(&entry);
        }
    }
    SPACE.kernel_mut().values_mut().filter(|region| region.id == mapping).for_each(Region::delivered);
}

fn drop_filler(entry: &MapEntry) {
    let pages = &entry.object.pages;
    let listed = std::mem::take(&mut *entry.object.filler.lock());
    if !entry.armed.load(Ordering::Acquire) {
        // Of the parent of this process: out of reach again, so that the next touch is told too.
        listed.iter().for_each(|page| pageout::hide(entry.page_range(*page)));
        return;
    }
    let mut filler = Vec::new();
    for page in listed {
        if pages.has(page, BAD) && pages.claim(page, PageState::Resident, PageState::Evicting) {
            filler.push((page, entry.page_range(page)));
        } else if pages.claim(page, PageState::Poisoned, PageState::Loading) {
            entry.pmap.get().remove(&[entry.page_range(page)]);
            entry.give_up(page);
        }
    }
    let gone: std::collections::HashSet<PageIndex> = filler.iter().map(|(page, _)| *page).collect();
    entry.object.policy.lock().retain(&mut |page| !gone.contains(&page));
    pageout::remove_claimed(entry, &filler);
}

#[cfg(test)]
mod tests;
