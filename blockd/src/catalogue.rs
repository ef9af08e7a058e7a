//! The catalogue: which disks there are, and on which segments they stand.
//!
//! Invariants:
//! - It is derived data: everything in it can be read off the segments again (`store rebuild`).
//! - A change is one transaction; when [`Catalogue::apply`] returns it is durable.
//! - Readers work on a copy in memory and never touch the file again.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use format::units::index;
use format::{Error, Kind, Result};
use parking_lot::Mutex;
use redb::backends::InMemoryBackend;
use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::store::{Access, File, Store};

/// Name of the catalogue's file.
pub const FILE: &str = "catalogue.redb";
/// Name of a catalogue that is being rebuilt.
const NEW_FILE: &str = "catalogue.new";
const DISKS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("disks");

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRow {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub disk: Uuid,
    /// Its own segment.
    pub segment: Uuid,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// True when it is immutable.
    pub sealed: bool,
    /// The disk it was created over, if any.
    pub parent_disk: Option<Uuid>,
    /// Segments of others that its map may point into.
    pub parents: Vec<Uuid>,
    /// Seconds since 1970 at creation.
    pub created: u64,
    /// The label in the segment is behind: a rename is not finished.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub relabel: bool,
    /// A change of the segment is under way that this row tells of: after a crash the row may be
    /// behind.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub changing: bool,
}

/// One change of the catalogue.
#[derive(Debug, Clone)]
pub enum Change {
    /// Adds or replaces the row of this name.
    Put(DiskRow),
    /// Removes the row of this name.
    Remove(String),
}

/// The catalogue of one store.
pub struct Catalogue {
    database: Option<Database>,
    rows: Mutex<BTreeMap<String, DiskRow>>,
}

struct Backend(Arc<dyn File>);

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("catalogue file")
    }
}

fn to_io(e: Error) -> std::io::Error {
    let kind = match e.kind() {
        Kind::NoSpace => std::io::ErrorKind::StorageFull,
        Kind::ReadOnly => std::io::ErrorKind::ReadOnlyFilesystem,
        _ => std::io::ErrorKind::Other,
    };
    std::io::Error::new(kind, e)
}

impl StorageBackend for Backend {
    fn len(&self) -> std::io::Result<u64> {
        self.0.size().map_err(to_io)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset, out).map_err(to_io)
    }
    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.0.set_len(len).map_err(to_io)
    }
    fn sync_data(&self) -> std::io::Result<()> {
        self.0.sync().map_err(to_io)
    }
    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.0.write_at(offset, data).map_err(to_io)
    }
}

fn damaged(why: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("the catalogue cannot be used: {why}"))
        .hint("disks are not affected; run `offshoot store rebuild`")
}

fn from_redb(e: impl Into<redb::Error>) -> Error {
    match e.into() {
        redb::Error::Io(e) => match e.downcast::<Error>() {
            Ok(own) => own,
            // What redb itself finds wrong with the content comes this way, too.
            Err(e) if e.kind() == std::io::ErrorKind::InvalidData => damaged(e),
            Err(e) => e.into(),
        },
        e => damaged(e),
    }
    .on("the catalogue")
}

/// Runs a database call; a panic in it is a damaged file, not the end of the process.
fn guarded<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| Err(damaged("its content is damaged")))
}

impl Catalogue {
    /// Makes an empty catalogue.
    ///
    /// # Errors
    /// `Exists`, or what the host reports.
    pub fn create(store: &dyn Store) -> Result<Self> {
        Self::write_new(store, FILE, &[])
    }

    /// Replaces the catalogue by one with these rows: whole, or not at all.
    ///
    /// # Errors
    /// What the host reports; the old catalogue is then still in place.
    pub fn replace(store: &dyn Store, rows: &[DiskRow]) -> Result<Self> {
        if store.names()?.iter().any(|n| n == NEW_FILE) {
            store.remove(NEW_FILE)?;
        }
        let catalogue = Self::write_new(store, NEW_FILE, rows)?;
        // The content is durable (the transaction synced it) before the name points at it.
        store.rename(NEW_FILE, FILE)?;
        store.sync_names()?;
        Ok(catalogue)
    }

    fn write_new(store: &dyn Store, name: &str, rows: &[DiskRow]) -> Result<Self> {
        let file = store.create(name)?;
        let catalogue = Self::load(Backend(file))?;
        let changes: Vec<_> = rows.iter().cloned().map(Change::Put).collect();
        catalogue.apply(&changes)?;
        Ok(catalogue)
    }

    /// Opens the catalogue for reading and writing.
    ///
    /// # Errors
    /// `Corrupt` when it cannot be used, or what the host reports.
    pub fn open(store: &dyn Store) -> Result<Self> {
        let file = store.open(FILE, Access::Write).map_err(missing)?;
        if file.size()? == 0 {
            return Err(damaged("its file is empty"));
        }
        Self::load(Backend(file))
    }

