//! Parts of several stores, one behind the other, as one store.
//!
//! ```text
//!   parts   |<-- a[128..] -->|<-- b[128..] -->|<- c[64..] ->|
//!           0                starts[1]        starts[2]     size
//! ```
//!
//! An error is that of the part which failed: its label and its own offset. A part that holds no bytes is never
//! read.

use std::sync::Arc;

use super::Store;
use crate::errors::StoreError;
use crate::units::{ByteCount, ByteOffset};

/// Bytes of a store.
pub struct Part {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The first of them.
    pub offset: ByteOffset,
    /// How many.
    pub size: ByteCount,
}

/// Parts of stores, one behind the other.
pub struct ConcatStore {
    label: String,
    parts: Box<[Part]>,
    /// Where each part begins.
    starts: Box<[u64]>,
    size: ByteCount,
}

impl ConcatStore {
    /// The parts in their order; `None` when one does not lie in its store, or they are too long together.
    pub fn new(label: impl Into<String>, parts: Vec<Part>) -> Option<Self> {
        let parts: Box<[Part]> = parts.into_iter().filter(|part| part.size.0 > 0).collect();
        let mut starts = Vec::with_capacity(parts.len());
        let mut size = 0u64;
        for part in &parts {
            part.offset.0.checked_add(part.size.0).filter(|end| *end <= part.store.size().0)?;
            starts.push(size);
            size = size.checked_add(part.size.0)?;
        }
        Some(ConcatStore { label: label.into(), parts, starts: starts.into(), size: ByteCount(size) })
    }

