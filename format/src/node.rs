//! Map pages: leaves with their vector runs, inner pages, and the pointers between them.
//!
//! Layouts: `docs/format.md` §6. Invariants:
//! - A pointer holds the checksum of what it points at, so a torn, lost or misdirected page write
//!   is seen by the reader of the parent.
//! - A leaf is one page; its vectors are one run of pages inside one extent of the same segment,
//!   under a checksum of their own, so that a damaged vector run costs only the mixed extents.
//! - Every mixed entry of a leaf names its own slot, below the number of slots the run has.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::entry::{BlockState, Entry, Vector};
use crate::limits::{
    BLOCKS_PER_EXTENT, EXTENT_BLOCKS, INNER_FANOUT, LEAF_ENTRIES, PAGE, SEGMENT_EXTENTS_MAX,
    VECTOR_BYTES, VECTOR_PAGES_MAX, VECTORS_PER_PAGE,
};
use crate::units::{Generation, PageNo, SegmentIdx, crc, index};
use crate::{Error, Result};

const PAGE_MASK: u64 = SEGMENT_EXTENTS_MAX * BLOCKS_PER_EXTENT - 1;
const SEGMENT_SHIFT: u32 = 2;
const PAGE_SHIFT: u32 = 16;

/// Where a map page is, and what its content sums to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRef {
    /// Row of the segment table.
    pub segment: SegmentIdx,
    /// Page in that segment.
    pub page: PageNo,
    /// CRC32C of the page.
    pub crc: u32,
    /// Superblock generation that first pointed here.
    pub generation: Generation,
    /// The vector run of a leaf; `None` for inner pages and leaves without mixed extents.
    pub vectors: Option<VectorRef>,
}

/// Where the vector run of a leaf is (in the leaf's segment).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorRef {
    /// First page of the run.
    pub page: PageNo,
    /// Pages in the run, 1–16.
    pub count: u8,
    /// CRC32C of the whole run.
    pub crc: u32,
}

/// A pointer of an inner page or of the superblock: a subtree, or a word about all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NodePtr {
    /// Nothing below was ever written.
    #[default]
    Hole,
    /// Everything below is explicitly zero.
    Zero,
    /// A page.
    Page(PageRef),
}

/// A [`NodePtr`] on disk: 32 bytes.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawNodePtr {
    place: U64,
    vectors: U64,
    crc: U32,
    vectors_crc: U32,
    generation: U64,
}

impl NodePtr {
    /// The pointer as it is stored.
    #[must_use]
    pub fn encode(self) -> RawNodePtr {
        let (place, at) = match self {
            NodePtr::Hole => (0, None),
            NodePtr::Zero => (1, None),
            NodePtr::Page(r) => {
                let segment = u64::from(r.segment.get()) << SEGMENT_SHIFT;
                (2 | segment | (r.page.0 << PAGE_SHIFT), Some(r))
            }
        };
        let vectors = at.and_then(|r| r.vectors);
        RawNodePtr {
            place: place.into(),
            vectors: vectors.map_or(0, |v| u64::from(v.count) | (v.page.0 << PAGE_SHIFT)).into(),
            crc: at.map_or(0, |r| r.crc).into(),
            vectors_crc: vectors.map_or(0, |v| v.crc).into(),
            generation: at.map_or(0, |r| r.generation.0).into(),
        }
    }

    /// The one decode point of pointers.
    ///
    /// # Errors
    /// `Corrupt` for an unknown kind, reserved bits, or a vector run that leaves its extent.
    pub fn decode(raw: &RawNodePtr) -> Result<Self> {
        let place = raw.place.get();
        let ptr = match place & 3 {
            0 => NodePtr::Hole,
            1 => NodePtr::Zero,
            2 => NodePtr::Page(PageRef {
                segment: SegmentIdx::new((place >> SEGMENT_SHIFT) & ((1 << 14) - 1))?,
                page: PageNo((place >> PAGE_SHIFT) & PAGE_MASK),
                crc: raw.crc.get(),
                generation: Generation(raw.generation.get()),
                vectors: VectorRef::decode(raw.vectors.get(), raw.vectors_crc.get())?,
            }),
            _ => return Err(Error::corrupt("a map pointer has an unknown kind")),
        };
        if ptr.encode() == *raw {
            Ok(ptr)
        } else {
            Err(Error::corrupt("a map pointer has reserved bits set"))
        }
    }
}

