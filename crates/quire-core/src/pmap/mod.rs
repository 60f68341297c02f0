//! Pmaps make translations valid or invalid: the layer that meets the MMU. One per file.
//!
//! The ladder (`probe`): each rung is tried at import; the first that works is the default.

use std::sync::Arc;

use crate::sys::memory::Range;
use crate::sys::userfaultfd::{Access, FEATURE_POISON, FEATURE_SIGBUS, Userfaultfd};

pub mod inline;
pub mod uffd;

/// Makes translations.
pub trait Pmap: Send + Sync {
    /// Its name in the ladder.
    fn name(&self) -> &'static str;

    /// Starts taking the faults of a reserved range.
    ///
    /// # Errors
    /// The errno.
    fn enter(&self, range: Range) -> Result<(), i32>;

    /// Stops taking the faults of a range.
    fn leave(&self, range: Range);

    /// Installs a copy of `bytes` at the start of a page and lets the threads that wait there go
    /// on.
    ///
    /// # Errors
    /// The errno.
    fn install(&self, start: usize, bytes: &[u8]) -> Result<(), i32>;

    /// Makes a touch of the range raise SIGBUS, and lets the threads that wait there run into it.
    ///
    /// # Errors
    /// The errno; ENOTSUP where touches raise SIGBUS in any case.
    fn poison(&self, range: Range) -> Result<(), i32>;

    /// Removes the pages of ranges, or their poison.
    fn remove(&self, ranges: &[Range]);

    /// Lets the threads that wait in the kernel for a range try again.
    fn wake(&self, range: Range);

    /// Whether a faulting thread resolves its own fault, in a signal handler, rather than wait in
    /// the kernel for a handler thread.
    fn faults_are_signals(&self) -> bool;
}

/// Which pmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// userfaultfd with handler threads.
    Uffd,
    /// userfaultfd with SIGBUS: the faulting thread resolves its own fault.
    Inline,
}

/// One rung of the ladder, as found on this machine.
#[derive(Clone, Debug)]
pub struct Rung {
    /// The pmap's name.
    pub name: &'static str,
    /// Which, where this version has it.
    pub kind: Option<Kind>,
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
}

const REMEDY_FULL: &str = "sysctl -w vm.unprivileged_userfaultfd=1, or give the user access to /dev/userfaultfd \
     (chmod/setfacl; Linux 6.1), or run with CAP_SYS_PTRACE";
const REMEDY_SECCOMP: &str = "allow the userfaultfd system call in the container's seccomp profile";
const REMEDY_KERNEL: &str = "use Linux 6.6 or later (UFFDIO_POISON)";

/// The ladder, best first.
pub fn probe() -> Vec<Rung> {
    vec![probe_uffd(), probe_inline()]
}

fn probe_uffd() -> Rung {
    let (works, reason, remedy) = match Userfaultfd::features(Access::Full) {
        Ok(features) if features & FEATURE_POISON != 0 => {
            (true, "full-mode userfaultfd opens".to_string(), "")
        }
        Ok(_) => (false, "this kernel has no UFFDIO_POISON".to_string(), REMEDY_KERNEL),
        Err(errno) => (false, refusal("full-mode userfaultfd", errno), REMEDY_FULL),
    };
    Rung { name: "uffd", kind: Some(Kind::Uffd), works, reason, remedy, pointer: true, system_calls: true }
}

fn probe_inline() -> Rung {
    let (works, reason, remedy) = match Userfaultfd::features(Access::UserModeOnly) {
        Ok(features) if features & FEATURE_SIGBUS != 0 => {
            (true, "user-mode userfaultfd with SIGBUS opens".to_string(), "")
        }
        Ok(_) => (false, "this kernel has no UFFD_FEATURE_SIGBUS".to_string(), "use Linux 5.11 or later"),
        Err(errno) => (false, refusal("user-mode userfaultfd", errno), REMEDY_SECCOMP),
    };
    Rung {
        name: "inline",
        kind: Some(Kind::Inline),
        works,
        reason,
        remedy,
        pointer: true,
        system_calls: false,
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
    fn stop(&self);

    /// Closes, in the child of a fork, the descriptors that belong to the parent; this value is
    /// leaked afterwards.
    fn forget_in_child(&self);
}

/// Starts a pmap.
///
/// # Errors
/// The errno.
pub fn start(kind: Kind) -> Result<Arc<dyn RunningPmap>, i32> {
    Ok(match kind {
        Kind::Uffd => uffd::UffdPmap::start()?,
        Kind::Inline => Arc::new(inline::InlinePmap::start()?),
    })
}
