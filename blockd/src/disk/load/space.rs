//! The space map, rebuilt from what the superblock, the map pages and the map name.
//!
//! Invariant: an extent or page that anything readable names is used, and so is everything up to
//! the end of the file when something unreadable may name it.

use std::collections::{BTreeSet, HashSet};

use format::array::ArrayRef;
use format::entry::{BlockState, Vector};
use format::limits::{BLOCKS_PER_EXTENT, EXTENT, LEAF_SPAN};
use format::node::PageRef;
use format::space::SpaceMap;
use format::superblock::{Seal, Superblock};
use format::tree::Tree;
use format::units::{BlockId, ExtentId, GuestExtent, PageNo, SegmentIdx};
use format::{Error, Result};

use super::ranges::Ranges;
use super::{FILE_EXTENTS_MAX, Loaded, Loader};
use crate::disk::leafset::LeafSet;
use crate::disk::map::Piece;
use crate::disk::problem::{Problem, Remedy, What};
use crate::disk::seal::sums_bytes_max;

/// True when the sums of a sealed segment lie in the data area of its file of `extents` extents,
/// and cover no more.
fn sums_fit(sb: &Superblock, extents: u64) -> bool {
    let end = ExtentId(extents);
    let inside = sb.sums.page.extent() >= sb.data_start()
        && sb.sums.page.plus(sb.sums.pages()) <= end.first_page()
        && sb.sums.bytes <= sums_bytes_max(sb.data_start(), end);
    inside || sb.sums.is_empty()
}

/// Pages of the arrays of a segment, whose file has `extents` extents: what for, first page, count.
fn array_pages(sb: &Superblock, extents: u64) -> Vec<(String, PageNo, u64)> {
    let array = |what: &str, a: ArrayRef| (what.to_owned(), a.page, a.pages());
    let mut runs = vec![array("segment table", sb.table)];
    if sums_fit(sb, extents) {
        runs.push(array("data checksums", sb.sums));
    }
    runs
}

/// As [`array_pages`], with the pages of the map.
fn own_pages(sb: &Superblock, tree: &Tree, extents: u64) -> Vec<(String, PageNo, u64)> {
    let own = |at: &PageRef| at.segment == sb.own_index;
    let mut runs = array_pages(sb, extents);
    for at in tree.pages().filter(own) {
        runs.push((format!("inner map page {}", at.page), at.page, 1));
    }
    for (leaf, at) in tree.leaves().filter(|(_, at)| own(at)) {
        let object = format!("map leaf at byte offset {}", leaf.0 * LEAF_SPAN);
        if let Some(run) = at.vectors {
            runs.push((object.clone(), run.page, run.count.into()));
        }
        runs.push((object, at.page, 1));
    }
    runs
}

/// The extents of segment `own` that a piece lies in, with their virtual extents.
fn own_extents(piece: &Piece, own: SegmentIdx) -> impl Iterator<Item = (GuestExtent, ExtentId)> {
    let (first, count) = match piece.state {
        BlockState::Data { segment, block } if segment == own => (block, piece.count),
        BlockState::Data { block, .. } => (block, 0),
        _ => (BlockId(0), 0),
    };
    let virtual_first = piece.block.extent();
    let extents =
        if count == 0 { 0 } else { first.plus(count - 1).extent().0 - first.extent().0 + 1 };
    (0..extents).map(move |i| (virtual_first.plus(i), first.extent().plus(i)))
}

/// The extents of segment `own` that a vector names, in its order.
fn owned(vector: &Vector, own: SegmentIdx) -> Vec<ExtentId> {
    let mut owned = Vec::new();
    for state in vector {
        if let BlockState::Data { segment, block } = state
            && *segment == own
            && !owned.contains(&block.extent())
        {
            owned.push(block.extent());
        }
    }
    owned
}

type Rebuilt = (SpaceMap, Vec<(GuestExtent, ExtentId)>);

