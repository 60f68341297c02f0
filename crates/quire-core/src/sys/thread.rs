//! Threads of the core: they take no signals and can be placed on a CPU.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::thread::JoinHandle;

/// The CPUs this process may run on.
pub fn allowed_cpus() -> Vec<usize> {
    // SAFETY: the set is plain bits, zero is valid; the call writes at most its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set);
        set
    };
    let limit = usize::try_from(libc::CPU_SETSIZE).expect("a small constant");
    // SAFETY: `cpu` is below CPU_SETSIZE.
    let cpus: Vec<usize> = (0..limit).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) }).collect();
    if cpus.is_empty() { vec![0] } else { cpus }
}

/// Binds the calling thread to one CPU; a refusal leaves it unbound, which costs only speed.
pub fn bind_to_cpu(cpu: usize) {
    // SAFETY: a zeroed set is valid, `cpu` came from `allowed_cpus`.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// The calling thread's kernel id.
pub fn id() -> i32 {
    // SAFETY: no preconditions.
    unsafe { libc::gettid() }
}

thread_local! {
    static KEY: std::cell::Cell<u8> = const { std::cell::Cell::new(0) };
}

/// Tells the calling thread from all others that live, with no system call and in the child of a fork
/// as well: an address of its own. Never 0.
pub fn key() -> u64 {
    KEY.with(|key| std::ptr::from_ref(key).addr() as u64)
}

/// Nanoseconds of the monotonic clock.
pub fn now_ns() -> u64 {
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: the call fills the struct; CLOCK_MONOTONIC always exists.
    let time = unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, time.as_mut_ptr());
        time.assume_init()
    };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Map entries that must be free before a thread is started. It takes some for its stack, and some
/// when it first allocates (thread-local data, an arena of malloc); refused those, glibc ends the
/// process.
const MAP_ENTRIES_LEAST: usize = 32;

/// Starts a named thread with every signal blocked: signals are the program's, not ours. It has
/// allocated what it must have when this returns.
///
/// # Errors
/// When the system has no room for another thread.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    check_map_entries()?;
    let (started, is_started) = std::sync::mpsc::channel();
    let run = move || {
        key();
        let _ = started.send(()); // allocates
        drop(started);
        body();
    };
    let blocked = block_all_signals();
    let thread = std::thread::Builder::new().name(name.into()).stack_size(512 << 10).spawn(run);
    restore_signals(&blocked);
    if thread.is_ok() {
        let _ = is_started.recv();
    }
    thread
}

/// Takes map entries and gives them back: pages of alternating protection have one each.
fn check_map_entries() -> std::io::Result<()> {
    let page = super::memory::page_bytes();
    let len = MAP_ENTRIES_LEAST * page;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping of no access, which nothing else refers to and which goes again.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let odd = (0..MAP_ENTRIES_LEAST).filter(|index| index % 2 == 1);
        let split = |index: usize| libc::mprotect(start.byte_add(index * page), page, libc::PROT_READ) == 0;
        let error = (!odd.into_iter().all(split)).then(std::io::Error::last_os_error);
        libc::munmap(start, len);
        error.map_or(Ok(()), Err)
    }
}

fn block_all_signals() -> libc::sigset_t {
    // SAFETY: both sets are plain bits; pthread_sigmask reads one and writes the other.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    }
}

fn restore_signals(before: &libc::sigset_t) {
    // SAFETY: a set that pthread_sigmask filled.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut());
    }
}
