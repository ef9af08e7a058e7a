//! The map in memory: where every block of the virtual disk lies, readable without a lock.
//!
//! Invariants:
//! - Readers take no lock and see, for each block, a state that was current at some time during the
//!   read. Writers of entries hold the disk's core lock (`&mut` cannot say so: entries are atomic).
//! - A vector belongs to its extent for the life of the leaf and is filled before the entry says
//!   `Mixed` (the entry's `Release` store pairs with the reader's `Acquire` load), so a reader that
//!   saw `Mixed` finds valid words even when the entry has changed since.
//! - Words in memory are the words of the format (slot always zero), so they need no second check.
//!
//! Memory: 4 KiB and a few words per 32 MiB of mapped disk, plus 128 bytes per mixed extent.

mod share;

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;
use format::Result;
use format::entry::{BlockState, Entry, Vector};
use format::limits::{EXTENT_BLOCKS, INNER_FANOUT, LEAF_ENTRIES};
use format::node::{Leaf as StoredLeaf, LeafBytes, NodePtr, encode_leaf};
use format::units::{ExtentId, GuestBlock, GuestExtent, LeafNo, SegmentIdx, index};

use super::leaf::{Leaf, damaged, resolve_leaf};

/// What a leaf slot of the map holds.
#[derive(Debug)]
// The small variants are two shared values for the whole map: boxing the leaf would only cost
// readers.
#[allow(clippy::large_enum_variant)]
enum Slot {
    /// Every block under the leaf is explicitly zero.
    Zero,
    /// A map page above or at the leaf is damaged: the range cannot be read or changed.
    Damaged,
    /// A leaf with entries.
    Live(Leaf),
}

#[derive(Debug)]
struct Chunk {
    leaves: [ArcSwapOption<Slot>; INNER_FANOUT],
}

/// Chunks under one top slot: 512 GiB of disk.
type Mid = [OnceLock<Box<Chunk>>; INNER_FANOUT];

/// The map of one disk.
#[derive(Debug)]
pub struct Map {
    top: Box<[OnceLock<Box<Mid>>; INNER_FANOUT]>,
    own: SegmentIdx,
    zero: Arc<Slot>,
    damaged: Arc<Slot>,
}

/// A stretch of blocks with one state: consecutive in the segment if they hold data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First block of the virtual disk.
    pub block: GuestBlock,
    /// Number of blocks.
    pub count: u64,
    /// State of the first block.
    pub state: BlockState,
}

impl Piece {
    /// True when `next` continues this piece.
    fn continued_by(&self, block: GuestBlock, state: BlockState) -> bool {
        if self.block.plus(self.count) != block {
            return false;
        }
        match (self.state, state) {
            (
                BlockState::Data { segment: a, block: x },
                BlockState::Data { segment: b, block: y },
            ) => a == b && x.plus(self.count) == y,
            (a, b) => a == b,
        }
    }
}

impl Map {
    /// A map of holes; `own` is the index of the own segment. It has room for the largest disk.
    #[must_use]
    pub fn new(own: SegmentIdx) -> Self {
        Map {
            top: Box::new(std::array::from_fn(|_| OnceLock::new())),
            own,
            zero: Arc::new(Slot::Zero),
            damaged: Arc::new(Slot::Damaged),
        }
    }

    /// The index of the own segment.
    #[must_use]
    pub fn own(&self) -> SegmentIdx {
        self.own
    }

    fn slot(&self, leaf: LeafNo) -> Option<&ArcSwapOption<Slot>> {
        let (top, mid, low) = split(leaf);
        let chunk = self.top.get(top)?.get()?[mid].get()?;
        Some(&chunk.leaves[low])
    }

    fn slot_or_new(&self, leaf: LeafNo) -> &ArcSwapOption<Slot> {
        let (top, mid, low) = split(leaf);
        &self.chunk_or_new(top, mid).leaves[low]
    }

