//! A page number with two marks in bits that no page number needs.

use crate::units::PageIndex;

/// Referenced at least once since it became resident: the next reference is reuse.
pub const USED: u64 = 1 << 63;
/// Among the newest.
pub const YOUNG: u64 = 1 << 62;

/// The number and its marks.
#[derive(Clone, Copy, Debug)]
pub struct Marked(u64);

impl Marked {
    /// # Panics
    /// Where the number needs the bits of the marks.
    pub fn new(page: PageIndex, marks: u64) -> Self {
        assert!(page.0 < YOUNG, "page {} is not below 2^62", page.0);
        Marked(page.0 | marks)
    }

    pub fn page(self) -> PageIndex {
        PageIndex(self.0 & !(USED | YOUNG))
    }

    pub fn has(self, mark: u64) -> bool {
        self.0 & mark != 0
    }

    pub fn set(&mut self, mark: u64) {
        self.0 |= mark;
    }

    pub fn clear(&mut self, mark: u64) {
        self.0 &= !mark;
    }
}
