//! Signal handlers that live beside others' (sigaction(2)).
//!
//! SIGBUS and SIGSEGV: ours mends the fault if the address is quire's. If it is not, or the signal
//! was sent by somebody, the handler that stood before ours is called as the kernel would have
//! called it, with the kernel's own siginfo, and ours stays on top. Where none stood before, the
//! default action is put back and takes its course.
//!
//! A handler that gives up puts back what stood before itself and raises the signal again; Python's
//! `faulthandler` does so after it printed. When ours is what it puts back, the raised signal says
//! nothing of the fault that it stands for. Three cases:
//!
//! - we called that handler: the next one before it is called;
//! - it stands above ours, and a fault is behind: the signal is passed over, the instruction runs
//!   again and faults into ours. (`faulthandler` has then printed a false "Fatal Python error".)
//! - it stands above ours, and the signal was sent (kill(2)): it takes its course.
//!
//! A handler that is installed over ours and does not pass on what is not its own, or that puts back
//! what stood before *it* while ours is on top (`faulthandler.disable`, when it was enabled before
//! us), takes the faults away from us: [`keep_fault_handlers`] puts ours on top again.
//!
//! SIGINT: ours notes the interrupt and calls the handler that stood before.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::fork::ForkMutex;
use super::memory::{Touch, is_present};

/// Decides whether an address is quire's and, if so, mends the fault: `(signal, address, touch)`,
/// where the touch is known on x86-64 only.
pub type FaultHook = fn(i32, usize, Touch) -> bool;

type Action = libc::sigaction;
const SIGNALS: [i32; 2] = [libc::SIGBUS, libc::SIGSEGV];
const DEPTH_MAX: usize = 8;
/// Sent by raise(3), not by kill(2) (sigaction(2), si_code).
const SI_TKILL: i32 = -6;
/// So many faults in a row at one address, all given to one handler: it does not mend them.
const REPEATS_MAX: u32 = 100_000;

/// Handlers that stood before ours, for one signal; the last is tried first. A fixed array of
/// leaked boxes, so that the signal handler reads it without a lock; null is the default action.
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

    /// Adds the handler that ours takes the top from; one that is there already stays where it is.
    fn push(&self, action: Action) {
        if action.sa_sigaction == libc::SIG_DFL {
            return self.depth.store(0, Ordering::Release); // somebody took all others away
        }
        let depth = self.depth.load(Ordering::Acquire);
        if (0..depth).any(|level| self.get(level).is_some_and(|a| a.sa_sigaction == action.sa_sigaction)) {
            return;
        }
        let level = depth.min(DEPTH_MAX - 1);
        self.actions[level].store(Box::into_raw(Box::new(action)), Ordering::Release);
        self.depth.store(level + 1, Ordering::Release);
    }

    fn get(&self, level: usize) -> Option<Action> {
        let action = self.actions[level].load(Ordering::Acquire);
        // SAFETY: null, or a box that `push` leaked; they are never freed.
        (!action.is_null()).then(|| unsafe { *action })
    }
}

static BEFORE: [Before; 2] = [Before::new(), Before::new()];
static HOOK: AtomicUsize = AtomicUsize::new(0);
static INSTALL: ForkMutex<()> = ForkMutex::new(());

/// What a thread remembers of its last fault that was not quire's.
#[derive(Clone, Copy)]
struct Tried {
    address: usize,
    /// The handler it was given to.
    level: usize,
    repeats: u32,
}

thread_local! {
    /// Whether this thread has passed over a raised signal and not yet seen the fault behind it.
    static PASSED_OVER: Cell<bool> = const { Cell::new(false) };
    /// Address of the last fault that ours saw in this thread.
    static SEEN: Cell<usize> = const { Cell::new(0) };
    static TRIED: Cell<Option<Tried>> = const { Cell::new(None) };
    /// A handler before ours that is being called: its level, and where on the stack.
    static CALLING: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
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

/// Puts the fault handlers on top, for `hook`; does nothing where they are on top already. The
/// calling thread, and those it starts from now on, take the two signals: the kernel ends a process
/// whose thread faults while it blocks them, whatever handler there is.
pub fn install_fault_handlers(hook: FaultHook) {
    HOOK.store(hook as usize, Ordering::Release);
    keep_fault_handlers();
    // SAFETY: a set on this stack; changes the calling thread's mask only.
    unsafe {
        let mut faults: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut faults);
        SIGNALS.iter().for_each(|signal| {
            libc::sigaddset(&raw mut faults, *signal);
        });
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const faults, std::ptr::null_mut());
    }
}

