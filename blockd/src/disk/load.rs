//! From a segment file to a disk in memory: superblock, segment table, parents, map, journal, tail,
//! space. Opening, checking and repairing all come through here.
//!
//! Invariants:
//! - Nothing is written.
//! - Content decides nothing unchecked: whatever the file says becomes a value, a [`Problem`], or an
//!   error; never a panic, and never memory out of proportion to the file.
//! - The space map is rebuilt from what the map names after replay, so it cannot disagree with it.

use std::collections::BTreeSet;
use std::sync::Arc;

use format::entry::{BlockState, Entry};
use format::journal::{Record, Replay, Step};
use format::limits::{EXTENT, LEAF_ENTRIES, LEAF_SPAN, PAGE, SEGMENTS_MAX};
use format::node::{Leaf, PageRef};
use format::space::SpaceMap;
use format::superblock::{Attached, JournalHead, Superblock};
use format::table::{ROW_BYTES, SegmentTable};
use format::tree::Tree;
use format::units::{ExtentId, GuestExtent, LeafNo, SegmentIdx, index};
use format::{Context, Error, Kind, Result};

use super::map::{Map, Whole};
use super::problem::{Problem, What};
use super::tail::Tail;
use crate::segment::{self, Segments, page};
use crate::store::buf::AlignedBuf;
use crate::store::{File, ReadOp};

/// Leaves read in one batch: 64 leaves with all their vectors are 4.25 MiB.
const LEAF_BATCH: usize = 64;
/// Journal pages read in one batch: 1 MiB.
const JOURNAL_BATCH: u64 = 256;

/// The file behind one row of the segment table.
#[derive(Clone)]
pub struct RowFile {
    /// The file.
    pub file: Arc<dyn File>,
    /// Added to every extent number.
    pub base: ExtentId,
    /// Length of the file in extents, rounded down.
    pub extents: u64,
}

/// A disk in memory, as its segment and its parents say.
pub struct Loaded {
    /// The newest superblock.
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
    /// Leaves that replay changed.
    pub dirty: BTreeSet<LeafNo>,
    /// Records replayed, from the journal and from the tail.
    pub replayed: (u64, u64),
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// Loads a disk. `tail` is what a killed process left behind, if anything.
///
/// # Errors
/// When the superblock or the segment table cannot be used, or the host reports an error.
pub fn load(file: &Arc<dyn File>, segments: &dyn Segments, tail: Option<&Tail>) -> Result<Loaded> {
    let chosen = segment::read_superblock(file.as_ref())?;
    let mut problems = Vec::new();
    for (copy, error) in chosen.complaints.iter().enumerate() {
        if let Some(error) = error {
            let object = format!("superblock copy {copy}");
            problems.push(Problem::new(What::SuperblockCopy, object, error));
        }
    }
    load_state(file, chosen.superblock, segments, tail, problems)
}

/// Loads the state that `sb` describes: the newest, or for a repair an older one.
///
/// # Errors
/// As [`load`].
pub fn load_state(
    file: &Arc<dyn File>,
    sb: Superblock,
    segments: &dyn Segments,
    tail: Option<&Tail>,
    mut problems: Vec<Problem>,
) -> Result<Loaded> {
    let table = load_table(file.as_ref(), &sb)?;
    let rows = open_rows(file, &sb, &table, segments, &mut problems)?;
    let mut loader = Loader { rows: &rows, problems: &mut problems, size: sb.virtual_size };
    let map = Map::new(sb.own_index);
    let tree = loader.tree(&sb, &map);
    loader.leaves(&tree, &map)?;
    let mut loaded = Loaded {
        cursor: sb.journal,
        space: SpaceMap::new(sb.data_start()),
        dirty: BTreeSet::new(),
        replayed: (0, 0),
        superblock: sb,
        table,
        rows,
        tree,
        map,
        problems,
    };
    loaded.replay_journal(file.as_ref())?;
    if let Some(tail) = tail {
        loaded.replay_tail(tail)?;
    }
    loaded.rebuild_space(file.as_ref())?;
    Ok(loaded)
}

fn load_table(file: &dyn File, sb: &Superblock) -> Result<SegmentTable> {
    let bytes = segment::read_array(file, sb.table, (SEGMENTS_MAX * ROW_BYTES) as u64)
        .context("read", || "the segment table".into())?;
    let table = SegmentTable::decode(&bytes)?;
    if table.row(sb.own_index)?.segment != sb.segment {
        return Err(Error::corrupt("the segment table does not name its own segment"));
    }
    Ok(table)
}

fn open_rows(
    own: &Arc<dyn File>,
    sb: &Superblock,
    table: &SegmentTable,
    segments: &dyn Segments,
    problems: &mut Vec<Problem>,
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
                Ok(sealed)
            });
            match checked {
                Ok(sealed) => Arc::clone(&sealed.file),
                Err(e) if e.kind() == Kind::Io => return Err(e),
                Err(e) => {
                    let missing = e.kind() == Kind::ParentMissing;
                    let what = if missing { What::ParentMissing } else { What::ParentChanged };
                    problems.push(Problem::new(what, format!("segment {}", row.segment), &e));
                    continue;
                }
            }
        };
        let extents = file.size()? / EXTENT;
        rows[usize::from(i.get())] = Some(RowFile { file, base: row.base, extents });
    }
    Ok(rows)
}

