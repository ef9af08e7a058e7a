//! Limits of a disk: requests and bytes per second, with a burst.
//!
//! Each limit is one atomic word in the manner of the generic cell rate algorithm: the time up to
//! which what was let through is paid for. Queues share it without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

const SECOND_NS: u64 = 1_000_000_000;
/// Time for which a limit may be exceeded when none is stated.
const BURST_MS_DEFAULT: u32 = 100;

/// What a disk may do at most. Zero means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Limits {
    /// Requests per second.
    #[serde(default)]
    pub iops: u64,
    /// Bytes per second, reads and writes together.
    #[serde(default)]
    pub bytes_per_s: u64,
    /// How much may be used at once after a pause, in milliseconds' worth of the rate; 0 for 100.
    #[serde(default)]
    pub burst_ms: u32,
}

/// One rate.
#[derive(Debug, Default)]
struct Rate {
    /// Units per second; 0 for no limit.
    per_s: AtomicU64,
    burst_ns: AtomicU64,
    /// Paid up to here, in nanoseconds since the start.
    paid_ns: AtomicU64,
}

impl Rate {
    /// Nanoseconds to wait before `units` may go; 0 when they were let through.
    fn take(&self, units: u64, now_ns: u64) -> u64 {
        // Relaxed throughout: a limit guards no memory.
        let per_s = self.per_s.load(Ordering::Relaxed);
        if per_s == 0 || units == 0 {
            return 0;
        }
        let cost = u128::from(units) * u128::from(SECOND_NS) / u128::from(per_s);
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        let burst = self.burst_ns.load(Ordering::Relaxed);
        let mut paid = self.paid_ns.load(Ordering::Relaxed);
        loop {
            // A single request that is larger than the burst goes once everything is paid for.
            let start = paid.max(now_ns);
            if start > now_ns.saturating_add(burst.saturating_sub(cost)) {
                return start - now_ns.saturating_add(burst.saturating_sub(cost));
            }
            let next = start.saturating_add(cost);
            match self.paid_ns.compare_exchange_weak(
                paid,
                next,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return 0,
                Err(seen) => paid = seen,
            }
        }
    }

    /// Takes back what [`Rate::take`] let through.
    fn put_back(&self, units: u64) {
        let per_s = self.per_s.load(Ordering::Relaxed);
        if per_s == 0 {
            return;
        }
        let cost = u128::from(units) * u128::from(SECOND_NS) / u128::from(per_s);
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        let back = |paid: u64| Some(paid.saturating_sub(cost));
        // The outcome is the old value: of no use.
        let _ = self.paid_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, back);
    }

    fn set(&self, per_s: u64, burst_ns: u64) {
        self.burst_ns.store(burst_ns, Ordering::Relaxed);
        self.per_s.store(per_s, Ordering::Relaxed);
    }
}

