//! A store that this process has open.

use std::path::{Path, PathBuf};

use blockd::api::types::{
    ByteRange, CheckDisk, Checked, Compare, Compared, CreateDisk, Df, Digested, Disk as Summary,
    DiskDetails, FlattenDisk, Flattened, ForkDisks, ForkedDisks, MapRange, Moved, RemovedDisk,
    RepairDisk, Repaired, ResizeDisk, Scrubbed, SessionUse, SetFlattenPolicy, SetMode,
};
use blockd::content::Content;
use blockd::disk::Disk;
use blockd::pump::{Watch, lanes};
use blockd::store::Access;
use blockd::storedir::{Import, NewDisk, StoreDir};
use blockd::verbs;
use format::{Context as _, Result};

use super::{Filling, Flattening, Store, Writing};
use crate::output::{Outcome, Output, Stop};
use crate::signals;

/// A store in a folder.
pub struct Local {
    dir: StoreDir,
    path: PathBuf,
    out: Output,
}

impl Local {
    /// The store `dir`, which was found at `path`.
    #[must_use]
    pub fn new(dir: StoreDir, path: &Path, out: Output) -> Self {
        dir.notes.iter().for_each(|note| out.note(note));
        Local { dir, path: path.to_owned(), out }
    }

    /// Opens a disk, and says what is wrong with it.
    fn disk(&self, name: &str, access: Access, lost_tail: bool) -> Result<Disk> {
        let options = verbs::disk_options(&self.dir, lost_tail);
        let disk = self.dir.open_disk(name, access, &options);
        let disk = disk.context("open", || format!("disk {name}"))?;
        verbs::warnings(name, &disk).iter().for_each(|note| self.out.note(note));
        Ok(disk)
    }
}

impl Store for Local {
    fn list(&self) -> Result<Vec<Summary>> {
        verbs::list(&self.dir)
    }

    fn has(&self, name: &str) -> Result<bool> {
        Ok(self.dir.disk(name).is_ok())
    }

    fn show(&self, name: &str, lost_tail: bool) -> Result<DiskDetails> {
        let disk = self.disk(name, Access::Read, lost_tail)?;
        verbs::details(&self.dir, name, &disk)
    }

    fn create(&self, new: &CreateDisk) -> Result<Summary> {
        verbs::create(&self.dir, new)
    }

    fn fork(&self, request: &ForkDisks, watch: &dyn Watch) -> Result<ForkedDisks> {
        verbs::fork(&self.dir, request, watch)
    }

    fn set_mode(&self, name: &str, request: &SetMode) -> Result<Summary> {
        verbs::set_mode(&self.dir, name, request)
    }

    fn commit(&self, name: &str, accept_lost_tail: bool) -> Result<Summary> {
        verbs::commit(&self.dir, name, accept_lost_tail)
    }

    fn undo(&self, name: &str) -> Result<Summary> {
        verbs::undo(&self.dir, name)
    }

    fn flatten(&self, name: &str, request: &FlattenDisk, watch: &dyn Watch) -> Result<Flattened> {
        verbs::flatten(&self.dir, name, request, watch)
    }

    fn begin_flatten(
        &self,
        name: &str,
        request: &FlattenDisk,
        watch: &dyn Watch,
    ) -> Result<Flattening> {
        self.flatten(name, request, watch).map(Box::new).map(Flattening::Done)
    }

    fn set_disk_policy(&self, name: &str, request: &SetFlattenPolicy) -> Result<Summary> {
        verbs::set_disk_policy(&self.dir, name, request)
    }

    fn store_policy(&self) -> Result<SetFlattenPolicy> {
        Ok(verbs::store_policy(&self.dir))
    }

    fn set_store_policy(&self, request: &SetFlattenPolicy) -> Result<SetFlattenPolicy> {
        verbs::set_store_policy(&self.dir, request)
    }

    fn remove(&self, name: &str) -> Result<RemovedDisk> {
        let object = || format!("disk {name}");
        let freed = verbs::freed(&self.dir, name).context("remove", object)?;
        self.dir.remove(name).context("remove", object)?;
        Ok(RemovedDisk { removed: name.into(), freed })
    }

    fn rename(&self, name: &str, to: &str) -> Result<Summary> {
        let row = self.dir.rename(name, to).context("rename", || format!("disk {name}"))?;
        verbs::summary(&self.dir, &row)
    }

