//! Pull: blocks that lie in segments below are copied into the own one while the disk is in use, so
//! that it needs those segments no longer.
//!
//! A pull is a first write of what is there already. Claims keep first writes to the same blocks
//! away until it is published; overwrites go to own blocks, which a pull leaves alone. A discard is
//! not kept away: what it cleared meanwhile is seen under the core lock, and stays cleared. So a
//! pull can be stopped anywhere, by a kill as well, and goes on with what the map still names.
//!
//! Order, and the crash it defends against:
//! 1. data before record, record before entry: that of a first write (`io.rs`);
//! 2. the last request that was planned over an older entry ends before a segment is let go — else
//!    that request reads from a file that is gone;
//! 3. a segment is let go when no page of the map names it any more, and the flip of the checkpoint
//!    that says so is durable in all copies of the superblock — else the copies that a power cut
//!    leaves name a segment whose file may be gone.
//!
//! Test: `crash_points::flatten`, `flatten_under_load`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use format::entry::{BlockState, Vector};
use format::limits::{BLOCK, EXTENT, EXTENT_BLOCKS, LEAF_SPAN};
use format::units::{BlockId, ExtentId, GuestBlock, GuestExtent, SegmentIdx, index};
use format::{Error, Kind, Result};

use super::claims::Claim;
use super::{BlockPunch, Core, Disk};
use crate::store::buf::AlignedBuf;
use crate::store::{ReadOp, WriteOp};

/// Extents that one pull copies at most: bounds how long a first write waits for it.
const BATCH: usize = 16;
/// Bytes of one write: a guest's waits for it when the kernel lets in one at a time.
const WRITE_STEP: usize = 64 << 10;
/// How long requests that were planned over older entries may take to end.
const PASS_MAX: Duration = Duration::from_secs(30);
/// How often who waits for requests to end looks.
const LOOK: Duration = Duration::from_millis(1);

/// Which segments a disk goes on standing on, and how to tell that a copied block is good.
pub trait Below {
    /// True for a segment that stays; asked for the own one, too.
    fn stays(&self, segment: SegmentIdx) -> bool;

    /// Looks at the content of a block before it is taken over.
    ///
    /// # Errors
    /// `Corrupt` when it is not what was once written.
    fn verify(&mut self, segment: SegmentIdx, block: BlockId, content: &[u8]) -> Result<()>;
}

/// How far a pull is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pulled {
    /// Where the next one begins.
    pub next: GuestExtent,
    /// Bytes that it copied.
    pub bytes: u64,
}

/// One virtual extent of a pull.
struct Part {
    claim: Claim,
    target: ExtentId,
    before: Vector,
    /// Blocks to copy, by bit.
    copied: u16,
}

impl Part {
    fn copies(&self, b: usize) -> bool {
        self.copied & (1 << b) != 0
    }
}

/// Neighbouring blocks of a batch, in a file and in the buffer.
struct Run {
    segment: SegmentIdx,
    first: BlockId,
    /// First block in the buffer.
    at: usize,
    count: usize,
}

/// The runs of a batch: `place` says where block `b` of part `p` lies.
fn runs(parts: &[Part], place: impl Fn(&Part, usize) -> Option<(SegmentIdx, BlockId)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (p, part) in parts.iter().enumerate() {
        for b in (0..EXTENT_BLOCKS).filter(|b| part.copies(*b)) {
            let Some((segment, first)) = place(part, b) else { continue };
            let at = p * EXTENT_BLOCKS + b;
            match runs.last_mut() {
                Some(run)
                    if (run.segment, run.at + run.count) == (segment, at)
                        && run.first.plus(run.count as u64) == first =>
                {
                    run.count += 1;
                }
                _ => runs.push(Run { segment, first, at, count: 1 }),
            }
        }
    }
    runs
}

/// Blocks of an extent that lie in segments that do not stay, by bit.
fn foreign(vector: &Vector, below: &dyn Below) -> u16 {
    let lies_below = |state: &BlockState| match state {
        BlockState::Data { segment, .. } => !below.stays(*segment),
        BlockState::Hole | BlockState::Zero => false,
    };
    let blocks = vector.iter().enumerate().filter(|(_, state)| lies_below(state));
    blocks.fold(0, |mask, (b, _)| mask | (1 << b))
}

impl Disk {
    /// Bytes that lie in segments that do not stay.
    ///
    /// # Errors
    /// `Corrupt` in a damaged range.
    pub fn bytes_below(&self, below: &dyn Below) -> Result<u64> {
        let mut blocks = 0;
        self.map.resolve(GuestBlock(0), self.size().div_ceil(BLOCK), &mut |piece| {
            if let BlockState::Data { segment, .. } = piece.state
                && !below.stays(segment)
            {
                blocks += piece.count;
            }
            Ok(())
        })?;
        Ok(blocks * BLOCK)
    }

