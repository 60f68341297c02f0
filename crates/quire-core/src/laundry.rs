//! Writes pages back: on `sync`, and on eviction, when a dirty page must reach its backing before
//! its frame is used for another.
//!
//! A store by a running thread must never fall between the copy of a page and its removal. With
//! `Tracking::WpSync` and `Mprotect` the page is protected first: a thread that stores meets a
//! fault and waits until the page is gone. With `WpAsync` such a store is let through by the
//! kernel, so the page is *moved out*: what was stored before comes along, what is stored after
//! meets a missing page. A page that the scan before the move found clean may have been stored to
//! between the two; it is clean only if its content is still what it was before the scan.

use std::ops::Range as Span;
use std::time::Duration;

use xxhash_rust::xxh64::xxh64;

use crate::counters::{add, count};
use crate::errors::StoreError;
use crate::memory_object::MemoryObject;
use crate::page::{BAD, DIRTY, PINNED, PageState};
use crate::page_cache::PAGE_CACHE;
use crate::pmap::{Tracking, frames::Frames};
use crate::range_set::RangeSet;
use crate::space::MapEntry;
use crate::sys::memory::Range;
use crate::units::{ByteCount, ByteOffset, PageIndex};

/// Bytes written at once.
const WRITE_MAX: u64 = 1 << 20;
const WAIT: Duration = Duration::from_millis(50);
/// Longer than a load takes from the installation of its page to its end.
const MOMENT: Duration = Duration::from_millis(2);

/// Writes back what is dirty in `within`, bytes of the object, and makes it durable: afterwards the
/// store holds what the array held at the call.
///
/// # Errors
/// The first failure; what was not written, or not made durable, is written by the next call.
pub fn sync(entry: &MapEntry, within: Span<u64>) -> Result<(), StoreError> {
    let notes = &entry.object.dirty;
    let _one = notes.syncing.lock();
    let dirty = {
        let leaving = notes.scan.lock();
        find_dirty(entry, &leaving.0, within.clone())?
    };
    rewrite_lost(entry, within)?;
    write_back(entry, &dirty)?;
    count(&entry.object.counters.syncs);
    let written = std::mem::take(&mut notes.noted.lock().written);
    entry.object.pager.sync().inspect_err(|_| {
        let mut noted = notes.noted.lock();
        let meanwhile = std::mem::take(&mut noted.written);
        noted.lost.absorb(&written);
        noted.lost.absorb(&meanwhile);
    })
}

/// Bytes that are dirty now, exactly where the kernel says so and by granules elsewhere; `leaving`
/// are taken to be: an eviction may yet find them so, and fail. Called with the scan lock held.
fn find_dirty(entry: &MapEntry, leaving: &[PageIndex], within: Span<u64>) -> Result<RangeSet, StoreError> {
    let object = &entry.object;
    let mut dirty = RangeSet::default();
    let first = within.start / object.granule.0;
    let last = within.end.div_ceil(object.granule.0);
    // All states: a page can be written before the fault that opened it is over, and is not in the
    // policy's list while it is loaded or evicted.
    let marked = (first..last).map(PageIndex).filter(|page| object.pages.has(*page, DIRTY));
    let leaving = leaving.iter().copied().filter(|page| (first..last).contains(&page.0));
    marked.chain(leaving).for_each(|page| dirty.add(span_of(object, page)));
    if let Some(frames) = scans(entry) {
        let start = (first * object.granule.0) as usize;
        let end = (last * object.granule.0).min(object.mapped.0) as usize;
        let range = Range { start: entry.range.start + start, len: end - start };
        note_written_pages(entry, frames, range, &mut |span| dirty.add(span))?;
    }
    Ok(dirty)
}

