//! The ranges of a disk, and where their data lies.

use format::entry::BlockState;
use format::limits::BLOCK;
use format::units::GuestBlock;
use format::{Error, Kind, Result};

use crate::api::types::{MapRange, MapState};
use crate::disk::Disk;
use crate::disk::map::Piece;

/// Blocks of the map looked at in one call: 512 MiB of disk.
const WINDOW: u64 = (512 << 20) / BLOCK;

impl MapRange {
    fn of(disk: &Disk, piece: Piece) -> Result<Self> {
        let (state, place) = match piece.state {
            BlockState::Hole => (MapState::Hole, None),
            BlockState::Zero => (MapState::Zero, None),
            BlockState::Data { segment, block } => {
                let table = disk.table();
                let row = table.row(segment)?;
                (MapState::Data, Some((row.segment, row.base.file_offset() + block.file_offset())))
            }
        };
        let (segment, file_offset) = place.unzip();
        let (offset, length) = (piece.block.offset().0, piece.count * BLOCK);
        Ok(MapRange { offset, length, state, segment, file_offset })
    }

    fn damaged(first: u64, count: u64) -> Self {
        let (offset, length) = (first * BLOCK, count * BLOCK);
        MapRange { offset, length, state: MapState::Damaged, segment: None, file_offset: None }
    }

    /// Takes in `next` if it goes on where this ends.
    fn join(&mut self, next: &MapRange) -> bool {
        let goes_on = self.offset + self.length == next.offset
            && self.state == next.state
            && self.segment == next.segment
            && self.file_offset.map(|o| o + self.length) == next.file_offset;
        if goes_on {
            self.length += next.length;
        }
        goes_on
    }
}

/// The ranges of `count` blocks; damage costs what it covers and nothing more.
fn collect(disk: &Disk, first: u64, count: u64, ranges: &mut Vec<MapRange>) -> Result<()> {
    let before = ranges.len();
    let resolved = disk.map().resolve(GuestBlock(first), count, &mut |piece| {
        ranges.push(MapRange::of(disk, piece)?);
        Ok(())
    });
    match resolved {
        Err(e) if e.kind() == Kind::Corrupt => ranges.truncate(before),
        other => return other,
    }
    if count == 1 {
        ranges.push(MapRange::damaged(first, count));
        return Ok(());
    }
    // Powers of two, so that the halves end up being the damaged leaves and extents themselves.
    let half = count.next_power_of_two() / 2;
    collect(disk, first, half, ranges)?;
    collect(disk, first + half, count - half, ranges)
}

/// Calls `visit` with the ranges of the whole disk, neighbours joined.
///
/// # Errors
/// `Corrupt` or what the host reports, or what `visit` reports.
pub fn walk<E: From<Error>>(
    disk: &Disk,
    visit: &mut dyn FnMut(MapRange) -> Result<(), E>,
) -> Result<(), E> {
    let blocks = disk.size().div_ceil(BLOCK);
    let mut open: Option<MapRange> = None;
    let mut ranges = Vec::new();
    for first in (0..blocks).step_by(WINDOW.try_into().expect("a constant that fits")) {
        ranges.clear();
        collect(disk, first, WINDOW.min(blocks - first), &mut ranges)?;
        for range in &ranges {
            if !open.as_mut().is_some_and(|last| last.join(range)) {
                open.replace(*range).map_or(Ok(()), &mut *visit)?;
            }
        }
    }
    let Some(mut last) = open else { return Ok(()) };
    // The disk may end inside its last block.
    last.length = last.length.min(disk.size() - last.offset);
    visit(last)
}
