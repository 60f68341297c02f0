//! Errors of the core: one enum per layer. The codes of [`FaultCode`] are stable: they cross
//! into Python by number (`crates/quire-py/src/errors.rs`) and may be logged.

use std::sync::Arc;

use crate::units::ByteOffset;

/// What an error of the system says, without its number: errors carry that beside the words.
pub fn words_of(error: &std::io::Error) -> String {
    let words = error.to_string();
    words.find(" (os error").map_or(words.clone(), |end| words[..end].to_owned())
}

/// Why a store could not give bytes. The numbers are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FaultCode {
    /// The operating system or the server refused the read; `errno` says why where it is known.
    Io = 1,
    /// The source is shorter than it was at open.
    Truncated = 2,
    /// The source is no longer the one that was opened (ETag, inode, mtime).
    Changed = 3,
    /// The container's bytes do not decode.
    Corrupt = 4,
    /// The bytes decode but their checksum does not match.
    Checksum = 5,
    /// The external pager's process ended and could not be started again.
    PagerDied = 6,
    /// No answer within the mapping's deadline.
    Timeout = 7,
    /// The wait was ended by an interrupt (Ctrl-C).
    Interrupted = 8,
    /// The store was closed while the read waited.
    Closed = 9,
    /// A write reached a mapping that is read-only.
    Protection = 10,
    /// The swap space is used up.
    SwapFull = 11,
    /// A dirty page could not be written back; it is dirty still.
    WriteBack = 12,
}

impl FaultCode {
    /// The code of a stable number.
    pub fn from_number(number: u8) -> Option<FaultCode> {
        use FaultCode::{
            Changed, Checksum, Closed, Corrupt, Interrupted, Io, PagerDied, Protection, SwapFull, Timeout,
            Truncated, WriteBack,
        };
        [
            Io,
            Truncated,
            Changed,
            Corrupt,
            Checksum,
            PagerDied,
            Timeout,
            Interrupted,
            Closed,
            Protection,
            SwapFull,
            WriteBack,
        ]
        .into_iter()
        .find(|code| *code as u8 == number)
    }

    /// Whether the page can be had again once the error was told: nothing is lost, and what stood in
    /// the way (an interrupt, a full disk) may have gone.
    pub fn is_passing(self) -> bool {
        matches!(self, FaultCode::Interrupted | FaultCode::SwapFull | FaultCode::WriteBack)
    }

    /// Whether the same read may succeed when it is tried again.
    pub fn is_transient(self) -> bool {
        matches!(self, FaultCode::Io)
    }
}

/// A store could not fill a buffer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} (offset {offset})")]
pub struct StoreError {
    /// The kind of failure.
    pub code: FaultCode,
    /// Offset in the store the error speaks of: where the read that failed began.
    pub offset: ByteOffset,
    /// The operating system's error number, where there is one.
    pub errno: Option<i32>,
    /// One sentence for a person: what failed and, where it can be said, what to do next.
    pub message: String,
    /// Label of the part that failed, which `offset` is of, in a store that consists of several.
    pub part: Option<Arc<str>>,
}

impl StoreError {
    /// An error without an errno.
    pub fn new(code: FaultCode, offset: ByteOffset, message: impl Into<String>) -> Self {
        StoreError { code, offset, errno: None, message: message.into(), part: None }
    }

    /// An error that carries what the operating system said.
    pub fn from_io(offset: ByteOffset, what: &str, error: &std::io::Error) -> Self {
        StoreError {
            code: FaultCode::Io,
            offset,
            errno: error.raw_os_error(),
            message: format!("{what}: {}", words_of(error)),
            part: None,
        }
    }

    /// What failed, in a store of this label.
    pub fn source_in<'a>(&'a self, label: &'a str) -> &'a str {
        self.part.as_deref().unwrap_or(label)
    }
}

/// A source could not be opened as a store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The operating system or the external pager refused.
    #[error("{message}")]
    Io {
        /// The operating system's error number, where there is one.
        errno: Option<i32>,
        /// One sentence for a person.
        message: String,
    },
    /// The bytes are not of the format that was asked for; the sentence says what to do next.
    #[error("{0}")]
    Format(String),
}

/// A mapping could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// No pmap of that name, or it does not work here; the sentence says why and the remedy.
    #[error("{0}")]
    Pmap(String),
    /// The budget cannot hold what the mapping needs to make progress.
    #[error("{0}")]
    Budget(String),
    /// A parameter is out of range (granule, size).
    #[error("{0}")]
    Invalid(String),
    /// A system call failed.
    #[error("{call}: {message}")]
    Sys {
        /// Name of the system call.
        call: &'static str,
        /// Its errno.
        errno: i32,
        /// What the system says of that errno.
        message: String,
    },
}

impl MapError {
    /// The error of the system call `call`, with this errno.
    pub fn sys(call: &'static str, errno: i32) -> Self {
        MapError::Sys { call, errno, message: words_of(&std::io::Error::from_raw_os_error(errno)) }
    }

    /// The same, from the thread's errno.
    pub fn last(call: &'static str) -> Self {
        Self::sys(call, std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}
