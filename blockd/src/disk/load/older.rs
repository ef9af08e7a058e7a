//! Older superblock generations. None is kept on purpose; a copy may hold one when a crash or a
//! lost write kept the newest state from reaching all four.
//!
//! An older map is good again only together with every journal record made since: those records
//! tell which blocks moved, and which of the extents it names hold other data by now. So a
//! generation is usable when the journal still leads from it to the newest state, and only then.
//!
//! Whoever brings the copies to one state overwrites the older ones: an opening for writing asks
//! [`keep`] first, a repair asks [`find`], a check tells of it ([`better`]).
//!
//! Test: `check_and_repair` (`an_older_generation_…`, `a_better_older_generation_…`).

use std::sync::Arc;

use format::limits::LEAF_ENTRIES;
use format::superblock::{Attached, State, Superblock};
use format::units::{Generation, LeafNo};
use format::{Error, Kind, Result};

use super::ranges::Ranges;
use super::{How, Loaded, OnDamage, load_state};
use crate::disk::problem::{Problem, Problems, Severity, What};
use crate::disk::tail::Tail;
use crate::segment::{Segments, read_copies};
use crate::store::File;

/// An older state that is better than the newest one.
pub struct Older {
    /// It, with the journal replayed over it.
    pub loaded: Loaded,
    /// Bytes of the disk that can be read in it and cannot be read in the newest state.
    pub regained_bytes: u64,
}

/// Bytes of the virtual disk that cannot be read, or were given up.
fn lost_bytes(loaded: &Loaded) -> u64 {
    let ranges = [&loaded.damaged, &loaded.dropped];
    let size = loaded.superblock.virtual_size;
    ranges.into_iter().flat_map(|r| r.in_bytes(size)).map(|r| r.len).sum()
}

/// The newest older state that may take the place of `newest` and is less damaged. `tail` is what a
/// killed process left behind; `refused` is told why others are not taken.
///
/// # Errors
/// What the host reports.
pub fn find(
    file: &Arc<dyn File>,
    segments: &dyn Segments,
    tail: Option<&Tail>,
    (newest, on_damage): (&Loaded, OnDamage),
    refused: &mut dyn FnMut(Generation, &Error),
) -> Result<Option<Older>> {
    let now = lost_bytes(newest);
    if now == 0 {
        return Ok(None);
    }
    for sb in candidates(file.as_ref(), &newest.superblock)? {
        let generation = sb.generation;
        let how = How { on_damage, search_ring: true };
        let loaded = load_state(file, sb, segments, tail, (how, Problems::default()));
        let usable = loaded.and_then(|loaded| {
            check(&loaded, newest)?;
            let then = lost_bytes(&loaded);
            if then >= now {
                return Err(Error::corrupt("it is no less damaged"));
            }
            Ok(Older { loaded, regained_bytes: now - then })
        });
        match usable {
            Ok(older) => return Ok(Some(older)),
            Err(e) if e.kind().is_of_host() => return Err(e),
            // Whatever else ends the loading, a record of an unknown kind among it, ends it for
            // this generation only.
            Err(e) => refused(generation, &e),
        }
    }
    Ok(None)
}

/// What forbids to bring the superblock copies to the newest state: an older one that is better.
///
/// # Errors
/// What the host reports.
pub fn better(
    file: &Arc<dyn File>,
    segments: &dyn Segments,
    tail: Option<&Tail>,
    newest: &Loaded,
) -> Result<Option<Problem>> {
    let found = find(file, segments, tail, (newest, OnDamage::Keep), &mut |_, _| ())?;
    Ok(found.map(|older| {
        let reason = format!(
            "the newest map is damaged, and this copy, which writing would overwrite, still leads \
             to {} bytes of what cannot be read",
            older.regained_bytes
        );
        let hint = "run `offshoot disk check`, then `offshoot disk repair --older-generation` to \
                    go back to that generation, or `--drop-damaged` to give up what is damaged";
        let object =
            format!("superblock copy of generation {}", older.loaded.superblock.generation);
        Problem::new(What::OlderGeneration, object, &Error::corrupt(reason).hint(hint))
    }))
}

/// Refuses to go on where the superblock copies would be brought to the newest state, and an older
/// one is better.
///
/// # Errors
/// `Corrupt` when there is one, or what the host reports.
pub fn keep(
    file: &Arc<dyn File>,
    segments: &dyn Segments,
    tail: Option<&Tail>,
    newest: &Loaded,
) -> Result<()> {
    better(file, segments, tail, newest)?.map_or(Ok(()), |problem| Err(problem.to_error()))
}

/// True when a valid copy holds an older state, whatever it is worth.
///
/// # Errors
/// What the host reports.
pub fn any(file: &dyn File, newest: &Superblock) -> Result<bool> {
    Ok(!candidates(file, newest)?.is_empty())
}

/// Older states that valid copies hold, newest first, as they are to be loaded.
fn candidates(file: &dyn File, newest: &Superblock) -> Result<Vec<Superblock>> {
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
fn check(older: &Loaded, newest: &Loaded) -> Result<()> {
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
pub(crate) fn differences(older: &Loaded, newest: &Loaded) -> Ranges {
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
