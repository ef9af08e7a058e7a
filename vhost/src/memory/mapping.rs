//! One mapping of memory that somebody else writes too: of a descriptor that another process owns,
//! or of memory that the caller has mapped for a guest.
//!
//! Invariants: `data..data + len` lies inside one mapping that lives as long as the value; the
//! other side may change every byte at any moment, so nothing here hands out a Rust reference to
//! plain memory, only volatile copies, atomics and raw pointers; truncation of the file does not
//! kill the process (see [`super::fault`]).

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use format::{Error, Kind, Result};
use rustix::fs::FileType;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::fault::Entry;
use crate::util::{index, wide};

const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Who keeps the pages of a mapping.
enum Keeper {
    /// We: the file was mapped here.
    File(OwnedFd),
    /// The caller, as long as this lives.
    Caller(#[allow(dead_code)] Arc<dyn Any + Send + Sync>), // held, never looked at
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Keeper::File(file) => write!(f, "{file:?}"),
            Keeper::Caller(_) => f.write_str("the caller"),
        }
    }
}

/// A mapping of `len` bytes, readable and writable, shared with whoever else has the memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    data: NonNull<u8>,
    len: usize,
    map: NonNull<u8>,
    map_len: usize,
    guard: Option<Entry>,
    keeper: Keeper,
}

// SAFETY: the value owns its mapping, and all access goes through volatile copies, atomics or raw
// pointers whose users answer for themselves.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset`.
    ///
    /// # Errors
    /// `Invalid` when the descriptor is not a file, is too short, or cannot be mapped writable.
    pub(crate) fn new(file: OwnedFd, offset: u64, len: u64) -> Result<Mapping> {
        let stat = rustix::fs::fstat(&file).map_err(host)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::invalid("the descriptor is not a memory file"));
        }
        let file_len = u64::try_from(stat.st_size).unwrap_or(0);
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(Error::invalid("the memory range is empty or ends past its file"));
        }
        // Huge page files map only at multiples of their page size, while the other side may
        // well describe a range that starts elsewhere.
        let page = page_size(&file)?;
        let lead = offset % page;
        let map_len = index(len + lead).checked_next_multiple_of(index(page));
        let map_len =
            map_len.ok_or_else(|| Error::invalid("the memory range is larger than memory"))?;
        // SAFETY: a fresh mapping at an address the kernel picks aliases nothing.
        let map = unsafe {
            mmap(
                std::ptr::null_mut(),
                map_len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                offset - lead,
            )
        }
        .map_err(|e| Error::invalid("the descriptor cannot be mapped").caused_by(host(e)))?;
        let map = NonNull::new(map.cast::<u8>())
            .ok_or_else(|| Error::new(Kind::Io, "the host mapped memory at address 0"))?;
        // SAFETY: `lead` is smaller than one page, which the mapping has.
        let data = unsafe { map.add(index(lead)) };
        let keeper = Keeper::File(file);
        let mut mapping = Mapping { data, len: index(len), map, map_len, guard: None, keeper };
        // Guest memory does not belong into a core file. Failure costs only that.
        // SAFETY: the range is exactly the mapping made above; the advice changes no content.
        let _ = unsafe { madvise(map.as_ptr().cast(), map_len, Advice::LinuxDontDump) };
        mapping.guard = Some(Entry::new(map.as_ptr() as usize, map_len)?);
        Ok(mapping)
    }

    /// Uses `len` bytes at `data` that the caller has mapped, under the same rules.
    ///
    /// # Safety
    /// The range is mapped readable and writable for as long as `keep` lives, though not always
    /// with the same pages, and nobody has a reference to its bytes.
    ///
    /// # Errors
    /// `Invalid` for no bytes; `Busy` when too many mappings are guarded.
    pub(crate) unsafe fn over(
        data: NonNull<u8>,
        len: u64,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Result<Mapping> {
        if len == 0 {
            return Err(Error::invalid("the memory range is empty"));
        }
        let len = index(len);
        let guard = Some(Entry::new(data.as_ptr() as usize, len)?);
        let keeper = Keeper::Caller(keep);
        Ok(Mapping { data, len, map: data, map_len: len, guard, keeper })
    }

    /// First byte. Valid for [`Mapping::len`] bytes while `self` lives.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.data.as_ptr()
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// A pointer to `len` bytes at `offset`, if they lie inside.
    pub(crate) fn range(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // SAFETY: `offset` is not past the end of the mapping.
        (end <= wide(self.len)).then(|| unsafe { self.data.as_ptr().add(index(offset)) })
    }

    /// The mapped file; `None` when the caller mapped the memory.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        match &self.keeper {
            Keeper::File(file) => Some(file.as_fd()),
            Keeper::Caller(_) => None,
        }
    }

    /// Whether the other side cut the file short; the mapping then shows zeros.
    pub(crate) fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Entry::is_lost)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The guard goes first: it must not outlive the range that it guards.
        self.guard = None;
        if let Keeper::File(_) = self.keeper {
            // SAFETY: the mapping is ours and whoever held pointers into it held `self` as well.
            let _ = unsafe { munmap(self.map.as_ptr().cast::<c_void>(), self.map_len) };
        }
    }
}

