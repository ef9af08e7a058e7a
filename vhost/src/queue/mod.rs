//! Virtqueues, device side.
//!
//! [`Queue`] is the ring engine alone: it takes chains of descriptors from a ring, keeps the
//! in-flight area and the dirty log, gives chains back and says when to notify the driver. It
//! knows neither sockets nor threads nor disks.
//!
//! One thread owns a queue. Taking, completing and publishing neither allocate nor lock nor log.
//!
//! Trust: the ring and every descriptor are the guest's claims. Each descriptor is read once, into
//! our own memory, and only that copy is checked and used. A ring that breaks the rules is
//! reported with a [`RingError`] and not touched again: completing a request whose status byte
//! cannot be trusted would tell the guest a lie.

mod chain;
mod keeper;
mod packed;
mod split;

pub use chain::{CHAIN_SEGMENTS_MAX, Chain, Segment, as_iovecs};

use std::fmt;
use std::sync::Arc;

use format::{Error, Result};

use crate::dirty_log::WriteLog;
use crate::inflight::InflightArea;
use crate::memory::{Memory, OutsideMemory, UserAddr};
use packed::PackedQueue;
pub(crate) use packed::RawDesc;
use split::SplitQueue;

/// Most descriptors that one ring may have.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Feature bit: everything the device writes is marked in the dirty log.
pub const F_LOG_ALL: u64 = 1 << 26;
/// Feature bit: descriptors may refer to tables of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit: each side says at which index it wants the next notification.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Feature bit: virtio 1.0 and later.
pub const F_VERSION_1: u64 = 1 << 32;
/// Feature bit: packed rings.
pub const F_RING_PACKED: u64 = 1 << 34;

/// Descriptor flag: the chain goes on.
pub(crate) const DESC_F_NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer.
pub(crate) const DESC_F_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub(crate) const DESC_F_INDIRECT: u16 = 4;

/// Whether the index `wish` was passed when an index went from `old` to `new`.
pub(crate) fn passed(wish: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(wish).wrapping_sub(1) < new.wrapping_sub(old)
}

/// How a ring is laid out in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingFormat {
    /// Descriptor table, available ring and used ring.
    Split,
    /// One ring of descriptors that both sides write.
    Packed,
}

impl RingFormat {
    /// The format that a set of negotiated features asks for.
    #[must_use]
    pub fn of(features: u64) -> RingFormat {
        if features & F_RING_PACKED != 0 { RingFormat::Packed } else { RingFormat::Split }
    }
}

/// Where the three parts of a ring lie, in the front end's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingAddrs {
    /// Descriptor table (split) or descriptor ring (packed).
    pub desc: UserAddr,
    /// Available ring (split) or driver event suppression (packed).
    pub driver: UserAddr,
    /// Used ring (split) or device event suppression (packed).
    pub device: UserAddr,
}

/// Where writes are logged.
#[derive(Debug, Clone, Default)]
pub struct LogTarget {
    /// The log for buffers that the device writes.
    pub log: Option<Arc<dyn WriteLog>>,
    /// The guest address that stands for the start of the used ring, if its writes are logged.
    pub ring: Option<u64>,
}

/// Everything a queue starts from.
#[derive(Debug, Clone)]
pub struct QueueSetup {
    /// Number of the queue in its device.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Where the ring is.
    pub addrs: RingAddrs,
    /// Negotiated features.
    pub features: u64,
    /// Next available index, as the protocol transports it; see [`Queue::base`].
    pub base: u32,
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// Where requests in work are recorded, if the front end wants that.
    pub inflight: Option<Arc<InflightArea>>,
    /// Where writes are logged.
    pub log: LogTarget,
}

/// The device side of one ring.
#[derive(Debug)]
pub struct Queue(Ring);

#[derive(Debug)]
enum Ring {
    Split(SplitQueue),
    Packed(PackedQueue),
}

/// The same call for either format.
macro_rules! ring {
    ($queue:expr, $ring:ident => $call:expr) => {
        match $queue {
            Ring::Split($ring) => $call,
            Ring::Packed($ring) => $call,
        }
    };
}

impl Queue {
    /// Takes a ring into operation. Requests that the in-flight area shows as unfinished are the
    /// first that [`Queue::pop`] returns, in their old order.
    ///
    /// # Errors
    /// `Invalid` when size, addresses or in-flight area make no sense.
    pub fn new(setup: QueueSetup) -> Result<Queue> {
        if setup.size == 0 || setup.size > QUEUE_SIZE_MAX {
            return Err(Error::invalid("the queue size is out of range"));
        }
        match RingFormat::of(setup.features) {
            RingFormat::Split => Ok(Queue(Ring::Split(SplitQueue::new(setup)?))),
            RingFormat::Packed => Ok(Queue(Ring::Packed(PackedQueue::new(setup)?))),
        }
    }

