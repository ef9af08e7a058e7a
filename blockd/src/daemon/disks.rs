//! The verbs on disks, for several clients at once.
//!
//! Every verb holds the names that it needs for as long as it needs them: those it changes alone,
//! those it reads together with other readers. What a verb means is in [`crate::verbs`].

use std::sync::Arc;

use format::{Context as _, Error, Kind, Result};

use super::Daemon;
use super::holds::Hold;
use super::jobs::Running;
use crate::api::types::{
    ByteRange, CheckDisk, Checked, Compare, Compared, CreateDisk, Df, Digested, Disk as Summary,
    DiskDetails, MapRange, Moved, RemovedDisk, RenameDisk, RepairDisk, Repaired, ResizeDisk,
    Scrubbed,
};
use crate::disk::Disk;
use crate::serve::Volume;
use crate::store::Access;
use crate::storedir::StoreDir;
use crate::verbs::{self, disk_options};

/// An answer, and what its user should know besides.
#[derive(Debug)]
pub struct Noted<T> {
    /// The answer.
    pub value: T,
    /// Lines for people.
    pub notes: Vec<String>,
}

/// A disk that a request has open. What holds it is dropped after it.
pub(super) enum Opened {
    /// Opened for this request.
    Own { disk: Box<Disk>, _hold: Hold },
    /// In service: read beside its front ends. No fork replaces it while it is held.
    Served { disk: Arc<Disk>, _volume: Arc<Volume>, _hold: Hold },
}

impl Opened {
    pub(super) fn disk(&self) -> &Disk {
        match self {
            Opened::Own { disk, .. } => disk,
            Opened::Served { disk, .. } => disk,
        }
    }

    /// Closes it in order, if it was opened for this request.
    pub(super) fn close(self) -> Result<()> {
        match self {
            Opened::Own { disk, _hold } => disk.close(),
            Opened::Served { .. } => Ok(()),
        }
    }
}

fn object(name: &str) -> impl FnOnce() -> String {
    let name = name.to_owned();
    move || format!("disk {name}")
}

impl Daemon {
    /// The store.
    ///
    /// # Errors
    /// `Busy` while a successor has it, or is about to.
    pub(super) fn dir(&self) -> Result<Arc<StoreDir>> {
        self.dir.read().clone().ok_or_else(|| {
            Error::new(Kind::Busy, "a successor of this daemon takes it over").on("the store")
        })
    }

    /// Holds the name of a disk that is not in service.
    pub(super) fn hold(&self, name: &str, access: Access) -> Result<Hold> {
        self.check_not_served(name, access)?;
        let held = self.holds.take(name, access);
        // It may have been taken into service while the name was waited for.
        held.or_else(|e| self.check_not_served(name, access).and(Err(e)))
    }

    /// Opens a disk for a request, and says what is wrong with it.
    pub(super) fn open_disk(
        &self,
        name: &str,
        access: Access,
        accept_lost_tail: bool,
    ) -> Result<Noted<Opened>> {
        if access == Access::Read
            && let Some((volume, hold)) = self.served_volume(name).context("open", object(name))?
        {
            let disk = volume.disk();
            let notes = verbs::warnings(name, &disk);
            let value = Opened::Served { disk, _volume: volume, _hold: hold };
            return Ok(Noted { value, notes });
        }
        let hold = self.hold(name, access).context("open", object(name))?;
        let options = disk_options(&*self.dir()?, accept_lost_tail);
        let disk = self.dir()?.open_disk(name, access, &options).context("open", object(name))?;
        let notes = verbs::warnings(name, &disk);
        Ok(Noted { value: Opened::Own { disk: Box::new(disk), _hold: hold }, notes })
    }

    /// All disks.
    ///
    /// # Errors
    /// As [`verbs::list`].
    pub fn list(&self) -> Result<Vec<Summary>> {
        verbs::list(&*self.dir()?)
    }

