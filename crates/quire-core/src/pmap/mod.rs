//! Pmaps make translations valid or invalid: the layer that meets the MMU. One per file.
//!
//! The ladder (`probe`): each rung is tried at import; the first that works is the default.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::memory::Range;
use crate::sys::userfaultfd::{Access, FEATURE_POISON, FEATURE_SIGBUS, Userfaultfd};
use frames::Frames;

pub mod alias;
pub mod frames;
pub mod guard;
pub mod inline;
pub mod kernel;
pub mod mprotect;
pub mod soft;
pub mod uffd;

/// How writes to a writable mapping are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// Not at all: only read-only mappings.
    None,
    /// Asynchronous write-protect: the kernel notes them, a scan reads the notes.
    WpAsync,
    /// Write-protect: the first write to a clean page is a fault.
    WpSync,
    /// As `WpSync`, by mprotect(2).
    Mprotect,
    /// Every write is a call.
    Calls,
}

impl Tracking {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Tracking::None => "none",
            Tracking::WpAsync => "wp-async",
            Tracking::WpSync => "wp-sync",
            Tracking::Mprotect => "mprotect",
            Tracking::Calls => "calls",
        }
    }
}

/// Makes translations.
pub trait Pmap: Send + Sync {
    /// Which it is.
    fn kind(&self) -> Kind;

    /// Starts taking the faults of a reserved range, and where it is writable the writes to it.
    ///
    /// # Errors
    /// The errno.
    fn enter(&self, range: Range, writable: bool) -> Result<(), i32>;

    /// Stops taking the faults of a range.
    fn leave(&self, range: Range);

    /// Installs a copy of `bytes` at the start of a page and lets the threads that wait there go
    /// on. `protected`: the next write to it is noticed.
    ///
    /// # Errors
    /// The errno.
    fn install(&self, start: usize, bytes: &[u8], protected: bool) -> Result<(), i32>;

    /// Makes a touch of the range raise SIGBUS, and lets the threads that wait there run into it.
    ///
    /// # Errors
    /// The errno; ENOTSUP where touches raise a signal in any case.
    fn poison(&self, range: Range) -> Result<(), i32> {
        let _ = range;
        Err(libc::ENOTSUP)
    }

    /// Removes the pages of ranges, or their poison.
    fn remove(&self, ranges: &[Range]);

    /// Lets the threads that wait in the kernel for a range try again.
    fn wake(&self, range: Range) {
        let _ = range;
    }

    /// Protects the pages of a range from writes, so that the next is noticed, or allows them.
    ///
    /// # Errors
    /// The errno.
    fn protect(&self, range: Range, on: bool) -> Result<(), i32>;

    /// What can move pages and tell which were written, for `Tracking::WpAsync`.
    fn frames(&self) -> Option<&Frames> {
        None
    }

    /// How it notices writes.
    fn tracking(&self) -> Tracking;

    /// Whether a faulting thread resolves its own fault, in a signal handler, rather than wait in
    /// the kernel for a handler thread.
    fn faults_are_signals(&self) -> bool;

    /// Whether a touch of a page that is not there raises SIGSEGV, by a protection of the range that
    /// is the pmap's own business.
    fn absent_is_segv(&self) -> bool {
        false
    }
}

/// Which pmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// userfaultfd with handler threads.
    Uffd,
    /// userfaultfd with SIGBUS: the faulting thread resolves its own fault.
    Inline,
    /// SIGSEGV by guard pages over a memory file.
    Guard,
    /// SIGSEGV by protection of a memory file.
    Mprotect,
    /// No faults: reads and writes are calls.
    Soft,
}

