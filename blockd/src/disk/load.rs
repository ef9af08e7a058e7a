//! From a segment file to a disk in memory: superblock, segment table, parents, map, journal, tail,
//! space. Opening, checking and repairing all come through here.
//!
//! Invariants:
//! - Nothing is written.
//! - Content decides nothing unchecked: whatever the file says becomes a value, a [`Problem`], or
//!   an error; never a panic, and never memory out of proportion to the file.
//! - A host error is not damage: it ends the loading, since to go on would take used space for
//!   free.
//! - The space map is rebuilt from what the map names after replay, so it cannot disagree with it.
//!   Where damage hides what is used, everything up to the end of the file counts as used.

mod leaves;
pub mod older;
pub mod ranges;
mod replay;
mod space;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use format::journal::Record;
use format::limits::{BLOCK, EXTENT, LEAF_SPAN, PAGE};
use format::node::PageRef;
use format::space::SpaceMap;
use format::superblock::{Chosen, JournalHead, Superblock, choose};
use format::table::SegmentTable;
use format::tree::Tree;
use format::units::{ExtentId, GuestBlock, GuestExtent, LeafNo, Seq};
use format::{Context, Error, Kind, Result};

use super::leafset::LeafSet;
use super::map::{Map, Piece, Whole};
use super::problem::{Problem, Problems, Remedy, What};
use super::tail::Tail;
use crate::segment::{self, Segments};
use crate::store::File;
use crate::store::buf::AlignedBuf;
use ranges::Ranges;

/// Extents of a file that are looked at: those of the largest disk and a quarter more. A file that
/// is longer says so to make the space map large.
const FILE_EXTENTS_MAX: u64 = (64 << 40) / EXTENT / 4 * 5;

/// The file behind one row of the segment table.
#[derive(Clone)]
pub struct RowFile {
    /// The file.
    pub file: Arc<dyn File>,
    /// Added to every extent number.
    pub base: ExtentId,
    /// Length of the file in extents, rounded down; at most those of the largest disk.
    pub extents: u64,
}

/// What to make of a part of the map that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDamage {
    /// It stays unreadable, as little as can be, and the map refuses every change of a leaf that
    /// has lost its vectors: no checkpoint could write such a leaf.
    Keep,
    /// It becomes explicitly zero, as little as can be, before the journal is replayed over it.
    Zero,
}

/// How to load.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// What to make of damage.
    pub on_damage: OnDamage,
    /// Read the journal of a cleanly closed disk too, for signs of a newer superblock.
    pub search_ring: bool,
}

/// A disk in memory, as its segment and its parents say.
pub struct Loaded {
    /// The superblock it was loaded from.
    pub superblock: Superblock,
    /// What the segment indices mean.
    pub table: SegmentTable,
    /// The file of each row; `None` where a parent is missing.
    pub rows: Vec<Option<RowFile>>,
    /// The inner map pages as they are on disk.
    pub tree: Tree,
    /// The map after replay.
    pub map: Map,
    /// What is used in the own file.
    pub space: SpaceMap,
    /// Where a writer continues the journal.
    pub cursor: JournalHead,
    /// Leaves that differ from what is on disk.
    pub dirty: LeafSet,
    /// Records replayed, from the journal and from the tail.
    pub replayed: (u64, u64),
    /// First journal record that should be there and is not.
    pub missing: Option<Seq>,
    /// Blocks that cannot be read because the map is damaged.
    pub damaged: Ranges,
    /// Blocks whose content was given up ([`OnDamage::Zero`]).
    pub dropped: Ranges,
    /// Something was given up, if only what lies past the end of the disk.
    pub mended: bool,
    /// Virtual extents whose extent of the own segment something else names, too.
    pub shared: Vec<(GuestExtent, ExtentId)>,
    /// Damage hides which extents of the own segment are in use.
    pub hidden: bool,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

impl Loaded {
    /// Calls `visit` with the pieces of the map of the whole disk, in order, damage left out.
    ///
    /// # Errors
    /// What `visit` reports.
    pub fn pieces(&self, visit: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
        let end = GuestBlock(self.superblock.virtual_size.div_ceil(BLOCK));
        for (first, count) in self.damaged.gaps(GuestBlock(0), end) {
            self.map.resolve(first, count, visit)?;
        }
        Ok(())
    }