    fn resize(&self, name: &str, request: &ResizeDisk) -> Result<Summary> {
        verbs::resize(&self.dir, name, request)
    }

    fn seal(&self, name: &str, lost_tail: bool, watch: &dyn Watch) -> Result<Summary> {
        verbs::seal(&self.dir, name, lost_tail, &mut |done, total| {
            watch.set(done, total);
            watch.check()
        })
    }

    fn check(&self, name: &str, request: CheckDisk, watch: &dyn Watch) -> Result<Checked> {
        verbs::check(&self.dir, name, request, watch)
    }

    fn scrub(&self, name: &str, watch: &dyn Watch) -> Result<Scrubbed> {
        verbs::scrub(&self.dir, name, watch)
    }

    fn digest(&self, name: &str, watch: &dyn Watch) -> Result<Digested> {
        verbs::digest(&self.dir, name, watch)
    }

    fn repair(&self, name: &str, request: RepairDisk, _: &dyn Watch) -> Result<Repaired> {
        verbs::repair(&self.dir, name, request)
    }

    fn map(
        &self,
        name: &str,
        lost_tail: bool,
        visit: &mut dyn FnMut(MapRange) -> Outcome<()>,
    ) -> Outcome<()> {
        let disk = self.disk(name, Access::Read, lost_tail)?;
        verbs::walk_map::<Stop>(&disk, visit)
    }

    fn compare(&self, request: &Compare, watch: &dyn Watch) -> Result<Compared> {
        let open = |name| self.disk(name, Access::Read, request.accept_lost_tail);
        let (a, b) = (open(&request.a)?, open(&request.b)?);
        let names = [request.a.as_str(), request.b.as_str()];
        let object = || format!("{} with {}", request.a, request.b);
        let ranges = verbs::disk_ranges(&a, &b, watch).context("compare", object)?;
        let contents = verbs::Contents { sides: [&a, &b], ranges };
        verbs::compare(names, &contents, request.all, watch)
    }

    fn diff(&self, name: &str, from: &str, lost_tail: bool) -> Result<Vec<ByteRange>> {
        // What is wrong with the disk itself is told by whoever reads it.
        let options = verbs::disk_options(&self.dir, lost_tail);
        let disk = self.dir.open_disk(name, Access::Read, &options)?;
        let from = self.disk(from, Access::Read, lost_tail)?;
        verbs::changed(name, &disk, &from, &mut signals::check)
    }

    fn discard(&self, name: &str, range: ByteRange, lost_tail: bool) -> Result<Moved> {
        let disk = self.disk(name, Access::Write, lost_tail)?;
        verbs::discard(name, disk, range)
    }

    fn df(&self) -> Result<Df> {
        verbs::df(&self.dir, &self.path)
    }

    fn open(&self, name: &str, _: SessionUse, lost_tail: bool) -> Result<Box<dyn Content + '_>> {
        Ok(Box::new(self.disk(name, Access::Read, lost_tail)?))
    }

    fn open_for_writing(&self, name: &str, lost_tail: bool) -> Result<Box<dyn Writing + '_>> {
        Ok(Box::new(self.disk(name, Access::Write, lost_tail)?))
    }

    fn import(&self, name: &str, size: u64, parent: Option<&str>) -> Result<Box<dyn Filling + '_>> {
        Ok(Box::new(match parent {
            None => self.dir.import(&NewDisk::root(name, size), lanes())?,
            Some(parent) => Import::over(&self.dir, (name, size), parent, lanes())?,
        }))
    }
}

impl Writing for Disk {
    fn size(&self) -> u64 {
        Disk::size(self)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        verbs::write_bytes(self, at, bytes)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.close()
    }
}

impl Filling for Import<&StoreDir> {
    fn zero(&self, lane: usize, offset: u64, length: u64) -> Result<()> {
        verbs::zero(self.disk(), lane, offset, length)
    }

    fn store(&self, lane: usize, offset: u64, bytes: &[u8]) -> Result<u64> {
        Import::store(self, lane, offset, bytes)
    }

    fn finish(self: Box<Self>) -> Result<Summary> {
        let (dir, row) = (self.dir(), (*self).finish()?);
        verbs::summary(dir, &row)
    }
}
