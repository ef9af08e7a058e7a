//! Reads and writes.
//!
//! A write goes one of two ways. If every block it touches lies in the own segment, its bytes are
//! written in place and that is all. Else each virtual extent is claimed, its bytes are written to
//! the extent's target, and the blocks are published: record, then map entry.
//!
//! Order, and the crash it defends against: data before record. A record that a process kill leaves
//! in the tail must not name a block whose data never arrived; a power cut is covered by the flush,
//! which syncs the data before it writes the journal. Test: `crash_points`, `two_crash_domains`.

use format::entry::BlockState;
use format::limits::{BLOCK, EXTENT};
use format::units::{ExtentId, GuestBlock, GuestExtent, index};
use format::{Error, Result};

use super::claims::{Claim, mask};
use super::map::Piece;
use super::{Disk, blocks_of};
use crate::store::WriteOp;
use crate::store::buf::AlignedBuf;

/// Extents that one publication covers: bounds claims and bounce memory (4 MiB).
const BATCH: u64 = 64;

/// One virtual extent of a first write.
struct Part<'a> {
    claim: Claim,
    target: ExtentId,
    /// First block and number of blocks.
    block: GuestBlock,
    count: usize,
    /// Where the bytes go in the file.
    offset: u64,
    bytes: Bytes<'a>,
    /// Where the caller's bytes go on the virtual disk, and the bytes.
    source: (u64, &'a [u8]),
    /// States of the blocks that are written in part, as they were when the bytes were laid out.
    assumed: [Option<(GuestBlock, BlockState)>; 2],
}

enum Bytes<'a> {
    Caller(&'a [u8]),
    Own(AlignedBuf),
}

impl Part<'_> {
    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Caller(bytes) => bytes,
            Bytes::Own(bytes) => bytes,
        }
    }
}

impl Disk {
    /// Reads `buf.len()` bytes from `offset`; both are multiples of 512. Takes no lock.
    ///
    /// # Errors
    /// `Invalid` outside the disk, `Corrupt` in a damaged range, `Failed`, or what the host
    /// reports.
    pub fn read(&self, lane: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        // Inside the gate first: a resize must not come between the check and the request.
        let _inside = self.inside(lane)?;
        // After a failed sync the host may show less than was written: reads would go back in time.
        self.check_alive()?;
        self.check_range(offset, buf.len() as u64)?;
        self.read_unchecked(offset, buf).map_err(|e| e.within("read", self.object()))
    }

    /// As [`Disk::read`], without the checks and below the gate.
    pub(super) fn read_unchecked(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset + buf.len() as u64;
        let (first, count) = blocks_of(offset, buf.len() as u64);
        self.map.resolve(first, count, &mut |piece| {
            let (from, to) = clip(&piece, offset, end);
            let part = &mut buf[index(from - offset)..index(to - offset)];
            match piece.state {
                BlockState::Hole | BlockState::Zero => part.fill(0),
                BlockState::Data { segment, block } => {
                    let row = self.row(segment.get())?;
                    let at = row.base.file_offset() + block.file_offset();
                    row.file.read_at(at + (from - piece.block.offset().0), part)?;
                }
            }
            Ok(())
        })
    }

    pub(super) fn row(&self, index: u16) -> Result<&super::load::RowFile> {
        let row = self.rows.get(usize::from(index)).and_then(Option::as_ref);
        row.ok_or_else(|| Error::corrupt(format!("the segment of row {index} is missing")))
    }

    /// Writes `buf` at `offset`; both are multiples of 512. When it returns, the write is complete:
    /// a read sees it, a flush makes it durable.
    ///
    /// # Errors
    /// `Invalid` outside the disk, `NoSpace` (nothing changed that was not being written),
    /// `ReadOnly`, `Failed`, `Corrupt` in a damaged range, or what the host reports.
    pub fn write(&self, lane: usize, offset: u64, buf: &[u8]) -> Result<()> {
        self.check_writable()?;
        let _inside = self.inside(lane)?;
        self.check_range(offset, buf.len() as u64)?;
        self.write_unchecked(lane, offset, buf).map_err(|e| e.within("write", self.object()))
    }

