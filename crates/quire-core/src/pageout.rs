//! Eviction: makes room within a budget by removing pages that the policy chooses. Clean pages go
//! in batches, as one removal of many costs one TLB shoot-down; pages of writable mappings go by
//! way of the laundry.

use crate::counters::add;
use crate::errors::StoreError;
use crate::laundry;
use crate::page::{PINNED, PageState};
use crate::page_cache::{PAGE_CACHE, Room};
use crate::space::{MapEntry, SPACE};
use crate::sys::memory::Range;
use crate::units::{ByteCount, PageIndex};

/// Evicted at once, where pages are small.
const BATCH: u64 = 256 << 10;
/// Pages of one batch at most.
const BATCH_PAGES: usize = 256;

/// Charges `bytes` for a load of `entry`, evicting and waiting as needed.
///
/// # Errors
/// When there is no room because dirty pages cannot be written back.
pub fn reserve(entry: &MapEntry, bytes: ByteCount) -> Result<(), StoreError> {
    PAGE_CACHE.reserve(&entry.object.account, bytes, |own| make_room(entry, own, bytes))
}

/// Charges `bytes` for a load of `entry` if that needs at most one round of eviction.
pub fn try_reserve(entry: &MapEntry, bytes: ByteCount) -> bool {
    let account = &entry.object.account;
    if PAGE_CACHE.try_reserve(account, bytes) {
        return true;
    }
    make_room(entry, account.used().0 + bytes.0 > account.budget().0, bytes);
    PAGE_CACHE.try_reserve(account, bytes)
}

/// Evicts what is missing for a charge of `bytes`, or a batch when that is more.
fn make_room(entry: &MapEntry, own: bool, bytes: ByteCount) -> Room {
    let account = if own { &entry.object.account } else { &PAGE_CACHE.account };
    let missing = (account.used().0 + bytes.0).saturating_sub(account.budget().0);
    let batch = BATCH.min(account.budget().0 / 32);
    let target = ByteCount(missing.max(batch).max(1));
    if own {
        return room_of(evict(entry, target));
    }
    // The process is over its budget: who holds most pays first.
    let pages = |entry: &MapEntry| {
        entry.object.account.used().0.saturating_sub(entry.object.pager.standing_bytes().0)
    };
    let mut all = SPACE.all();
    all.sort_by_key(|(entry, _)| std::cmp::Reverse(pages(entry)));
    let mut room = Room::NoneYet;
    for (entry, _in_flight) in &all {
        match room_of(evict(entry, target)) {
            Room::Made => return Room::Made,
            Room::Refused(error) => room = Room::Refused(error),
            Room::NoneYet => {}
        }
    }
    room
}

fn room_of((freed, result): (ByteCount, Result<(), StoreError>)) -> Room {
    match result {
        _ if freed.0 > 0 => Room::Made,
        Ok(()) => Room::NoneYet,
        Err(error) => Room::Refused(error),
    }
}

/// Evicts pages of `entry` until `target` bytes are freed or none is left; returns the bytes, and
/// why dirty pages stayed.
pub fn evict(entry: &MapEntry, target: ByteCount) -> (ByteCount, Result<(), StoreError>) {
    let object = &entry.object;
    let mut victims: Vec<(PageIndex, Range)> = Vec::new();
    let mut chosen = ByteCount(0);
    {
        let mut policy = object.policy.lock();
        let mut left = policy.len();
        while chosen < target && victims.len() < BATCH_PAGES && left > 0 {
            left -= 1;
            let Some(page) = policy.victim(&mut |page| object.pages.take_referenced(page)) else {
                break;
            };
            // All of a huge page or nothing: a part of one frees no memory.
            let block = entry.huge_block(page).unwrap_or(page.0..page.0 + 1);
            for page in block.map(PageIndex) {
                if object.pages.claim(page, PageState::Resident, PageState::Evicting) {
                    let range = entry.page_range(page);
                    chosen.0 += range.len as u64;
                    victims.push((page, range));
                } else if matches!(object.pages.state(page), PageState::Resident | PageState::Held) {
                    policy.insert(page); // pinned, or being written back
                }
            }
        }
        if entry.huge {
            policy.retain(&mut |page| {
                object.pages.has(page, PINNED) || object.pages.state(page) == PageState::Resident
            });
        }
    }
    let claimed = victims.len() as u64;
    let (freed, result) = if entry.writable {
        laundry::evict_claimed(entry, victims)
    } else {
        (remove_claimed(entry, &victims), Ok(()))
    };
    add(
        &object.counters.evictions,
        if freed == chosen { claimed } else { freed.0.div_ceil(object.granule.0) },
    );
    add(&object.counters.evicted_bytes, freed.0);
    (freed, result)
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
    let ranges: Vec<Range> = pages.iter().map(|(_, range)| *range).collect();
    entry.pmap.get().remove(&ranges);
    for (page, _) in pages {
        entry.object.pages.finish(*page, PageState::Absent, 0);
    }
    let bytes = ByteCount(ranges.iter().map(|range| range.len as u64).sum());
    PAGE_CACHE.release(&entry.object.account, bytes);
    bytes
}
