//! Eviction: makes room within a budget by removing pages that the policy chooses. Clean pages go
//! in batches, as one removal of many costs one TLB shoot-down; pages of writable mappings go by
//! way of the laundry.
//!
//! Where a page is dear to get again, it stands by (`standby.rs`) when the policy gives it up, and the
//! pages that have stood by longest are dropped in its stead.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::counters::{add, count};
use crate::errors::StoreError;
use crate::laundry;
use crate::memory_object::MemoryObject;
use crate::page::{COVERED, HUGE, PINNED, PageState};
use crate::page_cache::{PAGE_CACHE, Room};
use crate::policy::Policy;
use crate::space::{MapEntry, SPACE};
use crate::sys::memory::{self, HUGE_BYTES, Range};
use crate::sys::thread;
use crate::units::{ByteCount, PageIndex};

/// Evicted at once, where pages are small.
const BATCH: u64 = 256 << 10;
/// Pages of one batch at most.
const BATCH_PAGES: usize = 256;

/// Charges `bytes` for a load of a page of `entry`, evicting and waiting as needed.
///
/// # Errors
/// When there is no room because dirty pages, of any mapping, cannot be written back.
pub fn reserve(entry: &MapEntry, page: PageIndex, bytes: ByteCount) -> Result<(), StoreError> {
    entry.object.note_metadata();
    let counters = &entry.object.counters;
    let mut stalled_ns = None;
    let reserved = PAGE_CACHE.reserve(&entry.object.account, bytes, |own| {
        stalled_ns.get_or_insert_with(thread::now_ns);
        make_room(entry, own, bytes)
    });
    let reserved = reserved.map_err(|refusal| refusal.told_by(entry, page));
    if let Some(since) = stalled_ns {
        count(&counters.room_stalls);
        add(&counters.room_stall_ns, thread::now_ns().saturating_sub(since));
    }
    reserved
}

/// Charges `bytes` for a load of `entry` if that needs at most one round of eviction.
pub fn try_reserve(entry: &MapEntry, bytes: ByteCount) -> bool {
    entry.object.note_metadata();
    let account = &entry.object.account;
    if PAGE_CACHE.try_reserve(account, bytes) {
        return true;
    }
    make_room(entry, account.shortage(bytes).0 > 0, bytes);
    PAGE_CACHE.try_reserve(account, bytes)
}

/// Evicts what is missing for a charge of `bytes`, or a batch when that is more.
fn make_room(entry: &MapEntry, own: bool, bytes: ByteCount) -> Room<Refusal> {
    let account = if own { &entry.object.account } else { &PAGE_CACHE.account };
    let batch = BATCH.min(account.most().0 / 32);
    let target = ByteCount(account.shortage(bytes).0.max(batch).max(1));
    if own {
        return room_of(entry, evict(entry, target));
    }
    // The process is over its budget: who holds most pays first.
    let pages = |entry: &MapEntry| {
        entry.object.account.used().0.saturating_sub(entry.object.pager.standing_bytes().0)
    };
    let mut all = SPACE.all();
    all.sort_by_key(|(entry, _)| std::cmp::Reverse(pages(entry)));
    let mut room = Room::NoneYet;
    for (entry, _in_flight) in &all {
        match room_of(entry, evict(entry, target)) {
            Room::Made => return Room::Made,
            Room::Refused(refusal) => room = Room::Refused(refusal),
            Room::NoneYet => {}
        }
    }
    room
}

fn room_of(entry: &MapEntry, (freed, result): (ByteCount, Result<(), StoreError>)) -> Room<Refusal> {
    match result {
        _ if freed.0 > 0 => Room::Made,
        Ok(()) => Room::NoneYet,
        Err(error) => Room::Refused(Refusal { of: Arc::clone(&entry.object), error }),
    }
}

/// Why pages that should make room stayed, and whose they are.
struct Refusal {
    of: Arc<MemoryObject>,
    error: StoreError,
}

impl Refusal {
    /// The error as the mapping tells it whose page there was no room for.
    fn told_by(self, entry: &MapEntry, page: PageIndex) -> StoreError {
        let Refusal { of, error } = self;
        if Arc::ptr_eq(&of, &entry.object) {
            return error;
        }
        let message = format!(
            "no room in the process-wide budget: pages of {} must be written back first and cannot be: {error}",
            of.pager.store().label()
        );
        StoreError { offset: page.offset(entry.object.granule), message, ..error }
    }
}

/// Evicts pages of `entry` until `target` bytes are freed or none is left; returns the bytes, and
/// why dirty pages stayed.
pub fn evict(entry: &MapEntry, target: ByteCount) -> (ByteCount, Result<(), StoreError>) {
    let object = &entry.object;
    let Plan { frames, kept, surplus } = plan(entry, target);
    if surplus > 0 {
        return (shrink_standby(entry, surplus), Ok(()));
    }
    let grown = ByteCount(frames as u64 * object.granule.0);
    let (victims, chosen) = choose(entry, ByteCount(target.0 + grown.0));
    let claimed = victims.len() as u64;
    if claimed == 0 {
        return (shrink_standby(entry, pages_in(entry, target)), Ok(()));
    }
    if kept {
        object.standby.make_empty(victims.len());
    }
    let (freed, result) = evict_claimed(entry, victims, kept);
    add(
        &object.counters.evictions,
        if freed == chosen { claimed } else { freed.0.div_ceil(object.granule.0) },
    );
    add(&object.counters.evicted_bytes, freed.0);
    let spare = ByteCount(freed.0.saturating_sub(target.0).min(grown.0));
    (ByteCount(freed.0 - grow_standby(entry, spare).0), result)
}

