//! Disks as a whole: list, show, create, resize, seal, and the space they take.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};

use format::superblock::{Attached, Seal, State, Superblock};
use format::{Context as _, Error, Kind, Result};
use uuid::Uuid;

use super::{disk_options, flatten, inherit};
use crate::api::types::{
    ChainRow, CreateDisk, Df, Disk as Summary, DiskDetails, DiskSpace, DiskState, FeatureBits,
    FlattenDisk, FlattenWhen, ForkDisk, ForkDisks, ForkMode, ForkedDisks, JournalUse, ResizeDisk,
};
use crate::catalogue::DiskRow;
use crate::disk::Disk;
use crate::pump::{Unwatched, Watch};
use crate::segment::{file_name, read_superblock};
use crate::store::Access;
use crate::storedir::{DEPTH_MAX, ForkOf, NewDisk, StoreDir};

/// Names of the disks by their identity.
type Names = HashMap<Uuid, String>;

fn names(dir: &StoreDir) -> Names {
    dir.disks().into_iter().map(|row| (row.disk, row.name)).collect()
}

/// All disks, by name.
///
/// # Errors
/// What the host reports.
pub fn list(dir: &StoreDir) -> Result<Vec<Summary>> {
    let names = names(dir);
    dir.disks().iter().map(|row| summarise(dir, row, &names)).collect()
}

/// What is known about a row without opening the disk.
///
/// # Errors
/// What the host reports.
pub fn summary(dir: &StoreDir, row: &DiskRow) -> Result<Summary> {
    summarise(dir, row, &names(dir))
}

fn summarise(dir: &StoreDir, row: &DiskRow, names: &Names) -> Result<Summary> {
    let file = match dir.segment_file(row.segment, Access::Read) {
        Ok(file) => Some(file),
        Err(e) if e.kind() == Kind::NotFound => None,
        Err(e) => return Err(e),
    };
    let state = match file.as_deref().map(read_superblock) {
        None => DiskState::Missing,
        Some(Err(e)) if e.kind().is_of_host() => return Err(e),
        Some(Err(_)) => DiskState::Unreadable,
        Some(Ok(chosen)) => state_of(&chosen.superblock),
    };
    let parent = row.parent_disk;
    Ok(Summary {
        name: row.name.clone(),
        disk: row.disk,
        segment: row.segment,
        size: row.virtual_size,
        allocated: file.map(|f| f.allocated()).transpose()?,
        state,
        parent: parent.map(|id| names.get(&id).cloned().unwrap_or_else(|| id.to_string())),
        depth: row.parents.len() as u64,
        created: row.created,
        mode: row.mode.name().into(),
        flattening: row.flattening.as_ref().map(|f| f.to.clone()),
        flatten_policy: row.policy,
    })
}

fn state_of(sb: &Superblock) -> DiskState {
    match (sb.state, sb.seal) {
        (State::Active, _) => DiskState::Active,
        (State::Sealed, Seal::Done) => DiskState::Sealed,
        (State::Sealed, _) => DiskState::Sealing,
    }
}

/// Bytes as lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Everything about a disk that is open.
///
/// # Errors
/// `NotFound`, or what the host reports.
pub fn details(dir: &StoreDir, name: &str, disk: &Disk) -> Result<DiskDetails> {
    let row = dir.disk(name)?;
    let facts = disk.facts()?;
    let sb = &facts.superblock;
    let page = format::limits::BLOCK;
    let segments = facts.table.iter().map(|(index, row)| ChainRow {
        index: index.get(),
        segment: row.segment,
        own: row.segment == sb.segment,
        digest: row.digest.map(|d| hex(&d)),
    });
    let problems = disk.problems.iter().map(|p| format!("{}: {}", p.object, p.detail));
    Ok(DiskDetails {
        base: Some(sb.base).filter(|base| !base.is_nil()),
        attached: attached_name(sb.attached).into(),
        digest: (sb.seal == Seal::Done).then(|| hex(&sb.digest)),
        segments: segments.collect(),
        dependents: dir.dependents(row.segment),
        own_extents: facts.extents_used,
        generation: sb.generation.0,
        epoch: sb.epoch.0,
        owner_epoch: sb.owner_epoch.0,
        journal: JournalUse {
            size: facts.journal_pages.1 * page,
            used: facts.journal_pages.0 * page,
        },
        map_memory: facts.map_bytes as u64,
        features: FeatureBits {
            incompat: format!("{:#x}", sb.features.incompat),
            read_only_compat: format!("{:#x}", sb.features.read_only_compat),
            compat: format!("{:#x}", sb.features.compat),
        },
        problems: problems.collect(),
        exports: Vec::new(),
        disk: summary(dir, &row)?,
    })
}

