//! One running pager process and the memory shared with it.
//!
//! ```text
//!   control socket (SOCK_SEQPACKET)         shared memory (memfd), SLOTS x SLOT_BYTES
//!     pager -> core  'H' + json | 'E' + json     slot i's answer at i * SLOT_BYTES
//!     core -> pager  u32 slot, u32 length, u64 offset
//!     pager -> core  u32 slot, i32 code (0 ok, else FaultCode), i32 errno, utf-8 message
//! ```
//!
//! Many requests are in flight, one per slot. One of the threads that wait for an answer *leads*: it
//! reads the socket, wakes the owner of each answer, and passes the lead on when its own has come.
//! So a lone request costs no hop between threads. Whoever meets the end of the socket fails all
//! that wait. A waiter that gives up leaves its slot to the leader that reads the late answer.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::errors::{FaultCode, StoreError};
use crate::interrupt;
use crate::sys::futex;
use crate::sys::lock::Mutex;
use crate::sys::process::{self, Child, SharedView};
use crate::units::ByteOffset;

const HELLO_MAX: usize = 64 << 10;
const ANSWER_MAX: usize = 1024;
/// How long a pager may take to end after its socket is closed.
const GRACE: Duration = Duration::from_secs(2);

/// Size of the shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Requests in flight at most.
    pub slots: u32,
    /// Bytes of the longest answer.
    pub slot_bytes: usize,
}

const FREE: u32 = 0;
const ASKED: u32 = 1;
const ANSWERED: u32 = 2;
const ABANDONED: u32 = 3;
const DEAD: u32 = 4;

struct Slot {
    state: AtomicU32,
    answer: Mutex<(i32, i32, String)>,
}

/// Why a wait for an answer ended without one.
pub enum NoAnswer {
    /// The process is gone.
    Dead,
    /// Another reason, final for this read.
    Failed(StoreError),
}

/// A running pager process.
pub struct Channel {
    shape: Shape,
    control: OwnedFd,
    view: SharedView,
    slots: Vec<Slot>,
    dead: AtomicBool,
    leader: AtomicBool,
    /// Changes whenever a slot becomes free or the process ends.
    freed: AtomicU32,
    pid: i32,
    child: Mutex<Option<Child>>,
}

impl Channel {
    /// Starts a pager process and waits for its first packet, asking `go_on` about every 20 ms.
    ///
    /// # Errors
    /// When the process cannot be started, ends, or `go_on` returns false (EINTR) or `limit`
    /// passes (ETIMEDOUT) before it says hello.
    pub fn start(
        argv: &[String],
        recipe: &OwnedFd,
        shape: Shape,
        limit: Duration,
        go_on: &mut dyn FnMut() -> bool,
    ) -> io::Result<(Arc<Self>, Vec<u8>)> {
        let bytes = shape.slots as usize * shape.slot_bytes;
        let (control, theirs) = process::packet_pair()?;
        let memory = process::shared_memory("quire-pager", bytes)?;
        let view = SharedView::new(&memory, bytes)?;
        let mut words = argv.to_vec();
        for fd in [theirs.as_raw_fd(), memory.as_raw_fd(), recipe.as_raw_fd()] {
            words.push(fd.to_string());
        }
        words.push(shape.slots.to_string());
        words.push(shape.slot_bytes.to_string());
        let keep = [theirs.as_raw_fd(), memory.as_raw_fd(), recipe.as_raw_fd()];
        let child = Child::spawn(&words, &keep)?;
        drop(theirs);
        let hello = match wait_hello(&control, limit, go_on) {
            Ok(hello) => hello,
            Err(error) => {
                drop(control);
                child.reap(Duration::ZERO);
                return Err(error);
            }
        };
        let slot = || Slot { state: AtomicU32::new(FREE), answer: Mutex::new((0, 0, String::new())) };
        let channel = Arc::new(Channel {
            shape,
            control,
            view,
            slots: (0..shape.slots).map(|_| slot()).collect(),
            dead: AtomicBool::new(false),
            leader: AtomicBool::new(false),
            freed: AtomicU32::new(0),
            pid: child.id(),
            child: Mutex::new(Some(child)),
        });
        Ok((channel, hello))
    }