    fn chunk_or_new(&self, top: usize, mid: usize) -> &Chunk {
        let new_mid = || Box::new(std::array::from_fn(|_| OnceLock::new()));
        let new_chunk =
            || Box::new(Chunk { leaves: std::array::from_fn(|_| ArcSwapOption::empty()) });
        self.top[top].get_or_init(new_mid)[mid].get_or_init(new_chunk)
    }

    /// Puts a leaf read from the segment in place. `vectors_damaged` says that its vectors are
    /// gone.
    pub fn install(&self, leaf: LeafNo, stored: &StoredLeaf, vectors_damaged: bool) {
        let live = Slot::Live(Leaf::from_stored(stored, vectors_damaged));
        self.slot_or_new(leaf).store(Some(Arc::new(live)));
    }

    /// Makes a whole leaf explicitly zero, damaged, or a hole again.
    pub fn install_whole(&self, leaf: LeafNo, whole: Whole) {
        match whole {
            Whole::Hole => {
                if let Some(slot) = self.slot(leaf) {
                    slot.store(None);
                }
            }
            Whole::Zero => self.slot_or_new(leaf).store(Some(Arc::clone(&self.zero))),
            Whole::Damaged => self.slot_or_new(leaf).store(Some(Arc::clone(&self.damaged))),
        }
    }

    /// Calls `visit` with the pieces of `count` blocks from `first` on, in order, as long as they
    /// can be. Takes no lock and allocates nothing.
    ///
    /// # Errors
    /// `Corrupt` in a damaged range, or what `visit` reports.
    pub fn resolve(
        &self,
        first: GuestBlock,
        count: u64,
        visit: &mut dyn FnMut(Piece) -> Result<()>,
    ) -> Result<()> {
        let end = first.plus(count);
        let mut open: Option<Piece> = None;
        let mut add = |block: GuestBlock, count: u64, state: BlockState| -> Result<()> {
            match &mut open {
                Some(p) if p.continued_by(block, state) => p.count += count,
                open => {
                    if let Some(done) = open.replace(Piece { block, count, state }) {
                        visit(done)?;
                    }
                }
            }
            Ok(())
        };
        let mut at = first;
        while at < end {
            let leaf = at.extent().leaf();
            let leaf_end = leaf.next().first_extent().first_block().min(end);
            let held = self.slot(leaf).map(ArcSwapOption::load);
            match held.as_ref().and_then(|h| h.as_deref()) {
                None => add(at, leaf_end.0 - at.0, BlockState::Hole)?,
                Some(Slot::Zero) => add(at, leaf_end.0 - at.0, BlockState::Zero)?,
                Some(Slot::Damaged) => return Err(damaged(at)),
                Some(Slot::Live(live)) => resolve_leaf(live, at, leaf_end, &mut add)?,
            }
            at = leaf_end;
        }
        open.map_or(Ok(()), visit)
    }

    /// State of one block.
    ///
    /// # Errors
    /// `Corrupt` in a damaged range.
    pub fn block(&self, block: GuestBlock) -> Result<BlockState> {
        let mut state = BlockState::Hole;
        self.resolve(block, 1, &mut |piece| {
            state = piece.state;
            Ok(())
        })?;
        Ok(state)
    }

    /// States of the sixteen blocks of an extent.
    ///
    /// # Errors
    /// `Corrupt` in a damaged range.
    pub fn vector(&self, extent: GuestExtent) -> Result<Vector> {
        let held = self.slot(extent.leaf()).map(ArcSwapOption::load);
        match held.as_ref().and_then(|h| h.as_deref()) {
            None => Ok([BlockState::Hole; EXTENT_BLOCKS]),
            Some(Slot::Zero) => Ok([BlockState::Zero; EXTENT_BLOCKS]),
            Some(Slot::Damaged) => Err(damaged(extent.first_block())),
            Some(Slot::Live(leaf)) => {
                leaf.vector(extent.in_leaf()).ok_or_else(|| damaged(extent.first_block()))
            }
        }
    }

