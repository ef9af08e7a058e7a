//! Importing: a new disk that is filled piece by piece and then appears in the store.
//!
//! Order, and the crash it defends against: as for creation (see `verbs.rs`), the content is made
//! durable by closing the disk, and only then gets the final name. Until then there is a `.new`
//! file, which the next opening removes.
//!
//! Write-behind: what was stored goes to the device while more is read, so that the sync at the end
//! finds little to do. Nothing relies on it: it may be skipped, cut off or fail at any point, and
//! the sync alone says what is durable.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

use format::Result;
use format::limits::BLOCK;
use uuid::Uuid;

use super::{NewDisk, StoreDir};
use crate::catalogue::DiskRow;
use crate::content::zero_runs;
use crate::disk::{Disk, Options};
use crate::segment::new_name;
use crate::store::Access;

/// Bytes stored before the device is told to begin with them: enough for long transfers, little
/// next to what has to be stored before the work is worth speeding up.
const WRITE_BEHIND_BYTES: u64 = 8 << 20;

/// Whether the device is to be told to begin, now that `more` bytes were stored after `before`.
pub(crate) fn begins_write_behind(before: u64, more: u64) -> bool {
    before / WRITE_BEHIND_BYTES != (before + more) / WRITE_BEHIND_BYTES
}

/// A disk that is being imported: it appears in the store when finished, or not at all.
pub struct Import<D: Deref<Target = StoreDir>> {
    dir: D,
    disk: Option<Disk>,
    segment: Uuid,
    /// Bytes stored in all.
    stored: AtomicU64,
}

impl StoreDir {
    /// Begins an import: a disk to write to that nobody else sees yet.
    ///
    /// # Errors
    /// As [`StoreDir::create`].
    pub fn import(&self, new: &NewDisk, lanes: usize) -> Result<Import<&StoreDir>> {
        Import::begin(self, new, lanes)
    }
}

impl<D: Deref<Target = StoreDir>> Import<D> {
    /// As [`StoreDir::import`], for whoever shares the store.
    ///
    /// # Errors
    /// As [`StoreDir::create`].
    pub fn begin(dir: D, new: &NewDisk, lanes: usize) -> Result<Self> {
        let segment = dir.write_new(new)?;
        Import::fill(dir, segment, lanes)
    }

    /// As [`Import::begin`], with a disk that holds what the sealed disk `parent` does, and zeroes
    /// where it is larger.
    ///
    /// # Errors
    /// As [`StoreDir::create`] and [`Disk::resize`].
    pub fn over(dir: D, (name, size): (&str, u64), parent: &str, lanes: usize) -> Result<Self> {
        let inherited = dir.disk(parent)?.virtual_size;
        let new =
            NewDisk { parent: Some(parent.to_owned()), ..NewDisk::root(name, size.max(inherited)) };
        let import = Import::begin(dir, &new, lanes)?;
        if size < inherited {
            // What lies past the end must not come back when the disk is made larger again.
            import.disk().resize(size, true)?;
        }
        Ok(import)
    }

    /// Begins to fill a new segment that exists under its `.new` name.
    ///
    /// # Errors
    /// As [`Disk::open`]; the segment is removed then.
    pub(super) fn fill(dir: D, segment: Uuid, lanes: usize) -> Result<Self> {
        let mut import = Import::draft(dir, segment);
        let dir = &*import.dir;
        let file = dir.store.open(&new_name(segment), Access::Write)?;
        let options = Options { lanes, ..dir.disk_options() };
        import.disk = Some(Disk::open(file, dir, &options)?);
        Ok(import)
    }

    /// A new segment that is filled already, or will be, and exists under its `.new` name.
    pub(super) fn draft(dir: D, segment: Uuid) -> Self {
        Import { dir, disk: None, segment, stored: AtomicU64::new(0) }
    }

    /// Identity of the new segment.
    pub(super) fn segment(&self) -> Uuid {
        self.segment
    }

    /// The store.
    #[must_use]
    pub fn dir(&self) -> D
    where
        D: Clone,
    {
        self.dir.clone()
    }

    /// The disk to write to.
    ///
    /// # Panics
    /// Never: the disk is there until the import is finished.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("there until finished")
    }

    /// Stores a piece; gives back how many of its bytes were not zero, in whole blocks. `offset` is
    /// a multiple of 4 KiB. Pieces that do not overlap may be stored side by side.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn store(&self, lane: usize, offset: u64, bytes: &[u8]) -> Result<u64> {
        let disk = self.disk();
        let mut data = Vec::new();
        // Zeroes first: to zero blocks of an extent that has data already would make the engine
        // punch holes where nothing was ever written.
        zero_runs(bytes, BLOCK, &mut |at, run, zero| {
            if zero {
                return disk.write_zeroes(lane, offset + at, run.len() as u64, true);
            }
            data.push((at, run));
            Ok(())
        })?;
        data.iter().try_for_each(|(at, run)| disk.write(lane, offset + at, run))?;
        let stored = data.iter().map(|(_, run)| run.len() as u64).sum();
        // Relaxed: decides only when somebody speeds the device up.
        let before = self.stored.fetch_add(stored, Ordering::Relaxed);
        if begins_write_behind(before, stored) {
            disk.write_behind();
        }
        Ok(stored)
    }

    /// Makes the content durable and the disk appear.
    ///
    /// # Errors
    /// As [`Disk::close`] and [`StoreDir::create`]; the disk then does not appear.
    pub fn finish(mut self) -> Result<DiskRow> {
        self.close()?;
        let row = self.dir.publish(self.segment)?;
        self.segment = Uuid::nil();
        Ok(row)
    }

    /// Makes the content durable; the disk does not appear yet.
    pub(super) fn close(&mut self) -> Result<()> {
        self.disk.take().map_or(Ok(()), Disk::close)
    }

    /// Leaves the segment to the caller, who makes the disk appear.
    pub(super) fn leave(mut self) -> Uuid {
        self.disk = None;
        std::mem::take(&mut self.segment)
    }
}

impl<D: Deref<Target = StoreDir>> Drop for Import<D> {
    fn drop(&mut self) {
        self.disk = None;
        if !self.segment.is_nil() {
            // An import that failed leaves nothing; if this fails too, the next opening removes it.
            let _ = self.dir.store.remove(&new_name(self.segment));
        }
    }
}
