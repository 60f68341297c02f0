//! The seek table of the Zstandard seekable format (zstd, contrib/seekable_format, version 0.1.0).
//!
//! ```text
//!   frame 0 | frame 1 | ... | skippable frame:
//!       u32 0x184D2A5E   u32 bytes that follow
//!       per frame:  u32 compressed bytes   u32 decompressed bytes   [u32 checksum]
//!       footer:     u32 frames   u8 descriptor   u32 0x8F92EAB1
//!   descriptor: bit 7 checksums present, bits 6..2 reserved (0), bits 1..0 unused
//!   checksum:   low 32 bits of XXH64 (seed 0) of the frame's decompressed bytes
//! ```
//!
//! A table comes from anywhere, so nothing in it is believed before it is checked: its length
//! against the file, its sums against the file, each frame against limits. What is kept in memory is
//! at most 20 bytes for each 8 or 12 bytes of table that are really there; while it is read, one
//! chunk of it more.

use super::Store;
use crate::errors::OpenError;
use crate::units::{ByteCount, ByteOffset};

const SKIPPABLE_MAGIC: u32 = 0x184D_2A5E;
const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
const ZSTD_MAGIC: u32 = 0xFD2F_B528;
const HEADER: u64 = 8;
const FOOTER: u64 = 9;
const CHECKSUMS: u8 = 1 << 7;
const RESERVED: u8 = 0b0111_1100;
/// Read at once from the end of the file, so that most tables come with their footer.
const TAIL_BYTES: u64 = 64 << 10;
/// Entries of a longer table that are read at once.
const CHUNK_ENTRIES: u64 = 64 << 10;
/// Frames that a file may have (`ZSTD_SEEKABLE_MAXFRAMES`).
const FRAMES_MAX: u64 = 0x0800_0000;
/// The largest decompressed frame that is read: a whole frame is decoded to reach any byte of it.
pub const FRAME_MAX: u32 = 64 << 20;
/// The largest compressed frame that is read: twice what a frame of raw blocks takes.
const PACKED_MAX: u32 = 2 * FRAME_MAX;
/// What one compressed byte can make at most: a block repeats one byte up to 128 KiB times and takes
/// 4 bytes, 3 of them its header (RFC 8878, 3.1.1.2).
const RATIO_MAX: u64 = (128 << 10) / 4;

/// Where frames begin, in the file and in the decompressed bytes.
#[derive(Debug)]
pub struct SeekTable {
    /// Compressed start of each frame, and the end of the last.
    compressed: Vec<u64>,
    /// Decompressed start of each frame, and the end of the last.
    decompressed: Vec<u64>,
    checksums: Option<Vec<u32>>,
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Number from 0.
    pub index: usize,
    /// Start in the file.
    pub compressed_start: u64,
    /// End in the file.
    pub compressed_end: u64,
    /// Start in the decompressed bytes.
    pub start: u64,
    /// End in the decompressed bytes.
    pub end: u64,
    /// Low half of the XXH64 of the decompressed bytes.
    pub checksum: Option<u32>,
}

