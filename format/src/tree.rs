//! The inner part of the map: three levels of pointer pages between the superblock and the leaves.
//!
//! Layout: `docs/format.md` §6. Invariants:
//! - A page that is on disk is never changed: a changed node gets a new page, and so does every
//!   node above it (copy-on-write up to the root).
//! - A subtree that is all hole or all zero has no pages; its parent says so.
//! - A node whose page could not be read stays as it was: what lies under it is unreadable and
//!   cannot be changed, everything else works.
//!
//! A [`Tree`] is cheap to clone (nodes are shared until changed): a checkpoint works on a clone and
//! replaces the original only when its pages are durable.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::limits::{INNER_FANOUT, INNER_LEVELS, PAGE};
use crate::node::{Inner, NodePtr, PageRef, decode_inner, encode_inner};
use crate::units::{Generation, LeafNo, PageNo, SegmentIdx, crc, index};
use crate::{Error, Result};

#[derive(Debug, Clone)]
struct Node {
    ptrs: Inner,
    dirty: bool,
}

/// The inner nodes of one map, all in memory.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    root: NodePtr,
    /// `levels[0]` holds the nodes right above the leaves, by node number.
    levels: [BTreeMap<u64, Arc<Node>>; INNER_LEVELS],
}

/// An inner page that could not be used, and what it costs.
#[derive(Debug)]
pub struct Damage {
    /// The page.
    pub at: PageRef,
    /// First leaf under it.
    pub first_leaf: LeafNo,
    /// Leaves under it.
    pub leaves: u64,
    /// What is wrong.
    pub error: Error,
}

/// Why a leaf has no pointer: an inner page above it is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unreadable;

fn leaves_under(level: usize) -> u64 {
    (INNER_FANOUT as u64).pow(u32::try_from(level).expect("three levels"))
}

/// What a checkpoint writes, and what it no longer needs.
#[derive(Debug, Default)]
pub struct Written {
    /// Pages to write.
    pub pages: Vec<(PageNo, [u8; PAGE])>,
    /// Own pages that the new tree does not name any more.
    pub replaced: Vec<PageNo>,
}

impl Tree {
    /// Reads all inner pages below `root`. `read` fills a page from the segment that the reference
    /// names; its errors, and pages that do not decode, become [`Damage`].
    pub fn load(
        root: NodePtr,
        read: &mut dyn FnMut(&PageRef, &mut [u8; PAGE]) -> Result<()>,
    ) -> (Self, Vec<Damage>) {
        let mut tree = Tree { root, levels: Default::default() };
        let mut damage = Vec::new();
        let mut level_ptrs = vec![(0u64, root)];
        for level in (0..INNER_LEVELS).rev() {
            let mut below = Vec::new();
            for (number, ptr) in level_ptrs {
                let NodePtr::Page(at) = ptr else { continue };
                let mut page = [0; PAGE];
                let decoded = match at.vectors {
                    None => read(&at, &mut page).and_then(|()| decode_inner(&page, at.crc)),
                    Some(_) => Err(Error::corrupt("an inner map page has block vectors")),
                };
                match decoded {
                    Ok(ptrs) => {
                        let first = number * INNER_FANOUT as u64;
                        below.extend((first..).zip(ptrs.iter().copied()));
                        let node = Arc::new(Node { ptrs: *ptrs, dirty: false });
                        tree.levels[level].insert(number, node);
                    }
                    Err(error) => {
                        let leaves = leaves_under(level + 1);
                        let first_leaf = LeafNo(number * leaves);
                        damage.push(Damage { at, first_leaf, leaves, error });
                    }
                }
            }
            level_ptrs = below;
        }
        (tree, damage)
    }

    /// The root as the superblock names it.
    #[must_use]
    pub fn root(&self) -> NodePtr {
        self.root
    }

    /// The pointer to a leaf.
    ///
    /// # Errors
    /// [`Unreadable`] when an inner page above it is damaged.
    pub fn leaf(&self, leaf: LeafNo) -> Result<NodePtr, Unreadable> {
        let mut ptr = self.root;
        for level in (0..INNER_LEVELS).rev() {
            if !matches!(ptr, NodePtr::Page(_)) && !self.has_node(level, leaf) {
                return Ok(ptr);
            }
            let number = leaf.0 / leaves_under(level + 1);
            let node = self.levels[level].get(&number).ok_or(Unreadable)?;
            ptr = node.ptrs[slot(level, leaf)];
        }
        Ok(ptr)
    }

