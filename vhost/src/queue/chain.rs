//! One request as the ring delivers it: a list of readable, then a list of writable segments.
//!
//! A chain is a reusable slot: it is made once with room for the largest request and filled again
//! and again. Its pointers are valid from [`super::Queue::pop`] until
//! [`super::Queue::complete`] on the same queue.
//!
//! Invariant: `segments[..readable]` are readable and the rest writable; `addrs` runs parallel to
//! `segments` and holds the guest address of each, for the dirty log.

use super::RingError;
use crate::memory::mapping::{copy_in, copy_out, zero_out};
use crate::memory::{GuestAddr, Memory};
use crate::util::{index, low32, wide};

/// Most segments of one chain: what one vectored system call takes, a header and a status.
pub const CHAIN_SEGMENTS_MAX: usize = 1024 + 2;

/// A piece of guest memory. The layout is that of `struct iovec`.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length; who uses it answers for the access.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    fn new(base: *mut u8, len: usize) -> Segment {
        Segment(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// First byte. Shared with the guest: use volatile or kernel access only.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether the segment has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// The part of `len` bytes from `offset`.
    ///
    /// # Panics
    /// When the part does not lie inside.
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Segment {
        assert!(offset <= self.len() && len <= self.len() - offset);
        Segment::new(self.base().wrapping_add(offset), len)
    }
}

/// Bytes of guest memory that a worker touches itself. They are valid while the chain that the
/// segment belongs to is out, and the guest may change them at any time.
impl Segment {
    /// Writes zeroes.
    pub fn zero(&self) {
        // SAFETY: all bytes of a segment, which is valid while the chain is out. The guest may
        // look on, and nobody here has a reference to the bytes.
        unsafe { zero_out(self.base(), self.len()) };
    }

    /// Copies `src` to the front of the segment.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn copy_from(&self, src: &[u8]) {
        assert!(src.len() <= self.len());
        // SAFETY: as in `zero`, and the length was checked.
        unsafe { copy_out(self.base(), src) };
    }

    /// Copies the front of the segment to `dst`.
    ///
    /// # Panics
    /// When the segment is shorter.
    pub fn copy_to(&self, dst: &mut [u8]) {
        assert!(dst.len() <= self.len());
        // SAFETY: as in `zero`, and the length was checked.
        unsafe { copy_in(dst, self.base()) };
    }
}

/// The same segments as an `iovec` array for a system call.
#[must_use]
pub fn as_iovecs(segments: &[Segment]) -> &[libc::iovec] {
    // SAFETY: `Segment` is a transparent wrapper of `iovec`.
    unsafe { std::slice::from_raw_parts(segments.as_ptr().cast(), segments.len()) }
}

/// A request slot; see the module's head.
#[derive(Debug)]
pub struct Chain {
    segments: Vec<Segment>,
    addrs: Vec<u64>,
    readable: usize,
    /// Readable segments before this one are used up by [`Chain::take`].
    first: usize,
    /// Bytes of the readable part not yet taken, and of the writable part without the status.
    lens: (u64, u64),
    status: Option<(Segment, u64)>,
    /// Split: the head descriptor. Packed: the buffer id.
    pub(super) id: u16,
    /// Packed: ring descriptors that the chain takes, and its entry in the in-flight region.
    pub(super) slots: u16,
    pub(super) entry: u16,
    /// Memory generation, see `Keeper`.
    pub(super) generation: u32,
}

impl Default for Chain {
    fn default() -> Self {
        Chain::new()
    }
}

impl Chain {
    /// An empty slot with room for the largest request. The room costs address space only until
    /// it is used.
    #[must_use]
    pub fn new() -> Chain {
        Chain {
            segments: Vec::with_capacity(CHAIN_SEGMENTS_MAX),
            addrs: Vec::with_capacity(CHAIN_SEGMENTS_MAX),
            readable: 0,
            first: 0,
            lens: (0, 0),
            status: None,
            id: 0,
            slots: 0,
            entry: 0,
            generation: 0,
        }
    }

    pub(super) fn reset(&mut self, id: u16, generation: u32) {
        self.segments.clear();
        self.addrs.clear();
        (self.readable, self.first, self.lens, self.status) = (0, 0, (0, 0), None);
        (self.id, self.generation) = (id, generation);
    }

