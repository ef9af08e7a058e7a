//! How long to poll before sleeping: as long as it pays, up to a bound.
//!
//! The time grows when work came soon after the worker went to sleep (a longer poll would have met
//! it), and shrinks when it polled in vain for work that came much later. When polls of the longest
//! time meet nothing, again and again, and work still comes soon after each, then it is the polling
//! that keeps the guest from its processor, or the work comes just too late: polling rests for a
//! while, each time for longer, until a poll meets something.

use std::time::{Duration, Instant};

/// The shortest poll worth making.
const STEP_US: u32 = 4;
/// Longest polls in vain, one behind the other, after which polling rests.
const VAIN_MAX: u32 = 8;
/// Sleeps that the first rest lasts, and the longest.
const REST_MIN: u32 = 64;
const REST_MAX: u32 = 8192;

#[derive(Debug)]
pub(super) struct Poller {
    us_max: u32,
    us: u32,
    /// Longest polls in vain since one met something.
    vain: u32,
    /// Sleeps for which polling still rests.
    rest: u32,
    next_rest: u32,
}

impl Poller {
    pub(super) fn new(us_max: u32) -> Self {
        Poller { us_max, us: 0, vain: 0, rest: 0, next_rest: REST_MIN }
    }

    /// How long to poll now; `None` for not at all.
    pub(super) fn time(&self) -> Option<Duration> {
        (self.us > 0).then(|| Duration::from_micros(self.us.into()))
    }

    /// A poll ended; whether it met something.
    pub(super) fn polled(&mut self, met: bool) {
        if met {
            (self.vain, self.next_rest) = (0, REST_MIN);
        } else if self.us == self.us_max {
            self.vain += 1;
            if self.vain == VAIN_MAX {
                (self.us, self.vain, self.rest) = (0, 0, self.next_rest);
                self.next_rest = (self.next_rest * 2).min(REST_MAX);
            }
        }
    }

    /// The worker slept from `since` until something came.
    pub(super) fn slept(&mut self, since: Instant) {
        if self.us_max == 0 {
            return;
        }
        if self.rest > 0 {
            self.rest -= 1;
            return;
        }
        let slept_us = since.elapsed().as_micros();
        if slept_us <= u128::from(self.us_max) {
            self.us = (self.us * 2).clamp(STEP_US.min(self.us_max), self.us_max);
        } else if slept_us > u128::from(self.us_max) * 4 {
            self.us /= 2;
            if self.us < STEP_US {
                self.us = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_grows_while_work_comes_soon_and_ends_when_it_does_not() {
        let mut poller = Poller::new(50);
        assert_eq!(poller.time(), None);
        for _ in 0..10 {
            poller.slept(Instant::now());
        }
        assert_eq!(poller.time(), Some(Duration::from_micros(50)));
        for _ in 0..10 {
            poller.slept(Instant::now() - Duration::from_millis(5));
        }
        assert_eq!(poller.time(), None);
        let mut never = Poller::new(0);
        never.slept(Instant::now());
        assert_eq!(never.time(), None);
    }

    #[test]
    fn polling_rests_when_it_only_stands_in_the_way_and_comes_back() {
        // Work comes soon after each sleep and never during a poll.
        let round = |poller: &mut Poller| {
            let polls = poller.time().is_some();
            if polls {
                poller.polled(false);
            }
            poller.slept(Instant::now());
            u32::from(polls)
        };
        let mut poller = Poller::new(32);
        let polls: u32 = (0..20_000).map(|_| round(&mut poller)).sum();
        assert!(polls < 200, "{polls} polls in vain");

        // From now on polls meet something: the rest ends, and there is no further one.
        let polls: u32 = (0..20_000)
            .map(|_| {
                let polls = poller.time().is_some();
                match polls {
                    true => poller.polled(true),
                    false => poller.slept(Instant::now()),
                }
                u32::from(polls)
            })
            .sum();
        assert!(polls > 10_000, "{polls} polls");
    }
}
