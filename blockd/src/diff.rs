//! What changed between two disks: ranges whose maps differ, by the identity of what they point at.
//!
//! Two ranges are the same when they point at the same block of the same segment, or both read as
//! zeroes. Equal content in different places counts as changed: the answer is exact about the map
//! and safe about content, and costs no data reads.

use format::entry::BlockState;
use format::limits::BLOCK;
use format::units::{BlockId, GuestBlock};
use format::{Error, Result};
use uuid::Uuid;

use crate::disk::Disk;
use crate::disk::map::Piece;
use crate::disk::problem::GuestRange;

/// Blocks compared at a time: 64 MiB of disk.
const WINDOW: u64 = 16_384;

/// Where blocks are, independent of one map's numbering; `None` reads as zeroes.
type Place = Option<(Uuid, BlockId)>;

fn place(disk: &Disk, state: BlockState) -> Result<Place> {
    match state {
        BlockState::Hole | BlockState::Zero => Ok(None),
        BlockState::Data { segment, block } => {
            let table = disk.table();
            let row = table.row(segment)?;
            Ok(Some((row.segment, BlockId(block.0 + row.base.block(0).0))))
        }
    }
}

fn window(disk: &Disk, first: GuestBlock, count: u64) -> Result<Vec<(Piece, Place)>> {
    let blocks = disk.size().div_ceil(BLOCK);
    let within = blocks.saturating_sub(first.0).min(count);
    let mut pieces = Vec::new();
    if within > 0 {
        disk.map().resolve(first, within, &mut |piece| {
            pieces.push((piece, place(disk, piece.state)?));
            Ok(())
        })?;
    }
    if within < count {
        // Past the end a disk reads as zeroes, as it does after it was made larger.
        let block = first.plus(within);
        pieces.push((Piece { block, count: count - within, state: BlockState::Hole }, None));
    }
    Ok(pieces)
}

/// Calls `visit` with every range of the larger of the two disks in which their maps differ, in
/// order, neighbours joined; all in whole blocks, but for the end of the disk.
///
/// # Errors
/// `Corrupt` in a damaged range of either disk, or what `visit` reports.
pub fn changed(a: &Disk, b: &Disk, visit: &mut dyn FnMut(GuestRange) -> Result<()>) -> Result<()> {
    changed_in(a, b, GuestRange { offset: 0, len: a.size().max(b.size()) }, visit)
}

/// As [`changed`], within one range; what is given is cut to it. Past the end of the smaller disk
/// the range compares with zeroes.
///
/// # Errors
/// As [`changed`].
pub fn changed_in(
    a: &Disk,
    b: &Disk,
    range: GuestRange,
    visit: &mut dyn FnMut(GuestRange) -> Result<()>,
) -> Result<()> {
    let range_end = range.offset + range.len;
    let blocks = range_end.div_ceil(BLOCK);
    let mut open: Option<(u64, u64)> = None;
    let mut give = |(first, end): (u64, u64)| {
        let offset = (first * BLOCK).max(range.offset);
        visit(GuestRange { offset, len: (end * BLOCK).min(range_end) - offset })
    };
    let mut first = range.offset / BLOCK;
    while first < blocks {
        let count = WINDOW.min(blocks - first);
        let ours = window(a, GuestBlock(first), count)?;
        let theirs = window(b, GuestBlock(first), count)?;
        let mut theirs = theirs.iter().peekable();
        for (piece, at) in &ours {
            let mut block = piece.block.0;
            let end = block + piece.count;
            while block < end {
                let Some((other, other_at)) = theirs.peek() else {
                    return Err(Error::corrupt("two maps cover different ranges"));
                };
                let other_end = other.block.0 + other.count;
                let stop = end.min(other_end);
                let here = shift(*at, block - piece.block.0);
                if here != shift(*other_at, block - other.block.0) {
                    open = match open {
                        Some((from, to)) if to == block => Some((from, stop)),
                        done => {
                            done.map_or(Ok(()), &mut give)?;
                            Some((block, stop))
                        }
                    };
                }
                if stop == other_end {
                    theirs.next();
                }
                block = stop;
            }
        }
        first += count;
    }
    open.map_or(Ok(()), give)
}

fn shift(at: Place, by: u64) -> Place {
    at.map(|(segment, block)| (segment, block.plus(by)))
}
