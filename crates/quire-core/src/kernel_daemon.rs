//! Watches the ranges that the kernel pages: sets the advice that their touches ask for, reads ahead of
//! walks, and keeps budgets.
//!
//! The kernel tells of no touch, but which pages have translations (PAGEMAP_SCAN). Pages that came since
//! the last look are the touches, to about 16 pages, as the kernel maps what is cached around a fault, or
//! to a huge page where the page cache has those:
//!
//! - some, far from each other: `MADV_RANDOM`, as the kernel's own readahead would read 17 times too much;
//! - a run that begins where the last one ended, some looks in a row: what follows is read ahead, by read(2) of a description of our own, whose
//!   readahead the faults of the mapping do not disturb; faults then find the pages cached.
//!
//! A budget is kept by second chance over blocks of 2 MiB of the file: the translations of the blocks that have had
//! theirs longest are taken away (`MADV_DONTNEED`, which takes nothing from a file), those that are touched
//! again come back at the cost of a minor fault and are the youngest. Where the page cache is to be dropped
//! too, what has not come back until the next look is written back and dropped.
//!
//! One thread, which ends when there has been nothing to watch for a while.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crate::pmap::kernel::{Region, Wishes};
use crate::space::SPACE;
use crate::sys::backing::Backing;
use crate::sys::memory::{Range, page_bytes};
use crate::sys::pagemap::Pagemap;
use crate::sys::{futex, mmap, thread};

/// Smaller mappings are not worth a look.
const LEAST_BYTES: u64 = 1 << 20;
const TICK_LEAST: Duration = Duration::from_millis(2);
/// Where a budget is being overrun.
const TICK_OVER: Duration = Duration::from_micros(200);
const TICK_MOST: Duration = Duration::from_millis(256);
/// Ticks of the longest kind without anything to watch, after which the thread ends.
const IDLE_TICKS: u32 = 8;
/// What goes at once: the largest folio of the page cache, of which the kernel drops no part.
const BLOCK: u64 = 2 << 20;
/// Runs that came and are no walk, and their bytes at most, for "random".
const SCATTERED: usize = 4;
const SCATTERED_BYTES: usize = 4 << 20;
/// Looks in a row that saw a walk go on.
const STREAK: u32 = 3;
/// Read ahead of a walk at most, and between two looks.
const AHEAD: usize = 32 << 20;
const AHEAD_ONCE: usize = 8 << 20;
const READ_BYTES: usize = 1 << 20;
/// Trimmed from this part of the budget on, down to that one.
const TRIM_FROM: (u64, u64) = (3, 4);
const TRIM_TO: (u64, u64) = (1, 2);

static RUNS_IN: AtomicU32 = AtomicU32::new(0);
static BELL: AtomicU32 = AtomicU32::new(0);
/// The daemon sleeps longer than a moment.
static DOZES: AtomicBool = AtomicBool::new(false);

/// A mapping was made, or wishes changed.
pub fn notice(region: &Region) {
    if region.size < LEAST_BYTES || region.backing.is_none() {
        return;
    }
    let own = std::process::id();
    let runs_in = RUNS_IN.load(Ordering::Acquire);
    if runs_in != own && RUNS_IN.compare_exchange(runs_in, own, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        if thread::spawn("quire-kernel", serve).is_err() {
            RUNS_IN.store(0, Ordering::Release); // advice is a hint; a budget is looked at again
        }
        return;
    }
    if DOZES.swap(false, Ordering::AcqRel) {
        BELL.fetch_add(1, Ordering::AcqRel);
        futex::wake_all(&BELL);
    }
}

/// A region while the daemon looks at it.
struct Look {
    id: u64,
    range: Range,
    writes: bool,
    offset: u64,
    backing: Arc<Backing>,
    wishes: Arc<Wishes>,
    users: Arc<AtomicU32>,
}

impl Look {
    fn of(region: &Region) -> Option<Look> {
        let backing =
            region.backing.as_ref().filter(|file| file.is_regular() && region.size >= LEAST_BYTES)?;
        region.users.fetch_add(1, Ordering::AcqRel);
        Some(Look {
            id: region.id,
            range: region.range,
            writes: region.is_shared_writable(),
            offset: region.offset,
            backing: Arc::clone(backing),
            wishes: Arc::clone(&region.wishes),
            users: Arc::clone(&region.users),
        })
    }

