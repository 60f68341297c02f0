//! Bytes in memory, for tests and for what is small.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Store;
use crate::errors::StoreError;
use crate::units::{ByteCount, ByteOffset};

/// Bytes in memory.
#[derive(Debug)]
pub struct MemoryStore {
    label: String,
    data: Vec<u8>,
    fetched: AtomicU64,
}

impl MemoryStore {
    /// A store over `data`.
    pub fn new(label: impl Into<String>, data: Vec<u8>) -> Self {
        MemoryStore { label: label.into(), data, fetched: AtomicU64::new(0) }
    }
}

impl Store for MemoryStore {
    fn size(&self) -> ByteCount {
        ByteCount(self.data.len() as u64)
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn read_at(&self, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        let start = usize::try_from(offset.0).expect("the caller reads inside the store");
        buf.copy_from_slice(&self.data[start..start + buf.len()]);
        self.fetched.fetch_add(buf.len() as u64, Ordering::Relaxed);
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
        store.read_at(ByteOffset(97), &mut buf).unwrap();
        assert_eq!(buf, [97, 98, 99]);
        assert_eq!((store.size(), store.label(), store.bytes_fetched()), (ByteCount(100), "m", 3));
    }
}
