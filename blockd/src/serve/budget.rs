//! How often a volume tells of what its clients cause.
//!
//! A guest that breaks its queue again and again, or a client that comes and goes as fast as it
//! can, must fill neither the log nor the list of events: what happened to other disks is in them,
//! too.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

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
        let pauses = now.saturating_duration_since(state.since).as_secs() / PAUSE.as_secs();
        let pauses = u32::try_from(pauses).unwrap_or(BURST);
        state.since += PAUSE * pauses;
        state.left = state.left.saturating_add(pauses).min(BURST);
        if state.left == 0 {
            state.skipped += 1;
            return None;
        }
        state.left -= 1;
        Some(std::mem::take(&mut state.skipped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
