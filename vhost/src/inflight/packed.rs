//! In-flight tracking of one packed ring.
//!
//! A packed ring overwrites descriptors as it goes, so the region keeps a copy of each one that is
//! in work. Entries of the region form a free list; a request takes one entry per descriptor,
//! linked through `next`, and the first of them is its head.
//!
//! Invariants kept at every instant, so that [`PackedTracker::recover`] is exact after a kill:
//! * the head at the front of the free list is never in work, whatever its mark says: a request
//!   is in work from the store that moves the list's front past it ([`PackedTracker::begin`]);
//! * the present position differs from the old one only while exactly one request is being given
//!   back; whether the driver can see it then follows from the ring itself: its descriptor at the
//!   old position is no longer marked as available.
//!
//! The two list heads are one 32-bit word, the two positions one 64-bit word, and each is stored
//! at once, so there is no state between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use format::Result;

use super::{InflightArea, mismatch};
use crate::queue::{RawDesc, RingFormat};
use crate::util::{low16, wide};

/// Bytes before the per-descriptor states.
pub(super) const HEADER_SIZE: u64 = 32;
/// Bytes per descriptor.
pub(super) const STATE_SIZE: u64 = 32;

const VERSION: u16 = 1;

#[repr(C)]
struct Header {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    /// `free_head`, then `old_free_head`, 16 bits each.
    free: AtomicU32,
    /// `used_idx`, `old_used_idx`: 16 bits each; their wrap counters: 8 bits each; padding.
    used: AtomicU64,
    padding: [u8; 8],
}

#[repr(C)]
struct State {
    inflight: AtomicU8,
    padding: u8,
    next: AtomicU16,
    last: AtomicU16,
    num: AtomicU16,
    counter: AtomicU64,
    id: AtomicU16,
    flags: AtomicU16,
    len: AtomicU32,
    addr: AtomicU64,
}

const _: () = assert!(size_of::<Header>() == 32 && size_of::<State>() == 32);

/// A place in a packed ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) index: u16,
    pub(crate) wrap: bool,
}

impl Position {
    /// The place `count` descriptors further in a ring of `size`; `count` is at most `size`.
    pub(crate) fn advance(self, count: u16, size: u16) -> Position {
        let index = u32::from(self.index) + u32::from(count);
        match u16::try_from(index) {
            Ok(index) if index < size => Position { index, wrap: self.wrap },
            _ => Position { index: low16(u64::from(index - u32::from(size))), wrap: !self.wrap },
        }
    }

    /// The place `count` descriptors before it; `count` is at most `size`.
    pub(crate) fn retreat(self, count: u16, size: u16) -> Position {
        match self.index.checked_sub(count) {
            Some(index) => Position { index, wrap: self.wrap },
            None => Position { index: self.index + (size - count), wrap: !self.wrap },
        }
    }
}

fn free_word(head: u16, old: u16) -> u32 {
    u32::from(head) | u32::from(old) << 16
}

fn used_word(now: Position, old: Position) -> u64 {
    let wraps = u64::from(now.wrap) | u64::from(old.wrap) << 8;
    u64::from(now.index) | u64::from(old.index) << 16 | wraps << 32
}

fn positions(word: u64) -> (Position, Position) {
    let at = |shift: u32, wrap: u32| Position {
        index: low16(word >> shift),
        wrap: word >> wrap & 0xff != 0,
    };
    (at(0, 32), at(16, 40))
}

/// The region of one packed ring.
#[derive(Debug)]
pub(crate) struct PackedTracker {
    /// Keeps the mapping behind the two pointers.
    _area: Arc<InflightArea>,
    header: *const Header,
    states: *const State,
    size: u16,
    capacity: u16,
    counter: u64,
    /// Our own copy of the links; the shared one is only written.
    next: Vec<u16>,
    free: u16,
    free_count: u16,
    used: Position,
}

// SAFETY: the pointers lead into the shared area, which `_area` keeps; all access is atomic.
unsafe impl Send for PackedTracker {}

/// What a ring must know to go on where the last process stopped.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Heads that were in work, the oldest first.
    pub(crate) heads: Vec<u16>,
    /// Descriptors that they hold together.
    pub(crate) descriptors: u16,
    /// Where the next completion goes.
    pub(crate) used: Position,
}

