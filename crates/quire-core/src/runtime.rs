//! What runs while there are mappings: the pmaps' descriptors and threads, and the fill threads.
//! Started by the first mapping, stopped by the last; made anew in the child of a fork.
//!
//! Fork: mappings are not inherited (MADV_DONTFORK), as a child that touched an unregistered page
//! would silently read zeros. In the child their addresses are held inaccessible; `rearm`, called
//! by the interpreter after its own fork or else by the first touch, maps and registers them
//! again, all pages absent.
#![allow(unsafe_code)]

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, Once};

use crate::buffers;
use crate::counters::RETIRED;
use crate::daemon::{self, Daemon};
use crate::errors::{MapError, words_of};
use crate::fault;
use crate::fill::FillPool;
use crate::interrupt;
use crate::kernel_daemon;
use crate::page_cache::PAGE_CACHE;
use crate::pmap::{self, Kind, Pmap, RunningPmap, Tracking};
use crate::space::{MapEntry, SPACE};
use crate::sys::fork::{ForkMutex, HeldGuard, at_fork};
use crate::sys::memory::{self, Range};
use crate::sys::{signal, thread};

/// Fill threads where every store is fast, per CPU; slow stores ask for their own number.
const FILL_PER_CPU: usize = 1;
/// Fill threads for slow stores: requests in flight.
pub const FILL_SLOW: usize = 16;

struct State {
    users: usize,
    /// One for each kind and way of noticing writes that is in use, or for each mapping where the
    /// kind is not shared.
    pmaps: Vec<Arc<dyn RunningPmap>>,
    fill: Option<Arc<FillPool>>,
    daemon: Option<Daemon>,
}

const EMPTY: State = State { users: 0, pmaps: Vec::new(), fill: None, daemon: None };

static RUNTIME: ForkMutex<State> = ForkMutex::new(EMPTY);
static RUNTIME_HELD: HeldGuard<MutexGuard<'static, State>> = HeldGuard::new();

/// Has faults and forks come to us, once and for all; cheap when it is so already.
pub fn once_per_process() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| at_fork(before_fork, after_fork_in_parent, after_fork_in_child));
    signal::install_fault_handlers(fault::on_signal);
}

impl State {
    fn pmap(&mut self, kind: Kind, tracking: Tracking) -> Result<Arc<dyn RunningPmap>, MapError> {
        let same = |pmap: &&Arc<dyn RunningPmap>| pmap.kind() == kind && pmap.tracking() == tracking;
        if let Some(running) = self.pmaps.iter().find(same).filter(|_| kind.is_shared()) {
            return Ok(Arc::clone(running));
        }
        self.close_unused();
        let started = pmap::start(kind, tracking).map_err(|errno| MapError::sys(kind.calls()[0], errno))?;
        self.pmaps.push(Arc::clone(&started));
        Ok(started)
    }

    /// Closes the pmaps of mappings that are gone, under the lock that a fork takes: the child has
    /// either all of their descriptors to close, or none.
    fn close_unused(&mut self) {
        self.pmaps.retain(|pmap| pmap.kind().is_shared() || Arc::strong_count(pmap) > 1);
    }

    fn fill(&mut self, slow: bool) -> Result<Arc<FillPool>, MapError> {
        let pool = self.fill.get_or_insert_default();
        let threads = if slow { FILL_SLOW } else { FILL_PER_CPU * thread::allowed_cpus().len() };
        pool.ensure(threads).map_err(|error| no_thread(&error))?;
        Ok(Arc::clone(pool))
    }

    fn start_daemon(&mut self) -> Result<(), MapError> {
        if self.daemon.is_none() {
            self.daemon = Some(Daemon::start().map_err(|error| no_thread(&error))?);
        }
        Ok(())
    }

    fn stop_if_unused(&mut self) {
        if self.users > 0 {
            self.close_unused();
            return;
        }
        let state = std::mem::replace(self, EMPTY);
        if let Some(daemon) = state.daemon {
            daemon.stop();
        }
        if let Some(pool) = state.fill {
            pool.stop();
        }
        state.pmaps.iter().for_each(|pmap| pmap.stop());
        buffers::clear();
    }
}

/// Takes part in the running pmap of a kind and the fill threads; paired with [`release`].
///
/// # Errors
/// When the kernel refuses the pmap or a thread.
pub fn acquire(
    kind: Kind,
    tracking: Tracking,
    slow: bool,
) -> Result<(Arc<dyn RunningPmap>, Arc<FillPool>), MapError> {
    once_per_process();
    let mut state = RUNTIME.lock();
    let both = state
        .pmap(kind, tracking)
        .and_then(|pmap| state.fill(slow).map(|fill| (pmap, fill)))
        .and_then(|both| state.start_daemon().map(|()| both));
    if both.is_ok() {
        state.users += 1;
    } else {
        state.stop_if_unused();
    }
    both
}

