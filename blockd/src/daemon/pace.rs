//! The pace of copying beside guests: as fast as can be while nobody waits for it.
//!
//! What counts is the time that 99 of 100 requests of the guest take, not bytes in a second. Every
//! now and then nothing is copied for a moment: that tells what the guest sees when it is alone.
//! While copying, the rate grows as long as requests do not take much longer than that, and falls
//! when they do.

use std::time::{Duration, Instant};

use crate::serve::{Histogram, VolumeStats};

/// Bytes in a second at the start, at least, and at most.
const RATE_START: u64 = 64 << 20;
const RATE_MIN: u64 = 4 << 20;
const RATE_MAX: u64 = 4 << 30;
/// How long the guest is looked at before the rate is set anew.
const WINDOW: Duration = Duration::from_millis(100);
/// Windows between two in which nothing is copied.
const WINDOWS_BUSY: u32 = 15;
/// Requests in a window below which it says nothing about the guest.
const REQUESTS_MIN: u64 = 20;
/// Requests may always take that much longer, whatever they took alone.
const SLACK_NS: u64 = 250_000;

/// The next rate, from what 99 of 100 requests took at most while the guest was alone and now.
fn adjusted(rate: u64, alone_ns: u64, now_ns: u64) -> u64 {
    // Half as much again is what somebody may notice.
    let disturbs = now_ns > alone_ns + (alone_ns / 2).max(SLACK_NS);
    let next = if disturbs { rate / 10 * 7 } else { rate / 4 * 5 };
    next.clamp(RATE_MIN, RATE_MAX)
}

/// Requests by how long they took, of all kinds together.
fn times(stats: &VolumeStats) -> Histogram {
    let mut all = std::collections::BTreeMap::new();
    for (end_ns, count) in stats.kinds.iter().flat_map(|kind| &kind.latency.buckets) {
        *all.entry(*end_ns).or_default() += count;
    }
    Histogram { buckets: all.into_iter().collect() }
}

/// What was added to `before`.
fn since(before: &Histogram, now: &Histogram) -> Histogram {
    let old = |end: u64| before.buckets.iter().find(|(e, _)| *e == end).map_or(0, |(_, n)| *n);
    let new = now.buckets.iter().map(|(end, n)| (*end, n.saturating_sub(old(*end))));
    Histogram { buckets: new.filter(|(_, n)| *n > 0).collect() }
}

/// The pace of one copy.
pub(super) struct Pace {
    rate: u64,
    rate_max: u64,
    /// When the next piece is due.
    due: Instant,
    window: (Instant, Histogram),
    /// Windows since the guest was last alone.
    busy: u32,
    looking: bool,
    alone_ns: Option<u64>,
}

impl Pace {
    pub(super) fn new(rate_max: Option<u64>, stats: &VolumeStats, now: Instant) -> Self {
        let rate_max = rate_max.unwrap_or(RATE_MAX);
        Pace {
            rate: RATE_START.min(rate_max),
            rate_max,
            due: now,
            window: (now, times(stats)),
            busy: WINDOWS_BUSY,
            looking: false,
            alone_ns: None,
        }
    }

    /// Notes that `bytes` were copied, and tells how long to wait before the next piece. `stats` is
    /// asked for seldom.
    pub(super) fn copied(
        &mut self,
        bytes: u64,
        stats: impl FnOnce() -> VolumeStats,
        now: Instant,
    ) -> Duration {
        if now.duration_since(self.window.0) >= WINDOW {
            self.judge(&times(&stats()), now);
            if self.looking {
                self.due = now + WINDOW;
                return WINDOW;
            }
        }
        let rate = self.rate.min(self.rate_max).max(1);
        let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
        // What was not used up in time is not made up for later.
        self.due = self.due.max(now - takes.min(WINDOW)) + takes;
        self.due.saturating_duration_since(now)
    }

    /// A window has ended.
    fn judge(&mut self, total: &Histogram, now: Instant) {
        let seen = since(&self.window.1, total);
        self.window = (now, total.clone());
        let requests: u64 = seen.buckets.iter().map(|(_, n)| n).sum();
        let p99_ns = seen.percentile_ns(99);
        if std::mem::replace(&mut self.looking, false) {
            // A guest that did nothing may do something soon, and is met with some care.
            let told = (requests >= REQUESTS_MIN).then_some(p99_ns);
            self.alone_ns = match (self.alone_ns, told) {
                (Some(before), Some(now)) => Some(before / 2 + now / 2),
                (_, told) => told,
            };
            self.busy = 0;
            return;
        }
        self.busy += 1;
        self.rate = match self.alone_ns {
            _ if requests < REQUESTS_MIN => (self.rate * 2).min(RATE_MAX),
            Some(alone_ns) => adjusted(self.rate, alone_ns, p99_ns),
            None => self.rate,
        };
        self.looking =
            requests >= REQUESTS_MIN && (self.busy >= WINDOWS_BUSY || self.alone_ns.is_none());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::KindStats;

    fn stats(requests: u64, took_ns: u64) -> VolumeStats {
        let latency = Histogram { buckets: vec![(took_ns, requests)] };
        VolumeStats {
            kinds: vec![KindStats { requests, latency, ..KindStats::default() }],
            ..VolumeStats::default()
        }
    }

    /// Copies 1 MiB pieces for a second beside a guest whose requests take `busy_ns` meanwhile, and
    /// `alone_ns` while nothing is copied. Returns the rate at the end.
    fn second(pace: &mut Pace, start: Instant, (alone_ns, busy_ns): (u64, u64)) -> u64 {
        let (mut now, mut done, mut all) = (start, 0, Vec::new());
        while now < start + Duration::from_secs(1) {
            let took_ns = if pace.looking { alone_ns } else { busy_ns };
            done += 100;
            all.push((took_ns, 100));
            let mut sum = std::collections::BTreeMap::<u64, u64>::new();
            all.iter().for_each(|(end, n)| *sum.entry(*end).or_default() += n);
            let latency = Histogram { buckets: sum.into_iter().collect() };
            let kinds = vec![KindStats { requests: done, latency, ..KindStats::default() }];
            let stats = VolumeStats { kinds, ..VolumeStats::default() };
            let wait = pace.copied(1 << 20, || stats, now);
            now += wait.max(Duration::from_micros(500));
        }
        pace.rate
    }

    #[test]
    fn who_disturbs_slows_down_and_who_does_not_speeds_up() {
        let start = Instant::now();
        let mut pace = Pace::new(None, &stats(0, 1), start);
        let slow = second(&mut pace, start, (100_000, 5_000_000));
        assert!(slow < RATE_START / 2, "{slow}");
        let fast = second(&mut pace, start + Duration::from_secs(1), (100_000, 120_000));
        assert!(fast > slow * 4, "{slow} {fast}");
    }

    #[test]
    fn an_idle_guest_gets_no_regard_but_a_limit_holds() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(1 << 20), &stats(7, 100), start);
        let mut now = start;
        let mut waited = Duration::ZERO;
        for _ in 0..20 {
            let wait = pace.copied(1 << 18, || stats(7, 100), now);
            assert!(!pace.looking, "nobody to look at");
            now += wait;
            waited += wait;
        }
        // 5 MiB at 1 MiB in a second.
        assert!((4.7..5.1).contains(&waited.as_secs_f64()), "{waited:?}");
        assert_eq!(pace.rate, RATE_MAX);
    }
}