fn attached_name(attached: Attached) -> &'static str {
    match attached {
        Attached::No => "no",
        Attached::Plain => "plain",
        Attached::WithTail => "with-tail",
    }
}

/// Creates a disk.
///
/// # Errors
/// As [`StoreDir::create`].
pub fn create(dir: &StoreDir, new: &CreateDisk) -> Result<Summary> {
    let new = NewDisk {
        name: new.name.clone(),
        virtual_size: new.size.unwrap_or(0),
        parent: new.parent.clone(),
        journal_bytes: new.journal.unwrap_or(0),
    };
    let row = dir.create(&new).context("create", || format!("disk {}", new.name))?;
    summary(dir, &row)
}

/// Forks disks that nobody has open, or lets their children inherit.
///
/// # Errors
/// As [`StoreDir::fork`] and [`StoreDir::inherit`].
pub fn fork(dir: &StoreDir, request: &ForkDisks, watch: &dyn Watch) -> Result<ForkedDisks> {
    let began = Instant::now();
    if request.hold_ms.is_some() {
        let e = Error::invalid("no disk of it is in service: there is nothing to hold");
        return Err(e).context("fork", || named(request));
    }
    if let Some(inherited) = inherit::inherit(dir, request, watch)? {
        return inherit::inherited(dir, &inherited, (began.elapsed(), None));
    }
    let fork = || -> Result<Vec<DiskRow>> {
        for of in &request.disks {
            take_tail(dir, &of.disk, request.accept_lost_tail)?;
            if dir.disk(&of.disk)?.parents.len() >= DEPTH_MAX {
                flatten(dir, &of.disk, &FlattenDisk::default(), &Unwatched)?;
            }
        }
        let children = dir.fork(&forks(request))?;
        if request.flatten == FlattenWhen::Now {
            let parents = request.disks.iter().map(|of| &of.disk);
            for name in parents.chain(children.iter().map(|child| &child.name)) {
                flatten(dir, name, &FlattenDisk::default(), &Unwatched)?;
            }
        }
        Ok(children)
    };
    let children = fork().context("fork", || named(request))?;
    forked(dir, &children, (began.elapsed(), None))
}

/// What is asked for, in the words of the store.
#[must_use]
pub fn forks(request: &ForkDisks) -> Vec<ForkOf> {
    let of = |d: &ForkDisk| ForkOf { disk: d.disk.clone(), children: d.children.clone() };
    request.disks.iter().map(of).collect()
}

/// What came of a fork: how long it took, and how long guests waited.
///
/// # Errors
/// What the host reports.
pub fn forked(
    dir: &StoreDir,
    children: &[DiskRow],
    (took, pause): (Duration, Option<Duration>),
) -> Result<ForkedDisks> {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let children = children.iter().map(|row| summary(dir, row)).collect::<Result<_>>()?;
    Ok(ForkedDisks {
        children,
        mode: ForkMode::Live,
        copied: 0,
        cloned: 0,
        took_us: micros(took),
        pause_us: pause.map(micros),
        token: None,
    })
}

/// What is forked, for messages.
#[must_use]
pub fn named(request: &ForkDisks) -> String {
    let names: Vec<&str> = request.disks.iter().map(|d| d.disk.as_str()).collect();
    let what = if names.len() == 1 { "disk" } else { "disks" };
    format!("{what} {}", names.join(", "))
}

