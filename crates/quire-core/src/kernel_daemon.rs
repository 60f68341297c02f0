//! Watches the ranges that the kernel pages: sets the advice that their touches ask for, reads ahead of
//! walks, and keeps budgets.
//!
//! The kernel tells of no touch, but which pages have translations (PAGEMAP_SCAN). Pages that came since
//! the last look are the touches, to about 16 pages, as the kernel maps what is cached around a fault.
//!
//! - A range is `MADV_RANDOM` before anybody is given its addresses ([`hush`]), so that a touch brings in one
//!   page: the kernel's own default reads as much around it as a device's readahead is (128 KiB, or many MiB).
//! - What may be the beginning of a walk has quire read ahead, twice what it has been over.
//! - A walk (`walks.rs`) makes it `MADV_NORMAL`: the kernel reads ahead in large folios, while the walk goes over
//!   what was read. (`MADV_SEQUENTIAL` does so from the first byte of a file only; a walk that it meets further
//!   on waits for every window.) Where that window is small quire asks for more (posix_fadvise(3)).
//! - Scattered touches make it `MADV_RANDOM` again.
//!
//! Budgets are kept in `budget.rs`.
//!
//! Where the kernel tells of no translations (before Linux 6.7) nothing of this is done.
//!
//! One thread, which ends when there has been nothing to watch for a while. The child of a fork has none,
//! until a new mapping is given out or there is a budget to keep, and the kernel's default again
//! ([`reset_in_child`]).
#![allow(unsafe_code)]

mod budget;
mod walks;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crate::pmap::kernel::write_back::Stored;
use crate::pmap::kernel::{NOT_ADVISED, Region, Wishes};
use crate::space::SPACE;
use crate::sys::backing::Backing;
use crate::sys::memory::Range;
use crate::sys::pagemap::Pagemap;
use crate::sys::{futex, mmap, thread};
use budget::{Blocks, drop_ahead};
use walks::{Noted, Walks};

/// Smaller mappings are not worth a look.
const LEAST_BYTES: u64 = 1 << 20;
/// While it is not known how a range is walked, or a budget is all but used up.
const TICK_LEAST: Duration = Duration::from_micros(500);
/// While a range is new: each page that a walk touches before it is known as one is waited for by itself.
const TICK_NEW: Duration = Duration::from_micros(100);
/// Looks at touches in which a range is new.
const NEW_LOOKS: u32 = 64;
/// While more is mapped than a budget allows.
const TICK_OVER: Duration = Duration::from_micros(50);
const TICK_BUSY: Duration = Duration::from_millis(2);
const TICK_MOST: Duration = Duration::from_millis(256);
/// The most while there is a budget: pages that are cached come by themselves, and ring no bell.
const TICK_BOUNDED: Duration = Duration::from_millis(32);
/// While there is nothing to see, looking takes this part of the time: of ten thousand mappings too.
const IDLE_PART: u32 = 32;
/// Ticks of the longest kind without anything to watch, after which the thread ends.
const IDLE_TICKS: u32 = 8;
/// Scattered touches in looks without a walk, for "random".
const SCATTERED: usize = 4;
/// Read ahead of a walk, by the kernel or else by quire.
const AHEAD: u64 = 8 << 20;
/// Read ahead of what may become one, of the bytes that it was over.
const AHEAD_OF_BEGINNING: usize = 2;

static RUNS: AtomicBool = AtomicBool::new(false);
static BELL: AtomicU32 = AtomicU32::new(0);
/// The daemon sleeps longer than a moment.
static DOZES: AtomicBool = AtomicBool::new(false);

/// Whether its touches are worth a look, and can be seen.
fn is_watched(region: &Region) -> bool {
    region.size >= LEAST_BYTES
        && region.backing.as_ref().is_some_and(|file| file.is_on_disk())
        && Pagemap::probe().is_ok()
}

/// The addresses of a mapping are known to somebody, or wishes changed.
pub fn notice(region: &Region) {
    if !is_watched(region) {
        return;
    }
    if !RUNS.load(Ordering::Acquire) && !RUNS.swap(true, Ordering::AcqRel) {
        if thread::spawn("quire-kernel", serve).is_err() {
            RUNS.store(false, Ordering::Release); // advice is a hint; a budget is looked at again
        }
        return;
    }
    if DOZES.swap(false, Ordering::AcqRel) {
        BELL.fetch_add(1, Ordering::AcqRel);
        futex::wake_all(&BELL);
    }
}

