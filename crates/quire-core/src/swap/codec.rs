//! Pages as they lie in a swap file: compressed, encrypted, or as they are.
//!
//! A *packed* slot begins with a header, which is not compressed, and is filled up with zeros:
//!
//! ```text
//!    0   4     8     12       16      28          44                   whole blocks
//!   ┌───┬─────┬─────┬────────┬───────┬───────────┬─────────────────┬───────┐
//!   │   │raw  │bytes│encoding│ nonce │ tag       │ bytes           │ zeros │
//!   └───┴─────┴─────┴────────┴───────┴───────────┴─────────────────┴───────┘
//! ```
//!
//! `raw` and `bytes` are the lengths of the page and of what is stored of it; integers are
//! little-endian. The tag is that of AES-GCM over the bytes with the slot's first block and the fields
//! before the nonce as associated data; without encryption it is the xxh64 of the same, seeded with
//! the first block, and 8 zeros, and the nonce is zeros. It is checked before anything is decoded, so
//! no decoder ever sees damaged bytes.
//!
//! A page that would not get smaller is stored as it is, without a header, when nothing is encrypted.
//! Compression and encryption together show a reader of the disk how well each page compresses.

use lz4_flex::block::{self as lz4, CompressTable};
use xxhash_rust::xxh64::xxh64;
use zstd_safe::{CCtx, DCtx};

use super::seal::{NONCE_BYTES, Sealer, TAG_BYTES};
use super::slots::BLOCK_BYTES;
use crate::errors::OpenError;
use crate::sys::fork::ForkMutex;

/// How pages are made smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// LZ4: fast.
    Lz4,
    /// Zstandard at level 1: smaller.
    Zstd,
}

const NONCE_AT: usize = 16;
const TAG_AT: usize = NONCE_AT + NONCE_BYTES;
pub(super) const HEADER_BYTES: usize = TAG_AT + TAG_BYTES;
const MAGIC: [u8; 4] = *b"qsw1";
const ZSTD_LEVEL: i32 = 1;
/// Workspaces kept for the next call.
const KEPT_MAX: usize = 4;
/// Bytes of a workspace for pages of up to 32 MiB: a table of 4096 words; what a test holds zstd to.
const WORKSPACE_LZ4_BYTES: u64 = 20 << 10;
const WORKSPACE_ZSTD_BYTES: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Encoding {
    Raw = 0,
    Lz4 = 1,
    Zstd = 2,
}

/// A page in a buffer behind the place for its header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draft {
    raw: usize,
    stored: usize,
    encoding: Encoding,
}

impl Draft {
    /// Blocks of the slot it needs.
    pub fn blocks(self) -> u64 {
        blocks_of(HEADER_BYTES + self.stored)
    }
}

/// Why a slot gave no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Damage {
    /// Its bytes are not those that were written.
    Changed,
    /// They are, but are a page of this many bytes.
    Length(usize),
    /// No memory to decode it.
    NoMemory,
}

#[derive(Default)]
struct Workspace {
    table: Option<CompressTable>,
    encoder: Option<CCtx<'static>>,
    decoder: Option<DCtx<'static>>,
}

/// How one swap stores pages.
pub(super) struct Codec {
    compression: Compression,
    sealer: Option<Sealer>,
    kept: ForkMutex<Vec<Workspace>>,
}

/// Blocks that hold so many bytes.
pub(super) fn blocks_of(bytes: usize) -> u64 {
    (bytes as u64).div_ceil(BLOCK_BYTES)
}

/// What a slot in memory keeps of a tag.
fn check_of(tag: &[u8]) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| tag[i]))
}

/// The check of a page that is stored as it is, in a slot that begins at block `first`.
pub(super) fn plain_check(first: u64, bytes: &[u8]) -> u64 {
    xxh64(bytes, first)
}

impl Codec {
    /// The codec of a new swap; makes its key.
    pub fn new(compression: Compression, encrypt: bool) -> Result<Self, OpenError> {
        let sealer = encrypt.then(Sealer::new).transpose()?;
        Ok(Codec { compression, sealer, kept: ForkMutex::new(Vec::new()) })
    }

    /// Whether every page is stored as it is.
    pub fn is_plain(&self) -> bool {
        self.compression == Compression::None && self.sealer.is_none()
    }

    /// Bytes of the buffer that packing or opening a page of `len` bytes takes.
    pub fn buffer_bytes(&self, len: usize) -> usize {
        if self.is_plain() {
            return 0;
        }
        let stored = match self.compression {
            Compression::Lz4 => lz4::get_maximum_output_size(len),
            Compression::None | Compression::Zstd => len,
        };
        blocks_of(HEADER_BYTES + stored) as usize * BLOCK_BYTES as usize
    }

