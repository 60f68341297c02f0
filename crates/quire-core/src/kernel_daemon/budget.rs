//! Budgets over ranges that the kernel pages.
//!
//! By second chance over blocks of 2 MiB of the file: the translations of the blocks that have had theirs
//! longest are taken away (`MADV_DONTNEED`, which takes nothing from a file); those that are touched again
//! come back at the cost of a minor fault and are the youngest.
//!
//! Where the page cache is to drop them too, it must not grow faster than this can look. So the range is
//! `MADV_RANDOM`: a touch brings in one page, at the pace of the disk's latency. Only ahead of a walk it is
//! more, on a *leash*, which is lengthened when there is room for it:
//!
//! ```text
//!   dropped | walked over, mapped | leash, MADV_NORMAL     | the kernel's own window | MADV_RANDOM ...
//!           |<-- room: trimmed -->|<--- reserved: counted whether it is cached or not --->|
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use super::walks::{Walk, Walks};
use super::{Look, fresh};
use crate::pmap::kernel::NOT_ADVISED;
use crate::sys::memory::{Range, page_bytes};
use crate::sys::mmap;

/// What goes at once: the largest folio of the page cache, of which the kernel drops no part.
const BLOCK: u64 = 2 << 20;
/// What the kernel reads ahead of a walk: the window that is being read and the next one.
const WINDOWS: u64 = 2;
const LEASH_MOST: u64 = 64 << 20;
/// A budget has this part for what is read ahead, all walks together.
const AHEAD_PART: (u64, u64) = (3, 4);
/// A leash is lengthened when less than this part of it is left.
const LEFT_PART: (usize, usize) = (3, 4);
/// Walks that are led at most.
const LED: usize = 4;
/// Trimmed from this part of the room on, down to that one.
const TRIM_FROM: (u64, u64) = (3, 4);
const TRIM_TO: (u64, u64) = (1, 2);

/// Looks for which what did not leave the page cache is asked to again: then somebody else has it mapped.
const TRIES: u32 = 8;

/// The blocks of one range.
#[derive(Default)]
pub struct Blocks {
    /// Those with translations, and the look that saw them come.
    since: BTreeMap<u64, u64>,
    /// The number of the last look.
    now: u64,
    /// Those that were dropped and are there all the same, being read or written just then.
    lingering: BTreeMap<u64, Lingering>,
}

struct Lingering {
    bytes: u64,
    tries: u32,
}

impl Blocks {
    /// Keeps a budget; what is left of the runs of pages that have translations.
    pub fn keep(&mut self, look: &Look, runs: Vec<Range>, walks: &mut Walks, time: u64) -> Vec<Range> {
        let budget = look.wishes.budget.load(Ordering::Relaxed);
        let drops = look.wishes.drops.load(Ordering::Relaxed);
        let mapped = runs.iter().map(|run| run.len as u64).sum();
        look.wishes.peak.fetch_max(mapped, Ordering::Relaxed);
        self.note(look, &runs, time);
        if !drops {
            return self.trim(look, runs, budget);
        }
        self.drop_lingering(look);
        let led = if look.wishes.advised.load(Ordering::Relaxed) == NOT_ADVISED { LED } else { 0 };
        let leash = Leash::of(look, budget, walks.forward().take(led).count() as u64);
        let ahead: u64 = walks.all().map(|walk| leash.reserved(walk)).sum();
        let lingering: u64 = self.lingering.values().map(|block| block.bytes).sum();
        let left = self.trim(look, runs, budget.saturating_sub(ahead.max(leash.all()) + lingering));
        walks.forward().take(led).for_each(|walk| leash.lead(look, walk));
        left
    }

    fn note(&mut self, look: &Look, runs: &[Range], time: u64) {
        self.now = time;
        let mut here = BTreeSet::new();
        for run in runs {
            here.extend(look.block(run.start)..=look.block(run.end() - 1));
        }
        self.since.retain(|block, _| here.contains(block));
        for block in here {
            self.since.entry(block).or_insert(time);
            self.lingering.remove(&block); // touched again: it counts as mapped
        }
    }

    /// Takes what is over the room.
    fn trim(&mut self, look: &Look, runs: Vec<Range>, room: u64) -> Vec<Range> {
        let mapped: u64 = runs.iter().map(|run| run.len as u64).sum();
        if mapped <= room / TRIM_FROM.1 * TRIM_FROM.0 {
            return runs;
        }
        let mut over = mapped - room / TRIM_TO.1 * TRIM_TO.0;
        let bytes_of = bytes_of_blocks(look, &runs);
        let mut victims: Vec<u64> = bytes_of.keys().copied().collect();
        victims.sort_by_key(|block| self.since.get(block).copied());
        let mut chosen = Vec::new();
        for block in victims {
            if over == 0 {
                break;
            }
            over = over.saturating_sub(bytes_of[&block]);
            chosen.push(block);
        }
        chosen.sort_unstable();
        let mut taken = Vec::new();
        for blocks in chosen.chunk_by(|one, next| one + 1 == *next) {
            self.take(look, blocks, &mut taken);
        }
        let left = fresh(&taken, &runs);
        let trimmed = mapped - left.iter().map(|run| run.len as u64).sum::<u64>();
        look.wishes.trimmed.fetch_add(trimmed, Ordering::Relaxed);
        left
    }

