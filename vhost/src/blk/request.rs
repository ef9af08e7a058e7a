//! Block requests: from a chain of segments to a checked operation.
//!
//! The header is the first 16 readable bytes and the status the last writable one, wherever the
//! driver cuts its buffers. Each header byte is read once.
//!
//! Invariant: a [`Request`] is in bounds of the disk as [`Limits`] describes it, in whole sectors,
//! and its length is the length of the data segments left in the chain.

use super::{RangeLimits, SECTOR};
use crate::queue::{Chain, RingError};
use crate::util::{index, wide};

/// Most ranges that one discard or write-zeroes request may name.
pub const RANGES_MAX: usize = 16;

const HEADER: usize = 16;
const RANGE: u64 = 16;
const RANGE_F_UNMAP: u32 = 1;

/// What the driver reads in the status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The device or the driver made an error.
    IoError = 1,
    /// The device does not do this.
    Unsupported = 2,
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Limits of discard, if it was negotiated.
    pub discard: Option<RangeLimits>,
    /// Limits of write zeroes, if it was negotiated.
    pub write_zeroes: Option<RangeLimits>,
    /// Whether the UNMAP flag of write zeroes frees space. If not, it is accepted and ignored, as
    /// the specification allows.
    pub write_zeroes_unmaps: bool,
}

/// A part of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Write zeroes only: the space may be freed.
    pub unmap: bool,
}

/// A checked request. Offsets and lengths are in bytes and multiples of [`SECTOR`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Read `len` bytes from `offset` into [`Chain::writable`].
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Write the `len` bytes of [`Chain::readable`] to `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Make every completed write durable.
    Flush,
    /// Put the serial number into [`Chain::writable`], as far as it fits.
    GetId,
    /// The content of the ranges in the list is no longer needed.
    Discard,
    /// The ranges in the list read as zeros from now on.
    WriteZeroes,
}

/// The ranges of the last discard or write-zeroes request that was parsed with this list. Kept
/// apart from [`Request`] because every other request is small.
#[derive(Debug, Clone, Copy, Default)]
pub struct RangeList {
    ranges: [Range; RANGES_MAX],
    count: usize,
}

impl RangeList {
    /// The ranges, in the driver's order.
    #[must_use]
    pub fn as_slice(&self) -> &[Range] {
        &self.ranges[..self.count]
    }
}

/// A request that is answered without being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// What to answer.
    pub status: Status,
    /// Why, for counters and debug output.
    pub reason: &'static str,
}

const fn bad(reason: &'static str) -> Refused {
    Refused { status: Status::IoError, reason }
}

const fn unknown(reason: &'static str) -> Refused {
    Refused { status: Status::Unsupported, reason }
}

/// Takes header and status off `chain` and checks the request. The inner result is for the driver
/// to know: complete a refused request with its status. `list` is written only by discard and write
/// zeroes.
///
/// # Errors
/// [`RingError::NoStatus`] when there is no byte to answer in.
pub fn parse(
    chain: &mut Chain,
    limits: &Limits,
    list: &mut RangeList,
) -> Result<Result<Request, Refused>, RingError> {
    if !chain.split_status() {
        return Err(RingError::NoStatus);
    }
    Ok(checked(chain, limits, list))
}

fn checked(chain: &mut Chain, limits: &Limits, list: &mut RangeList) -> Result<Request, Refused> {
    let mut header = [0u8; HEADER];
    if !chain.take(&mut header) {
        return Err(bad("the request header is cut short"));
    }
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut sector = [0; 8];
    sector.copy_from_slice(&header[8..]);
    let sector = u64::from_le_bytes(sector);
    let writes = || if limits.read_only { Err(bad("the disk is read-only")) } else { Ok(()) };
    match kind {
        0 => {
            let (offset, len) = span(limits, sector, chain.writable_len())?;
            Ok(Request::Read { offset, len })
        }
        1 => {
            writes()?;
            let (offset, len) = span(limits, sector, chain.readable_len())?;
            Ok(Request::Write { offset, len })
        }
        4 => Ok(Request::Flush),
        8 => Ok(Request::GetId),
        11 => {
            let most = limits.discard.ok_or(unknown("discard was not negotiated"))?;
            writes()?;
            *list = ranges(chain, limits, &most, 0)?;
            Ok(Request::Discard)
        }
        13 => {
            let most = limits.write_zeroes.ok_or(unknown("write zeroes was not negotiated"))?;
            writes()?;
            *list = ranges(chain, limits, &most, RANGE_F_UNMAP)?;
            Ok(Request::WriteZeroes)
        }
        _ => Err(unknown("unknown request type")),
    }
}

fn span(limits: &Limits, sector: u64, len: u64) -> Result<(u64, u64), Refused> {
    if !len.is_multiple_of(SECTOR) {
        return Err(bad("the length is no multiple of a sector"));
    }
    let end = sector.checked_add(len / SECTOR);
    if end.is_none_or(|end| end > limits.sectors) {
        return Err(bad("the request ends past the disk"));
    }
    let offset = sector.checked_mul(SECTOR).ok_or(bad("the disk is larger than addresses"))?;
    Ok((offset, len))
}

fn ranges(
    chain: &mut Chain,
    limits: &Limits,
    most: &RangeLimits,
    flags_known: u32,
) -> Result<RangeList, Refused> {
    let len = chain.readable_len();
    let count = index(len / RANGE);
    if count == 0 || !len.is_multiple_of(RANGE) {
        return Err(bad("no range, or half a range"));
    }
    if count > RANGES_MAX || wide(count) > u64::from(most.ranges_max) {
        return Err(bad("more ranges than offered"));
    }
    let mut ranges = [Range::default(); RANGES_MAX];
    for range in &mut ranges[..count] {
        let mut raw = [0u8; index(RANGE)];
        if !chain.take(&mut raw) {
            return Err(bad("no range, or half a range"));
        }
        let (mut sector, mut sectors, mut flags) = ([0; 8], [0; 4], [0; 4]);
        sector.copy_from_slice(&raw[..8]);
        sectors.copy_from_slice(&raw[8..12]);
        flags.copy_from_slice(&raw[12..]);
        let (sectors, flags) = (u32::from_le_bytes(sectors), u32::from_le_bytes(flags));
        // The specification wants exactly this answer for flags that do not belong here.
        if flags & !flags_known != 0 {
            return Err(unknown("unknown range flags"));
        }
        if sectors > most.sectors_max {
            return Err(bad("a range is longer than offered"));
        }
        let len = u64::from(sectors) * SECTOR;
        let (offset, len) = span(limits, u64::from_le_bytes(sector), len)?;
        let unmap = flags & RANGE_F_UNMAP != 0 && limits.write_zeroes_unmaps;
        *range = Range { offset, len, unmap };
    }
    Ok(RangeList { ranges, count })
}
