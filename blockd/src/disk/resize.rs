//! Resize: one flip changes the size and the map together, so that a power cut finds the old disk or
//! the new one.

use std::sync::atomic::Ordering;

use format::entry::BlockState;
use format::limits::BLOCK;
use format::units::{ExtentId, GuestBlock, LeafNo, check_virtual_size, index};
use format::{Context, Error, Kind, Result};

use super::Disk;
use super::map::Whole;
use crate::store::buf::AlignedBuf;

impl Disk {
    /// Changes the size of the virtual disk to `size` bytes. Making it smaller refuses to drop data
    /// unless `drop_data` says so. What lies past the old size reads as zeroes afterwards.
    ///
    /// # Errors
    /// `Invalid` for an impossible size, `InUse` when data would be dropped, else as
    /// [`Disk::checkpoint`]; after a failure the disk must be opened again.
    pub fn resize(&self, size: u64, drop_data: bool) -> Result<()> {
        self.check_writable()?;
        check_virtual_size(size).context("resize", || self.object())?;
        // Nobody is inside from here on: no request straddles the change, and none comes between the
        // look for data and the cut.
        let closed = self.gate.close();
        let old = self.size();
        let outcome = match size.cmp(&old) {
            std::cmp::Ordering::Greater => self.resize_up(old, size),
            std::cmp::Ordering::Less => self.resize_down(old, size, drop_data),
            std::cmp::Ordering::Equal => Ok(()),
        };
        drop(closed);
        outcome.context("resize", || self.object())
    }

    fn resize_up(&self, old: u64, size: u64) -> Result<()> {
        if !old.is_multiple_of(BLOCK) && !self.map.block(GuestBlock(old / BLOCK))?.reads_zero() {
            // What an earlier, larger size left in the last block must not come back.
            let zeroes = AlignedBuf::zeroed(index(old.next_multiple_of(BLOCK) - old));
            self.write_unchecked(0, old, &zeroes)?;
        }
        self.run_checkpoint(|sb| sb.virtual_size = size)?;
        // Release pairs with the Acquire load in `size`: the new range is served once it is durable.
        self.size.store(size, Ordering::Release);
        self.sync()
    }

    fn resize_down(&self, old: u64, size: u64, drop_data: bool) -> Result<()> {
        let first = GuestBlock(size.div_ceil(BLOCK));
        let count = old.div_ceil(BLOCK) - first.0;
        if !drop_data {
            self.check_no_data(first, count)?;
        }
        // Records about the dropped range lie before the head of the checkpoint that drops it: replay
        // must never meet a record past the end of the disk.
        self.flush()?;
        // From the first cleared block to the flip memory and disk disagree: nobody else may make a
        // checkpoint, and a failure ends this opening.
        let dropped = self.drop_range(first, count, size);
        let emptied = dropped.map_err(|e| self.fail(e))?;
        self.size.store(size, Ordering::Release);
        // Only now does nothing durable name them.
        let mut core = self.core.lock();
        emptied.into_iter().for_each(|e| self.retire(&mut core, e));
        drop(core);
        self.flush()
    }

    fn drop_range(&self, first: GuestBlock, count: u64, size: u64) -> Result<Vec<ExtentId>> {
        // No punch is under way that would give back, before the flip, what the clearing empties.
        let _no_reclaim = self.reclaiming.lock();
        let mut state = self.checkpoint.lock();
        let mut emptied = Vec::new();
        if count > 0 {
            let mut core = self.core.lock();
            self.map.clear(first, count, Whole::Hole, &mut |_, e| emptied.push(e))?;
            let last = GuestBlock(first.0 + count - 1).extent().leaf();
            core.dirty.extend((first.extent().leaf().0..=last.0).map(LeafNo));
        }
        self.checkpoint_locked(&mut state, |sb| sb.virtual_size = size)?;
        Ok(emptied)
    }

    fn check_no_data(&self, first: GuestBlock, count: u64) -> Result<()> {
        let mut blocks = 0;
        self.map.resolve(first, count, &mut |piece| {
            if matches!(piece.state, BlockState::Data { .. }) {
                blocks += piece.count;
            }
            Ok(())
        })?;
        if blocks == 0 {
            return Ok(());
        }
        let reason = format!("{} bytes of data lie past the new end", blocks * BLOCK);
        Err(Error::new(Kind::InUse, reason).hint("repeat with --drop-data to lose them"))
    }
}