    /// Bytes of one workspace.
    pub fn workspace_bytes(&self) -> u64 {
        match self.compression {
            Compression::None => 0,
            Compression::Lz4 => WORKSPACE_LZ4_BYTES,
            Compression::Zstd => WORKSPACE_ZSTD_BYTES,
        }
    }

    /// Bytes that stay allocated between calls.
    pub fn standing_bytes(&self) -> u64 {
        KEPT_MAX as u64 * self.workspace_bytes()
    }

    /// Writes a page into `buffer` (of [`Codec::buffer_bytes`]) behind the place for a header; `None`
    /// when it is best stored as it is.
    pub fn pack(&self, bytes: &[u8], buffer: &mut [u8]) -> Option<Draft> {
        let raw = bytes.len();
        let as_it_is = if self.sealer.is_some() { HEADER_BYTES + raw } else { raw };
        // At least one block must be saved.
        let room = (blocks_of(as_it_is) - 1) as usize * BLOCK_BYTES as usize;
        if let Some(room) = room.checked_sub(HEADER_BYTES).filter(|room| *room > 0)
            && let Some((encoding, stored)) = self.compress(bytes, &mut buffer[HEADER_BYTES..], room)
        {
            return Some(Draft { raw, stored, encoding });
        }
        self.sealer.as_ref()?;
        buffer[HEADER_BYTES..HEADER_BYTES + raw].copy_from_slice(bytes);
        Some(Draft { raw, stored: raw, encoding: Encoding::Raw })
    }

    /// Compresses to at most `room` bytes. A codec that has no memory counts as one that does not
    /// make the page smaller: eviction is what frees memory.
    fn compress(&self, bytes: &[u8], out: &mut [u8], room: usize) -> Option<(Encoding, usize)> {
        if self.compression == Compression::None {
            return None;
        }
        let mut space = self.take_workspace();
        let made = match self.compression {
            Compression::None => None,
            Compression::Lz4 => {
                let table = space.table.get_or_insert_with(CompressTable::large);
                let stored = lz4::compress_into_with_table(bytes, out, table).ok();
                stored.filter(|stored| *stored <= room).map(|stored| (Encoding::Lz4, stored))
            }
            Compression::Zstd => {
                space.encoder = space.encoder.or_else(CCtx::try_create);
                let encoder = space.encoder.as_mut();
                let stored =
                    encoder.and_then(|encoder| encoder.compress(&mut out[..room], bytes, ZSTD_LEVEL).ok());
                stored.map(|stored| (Encoding::Zstd, stored))
            }
        };
        self.give_workspace(space);
        made
    }

    /// Makes the header, encrypts, and fills the last block up, for a slot that begins at block
    /// `first`; gives the slot's check. `None` when it cannot be encrypted.
    pub fn seal(&self, draft: Draft, first: u64, buffer: &mut [u8]) -> Option<u64> {
        let end = HEADER_BYTES + draft.stored;
        buffer[end..(draft.blocks() * BLOCK_BYTES) as usize].fill(0);
        let (header, bytes) = buffer[..end].split_at_mut(HEADER_BYTES);
        header.fill(0);
        let lengths = [draft.raw as u32, draft.stored as u32, draft.encoding as u32];
        header[..4].copy_from_slice(&MAGIC);
        for (place, value) in header[4..NONCE_AT].chunks_exact_mut(4).zip(lengths) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        let context = context(first, header);
        match &self.sealer {
            Some(sealer) => {
                let (nonce, tag) = sealer.seal(&context, bytes)?;
                header[NONCE_AT..TAG_AT].copy_from_slice(&nonce);
                header[TAG_AT..].copy_from_slice(&tag);
            }
            None => header[TAG_AT..].copy_from_slice(&checksum(&context, bytes)),
        }
        Some(check_of(&header[TAG_AT..]))
    }

