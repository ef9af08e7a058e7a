//! What the benchmarks share: figures, chains of sealed disks, and a store of metadata only.

pub mod figures;

use std::path::Path;
use std::sync::Arc;

use blockd::disk::Disk;
use blockd::store::file::{CacheMode, FileStore, FileStoreOptions};
use blockd::store::{Access, File, Space, Store};
use blockd::storedir::{NewDisk, OpenOptions, StoreDir, boot_id};
use format::Result;

/// Bytes from which on a write to [`MetadataOnly`] is taken for guest data and dropped.
const DATA_WRITE_MIN: usize = 64 << 10;

/// Options to open a store of a benchmark for writing.
#[must_use]
pub fn options() -> OpenOptions {
    OpenOptions { access: Access::Write, cache: CacheMode::Buffered, boot: boot_id() }
}

/// A new store in `dir`.
///
/// # Errors
/// What the host reports.
pub fn new_store(dir: &Path) -> Result<StoreDir> {
    StoreDir::init(dir, None)?;
    StoreDir::open(dir, &options())
}

/// A store in `dir` whose big data writes go nowhere: for maps of many gibibytes on a small
/// machine.
///
/// # Errors
/// What the host reports.
pub fn metadata_only(dir: &Path) -> Result<StoreDir> {
    StoreDir::init(dir, None)?;
    let inner = FileStore::open(dir, FileStoreOptions { cache: CacheMode::Buffered })?;
    StoreDir::open_in(Arc::new(MetadataOnly(inner)), &options())
}

/// A disk on top of `depth` sealed ones, each of which wrote every `depth`-th extent of `size`
/// bytes.
///
/// # Errors
/// What the host reports.
pub fn chain(dir: &StoreDir, depth: u64, size: u64) -> Result<Disk> {
    const EXTENT: u64 = 64 << 10;
    let mut parent: Option<String> = None;
    for layer in 0..depth {
        let name = format!("layer{layer}");
        let journal_bytes = 1 << 20;
        dir.create(&NewDisk { name: name.clone(), virtual_size: size, parent, journal_bytes })?;
        let disk = dir.open_disk(&name, Access::Write, &dir.disk_options())?;
        let data = vec![u8::try_from(layer % 251).unwrap_or(0) + 1; 64 << 10];
        for extent in (layer..size / EXTENT).step_by(usize::try_from(depth).unwrap_or(1)) {
            disk.write(0, extent * EXTENT, &data)?;
        }
        disk.close()?;
        dir.seal(&name, &mut |_, _| Ok(()))?;
        parent = Some(name);
    }
    dir.create(&NewDisk { name: "top".into(), virtual_size: size, parent, journal_bytes: 0 })?;
    dir.open_disk("top", Access::Write, &dir.disk_options())
}

/// A small random number generator (xorshift), the same on every run.
pub struct Random(pub u64);

impl Random {
    /// The next number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

struct MetadataOnly(FileStore);

struct NoData(Arc<dyn File>);

impl Store for MetadataOnly {
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>> {
        Ok(Arc::new(NoData(self.0.open(name, access)?)))
    }
    fn create(&self, name: &str) -> Result<Arc<dyn File>> {
        Ok(Arc::new(NoData(self.0.create(name)?)))
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.0.remove(name)
    }
    fn names(&self) -> Result<Vec<String>> {
        self.0.names()
    }
    fn sync_names(&self) -> Result<()> {
        self.0.sync_names()
    }
    fn space(&self) -> Result<Space> {
        self.0.space()
    }
    fn describe(&self) -> String {
        self.0.describe()
    }
}

impl File for NoData {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buf)
    }
    fn read_many(&self, ops: &mut [blockd::store::ReadOp<'_>]) -> Result<()> {
        self.0.read_many(ops)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        if buf.len() >= DATA_WRITE_MIN { Ok(()) } else { self.0.write_at(offset, buf) }
    }
    fn write_many(&self, ops: &[blockd::store::WriteOp<'_>]) -> Result<()> {
        if ops.iter().all(|op| op.buf.len() >= DATA_WRITE_MIN) {
            return Ok(());
        }
        self.0.write_many(ops)
    }
    fn sync(&self) -> Result<()> {
        self.0.sync()
    }
    fn size(&self) -> Result<u64> {
        self.0.size()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.0.punch(offset, len)
    }
    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.0.reserve(offset, len)
    }
    fn allocated(&self) -> Result<u64> {
        self.0.allocated()
    }
    fn set_read_only(&self, read_only: bool) -> Result<()> {
        self.0.set_read_only(read_only)
    }
    fn is_direct(&self) -> bool {
        self.0.is_direct()
    }
}
