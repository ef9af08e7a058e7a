//! Persistence modes: what was written to a disk since its base, its delta, is kept or dropped.
//!
//! A disk of another mode than `persistent` names its base, a frozen segment, in its superblock. To
//! *keep* (commit, or another mode) is a fork without children whose successor names what it goes
//! back to from then on: order and crash arguments are those of `fork.rs`. To *undo* is the same
//! with a successor that stands on the base instead of the present own segment:
//! 1. the successor exists, whole, under a name that ends in `.new` — else the disk has nowhere to
//!    go on when step 3 has taken its delta;
//! 2. the catalogue knows of it — else it is removed at the next opening, after step 3;
//! 3. one flip of the own segment's superblock to sealed, naming the successor: the delta is gone
//!    for good when that is durable, and untouched before;
//! 4. the successor gets its final name, the catalogue the outcome;
//! 5. the delta's file goes: nobody stands on it. Before 4, a crash would leave neither.
//!
//! Tests: `crash_points::undo`, `persistence_modes`.

use format::superblock::{Attached, Mode, Seal, State, Superblock};
use format::{Context, Error, Result};
use uuid::Uuid;

use super::StoreDir;
use super::fork::{check_room, successor};
use crate::catalogue::{DiskRow, ForkRow, Forked};
use crate::clock;
use crate::disk::create::NewSegment;
use crate::disk::tail::path_in;
use crate::segment::{self, Segments as _};
use crate::store::Access;

/// How a disk goes on with what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// In this mode.
    As(Mode),
    /// In the mode that it has, with what it holds as its base.
    Committed,
}

impl Keep {
    /// Mode and base of the successor of a segment that is frozen for this.
    fn after(self, own: &Superblock) -> (Mode, Uuid) {
        match self {
            Keep::As(Mode::Persistent) => (Mode::Persistent, Uuid::nil()),
            // What is pending stays so.
            Keep::As(mode) if own.mode != Mode::Persistent => (mode, own.base),
            Keep::As(mode) => (mode, own.segment),
            Keep::Committed => (own.mode, own.segment),
        }
    }
}

/// Refuses what would keep a delta for good without having been told to.
pub(super) fn check_persistent(sb: &Superblock, name: &str) -> Result<()> {
    if sb.mode == Mode::Persistent {
        return Ok(());
    }
    let reason = format!("its mode is {}: what it holds may be dropped", sb.mode.name());
    let hint = format!("keep what it holds: `offshoot disk mode {name} persistent`");
    Err(Error::invalid(reason).on(format!("disk {name}")).hint(hint))
}

fn nothing_pending(name: &str) -> Error {
    Error::invalid("its mode is persistent: nothing is pending")
        .on(format!("disk {name}"))
        .hint(format!("`offshoot disk mode {name} undoable` begins to keep changes apart"))
}

/// A fork of one disk without children.
fn alone(row: &DiskRow) -> ForkRow {
    let forked = Forked {
        name: row.name.clone(),
        segment: row.segment,
        successor: Uuid::new_v4(),
        children: Vec::new(),
    };
    ForkRow { fork: Uuid::new_v4(), created: clock::now(), disks: vec![forked] }
}

impl StoreDir {
    /// Lets a disk that nobody has open go on with what it holds.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a disk that is sealed, or has nothing to commit; as
    /// [`StoreDir::fork`].
    pub fn keep(&self, name: &str, keep: Keep) -> Result<DiskRow> {
        if let Some(fork) = self.begin_keep(name, keep)? {
            let options = self.disk_options();
            let frozen = self.confirm_fork(&fork);
            let frozen = frozen.and_then(|()| self.freeze(&fork.disks[0], &options));
            self.settled(&fork, frozen)?;
        }
        self.disk(name)
    }

    /// The first step of [`StoreDir::keep`], as [`StoreDir::begin_fork`]; `None` when the disk is
    /// as it is to be.
    pub(crate) fn begin_keep(&self, name: &str, keep: Keep) -> Result<Option<ForkRow>> {
        let row = self.changeable(name)?;
        check_room(&row)?;
        match keep {
            Keep::As(mode) if mode == row.mode => return Ok(None),
            Keep::Committed if row.mode == Mode::Persistent => return Err(nothing_pending(name)),
            _ => {}
        }
        let fork = self.begin(alone(&row), &|_, forked| {
            let frozen = self.as_frozen(forked)?;
            let (mode, base) = keep.after(&frozen.superblock);
            let name = forked.name.clone();
            let next = successor(&frozen.superblock, forked.successor);
            self.draft_over(&frozen, &NewSegment { name, mode, base, ..next }).map(drop)
        });
        fork.map(Some)
    }

    /// Drops what was written to a disk since its base. Nobody has it open.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a disk that is sealed or has nothing to undo, and for one of mode
    /// `append`; `ParentMissing` when its base is gone; `NoSpace`, or what the host reports. The
    /// disk is then as it was before.
    pub fn undo(&self, name: &str) -> Result<DiskRow> {
        let row = self.changeable(name)?;
        match row.mode {
            Mode::Persistent => return Err(nothing_pending(name)),
            Mode::Append => {
                return Err(Error::invalid("its mode is append: changes are kept until committed")
                    .on(format!("disk {name}"))
                    .hint(format!("`offshoot disk mode {name} undoable` allows it")));
            }
            Mode::NonPersistent | Mode::Undoable => {}
        }
        let fork = self.begin(alone(&row), &|_, forked| self.write_fresh(forked))?;
        let dropped = self.confirm_fork(&fork).and_then(|()| self.drop_delta(&fork.disks[0]));
        self.settled(&fork, dropped)?;
        // The undo is done: what cannot be removed now goes when the store is opened again.
        if let Err(error) = self.drop_frozen() {
            tracing::warn!(disk = %name, %error, "what was undone still takes space");
        }
        self.disk(name)
    }

    fn changeable(&self, name: &str) -> Result<DiskRow> {
        self.check_writable()?;
        let row = self.disk(name)?;
        if row.sealed {
            let reason = "it is sealed: nothing is ever written to it";
            return Err(Error::invalid(reason).on(format!("disk {name}")));
        }
        Ok(row)
    }

    /// Step 1 of an undo: a segment over the base, whole, as the disk was then.
    fn write_fresh(&self, forked: &Forked) -> Result<()> {
        let own = self.as_frozen(forked)?.superblock;
        let base = self.sealed(own.base).context("undo", || format!("disk {}", forked.name))?;
        // Size and map are the base's; everything else goes on.
        let fresh = NewSegment {
            name: forked.name.clone(),
            virtual_size: base.superblock.virtual_size,
            ..successor(&own, forked.successor)
        };
        self.draft_over(&base, &fresh).map(drop)
    }

    /// Step 3 of an undo. What the delta holds is of no interest any more: nothing is flushed.
    fn drop_delta(&self, forked: &Forked) -> Result<()> {
        let file = self.segment_file(forked.segment, Access::Write)?;
        // A killed writer's last writes may still be on their way, an old superblock among them.
        file.lock()?;
        let present = segment::settle(file.as_ref())?;
        let sealed = Superblock {
            generation: present.generation.next(),
            state: State::Sealed,
            seal: Seal::Pending,
            attached: Attached::No,
            successor: forked.successor,
            ..present
        };
        segment::flip(file.as_ref(), &sealed)?;
        file.sync()?;
        // Of no use to anybody, and gone with the next start of the host at the latest.
        let _ = std::fs::remove_file(path_in(&self.identity.tail_dir, forked.segment));
        Ok(())
    }
}
