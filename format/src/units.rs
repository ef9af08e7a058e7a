//! Address spaces and counters as types: none of them converts into another without a named method.
//!
//! | type | counts | space |
//! |---|---|---|
//! | [`GuestOffset`] | bytes | virtual disk |
//! | [`GuestBlock`] | 4 KiB blocks | virtual disk |
//! | [`GuestExtent`] | 64 KiB extents | virtual disk |
//! | [`LeafNo`] | 32 MiB leaves | virtual disk |
//! | [`ExtentId`] | 64 KiB extents | one segment file |
//! | [`BlockId`] | 4 KiB blocks | one segment file |
//! | [`PageNo`] | 4 KiB metadata pages | one segment file |
//! | [`SegmentIdx`] | rows | the segment table of one map |
//! | [`Seq`] | records | the journal of one segment |
//! | [`Generation`] | superblock flips | one segment |
//! | [`Epoch`] | openings for writing | one segment (a journal page of another epoch is stale) |
//! | [`OwnerEpoch`] | changes of ownership | one volume |

use crate::limits::{BLOCK, BLOCKS_PER_EXTENT, EXTENT, LEAF_ENTRIES, LEAF_SPAN, SEGMENTS_MAX};
use crate::{Error, Result};

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The value `n` steps further.
            #[must_use]
            pub const fn plus(self, n: u64) -> Self {
                Self(self.0 + n)
            }
            /// The next value.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

unit!(
    /// Byte offset in the virtual disk.
    GuestOffset
);
unit!(
    /// Block number in the virtual disk.
    GuestBlock
);
unit!(
    /// Extent number in the virtual disk.
    GuestExtent
);
unit!(
    /// Leaf number in the virtual disk.
    LeafNo
);
unit!(
    /// Extent number in a segment file.
    ExtentId
);
unit!(
    /// Block number in a segment file.
    BlockId
);
unit!(
    /// Metadata page number in a segment file.
    PageNo
);
unit!(
    /// Sequence number of a journal record.
    Seq
);
unit!(
    /// Superblock generation.
    Generation
);
unit!(
    /// Journal epoch: grows at every opening for writing.
    Epoch
);
unit!(
    /// Ownership epoch of a volume: the barrier of a migration.
    OwnerEpoch
);

/// Row of a map's segment table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentIdx(u16);

impl SegmentIdx {
    /// Checks that `index` is below [`SEGMENTS_MAX`].
    ///
    /// # Errors
    /// `Corrupt` when it is not.
    pub fn new(index: u64) -> Result<Self> {
        match u16::try_from(index) {
            Ok(i) if usize::from(i) < SEGMENTS_MAX => Ok(SegmentIdx(i)),
            _ => Err(Error::corrupt(format!("segment index {index} is out of range"))),
        }
    }

    /// The row number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl std::fmt::Display for SegmentIdx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl GuestOffset {
    /// The block that holds this byte.
    #[must_use]
    pub const fn block(self) -> GuestBlock {
        GuestBlock(self.0 / BLOCK)
    }
    /// Byte offset inside that block.
    #[must_use]
    pub const fn in_block(self) -> u64 {
        self.0 % BLOCK
    }
}

impl GuestBlock {
    /// Byte offset of the block's start.
    #[must_use]
    pub const fn offset(self) -> GuestOffset {
        GuestOffset(self.0 * BLOCK)
    }
    /// The extent that holds this block.
    #[must_use]
    pub const fn extent(self) -> GuestExtent {
        GuestExtent(self.0 / BLOCKS_PER_EXTENT)
    }
    /// Index of the block inside its extent, 0–15.
    #[must_use]
    pub const fn in_extent(self) -> usize {
        index(self.0 % BLOCKS_PER_EXTENT)
    }
}

impl GuestExtent {
    /// First block of the extent.
    #[must_use]
    pub const fn first_block(self) -> GuestBlock {
        GuestBlock(self.0 * BLOCKS_PER_EXTENT)
    }
    /// The leaf that holds this extent.
    #[must_use]
    pub const fn leaf(self) -> LeafNo {
        LeafNo(self.0 / LEAF_ENTRIES as u64)
    }
    /// Index of the extent inside its leaf, 0–511.
    #[must_use]
    pub const fn in_leaf(self) -> usize {
        index(self.0 % LEAF_ENTRIES as u64)
    }
}