impl VectorRef {
    fn decode(word: u64, crc: u32) -> Result<Option<Self>> {
        if word == 0 {
            return Ok(None);
        }
        let page = PageNo((word >> PAGE_SHIFT) & PAGE_MASK);
        let count = u8::try_from(word & 0xffff).unwrap_or(u8::MAX);
        let fits = page.in_extent() + usize::from(count) <= index(BLOCKS_PER_EXTENT);
        if count == 0 || usize::from(count) > VECTOR_PAGES_MAX || !fits {
            return Err(Error::corrupt("a vector run leaves its extent"));
        }
        Ok(Some(VectorRef { page, count, crc }))
    }
}

/// The pointers of an inner page.
pub type Inner = [NodePtr; INNER_FANOUT];

/// An inner page as bytes.
#[must_use]
pub fn encode_inner(inner: &Inner) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (bytes, ptr) in page.chunks_exact_mut(size_of::<RawNodePtr>()).zip(inner) {
        bytes.copy_from_slice(ptr.encode().as_bytes());
    }
    page
}

/// The one decode point of inner pages.
///
/// # Errors
/// `Corrupt` when the checksum or a pointer is wrong.
pub fn decode_inner(page: &[u8; PAGE], want_crc: u32) -> Result<Box<Inner>> {
    if crc(page) != want_crc {
        return Err(Error::corrupt("checksum mismatch in a map page"));
    }
    let mut inner = Box::new([NodePtr::Hole; INNER_FANOUT]);
    for (ptr, bytes) in inner.iter_mut().zip(page.chunks_exact(size_of::<RawNodePtr>())) {
        let raw = RawNodePtr::ref_from_bytes(bytes).expect("chunk has the pointer's size");
        *ptr = NodePtr::decode(raw)?;
    }
    Ok(inner)
}

/// A leaf with its vectors, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// One entry for each extent; `Mixed` slots index `vectors`.
    pub entries: Box<[Entry; LEAF_ENTRIES]>,
    /// Block states of the mixed extents.
    pub vectors: Vec<Vector>,
}

/// A leaf as bytes, ready to be written.
#[derive(Debug, Clone)]
pub struct LeafBytes {
    /// The leaf page.
    pub page: Box<[u8; PAGE]>,
    /// The vector run: a multiple of a page, empty when no extent is mixed.
    pub vectors: Vec<u8>,
}

impl Leaf {
    /// A leaf in which every extent has `entry` (hole or zero).
    #[must_use]
    pub fn filled(entry: Entry) -> Self {
        Leaf { entries: Box::new([entry; LEAF_ENTRIES]), vectors: Vec::new() }
    }

    /// State of block `block` of extent `extent`, both inside this leaf.
    #[must_use]
    pub fn block(&self, extent: usize, block: usize) -> BlockState {
        match self.entries[extent] {
            Entry::Mixed { slot } => self.vectors[usize::from(slot)][block],
            entry => entry.block(block).expect("only mixed entries have no block state"),
        }
    }

    /// The one decode point of leaves. `vectors` is the run named by the pointer, empty if none.
    ///
    /// # Errors
    /// `Corrupt` when a checksum, an entry, a slot or a vector is wrong.
    pub fn decode(at: &PageRef, page: &[u8; PAGE], vectors: &[u8]) -> Result<Self> {
        let mut leaf = Self::decode_entries(at, page)?;
        leaf.vectors = decode_vectors(at, vectors)?;
        let mut seen = vec![false; leaf.vectors.len()];
        for entry in leaf.entries.iter() {
            if let Entry::Mixed { slot } = entry {
                match seen.get_mut(usize::from(*slot)) {
                    Some(s) if !*s => *s = true,
                    _ => return Err(Error::corrupt("a vector slot is missing or used twice")),
                }
            }
        }
        Ok(leaf)
    }

