//! How much memory a container can make its reader take: what is allocated is counted, at its
//! highest, by the allocator of this test.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use quire_core::store::Store;
use quire_core::store::memory::MemoryStore;
use quire_core::store::seek_table::{FRAME_MAX, encode_seek_table};
use quire_core::store::zstd::{ZstdStore, compress_frame};
use quire_core::units::{ByteCount, ByteOffset};

/// Passes on to the system's allocator and counts.
struct Counted;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes unchanged to the system's allocator, whose contract is the same.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's layout, unchanged.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's block, which `alloc` got from the same allocator with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// Bytes by which the heap grows at most while `work` runs.
fn growth<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = work();
    (PEAK.load(Ordering::Relaxed) - before, result)
}

/// Opening takes at most the table once more as it is read and 20 bytes for each 8 of it, and the
/// tail and a chunk; nothing depends on what the table claims.
fn check(name: &str, file: Vec<u8>) {
    let open_max = 4 * file.len() + (160 << 10);
    let inner: Arc<dyn Store> = Arc::new(MemoryStore::new(name, file));
    let (grown, store) = growth(|| ZstdStore::open(inner));
    assert!(grown <= open_max, "{name}: opening took {grown} bytes, not {open_max}");
    let Ok(store) = store else { return };
    let mut page = vec![0; store.size().0.min(4096) as usize];
    let read_max = (store.buffer_bytes(ByteCount(4096)).0 + store.standing_bytes().0) as usize + (16 << 10);
    for offset in [0, store.size().0 - page.len() as u64] {
        let (grown, _) = growth(|| store.read_at(ByteOffset(offset), &mut page));
        assert!(grown <= read_max, "{name}: reading took {grown} bytes, not {read_max}");
    }
}

// One test, as what is counted is the whole process.
#[test]
fn memory_is_bounded_by_the_file_and_by_what_the_store_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/hostile");
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if name.ends_with(".zst") {
            check(&name, fs::read(entry.path()).unwrap());
        }
    }

    // Footers that claim all that a footer can.
    let claims = |frames: u32, padding: usize| {
        let mut file = vec![0; padding];
        file.extend(encode_seek_table(&[(8, 8, None)]));
        let end = file.len();
        file[end - 9..end - 5].copy_from_slice(&frames.to_le_bytes());
        file
    };
    for frames in [2, 1000, 1 << 20, (1 << 27) - 1, 1 << 27, u32::MAX] {
        for padding in [0, 5000, 100_000] {
            check(&format!("{frames} frames said"), claims(frames, padding));
        }
    }

    // Frames of the greatest sizes that their bytes may claim.
    let (frame, _) = compress_frame(&vec![1; 1 << 20], 3).unwrap();
    let most = (frame.len() as u64 * (128 << 10) / 4).min(u64::from(FRAME_MAX)) as u32;
    let mut file = frame.repeat(50);
    file.extend(encode_seek_table(&vec![(frame.len() as u32, most, None); 50]));
    check("greatest frames", file);

    // A long table of frames that are empty, and of frames of a byte.
    for plain in [0, 1] {
        let mut file = vec![0; 300_000];
        file.extend(encode_seek_table(&vec![(1, plain, Some(0)); 300_000]));
        check("long table", file);
    }
}
