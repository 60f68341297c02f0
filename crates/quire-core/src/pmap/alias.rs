//! What the two pmaps share whose absent pages raise SIGSEGV: the bytes of a mapping lie in a
//! memory file (memfd_create(2)) of its own, mapped once, shared, over the mapping's range.
//!
//! A page is filled by a write to the file, never through the addresses, so that no thread sees it
//! half-filled; it is shown by lifting what makes its addresses fault. It is removed the other way
//! round: first its addresses fault again, then a hole is punched in the file, which frees it.
//!
//! One descriptor for each mapping, closed with it. In the child of a fork the mapping is gone
//! (MADV_DONTFORK), and the descriptor is closed: the child gets a memory file of its own.
//!
//! Where a protection of its own shows a granule, it may cost the process two map entries (itself
//! and what follows it) of `vm.max_map_count`. [`Granules`] counts these granules, and refuses
//! with ENOMEM what would make them take more than half of all map entries. It is the number of
//! granules that is kept low, not that of entries, as evicting a granule always lowers the one but
//! raises the other when its neighbours stay: who is refused evicts, and the next try succeeds.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::errors::MapError;
use crate::sys::lock::Mutex;
use crate::sys::memory::{self, Range};
use crate::sys::{process, swap_file};

/// The protection of a page that is there and whose writes are noticed.
pub const READ: i32 = libc::PROT_READ;
/// The protection of a page that may be written.
pub const OPEN: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// `vm.max_map_count` where it cannot be read: the kernel's default.
const MAP_COUNT_DEFAULT: usize = 65530;
/// Granules with a protection of their own at most, as a part of `vm.max_map_count`.
const MAP_COUNT_SHARE: usize = 4;

/// How many granules with a protection of their own the process may have.
pub fn granules_max() -> usize {
    static MAX: OnceLock<usize> = OnceLock::new();
    *MAX.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/vm/max_map_count");
        let count = text.ok().and_then(|text| text.trim().parse().ok());
        (count.unwrap_or(MAP_COUNT_DEFAULT) / MAP_COUNT_SHARE).max(1)
    })
}

/// Those of all mappings.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// The granules of a mapping that have a protection of their own, by start address.
pub struct Granules {
    starts: Mutex<BTreeSet<usize>>,
    all: &'static AtomicUsize,
    max: usize,
}

/// None yet; all mappings share what there is.
impl Default for Granules {
    fn default() -> Self {
        Granules::within(&TAKEN, granules_max())
    }
}

impl Granules {
    fn within(all: &'static AtomicUsize, max: usize) -> Self {
        Granules { starts: Mutex::new(BTreeSet::new()), all, max }
    }

    /// Adds one that the caller owns; nothing changes where it is known already.
    ///
    /// # Errors
    /// ENOMEM when there are too many.
    pub fn take(&self, start: usize) -> Result<(), i32> {
        let mut starts = self.starts.lock();
        if starts.contains(&start) {
            return Ok(());
        }
        self.all
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |taken| {
                (taken < self.max).then_some(taken + 1)
            })
            .map_err(|_| libc::ENOMEM)?;
        starts.insert(start);
        Ok(())
    }

    /// Forgets those that begin in `range`.
    pub fn give(&self, range: Range) {
        let mut starts = self.starts.lock();
        let given: Vec<usize> = starts.range(range.start..range.start + range.len).copied().collect();
        given.iter().for_each(|start| {
            starts.remove(start);
        });
        self.all.fetch_sub(given.len(), Ordering::AcqRel);
    }

    /// Whether any begins in `range`.
    pub fn any_in(&self, range: Range) -> bool {
        self.starts.lock().range(range.start..range.start + range.len).next().is_some()
    }
}

impl Drop for Granules {
    fn drop(&mut self) {
        self.all.fetch_sub(self.starts.lock().len(), Ordering::AcqRel);
    }
}

/// A mapping's memory file.
pub struct Alias {
    file: File,
    entered: OnceLock<Entered>,
}

