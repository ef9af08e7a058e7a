//! `disk map`.

use std::io::{self, BufWriter, Write as _};

use blockd::disk::Disk;
use blockd::disk::map::Piece;
use blockd::store::Access;
use format::entry::BlockState;
use format::limits::BLOCK;
use format::units::GuestBlock;
use format::{Kind, Result};
use serde::Serialize;
use serde::ser::{SerializeSeq as _, Serializer as _};
use uuid::Uuid;

use super::Session;
use super::inspect::short;
use crate::cli::Name;
use crate::output::{Outcome, Verdict, wrote};

/// Blocks of the map looked at in one call: 512 MiB of disk.
const WINDOW: u64 = (512 << 20) / BLOCK;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Hole,
    Zero,
    Data,
    Damaged,
}

/// A range of the disk in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Range {
    offset: u64,
    length: u64,
    state: State,
    /// Where the data is; absent for other states.
    #[serde(skip_serializing_if = "Option::is_none")]
    segment: Option<Uuid>,
    /// Byte offset in the file of that segment.
    #[serde(skip_serializing_if = "Option::is_none")]
    file_offset: Option<u64>,
}

impl Range {
    fn of(disk: &Disk, piece: Piece) -> Result<Self> {
        let (state, place) = match piece.state {
            BlockState::Hole => (State::Hole, None),
            BlockState::Zero => (State::Zero, None),
            BlockState::Data { segment, block } => {
                let row = disk.table().row(segment)?;
                (State::Data, Some((row.segment, row.base.file_offset() + block.file_offset())))
            }
        };
        let (segment, file_offset) = place.unzip();
        let (offset, length) = (piece.block.offset().0, piece.count * BLOCK);
        Ok(Range { offset, length, state, segment, file_offset })
    }

    fn damaged(first: u64, count: u64) -> Self {
        let (offset, length) = (first * BLOCK, count * BLOCK);
        Range { offset, length, state: State::Damaged, segment: None, file_offset: None }
    }

    /// Takes in `next` if it goes on where this ends.
    fn join(&mut self, next: &Range) -> bool {
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
fn collect(disk: &Disk, first: u64, count: u64, ranges: &mut Vec<Range>) -> Result<()> {
    let before = ranges.len();
    let resolved = disk.map().resolve(GuestBlock(first), count, &mut |piece| {
        ranges.push(Range::of(disk, piece)?);
        Ok(())
    });
    match resolved {
        Err(e) if e.kind() == Kind::Corrupt => ranges.truncate(before),
        other => return other,
    }
    if count == 1 {
        ranges.push(Range::damaged(first, count));
        return Ok(());
    }
    // Powers of two, so that the halves end up being the damaged leaves and extents themselves.
    let half = count.next_power_of_two() / 2;
    collect(disk, first, half, ranges)?;
    collect(disk, first + half, count - half, ranges)
}

/// Calls `visit` with the ranges of the whole disk, neighbours joined.
fn walk(disk: &Disk, visit: &mut dyn FnMut(Range) -> Outcome<()>) -> Outcome<()> {
    let blocks = disk.size().div_ceil(BLOCK);
    let mut open: Option<Range> = None;
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

/// `disk map`
pub fn map(s: &Session, args: &Name) -> Outcome {
    let dir = s.open(Access::Read)?;
    let disk = s.disk(&dir, &args.name, args.tail)?;
    let mut out = BufWriter::new(io::stdout().lock());
    if s.out.json {
        let mut json = serde_json::Serializer::pretty(&mut out);
        let mut list = wrote(json.serialize_seq(None).map_err(io::Error::from))?;
        walk(&disk, &mut |range| wrote(list.serialize_element(&range).map_err(io::Error::from)))?;
        wrote(list.end().map_err(io::Error::from))?;
        wrote(writeln!(out))?;
    } else {
        wrote(writeln!(
            out,
            "{:>18} {:>18}  {:<8}SEGMENT   FILE OFFSET",
            "OFFSET", "LENGTH", "STATE"
        ))?;
        walk(&disk, &mut |range| wrote(writeln!(out, "{}", line(&range))))?;
    }
    wrote(out.flush()).map(|()| Verdict::Done)
}

fn line(r: &Range) -> String {
    let state = match r.state {
        State::Hole => "hole",
        State::Zero => "zero",
        State::Data => "data",
        State::Damaged => "damaged",
    };
    let place = match (r.segment, r.file_offset) {
        (Some(segment), Some(offset)) => format!("{}  {offset}", short(segment)),
        _ => String::new(),
    };
    format!("{:>18} {:>18}  {state:<8}{place}", r.offset, r.length).trim_end().to_owned()
}
