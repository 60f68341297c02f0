//! What both targets share: a reader of the seekable format of its own, and the comparison.
#![forbid(unsafe_code)]

use std::sync::Arc;

use quire_core::store::Store;
use quire_core::store::memory::MemoryStore;
use quire_core::store::zstd::ZstdStore;
use quire_core::units::{ByteCount, ByteOffset};

/// Containers that claim to hold more are not decoded: a case has to end soon.
const SIZE_MAX: u64 = 4 << 20;
/// What one input byte can make at most.
const RATIO_MAX: u64 = (128 << 10) / 4;

/// One frame by a container's table: where it starts and ends in the file, and its bytes.
type Frame = (usize, usize, usize);

fn word(file: &[u8], at: usize) -> usize {
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize
}

/// The frames that the table says, with no check but that they are there.
fn frames(file: &[u8]) -> Vec<Frame> {
    let end = file.len() - 9;
    let entry = if file[end + 4] & 0x80 != 0 { 12 } else { 8 };
    let count = word(file, end);
    let first = end - count * entry;
    let mut start = 0;
    (0..count)
        .map(|index| {
            let at = first + index * entry;
            let frame = (start, start + word(file, at), word(file, at + 4));
            start = frame.1;
            frame
        })
        .collect()
}

/// What the container decodes to, or nothing when a frame is wrong. Checksums are not looked at.
fn decoded(file: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::new();
    for (start, end, len) in frames(file).into_iter().filter(|frame| frame.2 > 0) {
        let mut out = Vec::with_capacity(len + 1);
        let got = zstd_safe::decompress(&mut out, &file[start..end]).ok()?;
        if got != len {
            return None;
        }
        plain.extend(out);
    }
    Some(plain)
}

fn read(store: &ZstdStore, offset: u64, len: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0xAA; len as usize];
    store.read_at(ByteOffset(offset), &mut bytes).ok().map(|()| bytes)
}

/// Opens `file`, reads all of it and the `ranges` (start and length, taken modulo its size), and
/// compares.
///
/// # Panics
/// When the store gives other bytes than the reader here, or refuses what it should not.
pub fn check(file: &[u8], ranges: &[(u32, u32)]) {
    let Ok(store) = ZstdStore::open(Arc::new(MemoryStore::new("f", file.to_vec()))) else { return };
    let size = store.size().0;
    assert!(size <= file.len() as u64 * RATIO_MAX, "{size} bytes out of {}", file.len());
    let bound = store.buffer_bytes(ByteCount(4096)).0;
    assert!(bound <= file.len() as u64 * (RATIO_MAX + 2) + (1 << 20), "{bound} bytes of buffers");
    if size > SIZE_MAX {
        return;
    }
    let plain = decoded(file);
    let parts: Vec<_> = ranges
        .iter()
        .map(|(start, len)| {
            u64::from(*start) % size.max(1)..(u64::from(*start) % size.max(1)).saturating_add(u64::from(*len))
        })
        .map(|range| range.start..range.end.min(size))
        .map(|range| (range.clone(), read(&store, range.start, range.end.saturating_sub(range.start))))
        .collect();
    let whole = read(&store, 0, size);
    if !store.has_checksums() {
        assert_eq!(whole.is_some(), plain.is_some(), "one reader fails, the other does not");
    }
    if let (Some(whole), Some(plain)) = (&whole, &plain) {
        assert!(whole == plain, "the two readers differ");
    }
    for (range, part) in parts {
        let range = range.start as usize..range.end as usize;
        match (&plain, part) {
            (Some(plain), Some(part)) => assert!(part == plain[range.clone()], "{range:?} differs"),
            (Some(_), None) => assert!(store.has_checksums(), "{range:?} fails, the whole does not"),
            (None, _) => {}
        }
    }
}
