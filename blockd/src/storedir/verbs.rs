//! What can be done with the disks of a store: create, open, rename, seal, remove.
//!
//! Order of a change, and the crash it defends against: for creation, content durable, then the
//! final name, then the catalogue; for deletion, the name goes first (`.del`), then the catalogue,
//! then the file. At every point the folder alone says whether the disk exists. What a row tells of
//! a segment (size, sealed or not, name) changes between two transactions: the first marks the row,
//! so that after a crash in between the next opening looks at the segment.

use format::limits::{BLOCK, EXTENT, JOURNAL_EXTENTS_DEFAULT};
use format::superblock::{Mode, Seal, check_name};
use format::units::OwnerEpoch;
use format::{Context, Error, Kind, Result};
use uuid::Uuid;

use super::StoreDir;
use super::modes::check_persistent;
use crate::catalogue::{Change, DiskRow};
use crate::clock;
use crate::disk::create::{NewSegment, Parent};
use crate::disk::load::{load, older};
use crate::disk::{Disk, Options, left_tail};
use crate::segment::{self, Segments, deleted_name, file_name, new_name};
use crate::store::Access;

/// What a new disk is to be.
#[derive(Debug, Clone)]
pub struct NewDisk {
    /// Its name.
    pub name: String,
    /// Bytes of the virtual disk; zero for the size of the parent.
    pub virtual_size: u64,
    /// The sealed disk to stand on.
    pub parent: Option<String>,
    /// Bytes of the journal, a multiple of 64 KiB; zero for the default.
    pub journal_bytes: u64,
}

impl NewDisk {
    /// A root disk with the default journal.
    #[must_use]
    pub fn root(name: &str, virtual_size: u64) -> Self {
        NewDisk { name: name.into(), virtual_size, parent: None, journal_bytes: 0 }
    }
}

impl StoreDir {
    /// Creates a disk.
    ///
    /// # Errors
    /// `Exists`, `NotFound` for the parent, `Invalid` for a name, a size, or a parent that is not
    /// sealed, `NoSpace`, or what the host reports.
    pub fn create(&self, new: &NewDisk) -> Result<DiskRow> {
        let segment = self.write_new(new)?;
        self.publish(segment)
    }

    pub(super) fn write_new(&self, new: &NewDisk) -> Result<Uuid> {
        self.check_writable()?;
        check_name(&new.name)?;
        self.check_name_free(&new.name)?;
        let parent = new.parent.as_ref().map(|name| self.parent(name)).transpose()?;
        let parent = parent.as_ref().map(|(row, sealed)| Parent { disk: row.disk, sealed });
        let inherited = parent.as_ref().map_or(0, |p| p.sealed.superblock.virtual_size);
        let size = if new.virtual_size == 0 { inherited } else { new.virtual_size };
        let journal = match new.journal_bytes {
            0 => JOURNAL_EXTENTS_DEFAULT,
            bytes if bytes.is_multiple_of(EXTENT) => bytes / EXTENT,
            _ => return Err(Error::invalid("the journal size is a multiple of 64 KiB")),
        };
        let mut segment = NewSegment {
            store: self.identity.store,
            segment: Uuid::new_v4(),
            disk: Uuid::new_v4(),
            name: new.name.clone(),
            virtual_size: size,
            journal_extents: journal,
            created: clock::now(),
            owner_epoch: OwnerEpoch(1),
            mode: Mode::Persistent,
            base: Uuid::nil(),
        };
        let uneven = !inherited.is_multiple_of(BLOCK);
        if size > inherited && uneven && parent.is_some() {
            // The parent's last block is partial, and may hold what a larger parent had there. A
            // resize zeroes it before it becomes visible.
            segment.virtual_size = inherited;
        }
        segment.write(self.store.as_ref(), parent.as_ref())?;
        if segment.virtual_size != size {
            let file = self.store.open(&new_name(segment.segment), Access::Write)?;
            let disk = Disk::open(file, self, &self.disk_options())?;
            disk.resize(size, false)?;
            disk.close()?;
        }
        Ok(segment.segment)
    }

    fn parent(&self, name: &str) -> Result<(DiskRow, std::sync::Arc<segment::Sealed>)> {
        let row = self.disk(name)?;
        let not_sealed = || {
            Error::invalid("only a sealed disk can be a parent")
                .on(format!("disk {name}"))
                .hint(format!("seal it first: `offshoot disk seal {name}`"))
        };
        if !row.sealed {
            return Err(not_sealed());
        }
        let sealed = self.sealed(row.segment)?;
        if sealed.superblock.seal != Seal::Done {
            return Err(not_sealed());
        }
        Ok((row, sealed))
    }

    pub(crate) fn check_name_free(&self, name: &str) -> Result<()> {
        match self.catalogue.get(name) {
            None => Ok(()),
            Some(_) => Err(Error::new(Kind::Exists, "a disk of this name exists already")
                .on(format!("disk {name}"))
                .hint("choose another name, or remove that disk first")),
        }
    }