    /// The file of the own segment.
    ///
    /// # Panics
    /// Never: a disk whose own row has no file is not loaded.
    #[must_use]
    pub fn own_file(&self) -> &RowFile {
        let row = self.rows.get(usize::from(self.superblock.own_index.get()));
        row.and_then(Option::as_ref).expect("the own file is open")
    }
}

/// Loads a disk for opening. `tail` is what a killed process left behind, if anything.
///
/// # Errors
/// When the superblock or the segment table cannot be used, or the host reports an error.
pub fn load(file: &Arc<dyn File>, segments: &dyn Segments, tail: Option<&Tail>) -> Result<Loaded> {
    let (sb, problems) = newest(file.as_ref())?;
    let search_ring = problems.any(What::SuperblockCopy);
    let how = How { on_damage: OnDamage::Keep, search_ring };
    load_state(file, sb, segments, tail, (how, problems))
}

/// The newest superblock, and what is wrong with the copies.
///
/// # Errors
/// As [`choose`], or what the host reports.
pub fn newest(file: &dyn File) -> Result<(Superblock, Problems)> {
    let pages = segment::read_copies(file)?;
    let Chosen { superblock, complaints } = choose(&pages)?;
    let mut problems = Problems::default();
    for (copy, error) in complaints.into_iter().enumerate() {
        let Some(error) = error else { continue };
        let other = Superblock::decode(&pages[copy], copy).ok();
        let split = other.is_some_and(|sb| sb.generation == superblock.generation);
        let what = if split { What::SuperblockSplit } else { What::SuperblockCopy };
        problems.note(Problem::new(what, format!("superblock copy {copy}"), &error));
    }
    Ok((superblock, problems))
}

/// Loads the state that `sb` describes: the newest, or for a repair an older one. The problems
/// given are those found before.
///
/// # Errors
/// As [`load`].
pub fn load_state(
    file: &Arc<dyn File>,
    sb: Superblock,
    segments: &dyn Segments,
    tail: Option<&Tail>,
    (how, mut problems): (How, Problems),
) -> Result<Loaded> {
    let table = load_table(file.as_ref(), &sb)?;
    let rows = open_rows(file, &sb, &table, segments, &mut problems)?;
    let mut loader = Loader {
        sb: &sb,
        rows: &rows,
        how,
        map: Map::new(sb.own_index),
        problems,
        damaged: Ranges::default(),
        dropped: Ranges::default(),
        mended: false,
        dirty: LeafSet::default(),
        waiting: Vec::new(),
        freed: Vec::new(),
        moved: BTreeMap::new(),
        hidden: false,
        stale: LeafSet::default(),
        seen: HashSet::new(),
        cursor: sb.journal,
        replayed: (0, 0),
        missing: None,
    };
    // A repair writes down how long the file is now.
    loader.mended = how.on_damage == OnDamage::Zero && loader.own_extents() < sb.extents_end.0;
    loader.meet_arrays();
    let tree = loader.tree()?;
    loader.leaves(&tree)?;
    loader.replay_journal(file.as_ref())?;
    loader.replay_tail(tail)?;
    loader.settle_moved()?;
    loader.check_end()?;
    let (space, shared) = loader.rebuild_space(&tree);
    let tree = if how.on_damage == OnDamage::Zero { loader.without_damage(&tree) } else { tree };
    let Loader { map, problems, damaged, dropped, mended, dirty, hidden, .. } = loader;
    let (cursor, replayed, missing) = (loader.cursor, loader.replayed, loader.missing);
    Ok(Loaded {
        tree,
        map,
        space,
        cursor,
        dirty,
        replayed,
        missing,
        damaged,
        dropped,
        mended,
        shared,
        hidden,
        problems: problems.into_vec(),
        superblock: sb,
        table,
        rows,
    })
}

/// The segment table of a segment.
///
/// # Errors
/// `Corrupt` when it cannot be used, or what the host reports.
pub fn load_table(file: &dyn File, sb: &Superblock) -> Result<SegmentTable> {
    if sb.table.page.extent() < sb.data_start() {
        return Err(Error::corrupt("the segment table lies before the data area"));
    }
    let table = segment::read_table(file, sb).context("read", || "the segment table".into())?;
    let own = table.row(sb.own_index)?;
    if own.segment != sb.segment {
        return Err(Error::corrupt("the segment table does not name its own segment"));
    }
    if own.base != ExtentId(0) {
        return Err(Error::corrupt("the segment table moves the extents of its own segment"));
    }
    Ok(table)
}

fn open_rows(
    own: &Arc<dyn File>,
    sb: &Superblock,
    table: &SegmentTable,
    segments: &dyn Segments,
    problems: &mut Problems,
) -> Result<Vec<Option<RowFile>>> {
    let mut rows: Vec<Option<RowFile>> = vec![None; table.len()];
    for (i, row) in table.iter() {
        let file = if i == sb.own_index {
            Arc::clone(own)
        } else if row.segment == sb.segment {
            return Err(Error::corrupt("the segment is its own parent: a loop"));
        } else {
            let checked = segments.sealed(row.segment).and_then(|sealed| {
                segment::check_sealed(&sealed.superblock, row.segment, row.digest)?;
                if sealed.file.size()? / EXTENT < sealed.superblock.extents_end.0 {
                    return Err(Error::corrupt("its file is shorter than it was: truncated"));
                }
                Ok(sealed)
            });
            match checked {
                Ok(sealed) => Arc::clone(&sealed.file),
                Err(e) if e.kind().is_of_host() => return Err(e),
                Err(e) => {
                    let missing = e.kind() == Kind::ParentMissing;
                    let what = if missing { What::ParentMissing } else { What::ParentChanged };
                    problems.note(Problem::new(what, format!("segment {}", row.segment), &e));
                    continue;
                }
            }
        };
        let extents = file.size()? / EXTENT;
        if i == sb.own_index && extents > FILE_EXTENTS_MAX {
            let reason = format!("it has {extents} extents, more than the largest disk needs");
            let error = Error::corrupt(reason).hint("cut the file back to what it was");
            let problem = Problem::new(What::Nonsense, "the segment file", &error);
            problems.note(Problem { remedy: Remedy::None, ..problem });
        }
        let extents = extents.min(FILE_EXTENTS_MAX);
        if i == sb.own_index && extents < sb.extents_end.0 {
            let reason =
                format!("it has {extents} extents, its superblock knows {}", sb.extents_end);
            let error = Error::corrupt(reason);
            problems.note(Problem::new(What::Truncated, "the segment file", &error));
        }
        rows[usize::from(i.get())] = Some(RowFile { file, base: row.base, extents });
    }
    Ok(rows)
}

/// A part of the map that cannot be used: what is wrong, and how it was seen.
struct Bad {
    what: What,
    error: Error,
}

impl Bad {
    /// Whatever is wrong with a part of the map, a repair can give it up.
    fn problem(&self, object: String) -> Problem {
        let problem = Problem::new(self.what, object, &self.error);
        Problem { remedy: Remedy::DropDamaged, ..problem }
    }
}

impl From<Error> for Bad {
    fn from(error: Error) -> Self {
        Bad { what: What::MapPage, error }
    }
}

/// A disk on its way into memory.
struct Loader<'a> {
    sb: &'a Superblock,
    rows: &'a [Option<RowFile>],
    how: How,
    map: Map,
    problems: Problems,
    damaged: Ranges,
    dropped: Ranges,
    mended: bool,
    dirty: LeafSet,
    /// Records that were found good and are not applied yet.
    waiting: Vec<Record>,
    /// Extents of the own segment that records took from the map; after replay, those of the tail
    /// only. The durable map may name them still.
    freed: Vec<ExtentId>,
    /// Virtual extents that had another own extent when a record gave them one, and the own extent
    /// that a record gave them last.
    moved: BTreeMap<GuestExtent, ExtentId>,
    hidden: bool,
    /// Leaves that records could not change.
    stale: LeafSet,
    /// Pages met so far, those of arrays included. Each has one place in the map, so that what a
    /// map takes in memory is bounded by the pages it has.
    seen: HashSet<(u16, u64)>,
    cursor: JournalHead,
    replayed: (u64, u64),
    missing: Option<Seq>,
}

