//! Guest memory as the front end shares it: regions, and the two address spaces over them.
//!
//! A region has a guest-physical address (used inside rings) and an address in the front end's
//! own process (used in control messages). [`Memory`] is an immutable table of regions; a change
//! makes a new table that shares the regions which stayed. Whoever turned an address into a
//! pointer keeps the table it came from until the pointer is no longer used.
//!
//! Invariants: guest-physical ranges of one table do not overlap (front-end addresses may: the
//! same RAM can appear at two guest addresses); no arithmetic on addresses from outside wraps.

pub(crate) mod mapping;

pub mod fault;

use std::any::Any;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use format::{Error, Result};

use crate::util::{index, wide};
use mapping::Mapping;
pub use mapping::{copy_in, copy_out};

/// Most regions of one table, and the answer to "how many memory slots".
pub const REGIONS_MAX: usize = 256;

/// A guest-physical address, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestAddr(pub u64);

/// An address in the front end's own process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct UserAddr(pub u64);

/// What the front end says about one region. All in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest-physical address.
    pub guest: GuestAddr,
    /// The front end's own address of the same byte.
    pub user: UserAddr,
    /// Length.
    pub size: u64,
    /// Offset of the first byte in the shared file.
    pub offset: u64,
}

impl RegionSpec {
    fn check(&self) -> Result<()> {
        let fits = |start: u64| start.checked_add(self.size).is_some();
        if self.size == 0 || !fits(self.guest.0) || !fits(self.user.0) || !fits(self.offset) {
            return Err(Error::invalid("a memory region is empty or wraps around"));
        }
        Ok(())
    }

    fn offset_in(start: u64, size: u64, addr: u64, len: u64) -> Option<u64> {
        let offset = addr.checked_sub(start)?;
        (offset.checked_add(len)? <= size).then_some(offset)
    }
}

/// One mapped region of guest memory.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    map: Mapping,
}

impl Region {
    /// Maps `file` as `spec` says.
    ///
    /// # Errors
    /// `Invalid` when the numbers wrap, or the file is too short or cannot be mapped.
    pub fn map(spec: RegionSpec, file: OwnedFd) -> Result<Region> {
        spec.check()?;
        Ok(Region { spec, map: Mapping::new(file, spec.offset, spec.size)? })
    }

    /// A region of memory that the caller has mapped at `data`; the offset in `spec` means nothing.
    /// It cannot be handed to another process.
    ///
    /// # Safety
    /// The range is mapped readable and writable for as long as `keep` lives, though not always
    /// with the same pages, and nobody has a reference to its bytes.
    ///
    /// # Errors
    /// `Invalid` when the numbers wrap or the region is empty.
    pub unsafe fn over(
        spec: RegionSpec,
        data: NonNull<u8>,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Result<Region> {
        spec.check()?;
        // SAFETY: as the caller vouches for.
        Ok(Region { spec, map: unsafe { Mapping::over(data, spec.size, keep)? } })
    }

    /// What the front end said about the region.
    #[must_use]
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    /// The shared file, for handing it to another process; `None` for [`Region::over`].
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.map.file()
    }
}