fn host(e: rustix::io::Errno) -> Error {
    Error::from(std::io::Error::from(e)).tried("map shared memory")
}

fn page_size(file: &OwnedFd) -> Result<u64> {
    let fs = rustix::fs::fstatfs(file).map_err(host)?;
    let magic = u64::try_from(fs.f_type).unwrap_or(0);
    let block = u64::try_from(fs.f_bsize).unwrap_or(0);
    Ok(if magic == HUGETLBFS_MAGIC && block.is_power_of_two() {
        block
    } else {
        wide(rustix::param::page_size())
    })
}

/// Copies shared memory into `dst`, reading every byte exactly once.
///
/// # Safety
/// `src` is valid for `dst.len()` bytes.
pub unsafe fn copy_in(dst: &mut [u8], src: *const u8) {
    let lead = src.align_offset(8).min(dst.len());
    let (head, rest) = dst.split_at_mut(lead);
    let mut at = src;
    let bytes = |part: &mut [u8], at: &mut *const u8| {
        for byte in part {
            // SAFETY: inside the range the caller vouches for.
            *byte = unsafe { at.read_volatile() };
            *at = at.wrapping_add(1);
        }
    };
    bytes(head, &mut at);
    let mut words = rest.chunks_exact_mut(8);
    for word in &mut words {
        // SAFETY: inside the range the caller vouches for, and aligned by `lead`.
        let value = unsafe { at.cast::<u64>().read_volatile() };
        word.copy_from_slice(&value.to_ne_bytes());
        at = at.wrapping_add(8);
    }
    bytes(words.into_remainder(), &mut at);
}

/// Copies `src` into shared memory.
///
/// # Safety
/// `dst` is valid for `src.len()` bytes.
pub unsafe fn copy_out(dst: *mut u8, src: &[u8]) {
    let lead = dst.align_offset(8).min(src.len());
    let (head, rest) = src.split_at(lead);
    let mut at = dst;
    let bytes = |part: &[u8], at: &mut *mut u8| {
        for byte in part {
            // SAFETY: inside the range the caller vouches for.
            unsafe { at.write_volatile(*byte) };
            *at = at.wrapping_add(1);
        }
    };
    bytes(head, &mut at);
    let words = rest.chunks_exact(8);
    let tail = words.remainder();
    for word in words {
        let value = u64::from_ne_bytes(word.try_into().expect("chunks of 8"));
        // SAFETY: inside the range the caller vouches for, and aligned by `lead`.
        unsafe { at.cast::<u64>().write_volatile(value) };
        at = at.wrapping_add(8);
    }
    bytes(tail, &mut at);
}

