//! One request of a queue on its way, from the ring of the guest to its answer.
//!
//! A request is done in windows of at most [`WINDOW`](crate::disk::plan::WINDOW) bytes: each is
//! planned, moved and published before the next. A slot is made once and used again and again; in
//! the steady state nothing here allocates.

use std::time::Instant;

use format::{Error, Result};
use vhost_blk::blk::{RangeList, Request};
use vhost_blk::queue::{Chain, Segment};

use crate::disk::Disk;
use crate::disk::gate::Pass;
use crate::disk::plan::{Place, Plan, TRANSFERS_MAX, Transfer};
use crate::serve::stats::OpKind;
use crate::store::buf::AlignedBuf;

/// Most buffers of one system call.
const IOVECS_MAX: usize = 1024;

/// What a slot waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing: it is free.
    Free,
    /// To be started, or started again, from `done` on.
    Ready,
    /// Its transfers, or a sync of its own.
    Moving,
    /// A flush, after which the written window is published.
    Room,
    /// A flush, after which a write-through write is complete.
    Durable,
    /// An errand in the slow lane.
    Slow,
    /// Space on the host; then it is started again.
    Held,
}

/// One transfer under way: what is left of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) row: u16,
    pub(super) offset: u64,
    pub(super) left: u64,
    /// Its buffers in `iovecs`.
    first: usize,
    count: usize,
}

pub(super) struct Slot {
    pub(super) chain: Chain,
    pub(super) list: RangeList,
    pub(super) request: Request,
    pub(super) began: Instant,
    pub(super) phase: Phase,
    pub(super) pass: Option<Pass>,
    pub(super) plan: Plan,
    pub(super) parts: Vec<Part>,
    iovecs: Vec<libc::iovec>,
    /// Transfers of the window that have not ended.
    pub(super) moving: u32,
    /// What went wrong with a transfer of the window.
    pub(super) error: Option<Error>,
    /// Bytes of a read or write, or ranges of a list, that are done.
    pub(super) done: u64,
    /// Counted as held.
    pub(super) held: bool,
    /// Let through by the limits.
    pub(super) paid: bool,
}

// SAFETY: the buffers in `iovecs` are guest memory that the chain keeps mapped; the slot moves
// between threads only as a whole.
unsafe impl Send for Slot {}

impl Default for Slot {
    fn default() -> Self {
        Slot {
            chain: Chain::new(),
            list: RangeList::default(),
            request: Request::Flush,
            began: Instant::now(),
            phase: Phase::Free,
            pass: None,
            plan: Plan::default(),
            parts: Vec::with_capacity(TRANSFERS_MAX),
            iovecs: Vec::with_capacity(IOVECS_MAX + TRANSFERS_MAX),
            moving: 0,
            error: None,
            done: 0,
            held: false,
            paid: false,
        }
    }
}

impl Slot {
    /// Takes a request in.
    pub(super) fn start(&mut self, request: Request, now: Instant) {
        self.request = request;
        self.began = now;
        self.phase = Phase::Ready;
        self.error = None;
        self.done = 0;
        self.held = false;
        self.paid = false;
    }

    pub(super) fn kind(&self) -> OpKind {
        match self.request {
            Request::Read { .. } | Request::GetId => OpKind::Read,
            Request::Write { .. } => OpKind::Write,
            Request::Flush => OpKind::Flush,
            Request::Discard => OpKind::Discard,
            Request::WriteZeroes => OpKind::WriteZeroes,
        }
    }

    /// Bytes that the request is about.
    pub(super) fn bytes(&self) -> u64 {
        match self.request {
            Request::Read { len, .. } | Request::Write { len, .. } => len,
            Request::Flush | Request::GetId => 0,
            Request::Discard | Request::WriteZeroes => {
                self.list.as_slice().iter().map(|r| r.len).sum()
            }
        }
    }

    /// What is left of a read or write: byte offset on the disk and length.
    pub(super) fn rest(&self) -> (u64, u64) {
        match self.request {
            Request::Read { offset, len } | Request::Write { offset, len } => {
                (offset + self.done, len - self.done)
            }
            _ => (0, 0),
        }
    }

    fn segments(&self) -> &[Segment] {
        match self.request {
            Request::Write { .. } => self.chain.readable(),
            _ => self.chain.writable(),
        }
    }

