//! A disk as an export, without anything in between.
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

use super::{BlockStatus, Export, Extent, STATE_CHANGED, STATE_HOLE, STATE_ZERO, Visit};
use crate::diff;
use crate::disk::Disk;
use crate::disk::problem::GuestRange;

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

/// A disk as an export.
pub struct DiskExport {
    disk: Arc<Disk>,
    name: String,
    description: String,
    read_only: bool,
    ancestors: Box<dyn Ancestors>,
}

impl DiskExport {
    /// Exports `disk` under `name`, for reading and writing.
    #[must_use]
    pub fn new(name: &str, disk: Arc<Disk>) -> Self {
        DiskExport {
            disk,
            name: name.to_owned(),
            description: String::new(),
            read_only: false,
            ancestors: Box::new(NoAncestors),
        }
    }

    /// For reading only.
    #[must_use]
    pub fn read_only(self) -> Self {
        DiskExport { read_only: true, ..self }
    }

    /// With a line for people.
    #[must_use]
    pub fn described(self, description: &str) -> Self {
        DiskExport { description: description.to_owned(), ..self }
    }

    /// With ancestors that changes can be asked against.
    #[must_use]
    pub fn with_ancestors(self, ancestors: Box<dyn Ancestors>) -> Self {
        DiskExport { ancestors, ..self }
    }

    fn flush_if(&self, fua: bool) -> Result<()> {
        if fua { self.disk.flush() } else { Ok(()) }
    }
}

/// The lane of this thread; a disk takes it modulo the lanes it has.
fn lane() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    // Relaxed: only that threads get different numbers matters.
    thread_local!(static LANE: usize = NEXT.fetch_add(1, Ordering::Relaxed));
    LANE.with(|lane| *lane)
}

impl Export for DiskExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read(lane(), offset, buf)
    }

    fn write(&self, offset: u64, buf: &[u8], fua: bool) -> Result<()> {
        self.disk.write(lane(), offset, buf)?;
        // The write completed before the flush began: the flush covers it.
        self.flush_if(fua)
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        self.disk.discard(lane(), offset, len)?;
        self.flush_if(fua)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, fua: bool) -> Result<()> {
        self.disk.write_zeroes(lane(), offset, len, unmap)?;
        self.flush_if(fua)
    }

    fn zeroes_fast(&self, offset: u64, len: u64, unmap: bool) -> bool {
        let end = offset + len;
        let whole = end.is_multiple_of(BLOCK) || end == self.disk.size();
        unmap && offset.is_multiple_of(BLOCK) && whole
    }

    fn allocation(&self, offset: u64, len: u64, visit: &mut Visit<'_>) -> Result<()> {
        allocation(&self.disk, offset, len, visit)
    }

    fn ancestors(&self) -> Vec<String> {
        self.ancestors.names()
    }

    fn changed_since(&self, ancestor: &str) -> Result<Arc<dyn BlockStatus>> {
        let ancestor = self.ancestors.open(ancestor)?;
        Ok(Arc::new(ChangedSince { disk: Arc::clone(&self.disk), ancestor }))
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
    disk: Arc<Disk>,
    ancestor: Arc<Disk>,
}

impl BlockStatus for ChangedSince {
    fn extents(&self, offset: u64, len: u64, visit: &mut Visit<'_>) -> Result<()> {
        changes(&self.disk, &self.ancestor, (offset, len), visit)
    }
}
