//! Readahead: notices that a mapping is read in order and says what to fill ahead.
//!
//! It sees faults only: a touch of a page that is resident makes none. Three shapes are known:
//!
//! - the next granule, or the one before, after two others in a row (`dense`);
//! - equal distances in bytes, forwards or backwards, between the faults of one thread: a walk down
//!   a column. The distance need not be a multiple of the granule, and what is touched at each step
//!   may be several granules in a row (`extent`). The faults of up to four such walks may alternate;
//! - with [`Advice::Sequential`], any fault.
//!
//! Such a sequence has a window of steps that are resident or on their way. It doubles each time
//! the reader comes to its end, up to a limit, and is halved, down to nothing, when a granule of it
//! is found gone: evicted before its turn, or refused for lack of room. A thread whose sequences
//! were mostly given up must show longer ones before the next is believed.
//!
//! Distances are looked for among the faults of one thread, adjacent granules also among those of
//! all: threads that share out an array granule by granule read it in order together. A sequence
//! that a thread has begun is replaced by its own later ones first, so that a thread that jumps
//! about leaves those of the others alone.

mod history;
mod runs;
mod stream;

use std::cmp::Reverse;

use history::History;
pub use runs::Ahead;
use stream::{Moved, Stream};

/// Sequences followed at once, and of them those of one thread.
const STREAMS: usize = 32;
const STREAMS_OF_A_THREAD: usize = 8;
/// Threads whose last faults are remembered.
const THREADS: usize = 16;
/// Steps that are asked for first.
const WINDOW_FIRST: i64 = 2;
/// Steps more that a thread must show at most, when its sequences were given up.
const CAUTION_MAX: usize = 2;

/// What the program says about how it will touch the mapping (madvise(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Advice {
    /// Nothing: what is filled ahead follows from the faults.
    #[default]
    Normal,
    /// In order: the first fault opens the largest window.
    Sequential,
    /// In no order: nothing is filled ahead.
    Random,
}

/// A fault.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Of the byte that was touched, within the mapping.
    pub offset: u64,
    /// Tells the faulting thread from others; 0 when it is not known.
    pub thread: u64,
    /// Whether nobody was filling the granule.
    pub missing: bool,
}

/// What bounds the filling ahead.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a granule.
    pub granule: u64,
    /// Granules of one window at most; with 0 nothing is filled ahead.
    pub window: u64,
    /// As `window`, for granules in a row.
    pub row: u64,
    /// Granules of the mapping.
    pub end: u64,
    /// Granules that are best filled at once, from multiples of so many on: a window that holds two such
    /// units ends where one does.
    pub unit: u64,
}

/// A fault and its limits, signed: sequences go both ways.
#[derive(Clone, Copy)]
struct At {
    offset: i64,
    page: i64,
    granule: i64,
    limit: i64,
    row: i64,
    end: i64,
    unit: i64,
    thread: u64,
    missing: bool,
}

impl At {
    fn new(fault: Fault, limits: Limits) -> Self {
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let granule = signed(limits.granule);
        At {
            offset: signed(fault.offset),
            page: signed(fault.offset) / granule,
            granule,
            limit: signed(limits.window),
            row: signed(limits.row),
            end: signed(limits.end).saturating_mul(granule),
            unit: signed(limits.unit).max(1),
            thread: fault.thread,
            missing: fault.missing,
        }
    }
}

/// The last faults of a thread that continued no sequence.
#[derive(Clone, Copy, Debug, Default)]
struct Thread {
    id: u64,
    history: History,
    /// Of them those that were not on the granule after that of the fault before.
    heads: History,
    /// Granule of its last fault.
    page: i64,
    caution: usize,
    /// Number of its last fault; 0 when the place is free.
    moved: u64,
}

/// The detector of one mapping. [`Readahead::note`] allocates nothing and takes no lock: it is called
/// in signal handlers.
#[derive(Debug, Default)]
pub struct Readahead {
    streams: [Stream; STREAMS],
    threads: [Thread; THREADS],
    /// Of all threads.
    history: History,
    faults: u64,
    advice: Advice,
}

impl Readahead {
    /// Sets how the mapping will be touched. `Random` forgets all sequences.
    pub fn set_advice(&mut self, advice: Advice) {
        if advice == Advice::Random {
            *self = Readahead::default();
        }
        self.advice = advice;
    }

    /// How the mapping will be touched, as far as was said.
    pub fn advice(&self) -> Advice {
        self.advice
    }

