//! The address space in which a guest's memory is mapped.
//!
//! Invariants: the reservation never moves and lives as long as the value, so a host address of
//! guest RAM stays valid across every change of what is mapped there (a change is one `mmap` over
//! the old mapping, which is atomic for whoever accesses it); it begins at a multiple of
//! [`HUGE_PAGE`]; the guest may change every byte at any moment, so nothing here hands out a
//! reference to plain memory. Before a mapping is activated the reservation is inaccessible: a
//! processor or device that ran too early would fault, not see another guest's bytes.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use format::{Error, Result};
use parking_lot::Mutex;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use vhost_blk::client::SharedMemory;
use vhost_blk::memory::{GuestAddr, Memory, Region, RegionSpec, UserAddr, copy_in, copy_out};

use super::dirty::DirtyPages;
use super::{Gpa, HIGH_START, HUGE_PAGE, LOW_END, PAGE, index, wide};

/// What tells which pages are a process's own.
const PAGE_TABLES: &str = "/proc/self/pagemap";

/// One stretch of guest-physical addresses that is RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bank {
    /// First guest-physical address.
    pub start: Gpa,
    /// Offset of its first byte in RAM, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The memory of one guest.
#[derive(Debug)]
pub struct GuestRam {
    base: NonNull<u8>,
    /// What was asked of the kernel, to give back.
    whole: (NonNull<u8>, usize),
    size: u64,
    dirty: DirtyPages,
    /// The file that all of RAM is shared from, as long as it is.
    shared: Mutex<Option<Arc<OwnedFd>>>,
    /// The page tables of this process. Opened early: a process that confines itself afterwards
    /// cannot.
    page_tables: File,
}

