//! Resize: one flip changes the size and the map together, so that a power cut finds the old disk
//! or the new one.

use std::sync::atomic::Ordering;

use format::entry::BlockState;
use format::limits::{BLOCK, BLOCKS_PER_EXTENT};
use format::units::{ExtentId, GuestBlock, LeafNo, check_virtual_size, index};
use format::{Error, Kind, Result};

use super::Disk;
use super::map::{Piece, Whole};
use crate::store::buf::AlignedBuf;

impl Disk {
    /// Changes the size of the virtual disk to `size` bytes. Making it smaller refuses to drop data
    /// unless `drop_data` says so. What lies past the old size reads as zeroes afterwards.
    ///
    /// # Errors
    /// `Invalid` for an impossible size, `InUse` when data would be dropped, else as
    /// [`Disk::checkpoint`].
    pub fn resize(&self, size: u64, drop_data: bool) -> Result<()> {
        self.check_writable()?;
        check_virtual_size(size).map_err(|e| e.within("resize", self.object()))?;
        // Nobody is inside from here on: no request straddles the change, and none comes between
        // the look for data and the cut.
        let closed = self.gate.close();
        let old = self.size();
        let outcome = match size.cmp(&old) {
            std::cmp::Ordering::Greater => self.resize_up(old, size),
            std::cmp::Ordering::Less => self.resize_down(old, size, drop_data),
            std::cmp::Ordering::Equal => Ok(()),
        };
        drop(closed);
        outcome.map_err(|e| e.within("resize", self.object()))
    }

    fn resize_up(&self, old: u64, size: u64) -> Result<()> {
        if !old.is_multiple_of(BLOCK) && !self.map.block(GuestBlock(old / BLOCK))?.reads_zero() {
            // What an earlier, larger size left in the last block must not come back.
            let zeroes = AlignedBuf::zeroed(index(old.next_multiple_of(BLOCK) - old));
            self.write_unchecked(0, old, &zeroes)?;
        }
        self.run_checkpoint(|sb| sb.virtual_size = size)?;
        // Release pairs with the Acquire load in `size`: the new range is served once it is
        // durable.
        self.size.store(size, Ordering::Release);
        self.sync()
    }

    fn resize_down(&self, old: u64, size: u64, drop_data: bool) -> Result<()> {
        let first = GuestBlock(size.div_ceil(BLOCK));
        let count = old.div_ceil(BLOCK) - first.0;
        if !drop_data {
            self.check_no_data(first, count)?;
        }
        // Records about the dropped range lie before the head of the checkpoint that drops it:
        // replay must never meet a record past the end of the disk.
        self.flush()?;
        let emptied = self.drop_range(first, count, size)?;
        self.size.store(size, Ordering::Release);
        // Only now does nothing durable name them.
        let mut core = self.core.lock();
        emptied.into_iter().for_each(|e| self.retire(&mut core, e));
        drop(core);
        self.flush()
    }

    /// Drops the blocks and flips to the new size. From the first cleared block to the flip memory
    /// and disk disagree, so nobody else may make a checkpoint; a failure puts the blocks back.
    fn drop_range(&self, first: GuestBlock, count: u64, size: u64) -> Result<Vec<ExtentId>> {
        // No punch is under way that would give back, before the flip, what the clearing empties.
        let _no_reclaim = self.reclaiming.lock();
        let mut state = self.checkpoint.lock();
        let (mut before, mut emptied) = (Vec::new(), Vec::new());
        if count > 0 {
            self.map.check_changes(first, count)?;
            self.map.resolve(first, count, &mut |piece| {
                before.push(piece);
                Ok(())
            })?;
            let mut core = self.core.lock();
            self.map.clear(first, count, Whole::Hole, &mut |_, e| emptied.push(e))?;
            let last = GuestBlock(first.0 + count - 1).extent().leaf();
            core.dirty.extend((first.extent().leaf().0..=last.0).map(LeafNo));
        }
        let flipped = self.checkpoint_locked(&mut state, |sb| sb.virtual_size = size);
        flipped.inspect_err(|_| self.put_back(&before))?;
        Ok(emptied)
    }

    /// Undoes a clearing that no flip followed. The leaves are dirty still. Nobody has changed the
    /// blocks since: the gate is closed.
    fn put_back(&self, pieces: &[Piece]) {
        const SOUND: &str = "what was just cleared is not damaged";
        let _core = self.core.lock();
        for piece in pieces {
            let (segment, first) = match piece.state {
                BlockState::Hole => continue,
                BlockState::Zero => {
                    let cleared =
                        self.map.clear(piece.block, piece.count, Whole::Zero, &mut |_, _| ());
                    cleared.expect(SOUND);
                    continue;
                }
                BlockState::Data { segment, block } => (segment, block),
            };
            let mut done = 0;
            while done < piece.count {
                let at = piece.block.plus(done);
                let n = (BLOCKS_PER_EXTENT - at.in_extent() as u64).min(piece.count - done);
                let extent = first.plus(done).extent();
                let state = &mut |b| BlockState::Data { segment, block: extent.block(b) };
                self.map.set_blocks(at, index(n), state).expect(SOUND);
                done += n;
            }
        }
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
