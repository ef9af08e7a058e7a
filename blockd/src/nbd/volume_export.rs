//! A volume as an export: the same limits, holding and counters as on its queues.
//!
//! What block status says: data is allocated, wherever it lies; holes and explicit zeroes are both
//! not allocated and read as zeroes. The first write to data of a parent takes space all the same:
//! the protocol has no word for it that would not also call the content undefined.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use format::entry::BlockState;
use format::limits::BLOCK;
use format::units::GuestBlock;
use format::{Error, Kind, Result};
use uuid::Uuid;

use super::{BlockStatus, Export, Extent, STATE_CHANGED, STATE_HOLE, STATE_ZERO, Visit};
use crate::catalogue::DiskRow;
use crate::diff;
use crate::disk::Disk;
use crate::disk::problem::GuestRange;
use crate::serve::Volume;
use crate::store::Access;
use crate::storedir::StoreDir;

/// Bytes looked up at a time: a walk that is broken off goes no further than that.
const WINDOW: u64 = 256 << 20;

/// Opens what a disk descends from.
pub trait Ancestors: Send + Sync {
    /// Names of the ancestors.
    fn names(&self) -> Vec<String>;

    /// Opens one for reading.
    ///
    /// # Errors
    /// `NotFound` for a name that is none of them, or what opening it reports.
    fn open(&self, name: &str) -> Result<Arc<Disk>>;
}

/// No ancestors.
pub struct NoAncestors;

impl Ancestors for NoAncestors {
    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn open(&self, _: &str) -> Result<Arc<Disk>> {
        Err(Error::new(Kind::NotFound, "this disk has no ancestor of that name"))
    }
}

/// The disks of a store that a disk descends from: sealed ones that its map may point into.
pub struct StoreAncestors {
    dir: Arc<StoreDir>,
    segments: Vec<Uuid>,
}

impl StoreAncestors {
    /// The ancestors of an open disk of the store.
    #[must_use]
    pub fn of(dir: &Arc<StoreDir>, disk: &Disk) -> Self {
        let own = disk.segment();
        let table = disk.table();
        let rows = table.iter().map(|(_, row)| row.segment);
        StoreAncestors { dir: Arc::clone(dir), segments: rows.filter(|s| *s != own).collect() }
    }
}

impl Ancestors for StoreAncestors {
    fn names(&self) -> Vec<String> {
        let ancestor = |row: &DiskRow| row.sealed && self.segments.contains(&row.segment);
        self.dir.disks().into_iter().filter(ancestor).map(|row| row.name).collect()
    }

    fn open(&self, name: &str) -> Result<Arc<Disk>> {
        if !self.names().iter().any(|ancestor| ancestor == name) {
            return NoAncestors.open(name);
        }
        self.dir.open_disk(name, Access::Read, &self.dir.disk_options()).map(Arc::new)
    }
}

/// A volume as an export.
pub struct VolumeExport {
    volume: Arc<Volume>,
    description: String,
    read_only: bool,
    ancestors: Box<dyn Ancestors>,
}

impl VolumeExport {
    /// Exports a volume under its name, for writing if its disk can be written.
    #[must_use]
    pub fn new(volume: Arc<Volume>) -> Self {
        VolumeExport {
            read_only: !volume.disk().is_writable(),
            volume,
            description: String::new(),
            ancestors: Box::new(NoAncestors),
        }
    }

    /// For reading only.
    #[must_use]
    pub fn read_only(self) -> Self {
        VolumeExport { read_only: true, ..self }
    }

    /// With a line for people.
    #[must_use]
    pub fn described(self, description: &str) -> Self {
        VolumeExport { description: description.to_owned(), ..self }
    }

    /// With ancestors that changes can be asked against.
    #[must_use]
    pub fn with_ancestors(self, ancestors: Box<dyn Ancestors>) -> Self {
        VolumeExport { ancestors, ..self }
    }

    fn flush_if(&self, fua: bool) -> Result<()> {
        if fua { self.volume.flush(lane()) } else { Ok(()) }
    }
}

/// The lane of this thread; a disk takes it modulo the lanes it has.
fn lane() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    // Relaxed: only that threads get different numbers matters.
    thread_local!(static LANE: usize = NEXT.fetch_add(1, Ordering::Relaxed));
    LANE.with(|lane| *lane)
}