/// Bytes that are dirty now, exactly where the kernel says so and by granules elsewhere. A look: nothing
/// changes by it, and pages on their way out may be missed.
pub fn dirty_bytes(entry: &MapEntry) -> ByteCount {
    let object = &entry.object;
    let mut dirty = RangeSet::default();
    let noted = |page: &PageIndex| object.pages.has(*page, DIRTY);
    object.resident_pages().into_iter().filter(noted).for_each(|page| dirty.add(span_of(object, page)));
    if let Some(frames) = scans(entry) {
        let start = entry.range.start;
        let mut found = |written: Range| {
            let offset = (written.start - start) as u64;
            dirty.add(offset..offset + written.len as u64);
        };
        // Without an answer what is noted is told.
        let _ = frames.look_at_written(entry.range, &mut found);
    }
    ByteCount(dirty.iter().map(|span| span.end - span.start).sum())
}

fn scans(entry: &MapEntry) -> Option<&Frames> {
    let pmap = entry.pmap.get();
    pmap.frames().filter(|_| pmap.tracking() == Tracking::WpAsync)
}

/// Marks the granules that were written, and tells `found` of their bytes. They count as protected
/// again from here on, so the mark is all that is known of them.
fn note_written_pages(
    entry: &MapEntry,
    frames: &Frames,
    range: Range,
    found: &mut dyn FnMut(Span<u64>),
) -> Result<(), StoreError> {
    let granule = entry.object.granule.0;
    let scanned = frames.take_written(range, &mut |written| {
        let start = (written.start - entry.range.start) as u64;
        let end = start + written.len as u64;
        for page in start / granule..end.div_ceil(granule) {
            if !entry.object.pages.has(PageIndex(page), BAD) {
                entry.object.pages.mark(PageIndex(page), DIRTY, 0);
                found(start.max(page * granule)..end.min((page + 1) * granule));
            }
        }
    });
    scanned.map_err(|errno| {
        let error = std::io::Error::from_raw_os_error(errno);
        StoreError::from_io(ByteOffset(0), "looking for written pages", &error)
    })
}

fn span_of(object: &MemoryObject, page: PageIndex) -> Span<u64> {
    let start = page.offset(object.granule).0;
    start..start + object.page_len(page) as u64
}

/// What a failed sync of the store may have lost is made dirty again, or, where it is not resident,
/// written again from what the store still gives.
fn rewrite_lost(entry: &MapEntry, within: Span<u64>) -> Result<(), StoreError> {
    let object = &entry.object;
    let lost = object.dirty.noted.lock().lost.take(within);
    let again = |error| {
        object.dirty.noted.lock().lost.absorb(&lost);
        error
    };
    for span in lost.iter() {
        let mut at = span.start;
        while at < span.end {
            let page = ByteOffset(at).page(object.granule);
            let end = span.end.min(span_of(object, page).end);
            rewrite(entry, page, at..end).map_err(again)?;
            at = end;
        }
    }
    Ok(())
}

fn rewrite(entry: &MapEntry, page: PageIndex, span: Span<u64>) -> Result<(), StoreError> {
    let pages = &entry.object.pages;
    loop {
        if hold(entry, page, false) {
            let written = write_held(entry, span);
            pages.keep(page, if written.is_ok() { 0 } else { DIRTY });
            return written;
        }
        // Nobody may load, change and evict it between the read and the write.
        if pages.claim(page, PageState::Absent, PageState::Loading) {
            let written = rewrite_absent(&entry.object, page, span);
            entry.give_up(page);
            return written;
        }
        if pages.has(page, BAD) || pages.state(page) == PageState::Poisoned {
            return rewrite_absent(&entry.object, page, span);
        }
    }
}

fn rewrite_absent(object: &MemoryObject, page: PageIndex, span: Span<u64>) -> Result<(), StoreError> {
    if let Some(frame) = object.standby.take(page) {
        let start = (span.start - page.offset(object.granule).0) as usize;
        let bytes = &frame.bytes()[start..start + (span.end - span.start) as usize];
        let written = put(object, ByteOffset(span.start), bytes);
        object.standby.give_back(page, frame);
        return written;
    }
    let mut bytes = vec![0; (span.end - span.start) as usize];
    object.pager.get_page(ByteOffset(span.start), &mut bytes, &object.counters)?;
    put(object, ByteOffset(span.start), &bytes)
}