    /// Takes the next request into `chain`; `false` when there is none.
    ///
    /// # Errors
    /// A [`RingError`] when the guest broke the ring. The queue is of no more use then; the caller
    /// completes what it has in work and takes nothing more.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        ring!(&mut self.0, ring => ring.pop(chain))
    }

    /// Gives a chain back that wrote `written` bytes into its writable part. The driver sees it
    /// at the latest after [`Queue::publish`].
    pub fn complete(&mut self, chain: &mut Chain, written: u32) {
        ring!(&mut self.0, ring => ring.complete(chain, written));
    }

    /// Drops a chain without giving it back: the answer to a request that cannot be answered. The
    /// queue is of no more use afterwards.
    pub fn abandon(&mut self, chain: &mut Chain) {
        ring!(&mut self.0, ring => ring.abandon(chain));
    }

    /// Puts a chain back that was taken and not touched: [`Queue::pop`] takes it again. Of several,
    /// the one that was taken last is put back first, and none that was taken after it is out.
    pub fn put_back(&mut self, chain: &mut Chain) {
        ring!(&mut self.0, ring => ring.put_back(chain));
    }

    /// Leaves a chain to the next owner of the ring, undone, as the in-flight area shows it. Nobody
    /// uses its buffers any more; it counts as outstanding.
    pub fn set_aside(&mut self, chain: &mut Chain) {
        ring!(&mut self.0, ring => ring.set_aside(chain));
    }

    /// Makes completed chains visible to the driver; returns whether it wants to be notified.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        ring!(&mut self.0, ring => ring.publish())
    }

    /// Asks the driver to announce new requests; returns whether there already are some, which
    /// the caller must take before it sleeps.
    #[must_use]
    pub fn enable_kicks(&mut self) -> bool {
        ring!(&mut self.0, ring => ring.enable_kicks())
    }

    /// Tells the driver that it need not announce new requests. A hint: kicks may still come.
    pub fn disable_kicks(&mut self) {
        ring!(&mut self.0, ring => ring.disable_kicks());
    }

    /// Whether a request waits in the ring.
    #[must_use]
    pub fn has_work(&mut self) -> bool {
        ring!(&mut self.0, ring => ring.has_work())
    }

    /// The position in the ring as GET_VRING_BASE and SET_VRING_BASE transport it. Split: the next
    /// available index. Packed: position and wrap counter of the next offer, then the same of the
    /// next completion, 16 bits each.
    #[must_use]
    pub fn base(&self) -> u32 {
        ring!(&self.0, ring => ring.base())
    }

    /// Number of chains taken and not completed.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        ring!(&self.0, ring => ring.outstanding())
    }

    /// Records in the in-flight area that nothing is in work, if that is so. Call it when the ring
    /// is handed back, after the last [`Queue::publish`].
    pub fn close(&mut self) {
        ring!(&mut self.0, ring => ring.close());
    }

    /// Goes over to another memory table. Chains in work keep the one they came from.
    ///
    /// # Errors
    /// `Invalid` when the ring itself is not in the new table; the queue keeps the old one.
    pub fn set_memory(&mut self, memory: Arc<Memory>) -> Result<()> {
        ring!(&mut self.0, ring => ring.set_memory(memory))
    }

    /// Lets go of guest memory. The queue is of no more use afterwards; chains that are out keep
    /// the table that they came from.
    pub fn let_go(&mut self) {
        ring!(&mut self.0, ring => ring.let_go());
    }

    /// Changes where writes are logged; holds for chains in work as well.
    pub fn set_log(&mut self, log: LogTarget) {
        ring!(&mut self.0, ring => ring.set_log(log));
    }

    /// Whether the front end truncated memory that this queue needs.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        ring!(&self.0, ring => ring.is_lost())
    }
}

/// How a guest broke a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingError {
    /// The available index moved by more than the ring holds.
    IndexJump,
    /// A head, next or buffer id is outside the ring.
    OutOfRange,
    /// A chain has more descriptors than its ring or table: it loops.
    Loop,
    /// A chain has more segments than [`CHAIN_SEGMENTS_MAX`] or more than 4 GiB.
    Oversize,
    /// A buffer or table is not in guest memory.
    BadAddress,
    /// An indirect table although that was not negotiated.
    IndirectNotNegotiated,
    /// An indirect table inside an indirect table, or with a successor.
    NestedIndirect,
    /// An indirect table of no or of half descriptors.
    IndirectSize,
    /// A readable buffer after a writable one.
    ReadAfterWrite,
    /// No writable byte, so that no status can be reported.
    NoStatus,
}

impl RingError {
    fn reason(self) -> &'static str {
        match self {
            RingError::IndexJump => "the available index moved by more than the ring holds",
            RingError::OutOfRange => "a descriptor number is outside the ring",
            RingError::Loop => "a descriptor chain loops",
            RingError::Oversize => "a descriptor chain is too long",
            RingError::BadAddress => "a buffer is not in guest memory",
            RingError::IndirectNotNegotiated => "an indirect descriptor that was not negotiated",
            RingError::NestedIndirect => "an indirect descriptor is nested or has a successor",
            RingError::IndirectSize => "an indirect table has no whole number of descriptors",
            RingError::ReadAfterWrite => "a readable buffer follows a writable one",
            RingError::NoStatus => "a request has no room for its status",
        }
    }
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

impl std::error::Error for RingError {}

impl From<RingError> for Error {
    fn from(e: RingError) -> Error {
        Error::invalid(e.reason()).tried("read a request from")
    }
}

impl From<OutsideMemory> for RingError {
    fn from(_: OutsideMemory) -> RingError {
        RingError::BadAddress
    }
}