    /// Reads the catalogue into memory; nothing is written, even after a crash.
    ///
    /// # Errors
    /// As [`Catalogue::open`].
    pub fn open_read_only(store: &dyn Store) -> Result<Self> {
        let file = store.open(FILE, Access::Read).map_err(missing)?;
        let mut content = vec![0; index(file.size()?)];
        if content.is_empty() {
            return Err(damaged("its file is empty"));
        }
        file.read_at(0, &mut content)?;
        let memory = InMemoryBackend::new();
        let copied = memory.set_len(content.len() as u64);
        copied.and_then(|()| memory.write(0, &content))?;
        let mut catalogue = Self::load(memory)?;
        let database = catalogue.database.take();
        guarded(|| {
            drop(database);
            Ok(())
        })?;
        Ok(catalogue)
    }

    fn load(backend: impl StorageBackend) -> Result<Self> {
        guarded(|| {
            let database = Database::builder().create_with_backend(backend).map_err(from_redb)?;
            let rows = read_rows(&database)?;
            Ok(Catalogue { database: Some(database), rows: Mutex::new(rows) })
        })
    }

    /// All rows, by name.
    #[must_use]
    pub fn rows(&self) -> Vec<DiskRow> {
        self.rows.lock().values().cloned().collect()
    }

    /// The row of a disk.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<DiskRow> {
        self.rows.lock().get(name).cloned()
    }

    /// Applies changes in one durable transaction. Without a database (a catalogue that was opened
    /// for reading only) they change the copy in memory alone.
    ///
    /// # Errors
    /// `NoSpace`, or what the host reports; nothing is changed then.
    pub fn apply(&self, changes: &[Change]) -> Result<()> {
        if let Some(database) = &self.database {
            guarded(|| write_rows(database, changes))?;
        }
        let mut rows = self.rows.lock();
        for change in changes {
            match change {
                Change::Put(row) => rows.insert(row.name.clone(), row.clone()),
                Change::Remove(name) => rows.remove(name),
            };
        }
        Ok(())
    }
}

impl Drop for Catalogue {
    fn drop(&mut self) {
        // The library looks at the file's content when it closes, too. Nothing is lost by a
        // failure: every change was durable when it was made.
        let database = self.database.take();
        let _ = guarded(|| {
            drop(database);
            Ok(())
        });
    }
}

fn missing(e: Error) -> Error {
    if e.kind() == Kind::NotFound { damaged("its file is missing") } else { e }
}

fn read_rows(database: &Database) -> Result<BTreeMap<String, DiskRow>> {
    let read = database.begin_read().map_err(from_redb)?;
    let table = match read.open_table(DISKS) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(BTreeMap::new()),
        Err(e) => return Err(from_redb(e)),
    };
    let mut rows = BTreeMap::new();
    for entry in table.iter().map_err(from_redb)? {
        let (name, value) = entry.map_err(from_redb)?;
        let row: DiskRow = serde_json::from_slice(value.value()).map_err(damaged)?;
        if row.name != name.value() {
            return Err(damaged(format!("the row {} is for another disk", name.value())));
        }
        rows.insert(row.name.clone(), row);
    }
    Ok(rows)
}

fn write_rows(database: &Database, changes: &[Change]) -> Result<()> {
    let write = database.begin_write().map_err(from_redb)?;
    {
        let mut table = write.open_table(DISKS).map_err(from_redb)?;
        for change in changes {
            match change {
                Change::Put(row) => {
                    let value = serde_json::to_vec(row).map_err(damaged)?;
                    table.insert(row.name.as_str(), value.as_slice()).map_err(from_redb)?;
                }
                Change::Remove(name) => {
                    table.remove(name.as_str()).map_err(from_redb)?;
                }
            }
        }
    }
    write.commit().map_err(from_redb)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sim::SimStore;

    fn row(name: &str) -> DiskRow {
        DiskRow {
            name: name.into(),
            disk: Uuid::from_u128(1),
            segment: Uuid::from_u128(2),
            virtual_size: 1 << 20,
            sealed: false,
            parent_disk: None,
            parents: vec![],
            created: 0,
            relabel: false,
            changing: false,
        }
    }

    #[test]
    fn changes_survive_and_readers_write_nothing() {
        let store = SimStore::new();
        let catalogue = Catalogue::create(&store).unwrap();
        catalogue.apply(&[Change::Put(row("a")), Change::Put(row("b"))]).unwrap();
        catalogue.apply(&[Change::Remove("a".into())]).unwrap();
        drop(catalogue);
        let ops = store.log_len();

        let reader = Catalogue::open_read_only(&store).unwrap();

        assert_eq!(reader.rows(), vec![row("b")]);
        assert_eq!(store.log_len(), ops);
        assert_eq!(Catalogue::open(&store).unwrap().get("b"), Some(row("b")));
    }

    #[test]
    fn a_damaged_or_missing_file_names_the_way_out() {
        let store = SimStore::new();
        let err = Catalogue::open(&store).err().unwrap();
        assert!(err.to_string().contains("store rebuild"), "{err}");
        drop(Catalogue::create(&store).unwrap());
        let file = store.open(FILE, Access::Write).unwrap();
        file.write_at(0, &[0xff; 8192]).unwrap();

        let err = Catalogue::open(&store).err().unwrap();

        assert!(err.to_string().contains("store rebuild"), "{err}");
        let fresh = Catalogue::replace(&store, &[row("c")]).unwrap();
        assert_eq!(fresh.rows(), vec![row("c")]);
    }
}
