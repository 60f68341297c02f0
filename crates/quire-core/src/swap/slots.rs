//! Which blocks of a swap file are in use.
//!
//! A slot is a run of blocks. Freed runs are kept by place, to join neighbours, and by length, to find
//! the smallest that is long enough; among equals the lowest place is taken, so the end of the file
//! empties first. Freed blocks still take disk space until they are given back: the runs of such blocks
//! are a second set, a part of the first. There are never more runs than slots in use plus one, which
//! bounds this file's memory.
//!
//! A slot as two words, its place and its check:
//!
//! ```text
//!   63          30 29        17 16       15   0      63          0
//!  ┌──────────────┬────────────┬─────────┬─────┐    ┌─────────────┐
//!  │ first block  │ blocks     │ packed  │  0  │    │ check       │
//!  └──────────────┴────────────┴─────────┴─────┘    └─────────────┘
//! ```
//!
//! `packed`: a header precedes the bytes (see [`super::codec`]). `check`: their checksum, or the first
//! half of their authentication tag; it stays in memory, so that a disk that gives older bytes of the
//! same page is found out too. No blocks: a page of zeros.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;

use crate::units::ByteOffset;

/// Unit of allocation.
pub const BLOCK_BYTES: u64 = 4096;
/// Blocks that one slot can have: 32 MiB less one block.
pub const SLOT_BLOCKS_MAX: u64 = (1 << 13) - 1;
/// Blocks that one file can have: 64 TiB.
const FILE_BLOCKS_MAX: u64 = 1 << 34;

/// Where the bytes of one evicted page lie, and how they are known again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SwapSlot {
    place: NonZeroU64,
    check: u64,
}

impl SwapSlot {
    /// A page of zeros, which takes no space.
    pub const ZERO: SwapSlot = SwapSlot { place: NonZeroU64::new(1 << 30).expect("not zero"), check: 0 };

    /// The slot as its place, never 0, and its check.
    pub fn to_words(self) -> [u64; 2] {
        [self.place.get(), self.check]
    }

    /// The slot of words that [`SwapSlot::to_words`] gave; `None` for a place that it never gives.
    pub fn from_words([place, check]: [u64; 2]) -> Option<SwapSlot> {
        let slot = SwapSlot { place: NonZeroU64::new(place)?, check };
        (slot == SwapSlot::ZERO || slot.blocks() > 0).then_some(slot)
    }

    pub(super) fn new(run: Run, packed: bool, check: u64) -> SwapSlot {
        let place = run.start << 30 | run.len << 17 | u64::from(packed) << 16;
        SwapSlot { place: NonZeroU64::new(place).expect("a run has blocks"), check }
    }

    pub(super) fn run(self) -> Run {
        Run { start: self.place.get() >> 30, len: self.blocks() }
    }

    /// Blocks that it takes.
    pub fn blocks(self) -> u64 {
        self.place.get() >> 17 & SLOT_BLOCKS_MAX
    }

    pub(super) fn is_packed(self) -> bool {
        self.place.get() >> 16 & 1 == 1
    }

    pub(super) fn check(self) -> u64 {
        self.check
    }
}

/// Consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first.
    pub start: u64,
    /// How many.
    pub len: u64,
}

impl Run {
    fn end(self) -> u64 {
        self.start + self.len
    }

    /// Where it begins in the file.
    pub fn offset(self) -> ByteOffset {
        ByteOffset(self.start * BLOCK_BYTES)
    }

    /// Bytes that it takes.
    pub fn bytes(self) -> u64 {
        self.len * BLOCK_BYTES
    }
}

/// A set of blocks, as runs that do not touch each other.
#[derive(Debug, Default)]
struct RunSet {
    by_start: BTreeMap<u64, u64>,
    by_len: BTreeSet<(u64, u64)>,
    blocks: u64,
}

impl RunSet {
    fn add(&mut self, run: Run) {
        self.by_start.insert(run.start, run.len);
        self.by_len.insert((run.len, run.start));
        self.blocks += run.len;
    }

    fn drop_run(&mut self, run: Run) {
        self.by_start.remove(&run.start);
        self.by_len.remove(&(run.len, run.start));
        self.blocks -= run.len;
    }

    /// The last run that begins before `block`.
    fn before(&self, block: u64) -> Option<Run> {
        self.by_start.range(..block).next_back().map(|(&start, &len)| Run { start, len })
    }

    fn at(&self, start: u64) -> Option<Run> {
        self.by_start.get(&start).map(|&len| Run { start, len })
    }