impl Export for VolumeExport {
    fn name(&self) -> &str {
        self.volume.name()
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn size(&self) -> u64 {
        self.volume.disk().size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.volume.read(lane(), offset, buf)
    }

    fn write(&self, offset: u64, buf: &[u8], fua: bool) -> Result<()> {
        self.volume.write(lane(), offset, buf, fua)
    }

    fn flush(&self) -> Result<()> {
        self.volume.flush(lane())
    }

    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        self.volume.discard(lane(), offset, len)?;
        // It completed before the flush begins: the flush covers it.
        self.flush_if(fua)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, fua: bool) -> Result<()> {
        self.volume.write_zeroes(lane(), offset, len, unmap)?;
        self.flush_if(fua)
    }

    fn zeroes_fast(&self, offset: u64, len: u64, unmap: bool) -> bool {
        let end = offset + len;
        let whole = end.is_multiple_of(BLOCK) || end == self.volume.disk().size();
        unmap && offset.is_multiple_of(BLOCK) && whole
    }

    fn allocation(&self, offset: u64, len: u64, visit: &mut Visit<'_>) -> Result<()> {
        allocation(&self.volume.disk(), offset, len, visit)
    }

    fn ancestors(&self) -> Vec<String> {
        self.ancestors.names()
    }

    fn changed_since(&self, ancestor: &str) -> Result<Arc<dyn BlockStatus>> {
        let ancestor = self.ancestors.open(ancestor)?;
        Ok(Arc::new(ChangedSince { volume: Arc::clone(&self.volume), ancestor }))
    }
}

/// Calls `window` with ranges that make up `offset..offset + len`, until it breaks off.
fn windows(
    (offset, len): (u64, u64),
    mut window: impl FnMut(u64, u64) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let stop = ((at / WINDOW + 1) * WINDOW).min(end);
        if window(at, stop)?.is_break() {
            break;
        }
        at = stop;
    }
    Ok(())
}

/// Allocation of a disk: see [`Export::allocation`].
///
/// # Errors
/// `Corrupt` in a damaged range.
pub fn allocation(disk: &Disk, offset: u64, len: u64, visit: &mut Visit<'_>) -> Result<()> {
    windows((offset, len), |from, to| {
        let (first, end) = (from / BLOCK, to.div_ceil(BLOCK));
        let mut flow = ControlFlow::Continue(());
        disk.map().resolve(GuestBlock(first), end - first, &mut |piece| {
            let flags = match piece.state {
                BlockState::Hole | BlockState::Zero => STATE_HOLE | STATE_ZERO,
                BlockState::Data { .. } => 0,
            };
            let begin = piece.block.offset().0;
            let stop = (begin + piece.count * BLOCK).min(to);
            if flow.is_continue() {
                flow = visit(Extent { len: stop - begin.max(from), flags });
            }
            Ok(())
        })?;
        Ok(flow)
    })
}

/// What changed on a disk since an ancestor: see [`Export::changed_since`].
///
/// # Errors
/// `Corrupt` in a damaged range of either.
pub fn changes(
    disk: &Disk,
    ancestor: &Disk,
    (offset, len): (u64, u64),
    visit: &mut Visit<'_>,
) -> Result<()> {
    windows((offset, len), |from, to| {
        let range = GuestRange { offset: from, len: to - from };
        let mut flow = ControlFlow::Continue(());
        let mut tell = |len: u64, flags: u32| {
            if flow.is_continue() && len > 0 {
                flow = visit(Extent { len, flags });
            }
        };
        let mut at = from;
        diff::changed_in(disk, ancestor, range, &mut |changed| {
            tell(changed.offset - at, 0);
            tell(changed.len, STATE_CHANGED);
            at = changed.offset + changed.len;
            Ok(())
        })?;
        tell(to - at, 0);
        Ok(flow)
    })
}

struct ChangedSince {
    volume: Arc<Volume>,
    ancestor: Arc<Disk>,
}

impl BlockStatus for ChangedSince {
    fn extents(&self, offset: u64, len: u64, visit: &mut Visit<'_>) -> Result<()> {
        changes(&self.volume.disk(), &self.ancestor, (offset, len), visit)
    }
}