    /// Calls `each` with the guest memory of `len` bytes from byte `from` of the request on.
    fn each_segment(&self, from: u64, len: u64, each: &mut dyn FnMut(Segment)) {
        let (mut skip, mut left) = (from, len);
        for segment in self.segments() {
            let size = segment.len() as u64;
            if skip >= size {
                skip -= size;
                continue;
            }
            let take = (size - skip).min(left);
            each(segment.part(small(skip), small(take)));
            (skip, left) = (0, left - take);
            if left == 0 {
                return;
            }
        }
    }

    /// Lays the transfers of the plan out over the guest's buffers; holes of a read are zeroed at
    /// once. Returns false when the host would refuse a buffer as it is (`align` of a file says
    /// what it wants): the window must go the slow way then.
    pub(super) fn lay_out(&mut self, align: &mut dyn FnMut(u16) -> (usize, u64)) -> bool {
        self.parts.clear();
        self.iovecs.clear();
        let mut iovecs = std::mem::take(&mut self.iovecs);
        let mut parts = std::mem::take(&mut self.parts);
        let (mut at, mut fits) = (self.done, true);
        for transfer in self.plan.transfers() {
            match transfer.place {
                Place::Zeroes => {
                    self.each_segment(at, transfer.len, &mut |segment| segment.zero());
                }
                Place::File { row, offset } => {
                    let (memory, unit) = align(row);
                    let first = iovecs.len();
                    self.each_segment(at, transfer.len, &mut |segment| {
                        fits &= segment.base().addr().is_multiple_of(memory)
                            && (segment.len() as u64).is_multiple_of(unit);
                        let (iov_base, iov_len) = (segment.base().cast(), segment.len());
                        iovecs.push(libc::iovec { iov_base, iov_len });
                    });
                    let count = iovecs.len() - first;
                    fits &= count <= IOVECS_MAX && offset.is_multiple_of(unit);
                    parts.push(Part { row, offset, left: transfer.len, first, count });
                }
            }
            at += transfer.len;
        }
        (self.iovecs, self.parts) = (iovecs, parts);
        fits
    }

    /// Bytes of the window that a processor moves, because they are zeroes or their file is
    /// `cached`; no device does it meanwhile.
    pub(super) fn bytes_copied(&self, cached: &mut dyn FnMut(u16) -> bool) -> u64 {
        let mut copied = |transfer: &Transfer| match transfer.place {
            Place::Zeroes => true,
            Place::File { row, .. } => cached(row),
        };
        self.plan.transfers().iter().filter(|t| copied(t)).map(|t| t.len).sum()
    }

    /// The buffers of what is left of a transfer.
    pub(super) fn buffers(&self, part: usize) -> &[libc::iovec] {
        let Part { first, count, .. } = self.parts[part];
        &self.iovecs[first..first + count]
    }

    /// Some bytes of a transfer were moved; true when all were.
    pub(super) fn advance(&mut self, part: usize, bytes: u64) -> bool {
        let part = &mut self.parts[part];
        let mut skip = bytes.min(part.left);
        (part.offset, part.left) = (part.offset + skip, part.left - skip);
        while skip > 0 {
            let iovec = &mut self.iovecs[part.first];
            let size = iovec.iov_len as u64;
            if skip >= size {
                skip -= size;
                (part.first, part.count) = (part.first + 1, part.count - 1);
            } else {
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(small(skip)).cast();
                iovec.iov_len -= small(skip);
                skip = 0;
            }
        }
        part.left == 0
    }

    /// A copy of the next `len` bytes that the guest wants written.
    pub(super) fn copy_out(&self, len: u64) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed(small(len));
        let mut at = 0;
        self.each_segment(self.done, len, &mut |segment| {
            segment.copy_to(&mut buf[at..at + segment.len()]);
            at += segment.len();
        });
        buf
    }

    /// Gives the guest bytes that were read for it.
    pub(super) fn copy_in(&self, bytes: &[u8]) {
        let mut at = 0;
        self.each_segment(self.done, bytes.len() as u64, &mut |segment| {
            segment.copy_from(&bytes[at..at + segment.len()]);
            at += segment.len();
        });
    }

    /// Leaves the gate of the disk, if it is inside.
    pub(super) fn leave(&mut self, disk: &Disk) {
        if let Some(pass) = self.pass.take() {
            disk.leave(pass);
        }
    }

    /// Remembers the first thing that went wrong.
    pub(super) fn note(&mut self, outcome: Result<()>) {
        if let Err(e) = outcome {
            self.error.get_or_insert(e);
        }
    }
}

/// A length inside one window or segment.
fn small(bytes: u64) -> usize {
    usize::try_from(bytes).expect("addresses are 64 bits wide")
}
