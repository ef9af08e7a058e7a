//! The seam between the engine and storage: a [`Store`] is a flat folder of files, a [`File`] is
//! bytes with explicit durability.
//!
//! What the engine may rely on, and nothing more:
//! - A completed write is visible to every later read of the same file (by any handle).
//! - Only [`File::sync`] makes the writes, punches and length changes that completed before it
//!   durable. Before that, a power cut may keep any subset of them, torn at 512-byte sectors.
//! - Only [`Store::sync_names`] makes creations, renames and removals durable. Before that a power
//!   cut may keep any subset of them.
//! - A rename replaces its target atomically.
//! - An error from `sync` is final for what it covered: the engine never syncs again and trusts it.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use format::{Error, Result};

pub mod buf;
#[cfg(test)]
mod conformance;
pub mod file;
mod name;
pub mod sim;

/// Largest offset that a host file can have; `off_t` is signed.
const OFFSET_MAX: u64 = i64::MAX.cast_unsigned();

/// The end of a range, refused where no host file can reach.
fn range_end(offset: u64, len: u64) -> Result<u64> {
    match offset.checked_add(len) {
        Some(end) if end <= OFFSET_MAX => Ok(end),
        _ => Err(Error::invalid("the range ends past the largest possible file")),
    }
}

/// The only place where a 64-bit byte count becomes a `usize`.
#[allow(clippy::cast_possible_truncation)] // The build is for 64-bit targets only; see the check.
const fn to_usize(bytes: u64) -> usize {
    const { assert!(size_of::<usize>() == size_of::<u64>()) };
    bytes as usize
}

/// How to open an existing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads only; writes are refused.
    Read,
    /// Reads and writes.
    Write,
}

/// One contiguous piece of a batched read.
#[derive(Debug)]
pub struct ReadOp<'a> {
    /// Byte offset in the file.
    pub offset: u64,
    /// Where the bytes go; the whole buffer is filled.
    pub buf: &'a mut [u8],
}

/// One contiguous piece of a batched write.
#[derive(Debug, Clone, Copy)]
pub struct WriteOp<'a> {
    /// Byte offset in the file.
    pub offset: u64,
    /// The bytes; all of them are written.
    pub buf: &'a [u8],
}

