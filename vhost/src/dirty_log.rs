//! The dirty page log of live migration (LOG_SHMFD): one bit per 4 KiB page that we wrote.
//!
//! Invariant: a bit is set after the write it stands for, and always with a read-modify-write,
//! also when it is set already. The migration side clears a bit and then copies the page; looking
//! first and skipping a set bit could order our look before its clear and our write after its
//! copy, and the page would be lost.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use format::{Error, Result};

use crate::memory::GuestAddr;
use crate::memory::mapping::Mapping;
use crate::util::wide;

/// Where a ring notes the guest memory that it wrote.
pub trait WriteLog: fmt::Debug + Send + Sync {
    /// `len` bytes at the guest address `addr` were written.
    fn mark(&self, addr: u64, len: u64);

    /// Whether the log's memory is gone, so that marks go nowhere.
    fn is_lost(&self) -> bool {
        false
    }
}

/// Bytes that one bit of the log stands for.
pub const LOG_PAGE: u64 = 4096;

/// A log area shared with the front end.
#[derive(Debug)]
pub struct DirtyLog {
    map: Mapping,
    offset: u64,
}

impl DirtyLog {
    /// Maps `size` bytes of log from `offset` of `file`.
    ///
    /// # Errors
    /// `Invalid` when the file is too short or cannot be mapped.
    pub fn map(file: OwnedFd, offset: u64, size: u64) -> Result<DirtyLog> {
        Ok(DirtyLog { map: Mapping::new(file, offset, size)?, offset })
    }

    /// Checks that every guest address below `end` has a bit.
    ///
    /// # Errors
    /// `Invalid` when not: writes there would be lost by a migration.
    pub fn check_covers(&self, end: GuestAddr) -> Result<()> {
        if end.0.div_ceil(LOG_PAGE).div_ceil(8) > wide(self.map.len()) {
            return Err(Error::invalid("the dirty log is too small for the guest memory"));
        }
        Ok(())
    }

    /// Whether the bit of `page` is set.
    #[must_use]
    pub fn is_marked(&self, page: u64) -> bool {
        self.map.range(page / 8, 1).is_some_and(|byte| {
            // SAFETY: as in `mark`.
            let byte = unsafe { AtomicU8::from_ptr(byte) };
            byte.load(Ordering::SeqCst) & (1 << (page % 8)) != 0
        })
    }

    /// Clears the log and returns the pages that were marked, in order.
    #[must_use]
    pub fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for at in 0..self.map.len() {
            // SAFETY: inside the mapping; both sides access the log only atomically.
            let byte = unsafe { AtomicU8::from_ptr(self.map.as_ptr().add(at)) };
            let bits = byte.swap(0, Ordering::SeqCst); // pairs with the update in `mark`
            pages.extend((0..8).filter(|b| bits & (1 << b) != 0).map(|b| wide(at) * 8 + b));
        }
        pages
    }

    /// The shared file, for handing it to another process.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.map.file().expect("the log was mapped from a file")
    }

    /// Offset of the log in its file, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Size of the log in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.map.len()
    }
}

impl WriteLog for DirtyLog {
    /// Marks every page of `len` bytes at `addr`. Pages without a bit are left out; only a front
    /// end that set a wrong log address for a ring gets there (see [`DirtyLog::check_covers`]).
    fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|l| addr.checked_add(l)) else { return };
        let (first, last) = (addr / LOG_PAGE, last / LOG_PAGE);
        for at in first / 8..=last / 8 {
            let Some(byte) = self.map.range(at, 1) else { return };
            let from = u8::MAX << (first.max(at * 8) % 8);
            let up_to = u8::MAX >> (7 - last.min(at * 8 + 7) % 8);
            // SAFETY: the byte lies inside the mapping; both sides access it only atomically.
            let byte = unsafe { AtomicU8::from_ptr(byte) };
            // SeqCst pairs with the exchange by which the migration side clears the bits.
            byte.fetch_or(from & up_to, Ordering::SeqCst);
        }
    }

    fn is_lost(&self) -> bool {
        self.map.is_lost()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn log(bytes: u64) -> DirtyLog {
        let fd = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        DirtyLog::map(fd, 0, bytes).unwrap()
    }

    #[test]
    fn range_marks_every_page_it_touches_and_no_other() {
        let log = log(8);
        log.mark(4095, 2);
        log.mark(10 * 4096, 4096);
        log.mark(20 * 4096, 4097);
        log.mark(30 * 4096, 0);
        assert!(log.is_marked(10) && !log.is_marked(11));
        assert_eq!(log.take(), [0, 1, 10, 20, 21]);
        assert_eq!(log.take(), [0u64; 0]);
    }

    #[test]
    fn ranges_of_many_bytes_are_marked_from_end_to_end() {
        for (first, pages) in [(0, 24), (3, 1), (3, 5), (3, 6), (7, 2), (5, 19), (8, 8)] {
            let log = log(4);
            log.mark(first * 4096 + 9, pages * 4096 - 18);
            assert_eq!(log.take(), (first..first + pages).collect::<Vec<_>>());
        }
    }

    #[test]
    fn addresses_past_the_log_are_left_out() {
        let log = log(1);
        log.mark(7 * 4096, 8 * 4096);
        log.mark(u64::MAX, 1);
        log.mark(u64::MAX - 1, 4);
        assert_eq!(log.take(), [7]);
        assert!(log.check_covers(GuestAddr(8 * 4096)).is_ok());
        assert!(log.check_covers(GuestAddr(8 * 4096 + 1)).is_err());
    }
}
