//! A store: a folder with an identity, a lock, a catalogue and segments, and what can be done with
//! the disks in it.
//!
//! Invariants:
//! - The segments are the truth, the catalogue is derived. A disk exists from the moment its
//!   segment has its final name, and is gone from the moment that name is gone; the catalogue
//!   follows, and catches up at the next opening if a crash came between.
//! - One process has a store for writing, or any number for reading (a lock of the open file, which
//!   ends with the process).
//! - Nothing in a segment names a path; identities are resolved here.
//!
//! Crash arguments: `docs/format.md` §9; test: `crash_points` (operations create, import, rename,
//! delete).

mod confirm;
mod cut;
mod flatten;
mod fork;
mod import;
mod inherit;
mod modes;
mod rebuild;
mod verbs;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use format::superblock::State;
use format::{Context, Error, Kind, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::catalogue::{Catalogue, Change, DiskRow, FrozenRow};
use crate::disk::Options;
use crate::segment::{self, Sealed, Segments, file_name};
use crate::store::file::{CacheMode, FileStore, FileStoreOptions, LockGuard, LockKind};
use crate::store::{Access, File, Store};

pub use cut::Crossing;
pub(crate) use cut::not_all_frozen;
pub use flatten::{DEPTH_MAX, Going, TO_BASE, TO_NOTHING};
pub use fork::ForkOf;
pub use import::Import;
pub(crate) use import::begins_write_behind;
pub use inherit::{BaseRule, Bequest, InheritOptions, Inherited};
pub use modes::Keep;
pub use rebuild::Rebuilt;
pub use verbs::NewDisk;

/// Name of the file that makes a folder a store; its content is an [`Identity`].
pub const IDENTITY_FILE: &str = "offshoot.json";
const IDENTITY_NEW: &str = "offshoot.json.new";
const LOCK_FILE: &str = "lock";
/// Version of the folder's layout.
const LAYOUT_VERSION: u32 = 1;

/// What makes a folder a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version of the folder's layout.
    pub version: u32,
    /// Identity of the store.
    pub store: Uuid,
    /// Folder on tmpfs where tails of live disks are kept.
    pub tail_dir: PathBuf,
}

/// How to open a store.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// For reading only, or for writing.
    pub access: Access,
    /// Use of the host's page cache.
    pub cache: CacheMode,
    /// Boot of the host; [`boot_id`] tells.
    pub boot: Uuid,
}

/// A store, open.
pub struct StoreDir {
    store: Arc<dyn Store>,
    identity: Identity,
    catalogue: Catalogue,
    sealed: Mutex<HashMap<Uuid, Arc<Sealed>>>,
    /// Frozen segments that are known to have their sums: they are not looked at again for that.
    summed: Mutex<HashSet<Uuid>>,
    writable: bool,
    boot: Uuid,
    /// What was mended at opening, for the operator.
    pub notes: Vec<String>,
    _lock: Option<LockGuard>,
}

/// The kernel's identity of this boot.
#[must_use]
pub fn boot_id() -> Uuid {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().parse().unwrap_or(Uuid::nil())
}

fn not_a_store(dir: &str) -> Error {
    Error::new(Kind::NotFound, "it is not a store")
        .tried("open")
        .on(format!("store {dir}"))
        .hint(format!("make one: `offshoot --store {dir} init`"))
}

impl StoreDir {
    /// Makes a store in a folder, which is created if needed and must be empty.
    ///
    /// # Errors
    /// `Exists` when the folder is a store already or is not empty, or what the host reports.
    pub fn init(dir: &Path, tail_dir: Option<PathBuf>) -> Result<Identity> {
        let object = || format!("store {}", dir.display());
        std::fs::create_dir_all(dir).context("create", object)?;
        let options = FileStoreOptions { cache: CacheMode::Buffered };
        let store = FileStore::open(dir, options)?;
        Self::init_in(&store, tail_dir).context("create", object)
    }

