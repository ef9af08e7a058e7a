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

    /// True for the word of a mixed extent.
    #[must_use]
    pub fn word_is_mixed(word: u64) -> bool {
        word & KIND_MASK == 3
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

/// The extent of `segment` that the word of an entry or of a block names, if it names one.
#[must_use]
pub fn extent_in(word: u64, segment: SegmentIdx) -> Option<ExtentId> {
    let mask = KIND_MASK | (SEGMENT_MASK << SEGMENT_SHIFT);
    (word & mask == 2 | place(segment, ExtentId(0))).then(|| extent_of(word))
}

/// The words of the sixteen block states of an extent: what can be told from words is told without
/// decoding them, for callers that change a block at a time.
///
/// Invariant: every word is that of a [`BlockState`], so none of them needs a second check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorWords([u64; EXTENT_BLOCKS]);

impl VectorWords {
    /// The blocks of an extent that is not mixed, from the word of its entry.
    #[must_use]
    pub fn of_entry(word: u64) -> Self {
        debug_assert!(!Entry::word_is_mixed(word));
        let step = block_step(word);
        VectorWords(std::array::from_fn(|b| word + b as u64 * step))
    }

    /// The words as they are; each must be that of a [`BlockState`].
    #[must_use]
    pub fn of_words(words: [u64; EXTENT_BLOCKS]) -> Self {
        debug_assert!(words.iter().all(|word| BlockState::from_word(*word).is_ok()));
        VectorWords(words)
    }

    /// The words.
    #[must_use]
    pub fn as_words(&self) -> &[u64; EXTENT_BLOCKS] {
        &self.0
    }

    /// Sets the state of block `b`.
    pub fn set(&mut self, b: usize, state: BlockState) {
        self.0[b] = state.to_word();
    }

    /// The word of the entry that [`summarise`] gives for these states.
    #[must_use]
    pub fn summary(&self) -> u64 {
        let first = self.0[0];
        let step = block_step(first);
        let same = (0..).zip(&self.0).all(|(b, word)| *word == first.wrapping_add(b * step));
        // A block that says it is not the first of its extent belongs to no uniform one.
        if same && (first >> BLOCK_SHIFT) & BLOCK_MASK == 0 {
            first
        } else {
            Entry::Mixed { slot: 0 }.to_word()
        }
    }

    /// The extent of `segment` that the first block with data there lies in, if any.
    #[must_use]
    pub fn extent_in(&self, segment: SegmentIdx) -> Option<ExtentId> {
        self.0.iter().find_map(|word| extent_in(*word, segment))
    }
}

impl From<&Vector> for VectorWords {
    fn from(vector: &Vector) -> Self {
        VectorWords(vector.map(BlockState::to_word))
    }
}

/// What the words of an extent that is not mixed grow by from block to block.
fn block_step(word: u64) -> u64 {
    if word & KIND_MASK == 2 { 1 << BLOCK_SHIFT } else { 0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// States that often agree with their neighbours', and then with one of them changed.
    fn vectors() -> impl Strategy<Value = Vector> {
        let data = |block: u64| BlockState::Data {
            segment: SegmentIdx::new(block % 3).unwrap(),
            block: ExtentId(block / 3).block(0),
        };
        let state =
            prop_oneof![Just(BlockState::Hole), Just(BlockState::Zero), (0u64..9).prop_map(data),];
        let at = |state: BlockState, b: usize| match state {
            BlockState::Data { segment, block } => {
                BlockState::Data { segment, block: block.extent().block(b) }
            }
            state => state,
        };
        (state.clone(), state, any::<u16>(), 0usize..16).prop_map(move |(a, b, mask, shift)| {
            std::array::from_fn(|i| {
                let state = if mask & (1 << i) == 0 { a } else { b };
                at(state, if mask == 0 { (i + shift) % 16 } else { i })
            })
        })
    }

    proptest! {
        #[test]
        fn words_tell_what_states_tell(vector in vectors(), segment in 0u64..4) {
            let words = VectorWords::from(&vector);
            let segment = SegmentIdx::new(segment).unwrap();
            let lies_in = |state: &BlockState| match state {
                BlockState::Data { segment: s, block } if *s == segment => Some(block.extent()),
                _ => None,
            };

            prop_assert_eq!(words.summary(), summarise(&vector).to_word());
            prop_assert_eq!(words.extent_in(segment), vector.iter().find_map(lies_in));
            if !Entry::word_is_mixed(words.summary()) {
                prop_assert_eq!(VectorWords::of_entry(words.summary()), words);
            }
        }

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