    /// Gives a finished segment its final name and tells the catalogue.
    pub(super) fn publish(&self, segment: Uuid) -> Result<DiskRow> {
        self.store.rename(&new_name(segment), &file_name(segment))?;
        // The name is durable before the catalogue counts on it.
        self.store.sync_names()?;
        let row = self.row_of(segment)?;
        self.catalogue.apply(&[Change::Put(row.clone())])?;
        Ok(row)
    }

    /// Opens a disk.
    ///
    /// # Errors
    /// `NotFound`, or as [`Disk::open`].
    pub fn open_disk(&self, name: &str, access: Access, options: &Options) -> Result<Disk> {
        if access == Access::Write {
            self.check_writable()?;
            // Else the disk is written to in two segments.
            self.recover_fork_of(name, options).context("open", || format!("disk {name}"))?;
            return self.open_own(name, options);
        }
        let file = self.segment_file(self.disk(name)?.segment, Access::Read);
        let disk = file.and_then(|file| Disk::open_read_only(file, self, options));
        disk.context("open", || format!("disk {name}"))
    }

    /// Opens a disk for writing in the segment that the catalogue knows of.
    pub(super) fn open_own(&self, name: &str, options: &Options) -> Result<Disk> {
        self.check_writable()?;
        let row = self.disk(name)?;
        let access = if row.sealed { Access::Read } else { Access::Write };
        let file = self.segment_file(row.segment, access);
        let disk = file.and_then(|file| Disk::open(file, self, options));
        disk.context("open", || format!("disk {name}"))
    }

    /// Renames a disk.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Invalid` for the name, or what the host reports.
    pub fn rename(&self, from: &str, to: &str) -> Result<DiskRow> {
        self.check_writable()?;
        check_name(to)?;
        let row = self.disk(from)?;
        self.check_name_free(to)?;
        self.check_label(&row)?;
        // The catalogue first, with a note that the label is behind: a crash in between leaves the
        // new name taken, and the next opening writes the label. The other way round, a crash would
        // leave two names for one disk.
        let behind = DiskRow { name: to.into(), relabel: true, ..row };
        self.catalogue.apply(&[Change::Remove(from.into()), Change::Put(behind.clone())])?;
        self.finish_rename(behind)
    }

    /// Whether a disk's name may be written into its segment. Asked before the catalogue is
    /// changed, because a rename that has begun must be finished.
    fn check_label(&self, row: &DiskRow) -> Result<()> {
        let check = || {
            let file = self.segment_file(row.segment, Access::Read)?;
            let sb = segment::read_superblock(file.as_ref())?.superblock;
            sb.check_writable_features()?;
            if !older::any(file.as_ref(), &sb)? {
                return Ok(());
            }
            let tail = left_tail(&sb, &Options { accept_lost_tail: true, ..self.disk_options() })?;
            let loaded = load(&file, self, tail.as_ref())?;
            older::keep(&file, self, tail.as_ref(), &loaded)
        };
        check().context("rename", || format!("disk {}", row.name))
    }

    /// Writes the label of a renamed disk and takes the note back.
    pub(super) fn finish_rename(&self, row: DiskRow) -> Result<DiskRow> {
        self.relabel(&row)?;
        let done = DiskRow { relabel: false, ..row };
        self.catalogue.apply(&[Change::Put(done.clone())])?;
        Ok(done)
    }

    /// Writes a disk's name into its segment.
    pub(super) fn relabel(&self, row: &DiskRow) -> Result<()> {
        let name = file_name(row.segment);
        if row.sealed {
            // The name is the one thing about a sealed segment that may change. A crash in here
            // leaves a file with a write bit; what makes it immutable is its superblock.
            self.store.open(&name, Access::Read)?.set_read_only(false)?;
        }
        let file = self.store.open(&name, Access::Write)?;
        file.lock()?;
        segment::read_superblock(file.as_ref())?.superblock.check_writable_features()?;
        let mut sb = segment::settle(file.as_ref())?;
        sb.generation = sb.generation.next();
        sb.name.clone_from(&row.name);
        segment::flip(file.as_ref(), &sb)?;
        file.sync()?;
        if row.sealed { file.set_read_only(true) } else { Ok(()) }
    }