/// The file and byte offset of a page, checked against the file's length.
fn locate(rows: &[Option<RowFile>], at: &PageRef, pages: u64) -> Result<(Arc<dyn File>, u64)> {
    let row = rows.get(usize::from(at.segment.get())).and_then(Option::as_ref);
    let row = row.ok_or_else(|| Error::corrupt(format!("no segment behind row {}", at.segment)))?;
    let first = row.base.file_offset() + at.page.file_offset();
    if first + pages * PAGE as u64 > row.extents * EXTENT {
        return Err(Error::corrupt(format!("page {} lies past the end of its file", at.page)));
    }
    Ok((Arc::clone(&row.file), first))
}

struct Loader<'a> {
    rows: &'a [Option<RowFile>],
    problems: &'a mut Vec<Problem>,
    size: u64,
}

impl Loader<'_> {
    fn leaf_count(&self) -> u64 {
        LeafNo::count_for(self.size)
    }

    fn tree(&mut self, sb: &Superblock, map: &Map) -> Tree {
        let (tree, damage) = Tree::load(sb.root, &mut |at, buf| {
            let (file, offset) = locate(self.rows, at, 1)?;
            let mut aligned = AlignedBuf::zeroed(PAGE);
            file.read_at(offset, &mut aligned)?;
            buf.copy_from_slice(&aligned);
            Ok(())
        });
        for d in damage {
            let leaves = self.leaf_count().saturating_sub(d.first_leaf.0).min(d.leaves);
            let object = format!("inner map page {}", d.at.page);
            self.problems.push(
                Problem::new(What::MapPage, object, &d.error)
                    .costing(d.first_leaf.0 * LEAF_SPAN, leaves * LEAF_SPAN),
            );
            for leaf in (d.first_leaf.0..d.first_leaf.0 + leaves).map(LeafNo) {
                map.install_whole(leaf, Whole::Damaged);
            }
        }
        for (first, count) in tree.zero_leaves() {
            let end = (first.0 + count).min(self.leaf_count());
            (first.0..end).for_each(|l| map.install_whole(LeafNo(l), Whole::Zero));
        }
        tree
    }

    fn leaves(&mut self, tree: &Tree, map: &Map) -> Result<()> {
        let mut all = tree.leaves();
        loop {
            let batch: Vec<(LeafNo, PageRef)> = all.by_ref().take(LEAF_BATCH).collect();
            if batch.is_empty() {
                return Ok(());
            }
            for ((leaf, at), bytes) in batch.iter().zip(self.read_leaves(&batch)?) {
                self.install(*leaf, at, bytes, map);
            }
        }
    }

    /// Reads leaf pages with their vector runs. A host error fails the whole load: it is not the
    /// content that is wrong, and it may pass.
    fn read_leaves(&self, batch: &[(LeafNo, PageRef)]) -> Result<Vec<Result<LeafPages>>> {
        let mut found: Vec<Result<LeafPages>> = batch
            .iter()
            .map(|(_, at)| {
                let (file, page_at) = locate(self.rows, at, 1)?;
                let vectors = at.vectors.map_or(0, |v| usize::from(v.count));
                Ok(LeafPages {
                    page: AlignedBuf::zeroed(PAGE),
                    vectors: AlignedBuf::zeroed(vectors * PAGE),
                    file,
                    page_at,
                })
            })
            .collect();
        let mut ops: Vec<(Arc<dyn File>, ReadOp<'_>)> = Vec::new();
        for (pages, (_, at)) in found.iter_mut().zip(batch) {
            let Ok(pages) = pages else { continue };
            let file = Arc::clone(&pages.file);
            ops.push((file, ReadOp { offset: pages.page_at, buf: &mut pages.page }));
            if let Some(run) = at.vectors {
                let run_at = PageRef { page: run.page, ..*at };
                if let Ok((file, offset)) = locate(self.rows, &run_at, run.count.into()) {
                    ops.push((file, ReadOp { offset, buf: &mut pages.vectors }));
                }
            }
        }
        read_by_file(ops)?;
        Ok(found)
    }

    fn install(&mut self, leaf: LeafNo, at: &PageRef, pages: Result<LeafPages>, map: &Map) {
        let offset = leaf.0 * LEAF_SPAN;
        let object = format!("map leaf at byte offset {offset}");
        if leaf.0 >= self.leaf_count() {
            let error = Error::corrupt("it lies past the end of the disk");
            return self.problems.push(Problem::new(What::Nonsense, object, &error));
        }
        let decoded = pages.and_then(|p| {
            let bytes = page(&p.page, 0);
            match Leaf::decode(at, &bytes, &p.vectors) {
                Ok(stored) => Ok((stored, None)),
                // The leaf page may be whole although its vectors are not.
                Err(e) => Leaf::decode_entries(at, &bytes).map(|stored| (stored, Some(e))),
            }
        });
        match decoded {
            Err(e) => {
                let problem = Problem::new(What::MapPage, object, &e).costing(offset, LEAF_SPAN);
                self.problems.push(problem);
                map.install_whole(leaf, Whole::Damaged);
            }
            Ok((stored, vectors_error)) => {
                if let Err((what, e)) = self.check_targets(&stored) {
                    let problem = Problem::new(what, object.clone(), &e).costing(offset, LEAF_SPAN);
                    self.problems.push(problem);
                    return map.install_whole(leaf, Whole::Damaged);
                }
                map.install(leaf, &stored, vectors_error.is_some());
                if let Some(e) = vectors_error {
                    self.mixed_lost(leaf, &stored, &e);
                }
            }
        }
    }

    fn mixed_lost(&mut self, leaf: LeafNo, stored: &Leaf, error: &Error) {
        for (i, entry) in stored.entries.iter().enumerate() {
            if matches!(entry, Entry::Mixed { .. }) {
                let offset = leaf.first_extent().plus(i as u64).0 * EXTENT;
                let object = format!("block vector at byte offset {offset}");
                let problem = Problem::new(What::MapPage, object, error).costing(offset, EXTENT);
                self.problems.push(problem);
            }
        }
    }

    /// Every segment and extent that a leaf names must exist.
    fn check_targets(&self, leaf: &Leaf) -> std::result::Result<(), (What, Error)> {
        let check = |segment: SegmentIdx, extent: ExtentId| {
            match self.rows.get(usize::from(segment.get())) {
                None => {
                    let e = Error::corrupt(format!("the segment table has no row {segment}"));
                    Err((What::Nonsense, e))
                }
                // A missing parent is a problem of its own.
                Some(None) => Ok(()),
                Some(Some(row)) if row.base.0 + extent.0 < row.extents => Ok(()),
                Some(Some(_)) => {
                    let e =
                        Error::corrupt(format!("extent {extent} lies past the end of its file"));
                    Err((What::Truncated, e))
                }
            }
        };
        for i in 0..LEAF_ENTRIES {
            match leaf.entries[i] {
                Entry::Uniform { segment, extent } => check(segment, extent)?,
                Entry::Mixed { slot } if usize::from(slot) < leaf.vectors.len() => {
                    for state in &leaf.vectors[usize::from(slot)] {
                        if let BlockState::Data { segment, block } = state {
                            check(*segment, block.extent())?;
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

struct LeafPages {
    page: AlignedBuf,
    vectors: AlignedBuf,
    file: Arc<dyn File>,
    page_at: u64,
}

fn read_by_file(mut ops: Vec<(Arc<dyn File>, ReadOp<'_>)>) -> Result<()> {
    ops.sort_by_key(|(file, op)| (Arc::as_ptr(file).cast::<()>(), op.offset));
    let mut ops = ops.into_iter().peekable();
    while let Some((file, op)) = ops.next() {
        let mut batch = vec![op];
        while let Some((_, op)) = ops.next_if(|(f, _)| Arc::ptr_eq(f, &file)) {
            batch.push(op);
        }
        file.read_many(&mut batch)?;
    }
    Ok(())
}

impl Loaded {
    fn replay_journal(&mut self, file: &dyn File) -> Result<()> {
        if self.superblock.attached == Attached::No {
            return Ok(());
        }
        let ring = read_ring(file, &self.superblock)?;
        let mut replay = Replay::new(&self.superblock);
        let ring_page = |position: u64| page(&ring, index(position));
        while let Step::Records(records) = replay.feed(&ring_page(replay.at().position))? {
            self.replayed.0 += records.len() as u64;
            records.iter().try_for_each(|r| self.apply(r, file))?;
        }
        self.cursor = replay.at();
        let pages = self.superblock.journal_pages();
        if (0..pages).any(|p| replay.proves_loss(&ring_page(p))) {
            let seq = self.cursor.seq;
            let e = Error::corrupt(format!("durable records from number {seq} on are unreadable"));
            self.problems.push(Problem::new(What::JournalLoss, "the journal", &e));
        }
        Ok(())
    }

    fn replay_tail(&mut self, tail: &Tail) -> Result<()> {
        let from = self.cursor.seq;
        if tail.next() <= from {
            return Ok(());
        }
        let own = self.superblock.own_index.get();
        let file = self.rows[usize::from(own)].as_ref().map(|r| Arc::clone(&r.file));
        let file = file.expect("the own file is open");
        for record in tail.records(from, tail.next())? {
            self.apply(&record, file.as_ref())?;
            self.replayed.1 += 1;
        }
        Ok(())
    }

    fn apply(&mut self, record: &Record, file: &dyn File) -> Result<()> {
        let (block, count) = record.range();
        let blocks = self.superblock.virtual_size.div_ceil(format::limits::BLOCK);
        if block.0 + count > blocks {
            return Err(Error::corrupt("a journal record lies past the end of the disk"));
        }
        let outcome = match *record {
            Record::Zero { .. } => self.map.clear(block, count, Whole::Zero, &mut |_, _| ()),
            Record::Map { target, .. } => {
                if (target.0 + count).div_ceil(16) > file.size()? / EXTENT {
                    let e = Error::corrupt("a journal record points past the end of its file");
                    self.problems.push(Problem::new(What::Truncated, "the journal", &e));
                    return Ok(());
                }
                let mut done = 0;
                let mut outcome = Ok(());
                while done < count && outcome.is_ok() {
                    let at = block.plus(done);
                    let n = (16 - at.in_extent() as u64).min(count - done);
                    let extent = target.plus(done).extent();
                    outcome = self.map.set_own(at, index(n), extent).map(|_| ());
                    done += n;
                }
                outcome
            }
        };
        // A record for a damaged range changes nothing: the range stays unreadable.
        if outcome.is_ok() {
            let last = GuestExtent((block.0 + count - 1) / 16).leaf();
            self.dirty.extend((block.extent().leaf().0..=last.0).map(LeafNo));
        }
        Ok(())
    }

    fn rebuild_space(&mut self, file: &dyn File) -> Result<()> {
        let sb = &self.superblock;
        let space = &mut self.space;
        let mut doubles: Vec<(String, Error)> = Vec::new();
        let mut note = |object: &dyn Fn() -> String, outcome: Result<()>| {
            if let Err(e) = outcome {
                doubles.push((object(), e));
            }
        };
        for (what, array) in [("segment table", sb.table), ("data checksums", sb.sums)] {
            if array.page.plus(array.pages()).file_offset() > file.size()? {
                note(&|| what.into(), Err(Error::corrupt("it lies past the end of its file")));
            } else if !array.is_empty() {
                note(&|| what.into(), space.claim_pages(array.page, array.pages()));
            }
        }
        for at in self.tree.pages().filter(|at| at.segment == sb.own_index) {
            let object = || format!("inner map page {}", at.page);
            note(&object, space.claim_pages(at.page, 1));
        }
        for (leaf, at) in self.tree.leaves() {
            if at.segment == sb.own_index {
                let object = || format!("map leaf {leaf}");
                note(&object, space.claim_pages(at.page, 1));
                if let Some(run) = at.vectors {
                    note(&object, space.claim_pages(run.page, run.count.into()));
                }
            }
        }
        for leaf in (0..LeafNo::count_for(sb.virtual_size)).map(LeafNo) {
            for (extent, own) in self.map.own_extents(leaf).unwrap_or_default() {
                note(&|| format!("byte offset {}", extent.0 * EXTENT), space.claim(own));
            }
        }
        for (object, e) in doubles {
            self.problems.push(Problem::new(What::DoubleUse, object, &e));
        }
        Ok(())
    }
}

fn read_ring(file: &dyn File, sb: &Superblock) -> Result<AlignedBuf> {
    let pages = sb.journal_pages();
    let end = sb.journal_offset(0) + pages * PAGE as u64;
    if end > file.size()? {
        return Err(Error::corrupt("the journal lies past the end of its file: truncated"));
    }
    let mut ring = AlignedBuf::zeroed(index(pages) * PAGE);
    let mut ops: Vec<ReadOp<'_>> = ring
        .chunks_mut(index(JOURNAL_BATCH) * PAGE)
        .zip((0..pages).step_by(index(JOURNAL_BATCH)))
        .map(|(buf, position)| ReadOp { offset: sb.journal_offset(position), buf })
        .collect();
    file.read_many(&mut ops).context("read", || "the journal".into())?;
    Ok(ring)
}