    /// Decodes the leaf page alone; mixed entries then have no vectors behind them. For repair,
    /// when the vector run is damaged.
    ///
    /// # Errors
    /// `Corrupt` when the page's checksum or an entry is wrong.
    pub fn decode_entries(at: &PageRef, page: &[u8; PAGE]) -> Result<Self> {
        if crc(page) != at.crc {
            return Err(Error::corrupt("checksum mismatch in a map leaf"));
        }
        let mut leaf = Leaf::filled(Entry::Hole);
        for (entry, bytes) in leaf.entries.iter_mut().zip(page.chunks_exact(8)) {
            let word = U64::read_from_bytes(bytes).expect("chunk has eight bytes");
            *entry = Entry::from_word(word.get())?;
        }
        Ok(leaf)
    }
}

fn decode_vectors(at: &PageRef, bytes: &[u8]) -> Result<Vec<Vector>> {
    let Some(run) = at.vectors else {
        return Ok(Vec::new());
    };
    if bytes.len() != usize::from(run.count) * PAGE || crc(bytes) != run.crc {
        return Err(Error::corrupt("checksum mismatch in the block vectors of a map leaf"));
    }
    let mut vectors = Vec::with_capacity(usize::from(run.count) * VECTORS_PER_PAGE);
    for chunk in bytes.chunks_exact(VECTOR_BYTES) {
        let mut vector = [BlockState::Hole; EXTENT_BLOCKS];
        for (i, (state, bytes)) in vector.iter_mut().zip(chunk.chunks_exact(8)).enumerate() {
            let word = U64::read_from_bytes(bytes).expect("chunk has eight bytes");
            *state = BlockState::from_word(word.get())?;
            if let BlockState::Data { block, .. } = state
                && block.in_extent() != i
            {
                return Err(Error::corrupt("a block is mapped away from its natural place"));
            }
        }
        vectors.push(vector);
    }
    Ok(vectors)
}

/// Encodes a leaf from its words: `entry(i)` is the entry of extent `i` (any slot in a mixed one),
/// `vector(i)` its block states, asked for mixed extents only.
#[must_use]
pub fn encode_leaf(
    mut entry: impl FnMut(usize) -> Entry,
    mut vector: impl FnMut(usize) -> Vector,
) -> LeafBytes {
    let mut page = Box::new([0; PAGE]);
    let mut vectors = Vec::new();
    let mut slots: u16 = 0;
    for (i, bytes) in page.chunks_exact_mut(8).enumerate() {
        let mut e = entry(i);
        if let Entry::Mixed { slot } = &mut e {
            *slot = slots;
            slots += 1;
            vectors.extend(vector(i).iter().flat_map(|b| b.to_word().to_le_bytes()));
        }
        bytes.copy_from_slice(&e.to_word().to_le_bytes());
    }
    vectors.resize(vectors.len().next_multiple_of(PAGE), 0);
    LeafBytes { page, vectors }
}

impl LeafBytes {
    /// Pages of the vector run, 0–16.
    #[must_use]
    pub fn vector_pages(&self) -> u8 {
        u8::try_from(self.vectors.len() / PAGE).expect("a leaf has at most 512 vectors")
    }

