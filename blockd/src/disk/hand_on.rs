//! From one process to the next while guests wait: a disk is left without a sync, and the successor
//! goes on in the same opening where its predecessor stopped.
//!
//! What an ordinary opening makes durable before it writes, this one carries on as it is. It may,
//! because nothing is half-done ([`Disk::hand_on`] looks), and because the predecessor lives: what
//! completed is in the host's cache and in the tail, no sync has failed, and an error that the host
//! meets later is reported to the next sync, whoever asks. So the first flush of the successor is
//! what the first flush of the predecessor would have been.
//!
//! Order, and the crash it defends against:
//! 1. checkpoint, then all copies of the superblock brought to its state, synced
//!    ([`Disk::prepare_hand_on`], while guests still run): only then are the pages free that the
//!    checkpoint replaced. A successor does not know these pages; it takes them for free at once.
//!    Should a checkpoint come in between after all, its replaced pages are still named by copies
//!    that may be the only readable ones after a power cut, and the opening is not vouched for.
//! 2. the lock is left when nothing will be written any more: writes of two processes would land in
//!    any order.
//!
//! Test: `crash_points` (`hand_on`), `daemon_upgrade`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use format::Result;
use format::superblock::{Attached, Superblock};
use format::units::Epoch;

use super::load::load;
use super::open::{left_tail, tail_capacity};
use super::{Disk, Options, Vouched};
use crate::segment::Segments;
use crate::store::File;

impl Disk {
    /// Does what would take long while guests wait for [`Disk::hand_on`]. They go on meanwhile, and
    /// may go on afterwards.
    ///
    /// # Errors
    /// As [`Disk::checkpoint`].
    pub fn prepare_hand_on(&self) -> Result<()> {
        self.check_writable()?;
        self.await_ground()?;
        let mut state = self.checkpoint.lock();
        self.checkpoint_locked(&mut state, |_| ())?;
        self.settle_copies(&mut state)?;
        drop(state);
        self.reclaim();
        Ok(())
    }

    /// As [`Disk::prepare_hand_on`] where it is worth its syncs: much is to be made durable.
    ///
    /// # Errors
    /// As [`Disk::checkpoint`].
    pub fn prepare_freeze(&self) -> Result<()> {
        // A sync costs as much as these many small writes, whenever they are made durable.
        const RECORDS_MIN: u64 = 256;
        let unsettled = self.tail.next().0.saturating_sub(self.tail.head().0);
        if unsettled >= RECORDS_MIN {
            return self.prepare_hand_on();
        }
        self.file.write_out();
        Ok(())
    }

    /// Leaves the disk as a killed process would, and its lock at once. Returns what a successor
    /// may take from that.
    ///
    /// # Errors
    /// What the host reports.
    pub fn hand_on(self) -> Result<Vouched> {
        // Nobody has a request in work: the disk is ours alone. So nothing is written after the
        // lock is gone, which a successor takes.
        self.file.unlock()?;
        // Acquire pairs with the Release store in `fail`.
        if self.failed.load(Ordering::Acquire) {
            return Ok(Vouched::Nothing);
        }
        let state = self.checkpoint.lock();
        let superblock = &state.superblock;
        let committed = self.tickets.lock().outcome.is_none();
        let with_tail = self.writable && superblock.attached == Attached::WithTail;
        if with_tail && committed && state.graveyard.is_empty() {
            return Ok(Vouched::Opening(superblock.epoch));
        }
        Ok(Vouched::Cache)
    }

    /// Goes on in the opening of a predecessor; nothing is written. `None` when the disk is not as
    /// it would have left it: somebody else has opened it since, or something is wrong with it.
    pub(super) fn go_on(
        file: &Arc<dyn File>,
        segments: &dyn Segments,
        options: &Options,
        (sb, epoch): (&Superblock, Epoch),
    ) -> Result<Option<Disk>> {
        if sb.attached != Attached::WithTail || sb.epoch != epoch {
            return Ok(None);
        }
        let Some(tail) = left_tail(sb, options)? else { return Ok(None) };
        let loaded = load(file, segments, Some(&tail))?;
        let joined = tail.epoch() == epoch
            && tail.head() == loaded.cursor.seq
            && tail.capacity() <= tail_capacity(sb.journal_pages());
        if !joined || !loaded.problems.is_empty() {
            return Ok(None);
        }
        let disk = Disk::assemble(Arc::clone(file), loaded, tail, options, true);
        // Pages to come are of this epoch, even where none of it was written yet.
        disk.commit.lock().cursor.epoch = epoch;
        disk.hold_ring(&mut disk.commit.lock());
        disk.hold_spare();
        Ok(Some(disk))
    }
}