    /// Copies the first blocks from `from` on that lie in segments that do not stay; `None` when
    /// there are none.
    ///
    /// # Errors
    /// As [`Disk::write`]; `Corrupt` for a block that is not what was once written: it stays where
    /// it is, and so do those that would have been copied with it.
    pub fn pull(
        &self,
        lane: usize,
        from: GuestExtent,
        below: &mut dyn Below,
    ) -> Result<Option<Pulled>> {
        self.check_writable()?;
        let _inside = self.inside(lane)?;
        let extents = self.next_below(from, below)?;
        let Some(last) = extents.last() else { return Ok(None) };
        let next = last.next();
        let mut parts = Vec::with_capacity(extents.len());
        let copied = self
            .claim_below(lane, &extents, below, &mut parts)
            .and_then(|()| self.copy(&parts, below));
        let bytes = self.publish_pull(parts, copied);
        bytes.map(|bytes| Some(Pulled { next, bytes })).map_err(|e| e.within("pull", self.object()))
    }

    /// The first extents from `from` on with blocks to copy.
    fn next_below(&self, from: GuestExtent, below: &dyn Below) -> Result<Vec<GuestExtent>> {
        let end = GuestBlock(self.size().div_ceil(BLOCK));
        let mut found: Vec<GuestExtent> = Vec::with_capacity(BATCH);
        let mut at = from.first_block();
        while at < end && found.is_empty() {
            let stop = at.extent().leaf().next().first_extent().first_block().min(end);
            self.map.resolve(at, stop.0 - at.0, &mut |piece| {
                let BlockState::Data { segment, .. } = piece.state else { return Ok(()) };
                if below.stays(segment) {
                    return Ok(());
                }
                let last = piece.block.plus(piece.count - 1).extent();
                let first = found.last().map_or(from, |e| e.next()).max(piece.block.extent());
                let room = (BATCH - found.len()) as u64;
                found.extend((first.0..=last.0).take(index(room)).map(GuestExtent));
                Ok(())
            })?;
            at = stop;
        }
        Ok(found)
    }

    /// Claims the blocks to copy of each extent, in ascending order, as first writes do.
    fn claim_below(
        &self,
        lane: usize,
        extents: &[GuestExtent],
        below: &dyn Below,
        parts: &mut Vec<Part>,
    ) -> Result<()> {
        for extent in extents {
            self.map.check_changes(extent.first_block(), EXTENT_BLOCKS as u64)?;
            let blocks = foreign(&self.map.vector(*extent)?, below);
            let claim = self.claims.claim(*extent, blocks);
            // In `parts` whatever comes next, so that it is released.
            let none = [BlockState::Hole; EXTENT_BLOCKS];
            parts.push(Part { claim, target: ExtentId(0), before: none, copied: 0 });
            let part = parts.last_mut().expect("just pushed");
            // Anew: somebody may have had the claim before.
            part.before = self.map.vector(*extent)?;
            part.copied = blocks & foreign(&part.before, below);
            if part.copied != 0 {
                part.target = self.target(lane, &part.claim)?;
            }
        }
        Ok(())
    }