    /// The pager's process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Number of the control socket.
    pub fn control(&self) -> i32 {
        self.control.as_raw_fd()
    }

    /// Whether the process is gone.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Hangs up, waits for the process to end, at most [`GRACE`], and fails who waits for it.
    pub fn end(&self) {
        self.end_within(GRACE);
    }

    fn end_within(&self, grace: Duration) {
        process::shut_down(self.control.as_raw_fd());
        if let Some(child) = self.child.lock().take() {
            child.reap(grace);
        }
        self.dead.store(true, Ordering::Release);
        for slot in &self.slots {
            let asked = slot.state.compare_exchange(ASKED, DEAD, Ordering::AcqRel, Ordering::Acquire);
            if asked.is_ok() {
                futex::wake_all(&slot.state);
            }
        }
        self.ring();
    }

    /// Takes a free slot, if there is one.
    pub fn try_take_slot(&self) -> Option<u32> {
        let take =
            |slot: &Slot| slot.state.compare_exchange(FREE, ASKED, Ordering::AcqRel, Ordering::Relaxed);
        self.slots.iter().position(|slot| take(slot).is_ok()).map(|index| index as u32)
    }

    /// Takes a free slot, waiting for one until `deadline`. For threads that hold none: if those
    /// that hold some waited for more, all could wait for each other.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub fn take_slot(&self, offset: ByteOffset, deadline: Instant) -> Result<u32, NoAnswer> {
        loop {
            let seen = self.freed.load(Ordering::Acquire);
            if self.is_dead() {
                return Err(NoAnswer::Dead);
            }
            if let Some(slot) = self.try_take_slot() {
                return Ok(slot);
            }
            check_patience(offset, deadline)?;
            if !self.lead() {
                futex::wait(&self.freed, seen, interrupt::LOOK);
            }
        }
    }

    /// Sends the request of a taken slot.
    ///
    /// # Errors
    /// [`NoAnswer::Dead`]: the slot is lost with the process.
    pub fn ask(&self, slot: u32, offset: ByteOffset, len: usize) -> Result<(), NoAnswer> {
        assert!(len <= self.shape.slot_bytes, "an answer fits its slot");
        let mut packet = [0; 16];
        packet[..4].copy_from_slice(&slot.to_le_bytes());
        packet[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        packet[8..].copy_from_slice(&offset.0.to_le_bytes());
        process::send_packet(self.control.as_raw_fd(), &packet).map_err(|_| NoAnswer::Dead)
    }

    /// Waits for the answer of a slot, copies it to `buf`, and frees the slot.
    ///
    /// # Errors
    /// [`NoAnswer`]; the slot is then given up.
    pub fn wait_answer(
        &self,
        slot: u32,
        offset: ByteOffset,
        buf: &mut [u8],
        deadline: Instant,
    ) -> Result<(), NoAnswer> {
        let entry = &self.slots[slot as usize];
        loop {
            match entry.state.load(Ordering::Acquire) {
                ANSWERED => break,
                DEAD => return Err(NoAnswer::Dead),
                _ => {}
            }
            if let Err(reason) = check_patience(offset, deadline) {
                self.abandon(slot);
                self.pass_lead_on();
                return Err(reason);
            }
            if !self.lead() {
                futex::wait(&entry.state, ASKED, interrupt::LOOK);
            }
        }
        self.pass_lead_on();
        let (code, errno, message) = std::mem::take(&mut *entry.answer.lock());
        if code == 0 {
            self.view.copy_out(slot as usize * self.shape.slot_bytes, buf);
        }
        self.free(slot);
        if code == 0 {
            return Ok(());
        }
        Err(NoAnswer::Failed(StoreError {
            code: u8::try_from(code).ok().and_then(FaultCode::from_number).unwrap_or(FaultCode::Io),
            offset,
            errno: (errno != 0).then_some(errno),
            message,
            part: None,
        }))
    }

    /// Gives up the answer of a slot.
    pub fn abandon(&self, slot: u32) {
        let state = &self.slots[slot as usize].state;
        let late = state.compare_exchange(ASKED, ABANDONED, Ordering::AcqRel, Ordering::Acquire);
        if late == Err(ANSWERED) {
            self.free(slot);
        }
        let stuck = self.slots.iter().filter(|s| s.state.load(Ordering::Relaxed) == ABANDONED).count();
        if stuck == self.slots.len() {
            // Every slot waits for an answer nobody wants: start afresh, and let nobody wait for it.
            self.end_within(Duration::ZERO);
        }
    }

    fn free(&self, slot: u32) {
        self.slots[slot as usize].state.store(FREE, Ordering::Release);
        self.ring();
    }

    fn ring(&self) {
        self.freed.fetch_add(1, Ordering::AcqRel);
        futex::wake_all(&self.freed);
    }

    /// Reads one answer, or waits for one as long as a look takes, if nobody else leads.
    fn lead(&self) -> bool {
        if self.leader.swap(true, Ordering::AcqRel) {
            return false;
        }
        let mut packet = [0; ANSWER_MAX];
        let received = process::receive_packet(self.control.as_raw_fd(), &mut packet, Some(interrupt::LOOK));
        self.leader.store(false, Ordering::Release);
        match received {
            Ok(None) => {}
            Ok(Some(got)) if got >= 12 => self.answered(&packet[..got]),
            _ => self.end(),
        }
        true
    }

    /// Wakes a thread that waits for an answer, so that it leads in place of the caller.
    fn pass_lead_on(&self) {
        let waiting = self.slots.iter().find(|slot| slot.state.load(Ordering::Acquire) == ASKED);
        if let Some(slot) = waiting {
            futex::wake_all(&slot.state);
        }
    }

    fn answered(&self, packet: &[u8]) {
        let word =
            |at: usize| i32::from_le_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]]);
        let Some(slot) = usize::try_from(word(0)).ok().and_then(|index| self.slots.get(index)) else {
            return self.end(); // not our protocol
        };
        *slot.answer.lock() = (word(4), word(8), String::from_utf8_lossy(&packet[12..]).into_owned());
        let asked = slot.state.compare_exchange(ASKED, ANSWERED, Ordering::AcqRel, Ordering::Acquire);
        match asked {
            Ok(_) => futex::wake_all(&slot.state),
            Err(ABANDONED) => self.free(word(0) as u32),
            Err(_) => self.end(),
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.end();
    }
}

fn wait_hello(control: &OwnedFd, limit: Duration, go_on: &mut dyn FnMut() -> bool) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + limit;
    let mut packet = vec![0; HELLO_MAX];
    loop {
        match process::receive_packet(control.as_raw_fd(), &mut packet, Some(interrupt::LOOK))? {
            Some(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::BrokenPipe,
                    "the pager process ended before it said hello",
                ));
            }
            Some(got) => {
                packet.truncate(got);
                return Ok(packet);
            }
            None if !go_on() => return Err(io::Error::from_raw_os_error(libc::EINTR)),
            None if Instant::now() >= deadline => {
                return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
            }
            None => {}
        }
    }
}

fn check_patience(offset: ByteOffset, deadline: Instant) -> Result<(), NoAnswer> {
    if interrupt::pending() {
        return Err(NoAnswer::Failed(StoreError::new(
            FaultCode::Interrupted,
            offset,
            "the wait for the store was interrupted",
        )));
    }
    if Instant::now() >= deadline {
        return Err(NoAnswer::Failed(StoreError {
            code: FaultCode::Timeout,
            offset,
            errno: Some(libc::ETIMEDOUT),
            message: "the store gave no answer within the mapping's timeout".into(),
            part: None,
        }));
    }
    Ok(())
}
