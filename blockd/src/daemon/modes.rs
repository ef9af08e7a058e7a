//! Persistence modes of disks, in service or not.
//!
//! A machine is off for the daemon when the last socket of its disk is detached, and never before:
//! what is attached is remembered, and served again by the next daemon, whether this one ended in
//! order, was killed, or handed over. A front end that is gone may come again. So a `nonpersistent`
//! disk drops its delta in [`Daemon::power_off`] alone, before it is forgotten that the disk is
//! attached: after a crash in between, it is attached, with its delta or with its base. Nobody can
//! attach it in between: attaching and detaching come one at a time.
//!
//! Tests: `persistence_modes`.

use std::sync::Arc;

use format::superblock::Mode;
use format::{Context as _, Kind, Result};

use super::Daemon;
use super::attachments::Attachment;
use super::cut::{Then, cut};
use super::holds::Hold;
use super::served::{Failed, Served, close};
use crate::api::types::{Disk as Summary, EventKind, ForkDisk, ForkDisks, SetMode};
use crate::catalogue::DiskRow;
use crate::store::Access;
use crate::storedir::Keep;
use crate::verbs;

impl Daemon {
    /// Gives a disk another mode. One in service goes on as in a fork.
    ///
    /// # Errors
    /// As [`verbs::set_mode`] and [`Daemon::fork`].
    pub fn set_mode(self: &Arc<Self>, name: &str, request: &SetMode) -> Result<Summary> {
        let object = format!("disk {name}");
        let set = || self.keep(name, verbs::mode(request)?, request.accept_lost_tail);
        let row = set().context("set the mode of", || object.clone())?;
        self.events.add(EventKind::Mode, object, row.mode.name());
        verbs::summary(&*self.dir()?, &row)
    }

    /// Makes what a disk holds its base. One in service goes on as in a fork.
    ///
    /// # Errors
    /// As [`verbs::commit`] and [`Daemon::fork`].
    pub fn commit(self: &Arc<Self>, name: &str, accept_lost_tail: bool) -> Result<Summary> {
        let object = format!("disk {name}");
        let row = self.keep(name, Keep::Committed, accept_lost_tail);
        let row = row.context("commit", || object.clone())?;
        self.events.add(EventKind::Committed, object, "");
        verbs::summary(&*self.dir()?, &row)
    }

    fn keep(self: &Arc<Self>, name: &str, keep: Keep, accept_lost_tail: bool) -> Result<DiskRow> {
        let _changing = self.service.changing.lock();
        let disks =
            vec![ForkDisk { disk: name.to_owned(), children: Vec::new(), serve: Vec::new() }];
        let request = ForkDisks { disks, accept_lost_tail, ..ForkDisks::default() };
        let (volumes, _holds) = self.hold_for_fork(&request)?;
        let dir = self.dir()?;
        if volumes.is_empty() {
            verbs::take_tail(&dir, name, accept_lost_tail)?;
        }
        if let Some(fork) = dir.begin_keep(name, keep)? {
            cut((&dir, &fork), &volumes, Then::GoOn, &(), Arc::new(()))?;
            self.sum_frozen();
        }
        dir.disk(name)
    }

    /// Lets a disk go back to its base. One in service has to be detached first: its machine knows
    /// what it has written.
    ///
    /// # Errors
    /// As [`verbs::undo`]; `Busy` for a disk in service.
    pub fn undo(&self, name: &str) -> Result<Summary> {
        let hold = self.hold(name, Access::Write);
        let _hold = hold.context("undo", || format!("disk {name}"))?;
        let undone = verbs::undo(&*self.dir()?, name)?;
        self.events.add(EventKind::Undone, format!("disk {name}"), "");
        Ok(undone)
    }

    /// Whether a disk drops what was written when its machine is off.
    pub(super) fn is_nonpersistent(&self, name: &str) -> Result<bool> {
        match self.dir()?.disk(name) {
            // What is gone has nothing to drop.
            Err(e) if e.kind() == Kind::NotFound => Ok(false),
            row => Ok(row?.mode == Mode::NonPersistent),
        }
    }

    /// Takes a disk out of service whose machine is off, and drops what was written. `attachment`
    /// tells how it was served, for when that fails: it is listed as failed then, and detaching it
    /// again tries again.
    pub(super) fn power_off(
        &self,
        name: &str,
        served: Served,
        attachment: Attachment,
    ) -> Result<()> {
        let (hold, closed) = close(served);
        let dropped = match closed {
            Err(e) if e.kind() == Kind::Busy => Err(e),
            Err(error) => {
                // What could not be made durable is dropped anyway.
                tracing::warn!(disk = %name, %error, "not closed in order");
                self.drop_delta(name, hold)
            }
            Ok(()) => self.drop_delta(name, hold),
        };
        dropped.inspect_err(|e| {
            let failed = Failed { attachment, error: e.to_string() };
            self.table().failed.insert(name.to_owned(), failed);
        })
    }

    /// Drops what was written to a disk that is out of service; `hold` if its name is held already.
    pub(super) fn drop_delta(&self, name: &str, hold: Option<Hold>) -> Result<()> {
        let drop = || {
            let _hold = hold.map_or_else(|| self.hold(name, Access::Write), Ok)?;
            self.dir()?.undo(name)
        };
        drop().map_err(|e| e.within("drop what was written to", format!("disk {name}")))?;
        self.events.add(EventKind::Undone, format!("disk {name}"), "at power-off");
        Ok(())
    }
}
