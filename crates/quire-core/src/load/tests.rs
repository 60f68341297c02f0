//! Loads over a pmap that refuses pages from some point on.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::memory_object::{MemoryObject, Plan};
use crate::pager::Pager;
use crate::pmap::{Kind, Pmap};
use crate::store::memory::MemoryStore;
use crate::sys::fork::ForkCell;
use crate::sys::lock::Mutex;

const GRANULE: usize = 16 << 10;
const STORED: u8 = 7;
/// What a thread writes to each page as soon as it is installed.
const WRITTEN: u8 = 99;

/// Copies so many whole pages, then the first hardware page of one more, and then nothing: the kernel
/// of a cgroup whose memory is used up.
struct Refusing {
    left: Mutex<u32>,
    removed: Mutex<Vec<Range>>,
}

impl Pmap for Refusing {
    fn kind(&self) -> Kind {
        Kind::Inline
    }

    fn enter(&self, _: Range, _: bool) -> Result<(), i32> {
        Ok(())
    }

    fn leave(&self, _: Range) {}

    fn install(&self, start: usize, bytes: &[u8], _: bool) -> Result<(), i32> {
        let mut left = self.left.lock();
        let (len, done) = if *left > 0 { (bytes.len(), Ok(())) } else { (4096, Err(libc::ENOMEM)) };
        *left = left.saturating_sub(1);
        // SAFETY: a page of the test's own writable memory.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), start as *mut u8, len);
            *(start as *mut u8) = WRITTEN;
        }
        done
    }

    fn remove(&self, ranges: &[Range]) {
        self.removed.lock().extend(ranges);
        // SAFETY: pages of the test's own memory.
        unsafe { memory::discard(ranges) }
    }

    fn protect(&self, _: Range, _: bool) -> Result<(), i32> {
        Ok(())
    }

    fn tracking(&self) -> Tracking {
        Tracking::WpSync
    }

    fn faults_are_signals(&self) -> bool {
        true
    }
}

/// Four pages of which two can be installed, loaded ahead.
fn load_four(writable: bool) -> (MapEntry, Arc<Refusing>) {
    let store = Arc::new(MemoryStore::new("stored", vec![STORED; 8 * GRANULE]));
    let granule = ByteCount(GRANULE as u64);
    let plan = Plan { granule, budget: ByteCount(1 << 20), policy: "clock" };
    let object = MemoryObject::new(Pager::new(store, granule, None, 0), &plan).unwrap();
    let pmap = Arc::new(Refusing { left: Mutex::new(2), removed: Mutex::default() });
    let range = memory::reserve(8 * GRANULE, libc::PROT_READ | libc::PROT_WRITE).unwrap();
    let entry = MapEntry {
        range,
        object,
        pmap: ForkCell::new(pmap.clone() as Arc<dyn Pmap>),
        fill: ForkCell::new(Arc::default()),
        writable,
        huge: false,
        armed: AtomicBool::new(true),
        closing: AtomicBool::new(false),
    };
    let pages = &entry.object.pages;
    assert!((1..5).all(|page| pages.claim(PageIndex(page), PageState::Absent, PageState::Loading)));
    load_ahead(&entry, PageIndex(1), 4);
    (entry, pmap)
}

fn bytes(entry: &MapEntry, page: u64) -> [u8; 2] {
    let start = entry.page_range(PageIndex(page)).start as *const u8;
    // SAFETY: the test's own memory, which is never unmapped.
    unsafe { [*start, *start.add(GRANULE - 1)] }
}

#[test]
fn what_was_installed_before_a_refusal_stays() {
    let (entry, pmap) = load_four(false);
    let states: Vec<PageState> = (0..6).map(|page| entry.object.pages.state(PageIndex(page))).collect();
    use PageState::{Absent, Resident};
    assert_eq!(states, [Absent, Resident, Resident, Absent, Absent, Absent]);
    assert_eq!([bytes(&entry, 1), bytes(&entry, 2)], [[WRITTEN, STORED]; 2]);
    let kept = entry.page_range(PageIndex(1)).start..entry.page_range(PageIndex(3)).start;
    assert!(pmap.removed.lock().iter().all(|range| !kept.contains(&range.start)));
    assert_eq!(memory::is_present(entry.page_range(PageIndex(3)).start), Some(false));
    assert_eq!(entry.object.account.used(), ByteCount(2 * GRANULE as u64));
    assert_eq!(entry.object.resident_pages(), [PageIndex(1), PageIndex(2)]);
    assert_eq!(entry.object.condition(), Condition::Healthy);
}

#[test]
fn a_page_that_was_half_open_to_writes_fails_with_a_word() {
    let (entry, _pmap) = load_four(true);
    let failure = entry.object.failure().expect("a write to the half page may be lost");
    assert_eq!((failure.page, failure.error.errno), (3, Some(libc::ENOMEM)));
    assert_eq!(bytes(&entry, 3), [FILLER, FILLER]);
    assert_eq!(entry.object.pages.state(PageIndex(4)), PageState::Absent);
}
