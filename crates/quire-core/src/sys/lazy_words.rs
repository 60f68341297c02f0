//! Arrays of atomic words that read zero and take memory only where they are used: page tables, and
//! tables of slots, of sparse mappings.
//!
//! Each hardware page of words, a *leaf*, has a word of its own that says how many of its words are in
//! use, so that what the table takes is known, and a leaf that nobody uses any more goes back to the
//! system:
//!
//! ```text
//!   bit  0     TOUCHED  takes memory
//!   bit  1     LEAVING  is being given back: who wants to use a word of it waits
//!   bits 2..   words in use
//! ```
//!
//! These words are an array of the same kind, not counted: 1/1024 of the other.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::memory::{self, Range, page_bytes};
use crate::errors::MapError;

const TOUCHED: u32 = 1;
const LEAVING: u32 = 2;
const USE: u32 = 4;

/// An atomic integer: all zero bits are a value of it.
pub trait Word: Sync {}
impl Word for AtomicU32 {}
impl Word for AtomicU64 {}

/// An anonymous array of words that reads zero.
struct Zeros<W> {
    range: Range,
    words: usize,
    of: PhantomData<W>,
}

impl<W: Word> Zeros<W> {
    fn new(words: usize) -> Result<Self, MapError> {
        let bytes = (words * size_of::<W>()).max(1).next_multiple_of(page_bytes());
        let range = memory::reserve(bytes, libc::PROT_READ | libc::PROT_WRITE)?;
        // A huge page for one word would be 512 times what is counted. Refused where there are none.
        // SAFETY: own new range, of which no content goes.
        let _ = unsafe { memory::advise(range, libc::MADV_NOHUGEPAGE) };
        Ok(Zeros { range, words, of: PhantomData })
    }

    fn as_slice(&self) -> &[W] {
        // SAFETY: the range is mapped read-write for as long as `self` lives, is page-aligned and
        // holds `words` words, each valid for every bit pattern (`Word`); atomics allow sharing.
        unsafe { std::slice::from_raw_parts(self.range.start as *const _, self.words) }
    }
}

impl<W> Drop for Zeros<W> {
    fn drop(&mut self) {
        // SAFETY: own range; `as_slice` borrows end before the drop.
        unsafe { memory::unmap(self.range) }
    }
}

/// The array. A word is written only between [`LazyWords::begin`] and [`LazyWords::end`]; outside of
/// them it is zero.
pub struct LazyWords<W> {
    words: Zeros<W>,
    leaves: Zeros<AtomicU32>,
    bytes: AtomicU64,
}

impl<W: Word> LazyWords<W> {
    /// Room for `words` words.
    ///
    /// # Errors
    /// When the address space has no room.
    pub fn new(words: usize) -> Result<Self, MapError> {
        let leaves = words.div_ceil(Self::leaf_words());
        Ok(LazyWords { words: Zeros::new(words)?, leaves: Zeros::new(leaves)?, bytes: AtomicU64::new(0) })
    }

    fn leaf_words() -> usize {
        page_bytes() / size_of::<W>()
    }

    fn leaf(&self, index: usize) -> &AtomicU32 {
        &self.leaves.as_slice()[index / Self::leaf_words()]
    }

    /// All words.
    pub fn as_slice(&self) -> &[W] {
        self.words.as_slice()
    }

    /// Bytes that the words take.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Notes that a word is going to be used.
    pub fn begin(&self, index: usize) {
        let leaf = self.leaf(index);
        let used = |before: u32| (before & LEAVING == 0).then_some((before + USE) | TOUCHED);
        loop {
            match leaf.fetch_update(Ordering::AcqRel, Ordering::Acquire, used) {
                Ok(before) if before & TOUCHED != 0 => return,
                Ok(_) => {
                    self.bytes.fetch_add(page_bytes() as u64, Ordering::Relaxed);
                    return;
                }
                Err(_) => std::thread::yield_now(), // for one madvise(2) of another thread
            }
        }
    }

