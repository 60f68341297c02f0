//! Tests of the swap as a whole, over a file in memory that fails as it is told and over a real one.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::sys::lock::Mutex;

const PAGE: usize = 4096;
const ALL: [(Compression, bool); 6] = [
    (Compression::None, false),
    (Compression::None, true),
    (Compression::Lz4, false),
    (Compression::Lz4, true),
    (Compression::Zstd, false),
    (Compression::Zstd, true),
];

/// What the file does, call by call, in place of what is asked.
#[derive(Default)]
struct Plan {
    /// Errnos of the next writes and reads; 0 lets one through.
    writes: Vec<i32>,
    reads: Vec<i32>,
    punch: Option<i32>,
    /// Bytes that one call moves at most.
    at_most: Option<usize>,
    punched: Vec<(u64, u64)>,
}

#[derive(Default)]
struct Disk {
    bytes: Mutex<Vec<u8>>,
    plan: Mutex<Plan>,
}

struct MemoryFile(Arc<Disk>);

fn next(errnos: &mut Vec<i32>) -> io::Result<()> {
    let errno = if errnos.is_empty() { 0 } else { errnos.remove(0) };
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
}

impl SwapFile for MemoryFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let mut plan = self.0.plan.lock();
        next(&mut plan.writes)?;
        let len = bytes.len().min(plan.at_most.unwrap_or(usize::MAX));
        let mut disk = self.0.bytes.lock();
        let (from, to) = (offset as usize, offset as usize + len);
        if disk.len() < to {
            disk.resize(to, 0);
        }
        disk[from..to].copy_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut plan = self.0.plan.lock();
        next(&mut plan.reads)?;
        let disk = self.0.bytes.lock();
        let there = disk.get(offset as usize..).unwrap_or(&[]);
        let len = buf.len().min(there.len()).min(plan.at_most.unwrap_or(usize::MAX));
        buf[..len].copy_from_slice(&there[..len]);
        Ok(len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut plan = self.0.plan.lock();
        plan.punched.push((offset, len));
        if let Some(errno) = plan.punch {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut disk = self.0.bytes.lock();
        let end = disk.len();
        disk[(offset as usize).min(end)..((offset + len) as usize).min(end)].fill(0);
        Ok(())
    }
}

fn options(limit: u64, (compression, encrypt): (Compression, bool)) -> SwapOptions {
    SwapOptions { folder: None, limit: ByteCount(limit), compression, encrypt }
}

fn in_memory(limit: u64, codec: (Compression, bool)) -> (Arc<Disk>, Swap) {
    let disk = Arc::new(Disk::default());
    let file = Box::new(MemoryFile(Arc::clone(&disk)));
    let swap = Swap::with_file(file, "/the/folder".into(), &options(limit, codec)).unwrap();
    (disk, swap)
}

/// Bytes that no codec makes smaller.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len.div_ceil(8))
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes()
        })
        .take(len)
        .collect()
}

/// Bytes that compress well.
fn numbers(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64 / 8).flat_map(|i| (i / 5 + seed).to_le_bytes()).collect()
}

/// Half of each.
fn mixed(len: usize, seed: u64) -> Vec<u8> {
    [numbers(len / 2, seed), noise(len - len / 2, seed)].concat()
}

fn get(swap: &Swap, slot: SwapSlot, len: usize) -> Result<Vec<u8>, StoreError> {
    let mut buf = vec![0xA5; len];
    swap.get(slot, &mut buf).map(|()| buf)
}

/// From one page to 2 MiB, of each kind in turn; a slot is read after the next has been put.
fn every_length_comes_back(codec: (Compression, bool)) {
    let (_disk, swap) = in_memory(64 << 20, codec);
    let mut last: Option<(SwapSlot, Vec<u8>)> = None;
    for pages in 1..=512 {
        let make = [noise, numbers, mixed][pages % 3];
        let page = make(pages * PAGE, pages as u64);
        let slot = swap.put(&page).unwrap();
        let header = u64::from(codec.1);
        match (codec.0, pages % 3) {
            (Compression::None, _) | (_, 0) => assert_eq!(slot.blocks(), pages as u64 + header),
            (_, 1) if pages > 1 => assert!(slot.blocks() <= pages as u64 / 2 + 1, "{codec:?} {pages}"),
            _ => assert!(slot.blocks() <= pages as u64 + header),
        }
        if let Some((slot, page)) = last.replace((slot, page)) {
            assert!(get(&swap, slot, page.len()).unwrap() == page, "{codec:?} {}", page.len());
            swap.free(slot);
        }
    }
    swap.free(last.unwrap().0);
    assert_eq!(swap.used(), ByteCount(0));
}

