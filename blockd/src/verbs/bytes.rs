//! Parts of a disk by bytes.
//!
//! The engine works in sectors of 512 bytes. A write that begins or ends inside one reads it first;
//! whoever calls sees to it that nobody else writes there meanwhile.

use format::limits::SECTOR;
use format::units::index;
use format::{Error, Result};

use crate::disk::Disk;
use crate::store::buf::AlignedBuf;

/// The end of a range, if it lies inside a disk of `size` bytes.
///
/// # Errors
/// `Invalid`.
pub fn check_end(size: u64, offset: u64, length: u64) -> Result<u64> {
    let end = offset.checked_add(length).filter(|end| *end <= size);
    end.ok_or_else(|| {
        Error::invalid(format!("{length} bytes from {offset} pass its end, at {size}"))
    })
}

/// Writes bytes at any offset.
///
/// # Errors
/// As [`Disk::write`].
pub fn write_bytes(disk: &Disk, at: u64, bytes: &[u8]) -> Result<()> {
    let end = at + bytes.len() as u64;
    let (from, to) = (at / SECTOR * SECTOR, end.next_multiple_of(SECTOR));
    if bytes.is_empty() {
        return Ok(());
    }
    if (from, to) == (at, end) {
        return disk.write(0, at, bytes);
    }
    let mut whole = AlignedBuf::zeroed(index(to - from));
    let len = whole.len();
    if from < at {
        disk.read(0, from, &mut whole[..index(SECTOR)])?;
    }
    if to > end {
        disk.read(0, to - SECTOR, &mut whole[len - index(SECTOR)..])?;
    }
    whole[index(at - from)..index(end - from)].copy_from_slice(bytes);
    disk.write(0, from, &whole)
}

/// Makes a range of a disk that is being imported read as zeroes.
///
/// # Errors
/// As [`Disk::write_zeroes`].
pub fn zero(disk: &Disk, lane: usize, offset: u64, length: u64) -> Result<()> {
    disk.write_zeroes(lane, offset, length, true)
}