    /// The block of the file that an address shows.
    fn block(&self, address: usize) -> u64 {
        (self.offset + (address - self.range.start) as u64) / BLOCK
    }

    /// The addresses that show a block.
    fn addresses(&self, block: u64) -> Range {
        let at = |offset: u64| offset.saturating_sub(self.offset).min(self.range.len as u64) as usize;
        let (start, end) = (at(block * BLOCK), at((block + 1) * BLOCK));
        Range { start: self.range.start + start, len: end - start }
    }

    fn advise(&self, range: Range, advice: i32) {
        let end = range.end().min(self.range.end());
        if range.start < end {
            // SAFETY: pages of a region that is in use; the advice takes nothing from a file.
            let _ = unsafe { mmap::advise(Range { start: range.start, len: end - range.start }, advice) };
        }
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        if self.users.fetch_sub(1, Ordering::AcqRel) == 1 {
            futex::wake_all(&self.users);
        }
    }
}

fn serve() {
    let Ok(pagemap) = Pagemap::open() else { return };
    loop {
        watch(&pagemap);
        RUNS_IN.store(0, Ordering::Release);
        // One that came just now has found this thread running.
        let more = SPACE.kernel().values().filter_map(Look::of).count() > 0;
        let own = std::process::id();
        if !more || RUNS_IN.compare_exchange(0, own, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return;
        }
    }
}

/// Looks at all there is, until for a while there is nothing.
fn watch(pagemap: &Pagemap) {
    let mut watched: HashMap<u64, Watch> = HashMap::new();
    let (mut tick, mut idle, mut time) = (TICK_LEAST, 0, 0);
    let mut scratch = Vec::new();
    while idle < IDLE_TICKS {
        let seen = BELL.load(Ordering::Acquire);
        // One that was made just now may be gone in a moment: it is not held up.
        let known = |region: &&Region| region.wishes.seen.swap(true, Ordering::Relaxed);
        let looks: Vec<Look> = SPACE.kernel().values().filter(known).filter_map(Look::of).collect();
        watched.retain(|id, _| looks.iter().any(|look| look.id == *id));
        time += 1;
        let mut all = Looked::default();
        for look in &looks {
            let watch = watched.entry(look.id).or_default();
            let Looked { busy, over } = watch.look(look, pagemap, time);
            all = Looked { busy: all.busy || busy, over: all.over || over };
        }
        let empty = looks.is_empty();
        drop(looks); // no mapping's end waits for the disk
        watched.values_mut().for_each(|watch| watch.read_ahead(&mut scratch));
        tick = match all {
            Looked { over: true, .. } => TICK_OVER,
            Looked { busy: true, .. } => TICK_LEAST,
            _ => (tick * 2).min(TICK_MOST),
        };
        idle = if empty && tick == TICK_MOST { idle + 1 } else { 0 };
        DOZES.store(tick > 2 * TICK_LEAST, Ordering::Release);
        futex::wait(&BELL, seen, tick);
        if BELL.load(Ordering::Acquire) != seen {
            tick = TICK_LEAST;
        }
    }
}

/// A block with translations, or that had them at the last look.
struct Block {
    /// The look that saw it come.
    since: u64,
    /// Its translations were taken away, at this look.
    taken: Option<u64>,
}

/// What came of a look.
#[derive(Clone, Copy, Default)]
struct Looked {
    /// Pages have come since the last one.
    busy: bool,
    /// They were too many.
    over: bool,
}

/// What is known of one region.
#[derive(Default)]
struct Watch {
    runs: Vec<Range>,
    random: bool,
    /// Scattered touches of late.
    scattered: usize,
    /// Where the runs of the last look ended, and for how many looks one has gone on from there.
    ends: Vec<usize>,
    streak: u32,
    /// The file, opened for reading ahead, where to begin, and where to end.
    reader: Option<File>,
    ahead: std::ops::Range<u64>,
    blocks: BTreeMap<u64, Block>,
}

impl Watch {
    /// Looks, and does what is to be done.
    fn look(&mut self, look: &Look, pagemap: &Pagemap, time: u64) -> Looked {
        let mut runs = Vec::new();
        if pagemap.present(look.range, &mut |run| runs.push(run)).is_err() {
            return Looked::default();
        }
        let fresh = fresh(&self.runs, &runs);
        let budget = look.wishes.budget.load(Ordering::Relaxed);
        if !look.wishes.advised.load(Ordering::Relaxed) {
            self.advise(look, &fresh);
        }
        if budget != u64::MAX {
            self.note_blocks(look, &runs, time);
        }
        let over = budget != u64::MAX && self.keep(look, &runs, budget, time);
        self.runs = runs;
        Looked { busy: !fresh.is_empty(), over }
    }

