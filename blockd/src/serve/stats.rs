//! Counters of a volume, one set per lane so that queues do not share cache lines.
//!
//! Every counter is a statistic of its own and orders nothing: all accesses are relaxed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::HeldInfo;

/// Buckets of a histogram: four for each power of two of nanoseconds, up to 2^40 (18 minutes).
const BUCKETS: usize = 4 * 40;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpKind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

const KINDS: usize = 5;
const NAMES: [&str; KINDS] = ["read", "write", "flush", "discard", "write_zeroes"];

#[derive(Debug)]
struct Kind {
    done: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    time_ns: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Kind {
    fn default() -> Self {
        Kind {
            done: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            time_ns: AtomicU64::new(0),
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
        }
    }
}

/// The counters of one lane.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct LaneStats {
    kinds: [Kind; KINDS],
    in_flight: AtomicU64,
    polls_hit: AtomicU64,
    polls_missed: AtomicU64,
    refused: AtomicU64,
    slow: AtomicU64,
}

fn bucket(ns: u64) -> usize {
    let ns = ns.max(4);
    let log = 63 - ns.leading_zeros() as usize;
    let low = format::units::index((ns >> (log - 2)) & 3);
    ((log - 2) * 4 + low).min(BUCKETS - 1)
}

/// The first number of nanoseconds that does not belong to a bucket any more.
fn bucket_end_ns(bucket: usize) -> u64 {
    (4 + bucket as u64 % 4 + 1) << (bucket / 4)
}

impl LaneStats {
    pub(super) fn began(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// A request ended.
    pub(super) fn ended(&self, kind: OpKind, bytes: u64, took: Duration, ok: bool) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let kind = &self.kinds[kind as usize];
        kind.buckets[bucket(ns)].fetch_add(1, Ordering::Relaxed);
        kind.time_ns.fetch_add(ns, Ordering::Relaxed);
        kind.done.fetch_add(1, Ordering::Relaxed);
        kind.bytes.fetch_add(bytes, Ordering::Relaxed);
        if !ok {
            kind.errors.fetch_add(1, Ordering::Relaxed);
        }
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// A request was dropped undone.
    pub(super) fn dropped(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn polled(&self, hit: bool) {
        let counter = if hit { &self.polls_hit } else { &self.polls_missed };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The driver broke a rule and was refused, so many times in all.
    pub(super) fn set_refused(&self, count: u64) {
        self.refused.store(count, Ordering::Relaxed);
    }

    /// A request took the slow lane.
    pub(super) fn went_slow(&self) {
        self.slow.fetch_add(1, Ordering::Relaxed);
    }
}

/// Numbers of requests by how long they took.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Histogram {
    /// Upper ends of buckets in nanoseconds, and the requests in each; empty buckets are left out.
    pub buckets: Vec<(u64, u64)>,
}

impl Histogram {
    /// An upper bound of the time that `percent` of 100 requests took at most, in nanoseconds; 0
    /// when there were none.
    #[must_use]
    pub fn percentile_ns(&self, percent: u32) -> u64 {
        let total: u64 = self.buckets.iter().map(|(_, n)| n).sum();
        let wanted = (total * u64::from(percent)).div_ceil(100);
        let mut seen = 0;
        for (end_ns, n) in &self.buckets {
            seen += n;
            if seen >= wanted {
                return *end_ns;
            }
        }
        0
    }
}

/// Counters of one kind of request.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct KindStats {
    /// `read`, `write`, `flush`, `discard` or `write_zeroes`.
    pub kind: String,
    /// Requests that ended.
    pub requests: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Those that were answered with an error.
    pub errors: u64,
    /// Time they took together, in nanoseconds.
    pub time_ns: u64,
    /// How long they took.
    pub latency: Histogram,
}

/// Counters of a volume since it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct VolumeStats {
    /// By kind of request.
    pub kinds: Vec<KindStats>,
    /// Requests taken from clients and not answered.
    pub in_flight: u64,
    /// Set while requests wait for the host to have space again.
    pub held: Option<HeldInfo>,
    /// Times that a queue found work while it polled.
    pub polls_hit: u64,
    /// Times that a queue polled in vain.
    pub polls_missed: u64,
    /// Requests that broke a rule and were refused.
    pub refused: u64,
    /// Requests that had to wait on a thread of their own.
    pub slow: u64,
    /// Journal pages in use, and in all.
    pub journal_pages: (u64, u64),
    /// Bytes of memory that the map takes.
    pub map_bytes: u64,
}

/// The sums over lanes. Held state, journal and map are left for the caller.
pub(super) fn sum(lanes: &[LaneStats]) -> VolumeStats {
    let total = |counter: &dyn Fn(&LaneStats) -> &AtomicU64| {
        lanes.iter().map(|lane| counter(lane).load(Ordering::Relaxed)).sum::<u64>()
    };
    let kind = |k: usize| {
        let buckets = (0..BUCKETS)
            .map(|b| (bucket_end_ns(b), total(&|lane| &lane.kinds[k].buckets[b])))
            .filter(|(_, n)| *n > 0)
            .collect();
        KindStats {
            kind: NAMES[k].to_owned(),
            requests: total(&|lane| &lane.kinds[k].done),
            bytes: total(&|lane| &lane.kinds[k].bytes),
            errors: total(&|lane| &lane.kinds[k].errors),
            time_ns: total(&|lane| &lane.kinds[k].time_ns),
            latency: Histogram { buckets },
        }
    };
    VolumeStats {
        kinds: (0..KINDS).map(kind).collect(),
        in_flight: total(&|lane| &lane.in_flight),
        polls_hit: total(&|lane| &lane.polls_hit),
        polls_missed: total(&|lane| &lane.polls_missed),
        refused: total(&|lane| &lane.refused),
        slow: total(&|lane| &lane.slow),
        ..VolumeStats::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_meet_end_to_end_and_hold_what_they_say() {
        for ns in (0..100_000).chain([1 << 30, (1 << 35) + 12_345]) {
            let b = bucket(ns);
            assert!(ns < bucket_end_ns(b), "{ns} in bucket {b}");
            assert!(b == 0 || ns >= bucket_end_ns(b - 1), "{ns} in bucket {b}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_upper_bounds_within_a_quarter() {
        let lane = LaneStats::default();
        for us in 1..=1000 {
            lane.began();
            lane.ended(OpKind::Read, 4096, Duration::from_micros(us), true);
        }
        let sums = sum(std::slice::from_ref(&lane));
        let p99 = sums.kinds[0].latency.percentile_ns(99);
        assert!((990_000..1_250_000).contains(&p99), "{p99}");
        assert_eq!((sums.in_flight, sums.kinds[0].bytes), (0, 4096 * 1000));
        assert_eq!(Histogram::default().percentile_ns(50), 0);
    }
}