    /// As [`StoreDir::init`], in any empty store of files.
    ///
    /// # Errors
    /// As [`StoreDir::init`].
    pub fn init_in(store: &dyn Store, tail_dir: Option<PathBuf>) -> Result<Identity> {
        let names = store.names()?;
        if names.iter().any(|n| n == IDENTITY_FILE) {
            return Err(Error::new(Kind::Exists, "it is a store already"));
        }
        // What an init that was killed left behind is its own, and may go.
        let own = [IDENTITY_NEW, LOCK_FILE, crate::catalogue::FILE];
        if let Some(other) = names.iter().find(|n| !own.contains(&n.as_str())) {
            return Err(Error::new(Kind::Exists, format!("the folder is not empty ({other})"))
                .hint("choose an empty folder"));
        }
        names.iter().try_for_each(|n| store.remove(n))?;
        let id = Uuid::new_v4();
        let tail_dir = tail_dir.unwrap_or_else(|| format!("/dev/shm/offshoot-{id}").into());
        check_tail_dir(&tail_dir)?;
        let identity = Identity { version: LAYOUT_VERSION, store: id, tail_dir };
        store.create(LOCK_FILE)?;
        drop(Catalogue::create(store)?);
        let text = serde_json::to_vec_pretty(&identity).expect("an identity is plain JSON");
        let file = store.create(IDENTITY_NEW)?;
        file.write_at(0, &text)?;
        file.set_len(text.len() as u64)?;
        file.sync()?;
        // Last: the folder is a store once everything else in it is durable.
        store.sync_names()?;
        store.rename(IDENTITY_NEW, IDENTITY_FILE)?;
        store.sync_names()?;
        Ok(identity)
    }

    /// Opens a store.
    ///
    /// # Errors `NotFound` when the folder is no store, `Busy` when another process has it,
    /// `Corrupt` when the catalogue cannot be used, or what the host reports.
    pub fn open(dir: &Path, options: &OpenOptions) -> Result<Self> {
        let shown = dir.display().to_string();
        let file_options = FileStoreOptions { cache: options.cache };
        let store = FileStore::open(dir, file_options).map_err(|e| match e.kind() {
            Kind::NotFound => not_a_store(&shown),
            _ => e,
        })?;
        let identity = read_identity(&store, &shown)?;
        let kind = match options.access {
            Access::Read => LockKind::Shared,
            Access::Write => LockKind::Exclusive,
        };
        let lock = store.lock(LOCK_FILE, kind)?;
        Self::assemble(Arc::new(store), identity, options, Some(lock))
    }

    /// Opens a store in any store of files. There is no lock: the caller is alone.
    ///
    /// # Errors
    /// As [`StoreDir::open`].
    pub fn open_in(store: Arc<dyn Store>, options: &OpenOptions) -> Result<Self> {
        let identity = read_identity(store.as_ref(), &store.describe())?;
        Self::assemble(store, identity, options, None)
    }

    fn assemble(
        store: Arc<dyn Store>,
        identity: Identity,
        options: &OpenOptions,
        lock: Option<LockGuard>,
    ) -> Result<Self> {
        let writable = options.access == Access::Write;
        let catalogue = if writable {
            Catalogue::open(store.as_ref())
        } else {
            Catalogue::open_read_only(store.as_ref())
        };
        let mut dir = StoreDir {
            catalogue: catalogue?,
            store,
            identity,
            sealed: Mutex::default(),
            summed: Mutex::default(),
            writable,
            boot: options.boot,
            notes: Vec::new(),
            _lock: lock,
        };
        dir.catch_up()?;
        Ok(dir)
    }

    /// The store's identity.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The files of the store.
    #[must_use]
    pub fn files(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// All disks, by name.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskRow> {
        self.catalogue.rows()
    }

