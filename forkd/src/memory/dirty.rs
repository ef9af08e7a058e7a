//! One bit per page that somebody wrote.
//!
//! KVM's log sees what processors write; what devices write through host addresses it does not.
//! [`DirtyPages`] is the devices' half.
//!
//! Invariant: a bit is set after the write it stands for, and always by a read-modify-write. Who
//! takes the bits and then copies the page gets either the new content or the bit.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{PAGE, index, wide};

/// A bitmap of pages that many threads may mark at once.
#[derive(Debug)]
pub struct DirtyPages(Vec<AtomicU64>);

impl DirtyPages {
    /// A clean bitmap for `bytes` of memory.
    #[must_use]
    pub fn new(bytes: u64) -> DirtyPages {
        let words = index(bytes.div_ceil(PAGE).div_ceil(64));
        DirtyPages((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// Marks every page of `len` bytes at `offset`. Pages past the end are left out.
    pub fn mark(&self, offset: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|l| offset.checked_add(l)) else { return };
        for page in offset / PAGE..=last / PAGE {
            let Some(word) = self.0.get(index(page / 64)) else { return };
            // Release pairs with the Acquire in `take_into`: who sees the bit sees the write.
            word.fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// Adds the marked pages to `into` and clears them here.
    pub fn take_into(&self, into: &mut PageSet) {
        for (word, sum) in self.0.iter().zip(&mut into.0) {
            // Acquire pairs with the Release in `mark`. The look before spares the exchange for
            // clean words; a bit that is set between the two is taken by the next call, and the
            // last call of a cut happens when no device runs.
            if word.load(Ordering::Relaxed) != 0 {
                *sum |= word.swap(0, Ordering::Acquire);
            }
        }
    }
}

/// A set of pages, by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet(Vec<u64>);

impl PageSet {
    /// The empty set for `bytes` of memory.
    #[must_use]
    pub fn new(bytes: u64) -> PageSet {
        PageSet(vec![0; index(bytes.div_ceil(PAGE).div_ceil(64))])
    }

    /// Adds `page`, which must be inside.
    pub fn insert(&mut self, page: u64) {
        self.0[index(page / 64)] |= 1 << (page % 64);
    }

    /// Adds the pages of a bitmap whose bit 0 stands for page `first`, a multiple of 64.
    pub fn insert_words(&mut self, first: u64, words: &[u64]) {
        debug_assert!(first.is_multiple_of(64));
        for (sum, word) in self.0.iter_mut().skip(index(first / 64)).zip(words) {
            *sum |= word;
        }
    }

    /// Adds all pages of `other`.
    pub fn insert_all(&mut self, other: &PageSet) {
        self.insert_words(0, &other.0);
    }

    /// Whether `page` is in the set.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        self.0.get(index(page / 64)).is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is no page in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.0.fill(0);
    }

    /// The runs of neighbouring pages, in order: first page and number of pages.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true)?;
            let end = self.next(start, false).unwrap_or(wide(self.0.len()) * 64);
            at = end;
            Some((start, end - start))
        })
    }

    /// The first page from `at` that is in the set (`want`) or is not.
    fn next(&self, at: u64, want: bool) -> Option<u64> {
        let mut word_at = index(at / 64);
        let mut mask = u64::MAX << (at % 64);
        loop {
            let word = *self.0.get(word_at)?;
            let hits = mask & if want { word } else { !word };
            if hits != 0 {
                return Some(wide(word_at) * 64 + u64::from(hits.trailing_zeros()));
            }
            (word_at, mask) = (word_at + 1, u64::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_every_page_that_a_range_touches_and_no_other() {
        let dirty = DirtyPages::new(100 * PAGE);
        dirty.mark(4095, 2);
        dirty.mark(63 * PAGE, 2 * PAGE);
        dirty.mark(90 * PAGE, 0);
        dirty.mark(u64::MAX, 1);
        dirty.mark(u64::MAX - 1, 9);
        let mut set = PageSet::new(100 * PAGE);
        dirty.take_into(&mut set);
        assert_eq!(set.runs().collect::<Vec<_>>(), [(0, 2), (63, 2)]);
        assert_eq!(set.len(), 4);
        let mut again = PageSet::new(100 * PAGE);
        dirty.take_into(&mut again);
        assert!(again.is_empty());
    }

    #[test]
    fn runs_agree_with_membership() {
        let mut set = PageSet::new(256 * PAGE);
        for page in [0, 1, 5, 62, 63, 64, 127, 128, 200, 255] {
            set.insert(page);
        }
        let listed: Vec<u64> = set.runs().flat_map(|(at, len)| at..at + len).collect();
        let held: Vec<u64> = (0..256).filter(|page| set.contains(*page)).collect();
        assert_eq!(listed, held);
        assert_eq!(set.runs().count(), 6);
    }
}