    // A node that was made since the last checkpoint is in `levels` while its parent still says
    // hole or zero: `write_dirty` gives it a page.
    fn has_node(&self, level: usize, leaf: LeafNo) -> bool {
        self.levels[level].contains_key(&(leaf.0 / leaves_under(level + 1)))
    }

    /// Sets the pointer to a leaf.
    ///
    /// # Errors
    /// [`Unreadable`] when an inner page above it is damaged; nothing is changed then.
    pub fn set_leaf(&mut self, leaf: LeafNo, to: NodePtr) -> Result<(), Unreadable> {
        self.leaf(leaf)?;
        let mut inherited = self.root;
        for level in (0..INNER_LEVELS).rev() {
            let number = leaf.0 / leaves_under(level + 1);
            let node = self.levels[level]
                .entry(number)
                .or_insert_with(|| Arc::new(Node { ptrs: [inherited; INNER_FANOUT], dirty: true }));
            let node = Arc::make_mut(node);
            node.dirty = true;
            let at = slot(level, leaf);
            if level == 0 {
                node.ptrs[at] = to;
            }
            inherited = node.ptrs[at];
        }
        Ok(())
    }

    /// Marks every node whose page lies in a segment that `stays` says no to, and those above it:
    /// the next [`Self::write_dirty`] gives them pages of the own segment.
    pub fn move_in(&mut self, stays: &dyn Fn(SegmentIdx) -> bool) {
        let moves = |ptr: &NodePtr| matches!(ptr, NodePtr::Page(at) if !stays(at.segment));
        let mut marked: BTreeSet<u64> = BTreeSet::new();
        for level in 0..INNER_LEVELS {
            let fanout = INNER_FANOUT as u64;
            let above: BTreeSet<u64> = marked.iter().map(|number| number / fanout).collect();
            let own_page = |number: &u64| match self.levels.get(level + 1) {
                None => moves(&self.root),
                Some(up) => up
                    .get(&(number / fanout))
                    .is_some_and(|node| moves(&node.ptrs[index(number % fanout)])),
            };
            let numbers = self.levels[level].keys();
            marked = numbers
                .filter(|number| above.contains(number) || own_page(number))
                .copied()
                .collect();
            for number in &marked {
                let node = self.levels[level].get_mut(number).expect("just listed");
                Arc::make_mut(node).dirty = true;
            }
        }
    }

    /// Nodes that `write_dirty` will give a page, at most.
    #[must_use]
    pub fn dirty_count(&self) -> usize {
        self.levels.iter().map(|l| l.values().filter(|n| n.dirty).count()).sum()
    }

    /// Gives every changed node a new page of segment `own`, bottom-up, and returns what to write.
    /// `alloc` is called at most [`Self::dirty_count`] times.
    ///
    /// # Errors
    /// What `alloc` reports. The tree is then unusable: work on a clone.
    pub fn write_dirty(
        &mut self,
        own: SegmentIdx,
        generation: Generation,
        alloc: &mut dyn FnMut() -> Result<PageNo>,
    ) -> Result<Written> {
        let mut written = Written::default();
        for level in 0..INNER_LEVELS {
            let dirty: Vec<u64> =
                self.levels[level].iter().filter(|(_, n)| n.dirty).map(|(i, _)| *i).collect();
            for number in dirty {
                let node = Arc::make_mut(self.levels[level].get_mut(&number).expect("just listed"));
                node.dirty = false;
                let ptr = match node.ptrs[0] {
                    same @ (NodePtr::Hole | NodePtr::Zero)
                        if node.ptrs.iter().all(|p| *p == same) =>
                    {
                        self.levels[level].remove(&number);
                        same
                    }
                    _ => {
                        let bytes = encode_inner(&node.ptrs);
                        let page = alloc()?;
                        let at = PageRef {
                            segment: own,
                            page,
                            crc: crc(&bytes),
                            generation,
                            vectors: None,
                        };
                        written.pages.push((page, bytes));
                        NodePtr::Page(at)
                    }
                };
                let old = self.replace_ptr(level, number, ptr);
                if let NodePtr::Page(at) = old
                    && at.segment == own
                {
                    written.replaced.push(at.page);
                }
            }
        }
        Ok(written)
    }

