//! Sets of blocks of the virtual disk, as ranges.

use std::collections::BTreeMap;

use format::limits::BLOCK;
use format::units::GuestBlock;

use crate::disk::problem::GuestRange;

/// A set of blocks. Invariant: its ranges are not empty and do not touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    /// First block and the block behind the last.
    ranges: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Adds `count` blocks from `first` on.
    pub fn add(&mut self, first: GuestBlock, count: u64) {
        if count == 0 {
            return;
        }
        let (mut from, mut to) = (first.0, first.0 + count);
        while let Some((&f, &t)) = self.ranges.range(..=to).next_back()
            && t >= from
        {
            self.ranges.remove(&f);
            (from, to) = (from.min(f), to.max(t));
        }
        self.ranges.insert(from, to);
    }

    /// Takes `count` blocks from `first` on out.
    pub fn subtract(&mut self, first: GuestBlock, count: u64) {
        let (from, to) = (first.0, first.0 + count);
        while count > 0
            && let Some((&f, &t)) = self.ranges.range(..to).next_back()
            && t > from
        {
            self.ranges.remove(&f);
            if f < from {
                self.ranges.insert(f, from);
            }
            if to < t {
                self.ranges.insert(to, t);
            }
        }
    }

    /// True when there is no block in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges in order: first block and number of blocks.
    pub fn iter(&self) -> impl Iterator<Item = (GuestBlock, u64)> {
        self.ranges.iter().map(|(from, to)| (GuestBlock(*from), to - from))
    }

    /// What of the blocks `first..end` is not in it, in order: first block and number of blocks.
    pub fn gaps(&self, first: GuestBlock, end: GuestBlock) -> Vec<(GuestBlock, u64)> {
        let mut gaps = Vec::new();
        let mut at = first.0;
        let before = self.ranges.range(..=at).next_back();
        for (&from, &to) in before.into_iter().chain(self.ranges.range(at + 1..end.0.max(at + 1))) {
            if from > at {
                gaps.push((GuestBlock(at), from - at));
            }
            at = at.max(to);
        }
        if at < end.0 {
            gaps.push((GuestBlock(at), end.0 - at));
        }
        gaps
    }

    /// The ranges in bytes, as far as a disk of `size` bytes goes.
    #[must_use]
    pub fn in_bytes(&self, size: u64) -> Vec<GuestRange> {
        self.iter()
            .map(|(first, count)| (first.offset().0, (first.0 + count) * BLOCK))
            .filter(|(offset, _)| *offset < size)
            .map(|(offset, end)| GuestRange { offset, len: end.min(size) - offset })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_blocks(
            steps in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..20), 0..40),
            window in (0u64..70, 0u64..30),
        ) {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for (add, first, count) in steps {
                if add {
                    ranges.add(GuestBlock(first), count);
                    model.extend(first..first + count);
                } else {
                    ranges.subtract(GuestBlock(first), count);
                    model.retain(|b| !(first..first + count).contains(b));
                }
            }
            let blocks: Vec<u64> =
                ranges.iter().flat_map(|(first, n)| first.0..first.0 + n).collect();
            prop_assert_eq!(&blocks, &model.iter().copied().collect::<Vec<_>>());
            let ends: Vec<(u64, u64)> = ranges.iter().map(|(f, n)| (f.0, f.0 + n)).collect();
            prop_assert!(ends.windows(2).all(|w| w[0].1 < w[1].0), "joined: {:?}", ends);

            let (first, end) = (window.0, window.0 + window.1);
            let gaps: Vec<u64> = ranges
                .gaps(GuestBlock(first), GuestBlock(end))
                .into_iter()
                .flat_map(|(f, n)| f.0..f.0 + n)
                .collect();
            prop_assert_eq!(gaps, (first..end).filter(|b| !model.contains(b)).collect::<Vec<_>>());
        }
    }
}