impl Loader<'_> {
    /// Notes the pages of arrays, so that a map page that lies there is seen to be wrong.
    pub(super) fn meet_arrays(&mut self) {
        let own = self.sb.own_index.get();
        for (_, page, count) in array_pages(self.sb, self.own_extents()) {
            self.seen.extend((page.0..page.0 + count).map(|p| (own, p)));
        }
    }

    /// The space map, and virtual extents whose extent something else names, too.
    pub(super) fn rebuild_space(&mut self, tree: &Tree) -> Rebuilt {
        let mut space = SpaceMap::new(self.sb.data_start());
        self.check_sums();
        let extents = self.own_extents();
        let end = ExtentId(extents).first_page();
        let mut twice = false;
        for (object, page, count) in own_pages(self.sb, tree, extents) {
            // What lies past the end of the file was noticed when it was read.
            let count = count.min(end.0.saturating_sub(page.0));
            if let Err(e) = space.claim_pages(page, count) {
                twice = true;
                // Map pages that something uses, too, were left out when they were read.
                let problem = Problem::new(What::DoubleUse, object, &e);
                self.problems.note(Problem { remedy: Remedy::None, ..problem });
            }
        }
        let shared = self.claim_data(tree, &mut space);
        self.hidden |= twice || !shared.is_empty();
        // A file that is too long is not written to.
        if self.hidden && extents < FILE_EXTENTS_MAX {
            reserve(&mut space, self.sb, tree, extents);
        } else {
            self.hold_freed(&mut space);
        }
        (space, shared)
    }

    /// Extents that only records of the tail let go go the way of all space: the map that a power
    /// cut brings back names them until those records are in the journal. Test:
    /// `crash_points::kill::space_freed_by_a_replayed_tail_waits_for_the_journal`.
    fn hold_freed(&mut self, space: &mut SpaceMap) {
        let seq = self.cursor.seq.plus(self.replayed.1);
        for extent in std::mem::take(&mut self.freed) {
            if extent.0 < self.own_extents() && space.claim(extent).is_ok() {
                space.retire(extent, seq);
            }
        }
    }

    /// The sums of a sealed segment lie in the file and cover no more than it.
    fn check_sums(&mut self) {
        let wrong = match self.sb.seal {
            Seal::Done if sums_fit(self.sb, self.own_extents()) => return,
            Seal::Done => "they lie outside the file",
            _ if self.sb.sums.is_empty() => return,
            _ => "the segment has checksums before its seal is done",
        };
        let error = Error::corrupt(wrong);
        self.problems.note(Problem::new(What::Digest, "the data checksums", &error));
    }

    /// Claims the extents that the map names; returns those that something else names, too.
    fn claim_data(&mut self, tree: &Tree, space: &mut SpaceMap) -> Vec<(GuestExtent, ExtentId)> {
        let inside = self.sb.data_start()..ExtentId(self.own_extents());
        let count = self.leaf_count();
        let named = tree.leaves().map(|(leaf, _)| leaf).filter(|leaf| leaf.0 < count);
        let leaves: LeafSet = named.chain(self.dirty.iter()).collect();
        let mut shared = BTreeSet::new();
        let mut claim = |v: GuestExtent, e: ExtentId| {
            // What lies outside was noticed when the entry was read.
            if inside.contains(&e) && space.claim(e).is_err() {
                shared.insert((v, e));
            }
        };
        for leaf in leaves.iter() {
            // A leaf that is damaged as a whole names nothing that is known.
            let _ = self.map.each_own_extent(leaf, &mut claim);
        }
        for v in self.moved.keys() {
            let Ok(vector) = self.map.vector(*v) else { continue };
            owned(&vector, self.sb.own_index).iter().skip(1).for_each(|e| claim(*v, *e));
        }
        self.note_shared(&leaves, &shared);
        shared.into_iter().collect()
    }

    /// Notes every virtual extent that reads an extent which something else names, too: those that
    /// came to it first as well, since nothing tells whose data it holds.
    fn note_shared(&mut self, leaves: &LeafSet, shared: &BTreeSet<(GuestExtent, ExtentId)>) {
        let twice: HashSet<ExtentId> = shared.iter().map(|(_, e)| *e).collect();
        if twice.is_empty() {
            return;
        }
        let mut users = shared.clone();
        for leaf in leaves.iter() {
            let _ = self.map.each_own_extent(leaf, &mut |v, e| {
                if twice.contains(&e) {
                    users.insert((v, e));
                }
            });
        }
        for (v, e) in users {
            let seen = format!("extent {e} is used twice: what is read here may belong elsewhere");
            self.problems.note(of_extent(What::DoubleUse, v, seen));
        }
    }
}

/// What is wrong with a virtual extent.
fn of_extent(what: What, v: GuestExtent, seen: String) -> Problem {
    let offset = v.0 * EXTENT;
    let problem = Problem::new(what, format!("byte offset {offset}"), &Error::corrupt(seen));
    problem.costing(offset, EXTENT)
}

/// Takes every extent up to the end of the file, and every free page beside a map page.
fn reserve(space: &mut SpaceMap, sb: &Superblock, tree: &Tree, extents: u64) {
    for (_, page, count) in own_pages(sb, tree, extents) {
        let first = page.extent().first_page();
        let end = page.plus(count.max(1) - 1).extent().next().first_page();
        for p in (first.0..end.0.min(extents * BLOCKS_PER_EXTENT)).map(PageNo) {
            // A page that is used already is what this is about.
            let _ = space.claim_pages(p, 1);
        }
    }
    for e in (sb.data_start().0..extents).map(ExtentId) {
        if space.is_free(e) {
            let _ = space.claim(e);
        }
    }
}

impl Loaded {
    /// Runs of pages of the own file that arrays and the map take.
    pub(crate) fn own_pages(&self) -> Vec<(PageNo, u64)> {
        let runs = own_pages(&self.superblock, &self.tree, self.own_file().extents);
        runs.into_iter().map(|(_, page, count)| (page, count)).collect()
    }

    /// True when the file is longer than a segment's can be.
    pub(crate) fn too_long(&self) -> bool {
        self.own_file().extents >= FILE_EXTENTS_MAX
    }

    /// Takes everything up to the end of the file, so that what is written from now on lies behind
    /// whatever any state of the segment names.
    pub(crate) fn reserve_file(&mut self) {
        let extents = self.own_file().extents;
        reserve(&mut self.space, &self.superblock, &self.tree, extents);
    }

    /// The blocks of the disk that lie in any of these extents of the own segment.
    pub(crate) fn users(&self, of: &HashSet<ExtentId>) -> Result<Ranges> {
        let own = self.superblock.own_index;
        let mut users = Ranges::default();
        self.pieces(&mut |piece| {
            for (v, _) in own_extents(&piece, own).filter(|(_, e)| of.contains(e)) {
                let from = piece.block.max(v.first_block());
                let to = piece.block.plus(piece.count).min(v.next().first_block());
                users.add(from, to.0 - from.0);
            }
            Ok(())
        })?;
        Ok(users)
    }
}
