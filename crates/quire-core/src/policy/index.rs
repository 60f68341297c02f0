//! Where a page lies in a slab or ring: open addressing over 32-bit places. The page numbers stay
//! in the slab, which the callers' `page_of` reads, so an entry costs 4 bytes at a load of 3/8 to
//! 3/4, that is 5 to 11 bytes a page, where a `HashMap<u64, u32>` takes 19 to 39.

use crate::units::PageIndex;

const FREE: u32 = u32::MAX;
const SMALLEST: usize = 16;
/// 2^64 divided by the golden ratio: neighbours of a run of pages fall far apart (Knuth, vol. 3, 6.4).
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

/// The table; its size is a power of two, or zero.
#[derive(Default)]
pub struct Index {
    table: Vec<u32>,
    len: usize,
}

impl Index {
    /// The place of `page`.
    pub fn find(&self, page: PageIndex, page_of: impl Fn(u32) -> PageIndex) -> Option<u32> {
        self.position(page, page_of).map(|at| self.table[at])
    }

    /// Notes the place of a page that is not in the table. `page_of` must know the places of all
    /// others.
    pub fn insert(&mut self, page: PageIndex, place: u32, page_of: impl Fn(u32) -> PageIndex) {
        assert_ne!(place, FREE, "more pages than a policy can hold");
        if (self.len + 1) * 4 > self.table.len() * 3 {
            let size = (self.table.len() * 2).max(SMALLEST);
            let old = std::mem::replace(&mut self.table, vec![FREE; size]);
            old.into_iter().filter(|place| *place != FREE).for_each(|place| self.put(page_of(place), place));
        }
        self.put(page, place);
        self.len += 1;
    }

    /// Forgets `page` and returns its place. Later entries of its run move up, so there are no
    /// tombstones (Knuth, vol. 3, 6.4, algorithm R).
    pub fn remove(&mut self, page: PageIndex, page_of: impl Fn(u32) -> PageIndex) -> Option<u32> {
        let mut hole = self.position(page, &page_of)?;
        let place = self.table[hole];
        let mask = self.table.len() - 1;
        let mut at = (hole + 1) & mask;
        while self.table[at] != FREE {
            let home = self.home(page_of(self.table[at]));
            // It may move to the hole when its home does not lie between the hole and itself.
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.table[hole] = self.table[at];
                hole = at;
            }
            at = (at + 1) & mask;
        }
        self.table[hole] = FREE;
        self.len -= 1;
        Some(place)
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.table.capacity() * size_of::<u32>()
    }

    fn put(&mut self, page: PageIndex, place: u32) {
        let mask = self.table.len() - 1;
        let mut at = self.home(page);
        while self.table[at] != FREE {
            at = (at + 1) & mask;
        }
        self.table[at] = place;
    }

    fn position(&self, page: PageIndex, page_of: impl Fn(u32) -> PageIndex) -> Option<usize> {
        if self.table.is_empty() {
            return None;
        }
        let mut at = self.home(page);
        while self.table[at] != FREE {
            if page_of(self.table[at]) == page {
                return Some(at);
            }
            at = (at + 1) & (self.table.len() - 1);
        }
        None
    }

    fn home(&self, page: PageIndex) -> usize {
        (page.0.wrapping_mul(SPREAD) >> (64 - self.table.len().ilog2())) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::collections::hash_map::Entry;

    proptest! {
        /// Page numbers from a narrow range, and with a common factor, so that runs are long.
        #[test]
        fn it_is_a_map(ops in prop::collection::vec((0u64..60, any::<bool>()), 0..400), step in prop::sample::select(vec![1u64, 1 << 20, 1 << 50])) {
            let mut index = Index::default();
            let mut model: HashMap<u64, u32> = HashMap::new();
            let mut pages: Vec<PageIndex> = Vec::new();
            for (number, add) in ops {
                let page = PageIndex(number * step);
                let page_of = |place: u32| pages[place as usize];
                if !add {
                    prop_assert_eq!(index.remove(page, page_of), model.remove(&page.0));
                } else if let Entry::Vacant(free) = model.entry(page.0) {
                    let place = pages.len() as u32;
                    index.insert(page, place, page_of);
                    free.insert(place);
                    pages.push(page);
                }
                for number in 0..60 {
                    let page = PageIndex(number * step);
                    prop_assert_eq!(index.find(page, |place| pages[place as usize]), model.get(&page.0).copied());
                }
            }
            prop_assert_eq!(index.len, model.len());
        }
    }
}