// SAFETY: the value owns its reservation; all access goes through volatile copies or raw pointers
// whose users answer for themselves.
unsafe impl Send for GuestRam {}
// SAFETY: as above.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Address space for `size` bytes of RAM, inaccessible until something is mapped into it.
    ///
    /// # Errors
    /// `Invalid` when `size` is 0 or no multiple of a page; the host's error otherwise.
    pub fn reserve(size: u64) -> Result<GuestRam> {
        if size == 0 || !size.is_multiple_of(PAGE) || size > 1 << 44 {
            return Err(Error::invalid("guest memory is no multiple of 4096 bytes")
                .tried("reserve")
                .on(format!("{size} bytes of guest memory")));
        }
        let page_tables =
            File::open(PAGE_TABLES).map_err(|e| Error::from(e).tried("open").on(PAGE_TABLES))?;
        let len = index(size + HUGE_PAGE);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address the kernel picks aliases nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::empty(), flags)
        };
        let start = start.map_err(|e| host("reserve", e))?.cast::<u8>();
        let lead = start.align_offset(index(HUGE_PAGE));
        let whole = NonNull::new(start).ok_or_else(|| Error::invalid("memory at address 0"))?;
        // SAFETY: `lead` is smaller than a huge page, by which the reservation is larger than RAM.
        let base = unsafe { whole.add(lead) };
        let dirty = DirtyPages::new(size);
        let shared = Mutex::default();
        Ok(GuestRam { base, whole: (whole, len), size, dirty, shared, page_tables })
    }

    /// Memory of `size` bytes in a shared file of its own, all zero.
    ///
    /// # Errors
    /// As [`GuestRam::reserve`].
    pub fn new(size: u64) -> Result<GuestRam> {
        let ram = GuestRam::reserve(size)?;
        ram.map_shared(&Arc::new(super::image::memory_file("guest-memory", size)?))?;
        Ok(ram)
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where RAM is in guest-physical space, in order.
    pub fn banks(&self) -> impl Iterator<Item = Bank> + use<> {
        let low = Bank { start: Gpa(0), offset: 0, len: self.size.min(LOW_END) };
        let high = Bank { start: Gpa(HIGH_START), offset: low.len, len: self.size - low.len };
        [low, high].into_iter().filter(|bank| bank.len > 0)
    }

    /// The offset in RAM of `len` bytes at `at`, if one bank holds them all.
    fn offset_of(&self, at: Gpa, len: u64) -> Option<u64> {
        self.banks().find_map(|bank| {
            let inside = at.0.checked_sub(bank.start.0)?;
            (inside.checked_add(len)? <= bank.len).then_some(bank.offset + inside)
        })
    }

    fn checked(&self, at: Gpa, len: u64) -> Result<u64> {
        self.offset_of(at, len)
            .ok_or_else(|| outside().on(format!("{len} bytes at guest address {:#x}", at.0)))
    }

    /// Copies guest memory into `dst`.
    ///
    /// # Errors
    /// `Invalid` when a byte of the range is not RAM.
    pub fn read(&self, at: Gpa, dst: &mut [u8]) -> Result<()> {
        let offset = self.checked(at, wide(dst.len()))?;
        // SAFETY: the range is inside RAM, by `checked`.
        unsafe { copy_in(dst, self.at_offset(offset).as_ptr()) };
        Ok(())
    }

    /// Copies `src` into guest memory and marks the pages dirty for the device log.
    ///
    /// # Errors
    /// `Invalid` when a byte of the range is not RAM.
    pub fn write(&self, at: Gpa, src: &[u8]) -> Result<()> {
        let offset = self.checked(at, wide(src.len()))?;
        // SAFETY: the range is inside RAM, by `checked`.
        unsafe { copy_out(self.at_offset(offset).as_ptr(), src) };
        self.dirty.mark(offset, wide(src.len()));
        Ok(())
    }

    /// The host address of `len` bytes of RAM, valid while `self` lives. Whoever writes there
    /// calls [`GuestRam::mark_dirty`] afterwards.
    ///
    /// # Errors
    /// `Invalid` when a byte of the range is not RAM, or it crosses the hole below 4 GiB.
    pub fn host(&self, at: Gpa, len: u64) -> Result<NonNull<u8>> {
        self.checked(at, len).map(|offset| self.at_offset(offset))
    }

    /// The same RAM as rings see it, in guest-physical addresses. Ring addresses are the guest's
    /// own as well.
    ///
    /// # Errors
    /// Never but for a bug: the banks do not overlap.
    pub fn memory(self: &Arc<Self>) -> Result<Memory> {
        let region = |bank: Bank| {
            let (guest, user) = (GuestAddr(bank.start.0), UserAddr(bank.start.0));
            let spec = RegionSpec { guest, user, size: bank.len, offset: 0 };
            // SAFETY: the bank lies in the reservation, which lives as long as `self`, and nobody
            // has references to its bytes.
            let region = unsafe { Region::over(spec, self.at_offset(bank.offset), self.clone()) };
            region.map(Arc::new)
        };
        Memory::new(self.banks().map(region).collect::<Result<_>>()?)
    }

    /// What another process needs to map the same RAM: it writes there as we do. `None` unless all
    /// of RAM is one shared file, as it is until the first cut.
    #[must_use]
    pub fn lend(&self) -> Option<SharedMemory> {
        let file = self.shared.lock().clone()?;
        let region = |bank: Bank| {
            let (guest, user) = (GuestAddr(bank.start.0), UserAddr(bank.start.0));
            RegionSpec { guest, user, size: bank.len, offset: bank.offset }
        };
        Some(SharedMemory { file, regions: self.banks().map(region).collect() })
    }

    /// Marks what was written through a host address. Bytes outside RAM are left out.
    pub fn mark_dirty(&self, at: Gpa, len: u64) {
        if let Some(offset) = self.offset_of(at, len) {
            self.dirty.mark(offset, len);
        }
    }

    /// The page tables of this process, 8 bytes for each page of its address space.
    pub(crate) fn page_tables(&self) -> &File {
        &self.page_tables
    }

    /// The pages that devices wrote.
    pub(crate) fn device_dirty(&self) -> &DirtyPages {
        &self.dirty
    }

    /// The host address of an offset in RAM.
    pub(crate) fn at_offset(&self, offset: u64) -> NonNull<u8> {
        debug_assert!(offset <= self.size);
        // SAFETY: offsets inside RAM are inside the reservation.
        unsafe { self.base.add(index(offset)) }
    }

    /// Maps all of `file` shared over all of RAM: the top of a first generation.
    pub(crate) fn map_shared(&self, file: &Arc<OwnedFd>) -> Result<()> {
        self.map_file(0, self.size, file, MapFlags::SHARED)?;
        *self.shared.lock() = Some(Arc::clone(file));
        // Huge pages are a wish: a host whose policy denies them gives ordinary ones.
        // SAFETY: the range is the mapping just made; the advice changes no content.
        let _ = unsafe {
            let (base, size) = (self.base.as_ptr().cast(), index(self.size));
            rustix::mm::madvise(base, size, Advice::LinuxHugepage)
        };
        self.keep_out_of_cores();
        Ok(())
    }

    /// Maps `len` bytes of `file` from the same offset privately over RAM.
    pub(crate) fn map_private(&self, offset: u64, len: u64, file: impl AsFd) -> Result<()> {
        *self.shared.lock() = None;
        self.map_file(offset, len, &file, MapFlags::PRIVATE)
    }

    fn map_file(&self, offset: u64, len: u64, file: &impl AsFd, how: MapFlags) -> Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size));
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = how | MapFlags::FIXED | MapFlags::NORESERVE;
        let at = self.at_offset(offset).as_ptr().cast();
        // SAFETY: the range lies in our reservation; whoever holds host addresses into it expects
        // the content under them to be exchanged (see the file head).
        unsafe { rustix::mm::mmap(at, index(len), prot, flags, file, offset) }
            .map_err(|e| host("map", e))?;
        Ok(())
    }

    /// Puts zeroed private memory over `len` bytes of RAM.
    pub(crate) fn map_anonymous(&self, offset: u64, len: u64) -> Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size));
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let at = self.at_offset(offset).as_ptr().cast();
        // SAFETY: as in `map_file`.
        unsafe { rustix::mm::mmap_anonymous(at, index(len), prot, flags) }
            .map_err(|e| host("map", e))?;
        Ok(())
    }

    /// Makes RAM inaccessible again after an activation that failed half-way.
    pub(crate) fn close(&self) {
        // SAFETY: the range is ours; from here an access faults, which is the purpose. Failure
        // leaves private memory of a machine that never runs.
        let _ = unsafe {
            let (base, size) = (self.base.as_ptr().cast(), index(self.size));
            rustix::mm::mprotect(base, size, MprotectFlags::empty())
        };
    }

    /// Guest memory does not belong into a core file. Failure costs only that.
    pub(crate) fn keep_out_of_cores(&self) {
        // SAFETY: the range is our reservation; the advice changes no content.
        let _ = unsafe {
            let (base, size) = (self.base.as_ptr().cast(), index(self.size));
            rustix::mm::madvise(base, size, Advice::LinuxDontDump)
        };
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours, and whoever holds addresses into it holds `self`.
        let _ = unsafe { rustix::mm::munmap(self.whole.0.as_ptr().cast(), self.whole.1) };
    }
}

