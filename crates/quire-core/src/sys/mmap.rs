//! The mmap(2) family, as thin as it can be: mmap, mremap, mprotect, msync, madvise, mincore, mlock2,
//! mbind, mseal and the names of map entries (prctl PR_SET_VMA). Every call keeps its errno.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::RawFd;

use super::errno;
use super::memory::Range;

const SYS_MSEAL: libc::c_long = 462; // the same number on all architectures (Linux 6.10)
/// MAP_32BIT of mmap(2), which is x86's.
#[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
pub const MAP_32BIT: i32 = libc::MAP_32BIT;
/// MAP_32BIT of mmap(2), which is x86's: no flag here.
#[cfg(not(any(target_arch = "x86_64", target_arch = "x86")))]
pub const MAP_32BIT: i32 = 0;
const MPOL_MF_STRICT: libc::c_ulong = 1;
const MPOL_MF_MOVE: libc::c_ulong = 2;

/// What mmap(2) is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Where, 0 for anywhere; a hint, unless the flags say more.
    pub address: usize,
    /// Bytes.
    pub len: usize,
    /// PROT_ bits.
    pub prot: i32,
    /// MAP_ bits.
    pub flags: i32,
    /// The file, -1 for none.
    pub fd: RawFd,
    /// Where in the file; a multiple of the page.
    pub offset: i64,
}

fn checked(rc: i32) -> Result<(), i32> {
    if rc == 0 { Ok(()) } else { Err(errno()) }
}

/// mmap(2).
///
/// # Safety
/// With MAP_FIXED nothing at the addresses is in use.
///
/// # Errors
/// The errno.
pub unsafe fn map(request: &Request) -> Result<Range, i32> {
    let Request { address, len, prot, flags, fd, offset } = *request;
    // SAFETY: without MAP_FIXED nothing existing is touched; with it the caller answers (contract).
    let at = unsafe { libc::mmap(address as *mut _, len, prot, flags, fd, offset) };
    if at == libc::MAP_FAILED { Err(errno()) } else { Ok(Range { start: at as usize, len }) }
}

/// munmap(2).
///
/// # Safety
/// The caller owns the range and nothing refers to it any more.
///
/// # Errors
/// The errno: ENOMEM at vm.max_map_count, EPERM when it is sealed.
pub unsafe fn unmap(range: Range) -> Result<(), i32> {
    // SAFETY: the caller's (contract).
    checked(unsafe { libc::munmap(range.start as *mut _, range.len) })
}

/// Changes the length of a range where it is, or elsewhere if it `may_move` (mremap(2)).
///
/// # Safety
/// The caller owns the range; nothing refers to what goes, or to any of it if it may move.
///
/// # Errors
/// The errno: ENOMEM when there is no room.
pub unsafe fn resize(range: Range, len: usize, may_move: bool) -> Result<Range, i32> {
    let flags = if may_move { libc::MREMAP_MAYMOVE } else { 0 };
    // SAFETY: the caller's (contract).
    let at = unsafe { libc::mremap(range.start as *mut _, range.len, len, flags) };
    if at == libc::MAP_FAILED { Err(errno()) } else { Ok(Range { start: at as usize, len }) }
}

/// Shows the shared memory that begins at an address at `to` as well (mremap(2) of no bytes).
///
/// # Safety
/// The caller owns what lies at `to`, which is given up; `from` is shared memory.
///
/// # Errors
/// The errno: ENOMEM at vm.max_map_count.
pub unsafe fn show_again(from: usize, to: Range) -> Result<(), i32> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the caller's (contract).
    let at = unsafe { libc::mremap(from as *mut _, 0, to.len, flags, to.start) };
    if at == libc::MAP_FAILED { Err(errno()) } else { Ok(()) }
}

/// Moves a range over what lies at `to`, in one step, with all that belongs to it: protection,
/// advice, pages of its own.
///
/// # Safety
/// The caller owns both; what lies at `to` is given up.
///
/// # Errors
/// The errno: ENOMEM at vm.max_map_count, EPERM when it is sealed.
pub unsafe fn move_over(range: Range, to: usize) -> Result<(), i32> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the caller's (contract).
    let at = unsafe { libc::mremap(range.start as *mut _, range.len, range.len, flags, to) };
    if at == libc::MAP_FAILED { Err(errno()) } else { Ok(()) }
}

/// As [`move_over`], and leaves the map entry behind, without pages, where the kernel can (Linux 5.13,
/// not for huge pages and devices): else others may map what they like there until it is covered.
///
/// # Safety
/// As of [`move_over`].
///
/// # Errors
/// As [`move_over`].
pub unsafe fn move_away(range: Range, to: usize) -> Result<(), i32> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    // SAFETY: the caller's (contract).
    let at = unsafe { libc::mremap(range.start as *mut _, range.len, range.len, flags, to) };
    match if at == libc::MAP_FAILED { errno() } else { 0 } {
        0 => Ok(()),
        // SAFETY: as above.
        libc::EINVAL => unsafe { move_over(range, to) },
        errno => Err(errno),
    }
}