    /// Takes some blocks, one after the other in the file, in as few calls as can be: dropping pages
    /// waits for all CPUs. Those with locked pages stay.
    fn take(&mut self, look: &Look, blocks: &[u64], taken: &mut Vec<Range>) {
        let first = look.addresses(blocks[0]);
        let last = look.addresses(blocks[blocks.len() - 1]);
        let range = Range { start: first.start, len: last.end() - first.start };
        let refused = look.advise(range, libc::MADV_DONTNEED).is_err();
        if refused && blocks.len() > 1 {
            return blocks.chunks(1).for_each(|block| self.take(look, block, taken));
        }
        if refused {
            self.since.insert(blocks[0], self.now); // the others go first
            return;
        }
        taken.push(range);
        for block in blocks {
            self.since.remove(block);
        }
        if look.wishes.drops.load(Ordering::Relaxed) {
            look.stored.drop_cached(blocks[0] * BLOCK, blocks.len() as u64 * BLOCK);
            for block in blocks {
                self.linger(look, *block, TRIES);
            }
        }
    }

    /// Remembers what is left of a block in the page cache.
    fn linger(&mut self, look: &Look, block: u64, tries: u32) {
        let pages = mmap::resident(look.addresses(block)).unwrap_or_default();
        let bytes = pages.iter().map(|page| u64::from(*page)).sum::<u64>() * page_bytes() as u64;
        if bytes > 0 && tries > 0 {
            self.lingering.insert(block, Lingering { bytes, tries });
        }
    }

    fn drop_lingering(&mut self, look: &Look) {
        for (block, left) in std::mem::take(&mut self.lingering) {
            look.stored.drop_cached(block * BLOCK, BLOCK);
            self.linger(look, block, left.tries - 1);
        }
    }
}

/// How far the kernel may read ahead of each walk.
struct Leash {
    bytes: u64,
    /// What the kernel reads beyond it.
    beyond: u64,
    walks: u64,
}

impl Leash {
    fn of(look: &Look, budget: u64, walks: u64) -> Leash {
        let share = budget / AHEAD_PART.1 * AHEAD_PART.0 / walks.max(1);
        let beyond = WINDOWS * look.backing.read_ahead_bytes();
        // Where the kernel's window is too large for it, quire reads itself, and not a page more.
        let beyond = if 2 * beyond <= share { beyond } else { 0 };
        let page = page_bytes() as u64;
        Leash { bytes: (share - beyond).min(LEASH_MOST) / page * page, beyond, walks }
    }

    /// What is set aside for all walks.
    fn all(&self) -> u64 {
        self.walks * (self.bytes + self.beyond)
    }

    /// What is, or may be, read ahead of a walk that has no translation yet.
    fn reserved(&self, walk: &Walk) -> u64 {
        let ahead = walk.ahead.map_or(0, |ahead| ahead.end().saturating_sub(walk.over.end()) as u64);
        if walk.ahead.is_some() { ahead + self.beyond } else { 0 }
    }

    /// Has the kernel read on where a walk has come near the end of what was.
    fn lead(&self, look: &Look, walk: &mut Walk) {
        let at = walk.over.end();
        let before = walk.ahead.unwrap_or(Range { start: at, len: 0 });
        let end = look.range.end().min(at + self.bytes as usize);
        if before.end() >= end || before.end() > at + self.bytes as usize / LEFT_PART.1 * LEFT_PART.0 {
            return;
        }
        if self.beyond == 0 {
            let start = before.end().clamp(at, end);
            look.backing.will_need(look.offset_of(start), (end - start) as u64);
        } else {
            // What lies behind is one map entry with the rest again.
            let walked = Range { start: before.start, len: at.saturating_sub(before.start) };
            let _ = look.advise(walked, libc::MADV_RANDOM);
            let _ = look.advise(Range { start: at, len: end - at }, libc::MADV_NORMAL);
        }
        walk.ahead = Some(Range { start: at, len: end - at });
    }
}

/// Has what was read ahead of a walk that stopped leave the page cache, but for what is mapped.
pub fn drop_ahead(look: &Look, ahead: Range) {
    let beyond = WINDOWS * look.backing.read_ahead_bytes();
    let _ = look.advise(ahead, libc::MADV_RANDOM);
    look.stored.drop_cached(look.offset_of(ahead.start), ahead.len as u64 + beyond);
}

impl Look {
    /// The block of the file that an address shows.
    fn block(&self, address: usize) -> u64 {
        self.offset_of(address) / BLOCK
    }

    /// The addresses that show a block.
    fn addresses(&self, block: u64) -> Range {
        let at = |offset: u64| offset.saturating_sub(self.offset).min(self.range.len as u64) as usize;
        let (start, end) = (at(block * BLOCK), at((block + 1) * BLOCK));
        Range { start: self.range.start + start, len: end - start }
    }
}

/// Bytes of each block that lie in runs of pages.
fn bytes_of_blocks(look: &Look, runs: &[Range]) -> BTreeMap<u64, u64> {
    let mut blocks = BTreeMap::new();
    for run in runs {
        for block in look.block(run.start)..=look.block(run.end() - 1) {
            let part = look.addresses(block);
            let bytes = part.end().min(run.end()) - part.start.max(run.start);
            *blocks.entry(block).or_insert(0) += bytes as u64;
        }
    }
    blocks
}