/// Turns the kernel's reading ahead off, until a walk is seen. Where nobody sees walks its default stays.
pub fn hush(region: &Region) {
    if is_watched(region)
        && region.wishes.advised.load(Ordering::Relaxed) == NOT_ADVISED
        && !region.wishes.hushed.swap(true, Ordering::Relaxed)
    {
        // SAFETY: pages of the region; the advice takes nothing.
        let _ = unsafe { mmap::advise(region.range, libc::MADV_RANDOM) };
    }
}

/// Whether anybody can have touched it.
fn is_exposed(region: &&Region) -> bool {
    region.wishes.exposed.load(Ordering::Acquire)
}

/// A region while the daemon looks at it.
struct Look {
    id: u64,
    range: Range,
    offset: u64,
    stored: Stored,
    backing: Arc<Backing>,
    wishes: Arc<Wishes>,
    users: Arc<AtomicU32>,
}

impl Look {
    fn of(region: &Region) -> Option<Look> {
        let backing =
            region.backing.as_ref().filter(|file| region.size >= LEAST_BYTES && file.is_on_disk())?;
        region.users.fetch_add(1, Ordering::AcqRel);
        Some(Look {
            id: region.id,
            range: region.range,
            offset: region.offset,
            stored: Stored::of(region),
            backing: Arc::clone(backing),
            wishes: Arc::clone(&region.wishes),
            users: Arc::clone(&region.users),
        })
    }

    /// Where in the file the byte at an address is.
    fn offset_of(&self, address: usize) -> u64 {
        self.offset + (address - self.range.start) as u64
    }

    /// # Errors
    /// The errno: EINVAL where taking pages away is refused, as of locked ones.
    fn advise(&self, range: Range, advice: i32) -> Result<(), i32> {
        let end = range.end().min(self.range.end());
        if range.start >= end {
            return Ok(());
        }
        // SAFETY: pages of a region that is in use; the advice takes nothing from a file.
        unsafe { mmap::advise(Range { start: range.start, len: end - range.start }, advice) }
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
    let Ok(pagemap) = Pagemap::open() else {
        RUNS.store(false, Ordering::Release); // no descriptor is left: the next mapping asks again
        unhush(SPACE.kernel().values());
        return;
    };
    loop {
        watch(&pagemap);
        RUNS.store(false, Ordering::Release);
        // One that came just now has found this thread running.
        let more = SPACE.kernel().values().filter(is_exposed).filter_map(Look::of).count() > 0;
        if !more || RUNS.swap(true, Ordering::AcqRel) {
            return;
        }
    }
}

/// Looks at all there is, until for a while there is nothing.
fn watch(pagemap: &Pagemap) {
    let mut watched: HashMap<u64, Watch> = HashMap::new();
    let (mut tick, mut idle, mut time) = (TICK_LEAST, 0, 0);
    while idle < IDLE_TICKS {
        let seen = BELL.load(Ordering::Acquire);
        // One that was given out just now may be gone in a moment: it is not held up.
        let known = |region: &&Region| is_exposed(region) && region.wishes.seen.swap(true, Ordering::Relaxed);
        let looks: Vec<Look> = SPACE.kernel().values().filter(known).filter_map(Look::of).collect();
        watched.retain(|id, _| looks.iter().any(|look| look.id == *id));
        time += 1;
        let began = thread::now_ns();
        let pace = looks.iter().map(|look| watched.entry(look.id).or_default().look(look, pagemap, time));
        let pace = pace.max().unwrap_or(Pace::Idle);
        let bounded = looks.iter().any(|look| look.wishes.is_bounded());
        let took = Duration::from_nanos(thread::now_ns() - began);
        tick = match pace {
            Pace::Over => TICK_OVER,
            Pace::New => TICK_NEW,
            Pace::Pressing => TICK_LEAST,
            Pace::Busy => TICK_BUSY,
            Pace::Idle => {
                (tick * 2).min(if bounded { TICK_BOUNDED } else { TICK_MOST }).max(took * IDLE_PART)
            }
        };
        idle = if looks.is_empty() && tick >= TICK_MOST { idle + 1 } else { 0 };
        drop(looks); // no mapping's end waits for a tick
        DOZES.store(tick > TICK_LEAST, Ordering::Release);
        futex::wait(&BELL, seen, tick);
        if BELL.load(Ordering::Acquire) != seen {
            tick = TICK_NEW;
        }
    }
}

/// How soon the next look is to be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Pace {
    /// No page has come since the last one.
    Idle,
    /// Some have.
    Busy,
    /// They were not what the advice expects, or there is a budget to keep.
    Pressing,
    /// The same, in a range that is new.
    New,
    /// They were more than a budget allows.
    Over,
}

