//! In-flight tracking of one split ring.
//!
//! Invariants kept at every instant, so that [`SplitTracker::recover`] is exact after a kill:
//! * a request is marked before any effect of it can be seen, and unmarked only after the used
//!   index that returns it is visible to the driver;
//! * `used_idx` in the region is the used index up to which marks are right. If the ring's own
//!   index is ahead, the requests in between are those of the last batch, which hang in a list
//!   from `last_batch_head`; their marks may still be set and are cleared.
//!
//! A request whose result was written but not published counts as not done and runs again. The
//! driver never saw its completion, so nothing can depend on it having run once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use format::Result;

use super::{InflightArea, mismatch};
use crate::queue::RingFormat;

/// Bytes before the per-descriptor states.
pub(super) const HEADER_SIZE: u64 = 16;
/// Bytes per descriptor.
pub(super) const STATE_SIZE: u64 = 16;

const VERSION: u16 = 1;

#[repr(C)]
struct Header {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

#[repr(C)]
struct State {
    inflight: AtomicU8,
    padding: [u8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

const _: () = assert!(size_of::<Header>() == 16 && size_of::<State>() == 16);

/// The region of one split ring.
#[derive(Debug)]
pub(crate) struct SplitTracker {
    /// Keeps the mapping behind the two pointers.
    _area: Arc<InflightArea>,
    header: *const Header,
    states: *const State,
    size: u16,
    /// States in the region, which may be more than the ring has descriptors.
    capacity: u16,
    /// Order number of the next request.
    counter: u64,
    /// Heads given back since the last publication; never grows past the ring size.
    batch: Vec<u16>,
}

// SAFETY: the pointers lead into the shared area, which `_area` keeps; all access is atomic.
unsafe impl Send for SplitTracker {}

/// What a ring must know to go on where the last process stopped.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Heads that were in work, the oldest first.
    pub(crate) heads: Vec<u16>,
    /// Whether the region had recorded this ring before, so that `heads` is all there is.
    pub(crate) known: bool,
}

impl SplitTracker {
    /// Opens the region of queue `index`, a ring of `size` descriptors.
    pub(crate) fn new(area: Arc<InflightArea>, index: u16, size: u16) -> Result<SplitTracker> {
        let region = area.region(index, size, RingFormat::Split)?;
        // SAFETY: `region` checked that header and `queue_size` states lie behind the pointer.
        let states = unsafe { region.add(size_of::<Header>()) }.cast::<State>();
        let batch = Vec::with_capacity(usize::from(size));
        let header = region.cast::<Header>();
        let capacity = area.spec().queue_size;
        Ok(SplitTracker { _area: area, header, states, size, capacity, counter: 0, batch })
    }

    fn header(&self) -> &Header {
        // SAFETY: checked and aligned in `new`, kept by `_area`; every field is atomic.
        unsafe { &*self.header }
    }

    fn state(&self, head: u16) -> &State {
        assert!(head < self.capacity);
        // SAFETY: `head` is below the number of states that `new` checked.
        unsafe { &*self.states.add(usize::from(head)) }
    }

    /// Brings the region in step with a ring whose used index is `ring_used` and returns what was
    /// in work. A new region is initialised.
    ///
    /// # Errors
    /// `Invalid` when the region contradicts itself or the ring.
    pub(crate) fn recover(&mut self, ring_used: u16) -> Result<Recovered> {
        let header = self.header();
        let version = header.version.load(Ordering::Acquire);
        if version > VERSION {
            return Err(mismatch("the version is unknown"));
        }
        let same_size = header.desc_num.load(Ordering::Acquire) == self.size;
        let behind = ring_used.wrapping_sub(header.used_idx.load(Ordering::Acquire));
        if version == 0 || !same_size || behind > self.size {
            // New, or left by a driver that gave the ring up: a later driver may have made the
            // ring anew, with index 0 or another size. A ring that was stopped has nothing in
            // work, so marks mean that the area belongs to some other ring.
            if version != 0 && (0..self.capacity).any(|head| self.is_marked(head)) {
                return Err(mismatch("it has requests in work, but of another ring"));
            }
            self.initialise(ring_used);
            return Ok(Recovered { heads: Vec::new(), known: false });
        }
        self.finish_last_batch(behind)?;
        self.header().used_idx.store(ring_used, Ordering::Release);
        let mut heads: Vec<u16> = (0..self.size).filter(|h| self.is_marked(*h)).collect();
        let counter = |head: u16| self.state(head).counter.load(Ordering::Acquire);
        heads.sort_by_key(|head| counter(*head));
        self.counter = heads.last().map_or(0, |head| counter(*head).wrapping_add(1));
        Ok(Recovered { heads, known: true })
    }

    /// Records that nothing is in work: for a ring that is stopped. A request that could not even
    /// be read has no completion, and would otherwise stay marked for ever.
    pub(crate) fn close(&mut self, ring_used: u16) {
        self.batch.clear();
        self.initialise(ring_used);
    }

    fn initialise(&self, ring_used: u16) {
        for head in 0..self.capacity {
            self.state(head).inflight.store(0, Ordering::Release);
        }
        let header = self.header();
        header.features.store(0, Ordering::Release);
        header.desc_num.store(self.size, Ordering::Release);
        header.last_batch_head.store(0, Ordering::Release);
        header.used_idx.store(ring_used, Ordering::Release);
        // Last: before it the region counts as new, and initialising again does no harm.
        header.version.store(VERSION, Ordering::Release);
    }