    /// The extent of the own segment that holds blocks of `extent`, if any.
    ///
    /// # Errors
    /// `Corrupt` in a damaged range.
    pub fn own_extent(&self, extent: GuestExtent) -> Result<Option<ExtentId>> {
        let held = self.slot(extent.leaf()).map(ArcSwapOption::load);
        let damaged = || damaged(extent.first_block());
        match held.as_ref().and_then(|h| h.as_deref()) {
            None | Some(Slot::Zero) => Ok(None),
            Some(Slot::Damaged) => Err(damaged()),
            Some(Slot::Live(leaf)) => {
                leaf.own_extent(extent.in_leaf(), self.own).ok_or_else(damaged)
            }
        }
    }

    /// Sets `count` blocks from `first` on, all in one extent. Returns the own extent that no block
    /// of this extent lies in any more, if the change emptied one. Caller holds the core lock.
    ///
    /// # Errors
    /// `Corrupt` in a damaged range; nothing is changed then.
    pub fn set_blocks(
        &self,
        first: GuestBlock,
        count: usize,
        state: &mut dyn FnMut(usize) -> BlockState,
    ) -> Result<Option<ExtentId>> {
        let extent = first.extent();
        let blocks = first.in_extent()..first.in_extent() + count;
        let change = |leaf: &Leaf| leaf.change(extent.in_leaf(), blocks, self.own, state);
        let changed = self.live_leaf(first, change)?;
        let (before, after) = changed.ok_or_else(|| damaged(first))?;
        Ok(before.filter(|_| before != after))
    }

    /// `count` blocks from `first` on, all in one extent, now lie in `target` of the own segment.
    /// Caller holds the core lock.
    ///
    /// # Errors
    /// `Corrupt` in a damaged range; nothing is changed then.
    pub fn set_own(
        &self,
        first: GuestBlock,
        count: usize,
        target: ExtentId,
    ) -> Result<Option<ExtentId>> {
        let segment = self.own;
        self.set_blocks(first, count, &mut |b| BlockState::Data { segment, block: target.block(b) })
    }

    /// Sets `count` blocks from `first` on to hole or zero, whole leaves at once. Calls `emptied`
    /// with each virtual extent that loses its own extent, and with that extent. Caller holds the
    /// core lock.
    ///
    /// # Errors
    /// `Corrupt` in a damaged range; what lies before it is changed then.
    pub fn clear(
        &self,
        first: GuestBlock,
        count: u64,
        to: Whole,
        emptied: &mut dyn FnMut(GuestExtent, ExtentId),
    ) -> Result<()> {
        let state = if to == Whole::Zero { BlockState::Zero } else { BlockState::Hole };
        let end = first.plus(count);
        let mut at = first;
        while at < end {
            let leaf = at.extent().leaf();
            let leaf_end = leaf.next().first_extent().first_block();
            if at == leaf.first_extent().first_block() && leaf_end <= end {
                self.check_changes(at, 1)?;
                self.each_own_extent(leaf, emptied)?;
                self.install_whole(leaf, to);
                at = leaf_end;
                continue;
            }
            let stop = at.extent().next().first_block().min(end);
            if let Some(e) = self.set_blocks(at, index(stop.0 - at.0), &mut |_| state)? {
                emptied(at.extent(), e);
            }
            at = stop;
        }
        Ok(())
    }

    /// Refuses changes of `count` blocks from `first` on that the map would not take. Damage
    /// neither comes nor goes while a disk is open: who has asked may change them later, too.
    ///
    /// # Errors
    /// `Corrupt` where the map page is damaged, or has lost its vectors: what can be read there
    /// stays as it is, because no checkpoint could write such a leaf.
    pub fn check_changes(&self, first: GuestBlock, count: u64) -> Result<()> {
        let end = first.plus(count);
        let mut at = first;
        while at < end {
            let leaf = at.extent().leaf();
            let held = self.slot(leaf).map(ArcSwapOption::load);
            match held.as_ref().and_then(|h| h.as_deref()) {
                Some(Slot::Damaged) => return Err(damaged(at)),
                Some(Slot::Live(live)) if live.vectors_damaged => return Err(damaged(at)),
                _ => at = leaf.next().first_extent().first_block(),
            }
        }
        Ok(())
    }