/// What is known of one region.
#[derive(Default)]
struct Watch {
    runs: Vec<Range>,
    walks: Walks,
    /// The advice that is in force for all of it.
    advice: Option<i32>,
    /// Looks that saw pages come.
    looks: u32,
    /// Scattered touches of late.
    scattered: usize,
    /// Up to where was read ahead.
    ahead: usize,
    blocks: Blocks,
}

impl Watch {
    /// Looks, and does what is to be done.
    fn look(&mut self, look: &Look, pagemap: &Pagemap, time: u64) -> Pace {
        let leashed = look.wishes.is_leashed();
        let advised = look.wishes.advised.load(Ordering::Relaxed) != NOT_ADVISED;
        if !advised && (self.advice.is_none() || leashed) {
            self.set_advice(look, libc::MADV_RANDOM);
        }
        let mut runs = Vec::new();
        if pagemap.present(look.range, &mut |run| runs.push(run)).is_err() {
            return Pace::Idle;
        }
        let fresh = fresh(&self.runs, &runs);
        let noted = if fresh.is_empty() { Noted::default() } else { self.walks.note(&fresh) };
        self.looks = self.looks.saturating_add(u32::from(!fresh.is_empty()));
        noted.in_vain.iter().for_each(|ahead| drop_ahead(look, *ahead));
        let before = self.advice;
        if !advised && !leashed {
            self.walks.clear_ahead().for_each(|ahead| drop_ahead(look, ahead));
            if !fresh.is_empty() {
                self.advise(look, &noted);
            }
        }
        let bounded = look.wishes.is_bounded();
        let mapped: u64 = runs.iter().map(|run| run.len as u64).sum();
        let over = mapped > look.wishes.budget.load(Ordering::Relaxed);
        self.runs = if bounded { self.blocks.keep(look, runs, &mut self.walks, time) } else { runs };
        let settled = self.advice == before && (self.scattered >= SCATTERED || noted.walking);
        match fresh.is_empty() {
            true => Pace::Idle,
            false if over => Pace::Over,
            false if !bounded && !settled && self.looks <= NEW_LOOKS => Pace::New,
            false if bounded || !settled => Pace::Pressing,
            false => Pace::Busy,
        }
    }

    /// Follows walks and notices scattered touches.
    fn advise(&mut self, look: &Look, noted: &Noted) {
        if noted.walking {
            self.scattered = 0;
            self.set_advice(look, libc::MADV_NORMAL);
            if look.backing.read_ahead_bytes() < AHEAD
                && let Some(walk) = self.walks.forward().last()
            {
                let at = walk.over.end();
                self.read_ahead(look, at, AHEAD as usize);
            }
            return;
        }
        if let Some(over) = noted.beginning {
            self.read_ahead(look, over.end(), AHEAD_OF_BEGINNING * over.len);
        }
        self.scattered =
            if noted.scattered == 0 { self.scattered / 2 } else { self.scattered + noted.scattered };
        if self.scattered >= SCATTERED {
            self.set_advice(look, libc::MADV_RANDOM);
        }
    }

    fn set_advice(&mut self, look: &Look, advice: i32) {
        let hushed = look.wishes.hushed.swap(advice == libc::MADV_RANDOM, Ordering::Relaxed);
        if self.advice.replace(advice) == Some(advice) && hushed == (advice == libc::MADV_RANDOM) {
            return;
        }
        let _ = look.advise(look.range, advice);
        // The program's own, given at this very moment.
        let own = look.wishes.advised.load(Ordering::Relaxed);
        if own != NOT_ADVISED {
            let _ = look.advise(look.range, own);
        }
    }

    /// Has the kernel read what a walk that has come to `at` will touch, so many bytes.
    fn read_ahead(&mut self, look: &Look, at: usize, bytes: usize) {
        let end = look.range.end().min(at + bytes);
        let start = if (at..=end).contains(&self.ahead) { self.ahead } else { at };
        if start < end && (start == at || start < at + bytes / 2) {
            look.backing.will_need(look.offset_of(start), (end - start) as u64);
            self.ahead = end;
        }
    }
}

/// In the child of a fork, which has no daemon: nobody would end what is good for scattered touches only.
pub fn reset_in_child<'a>(regions: impl Iterator<Item = &'a Region>) {
    RUNS.store(false, Ordering::Release);
    unhush(regions);
}

/// The kernel's default again.
fn unhush<'a>(regions: impl Iterator<Item = &'a Region>) {
    for region in regions.filter(|region| region.wishes.hushed.swap(false, Ordering::Relaxed)) {
        // SAFETY: pages of the region; the advice takes nothing.
        let _ = unsafe { mmap::advise(region.range, libc::MADV_NORMAL) };
    }
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