/// What is known of the mapping.
#[derive(Clone, Copy, Debug)]
pub struct Entered {
    /// Its addresses.
    pub range: Range,
    /// Whether it may be written.
    pub writable: bool,
}

impl Alias {
    /// An empty memory file.
    ///
    /// # Errors
    /// The errno: EMFILE, ENFILE, or ENOSYS where there is no memfd_create.
    pub fn new() -> Result<Self, i32> {
        let file = process::shared_memory("quire", 0).map_err(|error| errno_of(&error))?;
        Ok(Alias { file: file.into(), entered: OnceLock::new() })
    }

    /// Maps the file over a reserved range, inaccessible; called once.
    ///
    /// # Errors
    /// The errno: ENOMEM, or EFBIG where files may not be so long (RLIMIT_FSIZE).
    pub fn enter(&self, range: Range, writable: bool) -> Result<(), i32> {
        self.file.set_len(range.len as u64).map_err(|error| errno_of(&error))?;
        // SAFETY: a reserved range of ours that is empty, and then the new mapping in its place.
        unsafe {
            memory::map_file_at(range, self.file.as_raw_fd())?;
            memory::advise(range, libc::MADV_DONTFORK)?;
            let _ = memory::advise(range, libc::MADV_NOHUGEPAGE); // refused where there are none
        }
        self.entered.set(Entered { range, writable }).map_err(|_| libc::EEXIST)
    }

    /// The mapping.
    pub fn entered(&self) -> Entered {
        *self.entered.get().expect("a range is entered before a page of it is used")
    }

    /// Fills a page that no thread can see.
    ///
    /// # Errors
    /// The errno; ENOMEM where memory is used up.
    pub fn fill(&self, start: usize, bytes: &[u8]) -> Result<(), i32> {
        self.file.write_all_at(bytes, self.offset(start)).map_err(|error| match errno_of(&error) {
            libc::ENOSPC => libc::ENOMEM, // what a memory file says when memory is accounted for strictly
            errno => errno,
        })
    }

    /// Frees pages whose addresses fault.
    pub fn free(&self, range: Range) {
        // Fails only for a range outside of the file, or when the kernel has no memory to note a
        // part of a huge page: then the page goes when it is filled anew or with the file.
        let _ = swap_file::punch_hole(&self.file, self.offset(range.start), range.len as u64);
    }

    /// Changes the protection of a part of the mapping.
    ///
    /// # Errors
    /// The errno: ENOMEM when the process has no map entry left.
    pub fn protect(&self, range: Range, prot: i32) -> Result<(), i32> {
        // SAFETY: a part of our own mapping; only its protection changes.
        unsafe { memory::protect(range, prot) }.map_err(|error| match error {
            MapError::Sys { errno, .. } => errno,
            _ => libc::EINVAL,
        })
    }

    fn offset(&self, start: usize) -> u64 {
        (start - self.entered().range.start) as u64
    }

    /// Closes the parent's file in the child of a fork, where nothing is mapped any more.
    pub fn forget_in_child(&self) {
        process::close_inherited(self.file.as_raw_fd());
        TAKEN.store(0, Ordering::Release);
    }
}

fn errno_of(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Joins ranges that lie side by side, in order of address.
pub fn joined(ranges: &[Range]) -> Vec<Range> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match joined.last_mut() {
            Some(last) if last.start + last.len == range.start => last.len += range.len,
            _ => joined.push(range),
        }
    }
    joined
}