/// An open file. All offsets and lengths are bytes. All calls block until done.
pub trait File: Send + Sync {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `Corrupt` when the file ends before the buffer is full, else what the host reports.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes all of `buf` at `offset`, growing the file where needed. Not durable until `sync`.
    ///
    /// # Errors
    /// What the host reports; `NoSpace` leaves the range undefined but the file usable.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Several reads at once, in any order; returns when all are done.
    ///
    /// # Errors
    /// The first error; the other buffers are then undefined.
    fn read_many(&self, ops: &mut [ReadOp<'_>]) -> Result<()> {
        ops.iter_mut().try_for_each(|op| self.read_at(op.offset, op.buf))
    }

    /// Several writes at once, in any order; returns when all are done.
    ///
    /// # Errors
    /// The first error; every range is then undefined.
    fn write_many(&self, ops: &[WriteOp<'_>]) -> Result<()> {
        ops.iter().try_for_each(|op| self.write_at(op.offset, op.buf))
    }

    /// Makes all completed writes, punches and length changes of this file durable.
    ///
    /// # Errors
    /// What the host reports. Final: what was not durable before must be taken as lost.
    fn sync(&self) -> Result<()>;

    /// Begins to move what was written to the device, without waiting for it, and lets go of the
    /// memory of what has arrived there: for whoever writes much and reads none of it soon.
    /// Promises nothing: the next `sync` says what is durable, and reports what went wrong.
    fn write_behind(&self) {}

    /// Begins to move what was written to the device, without waiting for it, and lets go of
    /// nothing: others read the file. Promises nothing, as [`File::write_behind`].
    fn write_out(&self) {}

    /// Length in bytes.
    ///
    /// # Errors
    /// What the host reports.
    fn size(&self) -> Result<u64>;

    /// Grows (with zeroes) or cuts the file.
    ///
    /// # Errors
    /// What the host reports.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Gives the host the space of a range back; it then reads as zeroes. The length stays.
    ///
    /// # Errors
    /// What the host reports; `Unsupported` where the file system cannot.
    fn punch(&self, offset: u64, len: u64) -> Result<()>;

    /// Takes host space for a range inside the file, so that later writes to it do not run out of
    /// space. What it reads as stays; so does the length. A power cut may undo it.
    ///
    /// # Errors
    /// `NoSpace`, `Unsupported` where the file system cannot, or what the host reports.
    fn reserve(&self, offset: u64, len: u64) -> Result<()>;

    /// Has `len` bytes from `to` on share the host's space of another file's bytes from `from` on,
    /// until one of the two is written to: a write of those bytes that stores nothing. False, and
    /// what the range reads as is undefined, when the host cannot, for these files or at all.
    ///
    /// # Errors
    /// What the host reports; `NoSpace` leaves the range undefined but the file usable.
    fn clone_range(&self, source: &dyn File, from: u64, to: u64, len: u64) -> Result<bool> {
        let _ = (source, from, to, len);
        Ok(false)
    }

    /// Bytes that the host has allocated to the file.
    ///
    /// # Errors
    /// What the host reports.
    fn allocated(&self) -> Result<u64>;

    /// The next range, from byte `from` on, that the host may have allocated: first byte and the
    /// byte behind the last; `None` when there is only a hole up to the end of the file. What lies
    /// outside reads as zeroes and takes no space. A host that cannot tell says that all is data.
    ///
    /// # Errors
    /// What the host reports.
    fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        let size = self.size()?;
        Ok((from < size).then_some((from, size)))
    }

    /// Forbids (or allows again) opening the file for writing, as far as the host can: permission
    /// bits. Durable when it returns. Handles that are open stay as they are. Works on a handle
    /// that is open for reading.
    ///
    /// # Errors
    /// What the host reports.
    fn set_read_only(&self, read_only: bool) -> Result<()>;

    /// Keeps other openings of the file from taking this lock, in this process or another, for as
    /// long as this one lives **and has I/O under way**: writes that a killed process left with the
    /// kernel still hold it. Waits a little for such writes to end.
    ///
    /// # Errors
    /// `Busy` when somebody else has it.
    fn lock(&self) -> Result<()> {
        Ok(())
    }

    /// Lets go of the lock at once, although descriptors of the file may live on for a while: the
    /// kernel closes those of a ring some time after the ring.
    ///
    /// # Errors
    /// What the host reports.
    fn unlock(&self) -> Result<()> {
        Ok(())
    }

    /// Forgets what the host caches of the file and can read again. After a failed sync the cache
    /// shows data that never reached the disk; whoever opens a file that was not closed in order
    /// calls this before believing what it reads.
    ///
    /// # Errors
    /// What the host reports.
    fn forget_cached(&self) -> Result<()> {
        Ok(())
    }

    /// The file of the host behind this one, for callers that move bytes with a ring of their own.
    /// `None` when there is none.
    fn raw(&self) -> Option<RawFile<'_>> {
        None
    }

    /// True when the file is open for direct I/O (buffers and offsets that are not aligned to
    /// [`buf::ALIGN`] then take a detour through a bounce buffer).
    fn is_direct(&self) -> bool;
}

/// A file of the host, and what it asks of a transfer that goes to it as it is.
#[derive(Debug, Clone, Copy)]
pub struct RawFile<'a> {
    /// The open file.
    pub fd: BorrowedFd<'a>,
    /// Multiple at which buffers must start; 1 when the file goes through the page cache.
    pub memory_align: usize,
    /// Multiple of which offsets and lengths must be; 1 when the file goes through the page cache.
    pub offset_align: u64,
}

/// A flat folder of files. Names are plain file names, never paths.
pub trait Store: Send + Sync {
    /// Opens an existing file.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` for a directory, or what the host reports.
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>>;

    /// Creates a new empty file, readable and writable. The name is durable after `sync_names`.
    ///
    /// # Errors
    /// `Exists`, or what the host reports.
    fn create(&self, name: &str) -> Result<Arc<dyn File>>;

    /// Renames a file, replacing the target.
    ///
    /// # Errors
    /// `NotFound`, or what the host reports.
    fn rename(&self, from: &str, to: &str) -> Result<()>;

    /// Removes a file. Open handles stay usable.
    ///
    /// # Errors
    /// `NotFound`, or what the host reports.
    fn remove(&self, name: &str) -> Result<()>;

    /// All file names, sorted.
    ///
    /// # Errors
    /// What the host reports.
    fn names(&self) -> Result<Vec<String>>;

    /// Makes completed creations, renames and removals durable.
    ///
    /// # Errors
    /// What the host reports.
    fn sync_names(&self) -> Result<()>;

    /// Free and total bytes of the host file system.
    ///
    /// # Errors
    /// What the host reports.
    fn space(&self) -> Result<Space>;

    /// Where the store is, for messages.
    fn describe(&self) -> String;
}

/// Space on the host file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Available to this process.
    pub free: u64,
    /// Size of the file system.
    pub total: u64,
}