#[test]
fn every_length_comes_back_plain() {
    every_length_comes_back((Compression::None, false));
}

#[test]
fn every_length_comes_back_encrypted() {
    every_length_comes_back((Compression::None, true));
}

#[test]
fn every_length_comes_back_from_lz4() {
    every_length_comes_back((Compression::Lz4, false));
    every_length_comes_back((Compression::Lz4, true));
}

#[test]
fn every_length_comes_back_from_zstd() {
    every_length_comes_back((Compression::Zstd, false));
    every_length_comes_back((Compression::Zstd, true));
}

#[test]
fn lengths_that_are_no_pages_come_back_and_huge_ones_are_refused() {
    for codec in ALL {
        let (_disk, swap) = in_memory(64 << 20, codec);
        for len in [1, 7, 4095, 4097, 65_535, PAGE_BYTES_MAX] {
            let page = noise(len, 5);
            let slot = swap.put(&page).unwrap();
            assert!(get(&swap, slot, len).unwrap() == page, "{codec:?} {len}");
            swap.free(slot);
        }
        let error = swap.put(&noise(PAGE_BYTES_MAX + 1, 5)).unwrap_err();
        assert_eq!((error.code, error.errno), (FaultCode::Io, Some(libc::EFBIG)));
    }
}

#[test]
fn zeros_take_no_space_and_no_io() {
    for codec in ALL {
        let (disk, swap) = in_memory(0, codec);
        let slot = swap.put(&[0; 64 << 10]).unwrap();
        assert_eq!((slot, swap.used()), (SwapSlot::ZERO, ByteCount(0)));
        assert_eq!(get(&swap, slot, 64 << 10).unwrap(), [0; 64 << 10]);
        swap.free(slot);
        assert!(disk.bytes.lock().is_empty());
        let mut page = vec![0; 64 << 10];
        page[65_535] = 1;
        assert_eq!(swap.put(&page).unwrap_err().code, FaultCode::SwapFull, "its last byte counts");
    }
}

#[test]
fn the_limit_holds_and_can_be_moved() {
    for codec in ALL {
        let (_disk, swap) = in_memory(40 * BLOCK_BYTES, codec);
        let page = noise(16 * PAGE, 3);
        let slots: Vec<SwapSlot> = (0..2).map(|_| swap.put(&page).unwrap()).collect();
        let used = swap.used();
        assert_eq!(used.0, 2 * BLOCK_BYTES * if codec.1 { 17 } else { 16 });
        let error = swap.put(&page).unwrap_err();
        assert_eq!((error.code, error.errno), (FaultCode::SwapFull, Some(libc::ENOSPC)));
        for part in [used.to_string(), (40 * BLOCK_BYTES).to_string(), "/the/folder".into(), "larger".into()]
        {
            assert!(error.message.contains(&part), "{}", error.message);
        }
        assert!(!error.code.is_transient());
        assert_eq!(FaultCode::from_number(11), Some(error.code));
        assert_eq!(swap.used(), used);
        swap.free(slots[0]);
        let third = swap.put(&page).unwrap();
        assert!(get(&swap, third, page.len()).unwrap() == page);
        [slots[1], third].into_iter().for_each(|slot| swap.free(slot));
        assert_eq!(swap.used(), ByteCount(0));
    }
}

#[test]
fn short_transfers_go_on_and_interrupted_ones_are_tried_again() {
    for codec in ALL {
        let (disk, swap) = in_memory(1 << 20, codec);
        *disk.plan.lock() = Plan {
            writes: vec![libc::EINTR, 0, libc::EINTR, libc::EINTR],
            reads: vec![0, libc::EINTR],
            at_most: Some(1000),
            ..Plan::default()
        };
        let page = mixed(16 * PAGE, 1);
        let slot = swap.put(&page).unwrap();
        assert!(get(&swap, slot, page.len()).unwrap() == page);
        let plan = disk.plan.lock();
        assert!(plan.writes.is_empty() && plan.reads.is_empty(), "the plan was carried out");
    }
}

