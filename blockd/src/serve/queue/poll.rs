//! How long to poll before sleeping: as long as it pays, up to a bound.
//!
//! The time grows when work came soon after the worker went to sleep (a longer poll would have met
//! it), and shrinks when it polled in vain for work that came much later.

use std::time::{Duration, Instant};

/// The shortest poll worth making.
const STEP_US: u32 = 4;

#[derive(Debug)]
pub(super) struct Poller {
    us_max: u32,
    us: u32,
}

impl Poller {
    pub(super) fn new(us_max: u32) -> Self {
        Poller { us_max, us: 0 }
    }

    /// How long to poll now; `None` for not at all.
    pub(super) fn time(&self) -> Option<Duration> {
        (self.us > 0).then(|| Duration::from_micros(self.us.into()))
    }

    /// The worker slept from `since` until something came.
    pub(super) fn slept(&mut self, since: Instant) {
        if self.us_max == 0 {
            return;
        }
        let slept_us = since.elapsed().as_micros();
        if slept_us <= u128::from(self.us_max) {
            self.us = (self.us * 2).clamp(STEP_US, self.us_max);
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
}
