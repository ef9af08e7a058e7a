//! What happened: a ring of the last events, and followers that are told of new ones.
//!
//! Invariant: events are numbered without gaps. A follower that is too slow misses the oldest ones
//! and sees by the numbers that it did; it never slows anybody down.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::watch;

/// Events that are kept.
const KEPT: usize = 1024;

/// What a daemon tells of: an event with a number.
pub trait Happened: Clone {
    /// What can happen.
    type Kind: Copy;

    /// The name of a kind, as people and programs see it.
    fn name(kind: Self::Kind) -> &'static str;

    /// Whether somebody should look at it.
    fn is_alarming(kind: Self::Kind) -> bool;

    /// Event number `seq`, at `time_ms` milliseconds since 1970.
    fn new(seq: u64, time_ms: u64, kind: Self::Kind, object: String, detail: String) -> Self;

    /// Its number.
    fn seq(&self) -> u64;

    /// Gives it another number.
    fn renumber(&mut self, seq: u64);
}

/// The last events.
pub struct Events<E> {
    ring: Mutex<VecDeque<E>>,
    latest: watch::Sender<u64>,
}

impl<E> Default for Events<E> {
    fn default() -> Self {
        Events { ring: Mutex::default(), latest: watch::Sender::new(0) }
    }
}

impl<E: Happened> Events<E> {
    /// Adds an event, and logs it.
    pub fn add(&self, kind: E::Kind, object: impl Into<String>, detail: impl Into<String>) {
        let (object, detail) = (object.into(), detail.into());
        if E::is_alarming(kind) {
            tracing::warn!(%object, %detail, "{}", E::name(kind));
        } else {
            tracing::info!(%object, %detail, "{}", E::name(kind));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let mut ring = self.ring.lock();
        let seq = *self.latest.borrow() + 1;
        if ring.len() == KEPT {
            ring.pop_front();
        }
        ring.push_back(E::new(seq, time_ms, kind, object, detail));
        // Still under the lock, so that numbers go up for followers, too.
        self.latest.send_replace(seq);
    }

    /// Numbers events on from those of a predecessor.
    pub fn go_on_after(&self, seq: u64) {
        let mut ring = self.ring.lock();
        for (own, event) in (1..).zip(ring.iter_mut()) {
            event.renumber(seq + own);
        }
        self.latest.send_replace(seq + ring.len() as u64);
    }

    /// The kept events after number `seq`.
    pub fn since(&self, seq: u64) -> Vec<E> {
        self.ring.lock().iter().filter(|e| e.seq() > seq).cloned().collect()
    }

    /// Tells of the number of the latest event.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{Event, EventKind};

    #[test]
    fn the_last_events_are_kept_and_numbered() {
        let events = Events::<Event>::default();
        for i in 0..KEPT + 10 {
            events.add(EventKind::Damaged, format!("disk {i}"), "");
        }

        let kept = events.since(0);

        assert_eq!((kept.len(), kept[0].seq), (KEPT, 11));
        assert!(kept.windows(2).all(|w| w[0].seq + 1 == w[1].seq));
        assert_eq!(events.since(KEPT as u64 + 9).len(), 1);
        assert_eq!(*events.follow().borrow(), KEPT as u64 + 10);
    }

    #[test]
    fn numbers_go_on_after_those_of_a_predecessor() {
        let events = Events::<Event>::default();
        events.add(EventKind::Started, "a", "");
        events.go_on_after(40);
        events.add(EventKind::Upgraded, "a", "");

        let seqs: Vec<u64> = events.since(0).iter().map(|e| e.seq).collect();

        assert_eq!(seqs, [41, 42]);
    }
}
