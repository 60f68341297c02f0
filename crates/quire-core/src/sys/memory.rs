//! Anonymous memory: reserve, protect, discard (mmap(2), madvise(2), process_madvise(2)).
#![allow(unsafe_code)]

use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::errors::MapError;
use crate::units::ByteCount;

/// Bytes of a hardware page, asked of the system.
pub fn page_bytes() -> usize {
    static PAGE: OnceLock<usize> = OnceLock::new();
    *PAGE.get_or_init(|| {
        // SAFETY: sysconf has no preconditions.
        let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(bytes).expect("the system has a page size")
    })
}

/// A range of this process's addresses; plain numbers, so that it can be copied and compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

impl Range {
    /// Whether `address` lies inside.
    pub fn contains(self, address: usize) -> bool {
        address.wrapping_sub(self.start) < self.len
    }

    /// The address after the last.
    pub fn end(self) -> usize {
        self.start + self.len
    }
}

/// What a thread was about to do when it faulted, where that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// Read.
    Read,
    /// Write.
    Write,
    /// One of the two: this machine's signals do not say.
    Unknown,
}

const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Reserves `len` bytes of private anonymous memory with protection `prot`.
///
/// # Errors
/// `MapError::Sys` when the system refuses (address space, RLIMIT_AS).
pub fn reserve(len: usize, prot: i32) -> Result<Range, MapError> {
    // SAFETY: a new mapping at an address the kernel chooses touches no existing memory.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, ANONYMOUS, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(match MapError::last("mmap") {
            MapError::Sys { call, errno: libc::ENOMEM, message } => {
                let counts = prot & libc::PROT_WRITE != 0; // else nothing is promised yet
                let promised = if counts { ", or, where vm.overcommit_memory is 2, set it to 0" } else { "" };
                let message = format!(
                    "{message}: {len} bytes of addresses are refused; map less, or raise RLIMIT_AS \
                     (ulimit -v){promised}"
                );
                MapError::Sys { call, errno: libc::ENOMEM, message }
            }
            error => error,
        });
    }
    Ok(Range { start: at as usize, len })
}

/// As [`reserve`], at an address that is a multiple of `align`, a power of two.
///
/// # Errors
/// As [`reserve`].
pub fn reserve_aligned(len: usize, align: usize, prot: i32) -> Result<Range, MapError> {
    let padded = len.checked_add(align).ok_or_else(|| MapError::Invalid(format!("{len} bytes")))?;
    let whole = reserve(padded, prot)?;
    let start = whole.start.next_multiple_of(align);
    let head = Range { start: whole.start, len: start - whole.start };
    let tail = Range { start: start + len, len: whole.len - head.len - len };
    for surplus in [head, tail] {
        if surplus.len > 0 {
            // SAFETY: ends of our own new mapping, which nothing refers to.
            unsafe { unmap(surplus) }
        }
    }
    Ok(Range { start, len })
}

/// Bytes of a huge page that the kernel makes of small ones (transparent huge pages).
pub const HUGE_BYTES: usize = 2 << 20;

/// Makes one huge page of a fully present, aligned range (Linux 6.1); a refusal changes nothing.
///
/// # Safety
/// The caller owns the range.
pub unsafe fn collapse(range: Range) {
    const MADV_COLLAPSE: i32 = 25;
    // SAFETY: own range (contract); the content stays the same.
    let _ = unsafe { advise(range, MADV_COLLAPSE) };
}

/// Whether the system makes huge pages for who asks for them.
pub fn has_huge_pages() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        setting.is_ok_and(|setting| !setting.contains("[never]"))
    })
}

/// Breaks up the huge page around a range that is a part of one: memory of its other parts is free as
/// soon as they are dropped. A refusal changes nothing.
///
/// # Safety
/// The caller owns the range.
pub unsafe fn split_huge(range: Range) {
    // Its effect on a part of a huge page is the point, that on the order of reclaim does no harm.
    // SAFETY: own range (contract); the content stays the same.
    let _ = unsafe { advise(range, libc::MADV_COLD) };
}

/// Maps fresh anonymous memory at exactly `range`, replacing what is there.
///
/// # Safety
/// The caller owns the addresses: nothing but its own, unused, mapping or a hole lies there.
///
/// # Errors
/// `MapError::Sys` when the system refuses.
pub unsafe fn reserve_at(range: Range, prot: i32) -> Result<(), MapError> {
    let flags = ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the caller owns the range (contract).
    let at = unsafe { libc::mmap(range.start as *mut _, range.len, prot, flags, -1, 0) };
    if at == libc::MAP_FAILED { Err(MapError::last("mmap")) } else { Ok(()) }
}

