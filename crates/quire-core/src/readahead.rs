//! Readahead: notices that a mapping is read in order and says how far to fill ahead.
//!
//! A fault on the page after the last one, three times in a row, opens a window that doubles with
//! each further step up to a limit. Pages within the window are resident or on their way, so the
//! reader faults again only where it has caught up. Several sequences are followed at once (a
//! matrix product in two threads reads two); a fault that continues none begins one in the place
//! of the sequence that has been still for longest.

use std::ops::Range;

use crate::units::PageIndex;

const STEPS_TO_OPEN: u32 = 2;
const STREAMS: usize = 8;

/// One sequence.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    last: u64,
    steps: u32,
    window: u64,
    /// First page after what was asked for.
    ahead: u64,
    /// Number of the fault that last moved it; 0 when it has never been used.
    moved: u64,
}

impl Stream {
    /// Whether a fault on `page` continues this sequence.
    fn continues(&self, page: u64) -> bool {
        let end = if self.window > 0 { self.ahead } else { self.last + 1 };
        self.moved > 0 && (self.last..=end).contains(&page)
    }

    /// Moves it to `page`; returns what to fill ahead.
    fn advance(&mut self, page: u64, limit: u64, end: u64) -> Range<u64> {
        if page == self.last {
            return 0..0;
        }
        self.last = page;
        self.steps += 1;
        if self.steps < STEPS_TO_OPEN {
            return 0..0;
        }
        self.window = (self.window * 2).clamp(2, limit.max(2)).min(limit);
        let from = self.ahead.max(page + 1).min(end);
        self.ahead = (page + 1 + self.window).clamp(from, end);
        from..self.ahead
    }
}

/// The sequential detector of one mapping.
#[derive(Debug, Default)]
pub struct Readahead {
    streams: [Stream; STREAMS],
    faults: u64,
}

impl Readahead {
    /// A fault on `page`. Returns the pages to fill ahead: at most `limit` past it, below `end`.
    pub fn note(&mut self, page: PageIndex, limit: u64, end: u64) -> Range<u64> {
        self.faults += 1;
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.continues(page.0)) {
            stream.moved = self.faults;
            return stream.advance(page.0, limit, end);
        }
        let stillest = self.streams.iter_mut().min_by_key(|stream| stream.moved);
        let begun = Stream { last: page.0, moved: self.faults, ..Stream::default() };
        *stillest.expect("there are streams") = begun;
        0..0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(pages: &[u64], limit: u64, end: u64) -> Vec<std::ops::Range<u64>> {
        let mut readahead = Readahead::default();
        pages.iter().map(|page| readahead.note(PageIndex(*page), limit, end)).collect()
    }

    #[test]
    fn a_sequence_opens_a_growing_window() {
        let got = faults(&[10, 11, 12, 15, 20], 8, 1000);
        assert_eq!(got, [0..0, 0..0, 13..15, 16..20, 21..29]);
    }

    #[test]
    fn a_row_across_a_boundary_or_a_jump_opens_nothing() {
        assert!(faults(&[5, 6, 90, 91, 3, 4], 8, 1000).iter().all(|range| range.is_empty()));
    }

    #[test]
    fn sequences_that_take_turns_are_each_followed() {
        let turns: Vec<u64> = (0..5).flat_map(|step| [100 + step, 500 + step, 7]).collect();
        let asked: usize = faults(&turns, 8, 1000).iter().map(|range| range.clone().count()).sum();
        assert_eq!(asked, 2 * (2 + 3 + 5));
    }

    #[test]
    fn the_window_ends_at_the_end_and_obeys_the_limit() {
        let mut readahead = Readahead::default();
        let mut asked = std::collections::HashSet::new();
        for page in 0..100 {
            for ahead in readahead.note(PageIndex(page), 4, 100) {
                assert!(ahead > page && ahead <= page + 4 && ahead < 100);
                assert!(asked.insert(ahead), "{ahead} asked twice");
            }
        }
        assert!(readahead.note(PageIndex(0), 0, 100).is_empty());
    }
}
