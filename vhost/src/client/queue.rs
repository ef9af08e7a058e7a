//! One queue of a client: block requests in, completions out.
//!
//! Invariant: a request's header, status byte and tables live in the arena at a place of their own
//! for as long as the request is in the ring.

use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};

use super::arena::Arena;
use super::packed::PackedDriver;
use super::split::SplitDriver;
use super::{Buffer, QueuePlace};
use crate::blk::{RANGES_MAX, SECTOR};
use crate::event::EventFd;
use crate::util::{low32, wide};

/// Most data spans of one request.
pub const SPANS_MAX: usize = 64;

/// Offsets in a request's own place.
const STATUS: u64 = 16;
const RANGES: u64 = 32;
const TABLE: u64 = RANGES + 16 * RANGES_MAX as u64;
/// Bytes of a request's own place.
pub(super) const SLOT_SIZE: u64 = TABLE + 16 * (SPANS_MAX as u64 + 2);

/// Status byte before the device writes it; no device does.
const STATUS_UNTOUCHED: u8 = 0xff;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op<'a> {
    /// Read into the spans.
    Read,
    /// Write from the spans.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Read the serial number into the spans.
    GetId,
    /// Discard ranges: offset and length in bytes.
    Discard(&'a [(u64, u64)]),
    /// Write zeroes to ranges, with or without freeing their space.
    WriteZeroes {
        /// Offset and length in bytes.
        ranges: &'a [(u64, u64)],
        /// Whether the space may be freed.
        unmap: bool,
    },
    /// Any request type, with the spans writable; for tests of what a device does not know.
    Other(u32),
}

/// A piece of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Offset in the arena, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// A completed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// What [`ClientQueue::submit`] was given.
    pub token: u64,
    /// The status byte.
    pub status: u8,
    /// Bytes that the device says it wrote, status byte included.
    pub written: u32,
}

#[derive(Debug)]
enum Driver {
    Split(SplitDriver),
    Packed(PackedDriver),
}

/// The same call for either format.
macro_rules! ring {
    ($queue:expr, $ring:ident => $call:expr) => {
        match $queue {
            Driver::Split($ring) => $call,
            Driver::Packed($ring) => $call,
        }
    };
}

/// One queue; may move to a thread of its own.
#[derive(Debug)]
pub struct ClientQueue {
    arena: Arc<Arena>,
    place: QueuePlace,
    ring: Driver,
    indirect: bool,
    tokens: Vec<Option<u64>>,
    scratch: Vec<Buffer>,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
}

impl ClientQueue {
    pub(super) fn new(
        arena: Arc<Arena>,
        place: QueuePlace,
        features: u64,
        doorbells: (Arc<EventFd>, Arc<EventFd>),
    ) -> ClientQueue {
        use crate::queue::{F_EVENT_IDX, F_INDIRECT_DESC, RingFormat};
        let event_idx = features & F_EVENT_IDX != 0;
        let (at, size) = (place.ring, place.size);
        let ring = match RingFormat::of(features) {
            RingFormat::Split => {
                Driver::Split(SplitDriver::new(arena.clone(), at, size, event_idx))
            }
            RingFormat::Packed => {
                Driver::Packed(PackedDriver::new(arena.clone(), at, size, event_idx))
            }
        };
        let (kick, call) = doorbells;
        ClientQueue {
            arena,
            place,
            ring,
            indirect: features & F_INDIRECT_DESC != 0,
            tokens: vec![None; usize::from(place.size)],
            scratch: Vec::with_capacity(SPANS_MAX + 2),
            kick,
            call,
        }
    }

    /// The shared memory.
    #[must_use]
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// The part of the arena that this queue may use for data: offset and bytes.
    #[must_use]
    pub fn data(&self) -> (u64, u64) {
        (self.place.data, self.place.data_size)
    }

    /// Where the ring lies in the arena; for tests that write into it behind our back.
    #[must_use]
    pub fn place(&self) -> QueuePlace {
        self.place
    }

    /// The doorbell that the device rings for completions that [`ClientQueue::wait`] asked for, for
    /// sleeping on more than one.
    #[must_use]
    pub fn calls(&self) -> Arc<EventFd> {
        self.call.clone()
    }

    /// Requests that are in the ring.
    #[must_use]
    pub fn in_work(&self) -> usize {
        self.tokens.iter().flatten().count()
    }

