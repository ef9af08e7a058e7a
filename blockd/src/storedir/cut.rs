//! Forks of disks in service: each goes on in its successor at the instant, and is frozen behind
//! that. Children that are wanted at once begin at the instant in the same way.
//!
//! Order, and the crash it defends against (steps of `fork.rs`):
//! 1. as for any fork;
//! 2. the successor's draft is open for writing, with its tail, before the instant: what completes
//!    there survives a kill from the first request on. So is the draft of a child that is served
//!    from the instant on;
//! 3. the instant: nobody has a request in work on any of the disks, and all of them go on in their
//!    successors. Nothing is written, and nothing of the fork is durable yet;
//! 4. the fork is confirmed, the old disks are frozen, and the fork is settled, as for any fork.
//!    The successors complete no flush before that (`disk/succeed.rs`).
//!
//! A power cut between 3 and the end of 4 takes what no flush covered, so the fork is settled from
//! what is frozen, as ever. A process that is killed there leaves records in the tails of
//! successors and children: guests were told of these writes. Then whoever opens the store freezes
//! what is not frozen yet; nobody has written to the old disks since the instant, so that is the
//! same instant. When no tail has a record, nothing has happened since, and disks that are not
//! frozen stay what they are.
//!
//! Tests: `crash_points::cut`, `fork_under_load`.

use std::sync::Arc;

use format::{Error, Kind, Result};
use uuid::Uuid;

use super::StoreDir;
use crate::catalogue::{ForkRow, Forked};
use crate::disk::{Disk, Options, left_tail};
use crate::segment::{self, Sealed, Segments, new_name};
use crate::store::Access;

/// A disk in service on its way into its successor, or into a child.
pub struct Crossing {
    into: Uuid,
    /// In which the disk goes on.
    successor: Uuid,
    old: Arc<Disk>,
    next: Arc<Disk>,
}

impl Crossing {
    /// The disk in the new segment.
    #[must_use]
    pub fn next(&self) -> &Arc<Disk> {
        &self.next
    }

    /// The instant: the new one shows what the old disk shows. Nobody may have a request in work.
    pub fn cross(&self) {
        self.next.take_over(&self.old);
    }

    /// Freezes the old disk; does nothing if it is frozen.
    ///
    /// # Errors
    /// As [`Disk::freeze`]; may be tried again after `NoSpace`.
    pub fn freeze(&self, dir: &StoreDir) -> Result<()> {
        if dir.is_frozen(self.old.segment())? { Ok(()) } else { self.old.freeze(self.successor) }
    }

    /// Puts the new one on the frozen map, under another name if one is given.
    pub(super) fn settle(&self, label: Option<&str>) -> Result<()> {
        self.next.settle_on(&self.old, label)
    }

    /// Whether it leads into this segment.
    pub(super) fn is_into(&self, segment: Uuid) -> bool {
        self.into == segment
    }

    /// The catalogue knows of it.
    pub(super) fn settled(&self) {
        self.next.settled();
    }
}

/// The segments of the store, one of them as it will be when it is frozen.
struct WithFrozen<'a> {
    dir: &'a StoreDir,
    frozen: Arc<Sealed>,
}

impl Segments for WithFrozen<'_> {
    fn sealed(&self, id: Uuid) -> Result<Arc<Sealed>> {
        if id == self.frozen.superblock.segment {
            return Ok(Arc::clone(&self.frozen));
        }
        self.dir.sealed(id)
    }
}

impl StoreDir {
    /// Step 2: opens the successor of a disk in service. What this makes goes when the fork is
    /// settled without having been frozen.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn begin_crossing(
        &self,
        forked: &Forked,
        old: &Arc<Disk>,
        options: &Options,
    ) -> Result<Crossing> {
        self.begin_crossing_into(forked.successor, forked, old, options)
    }

    /// The same for any of the segments that the fork makes: a child begins where its parent goes
    /// on.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn begin_crossing_into(
        &self,
        into: Uuid,
        forked: &Forked,
        old: &Arc<Disk>,
        options: &Options,
    ) -> Result<Crossing> {
        old.check_undamaged()?;
        let segments = WithFrozen { dir: self, frozen: Arc::new(self.as_frozen(forked)?) };
        let draft = self.store.open(&new_name(into), Access::Write)?;
        let next = Disk::open(draft, &segments, &Options { is_draft: true, ..options.clone() })?;
        next.float();
        next.share_ahead(old);
        let (old, next) = (Arc::clone(old), Arc::new(next));
        Ok(Crossing { into, successor: forked.successor, old, next })
    }

    /// Settles a fork that a crash, or a failure, has left as it is.
    ///
    /// # Errors
    /// `TailLost` when completed writes of one of its disks are missing; as [`Disk::freeze`]; or
    /// what the host reports.
    pub(super) fn recover_fork(&self, fork: &ForkRow, options: &Options) -> Result<bool> {
        let mut went_on = false;
        for forked in &fork.disks {
            let old = self.segment_file(forked.segment, Access::Read)?;
            // A killed process may have frozen it in the cache alone: a power cut would thaw it
            // under what is put on it now.
            old.sync()?;
            old.forget_cached()?;
            for new in forked.new_segments() {
                went_on |= self.has_gone_on(new, options)?;
            }
        }
        if went_on {
            // What was killed may have made nothing of it durable yet.
            self.confirm_fork(fork)?;
        }
        for forked in fork.disks.iter().filter(|_| went_on) {
            if !self.is_frozen(forked.segment)? {
                self.freeze(forked, options)?;
            }
        }
        self.settle_fork(fork, &[])
    }

    /// Whether a killed process has left completed changes in a new segment that is not settled.
    fn has_gone_on(&self, new: Uuid, options: &Options) -> Result<bool> {
        let draft = match self.store.open(&new_name(new), Access::Read) {
            // It has its final name: what it stands on is frozen.
            Err(e) if e.kind() == Kind::NotFound => return Ok(false),
            draft => draft?,
        };
        let sb = match segment::read_superblock(draft.as_ref()) {
            // A power cut has taken what was not durable: there is no tail then, either.
            Err(e) if e.kind() == Kind::Corrupt => return Ok(false),
            chosen => chosen?.superblock,
        };
        Ok(left_tail(&sb, options)?.is_some_and(|tail| tail.next() > sb.journal.seq))
    }

    /// Settles the fork that a disk is in, if it could not be settled before.
    pub(super) fn recover_fork_of(&self, name: &str, options: &Options) -> Result<()> {
        let is_in = |fork: &ForkRow| fork.disks.iter().any(|forked| forked.name == name);
        let fork = self.catalogue.forks().into_iter().find(is_in);
        fork.map_or(Ok(()), |fork| self.recover_fork(&fork, options).map(drop))
    }
}

/// A fork whose disks were not all frozen has no children.
pub(crate) fn not_all_frozen() -> Error {
    Error::new(Kind::Failed, "not all of the disks were frozen")
}
