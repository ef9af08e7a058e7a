//! Replay: the records of the journal, then those of the tail, over the map as it was stored.
//!
//! Invariants:
//! - Records are applied in order up to the first one that is missing or impossible; that something
//!   is missing is a problem, never silence.
//! - A record changes nothing of a leaf that is damaged, which is a problem of its own: a later
//!   checkpoint would put the record behind the journal's head, and the write would be lost for
//!   good.
//!
//! The last commit of the journal is the exception to the first: damage to it looks like a commit
//! that a power cut stopped (`docs/format.md` §7).

use format::entry::BlockState;
use format::journal::{Record, Replay, Step};
use format::limits::{BLOCK, EXTENT_BLOCKS, LEAF_SPAN, PAGE};
use format::superblock::{Attached, Superblock};
use format::units::{ExtentId, GuestBlock, LeafNo, index};
use format::{Context, Error, Kind, Result};

use super::{Bad, Loader};
use crate::disk::map::Whole;
use crate::disk::problem::{Problem, What};
use crate::disk::tail::Tail;
use crate::segment::page;
use crate::store::File;
use crate::store::buf::AlignedBuf;

/// Journal pages read in one batch: 1 MiB.
const JOURNAL_BATCH: u64 = 256;
/// Blocks that one record maps, at most: a leaf's. What a record takes in memory stays in
/// proportion to it.
const MAP_BLOCKS_MAX: u64 = LEAF_SPAN / BLOCK;

/// Records that are applied in one go: 2 MiB.
const WAITING_MAX: usize = 1 << 16;

/// Calls `visit` with the pages of the ring, from the head on once around.
fn each_page(
    file: &dyn File,
    sb: &Superblock,
    visit: &mut dyn FnMut(&[u8; PAGE]) -> Result<()>,
) -> Result<()> {
    let (pages, head) = (sb.journal_pages(), sb.journal.position);
    if sb.journal_offset(pages) > file.size()? {
        return Err(Error::corrupt("the journal lies past the end of its file: truncated"));
    }
    let mut buf = AlignedBuf::zeroed(index(JOURNAL_BATCH.min(pages)) * PAGE);
    let mut read = |from: u64, to: u64| -> Result<()> {
        let mut at = from;
        while at < to {
            let count = JOURNAL_BATCH.min(to - at);
            let batch = &mut buf[..index(count) * PAGE];
            file.read_at(sb.journal_offset(at), batch).context("read", || "the journal".into())?;
            (0..index(count)).try_for_each(|i| visit(&page(batch, i)))?;
            at += count;
        }
        Ok(())
    };
    read(head, pages)?;
    read(0, head)
}