    /// Gives the page of a packed slot that begins at block `first` and whose blocks are in `buffer`.
    pub fn open(&self, first: u64, check: u64, buffer: &mut [u8], out: &mut [u8]) -> Result<(), Damage> {
        let (header, bytes) = buffer.split_at_mut_checked(HEADER_BYTES).ok_or(Damage::Changed)?;
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i])) as usize;
        let (raw, stored, encoding) = (number(4), number(8), number(12));
        let bytes = bytes.get_mut(..stored).ok_or(Damage::Changed)?;
        if header[..4] != MAGIC || check_of(&header[TAG_AT..]) != check {
            return Err(Damage::Changed);
        }
        let context = context(first, header);
        let nonce = std::array::from_fn(|i| header[NONCE_AT + i]);
        let tag: [u8; TAG_BYTES] = std::array::from_fn(|i| header[TAG_AT + i]);
        let authentic = match &self.sealer {
            Some(sealer) => sealer.open(nonce, tag, &context, bytes),
            None => tag == checksum(&context, bytes),
        };
        if !authentic {
            return Err(Damage::Changed);
        }
        if raw != out.len() {
            return Err(Damage::Length(raw));
        }
        self.decompress(encoding, bytes, out)
    }

    fn decompress(&self, encoding: usize, bytes: &[u8], out: &mut [u8]) -> Result<(), Damage> {
        const RAW: usize = Encoding::Raw as usize;
        const LZ4: usize = Encoding::Lz4 as usize;
        const ZSTD: usize = Encoding::Zstd as usize;
        let decoded = match encoding {
            RAW if bytes.len() == out.len() => {
                out.copy_from_slice(bytes);
                Some(bytes.len())
            }
            LZ4 => lz4::decompress_into(bytes, out).ok(),
            ZSTD => {
                let mut space = self.take_workspace();
                space.decoder = space.decoder.or_else(DCtx::try_create);
                let decoder = space.decoder.as_mut().ok_or(Damage::NoMemory)?;
                let decoded = decoder.decompress(out, bytes).ok();
                self.give_workspace(space);
                decoded
            }
            _ => None,
        };
        if decoded == Some(out.len()) { Ok(()) } else { Err(Damage::Changed) }
    }

    fn take_workspace(&self) -> Workspace {
        self.kept.lock().pop().unwrap_or_default()
    }

    fn give_workspace(&self, space: Workspace) {
        let mut kept = self.kept.lock();
        if kept.len() < KEPT_MAX {
            kept.push(space);
            return;
        }
        drop(kept);
        drop(space);
    }

    /// Forgets locks and locks the key's memory again.
    ///
    /// # Safety
    /// Only in the child of a fork while it has one thread.
    #[allow(unsafe_code)]
    pub unsafe fn after_fork_in_child(&self) {
        // SAFETY: one thread (contract); the workspaces of the parent are leaked.
        unsafe { self.kept.replace_in_child(Vec::new()) }
        if let Some(sealer) = &self.sealer {
            // Refused, the key stays readable all the same; the child may read its parent's pages.
            let _ = sealer.relock();
        }
    }
}

/// What is authenticated beside the bytes.
fn context(first: u64, header: &[u8]) -> [u8; 8 + NONCE_AT] {
    let mut context = [0; 8 + NONCE_AT];
    context[..8].copy_from_slice(&first.to_le_bytes());
    context[8..].copy_from_slice(&header[..NONCE_AT]);
    context
}

fn checksum(context: &[u8], bytes: &[u8]) -> [u8; TAG_BYTES] {
    let mut tag = [0; TAG_BYTES];
    tag[..8].copy_from_slice(&xxh64(bytes, xxh64(context, 0)).to_le_bytes());
    tag
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_takes_no_more_than_is_said() {
        let codec = Codec::new(Compression::Zstd, false).unwrap();
        for len in [4 << 10, 64 << 10, 2 << 20, 32 << 20] {
            let page: Vec<u8> = (0..len as u32).map(|i| (i / 7 % 251 * (i / 4096)) as u8).collect();
            let mut buffer = vec![0; codec.buffer_bytes(len)];
            let draft = codec.pack(&page, &mut buffer);
            assert!(draft.is_some() || len == 4 << 10);
            if let Some(draft) = draft {
                let check = codec.seal(draft, 3, &mut buffer).unwrap();
                let mut back = vec![0; len];
                codec.open(3, check, &mut buffer, &mut back).unwrap();
                assert!(back == page);
            }
        }
        let space = codec.take_workspace();
        let taken = space.encoder.unwrap().sizeof() + space.decoder.unwrap().sizeof();
        assert!(taken as u64 <= WORKSPACE_ZSTD_BYTES, "{taken}");
    }

    #[test]
    fn a_page_of_another_length_is_told_from_damage() {
        let codec = Codec::new(Compression::Lz4, true).unwrap();
        let page = [5; 8192];
        let mut buffer = vec![0; codec.buffer_bytes(page.len())];
        let draft = codec.pack(&page, &mut buffer).unwrap();
        assert_eq!(draft.blocks(), 1);
        let check = codec.seal(draft, 9, &mut buffer).unwrap();
        let sealed = buffer.clone();
        assert_eq!(codec.open(9, check, &mut buffer, &mut [0; 4096]), Err(Damage::Length(8192)));
        buffer.copy_from_slice(&sealed);
        assert_eq!(codec.open(10, check, &mut buffer, &mut [0; 8192]), Err(Damage::Changed));
        buffer.copy_from_slice(&sealed);
        assert_eq!(codec.open(9, check ^ 1, &mut buffer, &mut [0; 8192]), Err(Damage::Changed));
        assert_eq!(codec.open(9, check, &mut [0; 20], &mut [0; 8192]), Err(Damage::Changed));
    }
}
