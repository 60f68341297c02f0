//! What a program may ask of pages by calls: in (`populate`), in for good (`pin`), out (`evict`), and
//! their bytes (`read`, `write`).

use std::ops::Range as Span;
use std::sync::Arc;
use std::time::Duration;

use crate::counters::add;
use crate::errors::{MapError, StoreError};
use crate::fault;
use crate::fill::{Task, Work};
use crate::load;
use crate::memory_object::MemoryObject;
use crate::page::{DIRTY, HUGE, PINNED, PageState, REFERENCED};
use crate::page_cache::PAGE_CACHE;
use crate::pageout;
use crate::pmap::Tracking;
use crate::space::MapEntry;
use crate::sys::memory::{Range, Touch};
use crate::sys::thread;
use crate::units::{ByteCount, ByteOffset, PageIndex};

const WAIT: Duration = Duration::from_millis(50);
/// Bytes asked of the fill threads at once, as a part of the budget.
const WINDOW_SHARE: u64 = 8;
/// Pages evicted at once.
const BATCH: usize = 256;

/// The granules that hold bytes of a span.
pub fn pages_of(object: &MemoryObject, span: Span<u64>) -> Span<u64> {
    span.start / object.granule.0..span.end.min(object.mapped.0).div_ceil(object.granule.0)
}

/// Has the pages of a span resident, by long reads in the fill threads. What does not fit the budget
/// pushes out what came before.
///
/// # Errors
/// Why a page could not be had; the mapping is then marked as by a touch.
pub fn populate(entry: &Arc<MapEntry>, span: Span<u64>) -> Result<(), StoreError> {
    let object = &entry.object;
    let pages = pages_of(object, span);
    let granule = object.granule.0;
    let run = entry.run_pages().max((1 << 20) / granule);
    let window = (object.budget().0 / (WINDOW_SHARE * granule)).clamp(1, 64 * run);
    let mut first = pages.start;
    while first < pages.end {
        let end = pages.end.min(first + window);
        submit(entry, first..end, run);
        (first..end).try_for_each(|page| bring_in(entry, PageIndex(page), Touch::Read))?;
        first = end;
    }
    Ok(())
}

/// Hands the absent pages of a span to the fill threads and does not wait for them.
pub fn submit(entry: &Arc<MapEntry>, pages: Span<u64>, run: u64) {
    let object = &entry.object;
    let mut first = pages.start;
    while first < pages.end && !entry.is_closing() {
        let end = ((first / run + 1) * run).min(pages.end);
        let claim = |page: &u64| object.claim_ahead(PageIndex(*page));
        let count = (first..end).take_while(claim).count() as u64;
        if count > 0 {
            let work = Work::Ahead { first: PageIndex(first), count };
            let in_flight = object.enter();
            entry.fill.get().submit(Task { entry: Arc::clone(entry), work, in_flight });
        }
        first += count.max(1);
    }
}

/// Has one page resident, loading it here where nobody else does.
fn bring_in(entry: &MapEntry, page: PageIndex, touch: Touch) -> Result<(), StoreError> {
    let pages = &entry.object.pages;
    loop {
        match pages.state(page) {
            PageState::Absent => {
                if pages.claim(page, PageState::Absent, PageState::Loading) {
                    load::load(entry, page, touch, thread::now_ns());
                }
            }
            PageState::Resident | PageState::Held => break,
            PageState::Poisoned => break,
            state => pages.wait_left(page, state, WAIT),
        }
        if entry.object.failure().is_some() {
            break;
        }
    }
    entry.object.failure().map_or(Ok(()), |failure| Err(failure.error))
}

/// Keeps the pages of a span resident until [`unpin`] and, for a `touch` that writes, open to writes:
/// they are safe for system calls, and what the kernel writes to them is noticed.
///
/// # Errors
/// `Budget` when the budget cannot hold what is pinned and two loads; a page that could not be had.
pub fn pin(entry: &Arc<MapEntry>, span: Span<u64>, touch: Touch) -> Result<(), PinError> {
    let object = &entry.object;
    let pages = pages_of(object, span.clone());
    reserve_pins(entry, pages.clone())?;
    let mut result = populate_pinned(entry, pages.clone(), touch);
    if result.is_ok() && object.failure().is_some() {
        result = Err(object.failure().expect("just seen").error);
    }
    result.map_err(|error| {
        unpin(entry, span);
        PinError::Page(error)
    })
}

/// Why pages could not be pinned.
#[derive(Debug)]
pub enum PinError {
    /// They are too many.
    Map(MapError),
    /// One could not be had.
    Page(StoreError),
}

fn reserve_pins(entry: &MapEntry, pages: Span<u64>) -> Result<(), PinError> {
    let object = &entry.object;
    let mut pins = entry.object.pins.lock();
    let new = pages.clone().filter(|page| !pins.contains_key(&PageIndex(*page))).count() as u64;
    let bytes = ByteCount(new * object.granule.0);
    if !PAGE_CACHE.try_pin(&object.account, bytes) {
        return Err(PinError::Map(MapError::Budget(format!(
            "{bytes} bytes more cannot be pinned: the budgets of the mapping and of the process have room for \
             {} beside what is pinned and pages in flight; pin less, or raise the budget",
            room_for_pins(object)
        ))));
    }
    pages.for_each(|page| *pins.entry(PageIndex(page)).or_insert(0) += 1);
    Ok(())
}

/// How much more could be pinned now.
pub fn room_for_pins(object: &MemoryObject) -> ByteCount {
    object.account.room_for_pins().min(PAGE_CACHE.account.room_for_pins())
}