    /// Puts a run in, joined with those it touches.
    fn insert(&mut self, run: Run) {
        // A slot that is freed twice would be given to two pages: better to stop here.
        let last = self.before(run.end());
        assert!(last.is_none_or(|other| other.end() <= run.start), "a swap slot was freed twice");
        let mut joined = run;
        if let Some(left) = last.filter(|left| left.end() == run.start) {
            self.drop_run(left);
            joined = Run { start: left.start, len: left.len + run.len };
        }
        if let Some(right) = self.at(run.end()) {
            self.drop_run(right);
            joined.len += right.len;
        }
        self.add(joined);
    }

    /// Takes out those blocks of `run` that are in the set.
    fn remove(&mut self, run: Run) {
        while let Some(other) = self.before(run.end()).filter(|other| other.end() > run.start) {
            self.drop_run(other);
            if other.end() > run.end() {
                self.add(Run { start: run.end(), len: other.end() - run.end() });
            }
            if other.start < run.start {
                self.add(Run { start: other.start, len: run.start - other.start });
            }
        }
    }

    /// The start of the smallest run of at least `len` blocks, the lowest among equals.
    fn best(&self, len: u64) -> Option<u64> {
        self.by_len.range((len, 0)..).next().map(|(_, start)| *start)
    }

    fn longest(&self) -> Option<Run> {
        self.by_len.last().map(|&(len, start)| Run { start, len })
    }
}

/// The blocks of one file.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Blocks below `end` that are in no slot and not being given back.
    free: RunSet,
    /// Those of them that may still take disk space.
    backed: RunSet,
    /// Blocks from here on were never used.
    end: u64,
    /// Blocks in slots.
    used: u64,
    /// Whether a thread is giving blocks back.
    giving_back: bool,
}

impl Slots {
    /// Takes `len` blocks; `None` when more than `limit` would be in use.
    pub fn allocate(&mut self, len: u64, limit: u64) -> Option<Run> {
        assert!((1..=SLOT_BLOCKS_MAX).contains(&len), "a slot has blocks and can name them");
        if self.used + len > limit {
            return None;
        }
        let start = match self.free.best(len) {
            Some(start) => start,
            None if self.end + len > FILE_BLOCKS_MAX => return None,
            None => {
                self.end += len;
                self.end - len
            }
        };
        let run = Run { start, len };
        self.free.remove(run);
        self.backed.remove(run);
        self.used += len;
        Some(run)
    }

    /// Ends a slot.
    pub fn release(&mut self, run: Run) {
        assert!(run.end() <= self.end, "a swap slot is of this swap");
        self.free.insert(run);
        self.backed.insert(run);
        self.used -= run.len;
    }

    /// Takes out up to `runs` of the longest runs that still take disk space, when these are `least`
    /// blocks in all and no other thread is at it; [`Slots::gave_back`] must follow.
    pub fn begin_give_back(&mut self, least: u64, runs: usize) -> Vec<Run> {
        if self.giving_back || self.backed.blocks < least {
            return Vec::new();
        }
        let mut taken = Vec::new();
        while let Some(run) = self.backed.longest().filter(|_| taken.len() < runs) {
            self.backed.remove(run);
            self.free.remove(run);
            taken.push(run);
        }
        self.giving_back = !taken.is_empty();
        taken
    }

    /// Puts runs back that take no disk space now, or still do.
    pub fn gave_back(&mut self, runs: &[Run], done: bool) {
        for run in runs {
            self.free.insert(*run);
            if !done {
                self.backed.insert(*run);
            }
        }
        self.giving_back = false;
    }