impl Loader<'_> {
    /// Replays the journal, and finds out whether a part of it is missing.
    pub(super) fn replay_journal(&mut self, file: &dyn File) -> Result<()> {
        let sb = self.sb;
        let clean = sb.attached == Attached::No;
        if clean && !self.how.search_ring {
            return Ok(());
        }
        let mut replay = Replay::new(sb);
        let mut ended = clean;
        let mut loss: Option<Error> = None;
        each_page(file, sb, &mut |page| {
            let before = replay.at();
            if !ended {
                match self.replay_page(&mut replay, page) {
                    Ok(goes_on) => ended = !goes_on,
                    Err(e) if e.kind() == Kind::Corrupt => {
                        ended = true;
                        loss = Some(e);
                    }
                    Err(e) => return Err(e),
                }
                self.cursor = if ended { before } else { replay.at() };
            }
            if ended && loss.is_none() && replay.proves_loss(page) {
                loss = Some(Error::corrupt("later ones were durable"));
            }
            Ok(())
        })?;
        self.apply_waiting();
        if let Some(e) = loss {
            self.lose_records(&e);
        }
        Ok(())
    }

    /// Takes one page of the ring; false when the journal ends before it.
    fn replay_page(&mut self, replay: &mut Replay, page: &[u8; PAGE]) -> Result<bool> {
        let Step::Records(records) = replay.feed(page)? else { return Ok(false) };
        for record in &records {
            self.take(record)?;
        }
        self.replayed.0 += records.len() as u64;
        Ok(true)
    }

    fn lose_records(&mut self, why: &Error) {
        let seq = self.cursor.seq;
        self.missing.get_or_insert(seq);
        self.hidden = true;
        let reason = format!("records from number {seq} on are unreadable: {}", why.reason());
        let problem = Problem::new(What::JournalLoss, "the journal", &Error::corrupt(reason));
        self.problems.note(problem);
    }

    /// Replays what the tail holds behind the journal.
    pub(super) fn replay_tail(&mut self, tail: Option<&Tail>) -> Result<()> {
        let from = self.cursor.seq;
        self.freed.clear();
        // After a loss nothing joins the journal's end.
        let Some(tail) = tail.filter(|t| t.next() > from && self.missing.is_none()) else {
            return Ok(());
        };
        let outcome = tail.records(from, tail.next()).and_then(|records| {
            records.iter().try_for_each(|record| {
                self.take(record)?;
                self.replayed.1 += 1;
                Ok(())
            })
        });
        self.apply_waiting();
        match outcome {
            Err(e) if e.kind() == Kind::Corrupt => {
                self.lose_records(&e);
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Takes one record; `Corrupt` when no writer makes such a record for this disk. It is in the
    /// map after [`Self::apply_waiting`].
    fn take(&mut self, record: &Record) -> Result<()> {
        self.check_record(record)?;
        let (block, count) = record.range();
        if block.extent() != block.plus(count - 1).extent() {
            self.apply_waiting();
            self.apply(record);
            return Ok(());
        }
        if self.waiting.len() == WAITING_MAX {
            self.apply_waiting();
        }
        self.waiting.push(*record);
        Ok(())
    }

    /// Applies the records that wait, those of neighbouring extents one after the other: in the
    /// order of the journal, nearly every record of a random writer would wait for memory. Each of
    /// them changes one extent only (or meets a leaf that refuses all of them), and those of one
    /// extent keep their order, so the map comes out the same. Test:
    /// `flat_model::records_of_one_extent_are_replayed_in_order`.
    fn apply_waiting(&mut self) {
        let mut records = std::mem::take(&mut self.waiting);
        records.sort_by_key(|record| record.range().0.extent());
        records.drain(..).for_each(|record| self.apply(&record));
        self.waiting = records;
    }

    fn check_record(&self, record: &Record) -> Result<()> {
        let (block, count) = record.range();
        if block.0 + count > self.sb.virtual_size.div_ceil(BLOCK) {
            return Err(Error::corrupt("a record lies past the end of the disk"));
        }
        match *record {
            Record::Map { .. } if count > MAP_BLOCKS_MAX => {
                Err(Error::corrupt("a record maps more than a writer ever does"))
            }
            Record::Map { target, .. } if target.extent() < self.sb.data_start() => {
                Err(Error::corrupt("a record points before the data area"))
            }
            _ => Ok(()),
        }
    }

    /// Applies one record, leaf by leaf: what it does to one depends on no other, so a leaf that
    /// takes no change costs the disk that leaf alone.
    fn apply(&mut self, record: &Record) {
        let (block, count) = record.range();
        let end = block.plus(count);
        let mut at = block;
        while at < end {
            let leaf = at.extent().leaf();
            let stop = leaf.next().first_extent().first_block().min(end);
            match self.apply_to_leaf(record, at, stop.0 - at.0) {
                Ok(()) => _ = self.dirty.insert(leaf),
                Err(e) => self.hide_stale(leaf, &e),
            }
            at = stop;
        }
    }

    /// What a record does to `count` blocks from `at` on, all under one leaf.
    fn apply_to_leaf(&mut self, record: &Record, at: GuestBlock, count: u64) -> Result<()> {
        match *record {
            Record::Zero { .. } => {
                self.dropped.subtract(at, count);
                let freed = &mut self.freed;
                self.map.clear(at, count, Whole::Zero, &mut |_, e| freed.push(e))
            }
            Record::Map { block, target, .. } => {
                let first = target.plus(at.0 - block.0);
                self.map_extents(at, count, &mut |done| first.plus(done).extent())
            }
        }
    }

    /// A leaf takes no change. What can still be read of it is older than what was flushed: it
    /// becomes unreadable.
    fn hide_stale(&mut self, leaf: LeafNo, why: &Error) {
        // The extents that the record names are in use, and the map does not say so.
        self.hidden = true;
        if !self.stale.insert(leaf) {
            return;
        }
        self.map.install_whole(leaf, Whole::Damaged);
        self.damaged.add(leaf.first_extent().first_block(), LEAF_SPAN / BLOCK);
        let offset = leaf.0 * LEAF_SPAN;
        let object = format!("journal records for the map leaf at byte offset {offset}");
        let len = LEAF_SPAN.min(self.sb.virtual_size - offset);
        self.problems.note(Problem::new(What::JournalWaits, object, why).costing(offset, len));
    }

    /// Maps `count` blocks from `block` on to the own segment; `extent` names the extent of the
    /// block so many blocks further.
    fn map_extents(
        &mut self,
        block: GuestBlock,
        count: u64,
        extent: &mut dyn FnMut(u64) -> ExtentId,
    ) -> Result<()> {
        let mut done = 0;
        while done < count {
            let at = block.plus(done);
            let n = (EXTENT_BLOCKS as u64 - at.in_extent() as u64).min(count - done);
            let target = extent(done);
            let owned = self.map.own_extent(at.extent())?;
            // One that owns nothing any more and was moved before moves again: the leaf may come
            // from after the records that are replayed over it.
            if owned.is_some_and(|e| e != target) || self.moved.contains_key(&at.extent()) {
                self.moved.insert(at.extent(), target);
            }
            self.freed.extend(self.map.set_own(at, index(n), target)?);
            self.dropped.subtract(at, n);
            if target.0 >= self.own_extents() {
                let reason = format!("extent {target} lies past the end of its file");
                let bad = Bad { what: What::Truncated, error: Error::corrupt(reason) };
                if self.lose_blocks(at.extent(), at.in_extent(), index(n), &bad) {
                    self.map.clear(at, n, Whole::Zero, &mut |_, _| ())?;
                }
            }
            done += n;
        }
        Ok(())
    }

    /// A virtual extent owns one extent at most once replay is over. Where it owns two, the place
    /// that the newest record names stays: by the time of that record, every block in the other one
    /// had been given up, and it may hold what belongs elsewhere since.
    pub(super) fn settle_moved(&mut self) -> Result<()> {
        for (extent, newest) in self.moved.clone() {
            let Ok(vector) = self.map.vector(extent) else { continue };
            for (b, state) in vector.iter().enumerate() {
                let BlockState::Data { segment, block } = *state else { continue };
                if segment != self.sb.own_index || block.extent() == newest {
                    continue;
                }
                let reason = format!("it owns two extents, {newest} and {}", block.extent());
                let bad = Bad { what: What::Nonsense, error: Error::corrupt(reason) };
                if self.lose_blocks(extent, b, 1, &bad) {
                    let at = extent.first_block().plus(b as u64);
                    self.map.clear(at, 1, Whole::Zero, &mut |_, _| ())?;
                }
            }
        }
        Ok(())
    }
}