#[test]
fn an_error_of_the_disk_passes_on_and_nothing_is_kept() {
    for codec in ALL {
        let (disk, swap) = in_memory(1 << 20, codec);
        let page = noise(16 * PAGE, 1);
        let old = swap.put(&page).unwrap();
        let used = swap.used();
        disk.plan.lock().writes = vec![0, libc::EIO];
        disk.plan.lock().at_most = Some(4 * PAGE);
        let error = swap.put(&page).unwrap_err();
        assert_eq!((error.code, error.errno), (FaultCode::Io, Some(libc::EIO)));
        assert_eq!(error.offset.0, used.0 + 4 * PAGE as u64, "where it failed");
        assert!(error.message.contains("swap in /the/folder"), "{}", error.message);
        assert_eq!(swap.used(), used);
        disk.plan.lock().reads = vec![libc::EIO];
        let error = get(&swap, old, page.len()).unwrap_err();
        assert_eq!((error.code, error.errno, error.offset), (FaultCode::Io, Some(libc::EIO), ByteOffset(0)));
        assert!(get(&swap, old, page.len()).unwrap() == page, "the next read succeeds");
        let again = swap.put(&page).unwrap();
        assert!(get(&swap, again, page.len()).unwrap() == page);
    }
}

#[test]
fn a_full_disk_is_swap_full_once_nothing_more_can_be_given_back() {
    let (disk, swap) = in_memory(1 << 20, (Compression::None, false));
    let page = noise(16 * PAGE, 1);
    for errno in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
        disk.plan.lock().writes = vec![0, errno];
        disk.plan.lock().at_most = Some(4 * PAGE);
        let error = swap.put(&page).unwrap_err();
        assert_eq!((error.code, error.errno), (FaultCode::SwapFull, Some(libc::ENOSPC)));
        assert!(error.message.contains("the disk of /the/folder"), "{}", error.message);
        assert_eq!(swap.used(), ByteCount(0));
        disk.plan.lock().writes.clear();
        // The failed slot's blocks take space: they are given back for the next page, which goes on.
        let slot = swap.put(&page).unwrap();
        let other = swap.put(&page).unwrap();
        swap.free(slot);
        disk.plan.lock().writes = vec![errno];
        let bigger = noise(32 * PAGE, 2);
        let third = swap.put(&bigger).unwrap();
        assert_eq!(disk.plan.lock().punched.last(), Some(&(slot.run().offset().0, slot.run().bytes())));
        assert!(get(&swap, third, bigger.len()).unwrap() == bigger);
        assert!(get(&swap, other, page.len()).unwrap() == page);
        swap.free(other);
        swap.free(third);
        while swap.give_back(1) {}
    }
}

#[test]
fn freed_space_is_given_back_in_batches_and_not_where_it_cannot_be() {
    for (errno, holes) in [(None, true), (Some(libc::EOPNOTSUPP), false)] {
        let (disk, swap) = in_memory(64 << 20, (Compression::None, false));
        disk.plan.lock().punch = errno;
        let page = noise(256 << 10, 9);
        let slots: Vec<SwapSlot> = (0..32).map(|_| swap.put(&page).unwrap()).collect();
        for slot in &slots[..15] {
            swap.free(*slot);
        }
        assert!(disk.plan.lock().punched.is_empty(), "less than 4 MiB waits");
        slots[15..31].iter().for_each(|slot| swap.free(*slot));
        let punched = disk.plan.lock().punched.clone();
        let given: u64 = punched.iter().map(|(_, len)| len).sum();
        if holes {
            assert!((4 << 20..=31 * page.len() as u64).contains(&given) && punched.len() <= 8, "{punched:?}");
        } else {
            assert_eq!(punched.len(), 1, "it is not asked again");
        }
        assert!(get(&swap, slots[31], page.len()).unwrap() == page);
        let again = swap.put(&page).unwrap();
        assert!(again.run().start < slots[31].run().start && get(&swap, again, page.len()).unwrap() == page);
    }
}