/// An immutable table of regions.
#[derive(Debug, Default)]
pub struct Memory {
    /// Ordered by guest address.
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// A table of `regions`.
    ///
    /// # Errors
    /// `Invalid` when two overlap in guest-physical space or there are too many.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<Memory> {
        if regions.len() > REGIONS_MAX {
            return Err(Error::invalid("more memory regions than slots"));
        }
        regions.sort_by_key(|r| r.spec.guest);
        let overlap = |w: &[Arc<Region>]| w[0].spec.guest.0 + w[0].spec.size > w[1].spec.guest.0;
        if regions.windows(2).any(overlap) {
            return Err(Error::invalid("memory regions overlap"));
        }
        Ok(Memory { regions })
    }

    /// This table and one region more.
    ///
    /// # Errors
    /// As [`Memory::new`].
    pub fn with(&self, region: Region) -> Result<Memory> {
        let mut regions = self.regions.clone();
        regions.push(Arc::new(region));
        Memory::new(regions)
    }

    /// This table without the region that has these addresses and this size; the file offset is
    /// not compared.
    ///
    /// # Errors
    /// `NotFound` when there is no such region.
    pub fn without(&self, spec: &RegionSpec) -> Result<Memory> {
        let same = |r: &Arc<Region>| {
            r.spec.guest == spec.guest && r.spec.user == spec.user && r.spec.size == spec.size
        };
        let mut regions = self.regions.clone();
        let at = regions.iter().position(same).ok_or_else(|| {
            Error::new(format::Kind::NotFound, "no memory region has this address and size")
        })?;
        regions.remove(at);
        Ok(Memory { regions })
    }

    /// The regions, ordered by guest address.
    #[must_use]
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// One past the highest guest-physical address.
    #[must_use]
    pub fn end(&self) -> GuestAddr {
        GuestAddr(self.regions.last().map_or(0, |r| r.spec.guest.0 + r.spec.size))
    }

    /// Whether the front end truncated a region, so that zeros stand in for its memory.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|r| r.map.is_lost())
    }

    /// Calls `each(pointer, length)` for the pieces of a guest range, in order. Neighbouring
    /// regions count as one range.
    ///
    /// # Errors
    /// [`OutsideMemory`] when a byte of the range is in no region. Pieces before it were visited.
    pub(crate) fn pieces(
        &self,
        addr: GuestAddr,
        len: u64,
        mut each: impl FnMut(*mut u8, usize),
    ) -> Result<(), OutsideMemory> {
        let (mut at, mut left) = (addr.0, len);
        let mut i = self.regions.partition_point(|r| r.spec.guest.0 <= at);
        i = i.checked_sub(1).ok_or(OutsideMemory)?;
        while left > 0 {
            let region = self.regions.get(i).ok_or(OutsideMemory)?;
            let offset = at.checked_sub(region.spec.guest.0).ok_or(OutsideMemory)?;
            let here = region.spec.size.saturating_sub(offset).min(left);
            if here == 0 {
                return Err(OutsideMemory);
            }
            let pointer = region.map.range(offset, here).ok_or(OutsideMemory)?;
            each(pointer, index(here));
            // Cannot wrap: `here` bytes from `at` lie inside a region, and regions do not wrap.
            (at, left, i) = (at + here, left - here, i + 1);
        }
        Ok(())
    }

    /// A pointer to `len` bytes at a guest address, if one region holds them all.
    pub(crate) fn guest_ptr(&self, addr: GuestAddr, len: u64) -> Option<*mut u8> {
        let i = self.regions.partition_point(|r| r.spec.guest.0 <= addr.0).checked_sub(1)?;
        let region = &self.regions[i];
        let spec = &region.spec;
        region.map.range(RegionSpec::offset_in(spec.guest.0, spec.size, addr.0, len)?, len)
    }

    /// A pointer to `len` bytes at a front-end address, if one region holds them all.
    pub(crate) fn user_ptr(&self, addr: UserAddr, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let offset = RegionSpec::offset_in(r.spec.user.0, r.spec.size, addr.0, len)?;
            r.map.range(offset, len)
        })
    }

    /// The guest-physical address of a front-end address.
    pub(crate) fn guest_of(&self, addr: UserAddr) -> Option<GuestAddr> {
        self.regions.iter().find_map(|r| {
            let offset = RegionSpec::offset_in(r.spec.user.0, r.spec.size, addr.0, 1)?;
            Some(GuestAddr(r.spec.guest.0 + offset))
        })
    }

    /// Copies guest memory into `dst`.
    ///
    /// # Errors
    /// [`OutsideMemory`] when the range is not all guest memory.
    pub fn read(&self, addr: GuestAddr, dst: &mut [u8]) -> Result<(), OutsideMemory> {
        let mut done = 0;
        self.pieces(addr, wide(dst.len()), |ptr, len| {
            // SAFETY: `pieces` vouches for `len` bytes at `ptr`, and its pieces add up to `dst`.
            unsafe { copy_in(&mut dst[done..done + len], ptr) };
            done += len;
        })
    }

    /// Copies `src` into guest memory.
    ///
    /// # Errors
    /// [`OutsideMemory`] when the range is not all guest memory.
    pub fn write(&self, addr: GuestAddr, src: &[u8]) -> Result<(), OutsideMemory> {
        let mut done = 0;
        self.pieces(addr, wide(src.len()), |ptr, len| {
            // SAFETY: `pieces` vouches for `len` bytes at `ptr`, and its pieces add up to `src`.
            unsafe { copy_out(ptr, &src[done..done + len]) };
            done += len;
        })
    }
}