impl PackedTracker {
    /// Opens the region of queue `index`, a ring of `size` descriptors.
    pub(crate) fn new(area: Arc<InflightArea>, index: u16, size: u16) -> Result<PackedTracker> {
        let region = area.region(index, size, RingFormat::Packed)?;
        // SAFETY: `region` checked that header and `queue_size` states lie behind the pointer.
        let states = unsafe { region.add(size_of::<Header>()) }.cast::<State>();
        let capacity = area.spec().queue_size;
        Ok(PackedTracker {
            _area: area,
            header: region.cast::<Header>(),
            states,
            size,
            capacity,
            counter: 0,
            next: vec![0; usize::from(size)],
            free: 0,
            free_count: 0,
            used: Position { index: 0, wrap: true },
        })
    }

    fn header(&self) -> &Header {
        // SAFETY: checked and aligned in `new`, kept by `_area`; every field is atomic.
        unsafe { &*self.header }
    }

    fn state(&self, entry: u16) -> &State {
        assert!(entry < self.capacity);
        // SAFETY: `entry` is below the number of states that `new` checked.
        unsafe { &*self.states.add(usize::from(entry)) }
    }

    fn is_marked(&self, entry: u16) -> bool {
        self.state(entry).inflight.load(Ordering::Acquire) != 0
    }

    /// Brings the region in step with its ring and returns what was in work; `None` for a new
    /// region, which is initialised for a ring at position `fresh`. `is_available` tells whether
    /// the descriptor at a position is one that the driver offers and nobody answered.
    ///
    /// # Errors
    /// `Invalid` when the region contradicts itself.
    pub(crate) fn recover(
        &mut self,
        fresh: Position,
        is_available: impl Fn(Position) -> bool,
    ) -> Result<Option<Recovered>> {
        let header = self.header();
        let version = header.version.load(Ordering::Acquire);
        if version > VERSION {
            return Err(mismatch("the version is unknown"));
        }
        if version == 0 || header.desc_num.load(Ordering::Acquire) != self.size {
            if version != 0 && (0..self.capacity).any(|entry| self.is_marked(entry)) {
                return Err(mismatch("it has requests in work, but of another ring"));
            }
            self.initialise(fresh);
            return Ok(None);
        }
        let (now, old) = positions(header.used.load(Ordering::Acquire));
        let free = header.free.load(Ordering::Acquire);
        let (head, old_head) = (low16(free.into()), low16((free >> 16).into()));
        if now.index >= self.size || old.index >= self.size {
            return Err(mismatch("a position is outside the ring"));
        }
        let given_back = now != old && !is_available(old);
        let (used, front) = if given_back { (now, head) } else { (old, old_head) };
        if given_back {
            self.unmark(head, old_head)?;
        }
        // The request that was about to be taken was not taken.
        if front < self.size {
            self.state(front).inflight.store(0, Ordering::Release);
        }
        self.header().free.store(free_word(front, front), Ordering::Release);
        self.header().used.store(used_word(used, used), Ordering::Release);
        self.used = used;
        self.collect().map(Some)
    }

    /// Unmarks the entries from `head` up to the former front of the free list.
    fn unmark(&self, head: u16, old_head: u16) -> Result<()> {
        let mut entry = head;
        for _ in 0..=self.size {
            if entry == old_head || entry >= self.size {
                return Ok(());
            }
            self.state(entry).inflight.store(0, Ordering::Release);
            entry = self.state(entry).next.load(Ordering::Acquire);
        }
        Err(mismatch("the list of free entries loops"))
    }

    /// Finds the requests in work and makes a free list of everything else.
    fn collect(&mut self) -> Result<Recovered> {
        let mut heads: Vec<u16> = (0..self.size).filter(|entry| self.is_marked(*entry)).collect();
        let counter = |entry: u16| self.state(entry).counter.load(Ordering::Acquire);
        heads.sort_by_key(|entry| counter(*entry));
        let next_counter = heads.last().map_or(0, |entry| counter(*entry).wrapping_add(1));
        let mut taken = vec![false; usize::from(self.size)];
        for head in &heads {
            let mut entry = *head;
            let num = self.state(*head).num.load(Ordering::Acquire);
            if num == 0 {
                return Err(mismatch("a request in work has no descriptor"));
            }
            for _ in 0..num {
                let seen = taken.get_mut(usize::from(entry));
                if seen.is_none_or(|seen| std::mem::replace(seen, true)) {
                    return Err(mismatch("requests in work share descriptors"));
                }
                let next = self.state(entry).next.load(Ordering::Acquire);
                self.next[usize::from(entry)] = next;
                entry = next;
            }
        }
        self.counter = next_counter;
        let descriptors = taken.iter().filter(|taken| **taken).count();
        let descriptors = low16(wide(descriptors));
        self.free_count = self.size - descriptors;
        self.free = self.size;
        for entry in (0..self.size).rev().filter(|entry| !taken[usize::from(*entry)]) {
            self.link(entry, self.free);
            self.free = entry;
        }
        self.header().free.store(free_word(self.free, self.free), Ordering::Release);
        Ok(Recovered { heads, descriptors, used: self.used })
    }

