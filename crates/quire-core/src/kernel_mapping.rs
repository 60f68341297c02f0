//! A mapping by pmap `kernel`: what the interpreter's side holds of a [`Region`] in the space.
//!
//! Calls that use the range and change none of it (sync, advice, copies) are counted as its users;
//! what changes it (resize, split, unmap) waits until there are none.
#![allow(unsafe_code)]

mod bare;
mod copies;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::counters::{RETIRED, add};
use crate::errors::{FaultCode, MapError, StoreError};
use crate::interrupt::PageError;
use crate::kernel_daemon;
use crate::pmap::kernel::write_back::Stored;
use crate::pmap::kernel::{self, Answer, Ask, Question, Region, Wishes, arena};
use crate::runtime;
use crate::space::SPACE;
use crate::sys::backing::Opened;
use crate::sys::memory::{Range, page_bytes};
use crate::sys::pagemap::Pagemap;
use crate::sys::{futex, mmap, signal};
use crate::units::ByteOffset;

pub use copies::take_failure;

const GONE: usize = usize::MAX;
/// What to do instead of a budget that the kernel's pmap cannot keep.
const ELSE: &str =
    ": open it with pmap \"uffd\", \"inline\", \"guard\" or \"mprotect\" (quire.open, quire.anonymous)";
thread_local! {
    /// This thread takes the signals of faults.
    static READY: Cell<bool> = const { Cell::new(false) };
}
const LOOK: Duration = Duration::from_millis(20);

/// What can be mapped.
pub enum Source<'a> {
    /// A file or device by its path; `true` to write to it.
    Path(&'a Path, bool),
    /// A descriptor, which stays the caller's.
    Descriptor(i32),
    /// The file that is asked for, which is open.
    Opened,
    /// Memory of no file.
    Anonymous,
}

/// A range of the space; unmapped on drop.
pub struct KernelMapping {
    /// Where it begins in the space; [`GONE`] when it is unmapped.
    start: AtomicUsize,
    /// Pages that could not be had.
    errors: Arc<AtomicU64>,
    wishes: Arc<Wishes>,
    source: Arc<str>,
}

/// What a call sees of a region while it uses it.
pub struct InUse {
    /// The pages.
    pub range: Range,
    /// Address of the first byte that was asked for.
    pub address: usize,
    /// Bytes that were asked for.
    pub size: u64,
    /// PROT_ bits.
    pub prot: i32,
    users: Arc<AtomicU32>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        if self.users.fetch_sub(1, Ordering::AcqRel) == 1 {
            futex::wake_all(&self.users);
        }
    }
}

fn closed() -> MapError {
    MapError::Invalid("the mapping is closed".into())
}

impl KernelMapping {
    /// Maps `size` bytes of a source, all from the offset on when absent.
    ///
    /// # Errors
    /// `Sys` with the call that was refused, `Invalid`.
    pub fn map(from: &Source<'_>, size: Option<u64>, ask: Ask) -> Result<Self, MapError> {
        let ask = Self::opened(from, size, ask)?;
        if ask.flags & libc::MAP_FIXED == 0 {
            return Region::map(ask).map(Self::enter);
        }
        // What another mapping of quire shows is not to be lost: nobody enters one meanwhile.
        let end = ask.address.saturating_add(Region::extent_of(&ask)?.held);
        let (paged, mut regions) = SPACE.claim(ask.address..end);
        let before =
            |region: &Region| region.range.start < end && ask.address < region.range.start + region.reserved;
        if paged.is_none() || regions.values().any(before) {
            let message = "another mapping of quire is there".into();
            return Err(MapError::Sys { call: "mmap", errno: libc::EEXIST, message });
        }
        let mapping = Region::map(ask).map(|region| Self::enter_in(&mut regions, region))?;
        drop(regions);
        mapping.expose(); // its address is known
        Ok(mapping)
    }