/// Shows the first bytes of shared memory at `to` as well.
///
/// # Safety
/// As of [`move_over`].
///
/// # Errors
/// As [`move_over`].
pub unsafe fn duplicate(range: Range, len: usize, to: usize) -> Result<(), i32> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the caller's (contract); an old size of 0 leaves the memory where it is too.
    let at = unsafe { libc::mremap(range.start as *mut _, 0, len, flags, to) };
    if at == libc::MAP_FAILED { Err(errno()) } else { Ok(()) }
}

/// mprotect(2).
///
/// # Safety
/// The caller owns the range.
///
/// # Errors
/// The errno.
pub unsafe fn protect(range: Range, prot: i32) -> Result<(), i32> {
    // SAFETY: the caller's (contract).
    checked(unsafe { libc::mprotect(range.start as *mut _, range.len, prot) })
}

/// msync(2): it never changes what memory holds.
///
/// # Errors
/// The errno: EBUSY for MS_INVALIDATE of locked pages, EIO, ENOMEM for a hole.
pub fn sync(range: Range, flags: i32) -> Result<(), i32> {
    // SAFETY: writes pages back; the kernel checks the range.
    checked(unsafe { libc::msync(range.start as *mut _, range.len, flags) })
}

/// madvise(2), once: the errno is the caller's to judge.
///
/// # Safety
/// The caller owns the range, and what the advice does to its content is meant.
///
/// # Errors
/// The errno.
pub unsafe fn advise(range: Range, advice: i32) -> Result<(), i32> {
    // SAFETY: the caller's (contract).
    checked(unsafe { libc::madvise(range.start as *mut _, range.len, advice) })
}

/// mincore(2): a byte for each page, bit 0 set where it is in memory (for a file: in the page cache).
///
/// # Errors
/// The errno: ENOMEM for a hole.
pub fn resident(range: Range) -> Result<Vec<u8>, i32> {
    let mut pages = vec![0u8; range.len.div_ceil(super::memory::page_bytes())];
    // SAFETY: as many bytes as pages.
    checked(unsafe { libc::mincore(range.start as *mut _, range.len, pages.as_mut_ptr()) })?;
    pages.iter_mut().for_each(|page| *page &= 1);
    Ok(pages)
}

/// mlock2(2): with `on_fault` pages are locked when they come, else all come now.
///
/// # Errors
/// The errno: EPERM where RLIMIT_MEMLOCK is 0, ENOMEM above it or for what cannot be had, EAGAIN.
pub fn lock(range: Range, on_fault: bool) -> Result<(), i32> {
    let flags = if on_fault { libc::MLOCK_ONFAULT } else { 0 };
    // SAFETY: makes pages come and stay; the kernel checks the range.
    checked(unsafe { libc::mlock2(range.start as *const _, range.len, flags as _) })
}

/// munlock(2).
///
/// # Errors
/// The errno.
pub fn unlock(range: Range) -> Result<(), i32> {
    // SAFETY: changes no content.
    checked(unsafe { libc::munlock(range.start as *const _, range.len) })
}

/// mbind(2): the NUMA nodes (a bit each, at most 64) that pages come from; `moves` those that are there.
///
/// # Errors
/// The errno: EINVAL for a node that is not there, EIO where pages could not be moved.
pub fn bind(range: Range, policy: i32, nodes: u64, moves: bool) -> Result<(), i32> {
    let flags = if moves { MPOL_MF_MOVE | MPOL_MF_STRICT } else { 0 };
    // SAFETY: one word of nodes that outlives the call, and its length in bits (plus one, as the
    // kernel counts).
    let rc = unsafe {
        libc::syscall(libc::SYS_mbind, range.start, range.len, policy, &raw const nodes, 65usize, flags)
    };
    if rc == 0 { Ok(()) } else { Err(errno()) }
}

/// mseal(2): from now on nothing changes the map entries of the range, not even munmap.
///
/// # Errors
/// The errno: ENOSYS before Linux 6.10.
pub fn seal(range: Range) -> Result<(), i32> {
    // SAFETY: only refuses what might come later.
    let rc = unsafe { libc::syscall(SYS_MSEAL, range.start, range.len, 0usize) };
    if rc == 0 { Ok(()) } else { Err(errno()) }
}

/// Names the anonymous memory of a range in /proc/self/maps; `None` takes the name away.
///
/// # Errors
/// The errno: EINVAL for a name of more than 79 bytes or with a byte of `[]\$` or not printable,
/// EBADF for memory of a file, ENOSYS or EINVAL without CONFIG_ANON_VMA_NAME.
pub fn name(range: Range, name: Option<&CStr>) -> Result<(), i32> {
    let text = name.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: a NUL-terminated string that outlives the call, or none.
    checked(unsafe {
        libc::prctl(libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME, range.start, range.len, text as usize)
    })
}

/// Copies bytes at `address` as far as the kernel can read them (process_vm_readv(2) of this very
/// process); raises no signal. Returns how many.
pub fn peek(address: usize, into: &mut [u8]) -> usize {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: address as *mut _, iov_len: into.len() };
    // SAFETY: the kernel checks the remote side; the local one is the slice.
    let got = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(got).unwrap_or(0)
}
