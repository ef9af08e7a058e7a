//! Leaves and their vectors: reading, checking what they name, and what becomes of damaged ones.

use std::sync::Arc;

use format::entry::{BlockState, Entry, Vector};
use format::limits::{EXTENT, EXTENT_BLOCKS, LEAF_ENTRIES, LEAF_SPAN, PAGE};
use format::node::{Leaf, PageRef};
use format::tree::Tree;
use format::units::{ExtentId, GuestExtent, LeafNo, SegmentIdx};
use format::{Error, Result};

use super::{Bad, Loader, OnDamage};
use crate::disk::map::Whole;
use crate::disk::problem::{Problem, What};
use crate::segment::page;
use crate::store::buf::AlignedBuf;
use crate::store::{File, ReadOp};

/// Leaves read in one batch: 64 leaves with all their vectors are 4.25 MiB.
const LEAF_BATCH: usize = 64;

/// A leaf page and its vector run.
struct LeafPages {
    file: Arc<dyn File>,
    page_at: u64,
    page: AlignedBuf,
    vectors: Result<Vectors, Bad>,
}

struct Vectors {
    at: u64,
    run: AlignedBuf,
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

impl Loader<'_> {
    /// Loads all leaves that the inner pages name.
    pub(super) fn leaves(&mut self, tree: &Tree) -> Result<()> {
        let mut all = tree.leaves();
        loop {
            let batch: Vec<(LeafNo, PageRef)> = all.by_ref().take(LEAF_BATCH).collect();
            if batch.is_empty() {
                return Ok(());
            }
            for ((leaf, at), pages) in batch.iter().zip(self.read_leaves(&batch)?) {
                self.install(*leaf, at, pages);
            }
        }
    }

