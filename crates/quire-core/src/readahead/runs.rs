//! What is asked for: steps of a sequence, as runs of granules that the store reads at once.

use std::ops::Range;

use super::At;

/// Steps to fill ahead, and what became of earlier ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ahead {
    position: i64,
    step: i64,
    count: i64,
    extent: i64,
    dense: bool,
    granule: i64,
    end: i64,
    /// Granules asked for earlier that their sequence has come by since.
    pub hits: u64,
    /// Granules asked for earlier that were gone when it came, or that it never came to.
    pub wasted: u64,
}

impl Ahead {
    pub(super) fn new(position: i64, step: i64, count: i64, extent: i64, dense: bool, at: &At) -> Self {
        let (granule, end) = (at.granule, at.end / at.granule);
        Ahead { position, step, count, extent, dense, granule, end, hits: 0, wasted: 0 }
    }

    /// With what became of earlier ones.
    pub(super) fn after(self, hits: u64, wasted: u64) -> Self {
        Ahead { hits, wasted, ..self }
    }

    /// The granules, the first to be needed first, in runs that end where units of `unit` granules do.
    pub fn runs(self, unit: u64) -> Runs {
        Runs { ahead: self, unit, rest: 0..0 }
    }

    /// Granules of the next step; of all of them where they are adjacent.
    fn next_range(&mut self) -> Option<Range<u64>> {
        if self.count <= 0 {
            return None;
        }
        let steps = if self.dense { self.count } else { 1 };
        let last = self.position + (steps - 1) * self.step;
        let (low, high) = (self.position.min(last), self.position.max(last) + self.extent - 1);
        self.position += steps * self.step;
        self.count -= steps;
        let page = |offset: i64| offset.div_euclid(self.granule).clamp(0, self.end);
        Some(page(low).unsigned_abs()..page(high + self.granule).unsigned_abs())
    }
}

/// Iterator of [`Ahead::runs`].
#[derive(Debug)]
pub struct Runs {
    ahead: Ahead,
    unit: u64,
    rest: Range<u64>,
}

impl Iterator for Runs {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        while self.rest.is_empty() {
            self.rest = self.ahead.next_range()?;
        }
        let Range { start, end } = self.rest;
        if self.ahead.step < 0 && self.ahead.dense {
            let cut = ((end - 1) / self.unit * self.unit).max(start);
            self.rest.end = cut;
            Some(cut..end)
        } else {
            let cut = ((start / self.unit + 1) * self.unit).min(end);
            self.rest.start = cut;
            Some(start..cut)
        }
    }
}