impl Frame {
    /// Decompressed bytes.
    pub fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Compressed bytes.
    pub fn compressed_len(&self) -> usize {
        (self.compressed_end - self.compressed_start) as usize
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// What the end of the file says of the table.
struct Footer {
    frames: u64,
    /// Bytes of an entry.
    entry: u64,
    /// Where the table's skippable frame starts, which is where the data ends.
    start: u64,
    /// Where the entries end.
    end: u64,
}

impl Footer {
    /// Checks `bytes`, the last of a file of `size` bytes.
    fn parse(bytes: &[u8], size: u64) -> Result<Self, String> {
        let (frames, descriptor) = (u64::from(word(bytes, 0)), bytes[4]);
        if descriptor & RESERVED != 0 {
            return Err(format!("reserved bits are set in its descriptor, {descriptor:#04x}"));
        }
        if frames > FRAMES_MAX {
            return Err(format!("it claims {frames} frames, the format allows {FRAMES_MAX}"));
        }
        let entry = if descriptor & CHECKSUMS != 0 { 12 } else { 8 };
        let start = size.checked_sub(HEADER + frames * entry + FOOTER);
        let start = start.ok_or_else(|| format!("{frames} frames do not fit a file of {size} bytes"))?;
        Ok(Footer { frames, entry, start, end: size - FOOTER })
    }

    fn check_header(&self, header: &[u8]) -> Result<(), String> {
        let content = self.frames * self.entry + FOOTER;
        if word(header, 0) != SKIPPABLE_MAGIC || u64::from(word(header, 4)) != content {
            return Err("its own frame header is wrong".into());
        }
        Ok(())
    }
}

impl SeekTable {
    /// Reads and checks the table at the end of a store: one read of its last 64 KiB, and one for
    /// each 65,536 frames where that was not all.
    ///
    /// # Errors
    /// `Format` when there is none or it contradicts itself or the file; `Io` when it cannot be read.
    pub fn read(store: &dyn Store) -> Result<Self, OpenError> {
        let size = store.size().0;
        let damaged =
            |what: String| OpenError::Format(format!("{}: damaged seek table: {what}", store.label()));
        if size < HEADER + FOOTER {
            return Err(not_seekable(store));
        }
        let tail_start = size - size.min(TAIL_BYTES);
        let mut tail = vec![0; (size - tail_start) as usize];
        fetch(store, tail_start, &mut tail)?;
        let footer_bytes = &tail[tail.len() - FOOTER as usize..];
        if word(footer_bytes, 5) != SEEKABLE_MAGIC {
            return Err(not_seekable(store));
        }
        let footer = Footer::parse(footer_bytes, size).map_err(damaged)?;
        let mut table = SeekTable::with_room(&footer).map_err(|message| OpenError::Io {
            errno: Some(libc::ENOMEM),
            message: format!("{}: {message}", store.label()),
        })?;
        let (mut at, mut header) = (footer.start, HEADER);
        while at < footer.end {
            let len = (footer.end - at).min(header + CHUNK_ENTRIES * footer.entry);
            let mut chunk = vec![0; len as usize];
            match at.checked_sub(tail_start) {
                Some(skip) => chunk.copy_from_slice(&tail[skip as usize..(skip + len) as usize]),
                None => fetch(store, at, &mut chunk)?,
            }
            let (head, entries) = chunk.split_at(header as usize);
            if header > 0 {
                footer.check_header(head).map_err(damaged)?;
            }
            table.extend(entries, &footer).map_err(damaged)?;
            (at, header) = (at + len, 0);
        }
        let frames_end = table.compressed[table.len()];
        if frames_end != footer.start {
            let before = footer.start;
            return Err(damaged(format!(
                "its frames make {frames_end} bytes, but {before} bytes stand before it"
            )));
        }
        Ok(table)
    }

    fn with_room(footer: &Footer) -> Result<Self, String> {
        let room = footer.frames as usize + 1;
        let mut table = SeekTable {
            compressed: Vec::new(),
            decompressed: Vec::new(),
            checksums: (footer.entry == 12).then(Vec::new),
        };
        let reserved = table
            .compressed
            .try_reserve_exact(room)
            .and_then(|()| table.decompressed.try_reserve_exact(room))
            .and_then(|()| table.checksums.as_mut().map_or(Ok(()), |sums| sums.try_reserve_exact(room)));
        reserved.map_err(|_| format!("no memory for a seek table of {} frames", footer.frames))?;
        table.compressed.push(0);
        table.decompressed.push(0);
        Ok(table)
    }

    /// Adds the frames of some whole entries.
    fn extend(&mut self, entries: &[u8], footer: &Footer) -> Result<(), String> {
        let (mut at, mut start) = (self.compressed[self.len()], self.decompressed[self.len()]);
        for bytes in entries.chunks_exact(footer.entry as usize) {
            let (packed, plain) = (word(bytes, 0), word(bytes, 4));
            check_frame(self.len(), packed, plain)?;
            at += u64::from(packed);
            start += u64::from(plain);
            if at > footer.start {
                let before = footer.start;
                return Err(format!("its frames make {at} bytes, but {before} bytes stand before it"));
            }
            self.compressed.push(at);
            self.decompressed.push(start);
            if let Some(checksums) = &mut self.checksums {
                checksums.push(word(bytes, 8));
            }
        }
        Ok(())
    }

    /// Bytes of memory the table takes.
    pub fn memory_bytes(&self) -> ByteCount {
        let checksums = self.checksums.as_ref().map_or(0, Vec::capacity);
        ByteCount(((self.compressed.capacity() + self.decompressed.capacity()) * 8 + checksums * 4) as u64)
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.compressed.len() - 1
    }

    /// Whether there are no frames.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all frames, decompressed.
    pub fn decompressed_size(&self) -> ByteCount {
        ByteCount(self.decompressed[self.len()])
    }

    /// Whether frames have checksums.
    pub fn has_checksums(&self) -> bool {
        self.checksums.is_some()
    }

    /// A frame by number.
    pub fn frame(&self, index: usize) -> Frame {
        Frame {
            index,
            compressed_start: self.compressed[index],
            compressed_end: self.compressed[index + 1],
            start: self.decompressed[index],
            end: self.decompressed[index + 1],
            checksum: self.checksums.as_ref().map(|checksums| checksums[index]),
        }
    }

    /// The frame that holds a decompressed byte, which lies inside.
    pub fn find(&self, offset: ByteOffset) -> Frame {
        // Frames without bytes share their start with the next one; the last of them holds the byte.
        self.frame(self.decompressed.partition_point(|start| *start <= offset.0) - 1)
    }

    /// Every frame in order.
    pub fn frames(&self) -> impl Iterator<Item = Frame> {
        (0..self.len()).map(|index| self.frame(index))
    }
}

/// Refuses a frame that no encoder makes or that would take too much memory to read.
fn check_frame(index: usize, packed: u32, plain: u32) -> Result<(), String> {
    if plain > FRAME_MAX {
        return Err(format!(
            "frame {index} has {plain} bytes, more than the {FRAME_MAX} that are read at once; \
             repack it with smaller frames"
        ));
    }
    if u64::from(plain) > u64::from(packed) * RATIO_MAX {
        return Err(format!("frame {index} makes {plain} bytes out of {packed}, which zstd cannot"));
    }
    if plain > 0 && packed > PACKED_MAX {
        return Err(format!("frame {index} takes {packed} bytes for {plain}; repack the data"));
    }
    Ok(())
}

fn fetch(store: &dyn Store, offset: u64, buf: &mut [u8]) -> Result<(), OpenError> {
    store
        .read_at(ByteOffset(offset), buf)
        .map_err(|error| OpenError::Io { errno: error.errno, message: format!("the seek table: {error}") })
}

fn not_seekable(store: &dyn Store) -> OpenError {
    let label = store.label();
    let mut magic = [0; 4];
    let plain = store.size().0 >= 4
        && store.read_at(ByteOffset(0), &mut magic).is_ok()
        && word(&magic, 0) == ZSTD_MAGIC;
    OpenError::Format(if plain {
        format!(
            "{label} is plain zstd, which can only be read from its start: repack it in the seekable format \
             with `quire pack {} -o NEW.zst`",
            shell_word(label)
        )
    } else {
        format!("{label} is not in the Zstandard seekable format: it has no seek table at its end")
    })
}

/// The skippable frame that holds the table of `entries`: compressed bytes, decompressed bytes, and
/// a checksum for all (where one has none, none is written).
///
/// # Panics
/// With more than 2^27 entries, which the format does not allow.
pub fn encode_seek_table(entries: &[(u32, u32, Option<u32>)]) -> Vec<u8> {
    assert!(entries.len() as u64 <= FRAMES_MAX, "more frames than the seekable format allows");
    let checksums = !entries.is_empty() && entries.iter().all(|(.., checksum)| checksum.is_some());
    let entry = if checksums { 12 } else { 8 };
    let content = (entries.len() * entry) as u64 + FOOTER;
    let mut out = Vec::with_capacity((HEADER + content) as usize);
    out.extend(SKIPPABLE_MAGIC.to_le_bytes());
    out.extend((content as u32).to_le_bytes());
    for (compressed, decompressed, checksum) in entries {
        out.extend(compressed.to_le_bytes());
        out.extend(decompressed.to_le_bytes());
        out.extend(checksum.filter(|_| checksums).map(u32::to_le_bytes).into_iter().flatten());
    }
    out.extend((entries.len() as u32).to_le_bytes());
    out.push(if checksums { CHECKSUMS } else { 0 });
    out.extend(SEEKABLE_MAGIC.to_le_bytes());
    out
}

/// A word as a shell must be told it.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    #[test]
    fn a_table_longer_than_the_tail_is_read_in_chunks() {
        let count = CHUNK_ENTRIES as u32 + 77;
        let entries: Vec<_> = (0..count).map(|i| (1, i % 3, Some(i))).collect();
        let mut file = vec![0; count as usize];
        file.extend(encode_seek_table(&entries));
        let table = SeekTable::read(&MemoryStore::new("m", file)).unwrap();
        assert_eq!(table.len(), count as usize);
        let last = table.frame(count as usize - 1);
        assert_eq!((last.compressed_start, last.checksum), (u64::from(count) - 1, Some(count - 1)));
        assert_eq!(table.decompressed_size().0, entries.iter().map(|entry| u64::from(entry.1)).sum::<u64>());
        assert_eq!(table.memory_bytes().0, 20 * (u64::from(count) + 1));
    }

    #[test]
    fn the_frame_that_holds_a_byte_is_found_past_empty_ones() {
        let mut file = vec![0; 40];
        file.extend(encode_seek_table(&[(10, 0, None), (10, 5, None), (10, 0, None), (10, 2, None)]));
        let table = SeekTable::read(&MemoryStore::new("m", file)).unwrap();
        let found: Vec<usize> = (0..7).map(|offset| table.find(ByteOffset(offset)).index).collect();
        assert_eq!(found, [1, 1, 1, 1, 1, 3, 3]);
        assert!(!table.has_checksums());
    }

    #[test]
    fn checksums_are_written_for_all_frames_or_none() {
        assert_eq!(encode_seek_table(&[(1, 1, Some(7)), (1, 1, None)]).len(), 8 + 2 * 8 + 9);
        assert_eq!(encode_seek_table(&[(1, 1, Some(7)), (1, 1, Some(8))]).len(), 8 + 2 * 12 + 9);
        assert_eq!(encode_seek_table(&[]).len(), 8 + 9);
    }
}