    /// As [`Disk::write`], without the checks and inside the gate.
    pub(super) fn write_unchecked(&self, lane: usize, offset: u64, buf: &[u8]) -> Result<()> {
        if self.overwrite(offset, buf)? {
            return Ok(());
        }
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let stop = ((at / EXTENT + BATCH) * EXTENT).min(end);
            self.first_write(lane, at, &buf[index(at - offset)..index(stop - offset)])?;
            at = stop;
        }
        Ok(())
    }

    /// Writes in place; false when some block does not lie in the own segment (what was written by
    /// then is written again by the first write).
    fn overwrite(&self, offset: u64, buf: &[u8]) -> Result<bool> {
        let end = offset + buf.len() as u64;
        let (first, count) = blocks_of(offset, buf.len() as u64);
        let mut own = true;
        self.map.resolve(first, count, &mut |piece| {
            match piece.state {
                BlockState::Data { segment, block } if own && segment == self.map.own() => {
                    let (from, to) = clip(&piece, offset, end);
                    let at = block.file_offset() + (from - piece.block.offset().0);
                    self.file.write_at(at, &buf[index(from - offset)..index(to - offset)])?;
                }
                _ => own = false,
            }
            Ok(())
        })?;
        Ok(own)
    }

    fn first_write(&self, lane: usize, offset: u64, buf: &[u8]) -> Result<()> {
        // Before anything is recorded: a record about a damaged leaf could never leave the journal.
        let (first, count) = blocks_of(offset, buf.len() as u64);
        self.map.check_changes(first, count)?;
        let extents = (offset + buf.len() as u64).div_ceil(EXTENT) - offset / EXTENT;
        let mut parts: Vec<Part<'_>> = Vec::with_capacity(index(extents));
        let mut outcome = self.prepare(lane, offset, buf, &mut parts);
        if outcome.is_ok() {
            outcome = self.write_parts(&parts, (offset, buf));
        }
        self.publish(parts, outcome, (offset, buf))
    }

    /// Writes the bytes of all parts; `whole` is what the caller writes, and where.
    fn write_parts(&self, parts: &[Part<'_>], whole: (u64, &[u8])) -> Result<()> {
        if let [part] = parts {
            return self.file.write_at(part.offset, part.bytes());
        }
        match writes(parts, whole)[..] {
            [op] => self.file.write_at(op.offset, op.buf),
            ref ops => self.file.write_many(ops),
        }
    }

    /// Claims every virtual extent of the range, in ascending order (so that two writers never wait
    /// for each other in a circle), and lays out what to write.
    fn prepare<'a>(
        &self,
        lane: usize,
        offset: u64,
        buf: &'a [u8],
        parts: &mut Vec<Part<'a>>,
    ) -> Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let extent = GuestExtent(at / EXTENT);
            let stop = ((extent.0 + 1) * EXTENT).min(end);
            let (block, count) = blocks_of(at, stop - at);
            let claim = self.claims.claim(extent, mask(block.in_extent(), index(count)));
            // From here on the claim is in `parts`, whatever happens, so that it is released.
            parts.push(Part {
                claim,
                target: ExtentId(0),
                block,
                count: index(count),
                offset: 0,
                bytes: Bytes::Caller(&[]),
                source: (at, &buf[index(at - offset)..index(stop - offset)]),
                assumed: [None; 2],
            });
            let part = parts.last_mut().expect("just pushed");
            part.target = self.target(lane, &part.claim)?;
            self.lay_out(part)?;
            at = stop;
        }
        Ok(())
    }

    pub(super) fn target(&self, lane: usize, claim: &Claim) -> Result<ExtentId> {
        let owned = || self.map.own_extent(claim.extent);
        if let Some(target) = self.claims.target(claim, owned, None)? {
            return Ok(target);
        }
        let fresh = self.take_extent(lane)?;
        let target = self.claims.target(claim, owned, Some(fresh))?.expect("there was a fresh one");
        if target != fresh {
            self.core.lock().space.give_back(fresh);
        }
        Ok(target)
    }

    /// Where in the file a part goes, and with which bytes: a partial block that is not own yet is
    /// completed with its present content (read-modify-write).
    fn lay_out(&self, part: &mut Part<'_>) -> Result<()> {
        let (offset, buf) = part.source;
        let end = offset + buf.len() as u64;
        for (edge, assumed) in [offset, end].into_iter().zip(&mut part.assumed) {
            if !edge.is_multiple_of(BLOCK) {
                let block = GuestBlock(edge / BLOCK);
                *assumed = Some((block, self.map.block(block)?));
            }
        }
        let own = self.map.own();
        let [head, tail] = part.assumed.map(|assumed| match assumed {
            Some((_, BlockState::Data { segment, .. })) => segment != own,
            other => other.is_some(),
        });
        let from = if head { offset / BLOCK * BLOCK } else { offset };
        let to = if tail { end.next_multiple_of(BLOCK) } else { end };
        part.offset = part.target.file_offset() + from % EXTENT;
        part.bytes = Bytes::Caller(buf);
        if (from, to) == (offset, end) {
            return Ok(());
        }
        let mut whole = AlignedBuf::zeroed(index(to - from));
        if head {
            self.read_unchecked(from, &mut whole[..index(BLOCK.min(to - from))])?;
        }
        if tail {
            let last = (end / BLOCK * BLOCK).max(from);
            self.read_unchecked(last, &mut whole[index(last - from)..])?;
        }
        whole[index(offset - from)..index(end - from)].copy_from_slice(buf);
        part.bytes = Bytes::Own(whole);
        Ok(())
    }

    /// True when the blocks that a part writes in part are still what they were. A discard may have
    /// come in between: what it dropped must not come back with the rest of the block.
    fn still_so(&self, part: &Part<'_>) -> bool {
        let same = |(block, state)| self.map.block(block).is_ok_and(|now| now == state);
        part.assumed.into_iter().flatten().all(same)
    }

    /// Publishes the parts if `written` is good, and releases their claims in any case.
    fn publish(
        &self,
        mut parts: Vec<Part<'_>>,
        mut written: Result<()>,
        whole: (u64, &[u8]),
    ) -> Result<()> {
        let ready = loop {
            match written.and_then(|()| self.make_room(parts.len() as u64)) {
                Ok(core) if !parts.iter().all(|p| self.still_so(p)) => {
                    drop(core);
                    let laid_out = parts.iter_mut().try_for_each(|p| self.lay_out(p));
                    written = laid_out.and_then(|()| self.write_parts(&parts, whole));
                }
                ready => break ready,
            }
        };
        let mut core = match ready {
            Ok(core) => core,
            Err(e) => {
                let mut core = self.core.lock();
                parts.into_iter().for_each(|p| self.release(&mut core, p.claim));
                return Err(e);
            }
        };
        let mut outcome = Ok(());
        for p in parts {
            let published = self.publish_part(&mut core, p.block, p.count, p.target);
            outcome = outcome.and(published);
            self.release(&mut core, p.claim);
        }
        outcome
    }
}

