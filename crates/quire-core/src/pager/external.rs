//! The external pager (as in Mach): a store that lives in another process, so that a store written
//! in Python never runs on the fault path. When the process dies it is started again from its
//! recipe; when that does not help, reads fail with `PagerDied`.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::channel::{Channel, NoAnswer, Shape};
use crate::errors::{FaultCode, OpenError, StoreError, words_of};
use crate::interrupt;
use crate::store::Store;
use crate::sys::fork::ForkMutex;
use crate::sys::process;
use crate::units::{ByteCount, ByteOffset};

/// Starts of the process for one read before it is given up.
const STARTS_MAX: u32 = 3;

/// What is needed to start the pager process, and again.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Program and arguments; the core appends descriptors and the shape.
    pub argv: Vec<String>,
    /// Opaque bytes for the process (a pickled store).
    pub bytes: Vec<u8>,
    /// Size of the shared memory.
    pub shape: Shape,
    /// Longest wait for one answer, and for the process to say hello.
    pub timeout: Duration,
}

/// Facts of the store from the first hello; a pager that is started again must repeat them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Bytes of the store.
    pub size: ByteCount,
    /// What errors name.
    pub label: String,
    /// Version of the object (ETag, mtime), where the store has one.
    pub version: Option<String>,
}

/// Reads the facts out of a hello packet's JSON; given by the interpreter's side.
pub type ReadHello = fn(&[u8]) -> Result<Facts, OpenError>;

/// A store in another process.
pub struct ExternalStore {
    recipe: Recipe,
    facts: Facts,
    hello: Vec<u8>,
    read_hello: ReadHello,
    channel: ForkMutex<Option<Arc<Channel>>>,
    /// The channel's socket, for the child of a fork to close; -1 without a channel.
    control: AtomicI32,
    closed: AtomicBool,
    fetched: AtomicU64,
    /// Ctrl-C ends waits for as long as the store lives.
    _watch: Watch,
}

/// Pairs `interrupt::watch` with `unwatch`.
struct Watch;

impl Watch {
    fn start() -> Self {
        interrupt::watch();
        Watch
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        interrupt::unwatch();
    }
}

impl ExternalStore {
    /// Starts the process and waits for its hello, asking `go_on` about every 20 ms.
    ///
    /// # Errors
    /// When the process cannot be started or refuses the source.
    pub fn open(
        recipe: Recipe,
        read_hello: ReadHello,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Self, OpenError> {
        let (channel, hello) = start(&recipe, go_on)?;
        match read_hello(&hello) {
            Ok(facts) => Ok(ExternalStore {
                _watch: Watch::start(),
                recipe,
                facts,
                hello,
                read_hello,
                control: AtomicI32::new(channel.control()),
                channel: ForkMutex::new(Some(channel)),
                closed: AtomicBool::new(false),
                fetched: AtomicU64::new(0),
            }),
            Err(error) => {
                channel.end();
                Err(error)
            }
        }
    }

    /// The first hello packet.
    pub fn hello(&self) -> &[u8] {
        &self.hello
    }

    /// The store's version, where it has one.
    pub fn version(&self) -> Option<&str> {
        self.facts.version.as_deref()
    }

    /// Process id of the pager, when one runs.
    pub fn pid(&self) -> Option<i32> {
        self.channel.lock().as_ref().filter(|channel| !channel.is_dead()).map(|channel| channel.pid())
    }

    fn error(&self, code: FaultCode, offset: ByteOffset, message: String) -> StoreError {
        StoreError::new(code, offset, message)
    }

    /// The running channel, started again if it died.
    fn channel(&self, offset: ByteOffset, starts: &mut u32) -> Result<Arc<Channel>, StoreError> {
        let mut current = self.channel.lock();
        if self.closed.load(Ordering::Acquire) {
            return Err(self.error(FaultCode::Closed, offset, "the store is closed".into()));
        }
        if let Some(channel) = current.as_ref().filter(|channel| !channel.is_dead()) {
            return Ok(Arc::clone(channel));
        }
        if *starts >= STARTS_MAX {
            let message = format!("the pager process died, and again after {STARTS_MAX} starts");
            return Err(self.error(FaultCode::PagerDied, offset, message));
        }
        *starts += 1;
        let died = |error: OpenError| {
            let (errno, reason) = match error {
                OpenError::Io { errno, message } => (errno, message),
                OpenError::Format(message) => (None, message),
            };
            let code = if interrupt::pending() { FaultCode::Interrupted } else { FaultCode::PagerDied };
            let message = format!("the pager process died and could not be started again: {reason}");
            StoreError { code, offset, errno, message, part: None }
        };
        let closed = &self.closed;
        let mut go_on = || !interrupt::pending() && !closed.load(Ordering::Acquire);
        let (channel, hello) = start(&self.recipe, &mut go_on).map_err(died)?;
        let facts = (self.read_hello)(&hello).map_err(died)?;
        if facts != self.facts {
            channel.end();
            let message = format!("the source changed: it was {:?}, now it is {facts:?}", self.facts);
            return Err(self.error(FaultCode::Changed, offset, message));
        }
        self.control.store(channel.control(), Ordering::Release);
        *current = Some(Arc::clone(&channel));
        Ok(channel)
    }

    /// One attempt on one channel: asks for all chunks, as many at once as there are slots.
    fn read_once(&self, channel: &Channel, offset: ByteOffset, buf: &mut [u8]) -> Result<(), NoAnswer> {
        let deadline = Instant::now() + self.recipe.timeout;
        let mut at = offset;
        let mut asked: Vec<(u32, ByteOffset, &mut [u8])> = Vec::new();
        let in_flight = (self.recipe.shape.slots as usize / 2).max(1);
        let mut result = Ok(());
        let mut chunks = buf.chunks_mut(self.recipe.shape.slot_bytes).peekable();
        while result.is_ok() && (chunks.peek().is_some() || !asked.is_empty()) {
            let taken = match chunks.peek() {
                Some(_) if asked.is_empty() => channel.take_slot(at, deadline).map(Some),
                Some(_) if asked.len() < in_flight => Ok(channel.try_take_slot()),
                _ => Ok(None),
            };
            match taken {
                Ok(Some(slot)) => {
                    let chunk = chunks.next().expect("peeked");
                    result = channel.ask(slot, at, chunk.len());
                    let next = at.0 + chunk.len() as u64;
                    asked.push((slot, at, chunk));
                    at = ByteOffset(next);
                }
                Ok(None) => {
                    let (slot, at, chunk) = asked.remove(0);
                    result = channel.wait_answer(slot, at, chunk, deadline);
                }
                Err(reason) => result = Err(reason),
            }
        }
        asked.into_iter().for_each(|(slot, ..)| channel.abandon(slot));
        result
    }
}

impl Store for ExternalStore {
    fn size(&self) -> ByteCount {
        self.facts.size
    }

