//! Faults of the pmaps whose absent pages raise SIGSEGV, where the machine does not say whether a
//! touch was a write (all but x86-64): the fault is handed to the core without a touch.

use std::sync::Arc;

use quire_core::fault;
use quire_core::mapping::{Mapping, Mode, Options};
use quire_core::page::{BAD, DIRTY};
use quire_core::pmap;
use quire_core::store::memory::MemoryStore;
use quire_core::sys::memory::{Touch, is_readable, page_bytes};
use quire_core::units::{ByteCount, PageIndex};

fn working() -> Vec<String> {
    let ladder = pmap::probe().into_iter();
    let names = ladder.filter(|rung| rung.works).map(|rung| rung.kind.name().to_string());
    let names: Vec<String> = names.filter(|name| name == "guard" || name == "mprotect").collect();
    assert!(names.contains(&"mprotect".to_string()));
    names
}

fn open(pmap: &str, mode: Mode) -> Mapping {
    let store = Arc::new(MemoryStore::new("memory", vec![7; 8 * page_bytes()]));
    let granule = Some(ByteCount(page_bytes() as u64));
    let options = Options { mode, granule, pmap: Some(pmap.into()), ..Options::default() };
    Mapping::open(store, &options).unwrap()
}

fn segv(address: usize) -> bool {
    fault::on_signal(libc::SIGSEGV, address, Touch::Unknown)
}

#[test]
fn a_read_is_loaded_and_a_race_is_no_stray_write() {
    for pmap in working() {
        let mapping = open(&pmap, Mode::ReadOnly);
        let address = mapping.range().start + 5 * page_bytes();
        assert!(!is_readable(address), "{pmap}");
        assert!(segv(address) && is_readable(address), "{pmap}");
        // It was there when this thread's fault came to be looked at.
        assert!(segv(address) && segv(address + 1), "{pmap}");
        assert!(mapping.failure().is_none(), "{pmap}");
        // The same instruction faults on and on.
        assert!((0..100).all(|_| segv(address)), "{pmap}");
        assert!(mapping.failure().unwrap().error.message.contains("read-only"), "{pmap}");
        mapping.unmap().unwrap();
    }
}

#[test]
fn a_write_is_loaded_then_noted() {
    for pmap in working() {
        let mapping = open(&pmap, Mode::Shared);
        let address = mapping.range().start + 2 * page_bytes();
        let has = |flag| mapping.object().pages.has(PageIndex(2), flag);
        assert!(segv(address) && !has(DIRTY), "{pmap}");
        assert!(segv(address) && has(DIRTY) && !has(BAD), "{pmap}");
        // SAFETY: a byte of our mapping that is open to writes, as the fault was resolved.
        unsafe { *(address as *mut u8) = 9 };
        mapping.sync(0..u64::MAX).unwrap();
        assert!(!has(DIRTY), "{pmap}");
        let mut byte = [0];
        mapping
            .object()
            .pager
            .store()
            .read_at(quire_core::units::ByteOffset(2 * page_bytes() as u64), &mut byte)
            .unwrap();
        assert_eq!(byte, [9], "{pmap}");
        mapping.unmap().unwrap();
    }
}

#[test]
fn a_sigbus_is_not_ours() {
    let mapping = open("mprotect", Mode::ReadOnly);
    assert!(!fault::on_signal(libc::SIGBUS, mapping.range().start, Touch::Read));
    assert!(mapping.failure().is_none());
}