    /// Reads the blocks, looks at them, and writes them to their targets.
    fn copy(&self, parts: &[Part], below: &mut dyn Below) -> Result<()> {
        let block = index(BLOCK);
        let mut buf = AlignedBuf::zeroed(parts.len() * index(EXTENT));
        let sources = runs(parts, |part, b| match part.before[b] {
            BlockState::Data { segment, block } => Some((segment, block)),
            BlockState::Hole | BlockState::Zero => None,
        });
        let mut rest: &mut [u8] = &mut buf;
        let mut carved = 0;
        let mut reads: Vec<(SegmentIdx, ReadOp<'_>)> = Vec::with_capacity(sources.len());
        for run in &sources {
            let (_, from) = std::mem::take(&mut rest).split_at_mut((run.at - carved) * block);
            let (bytes, after) = from.split_at_mut(run.count * block);
            (rest, carved) = (after, run.at + run.count);
            let row = self.row(run.segment.get())?;
            let offset = row.base.file_offset() + run.first.file_offset();
            reads.push((run.segment, ReadOp { offset, buf: bytes }));
        }
        reads.sort_by_key(|(segment, op)| (*segment, op.offset));
        for of_one in reads.chunk_by_mut(|(a, _), (b, _)| a == b) {
            let row = self.row(of_one[0].0.get())?;
            let ops = of_one.iter_mut().map(|(_, op)| ReadOp { offset: op.offset, buf: op.buf });
            row.file.read_many(&mut ops.collect::<Vec<_>>())?;
        }
        for run in &sources {
            let content = &buf[run.at * block..(run.at + run.count) * block];
            for (i, bytes) in (0..).zip(content.chunks_exact(block)) {
                below.verify(run.segment, run.first.plus(i), bytes)?;
            }
        }
        let own = self.map.own();
        let targets = runs(parts, |part, b| Some((own, part.target.block(b))));
        let mut writes: Vec<WriteOp<'_>> = Vec::new();
        for run in &targets {
            let content = &buf[run.at * block..(run.at + run.count) * block];
            let steps = (run.first.file_offset()..).step_by(WRITE_STEP);
            writes.extend(
                steps.zip(content.chunks(WRITE_STEP)).map(|(offset, buf)| WriteOp { offset, buf }),
            );
        }
        self.file.write_many(&writes)
    }

    /// Publishes what was copied and is still where it was, and ends the claims. Returns the bytes.
    fn publish_pull(&self, parts: Vec<Part>, copied: Result<()>) -> Result<u64> {
        let most = parts.iter().map(|part| u64::from(part.copied.count_ones())).sum();
        let (mut core, mut outcome) = match copied.and_then(|()| self.make_room(most)) {
            Ok(core) => (core, Ok(())),
            Err(e) => (self.core.lock(), Err(e)),
        };
        let mut blocks = 0;
        for part in parts {
            if outcome.is_ok() {
                match self.publish_part_below(&mut core, &part) {
                    Ok(count) => blocks += count,
                    Err(e) => outcome = Err(e),
                }
            }
            self.release(&mut core, part.claim);
        }
        outcome.map(|()| blocks * BLOCK)
    }

    fn publish_part_below(&self, core: &mut Core, part: &Part) -> Result<u64> {
        let extent = part.claim.extent;
        let now = self.map.vector(extent)?;
        let (mut b, mut blocks) = (0, 0);
        while b < EXTENT_BLOCKS {
            let same = |b: usize| part.copies(b) && now[b] == part.before[b];
            let first = b;
            while b < EXTENT_BLOCKS && same(b) {
                b += 1;
            }
            if b > first {
                let block = extent.first_block().plus(first as u64);
                self.publish_part(core, block, b - first, part.target)?;
                blocks += (b - first) as u64;
                continue;
            }
            if part.copies(b) {
                // Discarded meanwhile: what was written for it takes space for nothing.
                core.punches.push(BlockPunch { extent, target: part.target, first: b, count: 1 });
            }
            b += 1;
        }
        Ok(blocks)
    }

    /// Lets go of the segments that do not stay: afterwards no copy of the superblock, and no page
    /// of the map, names them, and no request reads them. Nobody may fork the disk meanwhile.
    ///
    /// # Errors
    /// `Busy` when blocks of the disk lie in one of them still, or a request that began before does
    /// not end; `NoSpace`, or as [`Disk::checkpoint`].
    pub fn let_go(&self, below: &dyn Below) -> Result<()> {
        self.check_writable()?;
        if self.bytes_below(below)? > 0 {
            return Err(Error::new(Kind::Busy, "it still has data in the segments below")
                .on(self.object())
                .hint("flatten it again"));
        }
        if !self.requests_passed() {
            return Err(Error::new(Kind::Busy, "requests that began long ago have not ended")
                .on(self.object())
                .hint("flatten it again when they have"));
        }
        let mut state = self.checkpoint.lock();
        let mut table = self.table().as_ref().clone();
        table.retain(|i| below.stays(i));
        // Pages of segments that go may say what is hole and what is zero, if nothing else.
        let moves = state.tree.leaves().filter(|(_, at)| !below.stays(at.segment));
        let moves: Vec<_> = moves.map(|(leaf, _)| leaf).collect();
        for leaf in &moves {
            self.map.check_changes(leaf.first_extent().first_block(), LEAF_SPAN / BLOCK)?;
        }
        self.core.lock().dirty.extend(moves);
        state.tree.move_in(&|segment| below.stays(segment));
        let old = state.superblock.table;
        let new = self.write_array(&table.encode())?;
        let flipped = self.checkpoint_locked(&mut state, |sb| sb.table = new);
        flipped.inspect_err(|_| self.drop_array(new))?;
        self.settle_copies(&mut state)?;
        drop(state);
        self.drop_array(old);
        self.table.store(Arc::new(table));
        self.reclaim();
        Ok(())
    }

    /// Waits until every request that began before this call has ended; false when one of them
    /// takes too long.
    fn requests_passed(&self) -> bool {
        let (tag, since) = (self.gate.epoch(), Instant::now());
        loop {
            {
                let _one = self.reclaiming.lock();
                self.gate.try_advance();
                self.gate.try_advance();
            }
            if self.gate.passed(tag) {
                return true;
            }
            if since.elapsed() > PASS_MAX {
                return false;
            }
            std::thread::sleep(LOOK);
        }
    }
}
