//! Signal handlers that live beside others' (sigaction(2)).
//!
//! SIGBUS and SIGSEGV: ours looks first whether the address is quire's. If it is not, the handler
//! that stood before ours is put back and the faulting instruction runs again, so that the other
//! handler sees the kernel's own siginfo. Python's `faulthandler`, when it was enabled after us,
//! prints, puts *us* back and raises the signal with `raise`: such a signal carries no address, so
//! it (but none that was sent by kill(2)) is passed over once, and the instruction runs again and faults into ours.
//!
//! SIGINT: ours notes the interrupt and calls the handler that stood before.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::fork::ForkMutex;
use super::memory::Touch;

/// Decides whether an address is quire's and, if so, mends the fault: `(signal, address, touch)`,
/// where the touch is known on x86-64 only.
pub type FaultHook = fn(i32, usize, Touch) -> bool;

type Action = libc::sigaction;
const SIGNALS: [i32; 2] = [libc::SIGBUS, libc::SIGSEGV];
const DEPTH_MAX: usize = 8;
/// Sent by raise(3), not by kill(2) (sigaction(2), si_code).
const SI_TKILL: i32 = -6;

/// Handlers that stood before ours, for one signal; the last is tried first. A fixed array of
/// leaked boxes, so that the signal handler reads it without a lock.
struct Before {
    actions: [AtomicPtr<Action>; DEPTH_MAX],
    depth: AtomicUsize,
}

impl Before {
    const fn new() -> Self {
        Before {
            actions: [const { AtomicPtr::new(std::ptr::null_mut()) }; DEPTH_MAX],
            depth: AtomicUsize::new(0),
        }
    }

    fn push(&self, action: Action) {
        let depth = self.depth.load(Ordering::Acquire).min(DEPTH_MAX - 1);
        self.actions[depth].store(Box::into_raw(Box::new(action)), Ordering::Release);
        self.depth.store(depth + 1, Ordering::Release);
    }

    fn pop(&self) -> Option<Action> {
        let depth = self.depth.load(Ordering::Acquire).checked_sub(1)?;
        self.depth.store(depth, Ordering::Release);
        let action = self.actions[depth].load(Ordering::Acquire);
        // SAFETY: slots below `depth` hold boxes that `push` leaked; they are never freed.
        (!action.is_null()).then(|| unsafe { *action })
    }
}

static BEFORE: [Before; 2] = [Before::new(), Before::new()];
static HOOK: AtomicUsize = AtomicUsize::new(0);
static INSTALL: ForkMutex<()> = ForkMutex::new(());

thread_local! {
    /// Whether this thread has passed over a raised signal and not yet seen the fault behind it.
    static PASSED_OVER: Cell<bool> = const { Cell::new(false) };
}

fn current(signal: i32) -> Action {
    // SAFETY: a null new action only queries; the struct is plain data.
    unsafe {
        let mut action: Action = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action);
        action
    }
}

fn set(signal: i32, action: &Action) {
    // SAFETY: the action was filled by sigaction or by `own_action`.
    unsafe {
        libc::sigaction(signal, action, std::ptr::null_mut());
    }
}

fn own_action(handler: usize) -> Action {
    // SAFETY: zero is a valid sigaction; the mask stays empty so that SIGINT can end a wait.
    let mut action: Action = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = libc::SA_SIGINFO;
    action
}

/// Forgets the lock in the child of a fork.
///
/// # Safety
/// Only in the child of a fork while it has one thread.
pub unsafe fn reset_in_child() {
    // SAFETY: one thread (contract).
    unsafe { INSTALL.replace_in_child(()) }
}

/// Puts the fault handlers on top, for `hook`; does nothing where they are on top already.
pub fn install_fault_handlers(hook: FaultHook) {
    let _one = INSTALL.lock();
    HOOK.store(hook as usize, Ordering::Release);
    for (signal, before) in SIGNALS.iter().zip(&BEFORE) {
        let top = current(*signal);
        let own = on_fault as *const () as usize;
        if top.sa_sigaction != own {
            before.push(top);
            set(*signal, &own_action(own));
        }
    }
}

/// Whether the fault was a write: bit 1 of the page-fault error code.
#[cfg(target_arch = "x86_64")]
fn touch_of(context: *mut libc::c_void) -> Touch {
    // SAFETY: the kernel passes a ucontext_t to SA_SIGINFO handlers.
    let code = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_ERR as usize] };
    if code & 2 != 0 { Touch::Write } else { Touch::Read }
}

