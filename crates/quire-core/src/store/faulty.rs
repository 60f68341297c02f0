//! A store whose reads, writes or syncs fail or wait according to a plan: fault injection through the one I/O trait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Store;
use crate::errors::{FaultCode, StoreError};
use crate::interrupt;
use crate::units::{ByteCount, ByteOffset};

/// What a read that fails leaves in its buffer.
const LEFT_BEHIND: u8 = 0xA5;

/// What is done with a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `read_at`.
    Read,
    /// `write_at`; a write that fails has written its first half.
    Write,
    /// `sync`, whatever the plan's range.
    Sync,
}

impl Operation {
    /// The operation of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "read" => Some(Operation::Read),
            "write" => Some(Operation::Write),
            "sync" => Some(Operation::Sync),
            _ => None,
        }
    }
}

/// Which operations, and what happens to them.
#[derive(Clone, Copy, Debug)]
pub struct FaultPlan {
    /// What is concerned.
    pub operation: Operation,
    /// Number, from 0, of the first one concerned among those that touch the range.
    pub first: u64,
    /// How many; all further ones when absent.
    pub count: Option<u64>,
    /// Start of the range.
    pub offset: ByteOffset,
    /// Bytes of the range; to the end when absent.
    pub length: Option<ByteCount>,
    /// What they fail with; they succeed when absent.
    pub code: Option<FaultCode>,
    /// The errno they fail with.
    pub errno: Option<i32>,
    /// How long they wait first.
    pub delay: Duration,
}

/// Passes all on, but for what the plan says.
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    plan: FaultPlan,
    seen: AtomicU64,
    closed: AtomicBool,
}

impl FaultyStore {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Store>, plan: FaultPlan) -> Self {
        FaultyStore { inner, plan, seen: AtomicU64::new(0), closed: AtomicBool::new(false) }
    }

    fn concerns(&self, operation: Operation, offset: ByteOffset, len: usize) -> bool {
        let plan = &self.plan;
        if operation != plan.operation {
            return false;
        }
        let end = plan.length.map_or(u64::MAX, |length| plan.offset.0.saturating_add(length.0));
        let touches = operation == Operation::Sync
            || offset.0 < end && offset.0.saturating_add(len as u64) > plan.offset.0;
        if !touches {
            return false;
        }
        let number = self.seen.fetch_add(1, Ordering::Relaxed);
        number >= plan.first && plan.count.is_none_or(|count| number - plan.first < count)
    }

    /// What the plan has for this operation.
    fn fault(&self, operation: Operation, offset: ByteOffset, len: usize) -> Result<(), StoreError> {
        if !self.concerns(operation, offset, len) {
            return Ok(());
        }
        self.wait(offset)?;
        let Some(code) = self.plan.code else { return Ok(()) };
        let message = "a fault that a test injected".into();
        Err(StoreError { code, offset, errno: self.plan.errno, message, part: None })
    }

    fn wait(&self, offset: ByteOffset) -> Result<(), StoreError> {
        let end = Instant::now() + self.plan.delay;
        while Instant::now() < end {
            if interrupt::pending() {
                return Err(StoreError::new(FaultCode::Interrupted, offset, "the delay was interrupted"));
            }
            if self.closed.load(Ordering::Acquire) {
                return Err(StoreError::new(FaultCode::Closed, offset, "the store is closed"));
            }
            std::thread::sleep(interrupt::LOOK.min(end - Instant::now().min(end)));
        }
        Ok(())
    }
}

impl Store for FaultyStore {
    fn size(&self) -> ByteCount {
        self.inner.size()
    }

    fn label(&self) -> &str {
        self.inner.label()
    }

    fn read_at(&self, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        let fault = self.fault(Operation::Read, offset, buf.len());
        if fault.is_err() {
            // What a failed read leaves is unspecified: nobody may take it for data.
            buf.fill(LEFT_BEHIND);
        }
        fault.and_then(|()| self.inner.read_at(offset, buf))
    }

