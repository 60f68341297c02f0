//! Pages in an order from which any may go: nodes of 16 bytes in a slab, linked by their places,
//! and an index.

use super::index::Index;
use super::marked::Marked;
use crate::units::PageIndex;

const NONE: u32 = u32::MAX;
/// Room added at least.
const ROOM: usize = 16;

#[derive(Clone, Copy)]
struct Node {
    item: Marked,
    /// Of a free node: the next free one.
    newer: u32,
    older: u32,
}

/// The list.
pub struct List {
    nodes: Vec<Node>,
    free: u32,
    newest: u32,
    oldest: u32,
    len: usize,
    index: Index,
}

impl Default for List {
    fn default() -> Self {
        List { nodes: Vec::new(), free: NONE, newest: NONE, oldest: NONE, len: 0, index: Index::default() }
    }
}

fn some(place: u32) -> Option<u32> {
    (place != NONE).then_some(place)
}

impl List {
    /// Adds a page that is not in the list, with these marks.
    pub fn push_newest(&mut self, page: PageIndex, marks: u64) -> u32 {
        let node = Node { item: Marked::new(page, marks), newer: NONE, older: self.newest };
        let place = self.free;
        let place = if place == NONE {
            if self.nodes.len() == self.nodes.capacity() {
                self.nodes.reserve_exact(self.nodes.len() / 4 + ROOM);
            }
            self.nodes.push(node);
            (self.nodes.len() - 1) as u32
        } else {
            self.free = self.nodes[place as usize].newer;
            self.nodes[place as usize] = node;
            place
        };
        let nodes = &self.nodes;
        self.index.insert(page, place, |place| nodes[place as usize].item.page());
        match some(self.newest) {
            Some(before) => self.nodes[before as usize].newer = place,
            None => self.oldest = place,
        }
        self.newest = place;
        self.len += 1;
        place
    }

    /// Takes the page at `place` out.
    pub fn remove(&mut self, place: u32) -> PageIndex {
        let Node { item, newer, older } = self.nodes[place as usize];
        let nodes = &self.nodes;
        let found = self.index.remove(item.page(), |place| nodes[place as usize].item.page());
        assert_eq!(found, Some(place), "the index knows each page of the list");
        match some(newer) {
            Some(newer) => self.nodes[newer as usize].older = older,
            None => self.newest = older,
        }
        match some(older) {
            Some(older) => self.nodes[older as usize].newer = newer,
            None => self.oldest = newer,
        }
        self.nodes[place as usize].newer = self.free;
        self.free = place;
        self.len -= 1;
        if self.len == 0 {
            *self = List::default(); // gives the memory back
        }
        item.page()
    }

    pub fn find(&self, page: PageIndex) -> Option<u32> {
        self.index.find(page, |place| self.item(place).page())
    }

    pub fn item(&self, place: u32) -> Marked {
        self.nodes[place as usize].item
    }

    pub fn item_mut(&mut self, place: u32) -> &mut Marked {
        &mut self.nodes[place as usize].item
    }

    pub fn newer(&self, place: u32) -> Option<u32> {
        some(self.nodes[place as usize].newer)
    }

    pub fn oldest(&self) -> Option<u32> {
        some(self.oldest)
    }

    /// Places, oldest first.
    pub fn places(&self) -> impl Iterator<Item = u32> {
        std::iter::successors(self.oldest(), |place| self.newer(*place))
    }

    /// Pages, oldest first.
    pub fn pages(&self) -> impl Iterator<Item = PageIndex> {
        self.places().map(|place| self.item(place).page())
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>() + self.index.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_keeps_order_and_reuses_nodes(ops in prop::collection::vec((0u64..40, any::<bool>()), 0..300)) {
            let mut list = List::default();
            let mut model: Vec<u64> = Vec::new();
            for (number, add) in ops {
                let place = list.find(PageIndex(number));
                prop_assert_eq!(place.is_some(), model.contains(&number));
                match place {
                    Some(place) if !add => {
                        prop_assert_eq!(list.remove(place).0, number);
                        model.retain(|page| *page != number);
                    }
                    None if add => {
                        list.push_newest(PageIndex(number), 0);
                        model.push(number);
                    }
                    _ => {}
                }
                prop_assert_eq!(list.pages().map(|page| page.0).collect::<Vec<_>>(), model.clone());
                prop_assert_eq!(list.len(), model.len());
                prop_assert!(list.nodes.len() <= 40);
            }
        }
    }
}