impl LeafNo {
    /// First extent under the leaf.
    #[must_use]
    pub const fn first_extent(self) -> GuestExtent {
        GuestExtent(self.0 * LEAF_ENTRIES as u64)
    }
    /// Leaves that a disk of `virtual_size` bytes needs.
    #[must_use]
    pub const fn count_for(virtual_size: u64) -> u64 {
        virtual_size.div_ceil(LEAF_SPAN)
    }
}

impl ExtentId {
    /// Byte offset in the file.
    #[must_use]
    pub const fn file_offset(self) -> u64 {
        self.0 * EXTENT
    }
    /// Block `i` of the extent.
    #[must_use]
    pub const fn block(self, i: usize) -> BlockId {
        BlockId(self.0 * BLOCKS_PER_EXTENT + i as u64)
    }
    /// First page of the extent.
    #[must_use]
    pub const fn first_page(self) -> PageNo {
        PageNo(self.0 * BLOCKS_PER_EXTENT)
    }
}

impl BlockId {
    /// Byte offset in the file.
    #[must_use]
    pub const fn file_offset(self) -> u64 {
        self.0 * BLOCK
    }
    /// The extent that holds this block.
    #[must_use]
    pub const fn extent(self) -> ExtentId {
        ExtentId(self.0 / BLOCKS_PER_EXTENT)
    }
    /// Index of the block inside its extent, 0–15.
    #[must_use]
    pub const fn in_extent(self) -> usize {
        index(self.0 % BLOCKS_PER_EXTENT)
    }
}

impl PageNo {
    /// Byte offset in the file.
    #[must_use]
    pub const fn file_offset(self) -> u64 {
        self.0 * BLOCK
    }
    /// The extent that holds this page.
    #[must_use]
    pub const fn extent(self) -> ExtentId {
        ExtentId(self.0 / BLOCKS_PER_EXTENT)
    }
    /// Index of the page inside its extent, 0–15.
    #[must_use]
    pub const fn in_extent(self) -> usize {
        index(self.0 % BLOCKS_PER_EXTENT)
    }
}

/// A 64-bit count as an index into memory.
#[must_use]
#[allow(clippy::cast_possible_truncation)] // usize is 64 bits: asserted in `limits`.
pub const fn index(n: u64) -> usize {
    n as usize
}

/// A length in memory as a 64-bit count; never loses anything.
#[must_use]
pub const fn wide(n: usize) -> u64 {
    n as u64
}

/// The CRC32C (Castagnoli) of `bytes`.
#[must_use]
pub fn crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// Checks a virtual disk size in bytes.
///
/// # Errors
/// `Invalid` outside 1 MiB … 64 TiB, or when it is not a multiple of 512.
pub fn check_virtual_size(bytes: u64) -> Result<()> {
    use crate::limits::{SECTOR, VIRTUAL_SIZE_MAX, VIRTUAL_SIZE_MIN};
    if !(VIRTUAL_SIZE_MIN..=VIRTUAL_SIZE_MAX).contains(&bytes) {
        return Err(Error::invalid(format!("size {bytes} is outside 1 MiB to 64 TiB")));
    }
    if !bytes.is_multiple_of(SECTOR) {
        return Err(Error::invalid(format!("size {bytes} is not a multiple of 512 bytes")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_extents_and_leaves_nest() {
        let b = GuestBlock(LEAF_ENTRIES as u64 * BLOCKS_PER_EXTENT + 17);

        assert_eq!(b.extent(), GuestExtent(513));
        assert_eq!(b.in_extent(), 1);
        assert_eq!(b.extent().leaf(), LeafNo(1));
        assert_eq!(b.extent().in_leaf(), 1);
        assert_eq!(ExtentId(3).block(5).extent(), ExtentId(3));
    }

    #[test]
    fn sizes_out_of_range_or_unaligned_are_refused() {
        assert!(check_virtual_size(1 << 20).is_ok());
        assert!(check_virtual_size((1 << 20) + 512).is_ok());
        assert!(check_virtual_size((1 << 20) - 512).is_err());
        assert!(check_virtual_size((1 << 20) + 1).is_err());
        assert!(check_virtual_size((64 << 40) + 512).is_err());
    }
}
