//! Checkpoints: the changed part of the map goes to new pages, and the superblock flips to it.
//!
//! Order, and the crash it defends against:
//! 1. the new head is the cursor of the last commit: replay from there must meet every record that
//!    a leaf copied later may lack — records may be applied twice, never left out;
//! 2. leaves are copied and written to unused pages: a power cut leaves the old map whole;
//! 3. a commit: its first sync makes the new pages, and the data that the copied leaves name,
//!    durable; its journal pages make every record that a copied leaf may already contain durable —
//!    else replay would go back in time for some blocks and not for others;
//! 4. the superblock flips to the new pages, and is synced;
//! 5. pages replaced by the checkpoint before are free now; those replaced by this one wait for the
//!    next, because the second pair of superblock copies is made durable only there.
//!
//! Test: `crash_points` (orders swapped: `crash_points::swapped_orders_are_caught`).

use format::array::ArrayRef;
use format::limits::{BLOCKS_PER_EXTENT, EXTENT, PAGE};
use format::node::{LeafBytes, NodePtr};
use format::superblock::{Attached, Superblock};
use format::tree::Tree;
use format::units::{ExtentId, Generation, PageNo, index};
use format::{Error, Kind, Result};

use super::leafset::LeafSet;
use super::map::Encoded;
use super::reserve::Source;
use super::{Checkpoint, Core, Disk};
use crate::segment;
use crate::store::WriteOp;
use crate::store::buf::AlignedBuf;

/// What a checkpoint has in hand before its pages are durable.
struct Draft {
    tree: Tree,
    source: Source,
    writes: Vec<(PageNo, AlignedBuf)>,
    taken: Vec<(PageNo, u8)>,
    replaced: Vec<(PageNo, u8)>,
}

impl Disk {
    /// Writes the changed part of the map and moves the journal's head up to now.
    ///
    /// # Errors
    /// `NoSpace` (nothing is lost; try again), or `Failed` when a sync or the superblock failed.
    pub fn checkpoint(&self) -> Result<()> {
        self.check_writable()?;
        self.await_ground()?;
        self.run_checkpoint(|_| ()).map_err(|e| e.within("make a checkpoint of", self.object()))?;
        self.reclaim();
        Ok(())
    }

    /// A checkpoint whose superblock gets further changes, all in one flip.
    pub(super) fn run_checkpoint(&self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        self.checkpoint_locked(&mut self.checkpoint.lock(), change)
    }