/// Copies from one piece of shared memory to another.
///
/// # Safety
/// Both are valid for `len` bytes and do not overlap.
pub(crate) unsafe fn copy_across(dst: *mut u8, src: *const u8, len: usize) {
    // Others may write both at any moment, so this is no copy that the compiler may reason about.
    // SAFETY: the instruction touches the two ranges that the caller vouches for, and the direction
    // flag is clear, as everywhere between two instructions of Rust code.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rdi") dst => _,
            inout("rsi") src => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Writes zeroes to shared memory.
///
/// # Safety
/// `dst` is valid for `len` bytes.
pub(crate) unsafe fn zero_out(dst: *mut u8, len: usize) {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut done = 0;
    while done < len {
        let part = (len - done).min(ZEROES.len());
        // SAFETY: inside the range the caller vouches for.
        unsafe { copy_out(dst.wrapping_add(done), &ZEROES[..part]) };
        done += part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memfd(len: u64) -> OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn range_outside_the_file_is_refused() {
        assert!(Mapping::new(memfd(4096), 0, 4097).is_err());
        assert!(Mapping::new(memfd(4096), u64::MAX, 2).is_err());
        assert!(Mapping::new(memfd(4096), 0, 0).is_err());
        let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
        assert!(Mapping::new(socket.into(), 0, 1).is_err());
    }

    #[test]
    fn offset_that_is_no_multiple_of_a_page_shows_the_right_bytes() {
        let fd = memfd(8192);
        rustix::io::pwrite(&fd, b"needle", 5000).unwrap();
        let map = Mapping::new(fd, 5000, 100).unwrap();
        let mut seen = [0u8; 6];
        // SAFETY: 6 of the 100 mapped bytes.
        unsafe { copy_in(&mut seen, map.as_ptr()) };
        assert_eq!(&seen, b"needle");
        assert!(map.range(95, 5).is_some() && map.range(95, 6).is_none());
    }

    #[test]
    fn copies_agree_at_every_alignment_and_length() {
        let map = Mapping::new(memfd(4096), 0, 4096).unwrap();
        let source: Vec<u8> = (0..64u8).collect();
        for start in 0..9 {
            for len in 0..40 {
                let at = map.range(start, wide(len)).unwrap();
                let mut seen = vec![0u8; len];
                // SAFETY: `range` checked the bounds.
                unsafe {
                    copy_out(at, &source[..len]);
                    copy_in(&mut seen, at);
                }
                assert_eq!(seen, source[..len]);
            }
        }
    }

    #[test]
    fn memory_of_the_caller_is_used_where_it_is_and_stays_mapped() {
        let keep = Arc::new(Mapping::new(memfd(8192), 0, 8192).unwrap());
        let data = NonNull::new(keep.range(4096, 4096).unwrap()).unwrap();
        // SAFETY: the second half of a mapping that `keep` keeps.
        let over = unsafe { Mapping::over(data, 4096, keep.clone()) }.unwrap();
        assert!(over.file().is_none() && over.range(0, 4097).is_none());
        // SAFETY: inside both mappings, and apart from each other.
        unsafe {
            copy_out(over.as_ptr(), b"needle");
            copy_across(keep.as_ptr(), over.as_ptr(), 6);
        }
        drop(over);
        let mut seen = [[0u8; 6]; 2];
        // SAFETY: inside the mapping, which is still there.
        unsafe {
            copy_in(&mut seen[0], keep.as_ptr());
            copy_in(&mut seen[1], keep.range(4096, 6).unwrap());
        }
        assert_eq!(seen, [*b"needle"; 2]);
        assert_eq!(Arc::strong_count(&keep), 1);
        // SAFETY: never made, because it would be empty.
        assert!(unsafe { Mapping::over(data, 0, keep) }.is_err());
    }

    #[test]
    fn truncation_by_the_other_side_is_noticed_and_survived() {
        let fd = memfd(1 << 20);
        let other = fd.try_clone().unwrap();
        let (map, whole) = (Mapping::new(fd, 0, 1 << 20).unwrap(), memfd(4096));
        let whole = Mapping::new(whole, 0, 4096).unwrap();
        let before = super::super::fault::losses();
        ftruncate(&other, 0).unwrap();
        let mut seen = [1u8; 16];
        // SAFETY: inside the mapping.
        unsafe { copy_in(&mut seen, map.range(65536, 16).unwrap()) };
        assert_eq!(seen, [0; 16]);
        assert!(map.is_lost() && super::super::fault::losses() > before);
        assert!(!whole.is_lost());
    }
}