    fn finish_last_batch(&self, len: u16) -> Result<()> {
        let mut head = self.header().last_batch_head.load(Ordering::Acquire);
        for _ in 0..len {
            if head >= self.size {
                return Err(mismatch("the list of the last batch leaves the queue"));
            }
            self.state(head).inflight.store(0, Ordering::Release);
            head = self.state(head).next.load(Ordering::Acquire);
        }
        Ok(())
    }

    fn is_marked(&self, head: u16) -> bool {
        self.state(head).inflight.load(Ordering::Acquire) != 0
    }

    /// Marks `head` as in work. Call before the request has any effect.
    pub(crate) fn begin(&mut self, head: u16) {
        let state = self.state(head);
        state.counter.store(self.counter, Ordering::Release);
        state.inflight.store(1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// Notes that `head` was put into the used ring, before that is published.
    pub(crate) fn give_back(&mut self, head: u16) {
        let header = self.header();
        let last = header.last_batch_head.load(Ordering::Relaxed); // only this thread stores it
        self.state(head).next.store(last, Ordering::Release);
        header.last_batch_head.store(head, Ordering::Release);
        if self.batch.len() < self.batch.capacity() {
            self.batch.push(head);
        }
    }

    /// Ends the batch, after the driver can see used index `ring_used`.
    pub(crate) fn published(&mut self, ring_used: u16) {
        for head in &self.batch {
            self.state(*head).inflight.store(0, Ordering::Release);
        }
        self.batch.clear();
        self.header().used_idx.store(ring_used, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracker(area: &Arc<InflightArea>) -> SplitTracker {
        SplitTracker::new(area.clone(), 0, 8).unwrap()
    }

    fn fresh() -> (Arc<InflightArea>, SplitTracker) {
        let area = Arc::new(InflightArea::create(1, 8).unwrap());
        let mut t = tracker(&area);
        assert_eq!(t.recover(100).unwrap().heads, [0u16; 0]);
        (area, t)
    }

    /// What a successor finds when the ring's used index is `used`.
    fn after_kill(area: &Arc<InflightArea>, used: u16) -> Vec<u16> {
        tracker(area).recover(used).unwrap().heads
    }

    #[test]
    fn killed_in_work_is_found_in_order_of_arrival() {
        let (area, mut t) = fresh();
        for head in [5, 2, 7] {
            t.begin(head);
        }
        assert_eq!(after_kill(&area, 100), [5, 2, 7]);
    }

    #[test]
    fn killed_between_give_back_and_publication_runs_again() {
        let (area, mut t) = fresh();
        t.begin(5);
        t.begin(2);
        t.give_back(5);
        assert_eq!(after_kill(&area, 100), [5, 2]);
    }

    #[test]
    fn killed_between_publication_and_unmarking_does_not_run_again() {
        let (area, mut t) = fresh();
        for head in [5, 2, 7] {
            t.begin(head);
        }
        t.give_back(2);
        t.give_back(5);
        assert_eq!(after_kill(&area, 102), [7]);
        // The successor put the region in order: one more kill finds the same.
        assert_eq!(after_kill(&area, 102), [7]);
    }

    #[test]
    fn second_batch_does_not_drag_in_the_first() {
        let (area, mut t) = fresh();
        t.begin(1);
        t.give_back(1);
        t.published(101);
        t.begin(1);
        t.begin(3);
        t.give_back(3);
        assert_eq!(after_kill(&area, 102), [1]);
    }

    #[test]
    fn order_goes_on_across_generations() {
        let (area, mut t) = fresh();
        t.begin(6);
        t.begin(4);
        let mut next = tracker(&area);
        assert_eq!(next.recover(100).unwrap().heads, [6, 4]);
        next.begin(0);
        assert_eq!(after_kill(&area, 100), [6, 4, 0]);
    }

    #[test]
    fn ring_started_anew_after_a_clean_stop_is_accepted() {
        let (area, mut t) = fresh();
        t.begin(1);
        t.give_back(1);
        t.published(101);
        assert_eq!(after_kill(&area, 0), [0u16; 0]);
    }

    #[test]
    fn closed_ring_leaves_nothing_in_work() {
        let (area, mut t) = fresh();
        t.begin(1);
        t.close(100);
        assert_eq!(after_kill(&area, 100), [0u16; 0]);
    }

    #[test]
    fn lying_areas_are_refused() {
        let (area, mut t) = fresh();
        t.begin(1);
        assert!(tracker(&area).recover(0).is_err(), "foreign used index");
        t.header().last_batch_head.store(8, Ordering::Release);
        assert!(tracker(&area).recover(101).is_err(), "list leaves the queue");
        t.header().desc_num.store(9, Ordering::Release);
        assert!(tracker(&area).recover(100).is_err(), "other queue size");
        t.header().version.store(2, Ordering::Release);
        assert!(tracker(&area).recover(100).is_err(), "unknown version");
        assert!(SplitTracker::new(area.clone(), 1, 8).is_err(), "no such queue");
        assert!(SplitTracker::new(area, 0, 16).is_err(), "queue too large");
    }

    #[test]
    fn looped_batch_list_ends() {
        let (area, mut t) = fresh();
        t.begin(1);
        t.give_back(1);
        t.state(1).next.store(1, Ordering::Release);
        assert_eq!(after_kill(&area, 108), [0u16; 0]);
    }
}