    /// Follows walks and notices scattered touches.
    fn advise(&mut self, look: &Look, fresh: &[Range]) {
        if fresh.is_empty() {
            return;
        }
        let (walks, others): (Vec<Range>, Vec<Range>) =
            fresh.iter().partition(|run| self.ends.contains(&run.start));
        self.ends = fresh.iter().map(|run| run.end()).collect();
        self.streak = if walks.is_empty() { 0 } else { self.streak + 1 };
        let scattered = others.iter().filter(|run| run.len < SCATTERED_BYTES).count();
        if self.streak >= STREAK
            && let Some(run) = walks.iter().max_by_key(|run| run.len)
        {
            if std::mem::take(&mut self.random) {
                look.advise(look.range, libc::MADV_NORMAL);
            }
            self.scattered = 0;
            if self.reader.is_none() {
                self.reader = look.backing.reader().ok();
            }
            let at = look.offset + (run.end() - look.range.start) as u64;
            let last = look.offset + look.range.len as u64;
            let budget = look.wishes.budget.load(Ordering::Relaxed);
            let window = (AHEAD as u64).min(budget / 8);
            self.ahead = at.max(self.ahead.start.min(at + window))..(at + window).min(last);
            return;
        }
        self.scattered = if scattered == 0 { self.scattered / 2 } else { self.scattered + scattered };
        if !self.random && self.scattered >= SCATTERED {
            self.random = true;
            self.ahead = 0..0;
            look.advise(look.range, libc::MADV_RANDOM);
        }
    }

    /// Has the page cache hold what a walk will touch.
    fn read_ahead(&mut self, scratch: &mut Vec<u8>) {
        let Some(reader) = &self.reader else { return };
        scratch.resize(READ_BYTES, 0);
        let end = self.ahead.end.min(self.ahead.start + AHEAD_ONCE as u64);
        while self.ahead.start < end {
            match reader.read_at(scratch, self.ahead.start) {
                Ok(got) if got > 0 => self.ahead.start += got as u64,
                _ => {
                    self.ahead = 0..0; // the walk meets the end, or the error, itself
                    return;
                }
            }
        }
    }

    fn note_blocks(&mut self, look: &Look, runs: &[Range], time: u64) {
        let mut here = std::collections::BTreeSet::new();
        for run in runs {
            here.extend(look.block(run.start)..=look.block(run.end() - 1));
        }
        for block in &here {
            let known = self.blocks.entry(*block).or_insert(Block { since: time, taken: None });
            if known.taken.is_some_and(|taken| taken < time) {
                *known = Block { since: time, taken: None }; // touched again
            }
        }
        self.blocks.retain(|block, known| here.contains(block) || known.taken.is_some());
    }

    /// Takes what is over the budget; whether anything was.
    fn keep(&mut self, look: &Look, runs: &[Range], budget: u64, time: u64) -> bool {
        let drops = look.wishes.drops.load(Ordering::Relaxed);
        let cached = if drops { cached_blocks(look) } else { None };
        let mapped: u64 = runs.iter().map(|run| run.len as u64).sum();
        let resident = cached.as_ref().map_or(mapped, |blocks| blocks.values().sum::<u64>());
        look.wishes.peak.fetch_max(resident, Ordering::Relaxed);
        if resident <= budget / TRIM_FROM.1 * TRIM_FROM.0 {
            return false;
        }
        let mut over = resident - budget / TRIM_TO.1 * TRIM_TO.0;
        // What nobody touches (read ahead in vain, or taken and not missed) has no age and goes first.
        let age = |block: &u64| {
            self.blocks.get(block).filter(|known| known.taken.is_none()).map_or(0, |known| known.since)
        };
        let held = cached.unwrap_or_else(|| bytes_of_blocks(look, runs));
        let mut victims: Vec<(u64, u64)> = held.into_iter().collect();
        victims.sort_by_key(|(block, _)| age(block));
        let mut chosen = Vec::new();
        for (block, bytes) in victims {
            if over == 0 {
                break;
            }
            over = over.saturating_sub(bytes);
            look.wishes.trimmed.fetch_add(bytes, Ordering::Relaxed);
            chosen.push(block);
        }
        chosen.sort_unstable();
        for blocks in chosen.chunk_by(|one, next| one + 1 == *next) {
            self.take(look, blocks, drops, time);
        }
        true
    }