    fn replace_ptr(&mut self, level: usize, number: u64, ptr: NodePtr) -> NodePtr {
        if level + 1 == INNER_LEVELS {
            return std::mem::replace(&mut self.root, ptr);
        }
        let fanout = INNER_FANOUT as u64;
        let parent = self.levels[level + 1].get_mut(&(number / fanout));
        let parent = Arc::make_mut(parent.expect("a dirty node has its parents in memory"));
        std::mem::replace(&mut parent.ptrs[index(number % fanout)], ptr)
    }

    /// Every leaf pointer that is a page, in order.
    pub fn leaves(&self) -> impl Iterator<Item = (LeafNo, PageRef)> {
        self.levels[0].iter().flat_map(|(number, node)| {
            let first = number * INNER_FANOUT as u64;
            (first..).zip(node.ptrs.iter()).filter_map(|(i, ptr)| match ptr {
                NodePtr::Page(at) => Some((LeafNo(i), *at)),
                _ => None,
            })
        })
    }

    /// Ranges of leaves that are explicitly zero as a whole: first leaf and count, in order.
    #[must_use]
    pub fn zero_leaves(&self) -> Vec<(LeafNo, u64)> {
        let mut found = Vec::new();
        if self.root == NodePtr::Zero {
            found.push((LeafNo(0), leaves_under(INNER_LEVELS)));
        }
        for (level, nodes) in self.levels.iter().enumerate() {
            for (number, node) in nodes {
                let span = leaves_under(level);
                let first = number * INNER_FANOUT as u64;
                let zero = (first..).zip(&node.ptrs).filter(|(_, p)| **p == NodePtr::Zero);
                found.extend(zero.map(|(i, _)| (LeafNo(i * span), span)));
            }
        }
        found.sort_unstable();
        found
    }

    /// Every page of the inner levels, in no order.
    pub fn pages(&self) -> impl Iterator<Item = PageRef> {
        let upper = self.levels[1..].iter().flat_map(|l| l.values());
        let below = upper.flat_map(|n| n.ptrs.iter().copied());
        std::iter::once(self.root).chain(below).filter_map(|p| match p {
            NodePtr::Page(at) => Some(at),
            _ => None,
        })
    }
}

