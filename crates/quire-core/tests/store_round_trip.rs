//! Random containers, read at random: what the store gives is what a plain vector gives. proptest
//! prints the seed and the smallest case of a failure.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use quire_core::errors::{FaultCode, StoreError};
use quire_core::store::Store;
use quire_core::store::faulty::{FaultPlan, FaultyStore};
use quire_core::store::memory::MemoryStore;
use quire_core::store::seek_table::encode_seek_table;
use quire_core::store::zstd::{ZstdStore, compress_frame};
use quire_core::units::{ByteCount, ByteOffset};

/// What a container is made of.
#[derive(Clone, Debug)]
struct Recipe {
    /// Bytes of each frame; 0 makes a skippable frame.
    frames: Vec<usize>,
    level: i32,
    checksums: bool,
    /// Every byte below this, so that small values compress well.
    variety: u64,
}

/// Frames of all sizes, and frames of one size, of which parts are decoded.
fn recipes() -> impl Strategy<Value = Recipe> {
    let size = prop_oneof![Just(0usize), 1..20usize, 1..5000usize, 60_000..200_000usize];
    let mixed = prop::collection::vec(size, 0..12);
    let even = (1..4usize, 1..5usize, 1..65536usize).prop_map(|(parts, count, last)| {
        let mut frames = vec![parts * 65536; count];
        frames.push(last);
        frames
    });
    let frames = prop_oneof![mixed, even];
    let variety = prop_oneof![Just(2u64), Just(17), Just(256)];
    (frames, 1..5i32, any::<bool>(), variety).prop_map(|(frames, level, checksums, variety)| Recipe {
        frames,
        level,
        checksums,
        variety,
    })
}

/// The container and the bytes that it holds.
fn make(recipe: &Recipe) -> (Vec<u8>, Vec<u8>) {
    let (mut file, mut plain, mut entries) = (Vec::new(), Vec::new(), Vec::new());
    let mut state = recipe.variety;
    for size in &recipe.frames {
        let data: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % recipe.variety) as u8
        })
        .take(*size)
        .collect();
        let (mut frame, checksum) = compress_frame(&data, recipe.level).unwrap();
        if data.is_empty() {
            frame = [0x184D_2A51u32.to_le_bytes(), 3u32.to_le_bytes()].concat();
            frame.extend(b"abc");
        }
        entries.push((frame.len() as u32, *size as u32, recipe.checksums.then_some(checksum)));
        file.extend(frame);
        plain.extend(data);
    }
    file.extend(encode_seek_table(&entries));
    (file, plain)
}

/// Random ranges of a thing of `size` bytes, most of them short.
fn ranges(size: usize) -> impl Strategy<Value = Vec<(usize, usize)>> {
    let len = prop_oneof![0..100usize, Just(4096), Just(65536), 0..300_000usize];
    prop::collection::vec((0..=size, len), 1..40).prop_map(move |pairs| {
        pairs.into_iter().map(|(start, len)| (start, (start + len).min(size))).collect()
    })
}

fn cases() -> impl Strategy<Value = (Recipe, Vec<(usize, usize)>)> {
    recipes().prop_flat_map(|recipe| {
        let size = recipe.frames.iter().sum();
        (Just(recipe), ranges(size))
    })
}

fn read(store: &dyn Store, (start, end): (usize, usize)) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0xAA; end - start];
    store.read_at(ByteOffset(start as u64), &mut bytes).map(|()| bytes)
}

/// Counts reads, and the most bytes of one.
struct Counting {
    inner: MemoryStore,
    reads: AtomicU64,
    largest: AtomicU64,
}

impl Counting {
    fn new(file: Vec<u8>) -> Arc<Self> {
        let inner = MemoryStore::new("m", file);
        Arc::new(Counting { inner, reads: AtomicU64::new(0), largest: AtomicU64::new(0) })
    }
}

impl Store for Counting {
    fn size(&self) -> ByteCount {
        self.inner.size()
    }

    fn label(&self) -> &str {
        self.inner.label()
    }

    fn read_at(&self, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.largest.fetch_max(buf.len() as u64, Ordering::Relaxed);
        self.inner.read_at(offset, buf)
    }

    fn bytes_fetched(&self) -> u64 {
        self.inner.bytes_fetched()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_read_of_any_container_gives_its_bytes((recipe, ranges) in cases()) {
        let (file, plain) = make(&recipe);
        let below = Counting::new(file);
        let store = ZstdStore::open(Arc::clone(&below) as Arc<dyn Store>).unwrap();
        prop_assert_eq!(store.size().0 as usize, plain.len());
        prop_assert_eq!(store.frame_count() as usize, recipe.frames.len());
        for range in ranges {
            below.largest.store(0, Ordering::Relaxed);
            let bytes = read(&store, range).unwrap();
            prop_assert!(bytes == plain[range.0..range.1], "{:?}", range);
            let bound = store.buffer_bytes(ByteCount(1)).0;
            prop_assert!(below.largest.load(Ordering::Relaxed) <= bound);
        }
    }

    #[test]
    fn threads_that_read_at_once_do_not_disturb_each_other((recipe, ranges) in cases()) {
        let (file, plain) = make(&recipe);
        let store = ZstdStore::open(Arc::new(MemoryStore::new("m", file))).unwrap();
        std::thread::scope(|scope| {
            for turn in 0..6 {
                let (store, plain, ranges) = (&store, &plain, &ranges);
                scope.spawn(move || {
                    for index in 0..ranges.len() {
                        let range = ranges[(index * (turn + 1)) % ranges.len()];
                        assert!(read(store, range).unwrap() == plain[range.0..range.1], "{range:?}");
                    }
                });
            }
        });
    }

    #[test]
    fn a_failed_fetch_leaves_nothing_wrong_behind((recipe, ranges) in cases(), first in 1..8u64) {
        let (file, plain) = make(&recipe);
        let plan = FaultPlan {
            operation: quire_core::store::faulty::Operation::Read,
            first,
            count: Some(2),
            offset: ByteOffset(0),
            length: None,
            code: Some(FaultCode::Io),
            errno: Some(libc::EIO),
            delay: Duration::ZERO,
        };
        let below = FaultyStore::new(Arc::new(MemoryStore::new("m", file)), plan);
        let store = ZstdStore::open(Arc::new(below)).unwrap();
        for range in ranges.iter().chain(&ranges) {
            match read(&store, *range) {
                Ok(bytes) => prop_assert!(bytes == plain[range.0..range.1], "{:?}", range),
                Err(error) => {
                    prop_assert_eq!((error.code, error.errno), (FaultCode::Io, Some(libc::EIO)));
                    prop_assert!(error.offset.0 < plain.len() as u64);
                }
            }
        }
    }
}

#[test]
fn adjacent_frames_are_fetched_by_one_read() {
    let recipe = Recipe { frames: vec![5000; 40], level: 3, checksums: true, variety: 256 };
    let (file, plain) = make(&recipe);
    let below = Counting::new(file);
    let store = ZstdStore::open(Arc::clone(&below) as Arc<dyn Store>).unwrap();
    assert_eq!(below.reads.load(Ordering::Relaxed), 1, "footer and table");
    assert!(read(&store, (2500, 150_000)).unwrap() == plain[2500..150_000]);
    assert_eq!(below.reads.load(Ordering::Relaxed), 2);
}
