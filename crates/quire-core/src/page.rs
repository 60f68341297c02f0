//! Page states and their legal transitions.
//!
//! One 32-bit word per granule, zero while it is absent, so that a large sparse mapping costs memory only
//! near pages that are not:
//!
//! ```text
//!   bits 0..3  state
//!   bit  3     REFERENCED  touched since the clock hand last passed
//!   bit  4     WANTED      a thread waits for the state to change (futex on the word)
//!   bit  5     BAD         holds 0xFF filler in place of data that could not be had
//!   bit  6     AHEAD       was filled ahead of need
//!   bit  7     DIRTY       differs from its backing, as far as has been noticed
//!   bit  8     PINNED      stays resident
//!   bit  9     HUGE        part of a huge page, which goes as a whole; the policy knows its first granule
//!   bit  10    COVERED  shows filler of plain memory, out of reach of the pmap
//!   bits 11..  how many threads wait for it in the kernel, or, POISONED, have yet to meet the error
//!
//!                 claim                 installed            protection changes, written back
//!      ABSENT ───────────▶ LOADING ───────────────▶ RESIDENT ◀──────▶ HELD
//!        ▲ ▲                │  │  ▲                    │
//!        │ └── given up ────┘  │  └── filler ─┐        │ chosen by the policy
//!        │                     ▼              │        ▼
//!        │                  POISONED ─────────┘     EVICTING
//!        └──────────────── translations gone ──────────┘
//! ```
//!
//! Who moves a page out of ABSENT, POISONED or RESIDENT (a compare-and-swap) owns it until it
//! moves it on; all others wait for that page only. A HELD page stays readable.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::errors::MapError;
use crate::sys::{futex, lazy_words::LazyWords};
use crate::units::{PageCount, PageIndex};

/// Touched since the clock hand last passed.
pub const REFERENCED: u32 = 1 << 3;
/// A thread waits for the state to change.
pub const WANTED: u32 = 1 << 4;
/// Holds filler in place of data.
pub const BAD: u32 = 1 << 5;
/// Was filled ahead of need.
pub const AHEAD: u32 = 1 << 6;
/// Differs from its backing, as far as has been noticed.
pub const DIRTY: u32 = 1 << 7;
/// Stays resident.
pub const PINNED: u32 = 1 << 8;
/// Part of a huge page.
pub const HUGE: u32 = 1 << 9;
/// Shows filler of plain memory, out of reach of the pmap.
pub const COVERED: u32 = 1 << 10;
const STATE: u32 = 7;
const WAITER: u32 = 1 << 11;

/// Where a page is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PageState {
    /// Not in memory.
    Absent = 0,
    /// Its owner fills it.
    Loading = 1,
    /// Installed: threads read it without our knowing.
    Resident = 2,
    /// Its owner removes it.
    Evicting = 3,
    /// A touch raises SIGBUS: the page could not be filled.
    Poisoned = 4,
    /// Resident, and its owner changes its protection or writes it back.
    Held = 5,
}

impl PageState {
    fn of(word: u32) -> PageState {
        match word & STATE {
            0 => PageState::Absent,
            1 => PageState::Loading,
            2 => PageState::Resident,
            3 => PageState::Evicting,
            4 => PageState::Poisoned,
            5 => PageState::Held,
            other => unreachable!("page word with state {other}"),
        }
    }

    /// Whether the state machine above has this arrow.
    pub fn may_become(self, next: PageState) -> bool {
        use PageState::{Absent, Evicting, Held, Loading, Poisoned, Resident};
        matches!(
            (self, next),
            (Absent | Poisoned, Loading)
                | (Loading, Absent | Resident | Poisoned)
                | (Resident, Evicting | Held)
                | (Held, Resident)
                | (Evicting, Absent | Resident)
        )
    }
}

/// The states of all granules of one memory object.
pub struct PageTable(LazyWords<AtomicU32>);

