//! The paging core of quire. No interpreter: nothing here knows Python, so that nothing on the
//! fault path can wait for it.
//!
//! # Layers, top to bottom
//!
//! ```text
//!   arena              addresses in which mappings are placed
//!   mapping  kernel_mapping   what the interpreter's side holds
//!   runtime            what runs while there are mappings; fork
//!   daemon  kernel_daemon   evicts ahead of need; the same where the kernel pages, and its advice
//!   residency          pages in, in for good, out, as a program asks
//!   fault              resolves a fault
//!   fill               threads that load on nobody's stack
//!   load  pageout      load pages; evict pages
//!   watermark          when the daemon is rung
//!   laundry            writes dirty pages back
//!   space              map entries by address
//!   memory_object      pages, pager, account, condition
//!   page_cache  pager  pmap   budgets; where pages come from; translations
//!   page  policy  standby  readahead  dirty   states; victims, and their second chance; sequences;
//!                      pages on their way back
//!   pressure           a budget from what the machine has free
//!   store  swap        bytes; pages that were evicted from memory that has no source
//!   lease              slots in the records behind names of shared memory
//!   sys                system calls
//!   units errors counters interrupt buffers range_set   used by all
//! ```
//!
//! # Lock order
//!
//! `runtime::RUNTIME` (held while threads are started and joined, and with it the lists of their handles), then
//! `space::SPACE` (its entries, then the ranges that the kernel pages); all others are leaves, never held while a
//! store is read: `MemoryObject::{policy, readahead, failure, filler, pins}`, `Dirty::{scan, syncing, noted}`
//! (`syncing` is held over a whole sync, `scan` over a scan), `Standby::list`, `Mapping::entry`,
//! `FillPool::queue`, `Granules::starts`, `Chunks::marks`, `Frames::scratch`,
//! `ZstdStore::kept`, `Swap::slots`, `Codec::kept`, `buffers::KEPT`, `counters::RETIRED`, `signal::INSTALL`,
//! `channel::Slot::answer`, `daemon::STEP`. `Wishes::pins` is held over mlock(2), and taken before SPACE.
//! `ExternalStore::channel` is held while a pager process is started,
//! `Channel::child` while one ends. A fork takes RUNTIME and SPACE in that order; the child replaces the
//! leaves. No lock of ours is ever held while user memory is touched, so a signal handler that resolves
//! a fault may take any of them.

#![deny(unsafe_code)]

pub mod arena;
pub mod buffers;
pub mod counters;
pub mod daemon;
pub mod dirty;
pub mod errors;
pub mod fault;
pub mod fill;
pub mod interrupt;
pub mod kernel_daemon;
pub mod kernel_mapping;
pub mod laundry;
pub mod lease;
pub mod load;
pub mod mapping;
pub mod memory_object;
pub mod page;
pub mod page_cache;
pub mod pageout;
pub mod pager;
pub mod pmap;
pub mod policy;
pub mod pressure;
pub mod range_set;
pub mod readahead;
pub mod residency;
pub mod runtime;
pub mod space;
pub mod standby;
pub mod store;
pub mod swap;
pub mod sys;
pub mod units;
pub mod watermark;
