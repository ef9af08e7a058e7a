//! Flatten: a disk that stands on many segments goes on standing on a few, in place.
//!
//! Blocks that lie in segments that are to go are pulled into the disk's own segment
//! (`disk/pull.rs`), then the disk lets go of those segments, and who is needed by nobody is
//! removed.
//!
//! Order, and the crash it defends against:
//! 1. the row says that the disk is being flattened — else nobody goes on after a crash;
//! 2. blocks are pulled, each as a first write;
//! 3. the disk lets go, durably in all copies of its superblock — else it names what is gone;
//! 4. the row tells what the disk stands on now; marked before 3 and read off the segment, as for
//!    every change that a row tells of;
//! 5. segments that no row names are removed (`drop_frozen`).
//!
//! Tests: `crash_points::flatten`, `flatten`, `flatten_under_load`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use format::superblock::Seal;
use format::table::SegmentTable;
use format::units::{BlockId, GuestExtent, SegmentIdx, crc};
use format::{Context, Error, Kind, Result};
use uuid::Uuid;

use super::{StoreDir, begins_write_behind};
use crate::catalogue::{Change, DiskRow, FlattenPolicy, Flattening};
use crate::check::sums::SumReader;
use crate::disk::{Below, Disk};
use crate::pump::Watch;
use crate::segment::Segments;
use crate::store::Access;

/// What [`Flattening::to`] says for the nearest ancestor that is a disk by itself.
pub const TO_BASE: &str = "base";
/// Segments below a disk from which on a fork of it waits until it is flattened. Nothing gets
/// slower before; what is bounded is the number of files that one disk keeps open.
pub const DEPTH_MAX: usize = 256;
/// What [`Flattening::to`] says for no ancestor at all.
pub const TO_NOTHING: &str = "nothing";
/// Space that is left alone, besides what is to be copied: map pages, and other disks.
const SPARE_BYTES: u64 = 16 << 20;

/// The segments that a disk is to let go of, and the sums of their data.
pub struct Going {
    table: Arc<SegmentTable>,
    stays: HashSet<Uuid>,
    sums: HashMap<SegmentIdx, SumReader>,
}

impl Going {
    /// True when there is nothing to let go of.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.iter().all(|(_, row)| self.stays.contains(&row.segment))
    }
}

impl Below for Going {
    fn stays(&self, segment: SegmentIdx) -> bool {
        self.table.row(segment).is_ok_and(|row| self.stays.contains(&row.segment))
    }

    fn verify(&mut self, segment: SegmentIdx, block: BlockId, content: &[u8]) -> Result<()> {
        // What has no sum cannot be looked at.
        let Some(sums) = self.sums.get_mut(&segment) else { return Ok(()) };
        if sums.get(block)? == crc(content) {
            return Ok(());
        }
        let of = self.table.row(segment)?.segment;
        Err(Error::corrupt("it does not match its checksum")
            .on(format!("block {block} of segment {of}"))
            .hint("`offshoot disk scrub` lists what is damaged"))
    }
}

impl StoreDir {
    /// What a disk lets go of when it is flattened to `to`: [`TO_BASE`], [`TO_NOTHING`], or the
    /// name of a disk that it stands on. What an undo would go back to stays in any case.
    ///
    /// # Errors
    /// `NotFound` for that name, `Invalid` when the disk does not stand on it, or what the host
    /// reports.
    pub fn going(&self, disk: &Disk, to: &str) -> Result<Going> {
        let table = disk.table();
        let base = self.nearest(&self.chain(disk)?, to)?;
        // What an undo goes back to.
        let undone = Some(disk.base()).filter(|undone| !undone.is_nil());
        let mut stays = HashSet::from([disk.segment()]);
        for segment in base.into_iter().chain(undone) {
            stays.extend(self.row_of(segment)?.parents.into_iter().chain([segment]));
        }
        let mut sums = HashMap::new();
        for (index, row) in table.iter().filter(|(_, row)| !stays.contains(&row.segment)) {
            sums.extend(self.sums(row.segment)?.map(|of| (index, of)));
        }
        Ok(Going { table, stays, sums })
    }

    /// The checksums of a sealed segment's data; `None` while they are not made.
    ///
    /// # Errors
    /// As [`Segments::sealed`] and [`SumReader::open`].
    pub(crate) fn sums(&self, segment: Uuid) -> Result<Option<SumReader>> {
        let sealed = self.sealed(segment)?;
        let done = sealed.superblock.seal == Seal::Done;
        done.then(|| SumReader::open(&sealed.file, &sealed.superblock)).transpose()
    }

    /// The segments below a disk, the lowest first. Their rows tell no order: some were used
    /// before.
    pub(super) fn chain(&self, disk: &Disk) -> Result<Vec<Uuid>> {
        let table = disk.table();
        let below = table.iter().map(|(_, row)| row.segment).filter(|s| *s != disk.segment());
        // A segment stands on all that its parent stands on, and on the parent.
        let depth = |id: Uuid| self.row_of(id).map(|row| (row.parents.len(), id));
        let mut chain = below.map(depth).collect::<Result<Vec<_>>>()?;
        chain.sort_unstable();
        Ok(chain.into_iter().map(|(_, id)| id).collect())
    }