impl PageTable {
    /// All absent.
    ///
    /// # Errors
    /// When the address space has no room.
    pub fn new(pages: PageCount) -> Result<Self, MapError> {
        let words = usize::try_from(pages.0)
            .map_err(|_| MapError::Invalid(format!("{} pages do not fit this machine", pages.0)))?;
        LazyWords::new(words).map(PageTable)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn word(&self, page: PageIndex) -> &AtomicU32 {
        &self.0.as_slice()[page.0 as usize]
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.0.as_slice().len()
    }

    /// Whether there are no pages.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The state now.
    pub fn state(&self, page: PageIndex) -> PageState {
        PageState::of(self.word(page).load(Ordering::Acquire))
    }

    /// Whether the flag is set now.
    pub fn has(&self, page: PageIndex, flag: u32) -> bool {
        self.word(page).load(Ordering::Acquire) & flag != 0
    }

    /// Moves a page from `from` to `to`; false when it was not in `from`. The mover owns it.
    pub fn claim(&self, page: PageIndex, from: PageState, to: PageState) -> bool {
        assert!(from.may_become(to), "{from:?} -> {to:?}");
        let stays = if to == PageState::Evicting { PINNED } else { 0 };
        let moves =
            |word| (PageState::of(word) == from && word & stays == 0).then_some((word & !STATE) | to as u32);
        if from != PageState::Absent {
            return self.update(page, moves);
        }
        if self.state(page) != from {
            return false;
        }
        self.0.begin(page.0 as usize);
        let claimed = self.update(page, moves);
        if !claimed {
            self.end(page); // another thread's
        }
        claimed
    }

    /// A word is not used any more by who claimed it.
    fn end(&self, page: PageIndex) {
        if self.0.end(page.0 as usize) {
            self.0.give_back(&[page.0 as usize]);
        }
    }

    /// Sets and clears flags of a page that is there or on its way; false when it is not.
    pub fn mark(&self, page: PageIndex, set: u32, clear: u32) -> bool {
        use PageState::{Evicting, Held, Loading, Resident};
        self.update(page, |word| {
            matches!(PageState::of(word), Loading | Resident | Held | Evicting)
                .then_some((word & !clear) | set)
        })
    }

    /// Pins a page that is there; false when it is not.
    pub fn pin(&self, page: PageIndex) -> bool {
        use PageState::{Held, Resident};
        self.update(page, |word| matches!(PageState::of(word), Resident | Held).then_some(word | PINNED))
    }

    /// The owner of a HELD or EVICTING page lets it be resident again, with its flags and `set`.
    pub fn keep(&self, page: PageIndex, set: u32) {
        let word = self.word(page);
        let before = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            Some((word & !(STATE | WANTED)) | PageState::Resident as u32 | set)
        });
        let before = before.expect("the update always says what to store");
        assert!(PageState::of(before).may_become(PageState::Resident), "{:?}", PageState::of(before));
        if before & WANTED != 0 {
            futex::wake_all(word);
        }
    }

    /// The owner moves its page on, with new flags, and wakes who waits for it on the futex; true when
    /// threads were counted that wait in the kernel. A page that becomes resident may have been
    /// touched and written, and marked, since it was installed.
    pub fn finish(&self, page: PageIndex, to: PageState, flags: u32) -> bool {
        let waited = self.move_on(page, to, flags);
        if to == PageState::Absent {
            self.end(page);
        }
        waited
    }

    /// As [`PageTable::finish`] for pages that become ABSENT, evicted together.
    pub fn finish_absent(&self, pages: impl Iterator<Item = PageIndex>) {
        let last = |page: &usize| {
            self.move_on(PageIndex(*page as u64), PageState::Absent, 0);
            self.0.end(*page)
        };
        let leaves: Vec<usize> = pages.map(|page| page.0 as usize).filter(last).collect();
        self.0.give_back(&leaves);
    }

    fn move_on(&self, page: PageIndex, to: PageState, flags: u32) -> bool {
        let word = self.word(page);
        let kept = if to == PageState::Resident { DIRTY | REFERENCED } else { 0 };
        let before = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            Some(to as u32 | flags | (word & kept))
        });
        let before = before.expect("the update always says what to store");
        assert!(PageState::of(before).may_become(to), "{:?} -> {to:?}", PageState::of(before));
        if before & WANTED != 0 {
            futex::wake_all(word);
        }
        before >= WAITER
    }

    /// Tests and clears the reference bit.
    pub fn take_referenced(&self, page: PageIndex) -> bool {
        self.update(page, |word| (word & REFERENCED != 0).then_some(word & !REFERENCED))
    }

    /// Notes that a thread wants this page, if it is still in `state`; false when it has moved on.
    pub fn want(&self, page: PageIndex, state: PageState) -> bool {
        self.update(page, |word| (PageState::of(word) == state).then_some(word | WANTED | REFERENCED))
    }

    /// As [`PageTable::want`], for a thread that waits in the kernel and will be woken by who
    /// moves the page on.
    pub fn count_waiter(&self, page: PageIndex, state: PageState) -> bool {
        self.update(page, |word| (PageState::of(word) == state).then(|| (word | REFERENCED) + WAITER))
    }

    /// The owner moves its page to POISONED; the thread that it loaded the page for, and those that
    /// were counted, are to meet the error.
    pub fn finish_poisoned(&self, page: PageIndex) {
        let moved = self.update(page, |word| {
            let poisoned = (word & !(WAITER - 1)) + WAITER;
            (PageState::of(word) == PageState::Loading).then_some(poisoned | PageState::Poisoned as u32)
        });
        assert!(moved, "only its owner moves a page on");
        futex::wake_all(self.word(page));
    }

    /// A thread has met the error of a poisoned page. Returns how many have yet to.
    pub fn met_poison(&self, page: PageIndex) -> u32 {
        self.update(page, |word| {
            (PageState::of(word) == PageState::Poisoned && word >= WAITER).then(|| word - WAITER)
        });
        self.word(page).load(Ordering::Acquire) / WAITER
    }

    fn update(&self, page: PageIndex, next: impl Fn(u32) -> Option<u32>) -> bool {
        self.word(page).fetch_update(Ordering::AcqRel, Ordering::Acquire, next).is_ok()
    }

    /// Waits, at most `limit`, while the page is in `state`.
    pub fn wait_left(&self, page: PageIndex, state: PageState, limit: Duration) {
        if self.want(page, state) {
            let seen = self.word(page).load(Ordering::Acquire);
            if PageState::of(seen) == state && seen & WANTED != 0 {
                futex::wait(self.word(page), seen, limit);
            }
        }
    }

    /// Makes every page absent in the child of a fork.
    ///
    /// # Safety
    /// No other thread exists and no page of the mapping is installed.
    #[allow(unsafe_code)]
    pub unsafe fn reset(&self) {
        // SAFETY: one thread (contract).
        unsafe { self.0.reset() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PageState::{Absent, Evicting, Held, Loading, Poisoned, Resident};

    const STATES: [PageState; 6] = [Absent, Loading, Resident, Evicting, Poisoned, Held];

    #[test]
    fn only_the_drawn_arrows_exist() {
        let arrows: usize =
            STATES.iter().map(|from| STATES.iter().filter(|to| from.may_become(**to)).count()).sum();
        assert_eq!(arrows, 10);
        assert!(!Absent.may_become(Resident) && !Resident.may_become(Absent));
    }

    #[test]
    fn one_claimant_wins() {
        let table = PageTable::new(PageCount(1)).unwrap();
        let wins: usize = std::thread::scope(|scope| {
            let claims: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| usize::from(table.claim(PageIndex(0), Absent, Loading))))
                .collect();
            claims.into_iter().map(|claim| claim.join().unwrap()).sum()
        });
        assert_eq!(wins, 1);
    }

    #[test]
    fn a_waiter_is_woken_by_finish() {
        let table = PageTable::new(PageCount(1)).unwrap();
        assert!(table.claim(PageIndex(0), Absent, Loading));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                while table.state(PageIndex(0)) == Loading {
                    table.wait_left(PageIndex(0), Loading, Duration::from_secs(10));
                }
            });
            while !table.has(PageIndex(0), WANTED) {
                std::hint::spin_loop();
            }
            table.finish(PageIndex(0), Resident, REFERENCED);
            waiter.join().unwrap();
        });
        assert!(table.take_referenced(PageIndex(0)));
        assert!(!table.take_referenced(PageIndex(0)));
    }

    #[test]
    fn a_pinned_page_stays_and_a_held_one_keeps_its_flags() {
        let table = PageTable::new(PageCount(1)).unwrap();
        let page = PageIndex(0);
        assert!(!table.mark(page, DIRTY, 0), "nothing is there");
        assert!(table.claim(page, Absent, Loading));
        table.finish(page, Resident, 0);
        assert!(table.mark(page, DIRTY | PINNED, 0));
        assert!(!table.claim(page, Resident, Evicting));
        assert!(table.claim(page, Resident, Held) && !table.claim(page, Resident, Held));
        table.mark(page, 0, PINNED);
        table.keep(page, 0);
        assert!(table.has(page, DIRTY) && table.claim(page, Resident, Evicting));
    }

    #[test]
    fn the_table_takes_memory_for_pages_that_are_not_absent() {
        let table = PageTable::new(PageCount(1 << 30)).unwrap();
        let pages = [0, 1, 1 << 20, 1 << 29].map(PageIndex);
        assert_eq!(table.bytes(), 0);
        for page in pages {
            assert!(table.claim(page, Absent, Loading) && !table.claim(page, Absent, Loading));
            table.finish(page, Resident, REFERENCED);
        }
        let leaf = crate::sys::memory::page_bytes() as u64;
        assert_eq!(table.bytes(), 3 * leaf);
        assert!(!table.take_referenced(PageIndex(1 << 28)), "a look at an absent page takes nothing");
        assert!(pages.iter().all(|page| table.claim(*page, Resident, Evicting)));
        table.finish(pages[0], Absent, 0);
        assert_eq!(table.bytes(), 3 * leaf, "its neighbour is there");
        table.finish_absent(pages[1..].iter().copied());
        assert_eq!((table.bytes(), table.state(pages[3])), (0, Absent));
    }

    #[test]
    #[should_panic(expected = "Absent -> Resident")]
    fn an_illegal_transition_is_refused() {
        PageTable::new(PageCount(1)).unwrap().claim(PageIndex(0), Absent, Resident);
    }
}
