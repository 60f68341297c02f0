//! Every counter once: its name, unit and help. A counter that nobody increments, or that is not
//! reported, fails `tests/tidy`.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::fork::ForkMutex;

/// Bytes that were read from stores of mappings that are gone.
pub static RETIRED_FETCHED: AtomicU64 = AtomicU64::new(0);

/// Counters of mappings that are gone.
pub static RETIRED: ForkMutex<Option<Counters>> = ForkMutex::new(None);

macro_rules! counters {
    ($($field:ident, $unit:literal, $help:literal;)*) => {
        /// Counters of one mapping, or summed over the process. Relaxed atomics: they order nothing.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(#[doc = $help] pub $field: AtomicU64,)*
            /// Time from the arrival of a demand fault to its resolution.
            pub fault_latency: Histogram,
        }

        /// Name, unit and help of every counter, in the order of [`Counters::values`].
        pub const COUNTERS: &[(&str, &str, &str)] = &[$((stringify!($field), $unit, $help),)*];

        impl Counters {
            /// All values, in the order of [`COUNTERS`].
            pub fn values(&self) -> Vec<u64> {
                vec![$(self.$field.load(Ordering::Relaxed),)*]
            }

            /// Adds the counts of `other` to these.
            pub fn absorb(&self, other: &Counters) {
                $(self.$field.fetch_add(other.$field.load(Ordering::Relaxed), Ordering::Relaxed);)*
                self.fault_latency.absorb(&other.fault_latency);
            }
        }
    };
}

counters! {
    faults, "count", "Demand faults resolved: a thread touched a page that was not there.";
    waits, "count", "Faults on a page that another thread was already filling.";
    room_stalls, "count", "Loads on demand that found no room, and evicted or waited for it themselves.";
    room_stall_ns, "ns", "Time that they took for it.";
    store_stalls, "count", "Loads on demand that took longer than 10 ms from room to resident page.";
    store_stall_ns, "ns", "Time that they took for it.";
    fills, "count", "Granules filled by the pager, on demand or ahead of need.";
    fill_bytes, "bytes", "Bytes filled by the pager.";
    readahead_fills, "count", "Granules filled ahead of need.";
    readahead_hits, "count", "Granules asked for ahead of need whose sequence has come by since.";
    readahead_wasted, "count", "Granules asked for ahead of need whose sequence was given up, or that were gone when it came.";
    evictions, "count", "Granules evicted to keep a budget.";
    evicted_bytes, "bytes", "Bytes evicted.";
    second_chance_hits, "count", "Evicted granules that were touched while they stood by, and came back without a load.";
    written_bytes, "bytes", "Bytes of dirty pages written back.";
    swapped_in_bytes, "bytes", "Bytes of pages that came back from swap.";
    syncs, "count", "Syncs of the store.";
    write_faults, "count", "First writes to clean pages that were faults.";
    daemon_rounds, "count", "Rounds of the page daemon that found the mapping short of room.";
    retries, "count", "Reads of the store that were tried again.";
    errors, "count", "Pages that could not be filled.";
}

/// Adds one.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A load that takes longer is a stall.
pub const STALL_NS: u64 = 10_000_000;

/// Adds `amount`.
pub fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

const SUB_BITS: u32 = 4;
const SUB: usize = 1 << SUB_BITS;
const BUCKETS: usize = SUB * 40;

/// Durations in nanoseconds, in buckets of 1/16 of a power of two: about 6 % exact.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    max_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), max_ns: AtomicU64::new(0) }
    }
}

impl Histogram {
    fn bucket(ns: u64) -> usize {
        if ns < SUB as u64 {
            return ns as usize;
        }
        let power = 63 - ns.leading_zeros();
        let sub = (ns >> (power - SUB_BITS)) as usize & (SUB - 1);
        ((power - SUB_BITS + 1) as usize * SUB + sub).min(BUCKETS - 1)
    }

    fn middle_ns(bucket: usize) -> u64 {
        if bucket < SUB {
            return bucket as u64;
        }
        let shift = (bucket / SUB - 1) as u32;
        let low = ((SUB + bucket % SUB) as u64) << shift;
        low + (1 << shift) / 2
    }

    /// Records one duration.
    pub fn record(&self, ns: u64) {
        self.buckets[Self::bucket(ns)].fetch_add(1, Ordering::Relaxed);
        self.max_ns.fetch_max(ns, Ordering::Relaxed);
    }

    /// The duration that `percent` of the records do not exceed; 0 without records.
    pub fn percentile_ns(&self, percent: f64) -> u64 {
        let counts: Vec<u64> = self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let rank = (total as f64 * percent / 100.0).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in counts.iter().enumerate() {
            seen += count;
            if seen >= rank && seen > 0 {
                return Self::middle_ns(bucket).min(self.max_ns());
            }
        }
        0
    }

    /// The longest duration.
    pub fn max_ns(&self) -> u64 {
        self.max_ns.load(Ordering::Relaxed)
    }

    fn absorb(&self, other: &Histogram) {
        for (to, from) in self.buckets.iter().zip(&other.buckets) {
            to.fetch_add(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.max_ns.fetch_max(other.max_ns(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_near_the_true_ones() {
        let histogram = Histogram::default();
        (1..=10_000).for_each(|us| histogram.record(us * 1000));
        for percent in [50.0, 90.0, 99.0] {
            let got = histogram.percentile_ns(percent) as f64;
            let want = percent * 100.0 * 1000.0;
            assert!((got - want).abs() / want < 0.07, "p{percent}: {got} beside {want}");
        }
        assert_eq!(histogram.max_ns(), 10_000_000);
    }

    #[test]
    fn extremes_stay_inside() {
        let histogram = Histogram::default();
        assert_eq!(histogram.percentile_ns(50.0), 0);
        histogram.record(0);
        histogram.record(u64::MAX);
        assert_eq!(histogram.percentile_ns(1.0), 0);
        assert_eq!(histogram.max_ns(), u64::MAX);
    }
}
