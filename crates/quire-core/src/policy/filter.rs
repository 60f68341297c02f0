//! What S3-FIFO and 2Q share: a page is on probation first, in a short queue, and is kept in the
//! main part only when it proves worth it, by reuse or by coming back soon after it went.
//!
//! ```text
//!             ┌──────────────┐  reused   ┌─────────────┐
//!  load ─────▶│  probation   │──────────▶│    main     │──┐ second chance, as CLOCK
//!             └──────┬───────┘ (S3-FIFO) └──┬───▲──▲───┘◀─┘
//!                    ▼ victim               ▼   │ victim
//!              ┌──────────────┐   comes back    │
//!              │    ghosts    │─────────────────┘
//!              └──────────────┘
//! ```
//!
//! Sizes are shares of the pages known, as a policy is not told a capacity: it is asked for victims
//! when the cache is full.

use super::clock::Clock;
use super::ghosts::Ghosts;
use super::marked::{Marked, USED};
use super::queue::Queue;
use super::{FEW, Policy};
use crate::units::PageIndex;

/// In what they differ.
pub struct Rules {
    /// Share of all pages that is left to probation.
    pub probation_percent: usize,
    /// Ghosts, as a share of all pages.
    pub ghosts_percent: usize,
    /// Whether a page that is reused on probation goes to the main part.
    pub promotes: bool,
}

/// The queues.
pub struct Filter {
    rules: Rules,
    probation: Probation,
    main: Clock,
    ghosts: Ghosts,
    /// The last pages that came, wherever they are, and FEW at most.
    newest: Queue<PageIndex>,
}

impl Filter {
    pub fn new(rules: Rules) -> Self {
        Filter {
            rules,
            probation: Probation::default(),
            main: Clock::default(),
            ghosts: Ghosts::default(),
            newest: Queue::default(),
        }
    }

    pub fn insert(&mut self, page: PageIndex) {
        self.newest.push(page);
        if self.newest.len() > FEW {
            self.newest.pop();
        }
        if self.ghosts.take(page) {
            self.main.insert(page);
        } else {
            self.probation.push(page);
        }
    }

    pub fn victim(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex> {
        let all = self.len();
        let limit = (all * self.rules.ghosts_percent).div_ceil(100);
        if all <= FEW {
            let unused = self.probation.take_unreferenced(referenced);
            unused.iter().for_each(|page| self.ghosts.push(*page, limit));
            return unused.or_else(|| self.main.victim(referenced));
        }
        self.probation.settle(referenced);
        let share = (all * self.rules.probation_percent / 100).max(FEW);
        if self.probation.len() > share
            && let Some(page) = self.take_unproven(limit, referenced)
        {
            return Some(page);
        }
        self.main
            .victim(referenced)
            .or_else(|| self.take_unproven(limit, referenced))
            .or_else(|| self.any_but_the_newest())
    }

    fn is_newest(&self, page: PageIndex) -> bool {
        self.newest.iter().any(|newest| *newest == page)
    }

    /// The main part's pages were all referenced, and of those on probation none may go.
    fn any_but_the_newest(&mut self) -> Option<PageIndex> {
        let newest = &self.newest;
        let old = self.main.take(|page| newest.iter().all(|newest| *newest != page));
        old.or_else(|| self.probation.take(0))
    }

    /// The oldest page on probation that has not proved its worth.
    fn take_unproven(
        &mut self,
        limit: usize,
        referenced: &mut dyn FnMut(PageIndex) -> bool,
    ) -> Option<PageIndex> {
        while let Some(item) = self.probation.pages.oldest().copied() {
            let page = item.page();
            if self.is_newest(page) {
                break;
            }
            self.probation.take(0);
            // The first reference is the first use; the next is reuse.
            if self.rules.promotes && referenced(page) && item.has(USED) {
                self.main.insert(page);
            } else {
                self.ghosts.push(page, limit);
                return Some(page);
            }
        }
        None
    }

    pub fn remove(&mut self, page: PageIndex) -> bool {
        self.probation.remove(page) || self.main.remove(page)
    }

    pub fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool) {
        self.probation.retain(keep);
        self.main.retain(keep);
    }

    pub fn for_each(&self, visit: &mut dyn FnMut(PageIndex)) {
        self.probation.pages.iter().for_each(|item| visit(item.page()));
        self.main.for_each(visit);
    }

    pub fn len(&self) -> usize {
        self.probation.len() + self.main.len()
    }

    pub fn metadata_bytes(&self) -> usize {
        self.probation.pages.bytes() + self.main.metadata_bytes() + self.ghosts.bytes()
    }
}

/// Pages in the order in which they came. The bits of the last `new` have not been taken.
#[derive(Default)]
struct Probation {
    pages: Queue<Marked>,
    new: usize,
}

impl Probation {
    fn push(&mut self, page: PageIndex) {
        self.pages.push(Marked::new(page, 0));
        self.new += 1;
    }

    fn len(&self) -> usize {
        self.pages.len()
    }

    /// Takes the bits that the loads set.
    fn settle(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) {
        while self.new > 0 {
            let at = self.pages.len() - self.new;
            let item = self.pages.get_mut(at).expect("the new ones are in the queue");
            if referenced(item.page()) {
                item.set(USED);
            }
            self.new -= 1;
        }
    }

    /// Takes out the oldest page whose bit is not set; those before it lose theirs.
    fn take_unreferenced(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex> {
        let at = self.pages.iter().position(|item| !referenced(item.page()))?;
        self.take(at)
    }

    fn remove(&mut self, page: PageIndex) -> bool {
        let at = self.pages.iter().position(|item| item.page() == page);
        at.and_then(|at| self.take(at)).is_some()
    }

    fn take(&mut self, at: usize) -> Option<PageIndex> {
        if at >= self.pages.len() - self.new {
            self.new -= 1;
        }
        self.pages.remove(at).map(Marked::page)
    }

    fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool) {
        let settled = self.pages.len() - self.new;
        let (mut at, mut new) = (0, 0);
        self.pages.retain(|item| {
            let kept = keep(item.page());
            new += usize::from(kept && at >= settled);
            at += 1;
            kept
        });
        self.new = new;
    }
}