    /// Takes some blocks, one after the other in the file, in as few calls as can be: dropping pages
    /// waits for all CPUs.
    fn take(&mut self, look: &Look, blocks: &[u64], drops: bool, time: u64) {
        let first = look.addresses(blocks[0]);
        let last = look.addresses(blocks[blocks.len() - 1]);
        let range = Range { start: first.start, len: last.end() - first.start };
        look.advise(range, libc::MADV_DONTNEED);
        for block in blocks {
            if let Some(known) = self.blocks.get_mut(block) {
                known.taken = Some(time);
            }
        }
        if drops {
            if look.writes {
                let _ = mmap::sync(range, libc::MS_SYNC);
            }
            look.backing.drop_cached(blocks[0] * BLOCK, blocks.len() as u64 * BLOCK);
            blocks.iter().for_each(|block| _ = self.blocks.remove(block));
        }
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

/// Bytes of each block in the page cache, those without any left out.
fn cached_blocks(look: &Look) -> Option<BTreeMap<u64, u64>> {
    let pages = mmap::resident(look.range).ok()?;
    let mut blocks = BTreeMap::new();
    for (index, _) in pages.iter().enumerate().filter(|(_, page)| **page != 0) {
        let block = look.block(look.range.start + index * page_bytes());
        *blocks.entry(block).or_insert(0) += page_bytes() as u64;
    }
    Some(blocks)
}

/// The parts of `now` that were not in `before`, both in order.
fn fresh(before: &[Range], now: &[Range]) -> Vec<Range> {
    let mut found = Vec::new();
    let mut old = before.iter().peekable();
    for run in now {
        let mut at = run.start;
        while old.next_if(|known| known.end() <= run.start).is_some() {}
        while let Some(known) = old.peek().filter(|known| known.start < run.end()) {
            if at < known.start {
                found.push(Range { start: at, len: known.start - at });
            }
            at = known.end().max(at);
            if known.end() > run.end() {
                break; // the rest of it is gone, or is in a later run
            }
            old.next();
        }
        if at < run.end() {
            found.push(Range { start: at, len: run.end() - at });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: usize, end: usize) -> Range {
        Range { start, len: end - start }
    }

    #[test]
    fn what_is_fresh() {
        assert_eq!(fresh(&[], &[run(5, 9)]), [run(5, 9)]);
        assert_eq!(fresh(&[run(5, 7)], &[run(5, 9)]), [run(7, 9)]);
        assert_eq!(fresh(&[run(5, 9)], &[run(5, 9)]), []);
        assert_eq!(fresh(&[run(1, 2), run(6, 7)], &[run(1, 9)]), [run(2, 6), run(7, 9)]);
        assert_eq!(fresh(&[run(5, 9)], &[run(2, 9), run(20, 21)]), [run(2, 5), run(20, 21)]);
        assert_eq!(fresh(&[run(0, 50)], &[run(3, 9), run(20, 60)]), [run(50, 60)]);
    }

    #[test]
    fn fresh_equals_a_model() {
        let mut state = 88172645463325252u64;
        for _ in 0..2000 {
            let mut random = |limit: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % limit
            };
            let mut pages = || (0..24).map(|_| random(2) == 1).collect::<Vec<bool>>();
            let (before, now) = (pages(), pages());
            let runs = |pages: &[bool]| {
                let mut runs: Vec<Range> = Vec::new();
                for (page, _) in pages.iter().enumerate().filter(|(_, here)| **here) {
                    match runs.last_mut().filter(|last| last.end() == page) {
                        Some(last) => last.len += 1,
                        None => runs.push(Range { start: page, len: 1 }),
                    }
                }
                runs
            };
            let found = fresh(&runs(&before), &runs(&now));
            let told: Vec<usize> = found.iter().flat_map(|run| run.start..run.end()).collect();
            let model: Vec<usize> = (0..24).filter(|page| now[*page] && !before[*page]).collect();
            assert_eq!(told, model, "{before:?} {now:?}");
        }
    }
}