/// Tries a pmap on a scratch page: it must hide, show and hide it again.
///
/// # Errors
/// The errno, and which step it was that failed.
pub fn try_out(pmap: &dyn super::Pmap) -> Result<(), (i32, &'static str)> {
    let page = memory::page_bytes();
    let range = memory::reserve(page, libc::PROT_NONE).map_err(|_| (libc::ENOMEM, "mmap"))?;
    let steps = || {
        pmap.enter(range, true).map_err(|errno| (errno, "mapping a memory file"))?;
        let zeros = vec![0; page];
        pmap.install(range.start, &zeros, true).map_err(|errno| (errno, "showing a page"))?;
        let shown = memory::is_readable(range.start);
        pmap.remove(&[range]);
        let hidden = !memory::is_readable(range.start);
        if shown && hidden { Ok(()) } else { Err((libc::ENOTSUP, "hiding a page")) }
    };
    let tried = steps();
    pmap.leave(range);
    // SAFETY: reserved above; nothing refers to it.
    unsafe { memory::unmap(range) };
    tried
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_are_counted_over_all_mappings() {
        static ALL: AtomicUsize = AtomicUsize::new(0);
        let (one, other) = (Granules::within(&ALL, 3), Granules::within(&ALL, 3));
        assert_eq!([one.take(0), one.take(10), other.take(0), one.take(10)], [Ok(()); 4]);
        assert_eq!(other.take(20), Err(libc::ENOMEM));
        let ten = Range { start: 5, len: 10 };
        assert!(one.any_in(ten) && !other.any_in(ten));
        one.give(ten);
        assert!(!one.any_in(ten));
        assert_eq!(other.take(20), Ok(()));
        drop(other);
        assert_eq!(ALL.load(Ordering::Relaxed), 1);
        assert!(granules_max() > 0);
    }

    fn map_entries(range: Range) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let starts = maps.lines().map(|line| usize::from_str_radix(line.split('-').next().unwrap(), 16));
        starts.filter(|start| range.contains(*start.as_ref().unwrap())).count()
    }

    /// Shows and hides pages of a writable mapping, each by its own content.
    fn shows_and_hides(pmap: &dyn super::super::Pmap) {
        let page = memory::page_bytes();
        let range = memory::reserve(16 * page, libc::PROT_NONE).unwrap();
        let at = |index: usize| Range { start: range.start + index * page, len: page };
        pmap.enter(range, true).unwrap();
        for index in [3, 4, 5, 9] {
            pmap.install(at(index).start, &vec![index as u8 + 1; page], true).unwrap();
        }
        for index in 0..16 {
            assert_eq!(memory::is_readable(at(index).start), [3, 4, 5, 9].contains(&index), "{index}");
        }
        let byte = |index: usize| {
            // SAFETY: a byte of a page that is there.
            unsafe { *(at(index).start as *const u8).add(page - 1) }
        };
        assert_eq!([3, 4, 5, 9].map(byte), [4, 5, 6, 10]);
        pmap.protect(at(4), false).unwrap();
        // SAFETY: a page of ours that is open to writes.
        unsafe { *(at(4).start as *mut u8).add(page - 1) = 77 };
        pmap.protect(at(4), true).unwrap();
        assert_eq!([3, 4, 5].map(byte), [4, 77, 6]);
        pmap.protect(at(5), false).unwrap();
        pmap.remove(&[at(9), at(4), at(5), at(3)]);
        for index in 0..16 {
            assert!(!memory::is_readable(at(index).start), "{index}");
        }
        assert_eq!(map_entries(range), 1, "neighbours of equal protection are one again");
        pmap.install(at(4).start, &vec![5; page], false).unwrap();
        // SAFETY: as above.
        unsafe { *(at(4).start as *mut u8) = 1 };
        assert_eq!(byte(4), 5, "what was written before the removal is gone");
        pmap.leave(range);
        // SAFETY: reserved above; nothing refers to it.
        unsafe { memory::unmap(range) };
    }

    #[test]
    fn mprotect_shows_and_hides() {
        shows_and_hides(&super::super::mprotect::MprotectPmap::start().unwrap());
    }

    #[test]
    fn guard_shows_and_hides_where_the_kernel_can() {
        let rung = super::super::probe().into_iter().find(|rung| rung.kind.name() == "guard").unwrap();
        if rung.works {
            shows_and_hides(&super::super::guard::GuardPmap::start().unwrap());
        } else {
            assert!(!rung.remedy.is_empty());
        }
    }

    #[test]
    fn neighbours_are_joined() {
        let at = |start, len| Range { start, len };
        assert_eq!(joined(&[at(8, 4), at(0, 4), at(4, 4), at(16, 4)]), [at(0, 12), at(16, 4)]);
    }
}
