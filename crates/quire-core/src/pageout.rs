//! Eviction: makes room within a budget by removing pages that the policy chooses. Clean pages go
//! in batches, as one removal of many costs one TLB shoot-down.

use crate::counters::add;
use crate::page::PageState;
use crate::page_cache::PAGE_CACHE;
use crate::space::{MapEntry, SPACE};
use crate::sys::memory::Range;
use crate::units::{ByteCount, PageIndex};

/// Evicted at once, where pages are small.
const BATCH: u64 = 256 << 10;
/// Pages of one batch at most.
const BATCH_PAGES: usize = 256;

/// Charges `bytes` for a load of `entry`, evicting and waiting as needed.
pub fn reserve(entry: &MapEntry, bytes: ByteCount) {
    PAGE_CACHE.reserve(&entry.object.account, bytes, |own| make_room(entry, own, bytes));
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
fn make_room(entry: &MapEntry, own: bool, bytes: ByteCount) -> bool {
    let account = if own { &entry.object.account } else { &PAGE_CACHE.account };
    let missing = (account.used().0 + bytes.0).saturating_sub(account.budget().0);
    let batch = BATCH.min(account.budget().0 / 32);
    let target = ByteCount(missing.max(batch).max(1));
    if own {
        return evict(entry, target).0 > 0;
    }
    // The process is over its budget: who holds most pays first.
    let pages = |entry: &MapEntry| {
        entry.object.account.used().0.saturating_sub(entry.object.pager.store().standing_bytes().0)
    };
    let mut all = SPACE.all();
    all.sort_by_key(|(entry, _)| std::cmp::Reverse(pages(entry)));
    all.iter().any(|(entry, _)| evict(entry, target).0 > 0)
}

/// Evicts pages of `entry` until `target` bytes are freed or none is left; returns the bytes.
pub fn evict(entry: &MapEntry, target: ByteCount) -> ByteCount {
    let object = &entry.object;
    let mut victims: Vec<(PageIndex, Range)> = Vec::new();
    let mut freed = ByteCount(0);
    {
        let mut policy = object.policy.lock();
        while freed < target && victims.len() < BATCH_PAGES {
            let Some(page) = policy.victim(&mut |page| object.pages.take_referenced(page)) else {
                break;
            };
            // All of a huge page or nothing: a part of one frees no memory.
            let block = entry.huge_block(page).unwrap_or(page.0..page.0 + 1);
            for page in block.map(PageIndex) {
                if object.pages.claim(page, PageState::Resident, PageState::Evicting) {
                    let range = entry.page_range(page);
                    freed.0 += range.len as u64;
                    victims.push((page, range));
                }
            }
        }
        if entry.huge {
            policy.retain(&mut |page| object.pages.state(page) == PageState::Resident);
        }
    }
    remove_claimed(entry, &victims);
    add(&object.counters.evictions, victims.len() as u64);
    add(&object.counters.evicted_bytes, freed.0);
    freed
}

/// Removes pages that the caller has moved to EVICTING, and their charge.
pub fn remove_claimed(entry: &MapEntry, pages: &[(PageIndex, Range)]) {
    if pages.is_empty() {
        return;
    }
    let ranges: Vec<Range> = pages.iter().map(|(_, range)| *range).collect();
    entry.pmap.get().remove(&ranges);
    for (page, _) in pages {
        entry.object.pages.finish(*page, PageState::Absent, 0);
    }
    let bytes = ranges.iter().map(|range| range.len as u64).sum();
    PAGE_CACHE.release(&entry.object.account, ByteCount(bytes));
}
