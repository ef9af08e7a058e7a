//! A leaf in memory: 512 atomic entries, and a vector for each extent that is mixed.
//!
//! Invariants: those of the map (`map.rs`); this is where entries and vectors are ordered.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use format::entry::{BlockState, Entry, Vector, summarise};
use format::limits::{EXTENT_BLOCKS, LEAF_ENTRIES, VECTOR_PAGES_MAX, VECTORS_PER_PAGE};
use format::node::Leaf as StoredLeaf;
use format::units::{ExtentId, GuestBlock, SegmentIdx};
use format::{Error, Result};

type VectorWords = [AtomicU64; EXTENT_BLOCKS];
type VectorPage = [VectorWords; VECTORS_PER_PAGE];

/// The vectors of a leaf, made a page at a time. A vector belongs to its extent for good.
#[derive(Debug)]
struct Vectors {
    /// For each extent the number of its vector, plus one; zero while it has none.
    numbers: [AtomicU16; LEAF_ENTRIES],
    taken: AtomicU16,
    pages: [OnceLock<Box<VectorPage>>; VECTOR_PAGES_MAX],
}

#[derive(Debug)]
pub(super) struct Leaf {
    entries: [AtomicU64; LEAF_ENTRIES],
    vectors: OnceLock<Box<Vectors>>,
    /// The vector run could not be read: mixed extents without a vector are damaged.
    pub(super) vectors_damaged: bool,
}

pub(super) fn damaged(block: GuestBlock) -> Error {
    Error::corrupt("the map page of this range is damaged")
        .on(format!("byte offset {}", block.offset()))
        .hint("the rest of the disk is usable; run `offshoot disk check`")
}

fn state(word: &AtomicU64) -> BlockState {
    // Acquire pairs with the Release store in `fill_vector`, so that whoever reads data through
    // this word does so after it was published.
    BlockState::from_word(word.load(Ordering::Acquire)).expect("words in memory were checked")
}

impl Vectors {
    fn new() -> Box<Self> {
        Box::new(Vectors {
            numbers: std::array::from_fn(|_| AtomicU16::new(0)),
            taken: AtomicU16::new(0),
            pages: std::array::from_fn(|_| OnceLock::new()),
        })
    }

    fn get(&self, i: usize) -> Option<&VectorWords> {
        // Acquire pairs with the Release store in `get_or_take`: the page is there.
        let number = self.numbers[i].load(Ordering::Acquire).checked_sub(1).map(usize::from)?;
        Some(&self.pages[number / VECTORS_PER_PAGE].get()?[number % VECTORS_PER_PAGE])
    }

    /// Caller holds the core lock: nobody else takes vectors.
    fn get_or_take(&self, i: usize) -> &VectorWords {
        if let Some(words) = self.get(i) {
            return words;
        }
        let number = self.taken.fetch_add(1, Ordering::Relaxed);
        let at = usize::from(number);
        let page = self.pages[at / VECTORS_PER_PAGE].get_or_init(|| {
            Box::new(std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))))
        });
        // Release pairs with the Acquire load in `get`.
        self.numbers[i].store(number + 1, Ordering::Release);
        &page[at % VECTORS_PER_PAGE]
    }
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

    // Acquire pairs with the Release store in `store`: whoever sees `Mixed` sees the vector's
    // words.
    pub(super) fn entry(&self, i: usize) -> Entry {
        let word = self.entries[i].load(Ordering::Acquire);
        Entry::from_word(word).expect("words in memory were checked when they came in")
    }

    fn vector_slot(&self, i: usize) -> Option<&VectorWords> {
        self.vectors.get()?.get(i)
    }

    fn block(&self, i: usize, b: usize) -> Option<BlockState> {
        match self.entry(i).block(b) {
            Some(state) => Some(state),
            None => Some(state(&self.vector_slot(i)?[b])),
        }
    }

    pub(super) fn vector(&self, i: usize) -> Option<Vector> {
        match self.entry(i) {
            Entry::Mixed { .. } => {
                let words = self.vector_slot(i)?;
                Some(std::array::from_fn(|b| state(&words[b])))
            }
            entry => Some(std::array::from_fn(|b| entry.block(b).expect("the entry is not mixed"))),
        }
    }

    pub(super) fn own_extent(&self, i: usize, own: SegmentIdx) -> Option<ExtentId> {
        match self.entry(i) {
            Entry::Uniform { segment, extent } => (segment == own).then_some(extent),
            Entry::Mixed { .. } => self.vector_slot(i)?.iter().find_map(|word| match state(word) {
                BlockState::Data { segment, block } if segment == own => Some(block.extent()),
                _ => None,
            }),
            Entry::Hole | Entry::Zero => None,
        }
    }

    fn fill_vector(&self, i: usize, vector: &Vector) {
        let words = self.vectors.get_or_init(Vectors::new).get_or_take(i);
        for (word, state) in words.iter().zip(vector) {
            // Release pairs with the Acquire load in `state`.
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

    /// Bytes of memory that the vectors take.
    pub(super) fn vector_bytes(&self) -> usize {
        self.vectors.get().map_or(0, |all| {
            let pages = all.pages.iter().filter(|p| p.get().is_some()).count();
            size_of::<Vectors>() + pages * size_of::<VectorPage>()
        })
    }
}

/// The extent of segment `own` that one of the blocks lies in, if any.
pub(super) fn own_extent(vector: &Vector, own: SegmentIdx) -> Option<ExtentId> {
    vector.iter().find_map(|state| match state {
        BlockState::Data { segment, block } if *segment == own => Some(block.extent()),
        _ => None,
    })
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
