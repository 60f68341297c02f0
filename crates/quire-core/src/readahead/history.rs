//! The last faults that continued no sequence, and the sequences that can be seen in them.

use super::At;

const KEPT: usize = 16;
/// Walks whose faults may alternate.
const LAG_MAX: usize = 4;
/// Bytes by which equal distances may differ: a copy may touch its last bytes first.
const SLACK: i64 = 512;

/// Offsets of faults.
#[derive(Clone, Copy, Debug, Default)]
pub struct History {
    offsets: [i64; KEPT],
    noted: usize,
}

impl History {
    /// Adds a fault; one more on the granule of the last is left out.
    pub fn push(&mut self, offset: i64, granule: i64) {
        if self.back(0).is_some_and(|last| last / granule == offset / granule) {
            return;
        }
        self.offsets[self.noted % KEPT] = offset;
        self.noted += 1;
    }

    /// The last but `count`.
    fn back(&self, count: usize) -> Option<i64> {
        let known = count < self.noted.min(KEPT);
        known.then(|| self.offsets[(self.noted - 1 - count) % KEPT])
    }

    /// Whether the `needed` granules that come before this one in a direction were touched in order.
    pub fn precedes(&self, at: &At, direction: i64, needed: usize) -> bool {
        let (mut wanted, mut found) = (at.page - direction, 0);
        for offset in (0..KEPT).map_while(|count| self.back(count)) {
            if offset / at.granule == wanted {
                (wanted, found) = (wanted - direction, found + 1);
            }
        }
        found >= needed
    }

    /// Equal distances of more than a granule from fault to fault, or from one to the second, third
    /// or fourth after it, of which one more is asked for. Returns where they began and how many
    /// there are.
    pub fn equal_steps(&self, at: &At, caution: usize) -> Option<(i64, usize)> {
        (1..=LAG_MAX).find_map(|lag| {
            let needed = caution + if lag == 1 { 2 } else { 3 };
            let nth = |steps: usize| if steps == 0 { Some(at.offset) } else { self.back(steps * lag - 1) };
            let step = at.offset - nth(1)?;
            let equal = |steps| Some(((nth(steps)? - nth(steps + 1)?) - step).abs() <= SLACK);
            let found = step.abs() > at.granule && (1..needed).all(|steps| equal(steps) == Some(true));
            found.then(|| nth(needed).map(|first| (first, needed)))?
        })
    }
}

/// Whether two offsets are the same for a walk.
pub fn is_near(one: i64, other: i64) -> bool {
    (one - other).abs() <= SLACK
}
