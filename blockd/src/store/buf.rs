//! Buffers that direct I/O accepts.
//!
//! Invariant: the start address and the capacity of an [`AlignedBuf`] are multiples of [`ALIGN`].

use std::ops::{Deref, DerefMut};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// Alignment, in bytes, of address, offset and length that every host accepts for direct I/O.
pub const ALIGN: usize = 4096;

#[derive(Clone, FromBytes, IntoBytes, Immutable)]
#[repr(C, align(4096))]
struct Page([u8; ALIGN]);

/// A zeroed, page-aligned byte buffer of any length.
#[derive(Clone)]
pub struct AlignedBuf {
    pages: Box<[Page]>,
    len: usize,
}

impl AlignedBuf {
    /// A zeroed buffer of `len` bytes.
    ///
    /// # Panics
    /// When the allocator has no memory left, as `Vec` does.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let pages = Page::new_vec_zeroed(len.div_ceil(ALIGN)).expect("memory").into();
        AlignedBuf { pages, len }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.pages.as_bytes()[..self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.pages.as_mut_bytes()[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_aligned_and_content_zero() {
        let mut buf = AlignedBuf::zeroed(5000);

        buf[4999] = 7;

        assert_eq!(buf.as_ptr().align_offset(ALIGN), 0);
        assert_eq!((buf.len(), buf[0], buf[4999]), (5000, 0, 7));
    }
}
