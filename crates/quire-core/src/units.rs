//! Units of the paging core: an index, a count and a size are different types.
//!
//! A mapping is cut into *granules*: the unit in which its pages are filled, installed and
//! evicted. A granule is a whole number of hardware pages. A [`PageIndex`] counts granules from
//! the start of the memory object; hardware pages appear only in `sys` and `pmap`.

use std::fmt;

/// Number of a granule within a memory object, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// A number of granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageCount(pub u64);

/// Distance in bytes from the start of a store or of a memory object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteOffset(pub u64);

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteCount(pub u64);

impl PageIndex {
    /// Where this granule starts, when a granule has `granule` bytes.
    pub fn offset(self, granule: ByteCount) -> ByteOffset {
        ByteOffset(self.0 * granule.0)
    }
}

impl ByteOffset {
    /// The granule of `granule` bytes that holds this offset.
    pub fn page(self, granule: ByteCount) -> PageIndex {
        PageIndex(self.0 / granule.0)
    }

    /// This offset moved forward, or `None` past the 64-bit range.
    pub fn checked_add(self, count: ByteCount) -> Option<ByteOffset> {
        self.0.checked_add(count.0).map(ByteOffset)
    }
}

impl ByteCount {
    /// The count as `usize`.
    ///
    /// # Panics
    /// Where `usize` has fewer than 64 bits and the count does not fit: a programmer's mistake,
    /// as every count that reaches memory was checked when the mapping was made.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).expect("byte count fits the address space")
    }

    /// Whole granules needed to hold this many bytes.
    pub fn pages(self, granule: ByteCount) -> PageCount {
        PageCount(self.0.div_ceil(granule.0))
    }

    /// This count rounded up to a multiple of `unit`, or `None` past the 64-bit range.
    pub fn checked_round_up(self, unit: ByteCount) -> Option<ByteCount> {
        self.0.checked_next_multiple_of(unit.0).map(ByteCount)
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.0)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_round_up_and_offsets_round_down() {
        let granule = ByteCount(4096);
        assert_eq!(ByteCount(0).pages(granule), PageCount(0));
        assert_eq!(ByteCount(1).pages(granule), PageCount(1));
        assert_eq!(ByteCount(4096).pages(granule), PageCount(1));
        assert_eq!(ByteCount(4097).pages(granule), PageCount(2));
        assert_eq!(ByteOffset(8191).page(granule), PageIndex(1));
        assert_eq!(PageIndex(3).offset(granule), ByteOffset(12288));
    }

    #[test]
    fn rounding_past_the_range_is_reported() {
        assert_eq!(ByteCount(u64::MAX).checked_round_up(ByteCount(4096)), None);
        assert_eq!(ByteOffset(u64::MAX).checked_add(ByteCount(1)), None);
    }
}