    /// Reads leaf pages with their vector runs.
    fn read_leaves(&mut self, batch: &[(LeafNo, PageRef)]) -> Result<Vec<Result<LeafPages, Bad>>> {
        let mut found: Vec<Result<LeafPages, Bad>> = batch
            .iter()
            .map(|(_, at)| {
                let (file, page_at) = self.locate(at, 1)?;
                let vectors = match at.vectors {
                    None => Ok(Vectors { at: 0, run: AlignedBuf::zeroed(0) }),
                    Some(run) => {
                        let run_at = PageRef { page: run.page, ..*at };
                        let bytes = usize::from(run.count) * PAGE;
                        let located = self.locate(&run_at, run.count.into());
                        located.map(|(_, at)| Vectors { at, run: AlignedBuf::zeroed(bytes) })
                    }
                };
                Ok(LeafPages { page: AlignedBuf::zeroed(PAGE), file, page_at, vectors })
            })
            .collect();
        let mut ops: Vec<(Arc<dyn File>, ReadOp<'_>)> = Vec::new();
        for pages in found.iter_mut().flatten() {
            let file = &pages.file;
            ops.push((Arc::clone(file), ReadOp { offset: pages.page_at, buf: &mut pages.page }));
            if let Ok(vectors) = &mut pages.vectors
                && !vectors.run.is_empty()
            {
                let op = ReadOp { offset: vectors.at, buf: &mut vectors.run };
                ops.push((Arc::clone(file), op));
            }
        }
        read_by_file(ops)?;
        Ok(found)
    }

    fn install(&mut self, leaf: LeafNo, at: &PageRef, pages: Result<LeafPages, Bad>) {
        let own = at.segment == self.sb.own_index;
        let object = format!("map leaf at byte offset {}", leaf.0 * LEAF_SPAN);
        if leaf.0 >= self.leaf_count() {
            let error = Error::corrupt("it lies past the end of the disk");
            self.hidden |= own;
            self.mended |= self.how.on_damage == OnDamage::Zero;
            return self.problems.note(Problem::new(What::Nonsense, object, &error));
        }
        let decoded = pages.and_then(|pages| {
            let bytes = page(&pages.page, 0);
            let whole =
                pages.vectors.and_then(|v| Leaf::decode(at, &bytes, &v.run).map_err(Bad::from));
            match whole {
                Ok(stored) => Ok((stored, None)),
                // The leaf page may be whole although its vectors are not.
                Err(bad) => Ok((Leaf::decode_entries(at, &bytes)?, Some(bad))),
            }
        });
        let mixed = |stored: &Leaf| stored.entries.iter().any(|e| matches!(e, Entry::Mixed { .. }));
        let (mut stored, bad) = match decoded {
            Ok((stored, Some(bad))) if !mixed(&stored) => {
                // Nothing needs the run, and the next change of the leaf leaves it out.
                self.problems.note(bad.problem(object));
                if self.how.on_damage == OnDamage::Zero {
                    self.mended = true;
                    self.dirty.insert(leaf);
                }
                (stored, None)
            }
            Ok(decoded) => decoded,
            Err(bad) => {
                self.hidden |= own;
                return self.lose(leaf, 1, (object, bad));
            }
        };
        let mut vectors_damaged = false;
        if let Some(bad) = bad {
            self.hidden |= own;
            vectors_damaged = self.how.on_damage == OnDamage::Keep;
            self.lose_vectors(leaf, &mut stored, &bad);
        }
        self.check_targets(leaf, &mut stored);
        match stored.entries[0] {
            Entry::Hole if stored.entries.iter().all(|e| *e == Entry::Hole) => {}
            Entry::Zero if stored.entries.iter().all(|e| *e == Entry::Zero) => {
                self.map.install_whole(leaf, Whole::Zero);
            }
            _ => self.map.install(leaf, &stored, vectors_damaged),
        }
    }

    /// The mixed extents of a leaf have lost their vectors.
    fn lose_vectors(&mut self, leaf: LeafNo, stored: &mut Leaf, bad: &Bad) {
        stored.vectors.clear();
        for (i, entry) in stored.entries.iter_mut().enumerate() {
            if !matches!(entry, Entry::Mixed { .. }) {
                continue;
            }
            let extent = leaf.first_extent().plus(i as u64);
            let object = format!("block vector at byte offset {}", extent.0 * EXTENT);
            self.problems.note(bad.problem(object).costing(extent.0 * EXTENT, EXTENT));
            if self.how.on_damage == OnDamage::Zero {
                *entry = Entry::Zero;
                self.mended = true;
                self.dropped.add(extent.first_block(), EXTENT_BLOCKS as u64);
                self.dirty.insert(leaf);
            } else {
                self.damaged.add(extent.first_block(), EXTENT_BLOCKS as u64);
            }
        }
    }

    /// Every segment and extent that a leaf names must exist, and a virtual extent owns one extent
    /// at most. What breaks this fails by itself when it is read.
    fn check_targets(&mut self, leaf: LeafNo, stored: &mut Leaf) {
        for i in 0..LEAF_ENTRIES {
            let extent = leaf.first_extent().plus(i as u64);
            match stored.entries[i] {
                Entry::Uniform { segment, extent: target } => {
                    if let Err(bad) = self.check_target(segment, target)
                        && self.lose_blocks(extent, 0, EXTENT_BLOCKS, &bad)
                    {
                        stored.entries[i] = Entry::Zero;
                    }
                }
                Entry::Mixed { slot } => {
                    if let Some(vector) = stored.vectors.get_mut(usize::from(slot)) {
                        self.check_vector(extent, vector);
                    }
                }
                Entry::Hole | Entry::Zero => {}
            }
        }
    }

    fn check_vector(&mut self, extent: GuestExtent, vector: &mut Vector) {
        let mut owned: Option<ExtentId> = None;
        for (b, state) in vector.iter_mut().enumerate() {
            let BlockState::Data { segment, block } = *state else { continue };
            let target = block.extent();
            let mut checked = self.check_target(segment, target);
            if checked.is_ok() && segment == self.sb.own_index {
                let first = *owned.get_or_insert(target);
                if first != target {
                    let reason = format!("it owns two extents, {first} and {target}");
                    checked = Err(Bad { what: What::Nonsense, error: Error::corrupt(reason) });
                }
            }
            if let Err(bad) = checked
                && self.lose_blocks(extent, b, 1, &bad)
            {
                *state = BlockState::Zero;
            }
        }
    }

    fn check_target(&self, segment: SegmentIdx, extent: ExtentId) -> Result<(), Bad> {
        match self.rows.get(usize::from(segment.get())) {
            None => {
                let error = Error::corrupt(format!("the segment table has no row {segment}"));
                Err(Bad { what: What::Nonsense, error })
            }
            // A missing parent is a problem of its own.
            Some(None) => Ok(()),
            Some(_) if segment == self.sb.own_index && extent < self.sb.data_start() => {
                let error = Error::corrupt(format!("extent {extent} lies before the data area"));
                Err(Bad { what: What::Nonsense, error })
            }
            Some(Some(row)) if row.base.0 + extent.0 < row.extents => Ok(()),
            Some(Some(_)) => {
                let error =
                    Error::corrupt(format!("extent {extent} lies past the end of its file"));
                Err(Bad { what: What::Truncated, error })
            }
        }
    }

    /// Notes that blocks of an extent name what is not there. True when they are given up.
    pub(super) fn lose_blocks(
        &mut self,
        extent: GuestExtent,
        first: usize,
        count: usize,
        bad: &Bad,
    ) -> bool {
        let block = extent.first_block().plus(first as u64);
        let object = format!("map entry at byte offset {}", block.offset());
        let len = count as u64 * format::limits::BLOCK;
        self.problems.note(bad.problem(object).costing(block.offset().0, len));
        if self.how.on_damage != OnDamage::Zero {
            return false;
        }
        self.mended = true;
        self.dropped.add(block, count as u64);
        self.dirty.insert(extent.leaf());
        true
    }
}
