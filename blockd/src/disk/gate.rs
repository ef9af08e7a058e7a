//! Who is still touching what: requests pass a gate, and space that a request might still touch is
//! reused only after every request that entered before has left.
//!
//! Invariant: when [`IoGate::passed`] says that epoch `e` has passed, no request that entered in
//! epoch `e` or before is under way. The epoch moves from `e` to `e + 1` only when the requests of
//! `e - 1` have left, so two counters (by parity) are enough.

use std::sync::atomic::{AtomicU64, Ordering};

/// Keeps each queue's counters on cache lines of their own.
#[repr(align(128))]
#[derive(Debug, Default)]
struct Lane {
    inside: [AtomicU64; 2],
}

/// Counts the requests under way, by queue and epoch parity.
#[derive(Debug)]
pub struct IoGate {
    epoch: AtomicU64,
    lanes: Box<[Lane]>,
}

/// A request inside the gate.
#[derive(Debug)]
pub struct Inside<'a>(&'a AtomicU64);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // Release pairs with the SeqCst load in `try_advance`: what the request did to the disk
        // happened before the gate sees it gone.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl IoGate {
    /// A gate for `lanes` queues.
    #[must_use]
    pub fn new(lanes: usize) -> Self {
        let lanes = (0..lanes.max(1)).map(|_| Lane::default()).collect();
        IoGate { epoch: AtomicU64::new(2), lanes }
    }

    /// Enters on behalf of queue `lane`.
    #[must_use]
    pub fn enter(&self, lane: usize) -> Inside<'_> {
        let lane = &self.lanes[lane % self.lanes.len()];
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let counter = &lane.inside[usize::from(epoch % 2 == 1)];
            // SeqCst with the load below and the pair in `try_advance`: either the advance sees this
            // count, or this request sees the new epoch and tries again.
            counter.fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return Inside(counter);
            }
            counter.fetch_sub(1, Ordering::Release);
        }
    }

    /// The present epoch: the tag for space that was just let go.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Moves the epoch on if the requests of the one before have left. One caller at a time.
    pub fn try_advance(&self) {
        let epoch = self.epoch.load(Ordering::SeqCst);
        let before = usize::from((epoch + 1) % 2 == 1);
        if self.lanes.iter().all(|lane| lane.inside[before].load(Ordering::SeqCst) == 0) {
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
    }

    /// True when no request that entered in epoch `tag` or before is under way.
    #[must_use]
    pub fn passed(&self, tag: u64) -> bool {
        self.epoch() >= tag + 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_passes_only_when_earlier_requests_have_left() {
        let gate = IoGate::new(2);
        let old = gate.enter(1);
        let tag = gate.epoch();
        for _ in 0..5 {
            gate.try_advance();
        }
        assert!(!gate.passed(tag));
        let later = gate.enter(0);

        drop(old);
        for _ in 0..2 {
            gate.try_advance();
        }

        assert!(gate.passed(tag), "requests that entered later do not hold it back");
        drop(later);
    }
}
