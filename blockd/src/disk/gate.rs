//! Who is still touching what: requests pass a gate, and space that a request might still touch is
//! reused only after every request that entered before has left.
//!
//! Invariant: when [`IoGate::passed`] says that epoch `e` has passed, no request that entered in
//! epoch `e` or before is under way. The epoch moves from `e` to `e + 1` only when the requests of
//! `e - 1` have left, so two counters (by parity) are enough.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

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
    closed: AtomicBool,
    /// Closed for good.
    left: AtomicBool,
    lanes: Box<[Lane]>,
}

/// A request inside the gate.
#[derive(Debug)]
pub struct Inside<'a>(&'a AtomicU64);

/// A request inside the gate, for a caller that cannot borrow it: which counter it is in. Must be
/// given to [`IoGate::leave`].
#[derive(Debug)]
#[must_use = "space is never used again while a pass is out"]
pub struct Pass {
    lane: usize,
    parity: usize,
}

/// How long who waits at a closed gate sleeps between looks: closing is rare and short.
const CLOSED_WAIT: Duration = Duration::from_micros(50);

/// The gate is closed and nobody is inside, until this is dropped.
#[derive(Debug)]
pub struct Closed<'a>(&'a IoGate);

impl Closed<'_> {
    /// Leaves the gate closed for good: who waits at it is sent away.
    pub fn leave(self) {
        // Release pairs with the Acquire load in `has_left`.
        self.0.left.store(true, Ordering::Release);
        std::mem::forget(self);
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        // Release pairs with the SeqCst load in `enter`: what was done behind the closed gate
        // happened before the next request.
        self.0.closed.store(false, Ordering::Release);
    }
}

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
        IoGate {
            epoch: AtomicU64::new(2),
            closed: AtomicBool::new(false),
            left: AtomicBool::new(false),
            lanes,
        }
    }

    /// Enters on behalf of queue `lane`; waits while the gate is closed. `None` when it is closed
    /// for good.
    #[must_use]
    pub fn enter(&self, lane: usize) -> Option<Inside<'_>> {
        loop {
            if let Some(pass) = self.try_enter(lane) {
                return Some(Inside(self.counter(&pass)));
            }
            if self.has_left() {
                return None;
            }
            std::thread::sleep(CLOSED_WAIT);
        }
    }

    /// True when the gate is closed for good.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire) // pairs with the store in `Closed::leave`
    }

    /// Enters on behalf of queue `lane`, or says that the gate is closed.
    pub fn try_enter(&self, lane: usize) -> Option<Pass> {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let pass = Pass { lane: lane % self.lanes.len(), parity: usize::from(epoch % 2 == 1) };
            // SeqCst with the load below and the pair in `try_advance`: either the advance sees
            // this count, or this request sees the new epoch and tries again.
            self.counter(&pass).fetch_add(1, Ordering::SeqCst);
            let closed = self.closed.load(Ordering::SeqCst);
            if !closed && self.epoch.load(Ordering::SeqCst) == epoch {
                return Some(pass);
            }
            self.leave(pass);
            if closed {
                return None;
            }
        }
    }

    fn counter(&self, pass: &Pass) -> &AtomicU64 {
        &self.lanes[pass.lane].inside[pass.parity]
    }

    /// Leaves with the pass of [`IoGate::try_enter`].
    pub fn leave(&self, pass: Pass) {
        // Release pairs with the SeqCst load in `try_advance`, as in the drop of `Inside`.
        self.counter(&pass).fetch_sub(1, Ordering::Release);
    }

    /// Closes the gate and waits until everyone inside has left. One caller at a time.
    #[must_use]
    pub fn close(&self) -> Closed<'_> {
        self.close_within(Duration::MAX).expect("there is no hurry")
    }

    /// As [`IoGate::close`]; `None`, and the gate is open again, when somebody inside takes longer
    /// than that to leave.
    #[must_use]
    pub fn close_within(&self, limit: Duration) -> Option<Closed<'_>> {
        let since = Instant::now();
        // SeqCst with the pair in `enter`: either this sees the count, or that sees the closed
        // gate.
        self.closed.store(true, Ordering::SeqCst);
        let closed = Closed(self);
        let inside = |lane: &Lane| lane.inside.iter().any(|n| n.load(Ordering::SeqCst) != 0);
        while self.lanes.iter().any(inside) {
            if since.elapsed() > limit {
                return None;
            }
            std::thread::sleep(CLOSED_WAIT);
        }
        Some(closed)
    }

    /// Lets nobody in until [`IoGate::open`]; waits for nobody.
    pub fn shut(&self) {
        self.closed.store(true, Ordering::SeqCst); // as in `close_within`
    }

    /// Ends what [`IoGate::shut`] began.
    pub fn open(&self) {
        self.closed.store(false, Ordering::Release); // as in the drop of `Closed`
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
    fn a_closed_gate_waits_for_who_is_inside_and_holds_back_who_comes() {
        let gate = IoGate::new(1);
        let old = gate.enter(0).unwrap();
        std::thread::scope(|s| {
            let closer = s.spawn(|| gate.close());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!closer.is_finished(), "somebody is inside");
            drop(old);
            let closed = closer.join().unwrap();
            let late = s.spawn(|| drop(gate.enter(0)));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!late.is_finished(), "the gate is closed");

            drop(closed);

            late.join().unwrap();
        });
    }

    #[test]
    fn a_gate_that_was_left_sends_everybody_away() {
        let gate = IoGate::new(1);
        let inside = gate.enter(0);
        assert!(gate.close_within(Duration::from_millis(5)).is_none(), "somebody is inside");
        drop((inside, gate.enter(0).expect("it is open again")));
        std::thread::scope(|s| {
            let closed = gate.close();
            let late = s.spawn(|| gate.enter(0).is_none());

            closed.leave();

            assert!(late.join().unwrap() && gate.enter(0).is_none() && gate.has_left());
        });
    }

    #[test]
    fn a_tag_passes_only_when_earlier_requests_have_left() {
        let gate = IoGate::new(2);
        let old = gate.enter(1).unwrap();
        let tag = gate.epoch();
        for _ in 0..5 {
            gate.try_advance();
        }
        assert!(!gate.passed(tag));
        let later = gate.enter(0).unwrap();

        drop(old);
        for _ in 0..2 {
            gate.try_advance();
        }

        assert!(gate.passed(tag), "requests that entered later do not hold it back");
        drop(later);
    }
}