    /// Notes that a word is not used any more, and zero. True when it was the last of its leaf, which can
    /// then be given back.
    pub fn end(&self, index: usize) -> bool {
        let before = self.leaf(index).fetch_sub(USE, Ordering::AcqRel);
        assert!(before >= USE, "word {index} was not in use");
        before / USE == 1
    }

    /// Gives the leaves of these words back where nobody uses them.
    pub fn give_back(&self, indices: &[usize]) {
        let unused = |index: &usize| {
            self.leaf(*index).compare_exchange(TOUCHED, LEAVING, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let leaving: Vec<usize> = indices.iter().copied().filter(unused).collect();
        let range = |index: usize| {
            let first = index / Self::leaf_words() * page_bytes();
            Range { start: self.words.range.start + first, len: page_bytes() }
        };
        let ranges: Vec<Range> = leaving.iter().map(|index| range(*index)).collect();
        // SAFETY: own memory, which nobody writes (LEAVING) and which is all zeros.
        unsafe { memory::discard(&ranges) }
        self.bytes.fetch_sub((leaving.len() * page_bytes()) as u64, Ordering::Relaxed);
        leaving.iter().for_each(|index| self.leaf(*index).store(0, Ordering::Release));
    }

    /// Makes every word zero and gives all memory back.
    ///
    /// # Safety
    /// No other thread uses the words meanwhile.
    pub unsafe fn reset(&self) {
        // SAFETY: own ranges; the content is meant to go.
        unsafe { memory::discard(&[self.words.range, self.leaves.range]) }
        self.bytes.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_zero_and_take_what_is_used() {
        let words = LazyWords::<AtomicU32>::new(1 << 20).unwrap();
        let (page, far) = (page_bytes() as u64, 1 << 19);
        assert_eq!((words.as_slice()[far].load(Ordering::Relaxed), words.bytes()), (0, 0));
        for index in [far, far + 1, 0] {
            words.begin(index);
            words.as_slice()[index].store(5, Ordering::Relaxed);
        }
        assert_eq!(words.bytes(), 2 * page);
        words.as_slice()[far].store(0, Ordering::Relaxed);
        assert!(!words.end(far), "its neighbour is in use");
        words.give_back(&[far]);
        assert_eq!((words.as_slice()[far + 1].load(Ordering::Relaxed), words.bytes()), (5, 2 * page));
        words.as_slice()[far + 1].store(0, Ordering::Relaxed);
        assert!(words.end(far + 1));
        words.give_back(&[far, far + 1]);
        assert_eq!(words.bytes(), page);
        let place = |index: usize| (&raw const words.as_slice()[index]) as usize;
        assert_eq!([far, 0].map(|index| memory::is_present(place(index))), [Some(false), Some(true)]);
        // SAFETY: one thread.
        unsafe { words.reset() };
        assert_eq!((words.as_slice()[0].load(Ordering::Relaxed), words.bytes()), (0, 0));
    }

    #[test]
    fn no_word_in_use_is_lost_when_leaves_come_and_go() {
        let words = LazyWords::<AtomicU32>::new(4 * LazyWords::<AtomicU32>::leaf_words()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4usize {
                let words = &words;
                scope.spawn(move || {
                    for round in 1..5000u32 {
                        let index = thread + LazyWords::<AtomicU32>::leaf_words() * (round as usize % 2);
                        words.begin(index);
                        let word = &words.as_slice()[index];
                        assert_eq!(word.swap(round, Ordering::AcqRel), 0);
                        std::hint::spin_loop();
                        assert_eq!(word.swap(0, Ordering::AcqRel), round);
                        if words.end(index) {
                            words.give_back(&[index]);
                        }
                    }
                });
            }
        });
        assert_eq!(words.bytes(), 0, "who ends last gives back");
    }
}
