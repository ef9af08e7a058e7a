//! What happened: a ring of the last events, and followers that are told of new ones. As blockd's,
//! with events of machines.
//!
//! Invariant: events are numbered without gaps; a follower that is too slow sees by the numbers
//! that it missed some, and slows nobody down.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::api::types::{Event, EventKind};

/// Events that are kept.
const KEPT: usize = 1024;

/// The last events.
pub struct Events {
    ring: Mutex<VecDeque<Event>>,
    latest: watch::Sender<u64>,
}

impl Default for Events {
    fn default() -> Self {
        Events { ring: Mutex::default(), latest: watch::Sender::new(0) }
    }
}

impl Events {
    /// Adds an event, and logs it.
    pub fn add(&self, kind: EventKind, object: impl Into<String>, detail: impl Into<String>) {
        let (object, detail) = (object.into(), detail.into());
        match kind {
            EventKind::Failed => tracing::warn!(%object, %detail, "{}", kind.name()),
            _ => tracing::info!(%object, %detail, "{}", kind.name()),
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let mut ring = self.ring.lock();
        let seq = *self.latest.borrow() + 1;
        if ring.len() == KEPT {
            ring.pop_front();
        }
        ring.push_back(Event { seq, time_ms, kind, object, detail });
        // Still under the lock, so that numbers go up for followers, too.
        self.latest.send_replace(seq);
    }

    /// The kept events after number `seq`.
    pub fn since(&self, seq: u64) -> Vec<Event> {
        self.ring.lock().iter().filter(|e| e.seq > seq).cloned().collect()
    }

    /// Tells of the number of the latest event.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_events_are_kept_and_numbered() {
        let events = Events::default();
        for i in 0..KEPT + 10 {
            events.add(EventKind::Failed, format!("vm {i}"), "");
        }

        let kept = events.since(0);

        assert_eq!((kept.len(), kept[0].seq), (KEPT, 11));
        assert!(kept.windows(2).all(|w| w[0].seq + 1 == w[1].seq));
        assert_eq!(*events.follow().borrow(), KEPT as u64 + 10);
    }
}