impl Kind {
    /// Its name in the ladder.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Uffd => "uffd",
            Kind::Inline => "inline",
            Kind::Guard => "guard",
            Kind::Mprotect => "mprotect",
            Kind::Soft => "soft",
        }
    }

    /// Whether one serves all mappings; others belong to one mapping each.
    pub fn is_shared(self) -> bool {
        matches!(self, Kind::Uffd | Kind::Inline | Kind::Soft)
    }

    /// Whether the addresses may be touched: there is a pointer.
    pub fn has_pointer(self) -> bool {
        self != Kind::Soft
    }

    /// Whether its pages may become huge ones.
    pub fn has_huge_pages(self) -> bool {
        matches!(self, Kind::Uffd | Kind::Inline)
    }

    /// Granules that may be resident at once, where each may take map entries of the process.
    pub fn granules_max(self, writable: bool) -> Option<u64> {
        let bounded = self == Kind::Mprotect || (self == Kind::Guard && writable);
        bounded.then(|| alias::granules_max() as u64)
    }

    /// The system calls that may refuse to start it, and to enter a range.
    pub fn calls(self) -> [&'static str; 2] {
        match self {
            Kind::Uffd | Kind::Inline => ["userfaultfd", "UFFDIO_REGISTER"],
            Kind::Guard | Kind::Mprotect => ["memfd_create", "mmap of a memfd"],
            Kind::Soft => ["mmap", "mprotect"],
        }
    }
}

/// One rung of the ladder, as found on this machine.
#[derive(Clone, Debug)]
pub struct Rung {
    /// Which.
    pub kind: Kind,
    /// Whether it works here.
    pub works: bool,
    /// Why, or why not.
    pub reason: String,
    /// How to enable it; empty when it works or cannot be enabled.
    pub remedy: &'static str,
    /// Whether it gives a pointer.
    pub pointer: bool,
    /// Whether system calls may touch pages that are not there.
    pub system_calls: bool,
    /// How it can notice writes here, best first.
    pub trackings: Vec<Tracking>,
}

const REMEDY_FULL: &str = "sysctl -w vm.unprivileged_userfaultfd=1, or give the user access to /dev/userfaultfd \
     (chmod/setfacl; Linux 6.1), or run with CAP_SYS_PTRACE";
const REMEDY_SECCOMP: &str = "allow the userfaultfd system call in the container's seccomp profile";
const REMEDY_DESCRIPTORS: &str = "raise the limit of open files (ulimit -n), or close mappings";
const REMEDY_GUARD: &str = "use Linux 6.15 or later (MADV_GUARD_INSTALL in memory files)";
const REMEDY_MEMFD: &str = "allow memfd_create, mmap, madvise and mprotect in the container's seccomp \
     profile, and files of any length (ulimit -f)";
const REMEDY_KERNEL: &str = "use Linux 6.6 or later (UFFDIO_POISON)";

/// The ladder, best first.
pub fn probe() -> Vec<Rung> {
    vec![probe_uffd(), probe_inline(), probe_guard(), probe_mprotect(), soft()]
}

fn probe_uffd() -> Rung {
    let rung = Rung {
        kind: Kind::Uffd,
        works: false,
        reason: String::new(),
        remedy: "",
        pointer: true,
        system_calls: true,
        trackings: Vec::new(),
    };
    match Userfaultfd::features(Access::Full) {
        Ok(features) if features & FEATURE_POISON != 0 => Rung {
            works: true,
            reason: "full-mode userfaultfd opens".into(),
            trackings: frames::trackings(features),
            ..rung
        },
        Ok(_) => Rung { reason: "this kernel has no UFFDIO_POISON".into(), remedy: REMEDY_KERNEL, ..rung },
        Err(errno) => Rung { reason: refusal("full-mode userfaultfd", errno), remedy: REMEDY_FULL, ..rung },
    }
}