    /// Everything about a disk.
    ///
    /// # Errors
    /// As opening it.
    pub fn show(&self, name: &str, accept_lost_tail: bool) -> Result<Noted<DiskDetails>> {
        let Noted { value, notes } = self.open_disk(name, Access::Read, accept_lost_tail)?;
        let mut value = verbs::details(&*self.dir()?, name, value.disk())?;
        value.exports = self.exports().into_iter().filter(|e| e.disk == name).collect();
        Ok(Noted { value, notes })
    }

    /// Creates a disk.
    ///
    /// # Errors
    /// As [`verbs::create`].
    pub fn create(&self, new: &CreateDisk) -> Result<Summary> {
        // The parent is held as well: it must not go while the child is not in the catalogue yet.
        let parent = new.parent.as_ref().map(|parent| self.hold(parent, Access::Read));
        let _parent = parent.transpose().context("create", object(&new.name))?;
        let _hold = self.hold(&new.name, Access::Write).context("create", object(&new.name))?;
        verbs::create(&*self.dir()?, new)
    }

    /// Removes a disk.
    ///
    /// # Errors
    /// As [`StoreDir::remove`].
    pub fn remove(&self, name: &str) -> Result<RemovedDisk> {
        let remove = || -> Result<RemovedDisk> {
            let _hold = self.hold(name, Access::Write)?;
            let freed = verbs::freed(&*self.dir()?, name)?;
            self.dir()?.remove(name)?;
            Ok(RemovedDisk { removed: name.into(), freed })
        };
        remove().context("remove", object(name))
    }

    /// Renames a disk.
    ///
    /// # Errors
    /// As [`StoreDir::rename`].
    pub fn rename(&self, name: &str, request: &RenameDisk) -> Result<Summary> {
        let rename = || {
            let _from = self.hold(name, Access::Write)?;
            let _to = match request.to == name {
                true => None,
                false => Some(self.hold(&request.to, Access::Write)?),
            };
            self.dir()?.rename(name, &request.to)
        };
        let row = rename().context("rename", object(name))?;
        verbs::summary(&*self.dir()?, &row)
    }

    /// Changes the size of a disk.
    ///
    /// # Errors
    /// As [`verbs::resize`].
    pub fn resize(&self, name: &str, request: &ResizeDisk) -> Result<Summary> {
        let served = self.served_volume(name).context("resize", object(name))?;
        if let Some((volume, _hold)) = served {
            let resized = verbs::resize_open(&*self.dir()?, name, &volume.disk(), request);
            self.tell_of_size(name);
            return resized;
        }
        let _hold = self.hold(name, Access::Write).context("resize", object(name))?;
        verbs::resize(&*self.dir()?, name, request)
    }

    /// Seals a disk.
    ///
    /// # Errors
    /// As [`verbs::seal`].
    pub fn seal(&self, name: &str, accept_lost_tail: bool, job: &Running) -> Result<Summary> {
        use crate::pump::Watch as _;
        let _hold = self.hold(name, Access::Write).context("seal", object(name))?;
        verbs::seal(&*self.dir()?, name, accept_lost_tail, &mut |done, total| {
            job.set(done, total);
            job.check()
        })
    }

    /// Checks a disk.
    ///
    /// # Errors
    /// As [`verbs::check`].
    pub fn check(&self, name: &str, request: CheckDisk, job: &Running) -> Result<Checked> {
        let _hold = self.hold(name, Access::Read).context("check", object(name))?;
        let checked = verbs::check(&*self.dir()?, name, request, job)?;
        self.tell_of_damage(name, checked.report.clean);
        Ok(checked)
    }

    /// Compares the sealed data of a disk with its checksums.
    ///
    /// # Errors
    /// As [`verbs::scrub`].
    pub fn scrub(&self, name: &str, job: &Running) -> Result<Scrubbed> {
        let _hold = self.hold(name, Access::Read).context("scrub", object(name))?;
        let scrubbed = verbs::scrub(&*self.dir()?, name, job)?;
        self.tell_of_damage(name, scrubbed.report.clean);
        Ok(scrubbed)
    }