/// The writes that put the parts in the file. Parts that follow each other there and hold the
/// caller's bytes as they are become one write: a lease gives a long write one run of extents.
fn writes<'a>(parts: &'a [Part<'a>], (offset, buf): (u64, &'a [u8])) -> Vec<WriteOp<'a>> {
    let mut ops: Vec<WriteOp<'a>> = Vec::new();
    // First byte in `buf` of the last write, if it can be continued.
    let mut open: Option<usize> = None;
    for part in parts {
        let bytes = match &part.bytes {
            Bytes::Caller(bytes) => *bytes,
            Bytes::Own(bytes) => {
                open = None;
                ops.push(WriteOp { offset: part.offset, buf: bytes });
                continue;
            }
        };
        let from = index(part.source.0 - offset);
        match (open, ops.last_mut()) {
            (Some(first), Some(last)) if last.offset + last.buf.len() as u64 == part.offset => {
                last.buf = &buf[first..from + bytes.len()];
            }
            _ => {
                open = Some(from);
                ops.push(WriteOp { offset: part.offset, buf: bytes });
            }
        }
    }
    ops
}

/// The part of `offset..end` that a piece covers, in bytes of the virtual disk.
fn clip(piece: &Piece, offset: u64, end: u64) -> (u64, u64) {
    let first = piece.block.offset().0;
    (first.max(offset), (first + piece.count * BLOCK).min(end))
}