    /// Changes the leaf of a block, which is made if there is none yet, and copied if another map
    /// has it, too.
    fn live_leaf<T>(&self, block: GuestBlock, change: impl FnOnce(&Leaf) -> T) -> Result<T> {
        let slot = self.slot_or_new(block.extent().leaf());
        let present = slot.load();
        let fresh = match present.as_ref().map(|leaf| (leaf, &**leaf)) {
            Some((_, Slot::Damaged)) => return Err(damaged(block)),
            Some((_, Slot::Live(live))) if live.vectors_damaged => return Err(damaged(block)),
            Some((leaf, Slot::Live(live))) if share::alone(leaf) => return Ok(change(live)),
            Some((_, Slot::Live(live))) => live.copy(),
            Some((_, Slot::Zero)) => Leaf::filled(Entry::Zero),
            None => Leaf::filled(Entry::Hole),
        };
        let outcome = change(&fresh);
        slot.store(Some(Arc::new(Slot::Live(fresh))));
        Ok(outcome)
    }

    /// Calls `visit` with each virtual extent under `leaf` that has an extent of the own segment,
    /// in order, and with that extent.
    ///
    /// # Errors
    /// `Corrupt` for a damaged leaf.
    pub fn each_own_extent(
        &self,
        leaf: LeafNo,
        visit: &mut dyn FnMut(GuestExtent, ExtentId),
    ) -> Result<()> {
        let first = leaf.first_extent();
        let held = self.slot(leaf).map(ArcSwapOption::load);
        match held.as_ref().and_then(|h| h.as_deref()) {
            None | Some(Slot::Zero) => {}
            Some(Slot::Damaged) => return Err(damaged(first.first_block())),
            Some(Slot::Live(live)) => {
                for i in 0..LEAF_ENTRIES {
                    if let Some(extent) = live.own_extent(i, self.own).flatten() {
                        visit(first.plus(i as u64), extent);
                    }
                }
            }
        }
        Ok(())
    }

    /// The leaf as it is to be stored; `None` when it is damaged and must stay as it is on disk.
    /// Caller holds the core lock.
    #[must_use]
    pub fn encode(&self, leaf: LeafNo) -> Option<Encoded> {
        let held = self.slot(leaf).map(ArcSwapOption::load);
        let live = match held.as_ref().and_then(|h| h.as_deref()) {
            None => return Some(Encoded::Whole(NodePtr::Hole)),
            Some(Slot::Zero) => return Some(Encoded::Whole(NodePtr::Zero)),
            Some(Slot::Damaged) => return None,
            Some(Slot::Live(live)) => live,
        };
        if live.vectors_damaged {
            return None;
        }
        let same = live.entry(0);
        let all_same = (1..LEAF_ENTRIES).all(|i| live.entry(i) == same);
        match same {
            Entry::Hole if all_same => Some(Encoded::Whole(NodePtr::Hole)),
            Entry::Zero if all_same => Some(Encoded::Whole(NodePtr::Zero)),
            _ => Some(Encoded::Leaf(encode_leaf(
                |i| live.entry(i),
                |i| live.vector(i).expect("a leaf without damage has its vectors"),
            ))),
        }
    }

    /// Bytes of memory that leaves and vectors take.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let mids = self.top.iter().filter_map(OnceLock::get);
        let chunks = mids.clone().flat_map(|m| m.iter().filter_map(OnceLock::get));
        let leaves =
            chunks.clone().flat_map(|c| c.leaves.iter()).map(|slot| match slot.load().as_deref() {
                Some(Slot::Live(leaf)) => size_of::<Slot>() + leaf.vector_bytes(),
                _ => 0,
            });
        leaves.sum::<usize>()
            + chunks.count() * size_of::<Chunk>()
            + mids.count() * size_of::<Mid>()
            + size_of_val(&*self.top)
    }
}