    /// What is asked for, opened; this thread takes the signals of its faults.
    pub(crate) fn opened(from: &Source<'_>, size: Option<u64>, mut ask: Ask) -> Result<Ask, MapError> {
        let opened = match *from {
            Source::Path(path, writable) => Some(Opened::path(path, writable)),
            Source::Descriptor(fd) => Some(Opened::descriptor(fd)),
            Source::Opened => ask.opened.take().map(Ok),
            Source::Anonymous => None,
        };
        ask.opened = opened.transpose().map_err(|error| kernel::sys_io("open", &error))?;
        ask.size = match (size, &ask.opened) {
            (Some(size), _) => size,
            (None, Some(opened)) => length_of(opened, ask.offset)?,
            (None, None) => return Err(MapError::Invalid("anonymous memory needs a size".into())),
        };
        Self::be_ready();
        Ok(ask)
    }

    /// Makes the process and this thread ready for faults, once.
    pub(crate) fn be_ready() {
        if !READY.replace(true) {
            runtime::once_per_process();
        }
    }

    /// Somebody may touch it from now on: so the handlers of faults are on top, and what is touched by chance
    /// brings in no more than that. Only here, as many a mapping is closed without ever being touched.
    pub fn expose(&self) {
        if !self.wishes.exposed.swap(true, Ordering::AcqRel) {
            Self::be_ready();
            signal::keep_fault_handlers();
            self.look(kernel_daemon::hush);
            self.look(kernel_daemon::notice);
        }
    }

    /// Where it begins in the space.
    pub(crate) fn start(&self) -> usize {
        self.start.load(Ordering::Acquire)
    }

    pub(crate) fn enter(region: Region) -> Self {
        Self::enter_in(&mut SPACE.kernel_mut(), region)
    }

    pub(crate) fn enter_in(regions: &mut BTreeMap<usize, Region>, region: Region) -> Self {
        let start = AtomicUsize::new(region.range.start);
        let mapping = KernelMapping {
            start,
            errors: Arc::clone(&region.errors),
            wishes: Arc::clone(&region.wishes),
            source: Arc::clone(&region.source),
        };
        regions.insert(region.range.start, region);
        mapping
    }

    /// Name of what is mapped.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Pages that could not be had, of what is placed in it too.
    pub fn errors(&self) -> u64 {
        let regions = SPACE.kernel();
        let Some(region) = regions.get(&self.start()) else { return self.errors.load(Ordering::Relaxed) };
        let within = regions.range(self.start()..region.range.start + region.reserved);
        within.map(|(_, region)| region.errors.load(Ordering::Relaxed)).sum()
    }

    /// What it wishes of the daemon, and what came of it.
    pub fn wishes(&self) -> &Wishes {
        &self.wishes
    }

    /// Bounds the pages of a file that are resident, in the page cache too if it `drops`.
    ///
    /// # Errors
    /// `Invalid` where pages have no other home than memory, or are not counted; `Pmap` where the kernel does
    /// not tell which are resident.
    pub fn set_budget(&self, budget: u64, drops: bool) -> Result<(), MapError> {
        if budget != u64::MAX {
            Pagemap::probe()
                .map_err(|why| MapError::Pmap(format!("no budget can be kept here: {why}{ELSE}")))?;
        }
        let set = |region: &Region| {
            if budget != u64::MAX {
                region.can_be_bounded().map_err(|why| MapError::Invalid(format!("{why}{ELSE}")))?;
            }
            region.wishes.drops.store(drops, Ordering::Relaxed);
            region.wishes.budget.store(budget, Ordering::Relaxed);
            kernel_daemon::hush(region);
            kernel_daemon::notice(region);
            Ok(())
        };
        self.expose(); // its pages come by calls too
        let _used = self.in_use()?;
        self.look(set).ok_or_else(closed)??;
        if self.wishes.is_leashed() {
            self.look(Stored::of).ok_or_else(closed)?.drop_all(); // else it comes back 16 pages at a touch
        }
        Ok(())
    }

    /// Looks at the region; `None` when it is unmapped.
    pub fn look<T>(&self, look: impl FnOnce(&Region) -> T) -> Option<T> {
        SPACE.kernel().get(&self.start.load(Ordering::Acquire)).map(look)
    }