    /// Adds one buffer. Empty buffers are legal and leave no segment.
    pub(super) fn push(
        &mut self,
        memory: &Memory,
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), RingError> {
        if !writable && self.lens.1 > 0 {
            return Err(RingError::ReadAfterWrite);
        }
        if len == 0 {
            return Ok(());
        }
        let total = if writable { &mut self.lens.1 } else { &mut self.lens.0 };
        *total += u64::from(len);
        if self.lens.0 + self.lens.1 > u64::from(u32::MAX) {
            return Err(RingError::Oversize);
        }
        let (mut at, mut full) = (addr, false);
        memory.pieces(GuestAddr(addr), u64::from(len), |base, len| {
            full |= self.segments.len() == CHAIN_SEGMENTS_MAX;
            if !full {
                self.segments.push(Segment::new(base, len));
                self.addrs.push(at);
                at += wide(len);
            }
        })?;
        if full {
            return Err(RingError::Oversize);
        }
        if !writable {
            self.readable = self.segments.len();
        }
        Ok(())
    }

    /// The readable segments that were not taken yet: for a write request, its data.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.segments[self.first..self.readable]
    }

    /// The writable segments without the status byte: for a read request, where the data goes.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Bytes in [`Chain::readable`].
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        self.lens.0
    }

    /// Bytes in [`Chain::writable`].
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        self.lens.1
    }

    /// Takes `dst.len()` bytes from the front of the readable part; `false`, and nothing taken, if
    /// it has fewer. Every byte can be taken once only, so nobody can see two versions of it.
    #[must_use]
    pub fn take(&mut self, dst: &mut [u8]) -> bool {
        if self.lens.0 < wide(dst.len()) {
            return false;
        }
        self.lens.0 -= wide(dst.len());
        let mut dst = dst;
        while !dst.is_empty() {
            let segment = self.segments[self.first];
            let len = segment.len().min(dst.len());
            let (now, later) = dst.split_at_mut(len);
            // SAFETY: `len` bytes of a segment, which is valid while the chain is out.
            unsafe { copy_in(now, segment.base()) };
            dst = later;
            self.segments[self.first] = segment.part(len, segment.len() - len);
            self.addrs[self.first] += wide(len);
            if len == segment.len() {
                self.first += 1;
            }
        }
        true
    }

    /// Splits the last writable byte off: the status byte of a block request. `false` if there is
    /// no writable byte.
    #[must_use]
    pub fn split_status(&mut self) -> bool {
        let Some(last) = self.segments.get_mut(self.readable..).and_then(<[_]>::last_mut) else {
            return false;
        };
        let rest = last.len() - 1;
        let addr = self.addrs[self.addrs.len() - 1] + wide(rest);
        self.status = Some((last.part(rest, 1), addr));
        *last = last.part(0, rest);
        if rest == 0 {
            self.segments.pop();
            self.addrs.pop();
        }
        self.lens.1 -= 1;
        true
    }

    /// Stores the status byte.
    ///
    /// # Panics
    /// When [`Chain::split_status`] was not called for this request.
    pub fn set_status(&mut self, status: u8) {
        let (segment, _) = self.status.expect("the status byte was split off");
        // SAFETY: one byte of a segment, which is valid while the chain is out.
        unsafe { segment.base().write_volatile(status) };
    }

    /// Length of the whole writable part, status byte included: the `len` of a completion. Block
    /// drivers expect it also of failed requests, because the status is the last byte of it.
    #[must_use]
    pub fn written_len(&self) -> u32 {
        low32(self.lens.1 + u64::from(self.status.is_some()))
    }

    /// Copies `src` to the front of the writable part, as far as it fits; returns how much did.
    pub fn fill(&mut self, src: &[u8]) -> usize {
        let mut done = 0;
        for segment in &self.segments[self.readable..] {
            let len = segment.len().min(src.len() - done);
            // SAFETY: at most the length of a segment, which is valid while the chain is out.
            unsafe { copy_out(segment.base(), &src[done..done + len]) };
            done += len;
        }
        done
    }

    /// Leaves only the first `len` bytes of the writable part: the device writes no others, and
    /// none but these are marked as written.
    pub fn shorten(&mut self, len: u64) {
        let mut left = len;
        for i in self.readable..self.segments.len() {
            let segment = self.segments[i];
            if left <= wide(segment.len()) {
                let keep = i + usize::from(left > 0);
                self.segments[i] = segment.part(0, index(left));
                self.segments.truncate(keep);
                self.addrs.truncate(keep);
                break;
            }
            left -= wide(segment.len());
        }
        self.lens.1 = self.lens.1.min(len);
    }

    /// Calls `each(guest address, length)` for everything the device may have written.
    pub(super) fn written(&self, mut each: impl FnMut(u64, u64)) {
        for (segment, addr) in self.segments.iter().zip(&self.addrs).skip(self.readable) {
            each(*addr, wide(segment.len()));
        }
        if let Some((_, addr)) = self.status {
            each(addr, 1);
        }
    }
}