    fn link(&mut self, entry: u16, next: u16) {
        self.next[usize::from(entry)] = next;
        self.state(entry).next.store(next, Ordering::Release);
    }

    fn initialise(&mut self, used: Position) {
        for entry in 0..self.capacity {
            self.state(entry).inflight.store(0, Ordering::Release);
        }
        for entry in 0..self.size {
            self.link(entry, entry + 1);
        }
        (self.free, self.free_count, self.used) = (0, self.size, used);
        let header = self.header();
        header.features.store(0, Ordering::Release);
        header.desc_num.store(self.size, Ordering::Release);
        header.free.store(free_word(0, 0), Ordering::Release);
        header.used.store(used_word(used, used), Ordering::Release);
        // Last: before it the region counts as new, and initialising again does no harm.
        header.version.store(VERSION, Ordering::Release);
    }

    /// Records that nothing is in work: for a ring that is stopped.
    pub(crate) fn close(&mut self) {
        self.initialise(self.used);
    }

    /// Marks a request with these descriptors as in work and returns its head entry; `None` when
    /// the driver offers more descriptors than the ring has. Call before it has any effect.
    pub(crate) fn begin(&mut self, descs: &[RawDesc]) -> Option<u16> {
        let num = u16::try_from(descs.len()).ok().filter(|n| *n <= self.free_count)?;
        let head = self.free;
        let (mut entry, mut last) = (head, head);
        for desc in descs {
            let state = self.state(entry);
            state.addr.store(desc.addr, Ordering::Release);
            state.len.store(desc.len, Ordering::Release);
            state.flags.store(desc.flags, Ordering::Release);
            state.id.store(desc.id, Ordering::Release);
            last = entry;
            entry = self.next[usize::from(entry)];
        }
        let state = self.state(head);
        state.last.store(last, Ordering::Release);
        state.num.store(num, Ordering::Release);
        state.counter.store(self.counter, Ordering::Release);
        state.inflight.store(1, Ordering::Release);
        // From here on the request is in work.
        self.header().free.store(free_word(entry, entry), Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        self.free = entry;
        self.free_count -= num;
        Some(head)
    }

    /// The descriptors of a request in work, as recorded.
    pub(crate) fn recorded(&self, head: u16, into: &mut Vec<RawDesc>) {
        into.clear();
        let mut entry = head;
        for _ in 0..self.state(head).num.load(Ordering::Acquire).min(self.size) {
            let state = self.state(entry.min(self.size - 1));
            into.push(RawDesc {
                addr: state.addr.load(Ordering::Acquire),
                len: state.len.load(Ordering::Acquire),
                id: state.id.load(Ordering::Acquire),
                flags: state.flags.load(Ordering::Acquire),
            });
            entry = self.next[usize::from(entry.min(self.size - 1))];
        }
    }

    /// Gives back the request `head` of `num` descriptors: prepares it, calls `show`, which makes
    /// it visible to the driver, and settles it.
    pub(crate) fn give_back(&mut self, head: u16, num: u16, show: impl FnOnce()) {
        let mut last = head;
        for _ in 1..num {
            last = self.next[usize::from(last)];
        }
        let next = self.used.advance(num, self.size);
        self.link(last, self.free);
        self.header().free.store(free_word(head, self.free), Ordering::Release);
        self.header().used.store(used_word(next, self.used), Ordering::Release);
        show();
        self.state(head).inflight.store(0, Ordering::Release);
        self.header().free.store(free_word(head, head), Ordering::Release);
        self.header().used.store(used_word(next, next), Ordering::Release);
        (self.free, self.free_count, self.used) = (head, self.free_count + num, next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const START: Position = Position { index: 6, wrap: true };

    fn descs(n: u16) -> Vec<RawDesc> {
        (0..n).map(|i| RawDesc { addr: i.into(), len: 1, id: n, flags: 0 }).collect()
    }

    fn tracker(area: &Arc<InflightArea>) -> PackedTracker {
        PackedTracker::new(area.clone(), 0, 8).unwrap()
    }

    fn fresh() -> (Arc<InflightArea>, PackedTracker) {
        let area = Arc::new(InflightArea::create(1, 8).unwrap());
        let mut t = tracker(&area);
        assert_eq!(t.recover(START, |_| true).unwrap(), None);
        (area, t)
    }

    /// What a successor finds, and which descriptors it has a copy of.
    fn after_kill(area: &Arc<InflightArea>, available: bool) -> (Recovered, Vec<usize>) {
        let mut t = tracker(area);
        let found = t.recover(START, |_| available).unwrap().expect("the region is known");
        let mut copy = Vec::new();
        let lens = found.heads.iter().map(|h| {
            t.recorded(*h, &mut copy);
            assert_eq!(copy, descs(u16::try_from(copy.len()).unwrap()));
            copy.len()
        });
        let lens = lens.collect();
        (found, lens)
    }

    #[test]
    fn killed_in_work_is_found_in_order_of_arrival() {
        let (area, mut t) = fresh();
        t.begin(&descs(3)).unwrap();
        t.begin(&descs(1)).unwrap();
        t.begin(&descs(4)).unwrap();
        assert_eq!(t.begin(&descs(1)), None, "the ring has eight");
        let (found, lens) = after_kill(&area, true);
        assert_eq!((found.descriptors, found.used, lens), (8, START, vec![3, 1, 4]));
    }

    #[test]
    fn killed_before_it_was_shown_runs_again_and_after_it_does_not() {
        for (shown, left) in [(false, vec![3, 1]), (true, vec![1])] {
            let (area, mut t) = fresh();
            let head = t.begin(&descs(3)).unwrap();
            t.begin(&descs(1)).unwrap();
            let seen = RefCell::new(None);
            t.give_back(head, 3, || *seen.borrow_mut() = Some(after_kill(&area, !shown)));
            let (found, lens) = seen.into_inner().unwrap();
            assert_eq!(lens, left);
            let used = if shown { Position { index: 1, wrap: false } } else { START };
            assert_eq!(found.used, used);
        }
    }

    #[test]
    fn batch_of_the_whole_ring_is_told_from_none() {
        let (area, mut t) = fresh();
        let head = t.begin(&descs(8)).unwrap();
        let seen = RefCell::new(None);
        t.give_back(head, 8, || *seen.borrow_mut() = Some(after_kill(&area, false)));
        let (found, lens) = seen.into_inner().unwrap();
        assert_eq!((lens, found.used), (vec![], Position { index: 6, wrap: false }));
    }

    #[test]
    fn killed_while_taking_a_request_takes_it_later() {
        let (area, mut t) = fresh();
        let head = t.begin(&descs(2)).unwrap();
        // As if the last store of `begin` had not happened.
        t.header().free.store(free_word(head, head), Ordering::Release);
        let (found, _) = after_kill(&area, true);
        assert_eq!((found.heads, found.descriptors), (vec![], 0));
    }

    #[test]
    fn successor_goes_on_with_what_is_left() {
        let (area, mut t) = fresh();
        let first = t.begin(&descs(3)).unwrap();
        let second = t.begin(&descs(2)).unwrap();
        t.give_back(first, 3, || ());
        let mut next = tracker(&area);
        let found = next.recover(START, |_| true).unwrap().unwrap();
        assert_eq!((found.heads, found.descriptors), (vec![second], 2));
        let third = next.begin(&descs(6)).unwrap();
        assert_eq!(next.begin(&descs(1)), None);
        next.give_back(second, 2, || ());
        next.give_back(third, 6, || ());
        let (found, _) = after_kill(&area, true);
        assert_eq!((found.heads, found.used), (vec![], START.advance(3, 8).advance(8, 8)));
    }

    #[test]
    fn lying_areas_are_refused() {
        let (area, mut t) = fresh();
        let head = t.begin(&descs(2)).unwrap();
        t.begin(&descs(2)).unwrap();
        let refused = || tracker(&area).recover(START, |_| true).is_err();
        assert!(!refused());
        t.state(head).num.store(0, Ordering::Release);
        assert!(refused(), "no descriptor");
        t.state(head).num.store(3, Ordering::Release);
        assert!(refused(), "shared descriptors");
        t.state(head).num.store(u16::MAX, Ordering::Release);
        assert!(refused(), "a loop");
        t.state(head).num.store(2, Ordering::Release);
        t.state(head).next.store(u16::MAX, Ordering::Release);
        assert!(refused(), "a link that leaves the region");
        t.header().used.store(8, Ordering::Release);
        assert!(refused(), "a position outside the ring");
    }
}
