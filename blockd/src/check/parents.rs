//! The chain of parents: all of it is there, unchanged, and leads nowhere back.
//!
//! Whether a parent is missing, or is not the recorded one, was noticed when it was opened; here
//! its own superblock copies and its own segment table are looked at.
//!
//! Invariant checked: a parent's table is the beginning of its child's, row by row, since map pages
//! of the parent mean the same in the child (`docs/format.md` §5). So a chain that passes has no
//! loop.

use std::collections::HashMap;

use format::superblock::Seal;
use format::table::SegmentTable;
use format::units::SegmentIdx;
use format::{Error, Kind, Result};
use uuid::Uuid;

use super::pending;
use crate::disk::load::{Loaded, load_table, newest};
use crate::disk::problem::{Problem, Problems, What};
use crate::segment::{Sealed, Segments};

/// Checks every parent that could be opened.
pub(super) fn check(
    loaded: &Loaded,
    segments: &dyn Segments,
    problems: &mut Problems,
) -> Result<()> {
    let own = loaded.superblock.own_index;
    let places: HashMap<Uuid, SegmentIdx> =
        loaded.table.iter().map(|(i, row)| (row.segment, i)).collect();
    for (i, row) in loaded.table.iter().filter(|(i, _)| *i != own) {
        if loaded.rows.get(usize::from(i.get())).is_none_or(Option::is_none) {
            continue;
        }
        let object = format!("segment {}", row.segment);
        let sealed = segments.sealed(row.segment)?;
        match check_parent(&sealed, (&object, row.digest.is_some()), problems) {
            Ok(table) => {
                if let Some(problem) = compare(loaded, (i, row.segment), &table, &places) {
                    problems.note(problem);
                }
            }
            Err(e) if e.kind() == Kind::Io => return Err(e),
            Err(e) => problems.note(Problem::new(What::ParentChanged, object, &e)),
        }
    }
    Ok(())
}

/// Checks a parent by itself; returns its segment table. `summed`: it had sums when the disk was
/// created over it.
fn check_parent(
    sealed: &Sealed,
    (object, summed): (&str, bool),
    problems: &mut Problems,
) -> Result<SegmentTable> {
    let (sb, copies) = newest(sealed.file.as_ref())?;
    for mut problem in copies.into_vec() {
        problem.object = format!("{}, {object}", problem.object);
        problems.note(problem);
    }
    // What a fork has frozen, or an inheritance pinned, gets its sums by and by.
    if sb.seal != Seal::Done && summed {
        problems.note(pending(object));
    }
    load_table(sealed.file.as_ref(), &sb)
}

/// Compares the table of the parent in row `at` with that of the disk.
fn compare(
    loaded: &Loaded,
    (at, parent): (SegmentIdx, Uuid),
    table: &SegmentTable,
    places: &HashMap<Uuid, SegmentIdx>,
) -> Option<Problem> {
    let object = format!("segment {parent}");
    let below = |segment: &Uuid| places.get(segment).is_some_and(|place| *place > at);
    if let Some((_, row)) = table.iter().find(|(_, row)| below(&row.segment)) {
        let error = Error::corrupt(format!(
            "it stands on segment {}, which stands on it: a loop of parents",
            row.segment
        ));
        return Some(Problem::new(What::ParentLoop, object, &error));
    }
    let same = |(i, row): (SegmentIdx, &format::table::Row)| {
        loaded.table.row(i).is_ok_and(|ours| ours.segment == row.segment)
    };
    if table.row(at).is_ok_and(|row| row.segment == parent) && table.iter().all(same) {
        return None;
    }
    let error = Error::corrupt("the parents it stands on are not those that this disk knows");
    Some(Problem::new(What::ParentChanged, object, &error))
}