    /// The pointer to this leaf once it lies at `page` (and its vectors at `vectors`).
    #[must_use]
    pub fn pointer(
        &self,
        segment: SegmentIdx,
        page: PageNo,
        vectors: Option<PageNo>,
        generation: Generation,
    ) -> PageRef {
        let run = vectors.map(|first| VectorRef {
            page: first,
            count: self.vector_pages(),
            crc: crc(&self.vectors),
        });
        PageRef { segment, page, crc: crc(self.page.as_slice()), generation, vectors: run }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::ExtentId;

    fn sample(mixed: usize) -> LeafBytes {
        let segment = SegmentIdx::new(5).unwrap();
        encode_leaf(
            |i| match i {
                _ if i < mixed => Entry::Mixed { slot: 0 },
                _ if i % 3 == 0 => Entry::Zero,
                _ => Entry::Uniform { segment, extent: ExtentId(i as u64 + 300) },
            },
            |i| {
                std::array::from_fn(|b| match b % 3 {
                    0 => BlockState::Zero,
                    1 => BlockState::Hole,
                    _ => BlockState::Data { segment, block: ExtentId(i as u64 + 900).block(b) },
                })
            },
        )
    }

    fn at(bytes: &LeafBytes) -> PageRef {
        let vectors = (!bytes.vectors.is_empty()).then_some(PageNo(160));
        bytes.pointer(SegmentIdx::new(5).unwrap(), PageNo(176), vectors, Generation(9))
    }

    #[test]
    fn leaves_with_no_some_and_all_extents_mixed_survive_a_round_trip() {
        for mixed in [0, 1, 32, 33, 512] {
            let bytes = sample(mixed);

            let leaf = Leaf::decode(&at(&bytes), &bytes.page, &bytes.vectors).unwrap();

            let again = encode_leaf(
                |i| leaf.entries[i],
                |i| match leaf.entries[i] {
                    Entry::Mixed { slot } => leaf.vectors[usize::from(slot)],
                    _ => unreachable!("vectors are asked for mixed extents only"),
                },
            );
            assert_eq!(bytes.page, again.page);
            assert_eq!(bytes.vectors, again.vectors);
            assert_eq!(usize::from(bytes.vector_pages()), mixed.div_ceil(32));
        }
    }

    #[test]
    fn every_flipped_bit_of_a_leaf_is_seen() {
        let bytes = sample(1);
        for bit in (0..PAGE * 8).step_by(97) {
            let mut page = bytes.page.clone();
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(Leaf::decode(&at(&bytes), &page, &bytes.vectors).is_err());
            let mut vectors = bytes.vectors.clone();
            vectors[bit / 8] ^= 1 << (bit % 8);
            assert!(Leaf::decode(&at(&bytes), &bytes.page, &vectors).is_err());
        }
    }

    #[test]
    fn a_block_away_from_its_natural_place_is_corrupt() {
        let segment = SegmentIdx::new(0).unwrap();
        let wrong = BlockState::Data { segment, block: ExtentId(40).block(3) };
        let bytes = encode_leaf(|_| Entry::Mixed { slot: 0 }, |_| [wrong; 16]);

        let err = Leaf::decode(&at(&bytes), &bytes.page, &bytes.vectors).unwrap_err();

        assert!(err.to_string().contains("natural place"), "{err}");
    }

    proptest! {
        #[test]
        fn pointers_decode_to_themselves_or_are_refused(bytes: [u8; 32]) {
            let raw = RawNodePtr::read_from_bytes(&bytes).unwrap();
            if let Ok(p) = NodePtr::decode(&raw) {
                prop_assert_eq!(p.encode(), raw);
            }
        }

        #[test]
        fn inner_pages_survive_a_round_trip(
            seg in 0u64..100, page in 0u64..(1 << 44), crc in any::<u32>()
        ) {
            let r = PageRef {
                segment: SegmentIdx::new(seg).unwrap(),
                page: PageNo(page),
                crc,
                generation: Generation(3),
                vectors: Some(VectorRef { page: PageNo(page & !15), count: 16, crc: 1 }),
            };
            let mut inner = [NodePtr::Hole; INNER_FANOUT];
            inner[7] = NodePtr::Page(r);
            inner[8] = NodePtr::Zero;
            let bytes = encode_inner(&inner);

            let again = decode_inner(&bytes, crate::units::crc(&bytes)).unwrap();

            prop_assert_eq!(*again, inner);
        }
    }
}
