//! A leaf in memory: 512 atomic entries, and a vector for each extent that is mixed.
//!
//! Invariants: those of the map (`map.rs`); this is where entries and vectors are ordered.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use format::entry::{BlockState, Entry, Vector, VectorWords, extent_in};
use format::limits::{EXTENT_BLOCKS, LEAF_ENTRIES, VECTOR_PAGES_MAX, VECTORS_PER_PAGE};
use format::node::Leaf as StoredLeaf;
use format::units::{ExtentId, GuestBlock, SegmentIdx};
use format::{Error, Result};

type StoredWords = [AtomicU64; EXTENT_BLOCKS];
type VectorPage = [StoredWords; VECTORS_PER_PAGE];

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
    // Acquire pairs with the Release stores in `fill_vector` and `change`, so that whoever reads
    // data through this word does so after it was published.
    BlockState::from_word(word.load(Ordering::Acquire)).expect("words in memory were checked")
}

// Acquire: as in `state` and `Leaf::entry`.
fn copy_words<const N: usize>(words: &[AtomicU64; N]) -> [AtomicU64; N] {
    std::array::from_fn(|i| AtomicU64::new(words[i].load(Ordering::Acquire)))
}

impl Vectors {
    fn new() -> Box<Self> {
        Box::new(Vectors {
            numbers: std::array::from_fn(|_| AtomicU16::new(0)),
            taken: AtomicU16::new(0),
            pages: std::array::from_fn(|_| OnceLock::new()),
        })
    }

    /// A copy; nobody changes the vectors meanwhile.
    fn copy(&self) -> Box<Self> {
        let pages = std::array::from_fn(|i| match self.pages[i].get() {
            None => OnceLock::new(),
            Some(page) => OnceLock::from(Box::new(std::array::from_fn(|v| copy_words(&page[v])))),
        });
        // Relaxed: whoever copies a leaf has it from a slot, which came after its last change.
        let load = |number: &AtomicU16| AtomicU16::new(number.load(Ordering::Relaxed));
        Box::new(Vectors {
            numbers: std::array::from_fn(|i| load(&self.numbers[i])),
            taken: load(&self.taken),
            pages,
        })
    }

    fn get(&self, i: usize) -> Option<&StoredWords> {
        // Acquire pairs with the Release store in `get_or_take`: the page is there.
        let number = self.numbers[i].load(Ordering::Acquire).checked_sub(1).map(usize::from)?;
        Some(&self.pages[number / VECTORS_PER_PAGE].get()?[number % VECTORS_PER_PAGE])
    }

    /// Caller holds the core lock: nobody else takes vectors.
    fn get_or_take(&self, i: usize) -> &StoredWords {
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
                        leaf.fill_vector(i, &VectorWords::from(vector));
                    }
                    Entry::Mixed { slot: 0 }.to_word()
                }
                entry => entry.to_word(),
            };
            *leaf.entries[i].get_mut() = word;
        }
        leaf
    }

    /// A copy; nobody changes the leaf meanwhile.
    pub(super) fn copy(&self) -> Self {
        let vectors = OnceLock::new();
        if let Some(all) = self.vectors.get() {
            vectors.get_or_init(|| all.copy());
        }
        Leaf { entries: copy_words(&self.entries), vectors, vectors_damaged: self.vectors_damaged }
    }

    // Acquire pairs with the Release store in `change`: whoever sees `Mixed` sees the vector's
    // words.
    pub(super) fn entry(&self, i: usize) -> Entry {
        let word = self.entries[i].load(Ordering::Acquire);
        Entry::from_word(word).expect("words in memory were checked when they came in")
    }

    fn vector_slot(&self, i: usize) -> Option<&StoredWords> {
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

    /// The words of the blocks of extent `i`, and its vector if it is mixed; `None` when that is
    /// gone.
    fn words(&self, i: usize) -> Option<(VectorWords, Option<&StoredWords>)> {
        // Acquire: as in `entry`.
        let word = self.entries[i].load(Ordering::Acquire);
        if !Entry::word_is_mixed(word) {
            return Some((VectorWords::of_entry(word), None));
        }
        let stored = self.vector_slot(i)?;
        // Acquire: as in `state`.
        let words = std::array::from_fn(|b| stored[b].load(Ordering::Acquire));
        Some((VectorWords::of_words(words), Some(stored)))
    }

    /// The extent of segment `own` that blocks of extent `i` lie in, if any; `None` when its vector
    /// is gone.
    pub(super) fn own_extent(&self, i: usize, own: SegmentIdx) -> Option<Option<ExtentId>> {
        // Acquire: as in `entry` and in `state`.
        let word = self.entries[i].load(Ordering::Acquire);
        if !Entry::word_is_mixed(word) {
            return Some(extent_in(word, own));
        }
        let mut words = self.vector_slot(i)?.iter().map(|word| word.load(Ordering::Acquire));
        Some(words.find_map(|word| extent_in(word, own)))
    }

    fn fill_vector(&self, i: usize, words: &VectorWords) {
        let stored = self.vectors.get_or_init(Vectors::new).get_or_take(i);
        for (slot, word) in stored.iter().zip(words.as_words()) {
            // Release pairs with the Acquire loads in `state` and `words`.
            slot.store(*word, Ordering::Release);
        }
    }

    /// Sets `blocks` of extent `i`. Gives back the extents of segment `own` that its blocks lay in
    /// before and lie in now; `None`, and nothing is changed, when its vector is gone. Caller holds
    /// the core lock.
    pub(super) fn change(
        &self,
        i: usize,
        blocks: Range<usize>,
        own: SegmentIdx,
        state: &mut dyn FnMut(usize) -> BlockState,
    ) -> Option<(Option<ExtentId>, Option<ExtentId>)> {
        let (old, stored) = self.words(i)?;
        let mut new = old;
        blocks.for_each(|b| new.set(b, state(b)));
        let summary = new.summary();
        match stored {
            Some(stored) if Entry::word_is_mixed(summary) => {
                for (b, word) in new.as_words().iter().enumerate() {
                    if *word != old.as_words()[b] {
                        // Release pairs with the Acquire loads in `state` and `words`.
                        stored[b].store(*word, Ordering::Release);
                    }
                }
            }
            None if Entry::word_is_mixed(summary) => self.fill_vector(i, &new),
            _ => {}
        }
        // Release pairs with the Acquire loads in `entry` and `words`; it comes after the vector
        // was filled.
        self.entries[i].store(summary, Ordering::Release);
        Some((old.extent_in(own), new.extent_in(own)))
    }

    /// Bytes of memory that the vectors take.
    pub(super) fn vector_bytes(&self) -> usize {
        self.vectors.get().map_or(0, |all| {
            let pages = all.pages.iter().filter(|p| p.get().is_some()).count();
            size_of::<Vectors>() + pages * size_of::<VectorPage>()
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
