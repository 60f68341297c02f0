//! Frames of one size in anonymous memory of their own: few map entries for many frames, and the
//! memory of a frame goes back to the system when it is vacated.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::memory::{self, Range};

/// Bytes of address space taken at once at least; each time as much as there is already.
const CHUNK: usize = 2 << 20;

struct Chunk(Range);

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: own range; each frame of it holds the chunk, so none is left.
        unsafe { memory::unmap(self.0) }
    }
}

/// A frame, whose bytes are its owner's alone.
pub struct Frame {
    range: Range,
    _chunk: Arc<Chunk>,
}

impl Frame {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped read-write while the chunk lives; frames do not overlap and are not copied.
        unsafe { std::slice::from_raw_parts(self.range.start as *const u8, self.range.len) }
    }

    /// Its bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; exclusive by `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.range.start as *mut u8, self.range.len) }
    }
}

/// Where frames come from.
pub struct Arena {
    frame: usize,
    /// Address space taken so far.
    taken: usize,
    vacant: Vec<Frame>,
}

impl Arena {
    /// Of frames of so many bytes, whole hardware pages; takes nothing yet.
    pub fn new(frame: usize) -> Self {
        Arena { frame, taken: 0, vacant: Vec::new() }
    }

    /// A frame of unspecified content; none when the address space has no room.
    pub fn take(&mut self) -> Option<Frame> {
        if self.vacant.is_empty() {
            let frames = (self.taken.max(CHUNK) / self.frame).max(1);
            let range = memory::reserve(frames * self.frame, libc::PROT_READ | libc::PROT_WRITE).ok()?;
            // SAFETY: a new range of ours. A forked child has no use for it.
            let _ = unsafe { memory::advise(range, libc::MADV_DONTFORK) };
            self.taken += range.len;
            let chunk = Arc::new(Chunk(range));
            // The first is given out first, so that neighbours share page tables.
            self.vacant.extend((0..frames).rev().map(|index| Frame {
                range: Range { start: range.start + index * self.frame, len: self.frame },
                _chunk: Arc::clone(&chunk),
            }));
        }
        self.vacant.pop()
    }

    /// Takes frames back and frees their memory.
    pub fn vacate(&mut self, frames: Vec<Frame>) {
        let ranges: Vec<Range> = frames.iter().map(|frame| frame.range).collect();
        if !ranges.is_empty() {
            // SAFETY: frames that were just given up: nobody else refers to their bytes.
            unsafe { memory::discard(&ranges) }
        }
        self.vacant.extend(frames);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_apart_and_vacated_ones_lose_their_bytes() {
        let page = memory::page_bytes();
        let mut arena = Arena::new(page);
        let mut frames: Vec<Frame> = (0..1500).map(|_| arena.take().unwrap()).collect();
        for (index, frame) in frames.iter_mut().enumerate() {
            frame.bytes_mut().fill(index as u8);
        }
        for (index, frame) in frames.iter().enumerate() {
            assert!(frame.bytes().iter().all(|byte| *byte == index as u8));
        }
        let taken = arena.taken;
        let gone = frames.split_off(1000);
        let start = gone[0].range.start;
        arena.vacate(gone);
        assert_eq!(memory::is_present(start), Some(false));
        frames.extend((0..500).map(|_| arena.take().unwrap()));
        assert_eq!(arena.taken, taken, "vacant frames are used again");
        drop(arena);
        assert_eq!(frames[1].bytes()[0], 1, "a frame outlives its arena");
    }

    #[test]
    fn a_frame_may_be_larger_than_a_chunk() {
        let mut arena = Arena::new(2 * CHUNK);
        arena.take().unwrap().bytes_mut().fill(1);
        assert_eq!(arena.taken, 2 * CHUNK);
    }
}