/// Writes spans back, in order and in long runs. Pages that are gone were written when they went.
fn write_back(entry: &MapEntry, dirty: &RangeSet) -> Result<(), StoreError> {
    let object = &entry.object;
    let granule = object.granule.0;
    let mut spans = dirty.iter().peekable();
    while let Some(span) = spans.next() {
        // What is dirty still in the last granule of the span.
        let next = spans.peek().map(|next| next.start / granule);
        let mut at = span.start;
        while at < span.end {
            let first = at / granule;
            let limit = span.end.min((at + WRITE_MAX).next_multiple_of(granule));
            if !hold(entry, PageIndex(first), false) {
                at = (first + 1) * granule;
                continue;
            }
            let more = first + 1..limit.div_ceil(granule);
            let open = stays_open(entry, first);
            let more = more
                .take_while(|page| stays_open(entry, *page) == open && hold(entry, PageIndex(*page), true));
            let pages = first..first + 1 + more.count() as u64;
            let end = limit.min(pages.end * granule);
            let protected = if open { Ok(()) } else { protect_held(entry, pages.clone()) };
            let written = protected.and_then(|()| write_held(entry, at..end));
            for page in pages {
                let clean = written.is_ok() && next != Some(page) && !open;
                object.pages.keep(PageIndex(page), if clean { 0 } else { DIRTY });
            }
            written?;
            at = end;
        }
    }
    Ok(())
}

/// Takes a resident page that holds data; false when it is not there, or, where other pages are held
/// `beside` it, when its load takes longer than a moment: that may wait for room which only those can
/// make.
fn hold(entry: &MapEntry, page: PageIndex, beside: bool) -> bool {
    let pages = &entry.object.pages;
    let mut waited = false;
    loop {
        match pages.state(page) {
            PageState::Resident if pages.has(page, BAD) => return false,
            PageState::Resident => {
                if pages.claim(page, PageState::Resident, PageState::Held) {
                    return true;
                }
            }
            PageState::Loading if beside && waited => return false,
            PageState::Loading if beside => {
                pages.wait_left(page, PageState::Loading, MOMENT);
                waited = true;
            }
            // A page can be written before the load that installed it is over.
            state @ (PageState::Held | PageState::Evicting | PageState::Loading) => {
                pages.wait_left(page, state, WAIT);
            }
            PageState::Absent | PageState::Poisoned => return false,
        }
    }
}

/// Whether a page may be pinned for a system call that writes to it, which would fail if the page were
/// protected: it is not, and so stays dirty.
fn stays_open(entry: &MapEntry, page: u64) -> bool {
    let fails = entry.pmap.get().faults_are_signals() && scans(entry).is_none();
    fails && entry.object.pages.has(PageIndex(page), PINNED)
}

/// From here on a write to these held pages is noticed anew.
fn protect_held(entry: &MapEntry, pages: Span<u64>) -> Result<(), StoreError> {
    let object = &entry.object;
    pages.clone().for_each(|page| {
        object.pages.mark(PageIndex(page), 0, DIRTY);
    });
    if scans(entry).is_some() {
        return Ok(()); // protected by the scan that found them
    }
    let start = entry.page_range(PageIndex(pages.start));
    let end = entry.page_range(PageIndex(pages.end - 1));
    let range = Range { start: start.start, len: end.start + end.len - start.start };
    entry.pmap.get().protect(range, true).map_err(|errno| refused(object, pages.start, errno))
}

fn refused(object: &MemoryObject, page: u64, errno: i32) -> StoreError {
    let error = std::io::Error::from_raw_os_error(errno);
    StoreError::from_io(PageIndex(page).offset(object.granule), "write-protecting a page", &error)
}

/// Writes bytes of pages that are held.
#[allow(unsafe_code)]
fn write_held(entry: &MapEntry, span: Span<u64>) -> Result<(), StoreError> {
    let start = entry.range.start + span.start as usize;
    // SAFETY: pages of our mapping that stay while they are held. Other threads may store to them
    // meanwhile: the bytes are only copied by the kernel, and what is torn is dirty again.
    let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, (span.end - span.start) as usize) };
    put(&entry.object, ByteOffset(span.start), bytes)
}

