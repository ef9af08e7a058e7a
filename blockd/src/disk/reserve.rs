//! Space held ahead, so that a full host file system stops first writes and nothing else.
//!
//! While a disk is open for writing it holds:
//! - the pages of the journal ring ahead of the cursor, enough for all that the tail can hold, and
//!   soon the whole ring: what completed can be flushed, a discard that will give space back
//!   included;
//! - some extents for map pages (`Core::spare`), for a checkpoint that finds no space elsewhere.
//!
//! A disk without live clients holds only what a few flushes and a small checkpoint need: who works
//! on it for a moment is to find space for data where there is little, and to leave none behind.
//!
//! Neither is more than a promise of the host: where it cannot give one, everything works as it
//! would without. A disk whose last checkpoint has no space all the same is closed with its
//! journal, as a power cut after the last flush would leave it.
//!
//! Test: `full_host`.

use format::journal::pages_for;
use format::limits::{BLOCKS_PER_EXTENT, EXTENT, HEADER_EXTENTS, PAGE};
use format::superblock::{Attached, Superblock};
use format::units::{PageNo, index};
use format::{Error, Kind, Result};

use super::{Commit, Core, Disk};

/// Parts of the ring that are held one by one: a ring is a multiple of sixteen pages.
const RING_PARTS: u64 = BLOCKS_PER_EXTENT;
/// Extents held for map pages: 1 MiB, some hundred leaves without vectors, or fifteen full ones.
const SPARE_EXTENTS: u64 = 16;
/// The same without live clients.
const SPARE_EXTENTS_OFFLINE: u64 = 2;
/// Pages of the ring that are held ahead without live clients.
const RING_PAGES_OFFLINE: u64 = 16;

/// Where a checkpoint takes its pages from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// Any unused space.
    File,
    /// What was held back; the next page of the extent begun last.
    Spare(Option<PageNo>),
}

impl Disk {
    /// Holds the parts of the ring that the next commit may need, and one more, so that a disk that
    /// is written to soon has the whole ring, and one that is not takes little.
    pub(super) fn hold_ring(&self, commit: &mut Commit) {
        let ring = HEADER_EXTENTS * EXTENT;
        let page = PAGE as u64;
        if !self.live {
            let from = commit.cursor.position;
            let count = RING_PAGES_OFFLINE.min(self.journal_pages - from);
            self.hold(ring + from * page, count * page);
            self.hold(ring, (RING_PAGES_OFFLINE - count) * page);
            return;
        }
        let part = self.journal_pages / RING_PARTS;
        let needed = (pages_for(index(self.tail.capacity())) + 1).div_ceil(part) + 1;
        let first = commit.cursor.position / part;
        let mut more = 1;
        for i in 0..RING_PARTS {
            let at = (first + i) % RING_PARTS;
            if commit.held & (1 << at) != 0 {
                continue;
            }
            if i >= needed && more == 0 {
                break;
            }
            more -= u64::from(i >= needed);
            commit.held |= u16::from(self.hold(ring + at * part * page, part * page)) << at;
        }
    }

    /// Holds extents for map pages, as far as the host has space. Takes none while damage hides
    /// what is used: the file would grow with every opening.
    pub(super) fn hold_spare(&self) {
        if self.hidden {
            return;
        }
        let want = if self.live { SPARE_EXTENTS } else { SPARE_EXTENTS_OFFLINE };
        let mut core = self.core.lock();
        while (core.spare.len() as u64) < want {
            let missing = want - core.spare.len() as u64;
            let Ok(run) = core.space.take_lease(missing) else { return };
            let extents = (0..run.count).map(|i| run.first.plus(i));
            let grown = self.grow(&mut core, run.first.0 + run.count);
            if grown.is_err() || !self.hold(run.first.file_offset(), run.count * EXTENT) {
                return extents.for_each(|e| core.space.give_back(e));
            }
            core.spare.extend(extents);
        }
    }

    /// Gives the extents for map pages back to the host.
    pub(super) fn release_spare(&self) {
        let mut core = self.core.lock();
        for e in std::mem::take(&mut core.spare) {
            self.punch(e.file_offset(), EXTENT);
            core.space.give_back(e);
        }
    }

    /// True when nothing more can be done to have space for later writes to a range.
    fn hold(&self, offset: u64, len: u64) -> bool {
        match self.file.reserve(offset, len) {
            Ok(()) => true,
            Err(e) if e.kind() == Kind::Unsupported => true,
            Err(e) if e.kind() == Kind::NoSpace => false,
            Err(e) => {
                if self.hold_failed.is_first() {
                    tracing::warn!(disk = %self.object(), error = %e, "no space is held ahead");
                }
                false
            }
        }
    }

    /// Takes `count` map pages in one run from the spare extents.
    pub(super) fn take_spare(
        core: &mut Core,
        next: &mut Option<PageNo>,
        count: u8,
    ) -> Result<PageNo> {
        let fits = |page: &PageNo| page.in_extent() + usize::from(count) <= 16;
        let page = match next.filter(fits) {
            Some(page) => page,
            None => {
                let full = || Error::new(Kind::NoSpace, "the changed part of the map is too large");
                core.spare.pop().ok_or_else(full)?.first_page()
            }
        };
        let after = page.plus(count.into());
        *next = (after.extent() == page.extent()).then_some(after);
        core.space.hold_pages(page, count);
        Ok(page)
    }

    /// Pages of a checkpoint that failed go back to where they came from.
    pub(super) fn put_back_spare(&self, pages: &[(PageNo, u8)]) {
        let mut core = self.core.lock();
        for (page, count) in pages {
            if let Some(extent) = core.space.give_back_pages(*page, *count) {
                core.spare.push(extent);
            }
        }
    }

    /// Ends this opening with a journal to replay: everything is flushed, and there is no space for
    /// a checkpoint. The superblock says that no tail belongs to it.
    ///
    /// The flush before made the second pair of copies durable. Swapped with the removal of the
    /// tail: a kill between looks like a lost tail.
    pub(super) fn leave_journal(&self) -> Result<()> {
        let mut state = self.checkpoint.lock();
        let present = state.superblock.clone();
        if present.attached == Attached::WithTail {
            let generation = present.generation.next();
            let sb = Superblock { generation, attached: Attached::Plain, ..present };
            self.flip(&mut state, sb)?;
        }
        drop(state);
        self.release_spare();
        self.sync()
    }
}
