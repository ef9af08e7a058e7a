//! Checksummed arrays: bytes of any length in one contiguous run of pages, with a tree of checksum
//! pages behind them in the same run, and the top page's checksum in the pointer.
//!
//! The segment table and the data checksums of sealed segments are stored this way. Layout:
//! `docs/format.md` §5. Invariant: every page of the run is covered by a checksum in its parent.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::{BLOCKS_PER_EXTENT, PAGE, SEGMENT_EXTENTS_MAX};
use crate::units::{PageNo, crc, index};
use crate::{Error, Result};

const SUMS_PER_PAGE: u64 = PAGE as u64 / 4;

/// Where an array is; `bytes` zero means that there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ArrayRef {
    /// First page of the run.
    pub page: PageNo,
    /// Length of the content in bytes.
    pub bytes: u64,
    /// CRC32C of the last page of the run: the top of the checksum tree.
    pub crc: u32,
}

/// An [`ArrayRef`] on disk: 24 bytes.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawArrayRef {
    page: U64,
    bytes: U64,
    crc: U32,
    reserved: U32,
}

impl ArrayRef {
    /// The reference as it is stored.
    #[must_use]
    pub fn encode(&self) -> RawArrayRef {
        RawArrayRef {
            page: self.page.0.into(),
            bytes: self.bytes.into(),
            crc: self.crc.into(),
            reserved: 0.into(),
        }
    }

    /// The one decode point of references.
    ///
    /// # Errors
    /// `Corrupt` when the run cannot lie in a segment.
    pub fn decode(raw: &RawArrayRef) -> Result<Self> {
        let r =
            ArrayRef { page: PageNo(raw.page.get()), bytes: raw.bytes.get(), crc: raw.crc.get() };
        let pages_max = SEGMENT_EXTENTS_MAX * BLOCKS_PER_EXTENT;
        if r.page.0 >= pages_max || r.bytes / PAGE as u64 >= pages_max || raw.reserved.get() != 0 {
            return Err(Error::corrupt("an array reference points outside any segment"));
        }
        Ok(r)
    }

    /// True when there is no array.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Pages of the whole run, checksum pages included.
    #[must_use]
    pub fn pages(&self) -> u64 {
        levels(self.bytes).iter().sum()
    }
}

/// Pages of each level, content first; the last level has one page. Empty for no content.
fn levels(bytes: u64) -> Vec<u64> {
    let mut levels = Vec::new();
    let mut pages = bytes.div_ceil(PAGE as u64);
    while pages > 0 {
        levels.push(pages);
        pages = if pages == 1 { 0 } else { pages.div_ceil(SUMS_PER_PAGE) };
    }
    levels
}

/// Pages that an array of `bytes` bytes takes.
#[must_use]
pub fn pages_for(bytes: u64) -> u64 {
    levels(bytes).iter().sum()
}

fn sums_of(pages: &[u8]) -> Vec<u8> {
    let mut sums: Vec<u8> =
        pages.chunks_exact(PAGE).flat_map(|page| crc(page).to_le_bytes()).collect();
    sums.resize(sums.len().next_multiple_of(PAGE), 0);
    sums
}

/// The run for `content`, padded to whole pages, and the reference for a run starting at `page`.
#[must_use]
pub fn encode(content: &[u8], page: PageNo) -> (Vec<u8>, ArrayRef) {
    let mut run = content.to_vec();
    run.resize(run.len().next_multiple_of(PAGE), 0);
    let mut from = 0;
    while run.len() - from > PAGE {
        let sums = sums_of(&run[from..]);
        from = run.len();
        run.extend(sums);
    }
    let top = if run.is_empty() { 0 } else { crc(&run[from..]) };
    let reference = ArrayRef { page, bytes: content.len() as u64, crc: top };
    (run, reference)
}

/// The verified checksums of an array's content pages: content can then be read in part.
#[derive(Debug, Clone)]
pub struct ArrayIndex {
    at: ArrayRef,
    sums: Vec<u32>,
}

impl ArrayIndex {
    /// Reads and verifies the checksum levels; `read` fills the buffer from a page on.
    ///
    /// # Errors
    /// `Corrupt` when a checksum page does not match its parent, or what `read` reports.
    pub fn load(
        at: ArrayRef,
        read: &mut dyn FnMut(PageNo, &mut [u8]) -> Result<()>,
    ) -> Result<Self> {
        let levels = levels(at.bytes);
        let mut sums = vec![at.crc];
        let mut end = at.pages();
        for pages in levels.iter().skip(1).rev() {
            end -= pages;
            let mut level = vec![0; index(*pages) * PAGE];
            read(at.page.plus(end), &mut level)?;
            verify(&level, &sums)?;
            sums = level
                .chunks_exact(4)
                .map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")))
                .collect();
        }
        sums.truncate(index(levels.first().copied().unwrap_or(0)));
        Ok(ArrayIndex { at, sums })
    }

    /// Reads and verifies `count` content pages from the `first` one on.
    ///
    /// # Errors
    /// `Corrupt` when a page does not match its checksum, `Invalid` past the end, or what `read`
    /// reports.
    pub fn read_pages(
        &self,
        first: u64,
        count: u64,
        read: &mut dyn FnMut(PageNo, &mut [u8]) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let sums = self.sums.get(index(first)..index(first + count));
        let sums = sums.ok_or_else(|| Error::invalid("read past the end of an array"))?;
        let mut pages = vec![0; index(count) * PAGE];
        read(self.at.page.plus(first), &mut pages)?;
        verify(&pages, sums)?;
        Ok(pages)
    }
}

fn verify(pages: &[u8], sums: &[u32]) -> Result<()> {
    if pages.chunks_exact(PAGE).zip(sums).all(|(page, sum)| crc(page) == *sum) {
        Ok(())
    } else {
        Err(Error::corrupt("checksum mismatch in an array page"))
    }
}

/// Reads and verifies a whole array.
///
/// # Errors
/// `Corrupt` when a page does not match its checksum, or what `read` reports.
pub fn read_all(
    at: ArrayRef,
    read: &mut dyn FnMut(PageNo, &mut [u8]) -> Result<()>,
) -> Result<Vec<u8>> {
    let array = ArrayIndex::load(at, read)?;
    let mut content = array.read_pages(0, at.bytes.div_ceil(PAGE as u64), read)?;
    content.truncate(index(at.bytes));
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(run: &[u8]) -> impl FnMut(PageNo, &mut [u8]) -> Result<()> + '_ {
        |page, buf| {
            let from = index(page.0 - 100) * PAGE;
            buf.copy_from_slice(&run[from..from + buf.len()]);
            Ok(())
        }
    }

    #[test]
    fn arrays_of_one_two_and_three_levels_survive_a_round_trip() {
        for bytes in [0, 1, PAGE, PAGE + 1, 1024 * PAGE, 1024 * PAGE + 1] {
            let content: Vec<u8> = (0..bytes).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let (run, at) = encode(&content, PageNo(100));

            assert_eq!(run.len() as u64, at.pages() * PAGE as u64);
            assert_eq!(at.pages(), pages_for(bytes as u64));
            assert_eq!(read_all(at, &mut reader(&run)).unwrap(), content);
        }
    }

    #[test]
    fn damage_in_any_page_is_seen() {
        let content = vec![3; 1030 * PAGE];
        let (run, at) = encode(&content, PageNo(100));
        for page in [0, 1029, 1030, 1031, 1032] {
            let mut bad = run.clone();
            bad[page * PAGE + 17] ^= 8;
            assert!(read_all(at, &mut reader(&bad)).is_err(), "page {page}");
        }
    }
}
