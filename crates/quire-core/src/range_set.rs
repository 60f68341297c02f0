//! A set of byte ranges, merged where they meet.

use std::collections::BTreeMap;
use std::ops::Range;

/// Half-open ranges that neither overlap nor touch, in order.
#[derive(Clone, Debug, Default)]
pub struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Adds a range; an empty one changes nothing.
    pub fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        while let Some((&from, &to)) = self.0.range(..=end).next_back() {
            if to < start {
                break;
            }
            self.0.remove(&from);
            start = start.min(from);
            end = end.max(to);
        }
        self.0.insert(start, end);
    }

    /// Adds all of another set.
    pub fn absorb(&mut self, other: &RangeSet) {
        other.iter().for_each(|range| self.add(range));
    }

    /// Takes out what lies in `within`; the rest stays.
    pub fn take(&mut self, within: Range<u64>) -> RangeSet {
        let (mut taken, mut rest) = (RangeSet::default(), RangeSet::default());
        for range in std::mem::take(self).iter() {
            taken.add(range.start.max(within.start)..range.end.min(within.end));
            rest.add(range.start..range.end.min(within.start));
            rest.add(range.start.max(within.end)..range.end);
        }
        *self = rest;
        taken
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(start, end)| *start..*end)
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive(ranges: &[(u64, u64)]) -> Vec<bool> {
        let mut bits = vec![false; 64];
        ranges
            .iter()
            .for_each(|(start, len)| (*start..(start + len).min(64)).for_each(|i| bits[i as usize] = true));
        bits
    }

    proptest! {
        #[test]
        fn it_is_the_set_of_its_bytes(ranges in proptest::collection::vec((0u64..64, 0u64..12), 0..20), cut in (0u64..64, 0u64..64)) {
            let mut set = RangeSet::default();
            ranges.iter().for_each(|(start, len)| set.add(*start..(start + len).min(64)));
            let bits = |set: &RangeSet| naive(&set.iter().map(|r| (r.start, r.end - r.start)).collect::<Vec<_>>());
            prop_assert_eq!(bits(&set), naive(&ranges));
            let pairs: Vec<_> = set.iter().collect();
            prop_assert!(pairs.windows(2).all(|pair| pair[0].end < pair[1].start));
            let whole = bits(&set);
            let within = cut.0.min(cut.1)..cut.0.max(cut.1);
            let taken = bits(&set.take(within.clone()));
            for at in 0..64 {
                prop_assert_eq!(taken[at], whole[at] && within.contains(&(at as u64)));
                prop_assert_eq!(bits(&set)[at], whole[at] && !within.contains(&(at as u64)));
            }
        }
    }
}