/// Bytes that removing a disk gives back.
///
/// # Errors
/// `NotFound`.
pub fn freed(dir: &StoreDir, name: &str) -> Result<u64> {
    let row = dir.disk(name)?;
    // A file that is gone or cannot be read frees nothing that we know of.
    Ok(dir.segment_file(row.segment, Access::Read).and_then(|f| f.allocated()).unwrap_or(0))
}

/// The size that a request asks for, of a disk that has `present` bytes.
fn wanted(present: u64, request: &ResizeDisk) -> Result<u64> {
    request
        .size
        .of(present)
        .ok_or_else(|| Error::invalid(format!("there is no such size: it has {present} bytes now")))
}

/// Changes the size of a disk that nobody has open.
///
/// # Errors
/// As [`StoreDir::resize`].
pub fn resize(dir: &StoreDir, name: &str, request: &ResizeDisk) -> Result<Summary> {
    let resize = || -> Result<DiskRow> {
        let size = wanted(dir.disk(name)?.virtual_size, request)?;
        take_tail(dir, name, request.accept_lost_tail)?;
        dir.resize(name, size, request.drop_data)
    };
    let row = resize().context("resize", || format!("disk {name}"))?;
    summary(dir, &row)
}

/// As [`resize`], of a disk that is open.
///
/// # Errors
/// As [`StoreDir::resize_open`].
pub fn resize_open(
    dir: &StoreDir,
    name: &str,
    disk: &Disk,
    request: &ResizeDisk,
) -> Result<Summary> {
    let size = wanted(disk.size(), request);
    let row = size.and_then(|size| dir.resize_open(name, disk, (size, request.drop_data)));
    summary(dir, &row.context("resize", || format!("disk {name}"))?)
}

/// Opens and closes a disk whose tail is lost, so that what follows finds it in order.
pub(crate) fn take_tail(dir: &StoreDir, name: &str, accept_lost_tail: bool) -> Result<()> {
    if !accept_lost_tail {
        return Ok(());
    }
    dir.open_disk(name, Access::Write, &disk_options(dir, true))?.close()
}

/// Seals a disk that nobody has open. `progress` gets the bytes summed and in all.
///
/// # Errors
/// As [`StoreDir::seal`].
pub fn seal(
    dir: &StoreDir,
    name: &str,
    accept_lost_tail: bool,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Summary> {
    let mut seal = || -> Result<DiskRow> {
        take_tail(dir, name, accept_lost_tail)?;
        dir.seal(name, &mut |done, total| {
            progress(done, total).map_err(|e| e.hint("seal it again to finish its checksums"))
        })
    };
    let row = seal().context("seal", || format!("disk {name}"))?;
    summary(dir, &row)
}

/// The space that a store takes and has left. `path` is its folder, as it is to be told.
///
/// # Errors
/// What the host reports.
pub fn df(dir: &StoreDir, path: &Path) -> Result<Df> {
    let files = dir.files();
    let mut allocated: BTreeMap<String, u64> = BTreeMap::new();
    for name in files.names()? {
        match files.open(&name, Access::Read).and_then(|f| f.allocated()) {
            Ok(bytes) => {
                allocated.insert(name, bytes);
            }
            // A file that is not ours to read takes space, too, but how much is not ours to say.
            // What is no regular file (a socket) takes none.
            Err(e) if matches!(e.kind(), Kind::NotFound | Kind::ReadOnly | Kind::Invalid) => {}
            Err(e) => return Err(e),
        }
    }
    let disks: Vec<DiskSpace> = dir
        .disks()
        .into_iter()
        .map(|d| DiskSpace {
            allocated: allocated.get(&file_name(d.segment)).copied(),
            name: d.name,
            size: d.virtual_size,
        })
        .collect();
    let space = files.space()?;
    Ok(Df {
        path: path.to_owned(),
        total: space.total,
        free: space.free,
        used: allocated.values().sum(),
        virtual_size: disks.iter().map(|d| d.size).sum(),
        disks,
    })
}