    /// A fault. Returns what to fill ahead.
    pub fn note(&mut self, fault: Fault, limits: Limits) -> Ahead {
        if self.advice == Advice::Random || limits.window == 0 {
            return Ahead::default();
        }
        self.faults += 1;
        let at = At::new(fault, limits);
        let thread = self.thread(at.thread);
        let is_head = std::mem::replace(&mut self.threads[thread].page, at.page) + 1 != at.page;
        if let Some((index, step)) = self.continued(&at) {
            return self.advance(index, step, thread, &at);
        }
        if let Some(ahead) = self.last_of(at.thread).and_then(|stream| stream.extend(&at)) {
            return ahead;
        }
        let found = self.detect(thread, &at);
        self.threads[thread].history.push(at.offset, at.granule);
        self.history.push(at.offset, at.granule);
        if is_head {
            self.threads[thread].heads.push(at.offset, at.granule);
        }
        found.map_or_else(Ahead::default, |stream| self.open(stream, &at))
    }

    /// The sequence that a fault continues, and by how many steps: the thread's own before others', one
    /// that expects the fault before one that has filled the granule in vain, the last moved first.
    fn continued(&self, at: &At) -> Option<(usize, i64)> {
        let fits = |(index, stream): (usize, &Stream)| {
            let step = stream.steps_to(at)?;
            let rank = (stream.thread != at.thread, stream.has_lost(step, at), Reverse(stream.moved));
            Some((rank, index, step))
        };
        self.streams.iter().enumerate().filter_map(fits).min().map(|(_, index, step)| (index, step))
    }

    fn advance(&mut self, index: usize, step: i64, thread: usize, at: &At) -> Ahead {
        let stream = &mut self.streams[index];
        stream.moved = self.faults;
        stream.thread = at.thread;
        let (ahead, moved) = stream.advance(step, at, self.advice == Advice::Sequential);
        let caution = &mut self.threads[thread].caution;
        match moved {
            Moved::ToTheEnd => *caution = caution.saturating_sub(1),
            Moved::Within => {}
            Moved::Closed => {
                *caution = (*caution + 1).min(CAUTION_MAX);
                *stream = Stream::default();
            }
        }
        ahead
    }

    /// The place of a thread, or that of the one that has been still for longest.
    fn thread(&mut self, id: u64) -> usize {
        let known = self.threads.iter().position(|thread| thread.moved > 0 && thread.id == id);
        let index = known.unwrap_or_else(|| {
            let stillest = self.threads.iter().enumerate().min_by_key(|(_, thread)| thread.moved);
            let index = stillest.expect("there are places").0;
            self.threads[index] = Thread { id, page: -2, ..Thread::default() };
            index
        });
        self.threads[index].moved = self.faults;
        index
    }

    /// The sequence that a thread moved last.
    fn last_of(&mut self, thread: u64) -> Option<&mut Stream> {
        let own = self.streams.iter_mut().filter(|stream| stream.is_open() && stream.thread == thread);
        own.max_by_key(|stream| stream.moved)
    }

    /// A sequence of which this fault is the last step.
    fn detect(&self, thread: usize, at: &At) -> Option<Stream> {
        let Thread { history, heads, caution, .. } = &self.threads[thread];
        let dense = |direction: i64| {
            let shown = |history: &History| history.precedes(at, direction, 2 + caution);
            (shown(history) || shown(&self.history)).then(|| Stream::dense(at, direction))
        };
        let strided = || {
            let (first, steps) = heads.equal_steps(at, *caution)?;
            Some(Stream::strided(at, first, steps))
        };
        let advised = || (self.advice == Advice::Sequential).then(|| Stream::dense(at, 1));
        dense(1).or_else(|| dense(-1)).or_else(strided).or_else(advised)
    }

    /// Follows a new sequence, in the place of the thread's own stillest when it has its share.
    fn open(&mut self, mut stream: Stream, at: &At) -> Ahead {
        let window = if self.advice == Advice::Sequential { stream.limit(at) } else { WINDOW_FIRST };
        let own = self.streams.iter().filter(|stream| stream.is_open() && stream.thread == at.thread).count();
        let places = self.streams.iter_mut();
        let place = places
            .filter(|stream| own < STREAMS_OF_A_THREAD || stream.is_open() && stream.thread == at.thread)
            .min_by_key(|stream| stream.moved)
            .expect("there are places");
        (stream.thread, stream.moved) = (at.thread, self.faults);
        let ahead = stream.ask(window, at);
        let replaced = std::mem::replace(place, stream);
        if replaced.was_a_waste(at.granule, at.end)
            && let Some(owner) = self.threads.iter_mut().find(|thread| thread.id == replaced.thread)
        {
            owner.caution = (owner.caution + 1).min(CAUTION_MAX);
        }
        ahead.after(0, replaced.left(at.granule, at.end))
    }
}

#[cfg(test)]
mod tests;
