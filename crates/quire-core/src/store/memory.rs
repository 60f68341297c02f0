//! Bytes in memory, for tests and for what is small.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::Store;
use crate::errors::StoreError;
use crate::units::{ByteCount, ByteOffset};

/// Bytes in memory, which can be written.
pub struct MemoryStore {
    label: String,
    size: ByteCount,
    data: Box<[AtomicU8]>, // not a lock: a fork could find it held
    fetched: AtomicU64,
}

impl MemoryStore {
    /// A store over `data`.
    pub fn new(label: impl Into<String>, data: Vec<u8>) -> Self {
        let size = ByteCount(data.len() as u64);
        MemoryStore {
            label: label.into(),
            size,
            data: data.into_iter().map(AtomicU8::new).collect(),
            fetched: AtomicU64::new(0),
        }
    }
}

impl Store for MemoryStore {
    fn size(&self) -> ByteCount {
        self.size
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn read_at(&self, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        let start = usize::try_from(offset.0).expect("the caller reads inside the store");
        for (to, from) in buf.iter_mut().zip(&self.data[start..]) {
            *to = from.load(Ordering::Relaxed);
        }
        self.fetched.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn read_only(&self) -> Option<String> {
        None
    }

    fn write_at(&self, offset: ByteOffset, bytes: &[u8]) -> Result<(), StoreError> {
        let start = usize::try_from(offset.0).expect("the caller writes inside the store");
        for (to, from) in self.data[start..].iter().zip(bytes) {
            to.store(*from, Ordering::Relaxed);
        }
        Ok(())
    }

    fn bytes_fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_counts() {
        let store = MemoryStore::new("m", (0..100).collect());
        let mut buf = [0; 3];
        store.write_at(ByteOffset(99), &[7]).unwrap();
        store.read_at(ByteOffset(97), &mut buf).unwrap();
        assert_eq!(buf, [97, 98, 7]);
        assert_eq!((store.size(), store.label(), store.bytes_fetched()), (ByteCount(100), "m", 3));
    }
}