fn split(leaf: LeafNo) -> (usize, usize, usize) {
    let fanout = INNER_FANOUT as u64;
    (index(leaf.0 / fanout / fanout), index(leaf.0 / fanout % fanout), index(leaf.0 % fanout))
}

/// A whole leaf of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whole {
    /// Never written.
    Hole,
    /// Explicitly zero.
    Zero,
    /// Not readable.
    Damaged,
}

/// A leaf ready for a checkpoint.
#[derive(Debug)]
pub enum Encoded {
    /// No page needed.
    Whole(NodePtr),
    /// A leaf page and its vectors.
    Leaf(LeafBytes),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> SegmentIdx {
        SegmentIdx::new(2).unwrap()
    }

    fn pieces(map: &Map, first: u64, count: u64) -> Vec<(u64, u64, bool)> {
        let mut all = Vec::new();
        map.resolve(GuestBlock(first), count, &mut |p| {
            all.push((p.block.0, p.count, !p.state.reads_zero()));
            Ok(())
        })
        .unwrap();
        all
    }

    #[test]
    fn neighbours_in_the_segment_resolve_to_one_piece() {
        let map = Map::new(own());
        for (v, e) in [(0, 50), (1, 51), (2, 99)] {
            map.set_own(GuestExtent(v).first_block(), 16, ExtentId(e)).unwrap();
        }

        assert_eq!(pieces(&map, 4, 60), vec![(4, 28, true), (32, 16, true), (48, 16, false)]);
    }

    #[test]
    fn single_blocks_make_an_extent_mixed_and_sixteen_make_it_uniform() {
        let map = Map::new(own());
        for b in 0..16 {
            map.set_own(GuestBlock(b), 1, ExtentId(70)).unwrap();
            let Some(Encoded::Leaf(bytes)) = map.encode(LeafNo(0)) else { panic!("a leaf") };
            assert_eq!(bytes.vector_pages(), u8::from(b < 15));
        }
        assert_eq!(pieces(&map, 0, 17), vec![(0, 16, true), (16, 1, false)]);
    }

    #[test]
    fn the_last_block_to_go_releases_the_extent() {
        let map = Map::new(own());
        map.set_own(GuestBlock(3), 2, ExtentId(70)).unwrap();

        let zero = &mut |_| BlockState::Zero;

        assert_eq!(map.set_blocks(GuestBlock(3), 1, zero).unwrap(), None);
        assert_eq!(map.set_blocks(GuestBlock(4), 1, zero).unwrap(), Some(ExtentId(70)));
        assert_eq!(map.set_blocks(GuestBlock(4), 1, zero).unwrap(), None);
    }

    #[test]
    fn a_write_under_a_zero_leaf_keeps_its_neighbours_zero() {
        let map = Map::new(own());
        map.install_whole(LeafNo(1), Whole::Zero);
        let b = LeafNo(1).first_extent().first_block();

        map.set_own(b.plus(20), 1, ExtentId(70)).unwrap();

        assert_eq!(map.block(b).unwrap(), BlockState::Zero);
        assert_eq!(map.block(b.plus(21)).unwrap(), BlockState::Zero);
        assert!(!map.block(b.plus(20)).unwrap().reads_zero());
    }

    #[test]
    fn a_damaged_leaf_refuses_reads_and_changes() {
        let map = Map::new(own());
        map.install_whole(LeafNo(0), Whole::Damaged);

        assert!(map.block(GuestBlock(9)).is_err());
        assert!(map.set_own(GuestBlock(9), 1, ExtentId(70)).is_err());
        assert!(map.encode(LeafNo(0)).is_none());
        assert!(map.block(LeafNo(1).first_extent().first_block()).is_ok());
    }

    #[test]
    fn fully_written_disks_take_at_most_160_kib_per_gib() {
        let map = Map::new(own());
        for v in 0..32 * 512 {
            map.set_own(GuestExtent(v).first_block(), 16, ExtentId(v + 300)).unwrap();
        }
        let bytes = map.memory_bytes();
        assert!(bytes <= 160 << 10, "{bytes}");
    }
}
