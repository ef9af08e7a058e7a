//! The memory that a client shares with the device: rings, request headers and data, in one file
//! that nobody can truncate.
//!
//! Invariant: offsets are checked against the arena on every access; the device may change any
//! byte at any moment, so contents are copied, never borrowed.

use std::os::fd::BorrowedFd;

use format::{Error, Result};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::memory::mapping::{Mapping, copy_across, copy_in, copy_out};
use crate::memory::{GuestAddr, RegionSpec, UserAddr};
use crate::queue::Segment;
use crate::util::wide;

/// Where the arena begins in the guest-physical space that the device sees. Neither 0 nor the
/// address in this process, so that a mix-up of address spaces shows.
pub const GUEST_BASE: u64 = 0x1000_0000;

/// Shared memory, addressed by offset.
#[derive(Debug)]
pub struct Arena {
    map: Mapping,
}

impl Arena {
    /// A zeroed arena of `size` bytes.
    ///
    /// # Errors
    /// The host's error when there is no memory or no descriptor.
    pub fn new(size: u64) -> Result<Arena> {
        let host = |e| Error::from(std::io::Error::from(e)).tried("create shared memory");
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("vhost-arena", flags).map_err(host)?;
        ftruncate(&file, size).map_err(host)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(host)?;
        Ok(Arena { map: Mapping::new(file, 0, size)? })
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        wide(self.map.len())
    }

    /// The shared file.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.map.file().expect("the arena was mapped from a file")
    }

    /// The guest-physical address of an offset.
    #[must_use]
    pub fn guest(&self, offset: u64) -> GuestAddr {
        GuestAddr(GUEST_BASE + offset)
    }

    /// The address of an offset in this process, as control messages use it.
    #[must_use]
    pub fn user(&self, offset: u64) -> UserAddr {
        UserAddr(wide(self.map.as_ptr() as usize) + offset)
    }

    /// The arena as one memory region.
    #[must_use]
    pub fn region(&self) -> RegionSpec {
        let (guest, user) = (self.guest(0), self.user(0));
        RegionSpec { guest, user, size: self.size(), offset: 0 }
    }

    /// Copies from the arena.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn read(&self, offset: u64, dst: &mut [u8]) {
        // SAFETY: `at` checked the range.
        unsafe { copy_in(dst, self.at(offset, wide(dst.len()))) };
    }

    /// Copies into the arena.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn write(&self, offset: u64, src: &[u8]) {
        // SAFETY: `at` checked the range.
        unsafe { copy_out(self.at(offset, wide(src.len())), src) };
    }

    /// Copies all of a piece of guest memory into the arena.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn write_from(&self, offset: u64, src: &Segment) {
        let dst = self.at(offset, wide(src.len()));
        // SAFETY: `at` checked the range; a segment is valid while its chain is out, and guest
        // memory and arena are mappings of their own.
        unsafe { copy_across(dst, src.base(), src.len()) };
    }

    /// Fills all of a piece of guest memory from the arena.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn read_into(&self, offset: u64, dst: &Segment) {
        let src = self.at(offset, wide(dst.len()));
        // SAFETY: as in `write_from`.
        unsafe { copy_across(dst.base(), src, dst.len()) };
    }

    /// A pointer to `len` bytes at `offset`.
    pub(crate) fn at(&self, offset: u64, len: u64) -> *mut u8 {
        self.map.range(offset, len).expect("the range lies inside the arena")
    }
}
