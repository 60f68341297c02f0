//! Standby: bytes of pages that lost their translation and have not been dropped yet (the free page
//! list of VAX/VMS, the inactive list of Mach and BSD; Turner and Levy, "Segmented FIFO Page
//! Replacement", 1981).
//!
//! A policy sees no hits: a page that is touched all the time looks to it like one that is not, and
//! goes when its turn comes. So it does not go at once: its bytes are copied to a frame of this list.
//! A touch brings it back without its pager, as the newest page of the policy; a page not touched
//! until it is the oldest here gives its frame to the next.
//!
//! In the page table a page that stands by is ABSENT, so a touch of it is a fault as any other, and
//! who claims the page (LOADING) takes its frame first: a page has bytes in one place only. Pages
//! are written back before they come here: to drop one loses nothing, and a sync need not know.
//!
//! Frames are charged to the object from [`Standby::grow`] to [`Standby::shrink`], empty or not.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sys::arena::{Arena, Frame};
use crate::sys::fork::ForkMutex;
use crate::units::{ByteCount, PageIndex};

/// What each frame takes of the maps: its entry in both, and as much again for what trees and tables leave
/// empty.
const ENTRY_BYTES: usize = 2 * (size_of::<(u64, PageIndex, Frame)>() + size_of::<(PageIndex, u64)>());

/// The pages of one memory object that stand by.
pub struct Standby {
    granule: ByteCount,
    list: ForkMutex<List>,
    /// Frames, those included that their takers have not given back.
    frames: AtomicUsize,
}

struct List {
    arena: Arena,
    /// Pages and their frames in the order in which they came.
    order: BTreeMap<u64, (PageIndex, Frame)>,
    places: HashMap<PageIndex, u64>,
    next: u64,
    /// Frames that wait for the next page.
    empty: Vec<Frame>,
}

impl List {
    fn new(granule: ByteCount) -> Self {
        List {
            arena: Arena::new(granule.as_usize()),
            order: BTreeMap::new(),
            places: HashMap::new(),
            next: 0,
            empty: Vec::new(),
        }
    }

    fn push(&mut self, page: PageIndex, frame: Frame) {
        let before = self.places.insert(page, self.next);
        assert!(before.is_none(), "page {} stood by when it was evicted", page.0);
        self.order.insert(self.next, (page, frame));
        self.next += 1;
    }

    fn remove(&mut self, page: PageIndex) -> Option<Frame> {
        let place = self.places.remove(&page)?;
        self.order.remove(&place).map(|(_, frame)| frame)
    }

    fn drop_oldest(&mut self) -> Option<Frame> {
        let (_, (page, frame)) = self.order.pop_first()?;
        self.places.remove(&page);
        Some(frame)
    }
}

impl Standby {
    /// No page and no frame.
    pub fn new(granule: ByteCount) -> Self {
        Standby { granule, list: ForkMutex::new(List::new(granule)), frames: AtomicUsize::new(0) }
    }

    /// Frames there are.
    pub fn frames(&self) -> usize {
        self.frames.load(Ordering::Acquire)
    }

    /// Bytes that the maps take, about.
    pub fn list_bytes(&self) -> u64 {
        (self.frames() * ENTRY_BYTES) as u64
    }

    /// Whether a page stands by.
    pub fn holds(&self, page: PageIndex) -> bool {
        self.frames() > 0 && self.list.lock().places.contains_key(&page)
    }

    /// The pages that stand by, oldest first.
    pub fn pages(&self) -> Vec<PageIndex> {
        self.list.lock().order.values().map(|(page, _)| *page).collect()
    }

    /// Takes the frame of a page that the caller has claimed; to be given back.
    pub fn take(&self, page: PageIndex) -> Option<Frame> {
        if self.frames() == 0 {
            return None; // a frame that held the page would have been there before the claim
        }
        self.list.lock().remove(page)
    }

    /// Gives a taken frame back, empty.
    pub fn give(&self, frame: Frame) {
        self.list.lock().empty.push(frame);
    }

    /// Gives a taken frame back with its page, which the caller still owns.
    pub fn give_back(&self, page: PageIndex, frame: Frame) {
        self.list.lock().push(page, frame);
    }

    /// Has a page stand by that the caller owns and that is written back; false when no frame is
    /// empty.
    pub fn put(&self, page: PageIndex, bytes: &[u8]) -> bool {
        // The lock is not held over the copy: `bytes` is user memory.
        let Some(mut frame) = self.list.lock().empty.pop() else { return false };
        frame.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        self.list.lock().push(page, frame);
        true
    }

    /// Drops the oldest pages until `wanted` frames are empty, or no page is left.
    pub fn make_empty(&self, wanted: usize) {
        let mut list = self.list.lock();
        while list.empty.len() < wanted
            && let Some(frame) = list.drop_oldest()
        {
            list.empty.push(frame);
        }
    }