/// Ends one [`acquire`]; the last stops all threads and waits for them.
pub fn release() {
    let mut state = RUNTIME.lock();
    state.users = state.users.saturating_sub(1);
    state.stop_if_unused();
}

/// Prepares a reserved range for faults: not inherited, huge pages only where asked for, entered.
///
/// # Errors
/// `MapError::Sys`.
pub fn prepare(range: Range, huge: bool, writable: bool, pmap: &dyn Pmap) -> Result<(), MapError> {
    // SAFETY: a range of ours that is empty.
    unsafe {
        memory::advise(range, libc::MADV_DONTFORK).map_err(|errno| MapError::sys("madvise", errno))?;
        // A kernel without huge pages refuses this advice, and needs it not.
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        let _ = memory::advise(range, advice);
    }
    pmap.enter(range, writable).map_err(|errno| MapError::sys(pmap.kind().calls()[1], errno))
}

fn no_thread(error: &std::io::Error) -> MapError {
    MapError::Sys {
        call: "pthread_create",
        errno: error.raw_os_error().unwrap_or(libc::EAGAIN),
        message: words_of(error),
    }
}

extern "C" fn before_fork() {
    // SAFETY: this is the handler before a fork.
    unsafe {
        RUNTIME_HELD.keep(RUNTIME.lock());
        SPACE.lock_for_fork();
    }
}

extern "C" fn after_fork_in_parent() {
    // SAFETY: `before_fork` took both in this thread.
    unsafe {
        SPACE.unlock_after_fork();
        RUNTIME_HELD.let_go();
    }
}

extern "C" fn after_fork_in_child() {
    // SAFETY: this is the only thread; `before_fork` took both locks in it, so what they guard is
    // whole. The mappings' addresses are holes (DONTFORK) that belong to us.
    unsafe {
        SPACE.unlock_after_fork();
        RUNTIME_HELD.let_go();
        let state = std::mem::replace(&mut *RUNTIME.lock(), EMPTY);
        for pmap in &state.pmaps {
            pmap.forget_in_child();
        }
        std::mem::forget(state);
        PAGE_CACHE.reset();
        buffers::reset_in_child();
        RETIRED.replace_in_child(None);
        interrupt::clear();
        signal::reset_in_child();
        // What the kernel pages is inherited as it is; other threads' calls on it ended with them.
        SPACE.kernel_mut().values_mut().for_each(|region| region.reset_in_child());
        kernel_daemon::reset_in_child(SPACE.kernel().values());
        daemon::STEP.replace_in_child(());
        for entry in SPACE.entries_in_child() {
            entry.armed.store(false, Ordering::Release);
            // Failing here leaves a hole: a touch is then a SIGSEGV that finds the entry all the same.
            let _ = memory::reserve_at(entry.range, libc::PROT_NONE);
            entry.object.reset_in_child();
        }
    }
}

/// In the child of a fork: maps and registers again what the parent had mapped, but for writable
/// mappings: the parent's dirty pages are not the child's. A no-op elsewhere.
///
/// # Errors
/// When the kernel refuses; the entries stay inaccessible, and it can be tried again.
pub fn rearm() -> Result<(), MapError> {
    SPACE.kernel().values().filter(|region| region.wishes.is_bounded()).for_each(kernel_daemon::notice);
    let mut state = RUNTIME.lock();
    for (entry, _in_flight) in SPACE.all() {
        if !entry.writable && !entry.armed.load(Ordering::Acquire) {
            let armed = rearm_entry(&mut state, &entry);
            state.users += usize::from(armed.is_ok());
            armed?;
        }
    }
    Ok(())
}

fn rearm_entry(state: &mut State, entry: &MapEntry) -> Result<(), MapError> {
    let (kind, tracking) = (entry.pmap.get().kind(), entry.pmap.get().tracking());
    let pmap = state.pmap(kind, tracking)?;
    let fill = state.fill(entry.object.pager.store().is_slow())?;
    state.start_daemon()?;
    let protected_by_pmap = pmap.absent_is_segv();
    // SAFETY: our own inaccessible placeholder; the entry is not armed, so under the runtime's
    // lock no other thread uses its cells.
    unsafe {
        prepare(entry.range, entry.huge, false, &*pmap)?;
        entry.pmap.replace_in_child(pmap);
        entry.fill.replace_in_child(fill);
        if !protected_by_pmap {
            // Readable only now: until it was registered a touch would have read zeros.
            memory::protect(entry.range, libc::PROT_READ)?;
        }
    }
    entry.armed.store(true, Ordering::Release);
    Ok(())
}