    /// Calls for every part that holds some of `len` bytes from `offset` on: with the part, the offset in its
    /// store, and which of the bytes.
    fn each(
        &self,
        offset: ByteOffset,
        len: usize,
        mut call: impl FnMut(&Part, ByteOffset, std::ops::Range<usize>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut done = 0;
        let mut index = self.starts.partition_point(|start| *start <= offset.0).saturating_sub(1);
        while done < len {
            let part = &self.parts[index];
            let inside = offset.0 + done as u64 - self.starts[index];
            let rest = usize::try_from(part.size.0 - inside).unwrap_or(usize::MAX);
            let end = len.min(done.saturating_add(rest));
            call(part, ByteOffset(part.offset.0 + inside), done..end)
                .map_err(|error| of_part(part, error))?;
            (done, index) = (end, index + 1);
        }
        Ok(())
    }

    fn most(&self, of: impl Fn(&dyn Store) -> ByteCount) -> ByteCount {
        self.parts.iter().map(|part| of(&*part.store)).max().unwrap_or(ByteCount(1))
    }
}

fn of_part(part: &Part, error: StoreError) -> StoreError {
    let label = error.part.unwrap_or_else(|| part.store.label().into());
    StoreError { part: Some(label), ..error }
}

impl Store for ConcatStore {
    fn size(&self) -> ByteCount {
        self.size
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn read_at(&self, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        self.each(offset, buf.len(), |part, at, span| part.store.read_at(at, &mut buf[span]))
    }

    fn read_only(&self) -> Option<String> {
        let reason = |part: &Part| part.store.read_only().map(|why| format!("{}: {why}", part.store.label()));
        self.parts.iter().find_map(reason)
    }

    fn write_at(&self, offset: ByteOffset, bytes: &[u8]) -> Result<(), StoreError> {
        self.each(offset, bytes.len(), |part, at, span| part.store.write_at(at, &bytes[span]))
    }

    /// All parts are synchronised, also after one that failed; the first failure is returned.
    fn sync(&self) -> Result<(), StoreError> {
        let mut done = Ok(());
        for part in &self.parts {
            done = done.and(part.store.sync().map_err(|error| of_part(part, error)));
        }
        done
    }

    fn grain(&self) -> ByteCount {
        self.most(|store| store.grain())
    }

    fn run(&self) -> ByteCount {
        self.most(|store| store.run())
    }

    fn is_slow(&self) -> bool {
        self.parts.iter().any(|part| part.store.is_slow())
    }

    fn buffer_bytes(&self, read: ByteCount) -> ByteCount {
        // Parts begin anywhere: what is read of them is at no multiple of `read`.
        self.most(|store| store.buffer_bytes(ByteCount(read.0.saturating_add(1))))
    }

    fn standing_bytes(&self) -> ByteCount {
        ByteCount(self.parts.iter().map(|part| part.store.standing_bytes().0).sum())
    }

    fn bytes_fetched(&self) -> u64 {
        self.parts.iter().map(|part| part.store.bytes_fetched()).sum()
    }

    fn close(&self) {
        self.parts.iter().for_each(|part| part.store.close());
    }

    fn after_fork_in_child(&self) {
        self.parts.iter().for_each(|part| part.store.after_fork_in_child());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::errors::FaultCode;
    use crate::store::faulty::{FaultPlan, FaultyStore, Operation};
    use crate::store::memory::MemoryStore;
    use crate::store::zero::ZeroStore;

    fn part(label: &str, bytes: Vec<u8>, offset: u64, size: u64) -> Part {
        Part {
            store: Arc::new(MemoryStore::new(label, bytes)),
            offset: ByteOffset(offset),
            size: ByteCount(size),
        }
    }

    fn three() -> ConcatStore {
        let parts = vec![
            part("a", (0..50).collect(), 10, 40),
            part("nothing", vec![], 0, 0),
            part("b", (100..103).collect(), 1, 1),
            part("c", (200..250).collect(), 0, 50),
        ];
        ConcatStore::new("all", parts).unwrap()
    }

    fn whole() -> Vec<u8> {
        (10..50).chain([101]).chain(200..250).collect()
    }

    #[test]
    fn every_range_reads_as_of_one() {
        let (store, whole) = (three(), whole());
        assert_eq!((store.size(), store.label(), store.grain()), (ByteCount(91), "all", ByteCount(1)));
        for start in 0..=whole.len() {
            for end in start..=whole.len() {
                let mut buf = vec![0; end - start];
                store.read_at(ByteOffset(start as u64), &mut buf).unwrap();
                assert_eq!(buf, whole[start..end]);
            }
        }
        assert!(store.bytes_fetched() > 0 && !store.is_slow());
    }

    #[test]
    fn writes_reach_the_parts() {
        let store = three();
        assert_eq!(store.read_only(), None);
        store.write_at(ByteOffset(39), &[1, 2, 3]).unwrap();
        store.sync().unwrap();
        let mut buf = [0; 5];
        store.read_at(ByteOffset(38), &mut buf).unwrap();
        assert_eq!(buf, [48, 1, 2, 3, 201]);
        let zeros = Arc::new(ZeroStore::new("zeros", ByteCount(9)));
        let parts =
            vec![part("a", vec![1], 0, 1), Part { store: zeros, offset: ByteOffset(0), size: ByteCount(9) }];
        let mixed = ConcatStore::new("mixed", parts).unwrap();
        assert!(mixed.read_only().unwrap().starts_with("zeros: "));
        let refused = mixed.write_at(ByteOffset(0), &[5, 5]).unwrap_err();
        assert_eq!((refused.code, refused.part.as_deref()), (FaultCode::Protection, Some("zeros")));
    }

    #[test]
    fn an_error_is_the_parts() {
        let plan = FaultPlan {
            operation: Operation::Read,
            first: 0,
            count: None,
            offset: ByteOffset(0),
            length: None,
            code: Some(FaultCode::Truncated),
            errno: None,
            delay: Duration::ZERO,
        };
        let failing = FaultyStore::new(Arc::new(MemoryStore::new("bad", vec![7; 30])), plan);
        let bad = Part { store: Arc::new(failing), offset: ByteOffset(20), size: ByteCount(10) };
        let inner = ConcatStore::new("inner", vec![part("a", vec![1; 5], 0, 5), bad]).unwrap();
        let nested = Part { size: inner.size(), store: Arc::new(inner), offset: ByteOffset(0) };
        let store = ConcatStore::new("all", vec![part("b", vec![2; 3], 0, 3), nested]).unwrap();
        store.read_at(ByteOffset(0), &mut [0; 8]).unwrap();
        let error = store.read_at(ByteOffset(0), &mut [0; 12]).unwrap_err();
        assert_eq!((error.code, error.offset), (FaultCode::Truncated, ByteOffset(20)));
        assert_eq!(error.source_in("all"), "bad");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(ConcatStore::new("x", vec![part("a", vec![0; 5], 3, 3)]).is_none());
        assert!(ConcatStore::new("x", vec![part("a", vec![0; 5], u64::MAX, 3)]).is_none());
        let huge = || Part {
            store: Arc::new(ZeroStore::new("z", ByteCount(u64::MAX))),
            offset: ByteOffset(0),
            size: ByteCount(u64::MAX),
        };
        assert!(ConcatStore::new("x", vec![huge(), huge()]).is_none());
        let nothing = ConcatStore::new("x", vec![]).unwrap();
        nothing.read_at(ByteOffset(0), &mut []).unwrap();
        assert_eq!(nothing.size(), ByteCount(0));
    }
}
