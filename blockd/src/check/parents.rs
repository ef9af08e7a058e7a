//! The chain of parents: all of it is there, unchanged, and leads nowhere back.
//!
//! Whether a parent is missing, or is not the recorded one, was noticed when it was opened; here
//! its own superblock copies and its own segment table are looked at.
//!
//! Invariants checked: the rows of a parent's table are rows of its child's, in the same places,
//! since map pages of the parent mean the same in the child (`docs/format.md` §5); and no two
//! segments stand on each other.

use std::collections::{HashMap, HashSet};

use format::superblock::Seal;
use format::table::SegmentTable;
use format::units::SegmentIdx;
use format::{Error, Result};
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
    let mut tables: HashMap<Uuid, SegmentTable> = HashMap::new();
    for (i, row) in loaded.table.iter().filter(|(i, _)| *i != own) {
        if loaded.rows.get(usize::from(i.get())).is_none_or(Option::is_none) {
            continue;
        }
        let object = format!("segment {}", row.segment);
        let sealed = segments.sealed(row.segment)?;
        match check_parent(&sealed, (&object, row.digest.is_some()), problems) {
            Ok(table) => _ = tables.insert(row.segment, table),
            Err(e) if e.kind().is_of_host() => return Err(e),
            Err(e) => problems.note(Problem::new(What::ParentChanged, object, &e)),
        }
    }
    let stands_on: HashMap<Uuid, HashSet<Uuid>> = tables
        .iter()
        .map(|(segment, table)| (*segment, table.iter().map(|(_, row)| row.segment).collect()))
        .collect();
    for (i, row) in loaded.table.iter() {
        if let Some(table) = tables.get(&row.segment)
            && let Some(problem) = compare(loaded, (i, row.segment), table, &stands_on)
        {
            problems.note(problem);
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
    stands_on: &HashMap<Uuid, HashSet<Uuid>>,
) -> Option<Problem> {
    let object = format!("segment {parent}");
    let own = loaded.superblock.segment;
    let on_it = |segment: &Uuid| {
        let below = stands_on.get(segment);
        *segment == own || (*segment != parent && below.is_some_and(|b| b.contains(&parent)))
    };
    if let Some((_, row)) = table.iter().find(|(_, row)| on_it(&row.segment)) {
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
