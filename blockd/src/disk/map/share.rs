//! Two maps over the same leaves: a disk that goes on after a fork, and the frozen one.
//!
//! Invariants:
//! - The frozen map does not change any more. The other one changes a leaf only when it has it
//!   alone, else a copy: [`alone`] counts who has it.
//! - A leaf that was alone stays so: only a fork shares leaves, and nobody changes a map meanwhile
//!   whose content counts.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use arc_swap::Guard;

use super::{Map, Slot};

/// Whether nobody but one map has this leaf. A reader that has it for the moment may count, too:
/// then a copy is made that was not needed.
pub(super) fn alone(leaf: &Arc<Slot>) -> bool {
    if Arc::strong_count(leaf) > 1 {
        return false;
    }
    // Acquire pairs with the Release decrement of whoever let go of the leaf: what it read there it
    // has read.
    fence(Ordering::Acquire);
    true
}

impl Map {
    /// Shows what `other` shows, whose leaves it shares from now on. What this map showed before is
    /// gone, except that leaves which both have stay where they are: doing this again costs little.
    /// Nobody reads this map yet.
    pub(in crate::disk) fn share(&self, other: &Map) {
        for (top, mids) in other.top.iter().enumerate() {
            let Some(mids) = mids.get() else { continue };
            for (mid, chunk) in mids.iter().enumerate() {
                let Some(chunk) = chunk.get() else { continue };
                let own = self.chunk_or_new(top, mid);
                for (slot, shared) in own.leaves.iter().zip(&chunk.leaves) {
                    let shared = shared.load();
                    let same = match (&*slot.load(), &*shared) {
                        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                        (None, None) => true,
                        _ => false,
                    };
                    if !same {
                        slot.store(Guard::into_inner(shared));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use format::entry::BlockState;
    use format::units::{ExtentId, GuestBlock, LeafNo, SegmentIdx};

    use super::super::Whole;
    use super::*;

    fn row(i: u64) -> SegmentIdx {
        SegmentIdx::new(i).unwrap()
    }

    fn data(segment: u64, extent: u64, block: usize) -> BlockState {
        BlockState::Data { segment: row(segment), block: ExtentId(extent).block(block) }
    }

    /// Leaf 0 with vectors, leaf 1 zero, leaf 2 with one block, leaf 3 a hole.
    fn frozen() -> Map {
        let map = Map::new(row(2));
        map.set_own(GuestBlock(3), 2, ExtentId(70)).unwrap();
        map.set_own(GuestBlock(64), 16, ExtentId(71)).unwrap();
        map.install_whole(LeafNo(1), Whole::Zero);
        map.set_own(LeafNo(2).first_extent().first_block(), 1, ExtentId(72)).unwrap();
        map
    }

    #[test]
    fn neither_map_sees_what_the_other_one_changes() {
        let (old, new) = (frozen(), Map::new(row(3)));
        new.share(&old);
        let at = [GuestBlock(4), GuestBlock(64), LeafNo(1).first_extent().first_block()];
        let before = at.map(|b| old.block(b).unwrap());
        assert_eq!(at.map(|b| new.block(b).unwrap()), before);

        for (i, block) in (0..).zip(at) {
            new.set_own(block, 1, ExtentId(90 + i)).unwrap();
        }
        new.install_whole(LeafNo(2), Whole::Hole);

        assert_eq!(at.map(|b| old.block(b).unwrap()), before);
        assert_eq!(new.block(at[0]).unwrap(), data(3, 90, 4));
        assert_eq!(new.block(GuestBlock(3)).unwrap(), data(2, 70, 3));
        assert!(!old.block(LeafNo(2).first_extent().first_block()).unwrap().reads_zero());
    }

    #[test]
    fn sharing_again_brings_what_changed_in_between() {
        let (old, new) = (frozen(), Map::new(row(3)));
        new.share(&old);
        old.set_own(GuestBlock(5), 1, ExtentId(70)).unwrap();
        old.install_whole(LeafNo(1), Whole::Hole);
        old.set_own(LeafNo(3).first_extent().first_block(), 16, ExtentId(75)).unwrap();

        new.share(&old);

        for leaf in (0..4).map(LeafNo) {
            let first = leaf.first_extent();
            for extent in (first.0..first.0 + 5).map(format::units::GuestExtent) {
                assert_eq!(new.vector(extent).unwrap(), old.vector(extent).unwrap());
            }
        }
    }

    #[test]
    fn a_leaf_is_copied_once_and_not_when_the_other_map_is_gone() {
        let (old, new) = (frozen(), Map::new(row(3)));
        new.share(&old);
        let leaf = |map: &Map, no| Arc::as_ptr(map.slot(no).unwrap().load().as_ref().unwrap());
        let shared = leaf(&new, LeafNo(0));
        new.set_own(GuestBlock(3), 1, ExtentId(90)).unwrap();
        let copied = leaf(&new, LeafNo(0));
        assert!(copied != shared && leaf(&old, LeafNo(0)) == shared);
        new.set_own(GuestBlock(4), 1, ExtentId(90)).unwrap();
        assert_eq!(leaf(&new, LeafNo(0)), copied);

        let last = leaf(&new, LeafNo(2));
        drop(old);
        new.set_own(LeafNo(2).first_extent().first_block(), 1, ExtentId(91)).unwrap();
        assert_eq!(leaf(&new, LeafNo(2)), last);
    }
}
