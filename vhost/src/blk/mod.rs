//! The block device as the guest sees it: what it offers, its configuration space, its requests.
//!
//! Invariant: a feature bit is offered only if [`Capabilities`] says that the disk can do it, and
//! the configuration space is computed from the same value; so they cannot disagree.

mod config;
mod request;

pub use config::{CONFIG_SIZE, read_config, write_cache_byte};
pub use request::{Limits, RANGES_MAX, Range, RangeList, Refused, Request, Status, parse};

use crate::queue::{F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1};

/// Bytes of a sector, the unit of addresses and lengths in requests, whatever the block size.
pub const SECTOR: u64 = 512;

/// Feature bit: largest segment in the configuration.
pub const F_SIZE_MAX: u64 = 1 << 1;
/// Feature bit: largest number of segments in the configuration.
pub const F_SEG_MAX: u64 = 1 << 2;
/// Feature bit: the disk cannot be written.
pub const F_RO: u64 = 1 << 5;
/// Feature bit: block size in the configuration.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// Feature bit: the disk has a volatile cache and takes flush requests.
pub const F_FLUSH: u64 = 1 << 9;
/// Feature bit: physical block size and optimal sizes in the configuration.
pub const F_TOPOLOGY: u64 = 1 << 10;
/// Feature bit: the driver can read and switch the cache mode.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// Feature bit: several queues.
pub const F_MQ: u64 = 1 << 12;
/// Feature bit: discard requests.
pub const F_DISCARD: u64 = 1 << 13;
/// Feature bit: write-zeroes requests.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Limits of requests that name ranges (discard, write zeroes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeLimits {
    /// Most sectors of one range.
    pub sectors_max: u32,
    /// Most ranges of one request; at most [`RANGES_MAX`] are ever offered.
    pub ranges_max: u32,
    /// Multiple, in sectors, at which ranges should start.
    pub alignment: u32,
}

/// What a disk can do. The daemon derives it from the disk and its store; nothing else decides
/// what the guest is offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical block size in bytes: the unit guests should address.
    pub block_size: u32,
    /// Physical block size as a power of two of logical blocks.
    pub physical_block_exp: u8,
    /// Smallest efficient transfer, in logical blocks.
    pub min_io_blocks: u16,
    /// Best transfer, in logical blocks.
    pub opt_io_blocks: u32,
    /// Most data segments of one request.
    pub seg_max: u32,
    /// Most bytes of one segment; 0 for no limit.
    pub size_max: u32,
    /// Whether the disk refuses writes.
    pub read_only: bool,
    /// Whether completed writes may still be lost by a power cut, so that flushes matter.
    pub volatile_cache: bool,
    /// Discard, if the disk frees space.
    pub discard: Option<RangeLimits>,
    /// Write zeroes, if the disk does it without being sent the zeros.
    pub write_zeroes: Option<RangeLimits>,
    /// Whether write zeroes with UNMAP frees space.
    pub write_zeroes_unmaps: bool,
    /// Number of queues, at least 1.
    pub queues: u16,
    /// Most descriptors of a queue, at most [`crate::queue::QUEUE_SIZE_MAX`].
    pub queue_size_max: u16,
    /// Whether the driver may choose packed rings.
    pub packed: bool,
    /// Answer to GET_ID; shorter serials are padded with zero bytes.
    pub serial: [u8; 20],
}

impl Default for Capabilities {
    /// A writable disk of no size with one queue and a volatile cache, and nothing optional.
    fn default() -> Self {
        Capabilities {
            sectors: 0,
            block_size: 512,
            physical_block_exp: 3,
            min_io_blocks: 8,
            opt_io_blocks: 0,
            seg_max: 254,
            size_max: 0,
            read_only: false,
            volatile_cache: true,
            discard: None,
            write_zeroes: None,
            write_zeroes_unmaps: false,
            queues: 1,
            queue_size_max: 1024,
            packed: false,
            serial: [0; 20],
        }
    }
}

impl Capabilities {
    /// The virtio feature bits to offer.
    #[must_use]
    pub fn features(&self) -> u64 {
        let mut bits = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
        bits |= F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY;
        let mut offer = |when: bool, bit: u64| bits |= if when { bit } else { 0 };
        offer(self.size_max > 0, F_SIZE_MAX);
        offer(self.read_only, F_RO);
        // The cache mode can be switched whenever there is a cache: write-through is write-back
        // with a flush after each write.
        offer(self.volatile_cache, F_FLUSH | F_CONFIG_WCE);
        offer(self.queues > 1, F_MQ);
        offer(self.discard.is_some() && !self.read_only, F_DISCARD);
        offer(self.write_zeroes.is_some() && !self.read_only, F_WRITE_ZEROES);
        offer(self.packed, F_RING_PACKED);
        bits
    }

    /// The cache mode that negotiated features imply before the driver has switched it: `true` for
    /// write-back. A driver that took neither flush nor the switch cannot flush, so every write
    /// must be durable when it completes.
    #[must_use]
    pub fn initial_write_back(&self, negotiated: u64) -> bool {
        self.volatile_cache && negotiated & (F_FLUSH | F_CONFIG_WCE) != 0
    }

    /// What [`parse`] checks requests against, for a driver that negotiated `features`.
    #[must_use]
    pub fn limits(&self, features: u64) -> Limits {
        Limits {
            sectors: self.sectors,
            read_only: self.read_only,
            discard: self.discard.filter(|_| features & F_DISCARD != 0),
            write_zeroes: self.write_zeroes.filter(|_| features & F_WRITE_ZEROES != 0),
            write_zeroes_unmaps: self.write_zeroes_unmaps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_offered_that_the_disk_cannot_do() {
        let plain = Capabilities { volatile_cache: false, ..Capabilities::default() };
        let optional =
            F_FLUSH | F_CONFIG_WCE | F_MQ | F_DISCARD | F_WRITE_ZEROES | F_RO | F_RING_PACKED;
        assert_eq!(plain.features() & optional, 0);
        let ranges = RangeLimits { sectors_max: 8, ranges_max: 1, alignment: 1 };
        let full = Capabilities {
            queues: 4,
            packed: true,
            volatile_cache: true,
            discard: Some(ranges),
            write_zeroes: Some(ranges),
            ..plain
        };
        assert_eq!(full.features() & optional, optional & !F_RO);
        let ro = Capabilities { read_only: true, ..full };
        assert_eq!(ro.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    }

    #[test]
    fn driver_that_cannot_flush_gets_write_through() {
        let caps = Capabilities::default();
        assert!(caps.initial_write_back(F_FLUSH));
        assert!(caps.initial_write_back(F_CONFIG_WCE));
        assert!(!caps.initial_write_back(F_MQ));
        let durable = Capabilities { volatile_cache: false, ..caps };
        assert!(!durable.initial_write_back(F_FLUSH | F_CONFIG_WCE));
    }
}