/// As [`evict`], for who lowers a budget; false where nothing goes. A policy may spare once what was just
/// touched, lest a thread never gets to read it: that is no reason to leave it here.
pub fn shrink(entry: &MapEntry, target: ByteCount) -> bool {
    (0..2).any(|_| evict(entry, target).0.0 > 0)
}

/// Removes pages that the caller has moved to EVICTING, written back where they are dirty; they stand by
/// where the caller wants them `kept`. Returns the bytes freed.
pub fn evict_claimed(
    entry: &MapEntry,
    mut victims: Vec<(PageIndex, Range)>,
    kept: bool,
) -> (ByteCount, Result<(), StoreError>) {
    if !entry.writable {
        if kept {
            laundry::stand_by(entry, victims.iter().copied());
        }
        return (remove_claimed(entry, &victims), Ok(()));
    }
    let covered: Vec<_> =
        victims.extract_if(.., |(page, _)| entry.object.pages.has(*page, COVERED)).collect();
    let hidden = remove_claimed(entry, &covered);
    if victims.is_empty() {
        return (hidden, Ok(()));
    }
    let (freed, result) = laundry::evict_claimed(entry, victims, kept);
    (ByteCount(hidden.0 + freed.0), result)
}

/// How an eviction treats the pages that stand by.
struct Plan {
    /// Whether victims stand by.
    kept: bool,
    /// Frames to be added for the next victims.
    frames: usize,
    /// Frames that are too many, as far as this eviction needs them.
    surplus: usize,
}

/// They are a quarter of what the object holds beside two loads; never more than a half, when it
/// comes to hold less.
fn plan(entry: &MapEntry, target: ByteCount) -> Plan {
    let object = &entry.object;
    let kept = !entry.huge && entry.pmap.get().kind().has_pointer() && object.is_dear_to_fill();
    let frames = object.standby.frames();
    if !kept && frames == 0 {
        return Plan { kept, frames: 0, surplus: 0 };
    }
    let apart = object.pager.standing_bytes().0 + 2 * object.load_cost().0;
    let held = object.account.used().0.saturating_sub(apart) / object.granule.0;
    let [least, most] = if kept { [held / 4, held / 2] } else { [0, 0] }.map(|count| count as usize);
    let pages = pages_in(entry, target);
    Plan {
        kept,
        frames: least.saturating_sub(frames).min(pages),
        surplus: frames.saturating_sub(most).min(pages),
    }
}

fn pages_in(entry: &MapEntry, bytes: ByteCount) -> usize {
    bytes.0.div_ceil(entry.object.granule.0) as usize
}

/// Adds empty frames where there is room for them after all; returns their bytes.
fn grow_standby(entry: &MapEntry, spare: ByteCount) -> ByteCount {
    let object = &entry.object;
    let granule = object.granule.0;
    let charge = ByteCount(spare.0 / granule * granule);
    if charge.0 == 0 || !PAGE_CACHE.try_reserve(&object.account, charge) {
        return ByteCount(0);
    }
    let added = ByteCount(object.standby.grow((charge.0 / granule) as usize) as u64 * granule);
    PAGE_CACHE.release(&object.account, ByteCount(charge.0 - added.0));
    added
}

fn shrink_standby(entry: &MapEntry, frames: usize) -> ByteCount {
    let freed = entry.object.standby.shrink(frames);
    PAGE_CACHE.release(&entry.object.account, freed);
    freed
}

/// Asks the policy for victims of `target` bytes and moves them to EVICTING.
fn choose(entry: &MapEntry, target: ByteCount) -> (Vec<(PageIndex, Range)>, ByteCount) {
    let object = &entry.object;
    let mut victims: Vec<(PageIndex, Range)> = Vec::new();
    let mut chosen = ByteCount(0);
    let is_here = |page| matches!(object.pages.state(page), PageState::Resident | PageState::Held);
    let mut policy = object.policy.lock();
    let mut left = policy.len();
    while chosen < target && victims.len() < BATCH_PAGES && left > 0 {
        left -= 1;
        let Some(page) = policy.victim(&mut |page| object.pages.take_referenced(page)) else {
            break;
        };
        if object.pages.has(page, HUGE) {
            if claim_huge(entry, page, &mut victims) {
                chosen.0 += HUGE_BYTES as u64;
            } else if break_up(entry, &mut **policy, page) || object.pages.has(page, HUGE) {
                policy.insert(page); // a part is pinned, held, or still on its way
            }
            continue;
        }
        // All of a huge page or nothing: a part of one frees no memory.
        let block = entry.huge_block(page).unwrap_or(page.0..page.0 + 1);
        for each in block.map(PageIndex) {
            if object.pages.claim(each, PageState::Resident, PageState::Evicting) {
                let range = entry.page_range(each);
                chosen.0 += range.len as u64;
                victims.push((each, range));
            } else if each == page && is_here(each) {
                policy.insert(page); // pinned, or being written back; the policy knows its neighbours still
            }
        }
    }
    if entry.huge {
        // Neighbours of those that the policy gave up went with them.
        policy.retain(&mut |page| is_here(page));
    }
    object.note_policy(&**policy);
    (victims, chosen)
}