/// Puts the fault handlers on top again where others have replaced them; does nothing before
/// [`install_fault_handlers`].
pub fn keep_fault_handlers() {
    let _one = INSTALL.lock();
    if HOOK.load(Ordering::Acquire) == 0 {
        return;
    }
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

/// Address of the last page fault of this thread that became a signal: the kernel keeps it and
/// shows it to every handler, also to that of a signal that was sent.
#[cfg(target_arch = "x86_64")]
fn last_fault(context: *mut libc::c_void) -> Option<usize> {
    const PAGE_FAULT: i64 = 14;
    // SAFETY: the kernel passes a ucontext_t to SA_SIGINFO handlers.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let is_page_fault = registers[libc::REG_TRAPNO as usize] == PAGE_FAULT;
    is_page_fault.then_some(registers[libc::REG_CR2 as usize] as usize)
}

#[cfg(target_arch = "aarch64")]
fn last_fault(context: *mut libc::c_void) -> Option<usize> {
    // SAFETY: the kernel passes a ucontext_t to SA_SIGINFO handlers.
    Some(unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.fault_address } as usize)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn last_fault(_context: *mut libc::c_void) -> Option<usize> {
    None // not known: as if there were no fault behind any raised signal
}

/// Whether a raised signal stands for a fault that will come again and may be ours, rather than for
/// a signal that was sent: there was a fault that ours has not seen, or its page is not there (any
/// more). What the kernel shows may be of the program that this process ran before execve(2), hence
/// the look whether anything is mapped there.
fn fault_behind(context: *mut libc::c_void) -> bool {
    last_fault(context)
        .is_some_and(|address| is_present(address).is_some_and(|present| !present || address != SEEN.get()))
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; errno is this thread's.
    let (code, sender, address, errno) = unsafe {
        let info = &*info;
        let sender = if info.si_code <= 0 { info.si_pid() } else { 0 };
        (info.si_code, sender, info.si_addr() as usize, *libc::__errno_location())
    };
    let raised = code == SI_TKILL && sender == std::process::id().cast_signed();
    let gave_up = PASSED_OVER.replace(false);
    if code > 0 {
        SEEN.set(address);
        let hook = HOOK.load(Ordering::Acquire);
        // SAFETY: only `install_fault_handlers` stores there, from a `FaultHook`, before ours is on.
        let hook: FaultHook = unsafe { std::mem::transmute::<usize, FaultHook>(hook) };
        if !hook(signal, address, touch_of(context)) {
            let depth = next_level(signal, address, gave_up);
            hand_down(signal, info, context, depth);
        }
    } else if raised && !gave_up && calling().is_none() && fault_behind(context) {
        PASSED_OVER.set(true); // by a handler above ours, or one that we called: the fault comes again
    } else {
        let tried = TRIED.get().filter(|tried| raised && last_fault(context) == Some(tried.address));
        hand_down(signal, info, context, tried.map_or(DEPTH_MAX, |tried| tried.level));
    }
    // SAFETY: this thread's errno; the interrupted code must find it unchanged.
    unsafe { *libc::__errno_location() = errno };
}

/// The level of a handler that is being called further up this thread's stack. One that jumped out
/// of its call (siglongjmp) has left a frame that is not there any more.
fn calling() -> Option<usize> {
    let here = 0u8;
    let deeper = |frame: &(usize, usize)| (&raw const here as usize) < frame.1;
    CALLING.get().filter(deeper).map(|frame| frame.0)
}

/// Below which level to look for a handler for a fault that is not quire's: all of them, but for
/// those that had this very fault and gave up, or have shown that they do not mend it.
fn next_level(signal: i32, address: usize, gave_up: bool) -> usize {
    let all = BEFORE[usize::from(signal == libc::SIGSEGV)].depth.load(Ordering::Acquire);
    let again = TRIED.get().filter(|tried| tried.address == address);
    let (depth, repeats) = match again {
        Some(tried) if gave_up || tried.repeats >= REPEATS_MAX => (tried.level, 0),
        Some(tried) => ((tried.level + 1).min(all), tried.repeats + 1),
        None => (all, 0),
    };
    TRIED.set(Some(Tried { address, level: depth.saturating_sub(1), repeats }));
    depth
}

/// Gives the signal to the next handler before ours that is below `depth` and not being called.
fn hand_down(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void, depth: usize) {
    let before = &BEFORE[usize::from(signal == libc::SIGSEGV)];
    // SAFETY: the kernel passes a valid siginfo.
    let sent = unsafe { (*info).si_code } <= 0;
    let depth = depth.min(calling().unwrap_or(DEPTH_MAX)).min(before.depth.load(Ordering::Acquire));
    let action = depth.checked_sub(1).and_then(|level| Some((level, before.get(level)?)));
    match action {
        Some((_, action)) if action.sa_sigaction == libc::SIG_IGN && sent => {}
        Some((level, action)) if action.sa_sigaction != libc::SIG_IGN => {
            if action.sa_flags & libc::SA_RESETHAND != 0 {
                before.actions[level].store(std::ptr::null_mut(), Ordering::Release);
            }
            let outer = CALLING.replace(Some((level, &raw const depth as usize)));
            call(&action, signal, info, context);
            CALLING.set(outer);
        }
        _ => take_default(signal, sent),
    }
}

/// The default action ends the process: at once for a signal that was sent, else when the
/// instruction faults again.
fn take_default(signal: i32, sent: bool) {
    // SAFETY: zero is a valid sigaction: SIG_DFL.
    set(signal, &unsafe { std::mem::zeroed() });
    if sent {
        // SAFETY: raise only queues a signal, delivered when our handler returns.
        unsafe {
            libc::raise(signal);
        }
    }
}

/// Calls another's handler under the signal mask that it asked for.
fn call(action: &Action, signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: sets on this stack; the handler's address is of the kind its flags name
    // (sigaction(2)), and it gets what the kernel gave us.
    unsafe {
        let mut outer: libc::sigset_t = std::mem::zeroed();
        let mut own: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const action.sa_mask, &raw mut outer);
        if action.sa_flags & libc::SA_NODEFER != 0
            && libc::sigismember(&raw const action.sa_mask, signal) == 0
        {
            libc::sigemptyset(&raw mut own);
            libc::sigaddset(&raw mut own, signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const own, std::ptr::null_mut());
        }
        if action.sa_flags & libc::SA_SIGINFO != 0 {
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute(action.sa_sigaction);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(i32) = std::mem::transmute(action.sa_sigaction);
            handler(signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const outer, std::ptr::null_mut());
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
    call(before, signal, info, context);
}