    /// Adds at most `wanted` empty frames, for which the caller has charged the object. Returns how
    /// many.
    pub fn grow(&self, wanted: usize) -> usize {
        let mut list = self.list.lock();
        for added in 0..wanted {
            let Some(frame) = list.arena.take() else { return added };
            list.empty.push(frame);
            self.frames.fetch_add(1, Ordering::AcqRel);
        }
        wanted
    }

    /// Frees at most `wanted` frames, empty ones first and then those of the oldest pages. Returns
    /// the bytes, whose charge the caller takes back.
    pub fn shrink(&self, wanted: usize) -> ByteCount {
        let mut list = self.list.lock();
        let mut gone = Vec::new();
        while gone.len() < wanted
            && let Some(frame) = list.empty.pop().or_else(|| list.drop_oldest())
        {
            gone.push(frame);
        }
        self.free(&mut list, gone)
    }

    /// Drops the pages that `unwanted` names, and frees their frames as [`Standby::shrink`].
    pub fn drop_pages(&self, unwanted: impl Fn(PageIndex) -> bool) -> ByteCount {
        let mut list = self.list.lock();
        let pages: Vec<PageIndex> = list.places.keys().copied().filter(|page| unwanted(*page)).collect();
        let gone = pages.into_iter().filter_map(|page| list.remove(page)).collect();
        self.free(&mut list, gone)
    }

    fn free(&self, list: &mut List, gone: Vec<Frame>) -> ByteCount {
        let count = gone.len();
        list.arena.vacate(gone);
        self.frames.fetch_sub(count, Ordering::AcqRel);
        ByteCount(count as u64 * self.granule.0)
    }

    /// Frees all, when the object is unmapped: no fault or load is under way.
    pub fn clear(&self) {
        *self.list.lock() = List::new(self.granule);
        self.frames.store(0, Ordering::Release);
    }

    /// Forgets all, in the child of a fork.
    ///
    /// # Safety
    /// Only in the child of a fork while it has one thread, which is in no call of this object.
    #[allow(unsafe_code)]
    pub unsafe fn reset_in_child(&self) {
        // SAFETY: one thread (contract). The frames are not inherited (MADV_DONTFORK).
        unsafe { self.list.replace_in_child(List::new(self.granule)) }
        self.frames.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANULE: usize = 1 << 16;

    fn standby(frames: usize) -> Standby {
        let standby = Standby::new(ByteCount(GRANULE as u64));
        assert_eq!(standby.grow(frames), frames);
        standby
    }

    fn put(standby: &Standby, page: u64) -> bool {
        standby.put(PageIndex(page), &[page as u8; GRANULE])
    }

    fn numbers(standby: &Standby) -> Vec<u64> {
        standby.pages().into_iter().map(|page| page.0).collect()
    }

    #[test]
    fn a_page_comes_back_with_its_bytes_and_only_once() {
        let standby = standby(2);
        assert!(put(&standby, 7) && put(&standby, 8) && !put(&standby, 9), "two frames");
        assert!(standby.holds(PageIndex(7)) && !standby.holds(PageIndex(9)));
        let frame = standby.take(PageIndex(7)).unwrap();
        assert!(frame.bytes().iter().all(|byte| *byte == 7));
        assert!(standby.take(PageIndex(7)).is_none());
        assert!(!put(&standby, 9), "its taker has the frame");
        standby.give(frame);
        assert!(put(&standby, 9));
        assert_eq!((numbers(&standby), standby.frames()), (vec![8, 9], 2));
    }

    #[test]
    fn the_oldest_give_their_frames_and_those_that_came_back_are_newest() {
        let standby = standby(3);
        assert!((1..4).all(|page| put(&standby, page)));
        let frame = standby.take(PageIndex(1)).unwrap();
        standby.give_back(PageIndex(1), frame);
        standby.make_empty(1);
        assert!(put(&standby, 4) && !put(&standby, 5));
        assert_eq!(numbers(&standby), [3, 1, 4]);
        standby.make_empty(9);
        assert_eq!((numbers(&standby), standby.frames()), (vec![], 3));
    }

    #[test]
    fn frames_are_freed_empty_ones_first() {
        let standby = standby(4);
        assert!((1..4).all(|page| put(&standby, page)));
        assert_eq!(standby.shrink(2), ByteCount(2 * GRANULE as u64));
        assert_eq!((numbers(&standby), standby.frames()), (vec![2, 3], 2));
        assert_eq!(standby.drop_pages(|page| page.0 == 3), ByteCount(GRANULE as u64));
        let taken = standby.take(PageIndex(2)).unwrap();
        assert_eq!(standby.shrink(5), ByteCount(0), "a taken frame is its taker's");
        standby.give(taken);
        assert_eq!(standby.shrink(5), ByteCount(GRANULE as u64));
        assert!(!put(&standby, 1) && standby.frames() == 0);
        assert_eq!(standby.grow(1), 1);
        standby.clear();
        assert!(!put(&standby, 1));
    }

    #[test]
    #[should_panic(expected = "page 3 stood by when it was evicted")]
    fn a_page_has_one_frame() {
        let standby = standby(2);
        put(&standby, 3);
        put(&standby, 3);
    }
}