    /// The digest of a sealed disk's content.
    ///
    /// # Errors
    /// As [`verbs::digest`].
    pub fn digest(&self, name: &str, job: &Running) -> Result<Digested> {
        let _hold = self.hold(name, Access::Read).context("digest", object(name))?;
        verbs::digest(&*self.dir()?, name, job)
    }

    fn tell_of_damage(&self, name: &str, clean: bool) {
        use crate::api::types::EventKind;
        if !clean {
            let detail = "something is wrong with it; see the report of the job";
            self.events.add(EventKind::Damaged, format!("disk {name}"), detail);
        }
    }

    /// Repairs a disk.
    ///
    /// # Errors
    /// As [`verbs::repair`].
    pub fn repair(&self, name: &str, request: RepairDisk) -> Result<Repaired> {
        let access = if request.dry_run { Access::Read } else { Access::Write };
        let _hold = self.hold(name, access).context("repair", object(name))?;
        verbs::repair(&*self.dir()?, name, request)
    }

    /// Calls `visit` with the ranges of a disk; `begin` gets the notes before the first.
    ///
    /// # Errors
    /// As opening it, or what `visit` reports.
    pub fn map(
        &self,
        name: &str,
        accept_lost_tail: bool,
        begin: &mut dyn FnMut(Vec<String>),
        visit: &mut dyn FnMut(MapRange) -> Result<()>,
    ) -> Result<()> {
        let Noted { value, notes } = self.open_disk(name, Access::Read, accept_lost_tail)?;
        begin(notes);
        verbs::walk_map(value.disk(), visit)
    }

    /// Compares two disks.
    ///
    /// # Errors
    /// As [`verbs::compare`].
    pub fn compare(&self, request: &Compare, job: &Running) -> Result<Compared> {
        let open = |name: &str| -> Result<Opened> {
            let opened = self.open_disk(name, Access::Read, request.accept_lost_tail)?;
            job.note(opened.notes);
            Ok(opened.value)
        };
        let (a, b) = (open(&request.a)?, open(&request.b)?);
        let names = [request.a.as_str(), request.b.as_str()];
        let context = || format!("{} with {}", request.a, request.b);
        let ranges = verbs::disk_ranges(a.disk(), b.disk(), job).context("compare", context)?;
        let contents = verbs::Contents { sides: [a.disk(), b.disk()], ranges };
        verbs::compare(names, &contents, request.all, job)
    }

    /// The ranges of a disk that may differ from another one. What is wrong with the disk itself is
    /// told by whoever reads it.
    ///
    /// # Errors
    /// As [`verbs::changed`].
    pub fn diff(
        &self,
        name: &str,
        from: &str,
        accept_lost_tail: bool,
    ) -> Result<Noted<Vec<ByteRange>>> {
        let disk = self.open_disk(name, Access::Read, accept_lost_tail)?.value;
        let Noted { value: from, notes } = self.open_disk(from, Access::Read, accept_lost_tail)?;
        let stopping = self.stopping();
        let value =
            verbs::changed(name, disk.disk(), from.disk(), &mut || match *stopping.borrow() {
                true => Err(Error::new(Kind::Cancelled, "the daemon is stopping")),
                false => Ok(()),
            })?;
        Ok(Noted { value, notes })
    }

    /// Makes a part of a disk read as zeroes.
    ///
    /// # Errors
    /// As [`Disk::discard`].
    pub fn discard(
        &self,
        name: &str,
        range: ByteRange,
        accept_lost_tail: bool,
    ) -> Result<Noted<Moved>> {
        let Noted { value, notes } = self.open_disk(name, Access::Write, accept_lost_tail)?;
        let Opened::Own { disk, _hold } = value else {
            return Err(Error::new(Kind::Busy, "it is in service").on(format!("disk {name}")));
        };
        Ok(Noted { value: verbs::discard(name, *disk, range)?, notes })
    }

    /// The space that the store takes and has left.
    ///
    /// # Errors
    /// As [`verbs::df`].
    pub fn df(&self) -> Result<Df> {
        verbs::df(&*self.dir()?, &self.path)
    }
}
