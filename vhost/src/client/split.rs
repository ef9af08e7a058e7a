//! Split ring, driver side. The partner of `queue::split`, where the memory order is explained.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use super::arena::Arena;
use super::{Buffer, RingOffsets};
use crate::queue::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use crate::util::{low16, low32, wide};

/// The driver side of a split ring.
#[derive(Debug)]
pub(super) struct SplitDriver {
    arena: Arc<Arena>,
    at: RingOffsets,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    /// Our copy of each descriptor's successor; the shared one is the device's to read only.
    next: Vec<Option<u16>>,
    /// Heads that the device has.
    given: Vec<bool>,
    next_avail: u16,
    published_avail: u16,
    seen_used: u16,
}

impl SplitDriver {
    pub(super) fn new(arena: Arc<Arena>, at: RingOffsets, size: u16, event_idx: bool) -> Self {
        SplitDriver {
            arena,
            at,
            size,
            event_idx,
            free: (0..size).rev().collect(),
            next: vec![None; usize::from(size)],
            given: vec![false; usize::from(size)],
            next_avail: 0,
            published_avail: 0,
            seen_used: 0,
        }
    }

    fn word(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: `at` checks the bounds; ring offsets are multiples of 2; both sides access ring
        // words atomically.
        unsafe { AtomicU16::from_ptr(self.arena.at(offset, 2).cast()) }
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index & (self.size - 1))
    }

    fn write_desc(&self, at: u64, buffer: Buffer, flags: u16, next: u16) {
        let write = if buffer.writable { DESC_F_WRITE } else { 0 };
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&buffer.addr.0.to_le_bytes());
        raw[8..12].copy_from_slice(&buffer.len.to_le_bytes());
        raw[12..14].copy_from_slice(&(flags | write).to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.arena.write(at, &raw);
    }

    /// Descriptors that are free.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// The head that the next [`SplitDriver::add`] will use.
    pub(super) fn next_id(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Puts a chain into the ring, unpublished. There must be enough free descriptors.
    pub(super) fn add(&mut self, buffers: &[Buffer]) {
        let mut head = None;
        let mut previous: Option<u16> = None;
        for (i, buffer) in buffers.iter().enumerate() {
            let id = self.free.pop().expect("the caller counted the free descriptors");
            head.get_or_insert(id);
            if let Some(previous) = previous {
                self.next[usize::from(previous)] = Some(id);
            }
            self.next[usize::from(id)] = None;
            let more = i + 1 < buffers.len();
            let next = if more { self.free.last().copied().unwrap_or(0) } else { 0 };
            let flags = if more { DESC_F_NEXT } else { 0 };
            self.write_desc(self.at.desc + 16 * u64::from(id), *buffer, flags, next);
            previous = Some(id);
        }
        self.offer(head.expect("a chain has a buffer"));
    }

    /// Puts a chain into the ring that takes one descriptor, with a table at offset `table`.
    pub(super) fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) {
        let id = self.free.pop().expect("the caller counted the free descriptors");
        for (i, buffer) in buffers.iter().enumerate() {
            let flags = if i + 1 < buffers.len() { DESC_F_NEXT } else { 0 };
            self.write_desc(table + 16 * wide(i), *buffer, flags, low16(wide(i) + 1));
        }
        self.next[usize::from(id)] = None;
        let len = low32(16 * wide(buffers.len()));
        let buffer = Buffer { addr: self.arena.guest(table), len, writable: false };
        self.write_desc(self.at.desc + 16 * u64::from(id), buffer, DESC_F_INDIRECT, 0);
        self.offer(id);
    }

    fn offer(&mut self, head: u16) {
        let entry = self.at.driver + 4 + 2 * self.slot(self.next_avail);
        self.word(entry).store(head, Ordering::Relaxed); // ordered by the store to `avail.idx`
        self.given[usize::from(head)] = true;
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Shows added chains to the device; returns whether it wants a kick.
    pub(super) fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published_avail, self.next_avail);
        if old == self.next_avail {
            return false;
        }
        // Pairs with the device's Acquire load of `avail.idx`.
        self.word(self.at.driver + 2).store(self.next_avail, Ordering::Release);
        // Pairs with the device's fence between its wish and its look at `avail.idx`.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let wish = self.word(self.at.device + 4 + 8 * u64::from(self.size));
            let wish = wish.load(Ordering::Relaxed);
            self.next_avail.wrapping_sub(wish).wrapping_sub(1) < self.next_avail.wrapping_sub(old)
        } else {
            self.word(self.at.device).load(Ordering::Relaxed) & 1 == 0
        }
    }

    /// The next completed chain, if there is one: head and written bytes. `None` also for a head
    /// that is not one of ours: a device may lie too.
    pub(super) fn pop(&mut self) -> Option<(u16, u32)> {
        // Pairs with the device's Release store of `used.idx`.
        if self.word(self.at.device + 2).load(Ordering::Acquire) == self.seen_used {
            return None;
        }
        let entry = self.at.device + 4 + 8 * self.slot(self.seen_used);
        let half = |offset: u64| {
            // SAFETY: `at` checks the bounds; entries are aligned to 4; access is atomic.
            unsafe { AtomicU32::from_ptr(self.arena.at(offset, 4).cast()) }.load(Ordering::Relaxed)
        };
        let (id, len) = (half(entry), half(entry + 4));
        self.seen_used = self.seen_used.wrapping_add(1);
        let id = u16::try_from(id).ok()?;
        if !self.given.get_mut(usize::from(id)).is_some_and(std::mem::take) {
            return None;
        }
        let mut at = Some(id);
        let mut freed = 0;
        while let Some(desc) = at {
            at = self.next[usize::from(desc)].take();
            freed += 1;
            self.free.push(desc);
        }
        // The head goes last so that it is the next to be used; short rings then cycle quickly.
        let first = self.free.len() - freed;
        self.free[first..].reverse();
        Some((id, len))
    }

    /// Whether a completion waits.
    pub(super) fn has_used(&self) -> bool {
        self.word(self.at.device + 2).load(Ordering::Relaxed) != self.seen_used
    }

    /// Asks for a notification of the next completion; returns whether one waits already.
    pub(super) fn enable_calls(&mut self) -> bool {
        if self.event_idx {
            let wish = self.word(self.at.driver + 4 + 2 * u64::from(self.size));
            wish.store(self.seen_used, Ordering::Relaxed);
        } else {
            self.word(self.at.driver).store(0, Ordering::Relaxed);
        }
        // Pairs with the device's fence between `used.idx` and its look at our wish.
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Says that no notifications are wanted; a hint only.
    pub(super) fn disable_calls(&mut self) {
        if !self.event_idx {
            self.word(self.at.driver).store(1, Ordering::Relaxed);
        }
    }
}