    /// Seals a disk: immutable from now on, and fit to be a parent. `progress` gets the bytes
    /// summed and in all.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` when it is sealed already, or as [`Disk::seal`].
    pub fn seal(
        &self,
        name: &str,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<DiskRow> {
        self.check_writable()?;
        let row = self.disk(name)?;
        let file = self.segment_file(row.segment, Access::Read)?;
        let sb = segment::read_superblock(file.as_ref())?.superblock;
        let options = self.disk_options();
        if sb.seal == Seal::Done {
            // A crash may have come between the seal and the mode of its file.
            file.set_read_only(true)?;
        }
        if sb.seal == Seal::Done && row.sealed {
            return Err(Error::invalid("it is sealed already").on(format!("disk {name}")));
        }
        check_persistent(&sb, name)?;
        self.changing(&row, || match sb.seal {
            Seal::Done => Ok(()),
            Seal::Pending => {
                let file = self.segment_file(row.segment, Access::Write)?;
                Disk::finish_seal(file, self, &options, progress).map(|_| ())
            }
            Seal::None => {
                let disk = self.open_disk(name, Access::Write, &options)?;
                disk.seal(progress).map(|_| ())
            }
        })
    }

    /// Runs a change of a disk's segment that its row tells of: the row is marked first, and read
    /// off the segment afterwards, whether the change succeeded or not. Swapped, a crash between
    /// the change and its row leaves a catalogue that tells the old state and does not know it.
    /// Test: `crash_points::storedir::the_catalogue_catches_up_after_a_crash`.
    pub(super) fn changing(
        &self,
        row: &DiskRow,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<DiskRow> {
        self.catalogue.apply(&[Change::Put(DiskRow { changing: true, ..row.clone() })])?;
        let changed = change();
        self.sealed.lock().remove(&row.segment);
        let reread = self.reread(row);
        changed.and(reread)
    }

    /// Changes the size of a disk.
    ///
    /// # Errors
    /// As [`Disk::resize`].
    pub fn resize(&self, name: &str, size: u64, drop_data: bool) -> Result<DiskRow> {
        self.check_writable()?;
        let row = self.disk(name)?;
        self.changing(&row, || {
            let disk = self.open_disk(name, Access::Write, &self.disk_options())?;
            let resized = disk.resize(size, drop_data);
            disk.close().and(resized)
        })
    }

    /// As [`StoreDir::resize`], of a disk of this store that is open.
    ///
    /// # Errors
    /// As [`Disk::resize`].
    pub fn resize_open(
        &self,
        name: &str,
        disk: &Disk,
        (size, drop_data): (u64, bool),
    ) -> Result<DiskRow> {
        let row = self.disk(name)?;
        self.changing(&row, || disk.resize(size, drop_data))
    }

    /// A segment that the catalogue does not know and that may stand on this one.
    pub(super) fn stranger_over(&self, segment: Uuid) -> Result<Option<Uuid>> {
        for id in self.strangers()? {
            match self.row_of(id) {
                Ok(row) if !row.parents.contains(&segment) && row.base != Some(segment) => {}
                Err(e) if e.kind().is_of_host() => return Err(e),
                // Unreadable: it may.
                _ => return Ok(Some(id)),
            }
        }
        Ok(None)
    }

    /// Takes the row of a deleted disk out of the catalogue, then its file out of the folder.
    pub(super) fn forget_deleted(&self, name: &str, segment: Uuid) -> Result<()> {
        let file = deleted_name(segment);
        // On a full file system the catalogue needs the space that the file has. The name stays
        // until the row is gone, so that a crash in between is finished at the next opening. What
        // cannot be cut now goes when the name goes.
        let _ = self.cut(&file);
        self.catalogue.apply(&[Change::Remove(name.into())])?;
        self.store.remove(&file)
    }

    pub(super) fn cut(&self, name: &str) -> Result<()> {
        self.store.open(name, Access::Read)?.set_read_only(false)?;
        self.store.open(name, Access::Write)?.set_len(0)
    }

    /// Removes a disk and gives its space back.
    ///
    /// # Errors
    /// `NotFound`; `InUse`, naming them, when other disks stand on it; or what the host reports.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.check_writable()?;
        let row = self.disk(name)?;
        let dependents = self.dependents(row.segment);
        if !dependents.is_empty() {
            let reason = format!("other disks stand on it: {}", dependents.join(", "));
            return Err(Error::new(Kind::InUse, reason)
                .tried("remove")
                .on(format!("disk {name}"))
                .hint("remove those first"));
        }
        let stranger = if row.sealed { self.stranger_over(row.segment)? } else { None };
        if let Some(id) = stranger {
            let reason = format!("segment {id}, which is not in the catalogue, may stand on it");
            return Err(Error::new(Kind::InUse, reason)
                .tried("remove")
                .on(format!("disk {name}"))
                .hint("run `offshoot store rebuild`, or move that segment out of the store"));
        }
        match self.store.rename(&file_name(row.segment), &deleted_name(row.segment)) {
            // The file is gone: what is left of the disk is its row.
            Err(e) if e.kind() == Kind::NotFound => {
                self.catalogue.apply(&[Change::Remove(name.into())])?;
                return self.drop_frozen();
            }
            renamed => renamed.context("remove", || format!("disk {name}"))?,
        }
        // A process that lives long must not keep the space of what it once read.
        self.sealed.lock().remove(&row.segment);
        // The deletion is decided, durably, before the catalogue forgets the disk.
        self.store.sync_names()?;
        self.forget_deleted(name, row.segment)?;
        self.drop_frozen()?;
        self.store.sync_names()
    }
}