impl Loader<'_> {
    fn leaf_count(&self) -> u64 {
        LeafNo::count_for(self.sb.virtual_size)
    }

    /// Extents that the own file has.
    fn own_extents(&self) -> u64 {
        let row = self.rows.get(usize::from(self.sb.own_index.get())).and_then(Option::as_ref);
        row.map_or(0, |r| r.extents)
    }

    /// The file and byte offset of a run of pages, checked against the file's length, and against
    /// pages met before.
    fn locate(&mut self, at: &PageRef, pages: u64) -> Result<(Arc<dyn File>, u64), Bad> {
        let row = self.rows.get(usize::from(at.segment.get())).and_then(Option::as_ref);
        let row =
            row.ok_or_else(|| Error::corrupt(format!("no segment behind row {}", at.segment)))?;
        let first = row.base.file_offset() + at.page.file_offset();
        if first + pages * PAGE as u64 > row.extents * EXTENT {
            let reason = format!("page {} lies past the end of its file", at.page);
            return Err(Error::corrupt(reason).into());
        }
        if at.segment == self.sb.own_index && at.page.extent() < self.sb.data_start() {
            let reason = format!("page {} lies before the data area", at.page);
            return Err(Error::corrupt(reason).into());
        }
        for page in at.page.0..at.page.0 + pages {
            if !self.seen.insert((at.segment.get(), page)) {
                let error = Error::corrupt(format!("map page {page} is used twice"));
                return Err(Bad { what: What::DoubleUse, error });
            }
        }
        Ok((Arc::clone(&row.file), first))
    }

    /// Loads the inner pages; what lies under those that cannot be used is lost.
    fn tree(&mut self) -> Result<Tree> {
        let mut host_error = None;
        let mut doubles = HashSet::new();
        let (tree, damage) = Tree::load(self.sb.root, &mut |at, buf| {
            let (file, offset) = self.locate(at, 1).map_err(|bad| {
                if bad.what == What::DoubleUse {
                    doubles.insert((at.segment, at.page));
                }
                bad.error
            })?;
            let mut aligned = AlignedBuf::zeroed(PAGE);
            if let Err(e) = file.read_at(offset, &mut aligned) {
                let reason = e.reason().to_owned();
                host_error.get_or_insert(e);
                return Err(Error::corrupt(reason));
            }
            buf.copy_from_slice(&aligned);
            Ok(())
        });
        if let Some(e) = host_error {
            return Err(e);
        }
        for d in damage {
            let double = doubles.contains(&(d.at.segment, d.at.page));
            let what = if double { What::DoubleUse } else { What::MapPage };
            let object = format!("inner map page {}", d.at.page);
            let end = d.first_leaf.0.saturating_add(d.leaves).min(self.leaf_count());
            self.hidden |= d.at.segment == self.sb.own_index;
            if d.first_leaf.0 >= end {
                let error = Error::corrupt("it lies past the end of the disk, and is damaged");
                self.problems.note(Problem::new(What::Nonsense, object, &error));
                self.mended |= self.how.on_damage == OnDamage::Zero;
                continue;
            }
            let bad = Bad { what, error: d.error };
            self.lose(d.first_leaf, end - d.first_leaf.0, (object, bad));
        }
        for (first, count) in tree.zero_leaves() {
            let end = (first.0 + count).min(self.leaf_count());
            (first.0..end).for_each(|l| self.map.install_whole(LeafNo(l), Whole::Zero));
        }
        Ok(tree)
    }

    /// Gives `count` leaves from `first` on up, or makes them unreadable.
    fn lose(&mut self, first: LeafNo, count: u64, (object, bad): (String, Bad)) {
        let offset = first.0 * LEAF_SPAN;
        let len = (count * LEAF_SPAN).min(self.sb.virtual_size.saturating_sub(offset));
        self.problems.note(bad.problem(object).costing(offset, len));
        let (block, blocks) = (first.first_extent().first_block(), count * LEAF_SPAN / BLOCK);
        let zero = self.how.on_damage == OnDamage::Zero;
        self.mended |= zero;
        let lost = if zero { &mut self.dropped } else { &mut self.damaged };
        lost.add(block, blocks);
        for leaf in (first.0..first.0 + count).map(LeafNo) {
            self.map.install_whole(leaf, if zero { Whole::Zero } else { Whole::Damaged });
            if zero {
                self.dirty.insert(leaf);
            }
        }
    }

    /// The tree without its damaged pages and without leaves past the end: what to write them over.
    fn without_damage(&self, tree: &Tree) -> Tree {
        let mut mended = Tree::default();
        let mut set = |leaf: LeafNo, ptr| {
            if leaf.0 < self.leaf_count() {
                mended.set_leaf(leaf, ptr).expect("a tree made here has no damage");
            }
        };
        for (first, count) in tree.zero_leaves() {
            let end = (first.0 + count).min(self.leaf_count());
            (first.0..end).for_each(|l| set(LeafNo(l), format::node::NodePtr::Zero));
        }
        for (leaf, at) in tree.leaves() {
            set(leaf, format::node::NodePtr::Page(at));
        }
        mended
    }

    /// What lies past the end of the disk would show when it is made larger.
    fn check_end(&mut self) -> Result<()> {
        let end = GuestBlock(self.sb.virtual_size.div_ceil(BLOCK));
        let leaf_end = LeafNo(self.leaf_count()).first_extent().first_block();
        let mut found: Option<GuestBlock> = None;
        for (first, count) in self.damaged.gaps(end, leaf_end) {
            self.map.resolve(first, count, &mut |piece| {
                if !piece.state.reads_zero() {
                    found.get_or_insert(piece.block);
                }
                Ok(())
            })?;
        }
        if let Some(block) = found {
            let object = format!("byte offset {}", block.offset());
            let error = Error::corrupt("the map holds data past the end of the disk");
            self.problems.note(Problem::new(What::Nonsense, object, &error));
            if self.how.on_damage == OnDamage::Zero {
                self.map.clear(end, leaf_end.0 - end.0, Whole::Hole, &mut |_, _| ())?;
                self.mended = true;
                self.dirty.insert(LeafNo(self.leaf_count() - 1));
            }
        }
        Ok(())
    }
}
