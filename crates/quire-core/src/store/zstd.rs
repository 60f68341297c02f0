//! The decompressed bytes of a store in the Zstandard seekable format.
//!
//! A read fetches the frames it touches from the store below in as few reads as its buffer allows
//! and decodes each in one shot: frames wholly inside the caller's buffer straight into it, the
//! others by way of a scratch buffer. One-shot decoding uses its output as the window, so no frame
//! header can make it allocate one. A frame that decodes to another length than its table says is
//! corrupt.
//!
//! A small read from a large frame without a checksum decodes only as far as it must and leaves
//! the half-decoded frame for the next read to go on with: a random reader saves half of the work,
//! one that goes in order loses nothing. With checksums a frame is decoded whole, as its bytes are
//! not to be believed before the last of them has been seen.

use std::sync::Arc;

use xxhash_rust::xxh64::xxh64;
use zstd_safe::{CCtx, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use super::Store;
use super::seek_table::{FRAME_MAX, Frame, SeekTable};
use crate::errors::{FaultCode, OpenError, StoreError};
use crate::sys::fork::ForkMutex;
use crate::units::{ByteCount, ByteOffset};

/// Frames are fetched together up to this many compressed bytes, from a slow store up to its run.
const FETCH_BYTES: u64 = 256 << 10;
/// What a reader that goes in order reads at once of frames smaller than this.
const RUN: ByteCount = ByteCount(256 << 10);
/// Workspaces kept for the next read of a store that only decodes whole frames.
const KEPT_MAX: u64 = 2;
/// The same where frames are decoded in parts: up to this many, or the few that take so many bytes.
const BEGUN_MAX: u64 = 4;
const BEGUN_BYTES: u64 = 16 << 20;
/// A larger buffer of compressed bytes is not kept: a frame of 1 MiB that does not compress fits.
const KEPT_BUFFER_BYTES: u64 = (1 << 20) + (64 << 10);
/// Bytes of a decoding context, a test holds zstd to it; and of the block that it waits to complete
/// when it decodes in parts.
const CONTEXT_BYTES: u64 = 96 << 10;
const BLOCK_BYTES: u64 = 128 << 10;
/// The largest window that zstd knows, as a power of two: no window is ever allocated.
const WINDOW_LOG_MAX: u32 = 31;
/// Unit of reads from larger frames without checksums; chosen by `bench/granule.py`.
const PART: u64 = 64 << 10;

/// What one read needs.
struct Workspace {
    context: DCtx<'static>,
    compressed: Vec<u8>,
    scratch: Vec<u8>,
    partial: Option<Partial>,
}

/// How far the frame in `compressed` has been decoded into `scratch`.
#[derive(Clone, Copy)]
struct Partial {
    frame: usize,
    consumed: usize,
    decoded: usize,
    /// Compressed bytes up to the end of the next block, as zstd asked for them.
    wanted: usize,
}

/// A seekable zstd store.
pub struct ZstdStore {
    inner: Arc<dyn Store>,
    table: SeekTable,
    grain: ByteCount,
    uniform: bool,
    /// Compressed bytes of the largest frame that has data.
    compressed_max: u64,
    /// Compressed bytes up to which frames are fetched together.
    fetch_bytes: u64,
    /// Workspaces kept, at most.
    kept_max: u64,
    kept: ForkMutex<Vec<Workspace>>,
}

impl ZstdStore {
    /// Reads the seek table.
    ///
    /// # Errors
    /// As [`SeekTable::read`].
    pub fn open(inner: Arc<dyn Store>) -> Result<Self, OpenError> {
        let table = SeekTable::read(&*inner)?;
        let mut grain = 0;
        let mut compressed_max = 0;
        for frame in table.frames().filter(|frame| !frame.is_empty()) {
            grain = grain.max(frame.end - frame.start);
            compressed_max = compressed_max.max(frame.compressed_end - frame.compressed_start);
        }
        let all_but_last = table.len().saturating_sub(1);
        let uniform = table.frames().take(all_but_last).all(|frame| frame.end - frame.start == grain);
        let fetch_bytes = if inner.is_slow() { FETCH_BYTES.max(inner.run().0) } else { FETCH_BYTES };
        let mut store = ZstdStore {
            inner,
            table,
            grain: ByteCount(grain.max(1)),
            uniform,
            compressed_max,
            fetch_bytes,
            kept_max: KEPT_MAX,
            kept: ForkMutex::new(Vec::new()),
        };
        if store.reads_parts() {
            store.kept_max = (BEGUN_BYTES / store.kept_workspace_bytes()).clamp(1, BEGUN_MAX);
        }
        Ok(store)
    }

    /// Number of frames.
    pub fn frame_count(&self) -> u64 {
        self.table.len() as u64
    }

    /// Bytes of the file.
    pub fn compressed_size(&self) -> ByteCount {
        self.inner.size()
    }

    /// Whether frames have checksums.
    pub fn has_checksums(&self) -> bool {
        self.table.has_checksums()
    }

    /// A workspace: the one that has begun to decode `frame`, or else the one used longest ago.
    fn take_workspace(&self, offset: ByteOffset, frame: Option<usize>) -> Result<Workspace, StoreError> {
        let mut kept = self.kept.lock();
        let begun = kept.iter().position(|space| frame.is_some() && space.partial.map(|p| p.frame) == frame);
        // Begun frames wait for their next reader while there is room for another workspace.
        let oldest =
            (frame.is_none() || kept.len() as u64 == self.kept_max).then_some(0).filter(|_| !kept.is_empty());
        if let Some(index) = begun.or(oldest) {
            return Ok(kept.remove(index));
        }
        drop(kept);
        let mut context = DCtx::try_create().ok_or_else(|| no_memory(offset))?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .and_then(|_| context.set_parameter(DParameter::StableOutBuffer(true)))
            .expect("a new context takes parameters that this zstd has");
        Ok(Workspace { context, compressed: Vec::new(), scratch: Vec::new(), partial: None })
    }

    fn give_workspace(&self, mut workspace: Workspace) {
        if !self.reads_parts() {
            workspace.scratch = Vec::new();
            if workspace.compressed.capacity() as u64 > self.kept_buffer_bytes() {
                workspace.compressed = Vec::new();
            }
        }
        let mut kept = self.kept.lock();
        let surplus = (kept.len() as u64 == self.kept_max).then(|| kept.remove(0));
        kept.push(workspace);
        drop(kept);
        drop(surplus);
    }

    /// Bytes of compressed data that a kept workspace may hold.
    fn kept_buffer_bytes(&self) -> u64 {
        if self.reads_parts() {
            self.compressed_max.max(self.fetch_bytes.min(self.compressed_size().0))
        } else {
            self.compressed_max.min(KEPT_BUFFER_BYTES)
        }
    }

    fn kept_workspace_bytes(&self) -> u64 {
        let parts = if self.reads_parts() { self.grain.0 + BLOCK_BYTES } else { 0 };
        self.kept_buffer_bytes() + CONTEXT_BYTES + parts
    }

    /// Whether reads of parts of frames decode only as far as they must.
    fn reads_parts(&self) -> bool {
        self.uniform && !self.has_checksums() && self.grain.0 > PART && self.grain.0.is_multiple_of(PART)
    }

    /// Reads bytes that all lie in `frame`, decoding no further than their end.
    fn read_part(&self, frame: Frame, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        let mut space = self.take_workspace(offset, Some(frame.index))?;
        let from = (offset.0 - frame.start) as usize;
        let result = self.begin(&mut space, frame).and_then(|()| {
            decode_until(&mut space, frame, from + buf.len())
                .map_err(|failure| self.bad_frame(frame, failure))
        });
        if result.is_ok() {
            buf.copy_from_slice(&space.scratch[from..from + buf.len()]);
        } else {
            space.partial = None;
        }
        self.give_workspace(space);
        result
    }

    /// Fetches `frame` and makes ready to decode it, unless that has been done.
    fn begin(&self, space: &mut Workspace, frame: Frame) -> Result<(), StoreError> {
        if space.partial.is_some_and(|partial| partial.frame == frame.index) {
            return Ok(());
        }
        space.partial = None;
        self.fetch(space, frame, frame)?;
        grow(&mut space.scratch, frame.len()).map_err(|()| no_memory(ByteOffset(frame.start)))?;
        let reset = space.context.reset(ResetDirective::SessionOnly);
        reset.map_err(|code| self.bad_frame(frame, undecodable(code)))?;
        space.partial = Some(Partial { frame: frame.index, consumed: 0, decoded: 0, wanted: 1 });
        Ok(())
    }

    /// The last of the frames from `first` on that are fetched together for a read that ends at
    /// `end`: contiguous in the file, at least `first` itself.
    fn run_end(&self, first: Frame, end: u64) -> Frame {
        let mut last = first;
        while last.end < end {
            let next = self.table.frame(last.index + 1);
            if next.compressed_end - first.compressed_start > self.fetch_bytes {
                break;
            }
            last = next;
        }
        last
    }

    fn read_with(&self, space: &mut Workspace, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        let end = offset.0 + buf.len() as u64;
        let mut at = offset.0;
        space.partial = None;
        while at < end {
            let first = self.table.find(ByteOffset(at));
            let last = self.run_end(first, end);
            self.fetch(space, first, last)?;
            for frame in (first.index..=last.index).map(|index| self.table.frame(index)) {
                if frame.is_empty() {
                    continue;
                }
                let to = frame.end.min(end);
                let out = &mut buf[(at - offset.0) as usize..(to - offset.0) as usize];
                decode_part(space, frame, (first.compressed_start, at), out)
                    .map_err(|failure| self.bad_frame(frame, failure))?;
                at = to;
            }
        }
        Ok(())
    }

    /// Reads the compressed bytes of the frames `first` to `last`.
    fn fetch(&self, space: &mut Workspace, first: Frame, last: Frame) -> Result<(), StoreError> {
        let len = (last.compressed_end - first.compressed_start) as usize;
        let start = ByteOffset(first.start);
        grow(&mut space.compressed, len).map_err(|()| no_memory(start))?;
        let compressed = &mut space.compressed[..len];
        self.inner.read_at(ByteOffset(first.compressed_start), compressed).map_err(|error| StoreError {
            message: format!("{} (at byte {} of the compressed file)", error.message, error.offset),
            offset: start,
            ..error
        })
    }

    fn bad_frame(&self, frame: Frame, failure: Failure) -> StoreError {
        let (code, what) = match failure {
            Failure::NoMemory => return no_memory(ByteOffset(frame.start)),
            Failure::Undecodable(what) => (FaultCode::Corrupt, what.to_owned()),
            Failure::Length(len) => {
                let what = format!("it decodes to {len} bytes, the seek table says {}", frame.len());
                (FaultCode::Corrupt, what)
            }
            Failure::Checksum => {
                (FaultCode::Checksum, "the checksum of its decompressed bytes does not match".to_owned())
            }
        };
        let message = format!(
            "{}: frame {} (bytes {}..{} of the file) is damaged; get or make the file again: {what}",
            self.label(),
            frame.index,
            frame.compressed_start,
            frame.compressed_end
        );
        StoreError::new(code, ByteOffset(frame.start), message)
    }
}

/// Why a frame gave no bytes.
enum Failure {
    NoMemory,
    /// In zstd's words.
    Undecodable(&'static str),
    /// It decodes to this many bytes, which the table does not say.
    Length(usize),
    Checksum,
}

fn undecodable(code: zstd_safe::ErrorCode) -> Failure {
    Failure::Undecodable(zstd_safe::get_error_name(code))
}

fn no_memory(offset: ByteOffset) -> StoreError {
    let message = "no memory to decode a zstd frame; free some, or repack it with smaller frames".into();
    StoreError { code: FaultCode::Io, offset, errno: Some(libc::ENOMEM), message, part: None }
}

/// Makes `buffer` at least `len` long; its content is then unspecified.
fn grow(buffer: &mut Vec<u8>, len: usize) -> Result<(), ()> {
    if buffer.len() < len {
        buffer.clear();
        buffer.try_reserve_exact(len).map_err(|_| ())?;
        buffer.resize(len, 0);
    }
    Ok(())
}

/// Goes on decoding the frame of `space.partial` until `end` of its bytes are there. The output is
/// stable (it stays where it is and holds the whole frame), so zstd keeps no window of its own.
fn decode_until(space: &mut Workspace, frame: Frame, end: usize) -> Result<(), Failure> {
    let mut partial = space.partial.expect("begun");
    let packed = &space.compressed[..frame.compressed_len()];
    // The last part also takes what follows the last block: zstd's own checksum, empty frames.
    while partial.decoded < end || (end == frame.len() && partial.consumed < packed.len()) {
        if partial.consumed == packed.len() {
            return Err(Failure::Length(partial.decoded));
        }
        let upto = (partial.consumed + partial.wanted.max(1)).min(packed.len());
        let mut input = InBuffer::around(&packed[partial.consumed..upto]);
        let mut output = OutBuffer::around_pos(&mut space.scratch[..frame.len()], partial.decoded);
        partial.wanted = space.context.decompress_stream(&mut output, &mut input).map_err(undecodable)?;
        partial.decoded = output.pos();
        partial.consumed += input.pos();
        space.partial = Some(partial);
    }
    Ok(())
}

/// Decodes `frame`, whose compressed bytes are in `space.compressed` (which begins at the first of
/// `starts` in the file), and copies what `out` wants of it (from the second of `starts` on).
fn decode_part(
    space: &mut Workspace,
    frame: Frame,
    (fetched_start, from): (u64, u64),
    out: &mut [u8],
) -> Result<(), Failure> {
    let begin = (frame.compressed_start - fetched_start) as usize;
    let packed = begin..begin + (frame.compressed_end - frame.compressed_start) as usize;
    let len = frame.len();
    if out.len() == len {
        return decode(&mut space.context, &space.compressed[packed], frame, out);
    }
    grow(&mut space.scratch, len).map_err(|()| Failure::NoMemory)?;
    decode(&mut space.context, &space.compressed[packed], frame, &mut space.scratch[..len])?;
    let skip = (from - frame.start) as usize;
    out.copy_from_slice(&space.scratch[skip..skip + out.len()]);
    Ok(())
}

fn decode(context: &mut DCtx<'static>, packed: &[u8], frame: Frame, out: &mut [u8]) -> Result<(), Failure> {
    let decoded = context.decompress(out, packed).map_err(undecodable)?;
    if decoded != out.len() {
        return Err(Failure::Length(decoded));
    }
    match frame.checksum {
        Some(checksum) if checksum != xxh64(out, 0) as u32 => Err(Failure::Checksum),
        _ => Ok(()),
    }
}

impl Store for ZstdStore {
    fn size(&self) -> ByteCount {
        self.table.decompressed_size()
    }

    fn label(&self) -> &str {
        self.inner.label()
    }

    fn read_only(&self) -> Option<String> {
        Some("its bytes are compressed, with zstd".into())
    }

    fn read_at(&self, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        if buf.is_empty() {
            return Ok(());
        }
        let frame = self.table.find(offset);
        if self.reads_parts() && offset.0 + buf.len() as u64 <= frame.end && buf.len() < frame.len() {
            return self.read_part(frame, offset, buf);
        }
        let mut workspace = self.take_workspace(offset, None)?;
        let result = self.read_with(&mut workspace, offset, buf);
        self.give_workspace(workspace);
        result
    }

    fn grain(&self) -> ByteCount {
        if self.reads_parts() { ByteCount(PART) } else { self.grain }
    }

    fn run(&self) -> ByteCount {
        self.grain.max(if self.is_slow() { self.inner.run() } else { RUN })
    }

    fn is_slow(&self) -> bool {
        self.inner.is_slow()
    }

    fn buffer_bytes(&self, read: ByteCount) -> ByteCount {
        let whole_frames = self.uniform && read.0.is_multiple_of(self.grain.0);
        let scratch = if whole_frames { 0 } else { self.grain.0 };
        let touched = if whole_frames {
            (read.0 / self.grain.0).saturating_mul(self.compressed_max)
        } else {
            self.compressed_size().0
        };
        let fetched = self.compressed_max.max(self.fetch_bytes.min(touched));
        let below = self.inner.buffer_bytes(ByteCount(fetched)).0;
        ByteCount(fetched + scratch + below)
    }

    fn standing_bytes(&self) -> ByteCount {
        let kept = self.kept_max * self.kept_workspace_bytes();
        ByteCount(self.inner.standing_bytes().0 + kept + self.table.memory_bytes().0)
    }

    fn bytes_fetched(&self) -> u64 {
        self.inner.bytes_fetched()
    }

    fn close(&self) {
        self.inner.close();
    }

    #[allow(unsafe_code)]
    fn after_fork_in_child(&self) {
        // SAFETY: called with one thread, in no read (the trait's contract).
        unsafe { self.kept.replace_in_child(Vec::new()) }
        self.inner.after_fork_in_child();
    }
}

/// Compresses `data` into one frame that says its size; returns it and the low half of the data's
/// XXH64.
///
/// # Errors
/// When `data` is longer than [`FRAME_MAX`], memory is short, or zstd refuses.
pub fn compress_frame(data: &[u8], level: i32) -> Result<(Vec<u8>, u32), String> {
    if data.len() > FRAME_MAX as usize {
        return Err(format!("a frame of {} bytes is too large: {FRAME_MAX} is the most", data.len()));
    }
    let no_memory = || format!("no memory to compress {} bytes at level {level}", data.len());
    let mut frame = Vec::new();
    frame.try_reserve_exact(zstd_safe::compress_bound(data.len())).map_err(|_| no_memory())?;
    CCtx::try_create()
        .ok_or_else(no_memory)?
        .compress(&mut frame, data, level)
        .map_err(|code| zstd_safe::get_error_name(code).to_owned())?;
    Ok((frame, xxh64(data, 0) as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;
    use crate::store::seek_table::encode_seek_table;

    /// A file of frames of the given sizes over counting bytes, and what it decompresses to.
    pub fn packed(sizes: &[usize], checksums: bool) -> (Vec<u8>, Vec<u8>) {
        let (mut file, mut plain, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        for size in sizes {
            let data: Vec<u8> = (0..*size).map(|i| ((plain.len() + i) / 7 % 256) as u8).collect();
            let (frame, checksum) = compress_frame(&data, 3).unwrap();
            entries.push((frame.len() as u32, *size as u32, checksums.then_some(checksum)));
            file.extend(frame);
            plain.extend(data);
        }
        file.extend(encode_seek_table(&entries));
        (file, plain)
    }

    fn open(file: Vec<u8>) -> Result<ZstdStore, OpenError> {
        ZstdStore::open(Arc::new(MemoryStore::new("m.zst", file)))
    }

    #[test]
    fn any_range_of_any_frames_reads_right() {
        for (sizes, checksums) in [(vec![100; 9], true), (vec![1, 5000, 0, 17, 333, 1], false)] {
            let (file, plain) = packed(&sizes, checksums);
            let store = open(file).unwrap();
            assert_eq!(store.size().0 as usize, plain.len());
            for start in (0..plain.len()).step_by(13) {
                for end in [start, start + 1, start + 100, start + 301, plain.len()] {
                    let end = end.clamp(start, plain.len());
                    let mut buf = vec![0xAA; end - start];
                    store.read_at(ByteOffset(start as u64), &mut buf).unwrap();
                    assert!(buf == plain[start..end], "{start}..{end}");
                }
            }
            assert!(store.kept.lock()[0].context.sizeof() as u64 <= CONTEXT_BYTES);
        }
    }

    #[test]
    fn parts_of_large_frames_read_right_in_any_order() {
        let frame = 5 * PART as usize;
        let (file, plain) = packed(&[frame, frame, frame, 1000], false);
        let store = open(file).unwrap();
        assert_eq!(store.grain(), ByteCount(PART));
        let mut seed = 1u64;
        for _ in 0..400 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = (seed >> 20) as usize % plain.len();
            let len = if seed.is_multiple_of(3) { 2 * frame } else { PART as usize };
            let end = (start + len).min(plain.len());
            let mut buf = vec![0xAA; end - start];
            store.read_at(ByteOffset(start as u64), &mut buf).unwrap();
            assert!(buf == plain[start..end], "{start}..{end}");
        }
        let fetched = store.bytes_fetched();
        for part in 0..5 {
            store.read_at(ByteOffset(part * PART), &mut vec![0; PART as usize]).unwrap();
        }
        let once = store.table.frame(0).compressed_len() as u64;
        assert!(store.bytes_fetched() - fetched <= once, "a reader in order fetches a frame once");
    }

    #[test]
    fn a_damaged_large_frame_is_an_error_in_the_part_that_meets_it() {
        let (mut file, _) = packed(&[5 * PART as usize], false);
        let table = file.len() - 25;
        file.truncate(table);
        let short = file.len() as u32 - 5;
        file.truncate(short as usize);
        file.extend(encode_seek_table(&[(short, 5 * PART as u32, None)]));
        let store = open(file).unwrap();
        assert!(store.read_at(ByteOffset(0), &mut [0; 100]).is_ok());
        let error = store.read_at(ByteOffset(4 * PART), &mut vec![0; PART as usize]).unwrap_err();
        assert_eq!(error.code, FaultCode::Corrupt);
    }

    #[test]
    fn plain_zstd_is_refused_with_the_command_that_repacks_it() {
        let (frame, _) = compress_frame(&[7; 1000], 3).unwrap();
        let Err(OpenError::Format(message)) = open(frame) else { panic!("opened") };
        assert!(message.contains("quire pack m.zst -o"), "{message}");
    }

    #[test]
    fn a_flipped_checksum_or_byte_is_an_error() {
        let (file, _) = packed(&[1000, 1000], true);
        let mut flipped = file.clone();
        let checksum_at = file.len() - 9 - 4;
        flipped[checksum_at] ^= 1;
        let store = open(flipped).unwrap();
        assert!(store.read_at(ByteOffset(0), &mut [0; 1000]).is_ok());
        let error = store.read_at(ByteOffset(1500), &mut [0; 10]).unwrap_err();
        assert_eq!((error.code, error.offset), (FaultCode::Checksum, ByteOffset(1000)));
    }

    #[test]
    fn the_widest_window_costs_no_memory_in_parts_either() {
        let header = [0xFD2F_B528u32.to_le_bytes().as_slice(), &[0, (31 - 10) << 3]].concat();
        let block = |last: u32, byte: u8| {
            let head = (last | (128 << 10) << 3).to_le_bytes();
            [&head[..3], [byte; 128 << 10].as_slice()].concat()
        };
        let frame = [header, block(0, 1), block(1, 2)].concat();
        let mut file = frame.clone();
        file.extend(encode_seek_table(&[(frame.len() as u32, 256 << 10, None)]));
        let store = open(file).unwrap();
        assert!(store.reads_parts());
        let mut byte = [0];
        for (offset, expected) in [(7, 1), (200_000, 2), (0, 1)] {
            store.read_at(ByteOffset(offset), &mut byte).unwrap();
            assert_eq!(byte[0], expected);
        }
        let kept = store.kept.lock();
        assert!(kept.iter().all(|space| space.context.sizeof() as u64 <= CONTEXT_BYTES + BLOCK_BYTES));
        assert_eq!(kept.len(), 1, "the begun frame is gone on with");
    }

    #[test]
    fn lying_tables_are_refused() {
        let (frame, _) = compress_frame(&[3; 1000], 3).unwrap();
        let len = frame.len() as u32;
        let with = |entries: &[(u32, u32, Option<u32>)]| {
            let mut file = frame.clone();
            file.extend(encode_seek_table(entries));
            open(file).err().expect("refused").to_string()
        };
        assert!(with(&[(len + 1, 1000, None)]).contains("bytes stand before it"));
        assert!(with(&[(len - 1, 1000, None)]).contains("bytes stand before it"));
        assert!(with(&[(0, 10, None), (len, 1000, None)]).contains("10 bytes out of 0"));
        assert!(with(&[(len, u32::MAX, None)]).contains("repack it with smaller frames"));
        let mut file = frame.clone();
        file.extend(encode_seek_table(&[(len, 1000, None)]));
        let end = file.len();
        for (frames, says) in [(u32::MAX, "the format allows"), (1 << 27, "do not fit")] {
            file[end - 9..end - 5].copy_from_slice(&frames.to_le_bytes());
            assert!(open(file.clone()).err().unwrap().to_string().contains(says));
        }
        file[end - 5] = 0b0100;
        assert!(open(file).err().unwrap().to_string().contains("reserved"));
    }
}
