//! Rebuilding the catalogue from the segments themselves.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use format::Result;
use parking_lot::Mutex;
use serde::Serialize;
use uuid::Uuid;

use super::{LOCK_FILE, OpenOptions, StoreDir, read_identity};
use crate::catalogue::{Catalogue, Change, DiskRow, FrozenRow};
use crate::segment::{self, new_name};
use crate::store::file::{FileStore, FileStoreOptions, LockKind};
use crate::store::{Access, Store};

/// What a rebuild found.
#[derive(Debug, Clone, Serialize)]
pub struct Rebuilt {
    /// Disks in the new catalogue.
    pub disks: Vec<DiskRow>,
    /// Disks that got a new name because two segments claimed theirs: old name, new name.
    pub renamed: Vec<(String, String)>,
    /// Segments that could not be read, and why.
    pub unreadable: Vec<(Uuid, String)>,
    /// Segments that disks stand on and that are not in the store.
    pub missing: Vec<Uuid>,
}

impl StoreDir {
    /// Makes a new catalogue from the segments in the folder; the old one need not be readable.
    ///
    /// # Errors
    /// `NotFound` when the folder is no store, `Busy`, or what the host reports.
    pub fn rebuild(dir: &Path, options: &OpenOptions) -> Result<Rebuilt> {
        let store = FileStore::open(dir, FileStoreOptions { cache: options.cache })?;
        read_identity(&store, &dir.display().to_string())?;
        let _lock = store.lock(LOCK_FILE, LockKind::Exclusive)?;
        Self::rebuild_in(Arc::new(store), options)
    }

    /// As [`StoreDir::rebuild`], in any store of files.
    ///
    /// # Errors
    /// As [`StoreDir::rebuild`].
    pub fn rebuild_in(store: Arc<dyn Store>, options: &OpenOptions) -> Result<Rebuilt> {
        let identity = read_identity(store.as_ref(), &store.describe())?;
        let dir = StoreDir {
            catalogue: Catalogue::replace(store.as_ref(), &[])?,
            store: Arc::clone(&store),
            identity,
            sealed: Mutex::default(),
            summed: Mutex::default(),
            writable: true,
            boot: options.boot,
            notes: Vec::new(),
            _lock: None,
        };
        let mut found = Rebuilt {
            disks: Vec::new(),
            renamed: Vec::new(),
            unreadable: Vec::new(),
            missing: Vec::new(),
        };
        let mut rows: BTreeMap<String, DiskRow> = BTreeMap::new();
        let frozen = dir.frozen_segments()?;
        for id in segment_ids(store.as_ref())? {
            match dir.row_of(id) {
                Ok(_) if frozen.iter().any(|row| row.segment == id) => {}
                Ok(row) => dir.place(row, &mut rows, &mut found)?,
                Err(e) => found.unreadable.push((id, e.to_string())),
            }
        }
        let present: HashSet<Uuid> = segment_ids(store.as_ref())?.into_iter().collect();
        let mut missing: Vec<Uuid> =
            rows.values().flat_map(|r| r.parents.iter().copied().chain(r.base)).collect();
        missing.retain(|s| !present.contains(s));
        missing.sort_unstable();
        missing.dedup();
        found.missing = missing;
        found.disks = rows.into_values().collect();
        let rows = found.disks.iter().cloned().map(Change::Put);
        let content: Vec<_> = rows.chain(frozen.into_iter().map(Change::PutFrozen)).collect();
        Catalogue::replace(store.as_ref(), &content)?;
        Ok(found)
    }

    /// The frozen segments in the folder. A successor that a crash kept from its final name gets
    /// it: what was deleted has no file at all.
    fn frozen_segments(&self) -> Result<Vec<FrozenRow>> {
        let mut frozen = Vec::new();
        for id in segment_ids(self.store.as_ref())? {
            let file = self.segment_file(id, Access::Read)?;
            let Ok(chosen) = segment::read_superblock(file.as_ref()) else { continue };
            let sb = chosen.superblock;
            if sb.successor.is_nil() {
                continue;
            }
            if self.store.names()?.contains(&new_name(sb.successor)) {
                self.complete(&sb, sb.successor, None)?;
            }
            // Marked: a crash may have come while its sums were made.
            frozen.push(FrozenRow { segment: id, disk: sb.disk, summing: true });
        }
        self.store.sync_names()?;
        Ok(frozen)
    }

    fn place(
        &self,
        mut row: DiskRow,
        rows: &mut BTreeMap<String, DiskRow>,
        found: &mut Rebuilt,
    ) -> Result<()> {
        let short = row.segment.simple().to_string()[..8].to_owned();
        if row.name.is_empty() || rows.contains_key(&row.name) {
            let old = std::mem::take(&mut row.name);
            let stem: String = old.chars().take(format::limits::NAME_MAX - 9).collect();
            row.name =
                if stem.is_empty() { format!("disk-{short}") } else { format!("{stem}-{short}") };
            self.relabel(&row)?;
            found.renamed.push((old, row.name.clone()));
        }
        rows.insert(row.name.clone(), row);
        Ok(())
    }
}

pub(super) fn segment_ids(store: &dyn Store) -> Result<Vec<Uuid>> {
    let names = store.names()?;
    let ids = names.iter().filter_map(|n| n.strip_suffix(".seg")?.parse().ok());
    Ok(ids.collect())
}