/// Every byte of the header and every 97th of the rest, changed one at a time.
#[test]
fn damage_never_comes_back_as_data() {
    for codec in ALL {
        for page in [numbers(8 * PAGE, 3), noise(8 * PAGE, 4), mixed(8 * PAGE, 5)] {
            let (disk, swap) = in_memory(1 << 20, codec);
            let slot = swap.put(&page).unwrap();
            let len = disk.bytes.lock().len();
            let (mut refused, mut same) = (0, 0);
            for at in (0..HEADER_BYTES).chain((HEADER_BYTES..len).step_by(97)) {
                disk.bytes.lock()[at] ^= 0x40;
                match get(&swap, slot, page.len()) {
                    Ok(bytes) => {
                        // Only the zeros that fill the last block are not looked at.
                        assert!(bytes == page, "{codec:?}: byte {at}");
                        same += 1;
                    }
                    Err(error) => {
                        assert_eq!(error.code, FaultCode::Checksum);
                        assert!(error.message.contains("lost"));
                        refused += 1;
                    }
                }
                disk.bytes.lock()[at] ^= 0x40;
            }
            assert!(refused > HEADER_BYTES && same <= PAGE / 97 + 1, "{codec:?} {refused} {same}");
            assert!(get(&swap, slot, page.len()).unwrap() == page);
            disk.bytes.lock().truncate(100);
            assert_eq!(get(&swap, slot, page.len()).unwrap_err().code, FaultCode::Truncated);
        }
    }
}

#[test]
fn a_slot_that_took_anothers_bytes_is_refused() {
    for codec in ALL {
        let (disk, swap) = in_memory(1 << 20, codec);
        let pages = [numbers(8 * PAGE, 1), numbers(8 * PAGE, 999)];
        let slots = [swap.put(&pages[0]).unwrap(), swap.put(&pages[1]).unwrap()];
        assert_eq!(slots[0].blocks(), slots[1].blocks());
        let len = slots[0].run().bytes() as usize;
        let mut bytes = disk.bytes.lock();
        let (first, second) = bytes.split_at_mut(len);
        first.swap_with_slice(&mut second[..len]);
        drop(bytes);
        for slot in slots {
            assert_eq!(get(&swap, slot, 8 * PAGE).unwrap_err().code, FaultCode::Checksum, "{codec:?}");
        }
    }
}

#[test]
fn another_length_than_was_put_is_refused() {
    for codec in ALL {
        let (_disk, swap) = in_memory(1 << 20, codec);
        for page in [numbers(4 * PAGE, 1), noise(4 * PAGE, 1)] {
            let slot = swap.put(&page).unwrap();
            for len in [PAGE, 3 * PAGE, 5 * PAGE] {
                assert_eq!(get(&swap, slot, len).unwrap_err().code, FaultCode::Corrupt, "{codec:?}");
            }
        }
    }
}

#[test]
fn encryption_hides_pages_and_repeats_nothing() {
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        let (disk, swap) = in_memory(1 << 20, (compression, true));
        let page = [b"a secret that must not be seen. ".repeat(128), noise(PAGE, 3)].concat();
        let slots = [swap.put(&page).unwrap(), swap.put(&page).unwrap()];
        let bytes = disk.bytes.lock();
        assert!(!bytes.windows(16).any(|part| part == &page[..16] || part == &page[page.len() - 16..]));
        let parts = slots.map(|slot| &bytes[slot.run().offset().0 as usize..][HEADER_BYTES..][..1024]);
        let blocks: HashSet<&[u8]> = parts.iter().flat_map(|part| part.chunks(16)).collect();
        assert_eq!(blocks.len(), 2 * 1024 / 16);
    }
}

#[test]
fn buffers_stay_within_what_is_said() {
    for codec in ALL {
        let (_disk, swap) = in_memory(64 << 20, codec);
        let mut last = 0;
        for pages in [1, 16, 512] {
            let said = swap.buffer_bytes(ByteCount((pages * PAGE) as u64)).0;
            let page = noise(pages * PAGE, 3);
            let slot = swap.put(&page).unwrap();
            // A get holds the slot in one buffer, and so does a put.
            assert!(slot.is_packed() as u64 * slot.run().bytes() <= said && last <= said);
            last = said;
        }
        let plain = codec == (Compression::None, false);
        assert_eq!((last == 0, plain && swap.standing_bytes().0 > 0), (plain, false));
    }
}