/// Moves all granules of the huge page around one to EVICTING, or none: a part of it frees no memory.
/// Called with the policy's lock held.
pub fn claim_huge(entry: &MapEntry, page: PageIndex, victims: &mut Vec<(PageIndex, Range)>) -> bool {
    let object = &entry.object;
    let Some(mut block) = object.block_of(page) else { return false };
    let from = victims.len();
    let whole = block.all(|page| {
        let page = PageIndex(page);
        let claimed = object.pages.claim(page, PageState::Resident, PageState::Evicting);
        if claimed {
            victims.push((page, entry.page_range(page)));
        }
        claimed
    });
    if !whole {
        victims.drain(from..).for_each(|(page, _)| object.pages.keep(page, 0));
    }
    whole
}

/// Breaks up the huge page around a granule when a part of it is pinned or gone, so that the others can go;
/// false when none is. Called with the policy's lock held; the policy knows the first granule.
#[allow(unsafe_code)]
pub fn break_up(entry: &MapEntry, policy: &mut dyn Policy, page: PageIndex) -> bool {
    let pages = &entry.object.pages;
    let Some(block) = entry.object.block_of(page) else { return false };
    let stays = |page| pages.has(page, PINNED) || pages.state(page) == PageState::Absent;
    let comes = |page| pages.state(page) == PageState::Loading;
    if !block.clone().map(PageIndex).any(stays) || block.clone().map(PageIndex).any(comes) {
        return false;
    }
    // SAFETY: pages of our own mapping, which stay.
    unsafe { memory::split_huge(entry.page_range(page)) }
    for other in block.clone().map(PageIndex) {
        if pages.mark(other, 0, HUGE) && other.0 != block.start {
            policy.insert(other);
        }
    }
    true
}

/// Gives back what a refusal of the kernel says is short: pages of `entry`, or else of others.
pub fn give_back(entry: &MapEntry, target: ByteCount) {
    if evict(entry, target).0.0 == 0 {
        SPACE.all().iter().any(|(other, _in_flight)| evict(other, target).0.0 > 0);
    }
}

/// Removes pages that the caller has moved to EVICTING, and their charge; returns their bytes.
pub fn remove_claimed(entry: &MapEntry, pages: &[(PageIndex, Range)]) -> ByteCount {
    if pages.is_empty() {
        return ByteCount(0);
    }
    let mut ranges: Vec<Range> = pages.iter().map(|(_, range)| *range).collect();
    let bytes = ByteCount(ranges.iter().map(|range| range.len as u64).sum());
    recycle_huge(entry, pages, &mut ranges);
    if entry.object.covered.load(Ordering::Acquire) {
        let covered = |page: &PageIndex| entry.object.pages.has(*page, COVERED);
        let hidden: Vec<Range> =
            pages.iter().filter(|(page, _)| covered(page)).map(|(_, range)| *range).collect();
        hidden.iter().for_each(|range| hide(*range));
        ranges.retain(|range| !hidden.contains(range));
    }
    entry.pmap.get().remove(&ranges);
    entry.object.pages.finish_absent(pages.iter().map(|(page, _)| *page));
    entry.object.note_metadata();
    PAGE_CACHE.release(&entry.object.account, bytes);
    bytes
}

/// Makes a range of a mapping inaccessible that is not ready in this process, or that filler covers.
#[allow(unsafe_code)]
pub fn hide(range: Range) {
    // SAFETY: a range of our own mapping that shows filler only. Where the kernel has no memory for it the
    // filler stays, as it would have without.
    let _ = unsafe { memory::reserve_at(range, libc::PROT_NONE) };
}

/// Keeps the first huge page of those that go for the next load; what was taken is no more in `ranges`.
fn recycle_huge(entry: &MapEntry, pages: &[(PageIndex, Range)], ranges: &mut Vec<Range>) {
    let object = &entry.object;
    let Some(first) = pages.iter().position(|(page, _)| object.pages.has(*page, HUGE)) else { return };
    let Some(block) = object.block_of(pages[first].0) else { return };
    let end = first + (block.end - block.start) as usize;
    let whole =
        pages[first].0.0 == block.start && pages.get(end - 1).is_some_and(|last| last.0.0 == block.end - 1);
    let range = Range { start: pages[first].1.start, len: HUGE_BYTES };
    if whole && entry.huge_frames().is_some_and(|frames| frames.recycle(range)) {
        ranges.drain(first..end);
    }
}
