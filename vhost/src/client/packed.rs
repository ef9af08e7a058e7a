//! Packed ring, driver side. The partner of `queue::packed`, where the memory order is explained.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use super::arena::Arena;
use super::{Buffer, RingOffsets};
use crate::inflight::packed::Position;
use crate::queue::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use crate::util::{low16, low32, wide};

const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;
const EVENT_DISABLE: u32 = 1;
const EVENT_DESC: u32 = 2;

/// The driver side of a packed ring.
#[derive(Debug)]
pub(super) struct PackedDriver {
    arena: Arc<Arena>,
    at: RingOffsets,
    size: u16,
    event_idx: bool,
    free_ids: Vec<u16>,
    /// Descriptors that each id holds; 0 for an id that is free.
    held: Vec<u16>,
    free: u16,
    avail: Position,
    used: Position,
    /// First descriptor of the first chain that is not shown yet, and its flags.
    hidden: Option<(u16, u16)>,
    /// Position of the last look at the device's wish.
    announced: u16,
}

impl PackedDriver {
    pub(super) fn new(arena: Arc<Arena>, at: RingOffsets, size: u16, event_idx: bool) -> Self {
        let first = Position { index: 0, wrap: true };
        PackedDriver {
            arena,
            at,
            size,
            event_idx,
            free_ids: (0..size).rev().collect(),
            held: vec![0; usize::from(size)],
            free: size,
            avail: first,
            used: first,
            hidden: None,
            announced: 0,
        }
    }

    fn flags(&self, i: u16) -> &AtomicU16 {
        let at = self.at.desc + 16 * u64::from(i) + 14;
        // SAFETY: `at` checks the bounds; flags are aligned to 2; both sides access them
        // atomically.
        unsafe { AtomicU16::from_ptr(self.arena.at(at, 2).cast()) }
    }

    fn wish(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: `at` checks the bounds; the areas are aligned to 4; access is atomic.
        unsafe { AtomicU32::from_ptr(self.arena.at(offset, 4).cast()) }
    }

    /// Descriptors that are free.
    pub(super) fn free(&self) -> usize {
        usize::from(self.free)
    }

    /// The id that the next request will use.
    pub(super) fn next_id(&self) -> Option<u16> {
        self.free_ids.last().copied()
    }

    /// Puts a chain into the ring, not shown. There must be enough free descriptors.
    pub(super) fn add(&mut self, buffers: &[Buffer]) {
        let id = self.free_ids.pop().expect("the caller counted the free descriptors");
        let first = self.avail.index;
        for (i, buffer) in buffers.iter().enumerate() {
            let next = if i + 1 < buffers.len() { DESC_F_NEXT } else { 0 };
            self.put(buffer, id, next, first);
        }
        self.held[usize::from(id)] = low16(wide(buffers.len()));
    }

    /// Puts a chain into the ring that takes one descriptor, with a table at offset `table`.
    pub(super) fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) {
        let id = self.free_ids.pop().expect("the caller counted the free descriptors");
        for (i, buffer) in buffers.iter().enumerate() {
            let flags = if buffer.writable { DESC_F_WRITE } else { 0 };
            self.arena.write(table + 16 * wide(i), &encode(buffer, 0, flags));
        }
        let len = low32(16 * wide(buffers.len()));
        let buffer = Buffer { addr: self.arena.guest(table), len, writable: false };
        self.put(&buffer, id, DESC_F_INDIRECT, self.avail.index);
        self.held[usize::from(id)] = 1;
    }

    /// Writes one descriptor. The flags of a chain's first are stored after the rest; those of the
    /// first chain that is not shown yet, only by [`PackedDriver::publish`].
    fn put(&mut self, buffer: &Buffer, id: u16, flags: u16, first: u16) {
        let at = self.avail;
        let write = if buffer.writable { DESC_F_WRITE } else { 0 };
        let turn = if at.wrap { DESC_F_AVAIL } else { DESC_F_USED };
        let flags = flags | write | turn;
        let raw = encode(buffer, id, 0);
        self.arena.write(self.at.desc + 16 * u64::from(at.index), &raw[..14]);
        if at.index == first && self.hidden.is_none() {
            self.hidden = Some((first, flags));
        } else {
            // Nobody looks at it before the hidden flags are stored, which orders it.
            self.flags(at.index).store(flags, Ordering::Relaxed);
        }
        self.avail = at.advance(1, self.size);
        self.free -= 1;
    }

    /// Shows added chains to the device; returns whether it wants a kick.
    pub(super) fn publish(&mut self) -> bool {
        let Some((first, flags)) = self.hidden.take() else { return false };
        // Pairs with the device's Acquire load of the flags.
        self.flags(first).store(flags, Ordering::Release);
        let (new, mut old) = (self.avail.index, self.announced);
        self.announced = new;
        // Pairs with the device's fence between its wish and its look at the ring.
        fence(Ordering::SeqCst);
        let wish = self.wish(self.at.device).load(Ordering::Relaxed);
        if wish >> 16 != EVENT_DESC || !self.event_idx {
            return wish >> 16 != EVENT_DISABLE;
        }
        let mut wanted = low16(u64::from(wish & 0x7fff));
        if (wish >> 15 & 1 != 0) != self.avail.wrap {
            wanted = wanted.wrapping_sub(self.size);
        }
        if new <= old {
            old = old.wrapping_sub(self.size);
        }
        crate::queue::passed(wanted, old, new)
    }

    /// Whether a completion waits.
    pub(super) fn has_used(&self) -> bool {
        // Pairs with the device's Release store of the flags.
        let flags = self.flags(self.used.index).load(Ordering::Acquire);
        let (avail, used) = (flags & DESC_F_AVAIL != 0, flags & DESC_F_USED != 0);
        avail == used && used == self.used.wrap
    }

    /// The next completed chain, if there is one: id and written bytes. `None` also for an id that
    /// is not one of ours: a device may lie too.
    pub(super) fn pop(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let mut raw = [0; 16];
        self.arena.read(self.at.desc + 16 * u64::from(self.used.index), &mut raw);
        let len = u32::from_le_bytes([raw[8], raw[9], raw[10], raw[11]]);
        let id = u16::from_le_bytes([raw[12], raw[13]]);
        let count = self.held.get_mut(usize::from(id)).map_or(0, std::mem::take);
        // Without a known id there is no telling where the next completion is; one step keeps us
        // from seeing this one for ever.
        self.used = self.used.advance(count.max(1), self.size);
        if count == 0 {
            return None;
        }
        self.free += count;
        self.free_ids.push(id);
        Some((id, len))
    }

    /// Asks for a notification of the next completion; returns whether one waits already.
    pub(super) fn enable_calls(&mut self) -> bool {
        let position = u32::from(self.used.index) | u32::from(self.used.wrap) << 15;
        let flags = if self.event_idx { EVENT_DESC << 16 } else { 0 };
        self.wish(self.at.driver).store(position | flags, Ordering::Relaxed);
        // Pairs with the device's fence between a completion and its look at our wish.
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Says that no notifications are wanted; a hint only.
    pub(super) fn disable_calls(&mut self) {
        self.wish(self.at.driver).store(EVENT_DISABLE << 16, Ordering::Relaxed);
    }
}

fn encode(buffer: &Buffer, id: u16, flags: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&buffer.addr.0.to_le_bytes());
    raw[8..12].copy_from_slice(&buffer.len.to_le_bytes());
    raw[12..14].copy_from_slice(&id.to_le_bytes());
    raw[14..].copy_from_slice(&flags.to_le_bytes());
    raw
}
