//! How often a volume tells of what its clients cause.
//!
//! A guest that breaks its queue again and again, or a client that comes and goes as fast as it
//! can, must fill neither the log nor the list of events: what happened to other disks is in them,
//! too. Nor must one that has its requests held and drops them again and again; that requests are
//! held is told in the end all the same: see [`HeldTold`].

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::hold::{HeldInfo, Hold};

/// What may be told at once after a silence.
const BURST: u32 = 100;
/// After a burst, one event may be told in each of these.
const PAUSE: Duration = Duration::from_secs(1);

/// What may be told of one volume's clients.
#[derive(Debug)]
pub(super) struct Budget(Mutex<State>);

#[derive(Debug)]
struct State {
    left: u32,
    /// Since when `left` was not added to.
    since: Instant,
    /// Events that were not told since the last one that was.
    skipped: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Budget(Mutex::new(State { left: BURST, since: Instant::now(), skipped: 0 }))
    }
}

impl Budget {
    /// Asks to tell of one event. Gives back how many were skipped before it, or `None` when it is
    /// to be skipped itself.
    pub(super) fn take(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock();
        let told = state.take(now);
        state.skipped += u64::from(told.is_none());
        told
    }

    /// As [`Budget::take`], for an event that is asked for again until it is told: refused, it does
    /// not count as skipped.
    pub(super) fn take_again(&self, now: Instant) -> Option<u64> {
        self.0.lock().take(now)
    }
}

impl State {
    fn take(&mut self, now: Instant) -> Option<u64> {
        let pauses = now.saturating_duration_since(self.since).as_secs() / PAUSE.as_secs();
        let pauses = u32::try_from(pauses).unwrap_or(BURST);
        self.since += PAUSE * pauses;
        self.left = self.left.saturating_add(pauses).min(BURST);
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.skipped))
    }
}

/// Whether the last that was told of holding is that requests are held.
///
/// Invariants: what is told alternates. Only the beginning costs something of the budget: the end
/// of what was told is always told, so that no watcher is left with the wrong state. A beginning
/// that the budget refuses is asked for again whenever a held request is tried again, which happens
/// for as long as there are any.
#[derive(Debug, Default)]
pub(super) struct HeldTold(Mutex<bool>);

/// What to tell of holding.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeldNews {
    /// Requests are held; so many events were skipped before.
    Began(HeldInfo, u64),
    /// None is any more.
    Ended,
}

impl HeldTold {
    /// Tells what `hold` says now, if that is something else than what was told last, and the
    /// budget allows it. Called after each change of `hold`, and with `again` when a held request
    /// was tried in vain.
    pub(super) fn follow(
        &self,
        hold: &Hold,
        (budget, now): (&Budget, Instant),
        again: bool,
        tell: &mut dyn FnMut(HeldNews),
    ) {
        // Held while telling: of two threads the one that looks last also tells last.
        let mut told = self.0.lock();
        let news = match (*told, hold.info()) {
            (false, Some(info)) => {
                let took = if again { budget.take_again(now) } else { budget.take(now) };
                let Some(skipped) = took else { return };
                HeldNews::Began(info, skipped)
            }
            (true, None) => HeldNews::Ended,
            (true, Some(_)) | (false, None) => return,
        };
        *told = !*told;
        tell(news);
    }
}

#[cfg(test)]
mod tests {
    use format::{Error, Kind};

    use super::*;

    /// Story: a guest whose write is held resets its queue and writes again, as fast as it can.
    #[test]
    fn the_end_of_what_was_told_is_told_and_the_beginning_in_time() {
        let (budget, hold, told) = (Budget::default(), Hold::default(), HeldTold::default());
        let start = Instant::now();
        let follow = |now, again| {
            let mut said = Vec::new();
            told.follow(&hold, (&budget, now), again, &mut |news| said.push(news));
            said
        };
        let full = Error::new(Kind::NoSpace, "full");
        let mut said = Vec::new();
        for _ in 0..1000 {
            hold.begin(&full);
            said.extend(follow(start, false));
            hold.end();
            said.extend(follow(start, false));
        }
        assert_eq!(said.len(), 2 * BURST as usize);
        assert_eq!(said.last(), Some(&HeldNews::Ended));

        hold.begin(&full);
        assert_eq!(follow(start, false), []);
        for _ in 0..50 {
            assert_eq!(follow(start + PAUSE / 2, true), []);
        }
        let began = HeldNews::Began(hold.info().unwrap(), 1001 - u64::from(BURST));
        assert_eq!(follow(start + PAUSE, true), [began]);
        assert_eq!(follow(start + PAUSE, true), []);
        hold.end();
        assert_eq!(follow(start + PAUSE, false), [HeldNews::Ended]);
    }

    #[test]
    fn a_burst_is_told_then_one_in_a_while() {
        let budget = Budget::default();
        let start = Instant::now();
        let told = |from: Instant| (0..1000).filter_map(|_| budget.take(from)).collect::<Vec<_>>();

        assert_eq!(told(start), vec![0; BURST as usize]);
        assert!(told(start + PAUSE / 2).is_empty());
        let later = start + 3 * PAUSE + PAUSE / 2;
        assert_eq!(told(later), [2000 - u64::from(BURST), 0, 0]);
        assert_eq!(told(later + PAUSE), [997]);
        assert_eq!(told(later + 5000 * PAUSE).len(), BURST as usize);
    }
}