    fn read_only(&self) -> Option<String> {
        self.inner.read_only()
    }

    fn write_at(&self, offset: ByteOffset, bytes: &[u8]) -> Result<(), StoreError> {
        let fault = self.fault(Operation::Write, offset, bytes.len());
        let passed = if fault.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        self.inner.write_at(offset, passed)?;
        fault
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.fault(Operation::Sync, ByteOffset(0), 0)?;
        self.inner.sync()
    }

    fn grain(&self) -> ByteCount {
        self.inner.grain()
    }

    fn run(&self) -> ByteCount {
        self.inner.run()
    }

    fn is_slow(&self) -> bool {
        self.inner.is_slow() || !self.plan.delay.is_zero()
    }

    fn buffer_bytes(&self, read: ByteCount) -> ByteCount {
        self.inner.buffer_bytes(read)
    }

    fn standing_bytes(&self) -> ByteCount {
        self.inner.standing_bytes()
    }

    fn bytes_fetched(&self) -> u64 {
        self.inner.bytes_fetched()
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.inner.close();
    }

    fn after_fork_in_child(&self) {
        self.inner.after_fork_in_child();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    fn plan(code: Option<FaultCode>, delay: Duration) -> FaultPlan {
        let errno = code.map(|_| libc::EIO);
        FaultPlan {
            operation: Operation::Read,
            first: 0,
            count: None,
            offset: ByteOffset(0),
            length: None,
            code,
            errno,
            delay,
        }
    }

    fn store(plan: FaultPlan) -> FaultyStore {
        FaultyStore::new(Arc::new(MemoryStore::new("m", vec![7; 100])), plan)
    }

    #[test]
    fn just_the_planned_reads_fail() {
        let store = store(FaultPlan {
            first: 1,
            count: Some(1),
            offset: ByteOffset(50),
            length: Some(ByteCount(10)),
            ..plan(Some(FaultCode::Io), Duration::ZERO)
        });
        let read = |offset| store.read_at(ByteOffset(offset), &mut [0; 10]);
        assert!(read(0).is_ok() && read(60).is_ok() && read(45).is_ok());
        assert_eq!(read(50).unwrap_err().errno, Some(libc::EIO));
        assert!(read(50).is_ok());
    }

    #[test]
    fn a_write_that_fails_has_written_its_half() {
        let inner = Arc::new(MemoryStore::new("m", vec![7; 8]));
        let once = FaultPlan {
            operation: Operation::Write,
            count: Some(1),
            ..plan(Some(FaultCode::Io), Duration::ZERO)
        };
        let store = FaultyStore::new(inner, once);
        assert!(store.write_at(ByteOffset(0), &[1; 8]).is_err() && store.sync().is_ok());
        let mut buf = [0; 8];
        store.read_at(ByteOffset(0), &mut buf).unwrap();
        assert_eq!(buf, [1, 1, 1, 1, 7, 7, 7, 7]);
        store.write_at(ByteOffset(0), &[2; 8]).unwrap();
    }

    #[test]
    fn a_read_that_fails_leaves_no_data() {
        let mut buf = [0; 10];
        assert!(
            store(plan(Some(FaultCode::Truncated), Duration::ZERO)).read_at(ByteOffset(0), &mut buf).is_err()
        );
        assert_eq!(buf, [LEFT_BEHIND; 10]);
    }

    #[test]
    fn a_delay_passes_or_ends_with_the_store() {
        let brief = store(plan(None, Duration::from_millis(30)));
        let begin = Instant::now();
        assert!(brief.is_slow() && brief.read_at(ByteOffset(0), &mut [0; 10]).is_ok());
        assert!(begin.elapsed() >= Duration::from_millis(30));
        let long = store(plan(None, Duration::from_secs(3600)));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| long.read_at(ByteOffset(0), &mut [0; 10]));
            long.close();
            assert_eq!(reader.join().unwrap().unwrap_err().code, FaultCode::Closed);
        });
    }
}
