//! Older superblock generations. None is kept on purpose; a copy may hold one when a crash or a
//! lost write kept the newest state from reaching all four.
//!
//! An older map is good again only together with every journal record made since: those records
//! tell which blocks moved, and which of the extents it names hold other data by now. So a
//! generation is usable when the journal still leads from it to the newest state, and only then.

use format::limits::LEAF_ENTRIES;
use format::superblock::{Attached, State, Superblock};
use format::units::LeafNo;
use format::{Error, Kind, Result};

use crate::disk::load::Loaded;
use crate::disk::load::ranges::Ranges;
use crate::disk::problem::{Problem, Severity};
use crate::segment::read_copies;
use crate::store::File;

/// Older states that valid copies hold, newest first, as they are to be loaded.
pub(super) fn candidates(file: &dyn File, newest: &Superblock) -> Result<Vec<Superblock>> {
    let pages = read_copies(file)?;
    let copies = pages.iter().enumerate().filter_map(|(i, p)| Superblock::decode(p, i).ok());
    let mut older: Vec<Superblock> = copies
        .filter(|sb| sb.generation < newest.generation && sb.segment == newest.segment)
        .collect();
    older.sort_by_key(|sb| std::cmp::Reverse(sb.generation));
    older.dedup_by_key(|sb| sb.generation);
    // The journal goes on through later openings: what replay accepts is bounded by the newest.
    let attached = if newest.attached == Attached::No { Attached::Plain } else { newest.attached };
    let as_loaded = |sb| Superblock { epoch: newest.epoch, attached, ..sb };
    Ok(older.into_iter().map(as_loaded).collect())
}

/// Whether `older` may take the place of `newest`.
///
/// # Errors
/// `Corrupt`, saying why it may not.
pub(super) fn check(older: &Loaded, newest: &Loaded) -> Result<()> {
    let (old, new) = (&older.superblock, &newest.superblock);
    let refuse = |why: String| Err(Error::new(Kind::Corrupt, why));
    if new.state == State::Sealed {
        return refuse("the segment is sealed: its newest state is its only one".into());
    }
    if old.virtual_size != new.virtual_size {
        return refuse(format!(
            "the disk was resized since (from {} bytes): its space may hold other data",
            old.virtual_size
        ));
    }
    if older.missing.is_some() || older.cursor.seq < new.journal.seq {
        return refuse(format!(
            "the journal no longer leads from it to the newest state (it ends at record {}, the \
             newest state begins at record {}): its space may hold other data",
            older.cursor.seq, new.journal.seq
        ));
    }
    let bad = |p: &&Problem| p.what.severity() == Severity::NoWrite;
    if let Some(problem) = older.problems.iter().find(bad) {
        return refuse(format!("it is damaged itself: {}: {}", problem.object, problem.detail));
    }
    Ok(())
}

/// Blocks that both states can say something about, and say differently.
pub(super) fn differences(older: &Loaded, newest: &Loaded) -> Ranges {
    let mut differ = Ranges::default();
    let named = |loaded: &Loaded| -> Vec<LeafNo> {
        let named = loaded.tree.leaves().map(|(leaf, _)| leaf);
        named.chain(loaded.dirty.iter()).collect()
    };
    let count = LeafNo::count_for(newest.superblock.virtual_size);
    for leaf in named(older).into_iter().chain(named(newest)).filter(|leaf| leaf.0 < count) {
        let first = leaf.first_extent();
        for extent in (0..LEAF_ENTRIES as u64).map(|i| first.plus(i)) {
            let (Ok(a), Ok(b)) = (older.map.vector(extent), newest.map.vector(extent)) else {
                continue;
            };
            for (i, _) in (0u64..).zip(a.iter().zip(&b)).filter(|(_, (a, b))| a != b) {
                differ.add(extent.first_block().plus(i), 1);
            }
        }
    }
    differ
}
