//! The checksums of a sealed segment's data, read a page at a time.

use std::sync::Arc;

use format::array::ArrayIndex;
use format::limits::PAGE;
use format::superblock::Superblock;
use format::units::{BlockId, PageNo, index};
use format::{Error, Kind, Result};

use crate::disk::seal::sums_bytes_max;
use crate::segment::{array_index, read_pages};
use crate::store::File;

/// Sums in a page of the array.
const SUMS_PER_PAGE: u64 = PAGE as u64 / 4;

/// Reads sums. Those of neighbouring blocks come from one page, which is kept.
pub(crate) struct SumReader {
    file: Arc<dyn File>,
    /// The page of the first block that has a sum.
    first: PageNo,
    array: ArrayIndex,
    /// The page read last, by number; without bytes when it is damaged.
    page: Option<(u64, Option<Vec<u8>>)>,
}

impl SumReader {
    /// The sums of a segment whose seal is done.
    ///
    /// # Errors
    /// `Corrupt` for an impossible array, or what the host reports.
    pub(crate) fn open(file: &Arc<dyn File>, sb: &Superblock) -> Result<Self> {
        let bytes_max = sums_bytes_max(sb.data_start(), sb.extents_end);
        let array = array_index(file.as_ref(), sb.sums, bytes_max)?;
        let first = sb.data_start().first_page();
        Ok(SumReader { file: Arc::clone(file), first, array, page: None })
    }

    /// The sum of a block of the segment's file.
    ///
    /// # Errors
    /// `Corrupt` when there is none that can be read, or what the host reports.
    pub(crate) fn get(&mut self, block: BlockId) -> Result<u32> {
        let none = || Error::corrupt("the page of its checksum is damaged");
        let number = block.0.checked_sub(self.first.0).ok_or_else(none)?;
        let (page, in_page) = (number / SUMS_PER_PAGE, index(number % SUMS_PER_PAGE) * 4);
        if self.page.as_ref().is_none_or(|(p, _)| *p != page) {
            let file = self.file.as_ref();
            let read = &mut |at, buf: &mut [u8]| read_pages(file, at, buf);
            let bytes = match self.array.read_pages(page, 1, read) {
                Ok(bytes) => Some(bytes),
                Err(e) if e.kind() == Kind::Corrupt => None,
                Err(e) => return Err(e),
            };
            self.page = Some((page, bytes));
        }
        let bytes = self.page.as_ref().and_then(|(_, bytes)| bytes.as_ref());
        let word = bytes.and_then(|b| b.get(in_page..in_page + 4)?.try_into().ok());
        word.map(u32::from_le_bytes).ok_or_else(none)
    }
}
