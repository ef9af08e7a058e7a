//! Flush as group commit: one pair of syncs serves every caller that came before it began.
//!
//! Order, and the crash it defends against:
//! 1. sync: the data of all records to be committed is durable — else a power cut leaves a journal
//!    that names blocks whose data never arrived;
//! 2. write the journal pages — a new page for each commit, never one that holds durable records;
//! 3. sync: the records are durable — only then may a flush complete, the tail forget them, and the
//!    space they let go be used again.
//!
//! A failed sync is final. A journal page that could not be written for lack of space or memory is
//! not: the records are still in the tail, and the next flush writes the same pages again.
//!
//! Test: `crash_points` (orders swapped: `crash_points::swapped_orders_are_caught`).

use format::journal::{Record, encode_commit, pages_for};
use format::limits::{EXTENT, HEADER_EXTENTS, PAGE};
use format::superblock::JournalHead;
use format::units::index;
use format::{Error, Kind, Result};
use parking_lot::MutexGuard;

use super::{Commit, Disk};
use crate::store::WriteOp;
use crate::store::buf::AlignedBuf;

impl Disk {
    /// Makes every write that completed before the call durable.
    ///
    /// # Errors
    /// What [may pass](Kind::may_pass) when the journal could not be written (nothing is lost; try
    /// again), `Failed` when a sync failed now or before.
    pub fn flush(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        let mut tickets = self.tickets.lock();
        let mine = tickets.started + 1;
        while tickets.finished < mine {
            if tickets.running {
                self.ticket_done.wait(&mut tickets);
                continue;
            }
            tickets.running = true;
            tickets.started += 1;
            let number = tickets.started;
            let outcome = MutexGuard::unlocked(&mut tickets, || self.flush_once());
            tickets.running = false;
            tickets.finished = number;
            tickets.outcome = outcome.err().map(|e| (number, e.kind(), e.to_string()));
            self.ticket_done.notify_all();
        }
        // A later commit that succeeded wrote the records of an earlier one that did not.
        match &tickets.outcome {
            Some((number, kind, text)) if *number >= mine => {
                Err(Error::new(*kind, text.clone()).tried("flush").on(self.object()))
            }
            _ => Ok(()),
        }
    }

    /// Does `work` while no flush is under way; those that come wait.
    pub(super) fn alone_in_turn(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut tickets = self.tickets.lock();
        while tickets.running {
            self.ticket_done.wait(&mut tickets);
        }
        tickets.running = true;
        let outcome = MutexGuard::unlocked(&mut tickets, work);
        tickets.running = false;
        self.ticket_done.notify_all();
        outcome
    }

    pub(super) fn flush_once(&self) -> Result<()> {
        self.await_ground()?;
        self.check_alive()?;
        if !self.has_room() {
            // The checkpoint commits as well: it has the last pages of the ring for itself.
            self.run_checkpoint(|_| ())?;
            self.reclaim();
            return Ok(());
        }
        self.commit_once()?;
        if self.commit.lock().used_pages >= self.journal_pages / 2 {
            match self.run_checkpoint(|_| ()) {
                // The flush itself is done; the checkpoint waits for a later one.
                Err(e) if e.kind().may_pass() => {}
                outcome => outcome?,
            }
        }
        self.reclaim();
        Ok(())
    }

    /// True when a commit may be made that no checkpoint follows at once. Room for three more must
    /// be left behind what is in use now: this one, that of the checkpoint after it, and, when the
    /// process is killed before that checkpoint has flipped, that of the checkpoint at the next
    /// opening, which finds the tail full again. Else the ring is full for ever one day: no
    /// checkpoint has a page left for its own commit. Test: `crash_points::chains`.
    pub(super) fn has_room(&self) -> bool {
        let full = pages_for(index(self.tail.capacity()));
        self.commit.lock().used_pages + 3 * full < self.journal_pages
    }

    /// Commits everything published so far.
    pub(super) fn commit_once(&self) -> Result<()> {
        self.check_alive()?;
        let mut commit = self.commit.lock();
        // Without the core lock, so that writers go on: records below the mark stay as they are
        // until the release below. Whoever published them may not have set the map entry yet, but
        // has when that release has the lock, before a checkpoint can see the new cursor.
        let mark = self.tail.next();
        let records = self.tail.records(commit.cursor.seq, mark)?;
        self.sync()?;
        if records.is_empty() {
            return Ok(());
        }
        let next = self.write_journal(&commit, &records)?;
        self.sync()?;
        let ring = self.journal_pages;
        commit.used_pages += (next.position + ring - commit.cursor.position) % ring;
        commit.cursor = next;
        self.core.lock().tail.release(mark);
        self.hold_ring(&mut commit);
        Ok(())
    }

    fn write_journal(&self, commit: &Commit, records: &[Record]) -> Result<JournalHead> {
        let ring = self.journal_pages;
        if commit.used_pages + pages_for(records.len()) >= ring {
            let reason = "the journal is full and no checkpoint could be made";
            return Err(Error::new(Kind::NoSpace, reason).hint("free space on the host"));
        }
        let (pages, next) = encode_commit(&commit.cursor, self.segment, ring, records);
        let mut buf = AlignedBuf::zeroed(pages.len() * PAGE);
        for (bytes, page) in buf.chunks_exact_mut(PAGE).zip(&pages) {
            bytes.copy_from_slice(&page.bytes);
        }
        let start = HEADER_EXTENTS * EXTENT;
        let ops: Vec<WriteOp<'_>> = buf
            .chunks_exact(PAGE)
            .zip(&pages)
            .map(|(buf, page)| WriteOp { offset: start + page.position * PAGE as u64, buf })
            .collect();
        self.file.write_many(&ops)?;
        Ok(next)
    }

    /// Begins to move what was written to the device, so that the next flush has less to wait for.
    /// Makes nothing durable.
    pub fn write_behind(&self) {
        self.file.write_behind();
    }

    /// The same beside a guest, whose data stays in memory.
    pub fn write_out(&self) {
        self.file.write_out();
    }

    /// Syncs the file; a failure ends this opening of the disk.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync().map_err(|e| self.fail(e.tried("sync")))
    }
}