    /// Puts a request into the ring; the device sees it after [`ClientQueue::kick`]. `offset` is
    /// in bytes and counts for reads and writes.
    ///
    /// # Errors
    /// `Busy` when the ring is full: take completions first. `Invalid` for offsets that are no
    /// multiples of a sector and for too many spans or ranges.
    pub fn submit(&mut self, op: Op<'_>, offset: u64, spans: &[Span], token: u64) -> Result<()> {
        let (kind, ranges, unmap): (u32, &[(u64, u64)], bool) = match op {
            Op::Read => (0, &[], false),
            Op::Write => (1, &[], false),
            Op::Flush => (4, &[], false),
            Op::GetId => (8, &[], false),
            Op::Discard(ranges) => (11, ranges, false),
            Op::WriteZeroes { ranges, unmap } => (13, ranges, unmap),
            Op::Other(kind) => (kind, &[], false),
        };
        if !offset.is_multiple_of(SECTOR) || spans.len() > SPANS_MAX || ranges.len() > RANGES_MAX {
            return Err(Error::invalid("an unaligned offset, or too many spans or ranges"));
        }
        let needed = if self.indirect { 1 } else { spans.len() + 3 };
        let full = || Error::new(Kind::Busy, "the ring is full");
        if ring!(&self.ring, ring => ring.free()) < needed {
            return Err(full());
        }
        let id = ring!(&self.ring, ring => ring.next_id()).ok_or_else(full)?;
        let slot = self.place.slots + SLOT_SIZE * u64::from(id);
        let mut header = [0; 17];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&(offset / SECTOR).to_le_bytes());
        header[16] = STATUS_UNTOUCHED;
        self.arena.write(slot, &header);
        self.write_ranges(slot + RANGES, ranges, unmap)?;

        let arena = &self.arena;
        let buffer =
            |offset: u64, len: u32, writable| Buffer { addr: arena.guest(offset), len, writable };
        self.scratch.clear();
        self.scratch.push(buffer(slot, 16, false));
        if !ranges.is_empty() {
            self.scratch.push(buffer(slot + RANGES, low32(16 * wide(ranges.len())), false));
        }
        let into = op != Op::Write;
        self.scratch.extend(spans.iter().map(|s| buffer(s.offset, s.len, into)));
        self.scratch.push(buffer(slot + STATUS, 1, true));
        if self.indirect {
            ring!(&mut self.ring, ring => ring.add_indirect(slot + TABLE, &self.scratch));
        } else {
            ring!(&mut self.ring, ring => ring.add(&self.scratch));
        }
        self.tokens[usize::from(id)] = Some(token);
        Ok(())
    }

    fn write_ranges(&self, at: u64, ranges: &[(u64, u64)], unmap: bool) -> Result<()> {
        for (i, (offset, len)) in ranges.iter().enumerate() {
            let sectors = u32::try_from(len / SECTOR);
            let aligned = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
            let (Ok(sectors), true) = (sectors, aligned) else {
                return Err(Error::invalid("a range of no whole sectors, or too long"));
            };
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&(offset / SECTOR).to_le_bytes());
            raw[8..12].copy_from_slice(&sectors.to_le_bytes());
            raw[12..].copy_from_slice(&u32::from(unmap).to_le_bytes());
            self.arena.write(at + 16 * wide(i), &raw);
        }
        Ok(())
    }

    /// Shows submitted requests to the device and wakes it if it sleeps; returns whether it did.
    pub fn kick(&mut self) -> bool {
        let wanted = ring!(&mut self.ring, ring => ring.publish());
        if wanted {
            self.kick.signal();
        }
        wanted
    }

    /// The next completed request, if there is one.
    pub fn poll(&mut self) -> Option<Completion> {
        loop {
            if !ring!(&self.ring, ring => ring.has_used()) {
                return None;
            }
            // A device that returns what it was never given is not our problem to fix.
            let Some((id, written)) = ring!(&mut self.ring, ring => ring.pop()) else { continue };
            let Some(token) = self.tokens[usize::from(id)].take() else { continue };
            let mut status = [0];
            self.arena.read(self.place.slots + SLOT_SIZE * u64::from(id) + STATUS, &mut status);
            return Some(Completion { token, status: status[0], written });
        }
    }

    /// Sleeps until a completion is there, at most `timeout_ms`; returns whether one is. Doorbells
    /// that ring for nothing, as at every start of a queue, are slept over.
    pub fn wait(&mut self, timeout_ms: u32) -> bool {
        let end = Instant::now() + Duration::from_millis(timeout_ms.into());
        while !ring!(&mut self.ring, ring => ring.enable_calls()) {
            let left = end.saturating_duration_since(Instant::now());
            let left = u32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u32::MAX);
            if !self.call.wait(left) {
                return ring!(&self.ring, ring => ring.has_used());
            }
            self.call.drain();
        }
        ring!(&mut self.ring, ring => ring.disable_calls());
        true
    }

    /// Submits one request and waits for it, at most `timeout_ms`. For queues with nothing else in
    /// work.
    ///
    /// # Errors
    /// As [`ClientQueue::submit`], and `Busy` when the device does not answer in time.
    pub fn run(
        &mut self,
        op: Op<'_>,
        offset: u64,
        spans: &[Span],
        timeout_ms: u32,
    ) -> Result<Completion> {
        self.submit(op, offset, spans, u64::MAX)?;
        self.kick();
        while self.wait(timeout_ms) {
            // A completion of something that was never submitted leaves nothing to return.
            if let Some(completion) = self.poll() {
                return Ok(completion);
            }
        }
        Err(Error::new(Kind::Busy, "the device did not answer in time"))
    }
}