    /// The row of a disk.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn disk(&self, name: &str) -> Result<DiskRow> {
        self.catalogue.get(name).ok_or_else(|| {
            Error::new(Kind::NotFound, "there is no disk of this name")
                .on(format!("disk {name}"))
                .hint("`offshoot disk ls` lists them")
        })
    }

    /// Names of the disks whose maps may point into a segment.
    #[must_use]
    pub fn dependents(&self, segment: Uuid) -> Vec<String> {
        let rows = self.catalogue.rows();
        rows.into_iter().filter(|r| r.parents.contains(&segment)).map(|r| r.name).collect()
    }

    /// Options to open a disk of this store with.
    #[must_use]
    pub fn disk_options(&self) -> Options {
        Options {
            tail_dir: Some(self.identity.tail_dir.clone()),
            boot: self.boot,
            ..Options::default()
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        let object = format!("store {}", self.store.describe());
        Err(Error::new(Kind::ReadOnly, "it is open for reading only").on(object))
    }

    /// Brings the catalogue in line with the segments after a crash: finishes deletions, drops
    /// segments that were never finished, takes in finished ones that it does not know, and reads
    /// off again the rows of those that were being changed.
    fn catch_up(&mut self) -> Result<()> {
        self.take_in_notes()?;
        if self.writable {
            let settled = self.settle_forks();
            self.notes.extend(settled);
            let settled = self.settle_inherits();
            self.notes.extend(settled);
        }
        let (rows, frozen, unsettled) =
            (self.catalogue.rows(), self.catalogue.frozen(), self.unsettled());
        let known: HashSet<Uuid> =
            rows.iter().map(|r| r.segment).chain(frozen.iter().map(|r| r.segment)).collect();
        for row in rows.iter().filter(|r| r.relabel && self.writable) {
            self.finish_rename(row.clone())?;
            self.notes.push(format!("finished renaming disk {}", row.name));
        }
        for row in rows.iter().filter(|r| r.changing) {
            // The mark stays where the segment cannot be read, for the next opening to try again.
            if let Err(e) = self.reread(row) {
                self.notes.push(format!("disk {} may be listed as it was before: {e}", row.name));
            }
        }
        for name in self.store.names()? {
            let Some((id, suffix)) = name.split_once('.') else { continue };
            let Ok(id) = id.parse::<Uuid>() else { continue };
            if unsettled.contains(&id) {
                continue;
            }
            match suffix {
                "new" if self.writable => {
                    self.store.remove(&name)?;
                    self.notes.push(format!("removed segment {id}, which was never finished"));
                }
                "del" => {
                    match rows.iter().find(|r| r.segment == id) {
                        Some(row) if self.writable => self.forget_deleted(&row.name, id)?,
                        Some(row) => self.catalogue.apply(&[Change::Remove(row.name.clone())])?,
                        None if self.writable => {
                            if frozen.iter().any(|r| r.segment == id) {
                                self.catalogue.apply(&[Change::RemoveFrozen(id)])?;
                            }
                            self.store.remove(&name)?;
                        }
                        None => {}
                    }
                    if self.writable {
                        self.notes.push(format!("finished the deletion of segment {id}"));
                    }
                }
                "seg" if !known.contains(&id) => self.adopt(id)?,
                _ => {}
            }
        }
        for row in self.catalogue.frozen().iter().filter(|r| r.summing && self.writable) {
            // The mark stays where that fails, for the next opening to try again.
            if let Err(e) = self.settle_frozen(row) {
                self.notes.push(format!("segment {} could not be settled: {e}", row.segment));
            }
        }
        if self.writable
            && let Err(e) = self.drop_frozen()
        {
            self.notes.push(format!("segments that nobody needs any more are still there: {e}"));
        }
        Ok(())
    }

    /// Makes the row of a disk anew from its segment.
    fn reread(&self, row: &DiskRow) -> Result<DiskRow> {
        let row = row.with(self.row_of(row.segment)?);
        self.catalogue.apply(&[Change::Put(row.clone())])?;
        Ok(row)
    }

    /// Segments in the folder that the catalogue does not know.
    fn strangers(&self) -> Result<Vec<Uuid>> {
        let (rows, frozen) = (self.catalogue.rows(), self.catalogue.frozen());
        let rows = rows.iter().map(|r| r.segment);
        let known: HashSet<Uuid> = rows.chain(frozen.iter().map(|r| r.segment)).collect();
        let mut ids = rebuild::segment_ids(self.store.as_ref())?;
        ids.retain(|id| !known.contains(id));
        Ok(ids)
    }

    fn adopt(&mut self, id: Uuid) -> Result<()> {
        match self.row_of(id) {
            Ok(row) if self.is_frozen(id)? => {
                self.catalogue.apply(&[Change::PutFrozen(FrozenRow {
                    segment: id,
                    disk: row.disk,
                    summing: false,
                })])
            }
            Ok(row) if self.catalogue.get(&row.name).is_none() => {
                self.notes.push(format!("took in disk {}, which was just finished", row.name));
                self.catalogue.apply(&[Change::Put(row)])
            }
            Ok(row) => {
                let note = format!("segment {id} claims the name {}, which is taken", row.name);
                self.notes.push(format!("{note}; `offshoot store rebuild` renames it"));
                Ok(())
            }
            Err(e) if e.kind().is_of_host() => Err(e),
            Err(e) => {
                self.notes.push(format!("segment {id} is not in the catalogue: {e}"));
                Ok(())
            }
        }
    }

    /// Whether a fork has sealed the segment: it is no disk's own any more.
    pub(crate) fn is_frozen(&self, id: Uuid) -> Result<bool> {
        let file = self.store.open(&file_name(id), Access::Read)?;
        Ok(!segment::read_superblock(file.as_ref())?.superblock.successor.is_nil())
    }

    /// The row that a segment's own content makes.
    fn row_of(&self, id: Uuid) -> Result<DiskRow> {
        let file = self.store.open(&file_name(id), Access::Read)?;
        let sb = segment::read_superblock(file.as_ref())?.superblock;
        if sb.segment != id {
            return Err(Error::corrupt(format!("its file holds segment {}", sb.segment)));
        }
        let table = segment::read_table(file.as_ref(), &sb)?;
        let parents = table.iter().map(|(_, row)| row.segment).filter(|s| *s != id).collect();
        Ok(DiskRow {
            name: sb.name,
            disk: sb.disk,
            segment: id,
            virtual_size: sb.virtual_size,
            sealed: sb.state == State::Sealed,
            parent_disk: Some(sb.parent_disk).filter(|d| !d.is_nil()),
            parents,
            created: sb.created,
            mode: sb.mode,
            base: Some(sb.base).filter(|base| !base.is_nil()),
            relabel: false,
            changing: false,
            flattening: None,
            policy: None,
        })
    }

    /// Opens the file of a segment.
    ///
    /// # Errors
    /// `NotFound` when it is not in the store, or what the host reports.
    pub fn segment_file(&self, id: Uuid, access: Access) -> Result<Arc<dyn File>> {
        self.store.open(&file_name(id), access)
    }
}