    /// The highest segment of a chain that stays, with those that it stands on itself.
    fn nearest(&self, chain: &[Uuid], to: &str) -> Result<Option<Uuid>> {
        match to {
            TO_NOTHING => Ok(None),
            TO_BASE => {
                let own: HashSet<Uuid> = self.disks().iter().map(|row| row.segment).collect();
                let named = chain.iter().rev().find(|id| own.contains(id));
                Ok(named.or(chain.first()).copied())
            }
            name => {
                let row = self.disk(name)?;
                if chain.contains(&row.segment) {
                    return Ok(Some(row.segment));
                }
                Err(Error::invalid("the disk does not stand on it")
                    .on(format!("disk {name}"))
                    .hint("`offshoot disk show` lists what a disk stands on"))
            }
        }
    }

    /// Step 1. Refuses what cannot be done; gives back the bytes to copy as well.
    ///
    /// # Errors
    /// `NotFound`; `ReadOnly` for a sealed disk; `Corrupt` for a damaged one; `NoSpace`, with the
    /// bytes that are missing.
    pub(crate) fn begin_flatten(
        &self,
        name: &str,
        disk: &Disk,
        how: &Flattening,
    ) -> Result<(Going, u64)> {
        self.check_writable()?;
        let going = self.going(disk, &how.to)?;
        disk.check_undamaged()?;
        let (needed, free) = (disk.bytes_below(&going)?, self.store.space()?.free);
        if free < needed + SPARE_BYTES {
            let reason = format!("{needed} bytes are to be copied, and the host has {free} free");
            return Err(Error::new(Kind::NoSpace, reason)
                .hint("free space on the host, or flatten to a nearer ancestor: `--to NAME`"));
        }
        let row = self.disk(name)?;
        self.catalogue.apply(&[Change::Put(DiskRow { flattening: Some(how.clone()), ..row })])?;
        Ok((going, needed))
    }

    /// Steps 3 to 5. Nobody may fork the disk meanwhile.
    ///
    /// # Errors
    /// `Busy` when blocks of it lie in a segment that goes still, or a request that began long ago
    /// has not ended; or as [`Disk::let_go`].
    pub(crate) fn end_flatten(&self, name: &str, disk: &Disk, going: &Going) -> Result<DiskRow> {
        if !going.is_empty() {
            self.changing(&self.disk(name)?, || disk.let_go(going))?;
        }
        let row = self.forget_flatten(name)?;
        self.drop_frozen()?;
        Ok(row)
    }

    /// When a disk is flattened by itself that says nothing of its own.
    #[must_use]
    pub fn flatten_policy(&self) -> FlattenPolicy {
        self.catalogue.policy()
    }

    /// Sets when a disk is flattened by itself (`None`: as the store says), or, without a name, all
    /// that say nothing (`None`: as at the beginning).
    ///
    /// # Errors
    /// `NotFound`, or what the host reports.
    pub fn set_flatten_policy(
        &self,
        name: Option<&str>,
        policy: Option<FlattenPolicy>,
    ) -> Result<()> {
        self.check_writable()?;
        let change = match name {
            Some(name) => Change::Put(DiskRow { policy, ..self.disk(name)? }),
            None => Change::PutPolicy(policy.unwrap_or(FlattenPolicy::DEFAULT)),
        };
        self.catalogue.apply(&[change])
    }

    /// The disk is not being flattened any more.
    ///
    /// # Errors
    /// What the host reports.
    pub(crate) fn forget_flatten(&self, name: &str) -> Result<DiskRow> {
        let row = DiskRow { flattening: None, ..self.disk(name)? };
        self.catalogue.apply(&[Change::Put(row.clone())])?;
        Ok(row)
    }

    /// Flattens a disk that nobody has open. Returns the bytes that were copied.
    ///
    /// # Errors
    /// As opening it; as for a disk that is being written to: `Invalid`, `NoSpace`, `Corrupt` for a
    /// block that does not match its checksum; or what `watch` reports. What was copied stays
    /// copied: flattening again goes on.
    pub fn flatten(&self, name: &str, how: &Flattening, watch: &dyn Watch) -> Result<u64> {
        let flatten = || {
            let disk = self.open_disk(name, Access::Write, &self.disk_options())?;
            let flattened = self.flatten_open(name, &disk, how, watch);
            let closed = disk.close();
            flattened.and_then(|bytes| closed.map(|()| bytes))
        };
        flatten().context("flatten", || format!("disk {name}"))
    }

    fn flatten_open(
        &self,
        name: &str,
        disk: &Disk,
        how: &Flattening,
        watch: &dyn Watch,
    ) -> Result<u64> {
        let (mut going, bytes) = self.begin_flatten(name, disk, how)?;
        watch.expect(bytes);
        let (mut at, mut copied) = (GuestExtent(0), 0);
        while let Some(pulled) = disk.pull(0, at, &mut going)? {
            at = pulled.next;
            if begins_write_behind(copied, pulled.bytes) {
                disk.write_behind();
            }
            copied += pulled.bytes;
            watch.add(pulled.bytes);
            watch.check()?;
        }
        self.end_flatten(name, disk, &going)?;
        Ok(copied)
    }
}