#[cfg(not(target_arch = "x86_64"))]
fn touch_of(_context: *mut libc::c_void) -> Touch {
    Touch::Unknown
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; errno is this thread's.
    let (code, sender, address, errno) = unsafe {
        let info = &*info;
        let sender = if info.si_code <= 0 { info.si_pid() } else { 0 };
        (info.si_code, sender, info.si_addr() as usize, *libc::__errno_location())
    };
    if code > 0 {
        PASSED_OVER.with(|passed| passed.set(false));
        let hook = HOOK.load(Ordering::Acquire);
        // SAFETY: only `install_fault_handlers` stores there, from a `FaultHook`, before ours is on.
        let hook: FaultHook = unsafe { std::mem::transmute::<usize, FaultHook>(hook) };
        if !hook(signal, address, touch_of(context)) {
            give_way(signal, false);
        }
    } else if code == SI_TKILL
        && sender == std::process::id().cast_signed()
        && !PASSED_OVER.with(|passed| passed.replace(true))
    {
        // Raised by a handler that stood above ours: the fault itself comes again.
    } else {
        give_way(signal, true);
    }
    // SAFETY: this thread's errno; the interrupted code must find it unchanged.
    unsafe { *libc::__errno_location() = errno };
}

/// Hands the signal to whoever stood before: the instruction faults again into that handler, or,
/// for a signal that was sent, it is sent again.
fn give_way(signal: i32, sent: bool) {
    let before = &BEFORE[usize::from(signal == libc::SIGSEGV)];
    // SAFETY: zero is a valid sigaction: SIG_DFL.
    let action = before.pop().unwrap_or_else(|| unsafe { std::mem::zeroed() });
    set(signal, &action);
    if sent {
        // SAFETY: raise only queues a signal, delivered when our handler returns.
        unsafe {
            libc::raise(signal);
        }
    }
}

static INTERRUPT_BEFORE: AtomicPtr<Action> = AtomicPtr::new(std::ptr::null_mut());
static INTERRUPT_HOOK: AtomicUsize = AtomicUsize::new(0);

/// Puts a SIGINT handler on top that calls `note` and then the handler before it. Where SIGINT is
/// ignored or at its default nothing is installed: there is nobody to be told.
pub fn watch_interrupt(note: fn()) {
    let own = on_interrupt as *const () as usize;
    if current(libc::SIGINT).sa_sigaction == own {
        return;
    }
    let _one = INSTALL.lock();
    let top = current(libc::SIGINT);
    if top.sa_sigaction == own || top.sa_sigaction == libc::SIG_DFL || top.sa_sigaction == libc::SIG_IGN {
        return;
    }
    INTERRUPT_HOOK.store(note as usize, Ordering::Release);
    // Never freed: a handler may be running on another thread.
    INTERRUPT_BEFORE.store(Box::into_raw(Box::new(top)), Ordering::Release);
    let mut action = own_action(own);
    action.sa_flags |= top.sa_flags & libc::SA_ONSTACK;
    set(libc::SIGINT, &action);
}

/// Puts the SIGINT handler before ours back, if ours is still on top.
pub fn unwatch_interrupt() {
    let _one = INSTALL.lock();
    let before = INTERRUPT_BEFORE.load(Ordering::Acquire);
    if !before.is_null() && current(libc::SIGINT).sa_sigaction == on_interrupt as *const () as usize {
        // SAFETY: a leaked box of `watch_interrupt`.
        set(libc::SIGINT, unsafe { &*before });
    }
}

extern "C" fn on_interrupt(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: set before this handler was installed, from a `fn()`.
    let note: fn() = unsafe { std::mem::transmute(INTERRUPT_HOOK.load(Ordering::Acquire)) };
    note();
    // SAFETY: a leaked box of `watch_interrupt`, neither SIG_DFL nor SIG_IGN.
    let before = unsafe { &*INTERRUPT_BEFORE.load(Ordering::Acquire) };
    // SAFETY: the address of a handler of the kind its flags name (sigaction(2)).
    unsafe {
        if before.sa_flags & libc::SA_SIGINFO != 0 {
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute(before.sa_sigaction);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(i32) = std::mem::transmute(before.sa_sigaction);
            handler(signal);
        }
    }
}
