//! Map entries: what one extent, or one block of a mixed extent, of the virtual disk holds.
//!
//! Both are eight bytes on disk and one atomic word in memory. Layouts: `docs/format.md` §6.
//!
//! Invariants:
//! - Data of a block always sits at the block's own index inside its extent (natural placement), so
//!   an extent in a segment belongs to one extent of the virtual disk.
//! - Reserved bits are zero; a word with reserved bits set is corrupt, not "newer".

use crate::limits::{BLOCKS_PER_EXTENT, EXTENT_BLOCKS, SEGMENT_EXTENTS_MAX};
use crate::units::{BlockId, ExtentId, SegmentIdx, index};
use crate::{Error, Result};

const KIND_MASK: u64 = 0b11;
const SEGMENT_SHIFT: u32 = 2;
const SEGMENT_MASK: u64 = (1 << 14) - 1;
const EXTENT_SHIFT: u32 = 16;
const EXTENT_MASK: u64 = SEGMENT_EXTENTS_MAX - 1;
const BLOCK_SHIFT: u32 = 56;
const BLOCK_MASK: u64 = BLOCKS_PER_EXTENT - 1;

/// What an extent of the virtual disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Never written; reads as zeroes.
    Hole,
    /// Explicitly zero (written zeroes or discarded).
    Zero,
    /// All sixteen blocks lie in one extent of one segment.
    Uniform {
        /// Row of the segment table.
        segment: SegmentIdx,
        /// Extent in that segment.
        extent: ExtentId,
    },
    /// Each block has its own [`BlockState`], in a vector.
    Mixed {
        /// Slot of the vector in the leaf's vector run (on disk; zero in memory).
        slot: u16,
    },
}

/// What one block of the virtual disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// Never written; reads as zeroes.
    Hole,
    /// Explicitly zero.
    Zero,
    /// Lies in a segment.
    Data {
        /// Row of the segment table.
        segment: SegmentIdx,
        /// Block in that segment.
        block: BlockId,
    },
}

impl BlockState {
    /// True for the two states that read as zeroes.
    #[must_use]
    pub fn reads_zero(self) -> bool {
        !matches!(self, BlockState::Data { .. })
    }
}

fn place(segment: SegmentIdx, extent: ExtentId) -> u64 {
    debug_assert!(extent.0 < SEGMENT_EXTENTS_MAX);
    (u64::from(segment.get()) << SEGMENT_SHIFT) | (extent.0 << EXTENT_SHIFT)
}

fn segment_of(word: u64) -> Result<SegmentIdx> {
    SegmentIdx::new((word >> SEGMENT_SHIFT) & SEGMENT_MASK)
}

fn extent_of(word: u64) -> ExtentId {
    ExtentId((word >> EXTENT_SHIFT) & EXTENT_MASK)
}

impl Entry {
    /// The entry as an on-disk word.
    #[must_use]
    pub fn to_word(self) -> u64 {
        match self {
            Entry::Hole => 0,
            Entry::Zero => 1,
            Entry::Uniform { segment, extent } => 2 | place(segment, extent),
            Entry::Mixed { slot } => 3 | (u64::from(slot) << EXTENT_SHIFT),
        }
    }

    /// The one decode point of extent entries.
    ///
    /// # Errors
    /// `Corrupt` for reserved bits or an impossible segment index or slot.
    pub fn from_word(word: u64) -> Result<Self> {
        let entry = match word & KIND_MASK {
            0 => Entry::Hole,
            1 => Entry::Zero,
            2 => Entry::Uniform { segment: segment_of(word)?, extent: extent_of(word) },
            _ => Entry::Mixed {
                slot: u16::try_from(extent_of(word).0)
                    .map_err(|_| Error::corrupt("a vector slot is out of range"))?,
            },
        };
        if entry.to_word() == word {
            Ok(entry)
        } else {
            Err(Error::corrupt(format!("map entry {word:#018x} has reserved bits set")))
        }
    }