    /// The same for who holds the checkpoint lock already.
    pub(super) fn checkpoint_locked(
        &self,
        state: &mut Checkpoint,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<()> {
        self.check_alive()?;
        let head = self.commit.lock().cursor;
        let dirty = std::mem::take(&mut self.core.lock().dirty);
        let drafted = match self.draft(state, &dirty, Source::File) {
            Err(e) if e.kind() == Kind::NoSpace => {
                self.draft(state, &dirty, Source::Spare(None)).map_err(|_| e)
            }
            drafted => drafted,
        };
        let draft = drafted.inspect_err(|_| self.core.lock().dirty.extend(dirty.iter()))?;
        let mut sb = state.superblock.clone();
        sb.generation = sb.generation.next();
        sb.root = draft.tree.root();
        sb.journal = head;
        sb.extents_end = self.core.lock().space.end();
        change(&mut sb);
        let goes_on = sb.attached != Attached::No;
        self.flip(state, sb)?;
        {
            let mut commit = self.commit.lock();
            let ring = self.journal_pages;
            commit.used_pages = (commit.cursor.position + ring - head.position) % ring;
        }
        state.tree = draft.tree;
        let free = std::mem::replace(&mut state.graveyard, draft.replaced);
        self.drop_pages(&free);
        if goes_on {
            self.hold_spare();
        }
        Ok(())
    }

    /// Flips the superblock; a failure leaves an unknown state on disk and ends this opening.
    pub(super) fn flip(&self, state: &mut Checkpoint, sb: Superblock) -> Result<()> {
        segment::flip(self.file.as_ref(), &sb).map_err(|e| self.fail(e.tried("publish")))?;
        state.superblock = sb;
        Ok(())
    }

    /// After a checkpoint: makes all copies of the superblock hold its state, durably, which frees
    /// the pages that it replaced.
    pub(super) fn settle_copies(&self, state: &mut Checkpoint) -> Result<()> {
        segment::settle(self.file.as_ref()).map_err(|e| self.fail(e))?;
        let replaced = std::mem::take(&mut state.graveyard);
        self.drop_pages(&replaced);
        Ok(())
    }

    /// Steps 2 and 3: writes the changed leaves to pages from `source`, and commits.
    fn draft(&self, state: &Checkpoint, dirty: &LeafSet, source: Source) -> Result<Draft> {
        let (tree, writes) = (state.tree.clone(), Vec::new());
        let mut draft = Draft { tree, source, writes, taken: Vec::new(), replaced: Vec::new() };
        let generation = state.superblock.generation.next();
        let outcome = self
            .fill_draft(&mut draft, generation, dirty)
            .and_then(|()| self.write_draft(&draft))
            .and_then(|()| self.commit_once());
        match (outcome, draft.source) {
            (Ok(()), _) => Ok(draft),
            (Err(e), Source::File) => {
                self.drop_pages(&draft.taken);
                Err(e)
            }
            (Err(e), Source::Spare(_)) => {
                self.put_back_spare(&draft.taken);
                Err(e)
            }
        }
    }

    fn fill_draft(&self, draft: &mut Draft, generation: Generation, dirty: &LeafSet) -> Result<()> {
        for leaf in dirty.iter() {
            let mut core = self.core.lock();
            let Some(encoded) = self.map.encode(leaf) else { continue };
            let ptr = match encoded {
                Encoded::Whole(ptr) => ptr,
                Encoded::Leaf(bytes) => self.place_leaf(&mut core, draft, bytes, generation)?,
            };
            drop(core);
            let unreadable = |_| Error::corrupt("the map page above a changed leaf is damaged");
            let old = draft.tree.leaf(leaf).map_err(unreadable)?;
            if let NodePtr::Page(at) = old
                && at.segment == self.map.own()
            {
                draft.replaced.push((at.page, 1));
                draft.replaced.extend(at.vectors.map(|v| (v.page, v.count)));
            }
            draft.tree.set_leaf(leaf, ptr).map_err(unreadable)?;
        }
        let mut core = self.core.lock();
        let Draft { tree, source, taken, .. } = draft;
        let written = tree.write_dirty(self.map.own(), generation, &mut || {
            let page = self.take_pages(&mut core, source, 1)?;
            taken.push((page, 1));
            Ok(page)
        })?;
        let pages = written.pages.iter().map(|(page, b)| (*page, AlignedBuf::from_slice(b)));
        draft.writes.extend(pages);
        draft.replaced.extend(written.replaced.into_iter().map(|page| (page, 1)));
        Ok(())
    }

    fn place_leaf(
        &self,
        core: &mut Core,
        draft: &mut Draft,
        bytes: LeafBytes,
        generation: Generation,
    ) -> Result<NodePtr> {
        let page = self.take_pages(core, &mut draft.source, 1)?;
        draft.taken.push((page, 1));
        let count = bytes.vector_pages();
        let mut vectors = None;
        if count > 0 {
            let run = self.take_pages(core, &mut draft.source, count)?;
            draft.taken.push((run, count));
            draft.writes.push((run, AlignedBuf::from_slice(&bytes.vectors)));
            vectors = Some(run);
        }
        draft.writes.push((page, AlignedBuf::from_slice(bytes.page.as_slice())));
        Ok(NodePtr::Page(bytes.pointer(self.map.own(), page, vectors, generation)))
    }

    fn take_pages(&self, core: &mut Core, source: &mut Source, count: u8) -> Result<PageNo> {
        if let Source::Spare(next) = source {
            return Self::take_spare(core, next, count);
        }
        let page = core.space.take_pages(count)?;
        self.grow(core, page.extent().0 + 1).inspect_err(|_| {
            if let Some(extent) = core.space.give_back_pages(page, count) {
                core.space.give_back(extent);
            }
        })?;
        Ok(page)
    }

    fn write_draft(&self, draft: &Draft) -> Result<()> {
        let ops: Vec<WriteOp<'_>> = draft
            .writes
            .iter()
            .map(|(page, buf)| WriteOp { offset: page.file_offset(), buf })
            .collect();
        self.file.write_many(&ops)
    }

    /// Pages that nothing durable names are free; an extent without pages goes the way of all
    /// space.
    pub(super) fn drop_pages(&self, pages: &[(PageNo, u8)]) {
        let mut core = self.core.lock();
        for (page, count) in pages {
            if let Some(extent) = core.space.give_back_pages(*page, *count) {
                self.retire(&mut core, extent);
            }
        }
    }

    /// An array that nothing durable names goes the way of all pages.
    pub(super) fn drop_array(&self, at: ArrayRef) {
        let end = at.page.0 + at.pages();
        let mut pages = Vec::new();
        let mut page = at.page;
        while page.0 < end {
            let count = (page.extent().next().first_page().0).min(end) - page.0;
            pages.push((page, u8::try_from(count).unwrap_or(u8::MAX)));
            page = page.plus(count);
        }
        self.drop_pages(&pages);
    }

    /// Writes a checksummed array into fresh extents; the caller syncs and then names it.
    pub(super) fn write_array(&self, content: &[u8]) -> Result<ArrayRef> {
        let pages = format::array::pages_for(content.len() as u64);
        if pages == 0 {
            return Ok(ArrayRef::default());
        }
        let first = {
            let mut core = self.core.lock();
            let run = core.space.take_run(format::space::extents_for_pages(pages))?;
            if let Err(e) = self.grow(&mut core, run.first.0 + run.count) {
                (0..run.count).for_each(|i| core.space.give_back(run.first.plus(i)));
                return Err(e);
            }
            // As an opening finds them: what is left of the last extent is there for map pages.
            let mut left = pages;
            for extent in (0..run.count).map(|i| run.first.plus(i)) {
                let here = left.min(BLOCKS_PER_EXTENT);
                core.space.hold_pages(extent.first_page(), u8::try_from(here).unwrap_or(u8::MAX));
                left -= here;
            }
            run.first
        };
        let (bytes, at) = format::array::encode(content, first.first_page());
        for (i, chunk) in bytes.chunks(index(EXTENT) * 16).enumerate() {
            let offset = first.file_offset() + (i * index(EXTENT) * 16) as u64;
            self.file.write_at(offset, &AlignedBuf::from_slice(chunk))?;
        }
        debug_assert!(bytes.len() % PAGE == 0 && at.page.extent() >= ExtentId(0));
        Ok(at)
    }
}