/// The limits in force.
#[derive(Debug)]
pub(super) struct Throttle {
    start: Instant,
    requests: Rate,
    bytes: Rate,
    /// True when no thread may wait any longer: the volume is about to close.
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Throttle {
    pub(super) fn new(limits: Limits) -> Self {
        let throttle = Throttle {
            start: Instant::now(),
            requests: Rate::default(),
            bytes: Rate::default(),
            closed: Mutex::new(false),
            changed: Condvar::new(),
        };
        throttle.set(limits);
        throttle
    }

    pub(super) fn set(&self, limits: Limits) {
        let burst_ms = if limits.burst_ms == 0 { BURST_MS_DEFAULT } else { limits.burst_ms };
        let burst_ns = u64::from(burst_ms) * 1_000_000;
        self.requests.set(limits.iops, burst_ns);
        self.bytes.set(limits.bytes_per_s, burst_ns);
        // Taken once: a thread that saw the old limits waits by now, or looks again.
        drop(self.closed.lock());
        self.changed.notify_all();
    }

    /// Ends every wait of a thread, now and later.
    pub(super) fn close(&self) {
        *self.closed.lock() = true;
        self.changed.notify_all();
    }

    /// Lets a request through on a thread that may wait for it; false when it may not any longer.
    pub(super) fn wait(&self, bytes: u64) -> bool {
        if self.take(bytes).is_none() {
            return true;
        }
        let mut closed = self.closed.lock();
        while !*closed {
            let Some(wait) = self.take(bytes) else { return true };
            self.changed.wait_for(&mut closed, wait);
        }
        false
    }

    /// Whether no limit is set: then nobody need look at the clock.
    pub(super) fn is_off(&self) -> bool {
        let off = |rate: &Rate| rate.per_s.load(Ordering::Relaxed) == 0;
        off(&self.requests) && off(&self.bytes)
    }

    /// Lets a request through, or says how long to wait before asking again.
    pub(super) fn take(&self, bytes: u64) -> Option<Duration> {
        if self.is_off() {
            return None;
        }
        let now_ns = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let wait = self.requests.take(1, now_ns);
        if wait > 0 {
            return Some(Duration::from_nanos(wait));
        }
        let wait = self.bytes.take(bytes, now_ns);
        if wait > 0 {
            self.requests.put_back(1);
            return Some(Duration::from_nanos(wait));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(per_s: u64, burst_ms: u64) -> Rate {
        let rate = Rate::default();
        rate.set(per_s, burst_ms * 1_000_000);
        rate
    }

    /// Units that go through in `seconds` when somebody asks without a pause.
    fn through(rate: &Rate, units: u64, seconds: u64) -> u64 {
        let (mut now, mut done) = (SECOND_NS, 0);
        while now < (seconds + 1) * SECOND_NS {
            match rate.take(units, now) {
                0 => done += units,
                wait => now += wait,
            }
        }
        done
    }

    #[test]
    fn a_rate_is_kept_over_seconds_whatever_the_size_of_requests() {
        for (per_s, units) in [(1000, 1), (10_000_000, 4096), (1_000_000, 4_000_000)] {
            let done = through(&rate(per_s, 100), units, 10);
            let most = per_s * 10 + per_s / 10 + 2 * units;
            assert!(done <= most && done + 2 * units >= per_s * 10, "{done} of {}", per_s * 10);
        }
    }

    #[test]
    fn a_pause_earns_a_burst_and_no_more() {
        let rate = rate(1000, 100);
        let mut now = 60 * SECOND_NS;
        let mut burst = 0;
        while rate.take(1, now) == 0 {
            burst += 1;
        }
        assert_eq!(burst, 100);
        now += SECOND_NS / 1000;
        assert_eq!(rate.take(1, now), 0);
        assert_ne!(rate.take(1, now), 0);
    }

    /// Story: a thread slept for as long as the limits said when it came. It missed that they were
    /// lifted, and kept a disk from being taken out of service.
    #[test]
    fn a_thread_that_waits_sees_new_limits_and_the_end() {
        let slow = Limits { bytes_per_s: 1, ..Limits::default() };
        for ends in [false, true] {
            let throttle = Throttle::new(slow);
            assert!(throttle.wait(1 << 20), "nothing is owed yet");
            std::thread::scope(|s| {
                let waits = s.spawn(|| throttle.wait(1));
                std::thread::sleep(Duration::from_millis(20));
                assert!(!waits.is_finished());
                match ends {
                    true => throttle.close(),
                    false => throttle.set(Limits::default()),
                }
                assert_eq!(waits.join().unwrap(), !ends);
            });
        }
    }

    #[test]
    fn what_is_put_back_can_be_taken_again() {
        let rate = rate(10, 100);
        assert_eq!(rate.take(1, SECOND_NS), 0);
        assert_ne!(rate.take(1, SECOND_NS), 0);
        rate.put_back(1);
        assert_eq!(rate.take(1, SECOND_NS), 0);
    }
}
