//! The store, wherever it is: a folder that this process opens, or a daemon that has it.
//!
//! Invariant: both do the same, and say the same. What a verb means is in `blockd::verbs`, which
//! serves both; here is only how to get at it.

mod local;
mod remote;

use blockd::api::types::{
    ByteRange, CheckDisk, Checked, Compare, Compared, CreateDisk, Df, Digested, Disk, DiskDetails,
    FlattenDisk, Flattened, ForkDisks, ForkedDisks, Job, MapRange, Moved, RemovedDisk, RepairDisk,
    Repaired, ResizeDisk, Scrubbed, SessionUse, SetFlattenPolicy, SetMode,
};
use blockd::content::Content;
use blockd::pump::Watch;
use format::Result;

use crate::output::Outcome;

pub use local::Local;
pub use remote::Remote;

/// What came of beginning to flatten.
pub enum Flattening {
    /// It is done.
    Done(Box<Flattened>),
    /// A daemon does it.
    Job(Box<Job>),
}

/// A disk that is written to by bytes.
pub trait Writing {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Writes bytes at any offset.
    ///
    /// # Errors
    /// As `Disk::write`.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()>;

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As `Disk::close`.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// A new disk that is being filled. Dropped without [`Filling::finish`], it leaves nothing. Threads
/// share it, each with a lane of its own.
pub trait Filling: Sync {
    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// As `Disk::write_zeroes`.
    fn zero(&self, lane: usize, offset: u64, length: u64) -> Result<()>;

    /// Stores bytes at an offset that is a multiple of 4 KiB; gives back how many of them were not
    /// zero, in whole blocks.
    ///
    /// # Errors
    /// As `Disk::write`.
    fn store(&self, lane: usize, offset: u64, bytes: &[u8]) -> Result<u64>;

    /// Makes the disk appear, durably.
    ///
    /// # Errors
    /// As `Import::finish`.
    fn finish(self: Box<Self>) -> Result<Disk>;
}

/// What can be asked of a store. Errors are those of `blockd::verbs` and of `StoreDir`; a daemon
/// that goes away is `Io`.
pub trait Store {
    /// All disks, by name.
    fn list(&self) -> Result<Vec<Disk>>;

    /// True when there is a disk of this name.
    fn has(&self, name: &str) -> Result<bool>;

    /// Everything about a disk.
    fn show(&self, name: &str, lost_tail: bool) -> Result<DiskDetails>;

    /// Creates a disk.
    fn create(&self, new: &CreateDisk) -> Result<Disk>;

    /// Forks disks at one instant.
    fn fork(&self, request: &ForkDisks, watch: &dyn Watch) -> Result<ForkedDisks>;

    /// Gives a disk another persistence mode.
    fn set_mode(&self, name: &str, request: &SetMode) -> Result<Disk>;

    /// Keeps what was written to a disk.
    fn commit(&self, name: &str, accept_lost_tail: bool) -> Result<Disk>;

    /// Drops what was written to a disk since it was committed.
    fn undo(&self, name: &str) -> Result<Disk>;
    /// Flattens a disk, and waits for the end.
    fn flatten(&self, name: &str, request: &FlattenDisk, watch: &dyn Watch) -> Result<Flattened>;

    /// Flattens a disk: begins with it, where somebody else does it.
    fn begin_flatten(
        &self,
        name: &str,
        request: &FlattenDisk,
        watch: &dyn Watch,
    ) -> Result<Flattening>;

    /// Sets when a daemon flattens a disk by itself.
    fn set_disk_policy(&self, name: &str, request: &SetFlattenPolicy) -> Result<Disk>;

    /// When a daemon flattens disks that say nothing of their own.
    fn store_policy(&self) -> Result<SetFlattenPolicy>;

    /// Sets that.
    fn set_store_policy(&self, request: &SetFlattenPolicy) -> Result<SetFlattenPolicy>;

    /// Removes a disk.
    fn remove(&self, name: &str) -> Result<RemovedDisk>;

    /// Renames a disk.
    fn rename(&self, name: &str, to: &str) -> Result<Disk>;

    /// Changes the size of a disk.
    fn resize(&self, name: &str, request: &ResizeDisk) -> Result<Disk>;

    /// Seals a disk.
    fn seal(&self, name: &str, lost_tail: bool, watch: &dyn Watch) -> Result<Disk>;

    /// Checks a disk.
    fn check(&self, name: &str, request: CheckDisk, watch: &dyn Watch) -> Result<Checked>;

    /// Compares sealed data with its checksums.
    fn scrub(&self, name: &str, watch: &dyn Watch) -> Result<Scrubbed>;

    /// The digest of a sealed disk's content.
    fn digest(&self, name: &str, watch: &dyn Watch) -> Result<Digested>;

    /// Repairs a disk.
    fn repair(&self, name: &str, request: RepairDisk, watch: &dyn Watch) -> Result<Repaired>;

    /// Calls `visit` with the ranges of a disk.
    fn map(
        &self,
        name: &str,
        lost_tail: bool,
        visit: &mut dyn FnMut(MapRange) -> Outcome<()>,
    ) -> Outcome<()>;

    /// Compares two disks.
    fn compare(&self, request: &Compare, watch: &dyn Watch) -> Result<Compared>;

    /// The ranges of a disk that may differ from another one.
    fn diff(&self, name: &str, from: &str, lost_tail: bool) -> Result<Vec<ByteRange>>;

    /// Makes a part of a disk read as zeroes.
    fn discard(&self, name: &str, range: ByteRange, lost_tail: bool) -> Result<Moved>;

    /// The space that the store takes and has left.
    fn df(&self) -> Result<Df>;

    /// Opens a disk for reading.
    fn open(
        &self,
        name: &str,
        purpose: SessionUse,
        lost_tail: bool,
    ) -> Result<Box<dyn Content + '_>>;

    /// Opens a disk for writing.
    fn open_for_writing(&self, name: &str, lost_tail: bool) -> Result<Box<dyn Writing + '_>>;

    /// Begins a new disk of `size` bytes, which holds what the sealed disk `parent` does if there
    /// is to be one.
    fn import(&self, name: &str, size: u64, parent: Option<&str>) -> Result<Box<dyn Filling + '_>>;
}
