//! Discard and write-zeroes: blocks become explicitly zero and never show older content again.
//!
//! Whole blocks cost one record whatever their number; parts of a block are written as zeroes. The
//! space that the blocks took goes the way described in `space.rs`.

use format::Result;
use format::journal::Record;
use format::limits::{BLOCK, EXTENT};
use format::units::{GuestBlock, index};

use super::map::Whole;
use super::{BlockPunch, Disk};
use crate::store::buf::AlignedBuf;

/// Bytes of zeroes written at once.
const ZERO_CHUNK: u64 = 16 * EXTENT;
/// Punch candidates kept between two flushes; more than that is left to the host until the next
/// discard of the same blocks.
const PUNCHES_MAX: usize = 65_536;

impl Disk {
    /// Makes a range read as zeroes and gives its space back; both numbers are multiples of 512.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn discard(&self, lane: usize, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        let _inside = self.inside(lane)?;
        self.check_range(offset, len)?;
        self.zero(lane, offset, len).map_err(|e| e.within("discard", self.object()))
    }

    /// Writes zeroes. With `unmap` the space may be given back, without it the blocks stay
    /// allocated so that later writes cannot run out of space.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_zeroes(&self, lane: usize, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_writable()?;
        let _inside = self.inside(lane)?;
        self.check_range(offset, len)?;
        let outcome = if unmap {
            self.zero(lane, offset, len)
        } else {
            self.write_zero_bytes(lane, offset, len)
        };
        outcome.map_err(|e| e.within("write zeroes to", self.object()))
    }

    fn zero(&self, lane: usize, offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        // The last block of the disk may be a partial one: it is whole as far as the disk goes.
        let end_block = if end == self.size() { end.div_ceil(BLOCK) } else { end / BLOCK };
        let first = GuestBlock(offset.div_ceil(BLOCK));
        let last = GuestBlock(end_block);
        if first >= last {
            return self.write_zero_bytes(lane, offset, len);
        }
        let (head, tail) = (first.offset().0, (last.offset().0).min(end));
        self.write_zero_bytes(lane, offset, head - offset)?;
        self.write_zero_bytes(lane, tail, end - tail)?;
        self.zero_blocks(first, last.0 - first.0)
    }

    fn write_zero_bytes(&self, lane: usize, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let zeroes = AlignedBuf::zeroed(index(len.min(ZERO_CHUNK)));
        let mut at = offset;
        while at < offset + len {
            let n = (offset + len - at).min(ZERO_CHUNK);
            self.write_unchecked(lane, at, &zeroes[..index(n)])?;
            at += n;
        }
        Ok(())
    }

    fn zero_blocks(&self, first: GuestBlock, count: u64) -> Result<()> {
        // A damaged range is found before anything is recorded.
        self.map.check_changes(first, count)?;
        let mut core = self.make_room(1)?;
        let core = &mut *core;
        core.tail.append(&Record::Zero { block: first, count });
        let punches = &mut core.punches;
        self.note_punches(first, count, &mut |p| {
            if punches.len() < PUNCHES_MAX {
                punches.push(p);
            }
        });
        let mut emptied = Vec::new();
        self.map.clear(first, count, Whole::Zero, &mut |v, e| emptied.push((v, e)))?;
        for (v, e) in emptied {
            // A first write under way keeps the extent; the last of them gives it back.
            if !self.claims.holds(v, e) {
                self.retire(core, e);
            }
        }
        let last = GuestBlock(first.0 + count - 1).extent().leaf();
        core.dirty.extend((first.extent().leaf().0..=last.0).map(format::units::LeafNo));
        Ok(())
    }

    /// Calls `note` with the parts of the two extents at the ends that are zeroed in part.
    fn note_punches(&self, first: GuestBlock, count: u64, note: &mut dyn FnMut(BlockPunch)) {
        let end = first.plus(count);
        let ends = [first.extent(), GuestBlock(end.0 - 1).extent()];
        for (i, extent) in ends.into_iter().enumerate() {
            if i == 1 && ends[0] == ends[1] {
                continue;
            }
            let from = first.max(extent.first_block());
            let to = end.min(extent.next().first_block());
            let target = self.map.own_extent(extent).ok().flatten();
            if let Some(target) = target.filter(|_| to.0 - from.0 < 16) {
                let count = index(to.0 - from.0);
                note(BlockPunch { extent, target, first: from.in_extent(), count });
            }
        }
    }
}
