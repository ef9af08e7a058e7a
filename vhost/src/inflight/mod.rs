//! The in-flight area (INFLIGHT_SHMFD): which requests were taken from each ring and not yet
//! given back, in memory that outlives this process.
//!
//! The front end keeps the file and gives it to the next daemon, which finds in it what the last
//! one had in work when it died. The layout is the one of the vhost-user specification, one
//! region per queue, so that other back ends understand ours and we understand theirs.
//!
//! Crash model: the process stops between any two instructions, memory stays. So the order of
//! stores in the program is all that counts; each store is a Release, whose partner is the first
//! load of the next process.
//!
//! Trust: the area lives with the front end. Every index read back from it is checked; a bad area
//! is refused when a queue starts, and never followed.

pub(crate) mod packed;
pub(crate) mod split;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};

use format::{Error, Kind, Result};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::memory::mapping::Mapping;
use crate::queue::{QUEUE_SIZE_MAX, RingFormat};

/// Offset of the version in a region of either format; 0 stands for a new region.
const VERSION_OFFSET: usize = 8;

/// Alignment of each queue's region in the area, in bytes.
const REGION_ALIGN: u64 = 64;

/// The area of all queues of one device.
#[derive(Debug)]
pub struct InflightArea {
    map: Mapping,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

/// What the protocol messages say about an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InflightSpec {
    /// Bytes of the file that belong to the area.
    pub size: u64,
    /// Offset of the area in the file.
    pub offset: u64,
    /// Number of queues with a region.
    pub queues: u16,
    /// Descriptors of each queue.
    pub queue_size: u16,
}

impl InflightArea {
    /// A new, zeroed area in a file of its own that nobody can truncate.
    ///
    /// # Errors
    /// `Invalid` for a queue size or number out of range; the host's error otherwise.
    pub fn create(queues: u16, queue_size: u16) -> Result<InflightArea> {
        check_shape(queues, queue_size)?;
        // Room for either format: the driver may choose its ring format after this call.
        let region = RingFormat::Packed.region_size(queue_size);
        let size = region * u64::from(queues);
        let host = |e| Error::from(std::io::Error::from(e)).tried("create an in-flight area");
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("vhost-inflight", flags).map_err(host)?;
        ftruncate(&file, size).map_err(host)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(host)?;
        Ok(InflightArea { map: Mapping::new(file, 0, size)?, offset: 0, queues, queue_size })
    }

    /// Maps an area that a front end kept.
    ///
    /// # Errors
    /// `Invalid` when its numbers contradict each other or the file.
    pub fn attach(spec: InflightSpec, file: OwnedFd) -> Result<InflightArea> {
        check_shape(spec.queues, spec.queue_size)?;
        let least = RingFormat::Split.region_size(spec.queue_size) * u64::from(spec.queues);
        if spec.size < least {
            return Err(Error::invalid("the in-flight area is too small for its queues"));
        }
        let map = Mapping::new(file, spec.offset, spec.size)?;
        let InflightSpec { offset, queues, queue_size, .. } = spec;
        Ok(InflightArea { map, offset, queues, queue_size })
    }

    /// The numbers that the protocol message carries.
    #[must_use]
    pub fn spec(&self) -> InflightSpec {
        InflightSpec {
            size: crate::util::wide(self.map.len()),
            offset: self.offset,
            queues: self.queues,
            queue_size: self.queue_size,
        }
    }

    /// The shared file.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.map.file().expect("the area was mapped from a file")
    }

    /// Makes the region of queue `index` new, so that the next start takes its position from the
    /// front end. For a ring that is stopped, whose position the front end was told or took back.
    pub(crate) fn forget(&self, index: u16, format: RingFormat) {
        // Without a region there is nothing to forget.
        let Ok(region) = self.region(index, 1, format) else { return };
        // SAFETY: `region` checked that a header lies there, aligned to 8; the version has the
        // same place in both formats and is accessed atomically.
        let version = unsafe { AtomicU16::from_ptr(region.add(VERSION_OFFSET).cast()) };
        version.store(0, Ordering::Release);
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.map.is_lost()
    }

    /// Start of the region of queue `index`, if it lies in the area and serves `size` descriptors.
    fn region(&self, index: u16, size: u16, format: RingFormat) -> Result<*mut u8> {
        if index >= self.queues || size > self.queue_size {
            return Err(Error::invalid("the in-flight area has no room for this queue"));
        }
        let stride = format.region_size(self.queue_size);
        let at = stride * u64::from(index);
        let region = self.map.range(at, stride);
        let region = region.filter(|p| p.align_offset(8) == 0);
        region.ok_or_else(|| Error::invalid("the in-flight area is too small or unaligned"))
    }
}

impl RingFormat {
    /// Bytes of one queue's region.
    fn region_size(self, queue_size: u16) -> u64 {
        let (header, state) = match self {
            RingFormat::Split => (split::HEADER_SIZE, split::STATE_SIZE),
            RingFormat::Packed => (packed::HEADER_SIZE, packed::STATE_SIZE),
        };
        (header + state * u64::from(queue_size)).next_multiple_of(REGION_ALIGN)
    }
}

fn check_shape(queues: u16, queue_size: u16) -> Result<()> {
    if queues == 0 || queue_size == 0 || queue_size > QUEUE_SIZE_MAX {
        return Err(Error::invalid("an in-flight area for no queue, or for queues out of range"));
    }
    Ok(())
}

fn mismatch(reason: &'static str) -> Error {
    Error::new(Kind::Invalid, reason).on("in-flight area")
}