fn populate_pinned(entry: &Arc<MapEntry>, pages: Span<u64>, touch: Touch) -> Result<(), StoreError> {
    let object = &entry.object;
    // Asynchronous write-protection lets the kernel's own writes through, and notes them.
    let opens = touch == Touch::Write && entry.writable && entry.pmap.get().tracking() != Tracking::WpAsync;
    let touch = if opens { Touch::Write } else { Touch::Read };
    let run = ((1 << 20) / object.granule.0).max(1);
    submit(entry, pages.clone(), run);
    for page in pages.map(PageIndex) {
        while !object.pages.pin(page) {
            bring_in(entry, page, touch)?;
        }
        if opens {
            while !fault::note_write(entry, page) {
                object.pages.wait_left(page, PageState::Held, WAIT);
            }
        }
    }
    Ok(())
}

/// Ends one [`pin`] of the same span.
pub fn unpin(entry: &MapEntry, span: Span<u64>) {
    let mut pins = entry.object.pins.lock();
    for page in pages_of(&entry.object, span).map(PageIndex) {
        if let Some(count) = pins.get_mut(&page) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&page);
                entry.object.pages.mark(page, 0, PINNED);
                PAGE_CACHE.unpin(&entry.object.account, entry.object.granule);
            }
        }
    }
}

/// Evicts the pages of a span that lie wholly in it and are not pinned, and what shares a huge page with
/// them; dirty ones are written back first. Returns the bytes freed.
///
/// # Errors
/// A page could not be written back; it stays, dirty.
pub fn evict(entry: &MapEntry, span: Span<u64>) -> Result<ByteCount, StoreError> {
    let object = &entry.object;
    let whole = span.start.div_ceil(object.granule.0)..if span.end >= object.mapped.0 {
        object.page_count().0
    } else {
        span.end / object.granule.0
    };
    let mut freed = object.standby.drop_pages(|page| whole.contains(&page.0));
    PAGE_CACHE.release(&object.account, freed);
    let resident: Vec<PageIndex> =
        object.resident_pages().into_iter().filter(|page| whole.contains(&page.0)).collect();
    for batch in resident.chunks(BATCH) {
        let victims = claim(entry, batch);
        let count = victims.len() as u64;
        let (bytes, result) = pageout::evict_claimed(entry, victims, false);
        freed.0 += bytes.0;
        add(&object.counters.evictions, count);
        add(&object.counters.evicted_bytes, bytes.0);
        result?;
    }
    Ok(freed)
}

/// Moves those of these pages to EVICTING that can go, and the rest of the huge pages that they are parts
/// of.
fn claim(entry: &MapEntry, pages: &[PageIndex]) -> Vec<(PageIndex, Range)> {
    let object = &entry.object;
    let mut policy = object.policy.lock();
    let mut victims = Vec::new();
    for page in pages {
        let huge = object.pages.has(*page, HUGE);
        if huge
            && (pageout::claim_huge(entry, *page, &mut victims)
                || !pageout::break_up(entry, &mut **policy, *page))
        {
            continue;
        }
        if object.pages.claim(*page, PageState::Resident, PageState::Evicting) {
            victims.push((*page, entry.page_range(*page)));
        }
    }
    victims.sort_unstable_by_key(|(page, _)| *page);
    policy.retain(&mut |page| victims.binary_search_by_key(&page, |victim| victim.0).is_err());
    victims
}

/// Copies bytes of the mapping to `buf`, without a touch of its addresses that could fault.
///
/// # Errors
/// Why a page could not be had.
pub fn read(entry: &MapEntry, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
    each_page(entry, offset, buf.len(), Touch::Read, &mut |at, bytes| {
        buf[at..at + bytes.len()].copy_from_slice(bytes);
    })
}

/// Copies `bytes` into a writable mapping, without a touch of its addresses that could fault.
///
/// # Errors
/// Why a page could not be had.
pub fn write(entry: &MapEntry, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
    each_page(entry, offset, bytes.len(), Touch::Write, &mut |at, into| {
        into.copy_from_slice(&bytes[at..at + into.len()]);
    })
}

/// Calls `copy` with the bytes of each page in turn, and where they begin in the whole.
#[allow(unsafe_code)]
fn each_page(
    entry: &MapEntry,
    offset: u64,
    len: usize,
    touch: Touch,
    copy: &mut dyn FnMut(usize, &mut [u8]),
) -> Result<(), StoreError> {
    let object = &entry.object;
    let end = offset + len as u64;
    let mut at = offset;
    while at < end {
        let page = ByteOffset(at).page(object.granule);
        let stop = end.min((page.0 + 1) * object.granule.0);
        hold(entry, page, touch)?;
        let start = entry.range.start + at as usize;
        // SAFETY: bytes of a page that is present and stays while it is held, and is open to writes
        // where the touch is one. Other threads may use them, as they may use an array's.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, (stop - at) as usize) };
        copy((at - offset) as usize, bytes);
        object.pages.keep(page, REFERENCED);
        at = stop;
    }
    Ok(())
}

/// Has a page resident and takes it, open to writes where it is to be written.
fn hold(entry: &MapEntry, page: PageIndex, touch: Touch) -> Result<(), StoreError> {
    let pages = &entry.object.pages;
    loop {
        bring_in(entry, page, touch)?;
        if pages.claim(page, PageState::Resident, PageState::Held) {
            break;
        }
        pages.wait_left(page, PageState::Held, WAIT);
    }
    if touch == Touch::Write && entry.pmap.get().tracking() != Tracking::WpAsync {
        pages.mark(page, DIRTY, 0);
        if let Err(errno) = entry.pmap.get().protect(entry.page_range(page), false) {
            pages.keep(page, 0);
            let error = std::io::Error::from_raw_os_error(errno);
            return Err(StoreError::from_io(page.offset(entry.object.granule), "opening a page", &error));
        }
    }
    Ok(())
}
