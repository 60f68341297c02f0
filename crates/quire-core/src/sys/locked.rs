//! Memory for a secret: locked in RAM, left out of core dumps, zeroed when dropped (mlock(2),
//! madvise(2)); and a mark by which a process knows that it is not a forked child.
#![allow(unsafe_code)]

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};

use super::memory::{Range, advise, page_bytes, reserve, unmap};
use crate::errors::MapError;

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Stack that is overwritten after a secret was made on it.
const SCRUBBED_BYTES: usize = 16 << 10;

fn own_pages(len: usize) -> io::Result<Range> {
    reserve(len.max(1).next_multiple_of(page_bytes()), READ_WRITE).map_err(|error| match error {
        MapError::Sys { errno, .. } => io::Error::from_raw_os_error(errno),
        other => io::Error::other(other.to_string()),
    })
}

/// Pages that are unmapped on drop.
struct Pages(Range);

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: own mapping; the structs around it hand out no borrow that outlives them.
        unsafe { unmap(self.0) }
    }
}

/// A value on pages of its own that are never swapped out and never dumped. In the child of a fork it
/// stays readable, but it is locked again only by [`Locked::relock`]: locks are not inherited.
pub struct Locked<T> {
    pages: Pages,
    /// The value lies at the start of `pages`.
    value: std::marker::PhantomData<T>,
}

// SAFETY: `Locked` owns the value and gives out only shared references, as a `Box` would.
unsafe impl<T: Send> Send for Locked<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Locked<T> {}

impl<T> Locked<T> {
    /// Locks pages, then makes the value; the stack it was made on is overwritten.
    ///
    /// # Errors
    /// ENOMEM or EPERM when RLIMIT_MEMLOCK does not allow it, and what `make` says.
    pub fn new(make: impl FnOnce() -> io::Result<T>) -> io::Result<Self> {
        const { assert!(align_of::<T>() <= 4096, "a page is aligned for the value") };
        let pages = Pages(own_pages(size_of::<T>())?);
        lock(pages.0)?;
        // SAFETY: own range, no content is lost by this advice.
        unsafe { advise(pages.0, libc::MADV_DONTDUMP) }.map_err(io::Error::from_raw_os_error)?;
        let made = fill(pages.0, make);
        scrub_stack();
        made?;
        Ok(Locked { pages, value: std::marker::PhantomData })
    }

    /// Locks the pages again, in the child of a fork.
    ///
    /// # Errors
    /// As [`Locked::new`].
    pub fn relock(&self) -> io::Result<()> {
        lock(self.pages.0)
    }
}

/// In a frame of its own, which [`scrub_stack`] called next then covers.
#[inline(never)]
fn fill<T>(range: Range, make: impl FnOnce() -> io::Result<T>) -> io::Result<()> {
    let value = make()?;
    // SAFETY: own read-write pages, large and aligned enough, holding no value yet.
    unsafe { std::ptr::write(range.start as *mut T, value) }
    Ok(())
}

fn lock(range: Range) -> io::Result<()> {
    // SAFETY: own mapping; mlock changes no content.
    let rc = unsafe { libc::mlock(range.start as *const _, range.len) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Overwrites the stack below the caller, where the calls before may have left a secret.
#[inline(never)]
fn scrub_stack() {
    let mut stack = [0xA5u8; SCRUBBED_BYTES];
    std::hint::black_box(&mut stack);
}

impl<T> Deref for Locked<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` wrote a value here, which lives until the drop.
        unsafe { &*(self.pages.0.start as *const T) }
    }
}

impl<T> Drop for Locked<T> {
    fn drop(&mut self) {
        let Range { start, len } = self.pages.0;
        // SAFETY: the last use of the value; then plain volatile writes over own pages, which the
        // compiler may not leave out. `pages` unmaps them after this, which also unlocks them.
        unsafe {
            std::ptr::drop_in_place(start as *mut T);
            for word in 0..len / 8 {
                std::ptr::write_volatile((start as *mut u64).add(word), 0);
            }
        }
    }
}

/// Tells the process that made it from its forked children, without a system call: a page that the
/// kernel clears in a child (MADV_WIPEONFORK, Linux 4.14).
pub struct OwnerMark(Pages);

impl OwnerMark {
    /// Marks this process as the owner.
    ///
    /// # Errors
    /// ENOMEM; EINVAL from a kernel older than 4.14.
    pub fn new() -> io::Result<Self> {
        let pages = Pages(own_pages(1)?);
        // SAFETY: own fresh range.
        unsafe { advise(pages.0, libc::MADV_WIPEONFORK) }.map_err(io::Error::from_raw_os_error)?;
        let mark = OwnerMark(pages);
        mark.word().store(1, Ordering::Relaxed);
        Ok(mark)
    }

    /// Whether this process made the mark.
    pub fn is_owner(&self) -> bool {
        self.word().load(Ordering::Relaxed) == 1
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: an aligned word of own pages that are mapped while `self` lives; any bits are valid.
        unsafe { &*(self.0.0.start as *const AtomicU32) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The VmFlags of proc(5) of the mapping that holds `address`.
    fn flags_of(address: usize) -> String {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in text.lines() {
            let head = line.split(' ').next().unwrap();
            if let Some((from, to)) = head.split_once('-') {
                let number = |hex| usize::from_str_radix(hex, 16).unwrap_or(0);
                inside = (number(from)..number(to)).contains(&address);
            } else if inside && line.starts_with("VmFlags:") {
                return line.to_owned();
            }
        }
        panic!("{address:x} is not mapped")
    }

    #[test]
    fn a_secret_is_locked_and_not_dumped() {
        let secret = Locked::new(|| Ok([0x5Au8; 700])).unwrap();
        assert_eq!(*secret, [0x5A; 700]);
        let flags = flags_of(&raw const *secret as usize);
        assert!(flags.contains(" lo") && flags.contains(" dd"), "{flags}");
    }

    #[test]
    fn the_value_is_dropped_once_and_a_failure_passes_on() {
        let shared = std::sync::Arc::new(());
        let secret = Locked::new(|| Ok(std::sync::Arc::clone(&shared))).unwrap();
        assert_eq!(std::sync::Arc::strong_count(&secret), 2);
        drop(secret);
        assert_eq!(std::sync::Arc::strong_count(&shared), 1);
        let failed = Locked::<u8>::new(|| Err(io::Error::from_raw_os_error(libc::EIO)));
        assert_eq!(failed.err().and_then(|error| error.raw_os_error()), Some(libc::EIO));
    }

    #[test]
    fn a_child_does_not_own() {
        let mark = OwnerMark::new().unwrap();
        assert!(mark.is_owner());
        // SAFETY: the child calls nothing but `_exit`.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(i32::from(mark.is_owner())) }
        }
        let mut status = -1;
        // SAFETY: our own child; the status is written to a local.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        assert!(mark.is_owner());
    }
}