fn probe_inline() -> Rung {
    let rung = Rung {
        kind: Kind::Inline,
        works: false,
        reason: String::new(),
        remedy: "",
        pointer: true,
        system_calls: false,
        trackings: Vec::new(),
    };
    match Userfaultfd::features(Access::UserModeOnly) {
        Ok(features) if features & FEATURE_SIGBUS != 0 => Rung {
            works: true,
            reason: "user-mode userfaultfd with SIGBUS opens".into(),
            trackings: frames::trackings(features),
            ..rung
        },
        Ok(_) => Rung {
            reason: "this kernel has no UFFD_FEATURE_SIGBUS".into(),
            remedy: "use Linux 5.11 or later",
            ..rung
        },
        Err(errno) => {
            Rung { reason: refusal("user-mode userfaultfd", errno), remedy: REMEDY_SECCOMP, ..rung }
        }
    }
}

fn probe_guard() -> Rung {
    static WORKED: AtomicBool = AtomicBool::new(false);
    let reason = "guard pages can be set in a memory file";
    probe_alias(Kind::Guard, reason, &WORKED, || {
        guard::GuardPmap::start().map(|pmap| Box::new(pmap) as Box<dyn Pmap>)
    })
}

fn probe_mprotect() -> Rung {
    static WORKED: AtomicBool = AtomicBool::new(false);
    let reason = "a memory file can be mapped and protected";
    probe_alias(Kind::Mprotect, reason, &WORKED, || {
        mprotect::MprotectPmap::start().map(|pmap| Box::new(pmap) as Box<dyn Pmap>)
    })
}

/// Tries a pmap over a memory file, until it has worked once.
fn probe_alias(
    kind: Kind,
    reason: &str,
    worked: &AtomicBool,
    start: impl FnOnce() -> Result<Box<dyn Pmap>, i32>,
) -> Rung {
    let rung = Rung {
        kind,
        works: false,
        reason: reason.into(),
        remedy: "",
        pointer: true,
        system_calls: false,
        trackings: vec![Tracking::Mprotect],
    };
    let tried = || {
        let pmap = start().map_err(|errno| (errno, "a memory file"))?;
        alias::try_out(&*pmap)
    };
    if worked.load(Ordering::Relaxed) {
        return Rung { works: true, ..rung };
    }
    match tried() {
        Ok(()) => {
            worked.store(true, Ordering::Relaxed);
            Rung { works: true, ..rung }
        }
        Err((errno, step)) => {
            let remedy = match errno {
                libc::EMFILE | libc::ENFILE => REMEDY_DESCRIPTORS,
                libc::EINVAL if kind == Kind::Guard => REMEDY_GUARD,
                _ => REMEDY_MEMFD,
            };
            let reason = format!("{step}: refused ({})", crate::sys::errno_message(errno));
            Rung { reason, remedy, ..rung }
        }
    }
}

fn soft() -> Rung {
    Rung {
        kind: Kind::Soft,
        works: true,
        reason: "needs nothing of the system; gives no array".into(),
        remedy: "",
        pointer: false,
        system_calls: false,
        trackings: vec![Tracking::Calls],
    }
}

fn refusal(what: &str, errno: i32) -> String {
    let why = match errno {
        libc::ENOSYS => "this kernel or its sandbox has no userfaultfd",
        libc::EPERM => "not permitted",
        _ => "refused",
    };
    format!("{what}: {why} ({})", crate::sys::errno_message(errno))
}

/// A pmap and the thread-stopping call that belongs to it.
pub trait RunningPmap: Pmap {
    /// Stops what runs for it; no range is entered any more.
    fn stop(&self) {}

    /// Closes, in the child of a fork, the descriptors that belong to the parent; this value is
    /// leaked afterwards.
    fn forget_in_child(&self);
}

/// Starts a pmap.
///
/// # Errors
/// The errno.
pub fn start(kind: Kind, tracking: Tracking) -> Result<Arc<dyn RunningPmap>, i32> {
    Ok(match kind {
        Kind::Uffd => uffd::UffdPmap::start(tracking)?,
        Kind::Inline => Arc::new(inline::InlinePmap::start(tracking)?),
        Kind::Guard => Arc::new(guard::GuardPmap::start()?),
        Kind::Mprotect => Arc::new(mprotect::MprotectPmap::start()?),
        Kind::Soft => Arc::new(soft::SoftPmap),
    })
}
