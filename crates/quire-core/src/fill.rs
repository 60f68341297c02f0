//! Fill threads: they fill pages on nobody's stack, ahead of need, and on demand when the store
//! is slow and the pmap's handler threads must stay free for other faults.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::load;
use crate::memory_object::InFlight;
use crate::space::MapEntry;
use crate::sys::lock::{Condvar, Mutex};
use crate::sys::memory::Touch;
use crate::sys::thread;
use crate::units::PageIndex;

/// What there is to do.
pub enum Work {
    /// Load a page that a thread waits for. The submitter has claimed it (LOADING).
    Demand {
        /// Which page.
        page: PageIndex,
        /// For what.
        touch: Touch,
        /// When it was touched, nanoseconds of the monotonic clock.
        started_ns: u64,
    },
    /// Load pages that are likely to be touched soon, by one read. The submitter has claimed them.
    Ahead {
        /// First page.
        first: PageIndex,
        /// How many.
        count: u64,
    },
    /// Make a huge page of the resident granules around a page.
    Collapse {
        /// One of the granules.
        page: PageIndex,
    },
}

/// Work on one mapping.
pub struct Task {
    /// The mapping.
    pub entry: Arc<MapEntry>,
    /// What to do.
    pub work: Work,
    /// Keeps the object from being unmapped.
    pub in_flight: InFlight,
}

#[derive(Default)]
struct Queue {
    demand: VecDeque<Task>,
    later: VecDeque<Task>,
    stop: bool,
}

/// The threads and what they have to do.
#[derive(Default)]
pub struct FillPool {
    queue: Mutex<Queue>,
    work: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl FillPool {
    /// Makes sure that at least `count` threads run.
    ///
    /// # Errors
    /// When the system has no room for another thread.
    pub fn ensure(self: &Arc<Self>, count: usize) -> std::io::Result<()> {
        let mut threads = self.threads.lock();
        while threads.len() < count {
            let pool = Arc::clone(self);
            let name = format!("quire-fill-{}", threads.len());
            threads.push(thread::spawn(&name, move || pool.serve())?);
        }
        Ok(())
    }

    /// Hands work over; what a thread waits for goes first.
    pub fn submit(&self, task: Task) {
        let mut queue = self.queue.lock();
        match task.work {
            Work::Demand { .. } => queue.demand.push_back(task),
            Work::Ahead { .. } | Work::Collapse { .. } => queue.later.push_back(task),
        }
        drop(queue);
        self.work.notify_one();
    }

    /// Ends the threads; nothing is submitted any more.
    pub fn stop(&self) {
        self.queue.lock().stop = true;
        self.work.notify_all();
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join(); // a panic would have aborted the process
        }
    }

    fn serve(&self) {
        loop {
            let mut queue = self.queue.lock();
            let task = loop {
                if let Some(task) = queue.demand.pop_front().or_else(|| queue.later.pop_front()) {
                    break task;
                }
                if queue.stop {
                    return;
                }
                queue = self.work.wait(queue);
            };
            drop(queue);
            match task.work {
                Work::Demand { page, touch, started_ns } => {
                    load::load(&task.entry, page, touch, started_ns);
                    load::collapse(&task.entry, page);
                }
                Work::Ahead { first, count } => {
                    load::load_ahead(&task.entry, first, count);
                    load::collapse(&task.entry, first);
                }
                Work::Collapse { page } => load::collapse(&task.entry, page),
            }
            drop(task.in_flight);
        }
    }
}