    /// State of block `i` of the extent; `None` for a mixed extent.
    #[must_use]
    pub fn block(self, i: usize) -> Option<BlockState> {
        match self {
            Entry::Hole => Some(BlockState::Hole),
            Entry::Zero => Some(BlockState::Zero),
            Entry::Uniform { segment, extent } => {
                Some(BlockState::Data { segment, block: extent.block(i) })
            }
            Entry::Mixed { .. } => None,
        }
    }
}

impl BlockState {
    /// The state as an on-disk word.
    #[must_use]
    pub fn to_word(self) -> u64 {
        match self {
            BlockState::Hole => 0,
            BlockState::Zero => 1,
            BlockState::Data { segment, block } => {
                2 | place(segment, block.extent()) | ((block.in_extent() as u64) << BLOCK_SHIFT)
            }
        }
    }

    /// The one decode point of block entries.
    ///
    /// # Errors
    /// `Corrupt` for reserved bits, an unknown kind, or an impossible segment index.
    pub fn from_word(word: u64) -> Result<Self> {
        let state = match word & KIND_MASK {
            0 => BlockState::Hole,
            1 => BlockState::Zero,
            2 => BlockState::Data {
                segment: segment_of(word)?,
                block: extent_of(word).block(index((word >> BLOCK_SHIFT) & BLOCK_MASK)),
            },
            _ => return Err(Error::corrupt(format!("block entry {word:#018x}: unknown kind"))),
        };
        if state.to_word() == word {
            Ok(state)
        } else {
            Err(Error::corrupt(format!("block entry {word:#018x} has reserved bits set")))
        }
    }
}

/// The sixteen block states of a mixed extent.
pub type Vector = [BlockState; EXTENT_BLOCKS];

/// The shortest entry that says the same as `vector`: uniform, zero or hole where all blocks agree,
/// else mixed with slot 0.
#[must_use]
pub fn summarise(vector: &Vector) -> Entry {
    let candidate = match vector[0] {
        BlockState::Hole => Entry::Hole,
        BlockState::Zero => Entry::Zero,
        BlockState::Data { segment, block } => Entry::Uniform { segment, extent: block.extent() },
    };
    let same = vector.iter().enumerate().all(|(i, b)| candidate.block(i) == Some(*b));
    if same { candidate } else { Entry::Mixed { slot: 0 } }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_word_decodes_to_itself_or_is_refused(word: u64) {
            if let Ok(e) = Entry::from_word(word) {
                prop_assert_eq!(e.to_word(), word);
            }
            if let Ok(b) = BlockState::from_word(word) {
                prop_assert_eq!(b.to_word(), word);
            }
        }

        #[test]
        fn entries_survive_a_round_trip(
            seg in 0u64..16_000, ext in 0u64..(1 << 40), i in 0usize..16
        ) {
            let segment = SegmentIdx::new(seg).unwrap();
            let e = Entry::Uniform { segment, extent: ExtentId(ext) };
            let b = BlockState::Data { segment, block: ExtentId(ext).block(i) };

            prop_assert_eq!(Entry::from_word(e.to_word()).unwrap(), e);
            prop_assert_eq!(BlockState::from_word(b.to_word()).unwrap(), b);
            prop_assert_eq!(e.block(i), Some(b));
        }
    }

    #[test]
    fn sixteen_natural_blocks_of_one_extent_are_uniform() {
        let segment = SegmentIdx::new(3).unwrap();
        let e = Entry::Uniform { segment, extent: ExtentId(9) };
        let mut v: Vector = std::array::from_fn(|i| e.block(i).unwrap());
        assert_eq!(summarise(&v), e);

        v[4] = BlockState::Zero;

        assert_eq!(summarise(&v), Entry::Mixed { slot: 0 });
        assert_eq!(summarise(&[BlockState::Zero; 16]), Entry::Zero);
        assert_eq!(summarise(&[BlockState::Hole; 16]), Entry::Hole);
    }
}