/// Writes, and notes it before and after: a sync of the store that fails meanwhile may have lost it,
/// and one that succeeds may have come too early.
fn put(object: &MemoryObject, offset: ByteOffset, bytes: &[u8]) -> Result<(), StoreError> {
    let span = offset.0..offset.0 + bytes.len() as u64;
    object.dirty.note_written(span.clone());
    object.pager.put_page(offset, bytes)?;
    add(&object.counters.written_bytes, bytes.len() as u64);
    object.dirty.note_written(span);
    Ok(())
}

/// Has pages stand by that the caller owns, that are there and written back, as long as there are
/// empty frames. No thread can store to them: they are protected, or moved out to `places`.
#[allow(unsafe_code)]
pub fn stand_by(entry: &MapEntry, pages: impl Iterator<Item = (PageIndex, Range)>) {
    for (page, place) in pages.filter(|(page, _)| !entry.object.pages.has(*page, BAD)) {
        // SAFETY: whole pages that are present, stay and do not change meanwhile (contract).
        let bytes = unsafe { std::slice::from_raw_parts(place.start as *const u8, place.len) };
        if !entry.object.standby.put(page, bytes) {
            return;
        }
    }
}

/// Removes pages of a writable mapping that the caller has moved to EVICTING, written back where
/// they are dirty; they stand by where the caller wants them `kept`. Those that cannot be written
/// stay. Returns the bytes freed.
pub fn evict_claimed(
    entry: &MapEntry,
    mut victims: Vec<(PageIndex, Range)>,
    kept: bool,
) -> (ByteCount, Result<(), StoreError>) {
    victims.sort_unstable_by_key(|(page, _)| *page);
    let notes = &entry.object.dirty;
    notes.scan.lock().0.extend(victims.iter().map(|(page, _)| *page));
    let result = match scans(entry) {
        Some(frames) => move_out(entry, frames, &victims, kept),
        None => protect_and_write(entry, &victims, kept),
    };
    let mut leaving = notes.scan.lock();
    leaving.0.retain(|page| victims.binary_search_by_key(page, |(victim, _)| *victim).is_err());
    result
}

/// Ends the eviction of pages: those of `gone` are absent, the others stay.
fn settle(entry: &MapEntry, victims: &[(PageIndex, Range)], gone: &[bool]) -> ByteCount {
    let object = &entry.object;
    let mut freed = ByteCount(0);
    let absent = victims.iter().zip(gone).filter(|(_, gone)| **gone);
    object.pages.finish_absent(absent.map(|((page, _), _)| *page));
    for ((page, range), gone) in victims.iter().zip(gone) {
        if *gone {
            freed.0 += range.len as u64;
        } else {
            object.pages.keep(*page, 0);
            object.policy.lock().insert(*page);
        }
    }
    object.note_metadata();
    PAGE_CACHE.release(&object.account, freed);
    freed
}

fn protect_and_write(
    entry: &MapEntry,
    victims: &[(PageIndex, Range)],
    kept: bool,
) -> (ByteCount, Result<(), StoreError>) {
    let object = &entry.object;
    let dirty = |page: PageIndex| object.pages.has(page, DIRTY) && !object.pages.has(page, BAD);
    let mut gone = vec![true; victims.len()];
    let mut result = Ok(());
    for run in runs(victims, |index| dirty(victims[index].0)) {
        let range = whole(&victims[run.clone()]);
        let offset = victims[run.start].0.offset(object.granule);
        let protected = entry
            .pmap
            .get()
            .protect(range, true)
            .map_err(|errno| refused(object, victims[run.start].0.0, errno));
        let written = protected.and_then(|()| write_held(entry, offset.0..offset.0 + range.len as u64));
        if let Err(error) = written {
            gone[run].fill(false);
            result = Err(error);
        }
    }
    let leaving = victims.iter().zip(&gone).filter(|(_, gone)| **gone).map(|(victim, _)| *victim);
    if kept {
        stand_by(entry, leaving.clone());
    }
    entry.pmap.get().remove(&leaving.map(|(_, range)| range).collect::<Vec<_>>());
    (settle(entry, victims, &gone), result)
}