    /// Uses the region: it is not changed before the guard is dropped.
    ///
    /// # Errors
    /// `Invalid` when it is unmapped.
    pub fn in_use(&self) -> Result<InUse, MapError> {
        let used = self.look(|region| {
            region.users.fetch_add(1, Ordering::AcqRel);
            InUse {
                range: region.range,
                address: region.range.start + region.slack,
                size: region.size,
                prot: region.prot,
                users: Arc::clone(&region.users),
            }
        });
        used.ok_or_else(closed)
    }

    /// Changes the region while nobody uses it.
    fn change<T>(&self, change: impl FnOnce(&mut Region) -> Result<T, MapError>) -> Result<T, MapError> {
        let mut change = Some(change);
        loop {
            let users = {
                let mut regions = SPACE.kernel_mut();
                let region = regions.get_mut(&self.start.load(Ordering::Acquire)).ok_or_else(closed)?;
                if region.users.load(Ordering::Acquire) == 0 {
                    let changed = change.take().map(|change| change(&mut *region));
                    let (before, now) = (self.start.load(Ordering::Acquire), region.range.start);
                    if before != now
                        && let Some(moved) = regions.remove(&before)
                    {
                        regions.insert(now, moved);
                        self.start.store(now, Ordering::Release);
                    }
                    return changed.unwrap_or_else(|| Err(closed()));
                }
                Arc::clone(&region.users)
            };
            wait_idle(&users);
        }
    }

    /// What is wrong now, with it or what is placed in it; what has healed is forgotten.
    pub fn failure(&self) -> Option<PageError> {
        let mut answer: Option<Answer> = None;
        loop {
            match self.failure_now(answer.take().as_ref()) {
                Ok(failure) => return failure,
                Err(question) => answer = Some(question.ask()),
            }
        }
    }

    fn failure_now(&self, answer: Option<&Answer>) -> Result<Option<PageError>, Question> {
        let mut regions = SPACE.kernel_mut();
        let start = self.start();
        let Some(reserved) = regions.get(&start).map(|region| region.reserved) else { return Ok(None) };
        for (_, region) in regions.range_mut(start..start + reserved) {
            if let Some(failure) = region.failure(answer)?.or_else(|| region.unwritten()) {
                return Ok(Some(failure));
            }
        }
        Ok(None)
    }

    /// msync(2) of the pages around some bytes.
    ///
    /// # Errors
    /// The errno as a store error.
    pub fn sync(&self, offset: u64, len: u64, flags: i32) -> Result<(), StoreError> {
        let used = self.in_use().map_err(|_| not_here(offset))?;
        match self.look(|region| (Stored::of(region), region.around(offset, len))) {
            Some((stored, range)) if range.len > 0 => {
                let synced = Self::with_bare(&used, range, || stored.sync(range, flags))?;
                synced.map_or_else(|| stored.sync_file(flags), Ok)
            }
            _ => Ok(()),
        }
    }

    fn around(&self, offset: u64, len: u64) -> Range {
        self.look(|region| region.around(offset, len)).unwrap_or(Range { start: 0, len: 0 })
    }

    /// madvise(2) on the pages around some bytes, or those `inside` of them.
    ///
    /// # Errors
    /// `Sys`.
    pub fn advise(&self, offset: u64, len: u64, advice: i32, inside: bool) -> Result<(), MapError> {
        let used = self.in_use()?;
        let range = if inside {
            self.look(|region| region.inside(offset, len)).ok_or_else(closed)?
        } else {
            self.around(offset, len)
        };
        if range.len == 0 {
            return Ok(());
        }
        if matches!(advice, libc::MADV_NORMAL | libc::MADV_RANDOM | libc::MADV_SEQUENTIAL) {
            self.wishes.advised.store(advice, Ordering::Relaxed);
        }
        // SAFETY: pages of the region, which is in use; what the advice does is meant.
        Self::ask_kernel(&used, range, "madvise", || unsafe { mmap::advise(range, advice) })
    }

