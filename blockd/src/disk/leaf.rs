//! A leaf in memory: 512 atomic entries, and a vector for each extent that is mixed.
//!
//! Invariants: those of the map (`map.rs`); this is where entries and vectors are ordered.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use format::entry::{BlockState, Entry, Vector, summarise};
use format::limits::{EXTENT_BLOCKS, LEAF_ENTRIES};
use format::node::Leaf as StoredLeaf;
use format::units::{ExtentId, GuestBlock, SegmentIdx};
use format::{Error, Result};

type VectorWords = [AtomicU64; EXTENT_BLOCKS];

#[derive(Debug)]
pub(super) struct Leaf {
    pub(super) entries: [AtomicU64; LEAF_ENTRIES],
    vectors: OnceLock<Box<[OnceLock<Box<VectorWords>>; LEAF_ENTRIES]>>,
    /// The vector run could not be read: mixed extents without a vector are damaged.
    pub(super) vectors_damaged: bool,
}

pub(super) fn damaged(block: GuestBlock) -> Error {
    Error::corrupt("the map page of this range is damaged")
        .on(format!("byte offset {}", block.offset()))
        .hint("the rest of the disk is usable; run `offshoot disk check`")
}

impl Leaf {
    pub(super) fn filled(entry: Entry) -> Self {
        Leaf {
            entries: std::array::from_fn(|_| AtomicU64::new(entry.to_word())),
            vectors: OnceLock::new(),
            vectors_damaged: false,
        }
    }

    pub(super) fn from_stored(stored: &StoredLeaf, vectors_damaged: bool) -> Self {
        let mut leaf = Leaf::filled(Entry::Hole);
        leaf.vectors_damaged = vectors_damaged;
        for (i, entry) in stored.entries.iter().enumerate() {
            let word = match entry {
                Entry::Mixed { slot } => {
                    if let Some(vector) = stored.vectors.get(usize::from(*slot)) {
                        leaf.fill_vector(i, vector);
                    }
                    Entry::Mixed { slot: 0 }.to_word()
                }
                entry => entry.to_word(),
            };
            *leaf.entries[i].get_mut() = word;
        }
        leaf
    }

    // Acquire pairs with the Release store in `store`: whoever sees `Mixed` sees the vector's words.
    pub(super) fn entry(&self, i: usize) -> Entry {
        let word = self.entries[i].load(Ordering::Acquire);
        Entry::from_word(word).expect("words in memory were checked when they came in")
    }

    fn vector_slot(&self, i: usize) -> Option<&VectorWords> {
        self.vectors.get()?[i].get().map(|v| &**v)
    }

    fn block(&self, i: usize, b: usize) -> Option<BlockState> {
        match self.entry(i).block(b) {
            Some(state) => Some(state),
            None => {
                // Acquire pairs with the Release store in `fill_vector`, so that whoever reads data
                // through this word does so after it was published.
                let word = self.vector_slot(i)?[b].load(Ordering::Acquire);
                Some(BlockState::from_word(word).expect("words in memory were checked"))
            }
        }
    }

    pub(super) fn vector(&self, i: usize) -> Option<Vector> {
        let mut vector = [BlockState::Hole; EXTENT_BLOCKS];
        for (b, state) in vector.iter_mut().enumerate() {
            *state = self.block(i, b)?;
        }
        Some(vector)
    }

    pub(super) fn own_extent(&self, i: usize, own: SegmentIdx) -> Option<ExtentId> {
        match self.entry(i) {
            Entry::Uniform { segment, extent } => (segment == own).then_some(extent),
            Entry::Mixed { .. } => (0..EXTENT_BLOCKS).find_map(|b| match self.block(i, b)? {
                BlockState::Data { segment, block } if segment == own => Some(block.extent()),
                _ => None,
            }),
            Entry::Hole | Entry::Zero => None,
        }
    }

    fn fill_vector(&self, i: usize, vector: &Vector) {
        let all = self.vectors.get_or_init(|| Box::new(std::array::from_fn(|_| OnceLock::new())));
        let words = all[i].get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))));
        for (word, state) in words.iter().zip(vector) {
            // Release pairs with the Acquire load in `block`.
            word.store(state.to_word(), Ordering::Release);
        }
    }

    pub(super) fn store(&self, i: usize, vector: &Vector) {
        let entry = summarise(vector);
        if matches!(entry, Entry::Mixed { .. }) {
            self.fill_vector(i, vector);
        }
        // Release pairs with the Acquire load in `entry`; it comes after the vector was filled.
        self.entries[i].store(entry.to_word(), Ordering::Release);
    }
}

/// The extent of segment `own` that one of the blocks lies in, if any.
pub(super) fn own_extent(vector: &Vector, own: SegmentIdx) -> Option<ExtentId> {
    vector.iter().find_map(|state| match state {
        BlockState::Data { segment, block } if *segment == own => Some(block.extent()),
        _ => None,
    })
}

impl Leaf {
    pub(super) fn vector_bytes(&self) -> usize {
        self.vectors.get().map_or(0, |all| {
            let made = all.iter().filter(|v| v.get().is_some()).count();
            size_of_val(&**all) + made * size_of::<VectorWords>()
        })
    }
}

pub(super) fn resolve_leaf(
    leaf: &Leaf,
    first: GuestBlock,
    end: GuestBlock,
    add: &mut dyn FnMut(GuestBlock, u64, BlockState) -> Result<()>,
) -> Result<()> {
    let mut at = first;
    while at < end {
        let i = at.extent().in_leaf();
        let extent_end = at.extent().next().first_block().min(end);
        match leaf.entry(i).block(at.in_extent()) {
            Some(state) => add(at, extent_end.0 - at.0, state)?,
            None => {
                for b in (at.0..extent_end.0).map(GuestBlock) {
                    let state = leaf.block(i, b.in_extent()).ok_or_else(|| damaged(b))?;
                    add(b, 1, state)?;
                }
            }
        }
        at = extent_end;
    }
    Ok(())
}