#[allow(unsafe_code)]
fn move_out(
    entry: &MapEntry,
    frames: &Frames,
    victims: &[(PageIndex, Range)],
    kept: bool,
) -> (ByteCount, Result<(), StoreError>) {
    let object = &entry.object;
    let mut gone = vec![false; victims.len()];
    let total = victims.iter().map(|(_, range)| range.len).sum();
    let Ok(scratch) = frames.take_scratch(total) else {
        return (settle(entry, victims, &gone), Ok(()));
    };
    // SAFETY: whole pages that are present and stay: they are EVICTING (the mapping's) or ours alone
    // (scratch). A thread that stores meanwhile makes the two hashes differ, which is their purpose.
    let bytes = |at: Range| unsafe { std::slice::from_raw_parts(at.start as *const u8, at.len) };
    let before: Vec<u64> = victims.iter().map(|(_, range)| xxh64(bytes(*range), 0)).collect();
    let mut result = {
        let _scan = object.dirty.scan.lock();
        runs(victims, |_| true)
            .try_for_each(|run| note_written_pages(entry, frames, whole(&victims[run]), &mut |_| {}))
    };
    let mut places = Vec::with_capacity(victims.len());
    let mut at = scratch.start();
    for (index, (_, range)) in victims.iter().enumerate() {
        places.push(Range { start: at, len: range.len });
        gone[index] = result.is_ok() && frames.move_pages(at, *range).is_ok();
        at += range.len;
    }
    let dirty: Vec<bool> = (0..victims.len())
        .map(|index| {
            let (page, _) = victims[index];
            let marked = object.pages.has(page, DIRTY);
            let good = gone[index] && !object.pages.has(page, BAD);
            good && (marked || xxh64(bytes(places[index]), 0) != before[index])
        })
        .collect();
    for run in runs(victims, |index| dirty[index]) {
        let len = victims[run.clone()].iter().map(|(_, range)| range.len).sum();
        let from = Range { start: places[run.start].start, len };
        if let Err(error) = put(object, victims[run.start].0.offset(object.granule), bytes(from)) {
            for index in run {
                object.pages.mark(victims[index].0, DIRTY, 0);
                put_back(entry, frames, victims[index].1, places[index]);
                gone[index] = false;
            }
            result = Err(error);
        }
    }
    if kept {
        let moved = (0..victims.len()).filter(|index| gone[*index]);
        stand_by(entry, moved.map(|index| (victims[index].0, places[index])));
    }
    let freed = settle(entry, victims, &gone);
    frames.give_scratch(scratch, total);
    (freed, result)
}

/// Moves a page that could not be written back to where it was.
#[allow(unsafe_code)]
fn put_back(entry: &MapEntry, frames: &Frames, to: Range, from: Range) {
    if frames.move_pages(to.start, from).is_err() {
        // SAFETY: scratch of ours, present.
        let bytes = unsafe { std::slice::from_raw_parts(from.start as *const u8, from.len) };
        // The page's place is empty and ours: a copy is refused only where memory is used up, and
        // then the kernel's own out-of-memory handling is at work.
        while entry.pmap.get().install(to.start, bytes, false) == Err(libc::ENOMEM) {
            std::thread::sleep(WAIT);
        }
    }
    entry.pmap.get().wake(to);
}

/// Runs of victims that lie side by side and of which `wanted` holds.
fn runs(victims: &[(PageIndex, Range)], wanted: impl Fn(usize) -> bool) -> impl Iterator<Item = Span<usize>> {
    let mut found: Vec<Span<usize>> = Vec::new();
    for (index, (page, _)) in victims.iter().enumerate().filter(|(index, _)| wanted(*index)) {
        match found.last_mut() {
            Some(run) if run.end == index && victims[index - 1].0.0 + 1 == page.0 => run.end += 1,
            _ => found.push(index..index + 1),
        }
    }
    found.into_iter()
}

/// The addresses of a run.
fn whole(run: &[(PageIndex, Range)]) -> Range {
    Range { start: run[0].1.start, len: run.iter().map(|(_, range)| range.len).sum() }
}