/// A guest named an address that is not in its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutsideMemory;

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn region(guest: u64, user: u64, size: u64) -> Region {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, size).unwrap();
        let spec = RegionSpec { guest: GuestAddr(guest), user: UserAddr(user), size, offset: 0 };
        Region::map(spec, fd).unwrap()
    }

    fn two_neighbours_and_a_gap() -> Memory {
        let m = Memory::default().with(region(0x1000, 0x70000, 0x1000)).unwrap();
        let m = m.with(region(0x2000, 0x50000, 0x1000)).unwrap();
        m.with(region(0x10000, 0x90000, 0x1000)).unwrap()
    }

    #[test]
    fn range_over_two_neighbours_is_one_range() {
        let m = two_neighbours_and_a_gap();
        let data: Vec<u8> = (0..100).collect();
        m.write(GuestAddr(0x1fce), &data).unwrap();
        let mut seen = vec![0; 100];
        m.read(GuestAddr(0x1fce), &mut seen).unwrap();
        assert_eq!(seen, data);
        let mut pieces = Vec::new();
        m.pieces(GuestAddr(0x1fce), 100, |_, len| pieces.push(len)).unwrap();
        assert_eq!(pieces, [50, 50]);
        assert!(m.guest_ptr(GuestAddr(0x1fce), 100).is_none());
    }

    #[test]
    fn ranges_outside_memory_are_refused() {
        let m = two_neighbours_and_a_gap();
        for (addr, len) in [
            (0, 1),
            (0xfff, 2),
            (0x2fff, 2),
            (0x10fff, 2),
            (0x11000, 1),
            (u64::MAX, 1),
            (u64::MAX - 3, 100),
            (0x1000, u64::MAX),
        ] {
            assert_eq!(m.pieces(GuestAddr(addr), len, |_, _| ()), Err(OutsideMemory), "{addr:#x}");
        }
        assert_eq!(Memory::default().pieces(GuestAddr(0), 1, |_, _| ()), Err(OutsideMemory));
    }

    #[test]
    fn user_addresses_have_their_own_space() {
        let m = two_neighbours_and_a_gap();
        let by_user = m.user_ptr(UserAddr(0x50010), 16).unwrap();
        assert_eq!(Some(by_user), m.guest_ptr(GuestAddr(0x2010), 16));
        assert!(m.user_ptr(UserAddr(0x50ff8), 16).is_none());
        assert!(m.user_ptr(UserAddr(0x2010), 16).is_none());
    }

    #[test]
    fn overlap_is_refused_and_removal_needs_an_exact_match() {
        let m = two_neighbours_and_a_gap();
        assert!(m.with(region(0x1800, 0, 0x1000)).is_err());
        assert!(m.with(region(0x800, 0, 0x1000)).is_err());
        let mut spec = m.regions()[1].spec();
        spec.size -= 1;
        assert!(m.without(&spec).is_err());
        spec.size += 1;
        spec.offset = 77;
        assert_eq!(m.without(&spec).unwrap().regions().len(), 2);
        assert_eq!(m.end(), GuestAddr(0x11000));
    }
}