    /// Locks pages in memory (mlock2(2)), or ends it.
    ///
    /// # Errors
    /// `Sys`.
    pub fn lock(&self, offset: u64, len: u64, on_fault: bool) -> Result<(), MapError> {
        let used = self.in_use()?;
        let range = self.around(offset, len);
        Self::ask_kernel(&used, range, "mlock", || mmap::lock(range, on_fault))?;
        change_locks(&used, |region| region.note_locked(range));
        Ok(())
    }

    /// Ends [`KernelMapping::lock`].
    ///
    /// # Errors
    /// `Sys`.
    pub fn unlock(&self, offset: u64, len: u64) -> Result<(), MapError> {
        let used = self.in_use()?;
        let range = self.around(offset, len);
        Self::ask_kernel(&used, range, "munlock", || mmap::unlock(range))?;
        change_locks(&used, |region| region.note_unlocked(range));
        Ok(())
    }

    /// Keeps pages in memory until [`KernelMapping::unpin`]; pins may overlap.
    ///
    /// # Errors
    /// `Sys`.
    pub fn pin(&self, span: std::ops::Range<u64>) -> Result<(), MapError> {
        let mut pins = self.wishes.pins.lock();
        self.lock(span.start, span.end - span.start, false)?;
        pins.push(span);
        Ok(())
    }

    /// Ends one pin of these bytes.
    pub fn unpin(&self, span: std::ops::Range<u64>) {
        let mut pins = self.wishes.pins.lock();
        if let Some(index) = pins.iter().position(|pin| *pin == span) {
            pins.swap_remove(index);
            let _ = self.unlock(span.start, span.end - span.start);
            // What other pins share with it.
            pins.iter().for_each(|pin| {
                let _ = self.lock(pin.start, pin.end - pin.start, false);
            });
        }
    }

    /// Takes the pages wholly inside of some bytes out of memory (MADV_PAGEOUT), but for pinned ones.
    ///
    /// # Errors
    /// `Sys`.
    pub fn evict(&self, span: std::ops::Range<u64>) -> Result<(), MapError> {
        let mut pins = self.wishes.pins.lock();
        pins.sort_by_key(|pin| pin.start);
        let mut at = span.start;
        let past = span.end..span.end;
        for pin in pins.iter().filter(|pin| pin.start < span.end).chain([&past]) {
            if at < pin.start {
                self.advise(at, pin.start - at, libc::MADV_PAGEOUT, true)?;
            }
            at = at.max(pin.end);
        }
        Ok(())
    }

    /// NUMA placement (mbind(2)).
    ///
    /// # Errors
    /// `Sys`.
    pub fn bind(&self, policy: i32, nodes: u64, moves: bool) -> Result<(), MapError> {
        let used = self.in_use()?;
        Self::ask_kernel(&used, used.range, "mbind", || mmap::bind(used.range, policy, nodes, moves))
    }

    /// Names its memory in /proc/self/maps.
    ///
    /// # Errors
    /// `Sys`.
    pub fn name(&self, name: Option<&CStr>) -> Result<(), MapError> {
        let used = self.in_use()?;
        Self::ask_kernel(&used, used.range, "prctl", || mmap::name(used.range, name))
    }

    /// A byte for each page: 1 in memory, 0 not.
    ///
    /// # Errors
    /// `Sys`.
    pub fn resident(&self) -> Result<Vec<u8>, MapError> {
        let used = self.in_use()?;
        mmap::resident(used.range).map_err(|errno| MapError::sys("mincore", errno))
    }

    /// Bytes of pages that this process has translations for.
    pub fn present_bytes(&self) -> u64 {
        let Ok(used) = self.in_use() else { return 0 };
        let mut sum = 0;
        let scanned =
            Pagemap::open().and_then(|map| map.present(used.range, &mut |run| sum += run.len as u64));
        if scanned.is_err() {
            let pages = mmap::resident(used.range).unwrap_or_default();
            sum = pages.iter().map(|page| u64::from(*page)).sum::<u64>() * page_bytes() as u64;
        }
        sum
    }

