//! A sequence that is followed: where it is, how it goes on, and how much of it was asked for.

use super::history::is_near;
use super::{Ahead, At, WINDOW_FIRST};

/// One sequence. Positions are bytes; counts are steps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream {
    /// The thread that moved it last.
    pub thread: u64,
    /// Number of the fault that last moved it; 0 when it has never been used.
    pub moved: u64,
    /// Where it began, and how many steps ago: their mean is the step.
    first: i64,
    steps: i64,
    last: i64,
    step: i64,
    /// Bytes that are touched from each position on.
    extent: i64,
    dense: bool,
    window: i64,
    /// Steps after the last that were asked for.
    ahead: i64,
    /// Steps that were asked for and came.
    came: i64,
}

/// Where a fault met its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Beyond the window: all of it was used.
    ToTheEnd,
    /// Where pages are on their way.
    Within,
    /// The window is down to nothing.
    Closed,
}

impl Stream {
    /// From granule to granule.
    pub fn dense(at: &At, direction: i64) -> Self {
        let position = at.page * at.granule;
        let step = direction * at.granule;
        Stream { last: position, first: position, step, extent: 1, dense: true, ..Stream::default() }
    }

    /// By the mean of `steps` steps from `first` on.
    pub fn strided(at: &At, first: i64, steps: usize) -> Self {
        let steps = i64::try_from(steps).expect("a few");
        let step = (at.offset - first) / steps;
        Stream { last: at.offset, first, steps, step, extent: 1, ..Stream::default() }
    }

    /// Whether it is followed.
    pub fn is_open(&self) -> bool {
        self.moved > 0
    }

    /// Steps of a window at most.
    pub fn limit(&self, at: &At) -> i64 {
        if self.dense { at.row } else { (at.limit / self.granules(at.granule)).max(1) }
    }

    /// Granules that each step touches.
    fn granules(&self, granule: i64) -> i64 {
        (self.extent - 1) / granule + 1
    }

    /// How many steps a fault is after the last one, when it is one that the sequence comes by: no
    /// further than the first step beyond the window. 0 for one that it came by already.
    pub fn steps_to(&self, at: &At) -> Option<i64> {
        if !self.is_open() {
            return None;
        }
        let near = (at.offset - self.last).div_euclid(self.step);
        let nearest = [near, near + 1].into_iter().find(|step| self.covers(*step, at));
        if nearest.is_some_and(|step| (0..=self.ahead + 1).contains(&step)) {
            return nearest;
        }
        // Threads that share a sequence come by in no exact order.
        let late = !at.missing && nearest.is_some_and(|step| (-self.window..0).contains(&step));
        late.then_some(0)
    }

    fn covers(&self, step: i64, at: &At) -> bool {
        let position = self.last + step * self.step;
        let pages = position.div_euclid(at.granule)..=(position + self.extent - 1).div_euclid(at.granule);
        pages.contains(&at.page) || (!self.dense && is_near(position, at.offset))
    }

    /// Whether this step was asked for and is gone.
    pub fn has_lost(&self, step: i64, at: &At) -> bool {
        at.missing && (1..=self.ahead).contains(&step)
    }

    /// Moves on by `step` steps to this fault.
    pub fn advance(&mut self, step: i64, at: &At, sequential: bool) -> (Ahead, Moved) {
        let limit = self.limit(at);
        let came = step.min(self.ahead);
        let lost = self.has_lost(step, at);
        self.move_by(step, at);
        let hits = ((came - i64::from(lost)) * self.granules(at.granule)).unsigned_abs();
        self.came += came - i64::from(lost);
        if step == 0 {
            return (Ahead::default(), Moved::Within);
        }
        if lost {
            // Gone before its turn; so may be what follows, which is asked for again.
            let wasted = self.granules(at.granule).unsigned_abs();
            self.ahead -= came;
            if self.window < 2 {
                return (Ahead::default().after(hits, wasted + self.left(at.granule, at.end)), Moved::Closed);
            }
            self.ahead = 0;
            return (self.ask(self.window / 2, at).after(hits, wasted), Moved::Within);
        }
        let moved = if step > self.ahead { Moved::ToTheEnd } else { Moved::Within };
        self.ahead -= came;
        let window = if sequential { limit } else { (self.window * 2).max(WINDOW_FIRST).min(limit) };
        (self.ask(window, at).after(hits, 0), moved)
    }

    fn move_by(&mut self, step: i64, at: &At) {
        self.last += step * self.step;
        self.steps += step;
        if !self.dense && step > 0 && is_near(self.last, at.offset) {
            self.last = at.offset;
            self.step = (self.last - self.first) / self.steps;
        }
    }

    /// Makes `window` the window and asks for what of it has not been asked for.
    pub fn ask(&mut self, window: i64, at: &At) -> Ahead {
        self.window = window.clamp(1, at.limit.max(self.limit(at)));
        let to = self.whole_units(self.window.min(self.room(at.end)), at);
        let from = self.ahead.min(to);
        self.ahead = self.ahead.max(to);
        self.steps_ahead(from, to, at)
    }

    /// At most `to` steps, so that from granule to granule they end where a unit does. All of them where
    /// they are not worth two units, or end where the mapping does.
    fn whole_units(&self, to: i64, at: &At) -> i64 {
        if !self.dense || to < 2 * at.unit || to == self.room(at.end) {
            return to;
        }
        let page = self.last / at.granule;
        let surplus = if self.step > 0 { page + 1 + to } else { to - page };
        to - surplus.rem_euclid(at.unit)
    }

    /// Steps that are left in the mapping.
    fn room(&self, end: i64) -> i64 {
        if self.step > 0 { (end - 1 - self.last).max(0) / self.step } else { self.last / -self.step }
    }

    /// The steps after `from` up to `to`.
    fn steps_ahead(&self, from: i64, to: i64, at: &At) -> Ahead {
        let position = self.last + (from + 1) * self.step;
        Ahead::new(position, self.step, to - from, self.extent, self.dense, at)
    }

    /// Takes a fault right behind what a step within the window touches to be a part of each step, and
    /// asks for what that adds.
    pub fn extend(&mut self, at: &At) -> Option<Ahead> {
        let forward = (at.offset - self.last).div_euclid(self.step.abs());
        let step = forward * self.step.signum();
        let position = self.last + step * self.step;
        let behind = (position + self.extent - 1).div_euclid(at.granule) + 1;
        if self.dense || !(0..=self.ahead).contains(&step) || at.page != behind {
            return None;
        }
        let hits = (step * self.granules(at.granule)).unsigned_abs();
        self.came += step;
        self.ahead -= step;
        self.move_by(step, at);
        self.extent = at.offset - position + 1;
        let limit = self.limit(at);
        self.ahead = self.ahead.min(limit);
        Some(self.steps_ahead(0, self.ahead, at).after(hits, 0))
    }

    /// Granules that were asked for and have not come. None when they are the last of the mapping:
    /// a reader that uses them all makes no fault beyond them.
    pub fn left(&self, granule: i64, end: i64) -> u64 {
        let at_the_end = self.is_open() && self.room(end) <= self.ahead;
        if at_the_end { 0 } else { (self.ahead * self.granules(granule)).unsigned_abs() }
    }

    /// Whether more of what was asked for was left than came.
    pub fn was_a_waste(&self, granule: i64, end: i64) -> bool {
        self.is_open() && self.left(granule, end) > (self.came * self.granules(granule)).unsigned_abs()
    }
}
