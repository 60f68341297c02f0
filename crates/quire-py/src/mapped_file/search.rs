//! Bytes in bytes.
#![allow(unsafe_code)]

use memchr::memmem;

/// So much is searched by looking at each place of the first byte: cheaper than to prepare for more.
const NEAR: usize = 512;

/// The first place of a byte. By the C library's function: it knows this processor.
#[inline]
pub fn first_byte(bytes: &[u8], byte: u8) -> Option<usize> {
    let start = bytes.as_ptr();
    // SAFETY: looks at no more than the slice.
    let found = unsafe { libc::memchr(start.cast(), byte.into(), bytes.len()) };
    (!found.is_null()).then(|| found as usize - start as usize)
}

/// The last place of a byte.
fn last_byte(bytes: &[u8], byte: u8) -> Option<usize> {
    let start = bytes.as_ptr();
    // SAFETY: looks at no more than the slice.
    let found = unsafe { libc::memrchr(start.cast(), byte.into(), bytes.len()) };
    (!found.is_null()).then(|| found as usize - start as usize)
}

/// The first place of a needle.
pub fn first(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    let [byte, rest @ ..] = needle else { return Some(0) };
    let last = bytes.len().checked_sub(needle.len())?;
    if rest.is_empty() {
        return first_byte(bytes, *byte);
    }
    let near = (last + 1).min(NEAR);
    let mut at = 0;
    while let Some(next) = first_byte(&bytes[at..near], *byte) {
        at += next;
        if bytes[at + 1..].starts_with(rest) {
            return Some(at);
        }
        at += 1;
    }
    if near > last { None } else { memmem::find(&bytes[near..], needle).map(|at| near + at) }
}

/// The last place of a needle.
pub fn last(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    match needle {
        [byte] => last_byte(bytes, *byte),
        _ => memmem::rfind(bytes, needle),
    }
}
