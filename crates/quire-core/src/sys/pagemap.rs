//! PAGEMAP_SCAN: which pages were written since they were last write-protected (Linux 6.7;
//! Documentation/admin-guide/mm/pagemap.rst).
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use super::memory::{Range, page_bytes};

const PAGEMAP_SCAN: u64 = 0xc060_6610; // _IOWR('f', 16, struct pm_scan_arg)
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const REGIONS: usize = 256;

/// The pages that a scan tells of, by the categories they are in.
struct Wanted {
    all_of: u64,
    /// Beside those one of these, if there are any.
    any_of: u64,
}

const WRITTEN: Wanted = Wanted { all_of: PAGE_IS_WRITTEN, any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED };
const PRESENT: Wanted = Wanted { all_of: PAGE_IS_PRESENT, any_of: 0 };

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// This process's page map.
pub struct Pagemap(File);

impl Pagemap {
    /// Opens it.
    ///
    /// # Errors
    /// The errno, where there is no /proc.
    pub fn open() -> Result<Self, i32> {
        let file = File::open("/proc/self/pagemap");
        file.map(Pagemap).map_err(|error| error.raw_os_error().unwrap_or(libc::ENOENT))
    }

    /// Whether there is one here that can be scanned, which is found out once.
    ///
    /// # Errors
    /// Why not, for a person.
    pub fn probe() -> Result<(), String> {
        static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
        if let Some(found) = FOUND.get() {
            return found.clone();
        }
        // This may be for want of descriptors, at this moment.
        let map = Self::open().map_err(|errno| {
            format!("/proc/self/pagemap cannot be opened ({})", super::errno_message(errno))
        })?;
        let any = Range { start: (&raw const FOUND).addr() / page_bytes() * page_bytes(), len: page_bytes() };
        FOUND.get_or_init(|| map.present(any, &mut |_| ()).map_err(unknown)).clone()
    }

    /// Tells `found` of the runs of pages in `range` that were written since they were protected,
    /// in order of address, and protects them again, each in one step with the look at it.
    ///
    /// # Errors
    /// The errno.
    pub fn take_written(&self, range: Range, found: &mut dyn FnMut(Range)) -> Result<(), i32> {
        self.scan(range, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, &WRITTEN, found)
    }

    /// As [`Pagemap::take_written`], but protects nothing.
    ///
    /// # Errors
    /// The errno.
    pub fn look_at_written(&self, range: Range, found: &mut dyn FnMut(Range)) -> Result<(), i32> {
        self.look(range, PM_SCAN_CHECK_WPASYNC, &WRITTEN, found)
    }

    /// Tells `found` of the runs of pages in `range` that have translations, in order of address.
    ///
    /// # Errors
    /// The errno.
    pub fn present(&self, range: Range, found: &mut dyn FnMut(Range)) -> Result<(), i32> {
        self.look(range, 0, &PRESENT, found)
    }

    /// A scan that changes nothing. The kernel may tell of a page twice then; `found` is told once.
    fn look(
        &self,
        range: Range,
        flags: u64,
        wanted: &Wanted,
        found: &mut dyn FnMut(Range),
    ) -> Result<(), i32> {
        let mut told = range.start;
        self.scan(range, flags, wanted, &mut |run| {
            let start = run.start.max(told);
            if start < run.end() {
                found(Range { start, len: run.end() - start });
                told = run.end();
            }
        })
    }

    fn scan(
        &self,
        range: Range,
        flags: u64,
        wanted: &Wanted,
        found: &mut dyn FnMut(Range),
    ) -> Result<(), i32> {
        let mut regions = [Region::default(); REGIONS];
        let (mut at, end) = (range.start as u64, (range.start + range.len) as u64);
        while at < end {
            let mut args = ScanArgs {
                size: size_of::<ScanArgs>() as u64,
                flags,
                start: at,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: wanted.all_of,
                category_anyof_mask: wanted.any_of,
                return_mask: wanted.all_of,
            };
            // SAFETY: the struct has the size it says, and the vector the length; both outlive the call.
            let got = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut args) };
            let got = usize::try_from(got).map_err(|_| super::errno())?;
            for region in &regions[..got] {
                found(Range { start: region.start as usize, len: (region.end - region.start) as usize });
            }
            at = args.walk_end.max(at + 1);
        }
        Ok(())
    }
}

fn unknown(errno: i32) -> String {
    let running = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let (running, said) = (running.trim(), super::errno_message(errno));
    format!("the kernel ({running}) has no PAGEMAP_SCAN, which came with Linux 6.7 ({said})")
}

impl AsRawFd for Pagemap {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}