/// A tail must vanish with the host's power: a record must never outlive its data.
fn check_tail_dir(dir: &Path) -> Result<()> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let exists = dir.ancestors().find(|d| d.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statfs(exists).map_err(std::io::Error::from)?;
    if stat.f_type == TMPFS_MAGIC {
        return Ok(());
    }
    Err(Error::invalid("it is not on tmpfs: tails would outlive a power cut")
        .on(format!("tail folder {}", dir.display()))
        .hint("choose a folder below /dev/shm"))
}

fn read_identity(store: &dyn Store, shown: &str) -> Result<Identity> {
    let file = store.open(IDENTITY_FILE, Access::Read).map_err(|e| match e.kind() {
        Kind::NotFound => not_a_store(shown),
        _ => e,
    })?;
    let mut text = vec![0; usize::try_from(file.size()?.min(64 << 10)).unwrap_or(0)];
    file.read_at(0, &mut text)?;
    let identity: Identity = serde_json::from_slice(&text).map_err(|e| {
        Error::corrupt("its identity file cannot be read").caused_by(e).on(format!("store {shown}"))
    })?;
    if identity.version != LAYOUT_VERSION {
        let reason = format!("store version {} is not known here", identity.version);
        return Err(Error::new(Kind::Unsupported, reason)
            .on(format!("store {shown}"))
            .hint("use a newer version of offshoot"));
    }
    Ok(identity)
}

impl Segments for StoreDir {
    fn sealed(&self, id: Uuid) -> Result<Arc<Sealed>> {
        if let Some(found) = self.sealed.lock().get(&id) {
            return Ok(Arc::clone(found));
        }
        let file = self.segment_file(id, Access::Read).map_err(|e| match e.kind() {
            Kind::NotFound => Error::new(Kind::ParentMissing, "it is not in the store")
                .on(format!("segment {id}"))
                .hint("bring its file back into the store folder"),
            _ => e,
        })?;
        let superblock = segment::read_superblock(file.as_ref())?.superblock;
        let sealed = Arc::new(Sealed { superblock, file });
        self.sealed.lock().insert(id, Arc::clone(&sealed));
        Ok(sealed)
    }
}