/// Maps the start of a memory file at exactly `range`, shared, inaccessible at first.
///
/// # Safety
/// As of [`reserve_at`].
///
/// # Errors
/// The errno.
pub unsafe fn map_file_at(range: Range, fd: RawFd) -> Result<(), i32> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the caller owns the range (contract).
    let at = unsafe { libc::mmap(range.start as *mut _, range.len, libc::PROT_NONE, flags, fd, 0) };
    if at == libc::MAP_FAILED { Err(super::errno()) } else { Ok(()) }
}

/// Makes every touch of a range raise SIGSEGV until it is shown: guard pages, which take no map entry
/// (Linux 6.13 for anonymous memory, 6.15 for files). Bytes of a file stay.
///
/// # Errors
/// The errno: EINVAL where the kernel has no such guard pages, or the memory is locked.
pub fn hide(range: Range) -> Result<(), i32> {
    const MADV_GUARD_INSTALL: i32 = 102; // linux/mman-common.h
    // SAFETY: takes nothing from memory that is shared with a file, and such is meant (callers).
    unsafe { advise(range, MADV_GUARD_INSTALL) }
}

/// Ends [`hide`].
///
/// # Errors
/// The errno.
pub fn show(range: Range) -> Result<(), i32> {
    const MADV_GUARD_REMOVE: i32 = 103;
    // SAFETY: only makes accessible what was there.
    unsafe { advise(range, MADV_GUARD_REMOVE) }
}

/// Whether the page of an address is in memory (mincore(2)); `None` where nothing is mapped.
pub fn is_present(address: usize) -> Option<bool> {
    let start = address / page_bytes() * page_bytes();
    let mut present = 0u8;
    // SAFETY: one byte for one page; an address that is not mapped is an error.
    let rc = unsafe { libc::mincore(start as *mut _, page_bytes(), &raw mut present) };
    (rc == 0).then_some(present & 1 != 0)
}

/// Where the map entry that holds an address begins (/proc/self/maps): one that grows down begins
/// before the address it was mapped at.
pub fn start_of_entry(address: usize) -> Option<usize> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let bounds = maps.lines().filter_map(|line| line.split_once(' ')?.0.split_once('-'));
    let number = |text: &str| usize::from_str_radix(text, 16).ok();
    bounds
        .filter_map(|(start, end)| Some((number(start)?, number(end)?)))
        .find(|(start, end)| (*start..*end).contains(&address))
        .map(|(start, _)| start)
}

/// Whether the kernel can read a byte at `address` on behalf of this thread; raises no signal. It
/// is asked to look up the path that begins there: EFAULT says that it cannot read it.
pub fn is_readable(address: usize) -> bool {
    // SAFETY: the kernel checks the address; that is the point.
    let rc = unsafe { libc::access(address as *const libc::c_char, libc::F_OK) };
    rc == 0 || super::errno() != libc::EFAULT
}

/// Unmaps.
///
/// # Safety
/// The caller owns the range and nothing refers to it any more.
pub unsafe fn unmap(range: Range) {
    // SAFETY: owned by the caller and unused (contract). A failure would mean a range that was
    // never mapped, for which there is nothing to undo.
    unsafe {
        libc::munmap(range.start as *mut _, range.len);
    }
}

/// Changes the protection of a range of the caller's.
///
/// # Errors
/// `MapError::Sys`: ENOMEM when the process has no map entry left (vm.max_map_count).
///
/// # Safety
/// The caller owns the range.
pub unsafe fn protect(range: Range, prot: i32) -> Result<(), MapError> {
    // SAFETY: owned by the caller (contract).
    let rc = unsafe { libc::mprotect(range.start as *mut _, range.len, prot) };
    if rc == 0 { Ok(()) } else { Err(MapError::last("mprotect")) }
}