/// On a real file, with batches of holes punched meanwhile.
fn many_threads(codec: (Compression, bool)) {
    let folder = tempfile::tempdir().unwrap();
    let options = SwapOptions { folder: Some(folder.path().into()), ..options(64 << 20, codec) };
    let swap = Swap::open(&options).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let swap = &swap;
            scope.spawn(move || {
                let mut live: Vec<(SwapSlot, u64, usize)> = Vec::new();
                let make = |seed: u64, len| [noise, numbers, mixed][seed as usize % 3](len, seed);
                for step in 0..300u64 {
                    let seed = step << 8 | thread;
                    let len = PAGE << (seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 61);
                    live.push((swap.put(&make(seed, len)).unwrap(), seed, len));
                    // Grow to some twenty pages, then drop nearly all, again and again.
                    let keep = if step % 50 == 49 { 2 } else { 20 };
                    while live.len() > keep {
                        let (slot, seed, len) = live.swap_remove(seed as usize % live.len());
                        assert!(get(swap, slot, len).unwrap() == make(seed, len));
                        swap.free(slot);
                    }
                }
                for (slot, seed, len) in live {
                    assert!(get(swap, slot, len).unwrap() == make(seed, len));
                    swap.free(slot);
                }
            });
        }
    });
    assert_eq!(swap.used(), ByteCount(0));
}

#[test]
fn many_threads_get_back_what_they_put() {
    for codec in ALL {
        many_threads(codec);
    }
}

#[test]
fn a_real_file_gets_smaller_and_leaves_no_name() {
    let folder = tempfile::tempdir().unwrap();
    let options = SwapOptions { folder: Some(folder.path().into()), ..options(64 << 20, ALL[0]) };
    let (file, _) = file::open(options.folder.as_deref()).unwrap();
    let twin = file.try_clone().unwrap();
    let swap = Swap::with_file(Box::new(file), folder.path().into(), &options).unwrap();
    let page = noise(1 << 20, 7);
    let slots: Vec<SwapSlot> = (0..16).map(|_| swap.put(&page).unwrap()).collect();
    twin.sync_all().unwrap();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&twin.metadata().unwrap()) * 512;
    assert!(blocks() >= 16 << 20);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    slots.iter().for_each(|slot| swap.free(*slot));
    assert!(blocks() < 6 << 20, "{}", blocks());
}

#[test]
#[allow(unsafe_code)]
fn a_forked_child_reads_its_parents_pages() {
    for codec in ALL {
        let folder = tempfile::tempdir().unwrap();
        let options = SwapOptions { folder: Some(folder.path().into()), ..options(1 << 20, codec) };
        let swap = Swap::open(&options).unwrap();
        let page = numbers(16 * PAGE, 3);
        let slot = swap.put(&page).unwrap();
        // SAFETY: the child uses this swap, memory and `_exit`; no lock that a thread may hold but the
        // buffers', which it makes new.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: the only thread of the child of a fork.
            unsafe {
                buffers::reset_in_child();
                swap.after_fork_in_child();
            }
            let refused = swap.put(&page).is_err_and(|error| error.code == FaultCode::Closed);
            swap.free(slot);
            let read = get(&swap, slot, page.len()).is_ok_and(|bytes| bytes == page);
            // SAFETY: ends the child without running what belongs to the test harness.
            unsafe { libc::_exit(i32::from(!refused) | i32::from(!read) << 1) }
        }
        assert_eq!(wait(child), Some(0), "{codec:?}: exit status of the child");
        assert!(get(&swap, slot, page.len()).unwrap() == page);
        swap.free(slot);
        assert_eq!(swap.used(), ByteCount(0));
    }
}

/// The status of a child that ends within ten seconds.
#[allow(unsafe_code)]
fn wait(child: libc::pid_t) -> Option<i32> {
    let mut status = -1;
    for _ in 0..1000 {
        // SAFETY: our own child; the status is written to a local.
        if unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == child {
            return Some(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -status });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // SAFETY: our own child, not yet reaped.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, &raw mut status, 0);
    }
    None
}