fn slot(level: usize, leaf: LeafNo) -> usize {
    index(leaf.0 / leaves_under(level) % INNER_FANOUT as u64)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    type Disk = HashMap<u64, [u8; PAGE]>;

    fn own() -> SegmentIdx {
        SegmentIdx::new(0).unwrap()
    }

    fn leaf_ptr(n: u64) -> NodePtr {
        let generation = Generation(1);
        NodePtr::Page(PageRef {
            segment: own(),
            page: PageNo(n),
            crc: 1,
            generation,
            vectors: None,
        })
    }

    fn flush(tree: &mut Tree, disk: &mut Disk, next: &mut u64) -> Written {
        let written = tree
            .write_dirty(own(), Generation(2), &mut || {
                *next += 1;
                Ok(PageNo(*next))
            })
            .unwrap();
        disk.extend(written.pages.iter().map(|(p, b)| (p.0, *b)));
        written
    }

    fn load(disk: &Disk, root: NodePtr) -> (Tree, Vec<Damage>) {
        Tree::load(root, &mut |at, buf| {
            *buf = *disk.get(&at.page.0).ok_or_else(|| Error::corrupt("no such page"))?;
            Ok(())
        })
    }

    #[test]
    fn leaves_survive_a_round_trip_and_only_paths_are_rewritten() {
        let (mut disk, mut next) = (Disk::new(), 1000);
        let mut tree = Tree::default();
        let far = LeafNo(128 * 128 * 5 + 7);
        tree.set_leaf(LeafNo(3), leaf_ptr(50)).unwrap();
        tree.set_leaf(far, leaf_ptr(51)).unwrap();
        assert_eq!(flush(&mut tree, &mut disk, &mut next).pages.len(), 5);

        let (mut again, damage) = load(&disk, tree.root());
        again.set_leaf(LeafNo(4), NodePtr::Zero).unwrap();
        let written = flush(&mut again, &mut disk, &mut next);

        assert!(damage.is_empty());
        assert_eq!((written.pages.len(), written.replaced.len()), (3, 3));
        let (last, _) = load(&disk, again.root());
        assert_eq!(last.leaf(LeafNo(3)), Ok(leaf_ptr(50)));
        assert_eq!(last.leaf(LeafNo(4)), Ok(NodePtr::Zero));
        assert_eq!(last.leaf(LeafNo(5)), Ok(NodePtr::Hole));
        assert_eq!(last.leaf(far), Ok(leaf_ptr(51)));
        assert_eq!(last.leaves().count(), 2);
        assert_eq!(last.zero_leaves(), vec![(LeafNo(4), 1)]);
    }

    #[test]
    fn only_pages_of_segments_that_go_move_in() {
        let (mut disk, mut next) = (Disk::new(), 1000);
        let mut tree = Tree::default();
        let far = LeafNo(128 * 128 * 5 + 7);
        tree.set_leaf(LeafNo(3), leaf_ptr(50)).unwrap();
        tree.set_leaf(far, leaf_ptr(51)).unwrap();
        flush(&mut tree, &mut disk, &mut next);
        let child = SegmentIdx::new(1).unwrap();
        let above = |tree: &Tree| tree.pages().filter(|at| at.segment == own()).count();

        tree.move_in(&|segment| segment == own());
        assert_eq!(tree.dirty_count(), 0);
        // A path of the child's own: the root and two nodes; the other two are the parent's.
        tree.set_leaf(LeafNo(4), leaf_ptr(52)).unwrap();
        tree.write_dirty(child, Generation(3), &mut || Ok(PageNo(1))).unwrap();
        assert_eq!(above(&tree), 2);

        tree.move_in(&|segment| segment == child);

        // The two, and the root above them.
        assert_eq!(tree.dirty_count(), 3);
        tree.write_dirty(child, Generation(4), &mut || Ok(PageNo(2))).unwrap();
        assert_eq!(above(&tree), 0);
        assert_eq!(tree.leaf(far), Ok(leaf_ptr(51)));
    }

    #[test]
    fn a_subtree_of_zeroes_takes_no_pages() {
        let (mut disk, mut next) = (Disk::new(), 1000);
        let mut tree = Tree::default();
        for leaf in 0..128 * 128 {
            tree.set_leaf(LeafNo(leaf), NodePtr::Zero).unwrap();
        }

        let written = flush(&mut tree, &mut disk, &mut next);

        assert_eq!(written.pages.len(), 1, "the root alone");
        let (mut again, _) = load(&disk, tree.root());
        assert_eq!(again.leaf(LeafNo(77)), Ok(NodePtr::Zero));
        again.set_leaf(LeafNo(77), leaf_ptr(9)).unwrap();
        assert_eq!(again.leaf(LeafNo(77)), Ok(leaf_ptr(9)));
        assert_eq!(again.leaf(LeafNo(78)), Ok(NodePtr::Zero), "siblings inherit");
    }

    #[test]
    fn a_damaged_page_costs_its_range_only() {
        let (mut disk, mut next) = (Disk::new(), 1000);
        let mut tree = Tree::default();
        tree.set_leaf(LeafNo(3), leaf_ptr(50)).unwrap();
        tree.set_leaf(LeafNo(200), leaf_ptr(51)).unwrap();
        let written = flush(&mut tree, &mut disk, &mut next);
        let first = written.pages[0].0.0;
        disk.get_mut(&first).unwrap()[9] ^= 1;

        let (mut again, damage) = load(&disk, tree.root());

        assert_eq!(damage.len(), 1);
        assert_eq!((damage[0].first_leaf, damage[0].leaves), (LeafNo(0), 128));
        assert_eq!(again.leaf(LeafNo(3)), Err(Unreadable));
        assert_eq!(again.set_leaf(LeafNo(3), NodePtr::Hole), Err(Unreadable));
        assert_eq!(again.leaf(LeafNo(200)), Ok(leaf_ptr(51)));
        again.set_leaf(LeafNo(201), leaf_ptr(52)).unwrap();
        flush(&mut again, &mut disk, &mut next);
        assert_eq!(load(&disk, again.root()).1.len(), 1, "the damage stays where it was");
    }
}
