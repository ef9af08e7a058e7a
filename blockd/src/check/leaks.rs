//! Leaks: host space of a segment file that nothing names. A crash leaves them (space that was
//! written to and never published, a punch that was never done); they cost space and nothing else.
//!
//! Invariant: what any copy of the superblock, the journal, the segment table, the checksums or the
//! map after replay names is never a leak. With damage in the map, nothing is known to be one.

use format::entry::BlockState;
use format::limits::{BLOCK, SUPERBLOCK_OFFSETS};
use format::{Kind, Result};

use crate::disk::load::Loaded;
use crate::store::File;

/// A run of 4 KiB blocks of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
}

/// Bytes in the runs.
pub(super) fn bytes(runs: &[Run]) -> u64 {
    runs.iter().map(|r| r.count * BLOCK).sum()
}

/// What is named, as block ranges in order: first, and the one behind the last.
fn named(loaded: &Loaded) -> Result<Vec<(u64, u64)>> {
    let sb = &loaded.superblock;
    let mut all: Vec<(u64, u64)> =
        SUPERBLOCK_OFFSETS.iter().map(|offset| (offset / BLOCK, offset / BLOCK + 1)).collect();
    all.push((sb.journal_offset(0) / BLOCK, sb.data_start().first_page().0));
    all.extend(loaded.own_pages().into_iter().map(|(page, count)| (page.0, page.0 + count)));
    loaded.pieces(&mut |piece| {
        if let BlockState::Data { segment, block } = piece.state
            && segment == sb.own_index
        {
            all.push((block.0, block.0 + piece.count));
        }
        Ok(())
    })?;
    all.sort_unstable();
    Ok(all)
}

/// Finds the leaks of a disk without damage.
pub(super) fn find(loaded: &Loaded) -> Result<Vec<Run>> {
    let named = named(loaded)?;
    let file = loaded.own_file().file.as_ref();
    let mut leaks = Vec::new();
    let (mut next, mut at) = (0, 0);
    while let Some((start, end)) = file.next_data(at)? {
        at = end;
        let (mut first, last) = (start / BLOCK, end.div_ceil(BLOCK));
        // Ranges may share a block of the file: what lies before the data is passed for good.
        while next < named.len() && named[next].1 <= first {
            next += 1;
        }
        for &(from, to) in &named[next..] {
            if from >= last {
                break;
            }
            if from > first {
                leaks.push(Run { first, count: from - first });
            }
            first = first.max(to);
        }
        if first < last {
            leaks.push(Run { first, count: last - first });
        }
    }
    Ok(leaks)
}

/// Gives leaks back to the host, durably. Returns false when the host cannot take them.
///
/// A power cut in between keeps any of the punches: what they cover is named by nothing.
pub(super) fn punch(file: &dyn File, runs: &[Run]) -> Result<bool> {
    for run in runs {
        match file.punch(run.first * BLOCK, run.count * BLOCK) {
            Err(e) if e.kind() == Kind::Unsupported => return Ok(false),
            outcome => outcome?,
        }
    }
    file.sync()?;
    Ok(true)
}
