//! Zeros: what anonymous memory holds before it is written.

use super::Store;
use crate::errors::StoreError;
use crate::units::{ByteCount, ByteOffset};

/// So many zero bytes. Nothing is ever written to it: pages of anonymous memory go to swap.
#[derive(Debug)]
pub struct ZeroStore {
    label: String,
    size: ByteCount,
}

impl ZeroStore {
    /// `size` zero bytes.
    pub fn new(label: impl Into<String>, size: ByteCount) -> Self {
        ZeroStore { label: label.into(), size }
    }
}

impl Store for ZeroStore {
    fn size(&self) -> ByteCount {
        self.size
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn read_at(&self, _offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        buf.fill(0);
        Ok(())
    }

    fn bytes_fetched(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_zero() {
        let mut buf = [7; 3];
        let store = ZeroStore::new("z", ByteCount(1 << 40));
        store.read_at(ByteOffset(1 << 39), &mut buf).unwrap();
        assert_eq!((buf, store.size()), ([0; 3], ByteCount(1 << 40)));
        assert!(store.read_only().is_some());
    }
}