/// madvise(2) on a range of the caller's.
///
/// # Errors
/// The errno.
///
/// # Safety
/// The caller owns the range, and losing its content (for advice that does) is meant.
pub unsafe fn advise(range: Range, advice: i32) -> Result<(), i32> {
    loop {
        // SAFETY: owned by the caller (contract).
        let rc = unsafe { libc::madvise(range.start as *mut _, range.len, advice) };
        if rc == 0 {
            return Ok(());
        }
        match super::errno() {
            libc::EAGAIN | libc::EINTR => {}
            errno => return Err(errno),
        }
    }
}

/// Drops the pages of several ranges at once: one TLB shoot-down for all where the kernel lets
/// a process advise itself (Linux 6.13), a loop elsewhere.
///
/// # Safety
/// The caller owns the ranges and means to lose their content.
pub unsafe fn discard(ranges: &[Range]) {
    /// 0: not tried, 1: works, -1: the kernel refuses.
    static BATCH: AtomicI32 = AtomicI32::new(0);
    const PIDFD_SELF_THREAD_GROUP: i32 = -10001; // linux/pidfd.h, Linux 6.14
    let ranges = joined(ranges);
    if ranges.len() > 1 && BATCH.load(Ordering::Relaxed) >= 0 {
        let total: usize = ranges.iter().map(|range| range.len).sum();
        // SAFETY: struct iovec and Range have different layouts, so the vector is built here and
        // outlives the call; the ranges are the caller's (contract).
        let done = unsafe {
            let vec: Vec<libc::iovec> =
                ranges.iter().map(|r| libc::iovec { iov_base: r.start as *mut _, iov_len: r.len }).collect();
            libc::syscall(
                libc::SYS_process_madvise,
                PIDFD_SELF_THREAD_GROUP,
                vec.as_ptr(),
                vec.len(),
                libc::MADV_DONTNEED,
                0,
            )
        };
        if usize::try_from(done) == Ok(total) {
            BATCH.store(1, Ordering::Relaxed);
            return;
        }
        if done < 0 && matches!(super::errno(), libc::EINVAL | libc::EPERM | libc::EBADF | libc::ENOSYS) {
            BATCH.store(-1, Ordering::Relaxed);
        }
    }
    for range in &ranges {
        // SAFETY: the caller's contract. DONTNEED on an own unlocked anonymous range fails only
        // for a range that is not mapped, which has no pages to drop.
        let _ = unsafe { advise(*range, libc::MADV_DONTNEED) };
    }
}

/// The same ranges, with those joined that follow each other without a gap.
fn joined(ranges: &[Range]) -> Vec<Range> {
    let mut joined: Vec<Range> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.start + last.len == range.start => last.len += range.len,
            _ => joined.push(*range),
        }
    }
    joined
}

/// A buffer of anonymous memory, returned to the system when dropped (a freed heap block may stay
/// with the allocator, which a budget could not see).
pub struct Buffer(Range);

impl Buffer {
    /// `len` zero bytes.
    ///
    /// # Errors
    /// As [`reserve`].
    pub fn new(len: ByteCount) -> Result<Self, MapError> {
        let bytes = len.as_usize().max(1).next_multiple_of(page_bytes());
        reserve(bytes, libc::PROT_READ | libc::PROT_WRITE).map(Buffer)
    }

    /// Bytes.
    pub fn capacity(&self) -> usize {
        self.0.len
    }

    /// The first `len` bytes.
    pub fn slice_mut(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.0.len, "a slice of a buffer lies inside it");
        // SAFETY: mapped read-write while `self` lives; exclusive by `&mut self`; in bounds.
        unsafe { std::slice::from_raw_parts_mut(self.0.start as *mut u8, len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: own range, no borrow outlives `self`.
        unsafe { unmap(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discard_drops_many_ranges() {
        let page = page_bytes();
        let range = reserve(8 * page, libc::PROT_READ | libc::PROT_WRITE).unwrap();
        // SAFETY: freshly reserved read-write memory of this test.
        let bytes = unsafe { std::slice::from_raw_parts_mut(range.start as *mut u8, range.len) };
        bytes.fill(7);
        let odd: Vec<Range> =
            (0..4).map(|i| Range { start: range.start + (2 * i + 1) * page, len: page }).collect();
        // SAFETY: own memory, losing its content is the point.
        unsafe { discard(&odd) };
        for index in 0..8 {
            let want = if index % 2 == 1 { 0 } else { 7 };
            assert!(bytes[index * page..][..page].iter().all(|b| *b == want), "page {index}");
        }
        // SAFETY: own memory, last use.
        unsafe { unmap(range) };
    }
}
