//! A set of leaves that is cheap to add to: one bit each, in memory in proportion to the highest
//! leaf (256 KiB for the largest disk).

use format::limits::LEAVES_MAX;
use format::units::{LeafNo, index};

const WORD_BITS: u64 = 64;

/// A set of leaves.
#[derive(Debug, Clone, Default)]
pub struct LeafSet {
    words: Vec<u64>,
}

impl LeafSet {
    /// Adds a leaf; true when it was not there.
    pub fn insert(&mut self, leaf: LeafNo) -> bool {
        debug_assert!(leaf.0 < LEAVES_MAX);
        let word = index(leaf.0 / WORD_BITS);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let bit = 1 << (leaf.0 % WORD_BITS);
        let is_new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        is_new
    }

    /// The leaves in order.
    pub fn iter(&self) -> impl Iterator<Item = LeafNo> {
        (0..).zip(&self.words).flat_map(|(i, word)| {
            let lowest = |left: &u64| Some(left & (left - 1)).filter(|rest| *rest != 0);
            std::iter::successors(Some(*word).filter(|word| *word != 0), lowest)
                .map(move |left| LeafNo(i * WORD_BITS + u64::from(left.trailing_zeros())))
        })
    }
}

impl Extend<LeafNo> for LeafSet {
    fn extend<T: IntoIterator<Item = LeafNo>>(&mut self, leaves: T) {
        leaves.into_iter().for_each(|leaf| _ = self.insert(leaf));
    }
}

impl FromIterator<LeafNo> for LeafSet {
    fn from_iter<T: IntoIterator<Item = LeafNo>>(leaves: T) -> Self {
        let mut set = LeafSet::default();
        set.extend(leaves);
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_sorted_set(leaves in proptest::collection::vec(0u64..1000, 0..200)) {
            let (mut set, mut model) = (LeafSet::default(), BTreeSet::new());
            for leaf in leaves.into_iter().map(LeafNo) {
                prop_assert_eq!(set.insert(leaf), model.insert(leaf));
            }

            prop_assert!(set.iter().eq(model));
        }
    }
}