    /// Blocks in slots.
    pub fn used(&self) -> u64 {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u64),
        Release(prop::sample::Index),
        GiveBack { least: u64, runs: usize, done: bool },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (1u64..40).prop_map(Step::Allocate),
            3 => any::<prop::sample::Index>().prop_map(Step::Release),
            1 => (0u64..60, 1usize..5, any::<bool>())
                .prop_map(|(least, runs, done)| Step::GiveBack { least, runs, done }),
        ];
        prop::collection::vec(step, 1..300)
    }

    /// The model: what each block is.
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Block {
        Used,
        FreeBacked,
        Free,
    }

    fn paint(model: &mut Vec<Block>, run: Run, with: Block) {
        let end = run.end() as usize;
        model.resize(model.len().max(end), Block::Free);
        model[run.start as usize..end].fill(with);
    }

    fn check_set(set: &RunSet, model: &[Block], member: impl Fn(Block) -> bool) {
        let mut from_model = Vec::new();
        for index in (0..model.len()).filter(|index| member(model[*index])) {
            match from_model.last_mut() {
                Some((start, len)) if *start + *len == index as u64 => *len += 1,
                _ => from_model.push((index as u64, 1u64)),
            }
        }
        let runs: Vec<(u64, u64)> = set.by_start.iter().map(|(start, len)| (*start, *len)).collect();
        assert_eq!(runs, from_model, "runs are joined and hold just their blocks");
        let mut by_len: Vec<(u64, u64)> = runs.iter().map(|(start, len)| (*len, *start)).collect();
        by_len.sort_unstable();
        assert_eq!(set.by_len.iter().copied().collect::<Vec<_>>(), by_len);
        assert_eq!(set.blocks, runs.iter().map(|(_, len)| len).sum::<u64>());
    }

    proptest! {
        #[test]
        fn slots_never_overlap_and_all_that_is_freed_is_one_run(steps in steps()) {
            let mut slots = Slots::default();
            let mut model = Vec::new();
            let mut live: Vec<Run> = Vec::new();
            for step in steps {
                match step {
                    Step::Allocate(len) => {
                        let fits = slots.used() + len <= 600;
                        let run = slots.allocate(len, 600);
                        prop_assert_eq!(run.is_some(), fits);
                        if let Some(run) = run {
                            let clash = live.iter().any(|l| l.start < run.end() && run.start < l.end());
                            prop_assert!(!clash && run.len == len);
                            live.push(run);
                            paint(&mut model, run, Block::Used);
                        }
                    }
                    Step::Release(index) if !live.is_empty() => {
                        let run = live.swap_remove(index.index(live.len()));
                        slots.release(run);
                        paint(&mut model, run, Block::FreeBacked);
                    }
                    Step::Release(_) => {}
                    Step::GiveBack { least, runs, done } => {
                        let taken = slots.begin_give_back(least, runs);
                        prop_assert!(taken.len() <= runs);
                        prop_assert!(taken.is_empty() || slots.begin_give_back(0, 1).is_empty());
                        // What is being given back is in nobody's hands.
                        if let Some(run) = slots.allocate(1, u64::MAX) {
                            prop_assert!(taken.iter().all(|t| run.start < t.start || run.start >= t.end()));
                            live.push(run);
                            paint(&mut model, run, Block::Used);
                        }
                        slots.gave_back(&taken, done);
                        for run in taken.iter().filter(|_| done) {
                            paint(&mut model, *run, Block::Free);
                        }
                    }
                }
                prop_assert_eq!(slots.used(), live.iter().map(|run| run.len).sum::<u64>());
                check_set(&slots.backed, &model, |block| block == Block::FreeBacked);
                check_set(&slots.free, &model, |block| block != Block::Used);
            }
            live.drain(..).for_each(|run| slots.release(run));
            let whole = Run { start: 0, len: slots.end };
            prop_assert_eq!(slots.free.longest(), (slots.end > 0).then_some(whole));
            prop_assert_eq!((slots.free.blocks, slots.used()), (slots.end, 0));
        }

        #[test]
        fn words_are_their_slot(start in 0..FILE_BLOCKS_MAX, len in 1..=SLOT_BLOCKS_MAX, packed: bool, check: u64) {
            let slot = SwapSlot::new(Run { start, len }, packed, check);
            prop_assert_eq!(SwapSlot::from_words(slot.to_words()), Some(slot));
            prop_assert_eq!(slot.run(), Run { start, len });
            prop_assert_eq!((slot.is_packed(), slot.check()), (packed, check));
            prop_assert!(slot != SwapSlot::ZERO);
        }
    }

    #[test]
    fn words_that_are_no_slots() {
        assert_eq!(SwapSlot::from_words([0, 7]), None);
        assert_eq!(SwapSlot::from_words([5 << 30, 7]), None);
        assert_eq!(SwapSlot::from_words(SwapSlot::ZERO.to_words()), Some(SwapSlot::ZERO));
    }

    #[test]
    fn the_smallest_hole_that_fits_is_taken_and_the_lowest_of_equals() {
        let mut slots = Slots::default();
        let runs: Vec<Run> =
            [8, 1, 4, 1, 4, 1].into_iter().map(|len| slots.allocate(len, u64::MAX).unwrap()).collect();
        for index in [0, 2, 4] {
            slots.release(runs[index]);
        }
        assert_eq!(slots.allocate(3, u64::MAX), Some(Run { start: runs[2].start, len: 3 }));
        assert_eq!(slots.allocate(4, u64::MAX), Some(runs[4]));
        assert_eq!(slots.allocate(9, u64::MAX).unwrap().start, 19);
    }

    #[test]
    #[should_panic = "freed twice"]
    fn a_slot_freed_twice_is_refused() {
        let mut slots = Slots::default();
        let run = slots.allocate(4, 100).unwrap();
        slots.release(run);
        slots.release(run);
    }
}