    /// mprotect(2) of the pages around some bytes.
    ///
    /// # Errors
    /// `Sys`.
    pub fn protect(&self, offset: u64, len: u64, prot: i32) -> Result<(), MapError> {
        self.change(|region| region.protect(offset, len, prot))
    }

    /// Closes its descriptor of the source.
    ///
    /// # Errors
    /// `Invalid` when it is unmapped.
    pub fn drop_descriptor(&self) -> Result<(), MapError> {
        self.change(|region| {
            region.backing = region.backing.as_ref().map(|backing| Arc::new(backing.unopened()));
            Ok(())
        })
    }

    /// See [`Region::resize`].
    ///
    /// # Errors
    /// As there.
    pub fn resize(&self, size: u64, views: bool) -> Result<bool, MapError> {
        self.change(|region| region.resize(size, views))
    }

    /// See [`Region::unmap_part`].
    ///
    /// # Errors
    /// As there.
    pub fn unmap_part(&self, offset: u64, len: u64) -> Result<(), MapError> {
        self.change(|region| region.unmap_part(offset, len))
    }

    /// See [`Region::seal`].
    ///
    /// # Errors
    /// As there.
    pub fn seal(&self) -> Result<(), MapError> {
        self.change(Region::seal)
    }

    /// Keeps what comes before a byte; the rest is the mapping that is returned.
    ///
    /// # Errors
    /// As [`Region::split`].
    pub fn split(&self, at: u64) -> Result<KernelMapping, MapError> {
        self.change(|region| region.split(at)).map(Self::enter)
    }

    /// Unmaps. The caller has made sure that nothing refers to the addresses any more.
    pub fn unmap(&self) {
        let start = self.start.swap(GONE, Ordering::AcqRel);
        while let Some(users) = Self::unmap_idle(start) {
            wait_idle(&users);
        }
    }

    /// Takes a region out of the space and unmaps it; who uses it, if anyone does.
    fn unmap_idle(start: usize) -> Option<Arc<AtomicU32>> {
        let mut regions = SPACE.kernel_mut();
        let region = regions.get_mut(&start)?;
        if region.users.load(Ordering::Acquire) > 0 {
            return Some(Arc::clone(&region.users));
        }
        let errors = region.errors.load(Ordering::Relaxed);
        if errors > 0 {
            add(&RETIRED.lock().get_or_insert_default().errors, errors);
        }
        if let Some(region) = arena::take(&mut regions, start) {
            drop(regions);
            region.unmap();
        }
        None
    }
}

impl Drop for KernelMapping {
    fn drop(&mut self) {
        self.unmap();
    }
}

fn change_locks(used: &InUse, change: impl FnOnce(&mut Region)) {
    if let Some(region) = SPACE.kernel_mut().get_mut(&used.range.start) {
        change(region);
    }
}

fn wait_idle(users: &AtomicU32) {
    let seen = users.load(Ordering::Acquire);
    if seen > 0 {
        futex::wait(users, seen, LOOK);
    }
}

fn not_here(offset: u64) -> StoreError {
    StoreError::new(FaultCode::Closed, ByteOffset(offset), "the mapping is closed: map the source again")
}

/// The bytes from an offset to the end: of a file by its length, of a block device as it says.
fn length_of(opened: &Opened, offset: u64) -> Result<u64, MapError> {
    let len = if opened.status.is_file() {
        opened.status.size
    } else if opened.status.is_block_device() {
        crate::sys::backing::block_device_len(&opened.file)
            .map_err(|error| kernel::sys_io("ioctl BLKGETSIZE64", &error))?
    } else {
        return Err(MapError::Invalid("this device does not say how long it is: give size".into()));
    };
    len.checked_sub(offset).ok_or_else(|| {
        MapError::Invalid(format!("offset {offset} lies beyond the end of the source, which has {len} bytes"))
    })
}