fn outside() -> Error {
    Error::invalid("the range is not guest memory").tried("access")
}

fn host(tried: &'static str, e: rustix::io::Errno) -> Error {
    Error::from(std::io::Error::from(e)).tried(tried).on("guest memory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::dirty::PageSet;

    #[test]
    fn reads_give_back_what_was_written_and_writes_are_marked() {
        let ram = GuestRam::new(16 * PAGE).unwrap();
        ram.write(Gpa(PAGE - 2), b"story").unwrap();
        let mut seen = [0; 5];
        ram.read(Gpa(PAGE - 2), &mut seen).unwrap();
        assert_eq!(&seen, b"story");
        ram.mark_dirty(Gpa(5 * PAGE), 1);
        let mut dirty = PageSet::new(ram.size());
        ram.device_dirty().take_into(&mut dirty);
        assert_eq!(dirty.runs().collect::<Vec<_>>(), [(0, 2), (5, 1)]);
    }

    #[test]
    fn ranges_outside_ram_are_refused() {
        let ram = GuestRam::new(16 * PAGE).unwrap();
        for (at, len) in [(16 * PAGE, 1), (16 * PAGE - 1, 2), (u64::MAX, 1), (0, 16 * PAGE + 1)] {
            assert!(ram.host(Gpa(at), len).is_err(), "{at:#x} {len}");
        }
        assert!(ram.read(Gpa(u64::MAX - 1), &mut [0; 8]).is_err());
        assert!(ram.host(Gpa(0), 16 * PAGE).is_ok());
    }

    #[test]
    fn rings_see_the_same_bytes() {
        let ram = Arc::new(GuestRam::new(16 * PAGE).unwrap());
        let memory = ram.memory().unwrap();
        memory.write(GuestAddr(5000), b"ring").unwrap();
        let mut seen = [0; 4];
        ram.read(Gpa(5000), &mut seen).unwrap();
        assert_eq!(&seen, b"ring");
        assert!(memory.write(GuestAddr(16 * PAGE - 1), b"ab").is_err());
    }

    #[test]
    fn only_memory_that_is_one_shared_file_is_lent() {
        let ram = GuestRam::reserve(LOW_END + (1 << 30)).unwrap();
        assert!(ram.lend().is_none(), "nothing is mapped");
        let file = Arc::new(crate::memory::image::memory_file("test", ram.size()).unwrap());
        ram.map_shared(&file).unwrap();
        let lent = ram.lend().unwrap();
        let spec = |guest: u64, size: u64, offset: u64| RegionSpec {
            guest: GuestAddr(guest),
            user: UserAddr(guest),
            size,
            offset,
        };
        assert_eq!(lent.regions, [spec(0, LOW_END, 0), spec(HIGH_START, 1 << 30, LOW_END)]);
        let high = Region::map(lent.regions[1], file.try_clone().unwrap()).unwrap();
        let memory = Memory::new(vec![Arc::new(high)]).unwrap();
        memory.write(GuestAddr(HIGH_START + 5), b"device").unwrap();
        let mut seen = [0; 6];
        ram.read(Gpa(HIGH_START + 5), &mut seen).unwrap();
        assert_eq!(&seen, b"device");
        ram.map_private(0, PAGE, &file).unwrap();
        assert!(ram.lend().is_none(), "a part is copied on write");
    }

    #[test]
    fn memory_beyond_three_gib_goes_on_at_four() {
        let ram = GuestRam::reserve(LOW_END + (1 << 30)).unwrap();
        let banks: Vec<Bank> = ram.banks().collect();
        assert_eq!(banks[1], Bank { start: Gpa(HIGH_START), offset: LOW_END, len: 1 << 30 });
        assert!(ram.host(Gpa(LOW_END), 1).is_err());
        assert!(ram.host(Gpa(LOW_END - 1), 2).is_err());
        let (low, high) = (ram.host(Gpa(0), 1).unwrap(), ram.host(Gpa(HIGH_START), 1).unwrap());
        assert_eq!(high.as_ptr() as usize - low.as_ptr() as usize, index(LOW_END));
        assert_eq!(low.as_ptr() as usize % index(HUGE_PAGE), 0);
    }
}