    fn label(&self) -> &str {
        &self.facts.label
    }

    fn read_at(&self, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        interrupt::watch_again();
        let mut starts = 0;
        loop {
            let channel = self.channel(offset, &mut starts)?;
            match self.read_once(&channel, offset, buf) {
                Ok(()) => {
                    self.fetched.fetch_add(buf.len() as u64, Ordering::Relaxed);
                    return Ok(());
                }
                Err(NoAnswer::Failed(error)) => return Err(error),
                Err(NoAnswer::Dead) => channel.end(),
            }
        }
    }

    fn run(&self) -> ByteCount {
        ByteCount(self.recipe.shape.slot_bytes as u64)
    }

    fn is_slow(&self) -> bool {
        true
    }

    fn standing_bytes(&self) -> ByteCount {
        ByteCount(u64::from(self.recipe.shape.slots) * self.recipe.shape.slot_bytes as u64)
    }

    fn bytes_fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.control.store(-1, Ordering::Release);
        if let Some(channel) = self.channel.lock().take() {
            channel.end();
        }
    }

    #[allow(unsafe_code)]
    fn after_fork_in_child(&self) {
        // The parent's pager sees its end only when nobody else holds the socket.
        process::close_inherited(self.control.swap(-1, Ordering::AcqRel));
        // SAFETY: called with one thread (the trait's contract). The parent's channel is leaked:
        // the process belongs to the parent; the next read starts one of our own.
        unsafe { self.channel.replace_in_child(None) }
    }
}

impl Drop for ExternalStore {
    fn drop(&mut self) {
        self.close();
    }
}

fn start(recipe: &Recipe, go_on: &mut dyn FnMut() -> bool) -> Result<(Arc<Channel>, Vec<u8>), OpenError> {
    let failed = |error: std::io::Error| OpenError::Io {
        errno: error.raw_os_error(),
        message: format!("the pager process ({}) did not start: {}", recipe.argv.join(" "), words_of(&error)),
    };
    let bytes = recipe_memory(&recipe.bytes).map_err(failed)?;
    Channel::start(&recipe.argv, &bytes, recipe.shape, recipe.timeout, go_on).map_err(failed)
}

fn recipe_memory(bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let mut file = std::fs::File::from(process::shared_memory("quire-recipe", 0)?);
    file.write_all(bytes)?;
    std::io::Seek::rewind(&mut file)?;
    Ok(file.into())
}
