//! How a repair changes a segment: one new superblock state, published when everything that it
//! names is durable.
//!
//! Order, and the crash it defends against:
//! 1. a sync (by the caller): the present state is durable and not in the host's cache alone;
//! 2. copied data (by the caller) and map pages go behind the end of the file, where no state of
//!    the segment names anything — a cut leaves the old state and some unused space; then a sync;
//! 3. the superblock copies are written one by one with a sync after each, a copy that alone holds
//!    the newest state, or the older one that is to replace it, last — so at every instant the
//!    state before or the new one is whole, and a repair that was cut short can be repeated;
//! 4. only then the ring is wiped, if records were given up — before it is still needed.
//!
//! Test: `check_and_repair` (`every_crash_point_of_a_repair_…`).

use std::sync::Arc;

use format::limits::{EXTENT, PAGE, SUPERBLOCK_COPIES, SUPERBLOCK_OFFSETS};
use format::node::NodePtr;
use format::superblock::{Attached, JournalHead, Superblock};
use format::units::{Generation, PageNo, index};
use format::{Error, Result};

use crate::disk::load::Loaded;
use crate::disk::map::Encoded;
use crate::segment::read_copies;
use crate::store::buf::AlignedBuf;
use crate::store::{File, WriteOp};

/// Bytes of the ring wiped at once.
const WIPE_BYTES: u64 = 1 << 20;

/// What a repair publishes, besides the map.
#[derive(Debug, Clone, Copy)]
pub(super) struct Publish {
    /// Records of the journal are given up: the ring still proves that they are missing.
    pub(super) wipe_ring: bool,
    /// There was a tail, and its records are in the map or given up.
    pub(super) tail_done: bool,
}

/// Writes the changed pages of the loaded map, which superblock state `generation` will name, and
/// makes them durable, with what was written before. Takes space behind the end of the file:
/// [`Loaded::reserve_file`] was called.
pub(super) fn write(loaded: &mut Loaded, generation: Generation) -> Result<()> {
    let file = Arc::clone(&loaded.own_file().file);
    let writes = draft(loaded, generation)?;
    let end = loaded.space.end().0 * EXTENT;
    if end > file.size()? {
        file.set_len(end)?;
    }
    let ops: Vec<WriteOp<'_>> =
        writes.iter().map(|(page, buf)| WriteOp { offset: page.file_offset(), buf }).collect();
    file.write_many(&ops)?;
    file.sync()
}

/// Makes the loaded map, which [`write`] has written, the durable one. `newest` is the newest
/// superblock, whatever was loaded.
pub(super) fn publish(loaded: &Loaded, newest: &Superblock, how: Publish) -> Result<()> {
    let file = loaded.own_file().file.as_ref();
    let attached = match loaded.superblock.attached {
        Attached::WithTail if !how.tail_done => Attached::WithTail,
        _ => Attached::No,
    };
    let epoch = newest.epoch.next();
    let sb = Superblock {
        generation: newest.generation.next(),
        epoch,
        attached,
        root: loaded.tree.root(),
        journal: JournalHead { epoch, ..loaded.cursor },
        extents_end: loaded.space.end(),
        ..loaded.superblock.clone()
    };
    for copy in order(file)? {
        let page = AlignedBuf::from_slice(&sb.encode(copy));
        file.write_at(SUPERBLOCK_OFFSETS[copy], &page)?;
        file.sync()?;
    }
    if how.wipe_ring {
        wipe_ring(file, &sb)?;
    }
    Ok(())
}

/// The copies, those that alone hold a state last.
fn order(file: &dyn File) -> Result<Vec<usize>> {
    let pages = read_copies(file)?;
    let held: Vec<Option<Generation>> = (0..SUPERBLOCK_COPIES)
        .map(|copy| Superblock::decode(&pages[copy], copy).ok().map(|sb| sb.generation))
        .collect();
    let alone = |copy: &usize| {
        let state = held[*copy];
        state.is_some() && held.iter().filter(|other| **other == state).count() == 1
    };
    let mut order: Vec<usize> = (0..SUPERBLOCK_COPIES).collect();
    order.sort_by_key(alone);
    Ok(order)
}

/// Gives every changed leaf, and every inner page above one, a new page.
fn draft(loaded: &mut Loaded, generation: Generation) -> Result<Vec<(PageNo, AlignedBuf)>> {
    let own = loaded.superblock.own_index;
    let mut writes: Vec<(PageNo, AlignedBuf)> = Vec::new();
    let mut tree = loaded.tree.clone();
    for leaf in loaded.dirty.iter() {
        // A damaged leaf stays as it is on disk; no record was replayed over it.
        let Some(encoded) = loaded.map.encode(leaf) else { continue };
        let ptr = match encoded {
            Encoded::Whole(ptr) => ptr,
            Encoded::Leaf(bytes) => {
                let page = loaded.space.take_pages(1)?;
                writes.push((page, AlignedBuf::from_slice(bytes.page.as_slice())));
                let mut run = None;
                if bytes.vector_pages() > 0 {
                    let first = loaded.space.take_pages(bytes.vector_pages())?;
                    writes.push((first, AlignedBuf::from_slice(&bytes.vectors)));
                    run = Some(first);
                }
                NodePtr::Page(bytes.pointer(own, page, run, generation))
            }
        };
        let unreadable = |_| Error::corrupt("the map page above a changed leaf is damaged");
        tree.set_leaf(leaf, ptr).map_err(unreadable)?;
    }
    let space = &mut loaded.space;
    let written = tree.write_dirty(own, generation, &mut || space.take_pages(1))?;
    let pages = written.pages.iter().map(|(page, bytes)| (*page, AlignedBuf::from_slice(bytes)));
    writes.extend(pages);
    loaded.tree = tree;
    Ok(writes)
}

/// Zeroes the ring. The superblock that is durable by now needs nothing in it.
fn wipe_ring(file: &dyn File, sb: &Superblock) -> Result<()> {
    let zeroes = AlignedBuf::zeroed(index(WIPE_BYTES));
    let (mut at, end) = (sb.journal_offset(0), sb.journal_offset(sb.journal_pages()));
    while let Some((start, stop)) = file.next_data(at)?.filter(|(start, _)| *start < end) {
        at = start / PAGE as u64 * PAGE as u64;
        let stop = stop.next_multiple_of(PAGE as u64).min(end);
        while at < stop {
            let len = WIPE_BYTES.min(stop - at);
            file.write_at(at, &zeroes[..index(len)])?;
            at += len;
        }
    }
    file.sync()
}
