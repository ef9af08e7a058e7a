//! The catalogue: which disks there are, and on which segments they stand.
//!
//! Invariants:
//! - It is derived data: everything in it can be read off the segments again (`store rebuild`),
//!   but for when disks are to be flattened.
//! - A change is one transaction; when [`Catalogue::apply`] returns it is durable. What is
//!   foreseen alone is in memory only, and is there for who asks.
//! - Readers work on a copy in memory and never touch the file again.

mod policy;
mod rows;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use format::units::index;
use format::{Error, Kind, Result};
use parking_lot::Mutex;
use redb::backends::InMemoryBackend;
use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::store::{Access, File, Store};

pub use policy::{FlattenPolicy, Flattening};
pub use rows::{Child, DiskRow, ForkRow, Forked, FrozenRow, Heir, InheritRow};

/// Name of the catalogue's file.
pub const FILE: &str = "catalogue.redb";
/// Name of a catalogue that is being rebuilt.
const NEW_FILE: &str = "catalogue.new";
const DISKS: Table = TableDefinition::new("disks");
const FROZEN: Table = TableDefinition::new("frozen");
const FORKS: Table = TableDefinition::new("forks");
const INHERITS: Table = TableDefinition::new("inherits");
const SETTINGS: Table = TableDefinition::new("settings");
/// Name of a setting: when disks that say nothing are flattened.
const POLICY: &str = "flatten-policy";

type Table = TableDefinition<'static, &'static str, &'static [u8]>;

/// One change of the catalogue.
#[derive(Debug, Clone)]
pub enum Change {
    /// Adds or replaces the row of this name.
    Put(DiskRow),
    /// Removes the row of this name.
    Remove(String),
    /// Adds a frozen segment.
    PutFrozen(FrozenRow),
    /// Removes a frozen segment.
    RemoveFrozen(Uuid),
    /// Adds a fork under way.
    PutFork(ForkRow),
    /// Removes a fork that is at its end.
    RemoveFork(Uuid),
    /// Adds children that are to appear.
    PutInherit(InheritRow),
    /// Removes children that have appeared.
    RemoveInherit(Uuid),
    /// Sets when disks that say nothing are flattened.
    PutPolicy(FlattenPolicy),
}

/// Everything in the catalogue.
#[derive(Debug, Default)]
struct Content {
    disks: BTreeMap<String, DiskRow>,
    frozen: BTreeMap<Uuid, FrozenRow>,
    forks: BTreeMap<Uuid, ForkRow>,
    inherits: BTreeMap<Uuid, InheritRow>,
    policy: Option<FlattenPolicy>,
}

/// The catalogue of one store.
pub struct Catalogue {
    database: Option<Database>,
    content: Mutex<Content>,
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
        Kind::NoMemory => std::io::ErrorKind::OutOfMemory,
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

    /// Replaces the catalogue by one with this content: whole, or not at all.
    ///
    /// # Errors
    /// What the host reports; the old catalogue is then still in place.
    pub fn replace(store: &dyn Store, content: &[Change]) -> Result<Self> {
        if store.names()?.iter().any(|n| n == NEW_FILE) {
            store.remove(NEW_FILE)?;
        }
        let catalogue = Self::write_new(store, NEW_FILE, content)?;
        // The content is durable (the transaction synced it) before the name points at it.
        store.rename(NEW_FILE, FILE)?;
        store.sync_names()?;
        Ok(catalogue)
    }

    fn write_new(store: &dyn Store, name: &str, content: &[Change]) -> Result<Self> {
        let file = store.create(name)?;
        let catalogue = Self::load(Backend(file))?;
        catalogue.apply(content)?;
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
            let content = read_content(&database)?;
            Ok(Catalogue { database: Some(database), content: Mutex::new(content) })
        })
    }

    /// All rows, by name.
    #[must_use]
    pub fn rows(&self) -> Vec<DiskRow> {
        self.content.lock().disks.values().cloned().collect()
    }

    /// All frozen segments.
    #[must_use]
    pub fn frozen(&self) -> Vec<FrozenRow> {
        self.content.lock().frozen.values().cloned().collect()
    }

    /// The forks that are under way.
    #[must_use]
    pub fn forks(&self) -> Vec<ForkRow> {
        self.content.lock().forks.values().cloned().collect()
    }

    /// The children that are to appear.
    #[must_use]
    pub fn inherits(&self) -> Vec<InheritRow> {
        self.content.lock().inherits.values().cloned().collect()
    }

    /// When disks that say nothing are flattened.
    #[must_use]
    pub fn policy(&self) -> FlattenPolicy {
        self.content.lock().policy.unwrap_or(FlattenPolicy::DEFAULT)
    }

    /// The row of a disk.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<DiskRow> {
        self.content.lock().disks.get(name).cloned()
    }

    /// Knows of a fork that nothing was made durable of yet.
    pub fn foresee(&self, fork: &ForkRow) {
        self.content.lock().apply(&Change::PutFork(fork.clone()));
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
        let mut content = self.content.lock();
        changes.iter().for_each(|change| content.apply(change));
        Ok(())
    }
}

impl Content {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Put(row) => _ = self.disks.insert(row.name.clone(), row.clone()),
            Change::Remove(name) => _ = self.disks.remove(name),
            Change::PutFrozen(row) => _ = self.frozen.insert(row.segment, row.clone()),
            Change::RemoveFrozen(segment) => _ = self.frozen.remove(segment),
            Change::PutFork(row) => _ = self.forks.insert(row.fork, row.clone()),
            Change::RemoveFork(fork) => _ = self.forks.remove(fork),
            Change::PutInherit(row) => _ = self.inherits.insert(row.inherit, row.clone()),
            Change::RemoveInherit(inherit) => _ = self.inherits.remove(inherit),
            Change::PutPolicy(policy) => self.policy = Some(*policy),
        }
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

fn read_content(database: &Database) -> Result<Content> {
    let mut content = Content::default();
    each_row(database, DISKS, &mut |key, row: DiskRow| {
        let named = row.name == key;
        content.disks.insert(row.name.clone(), row);
        named
    })?;
    each_row(database, FROZEN, &mut |key, row: FrozenRow| {
        let named = row.segment.to_string() == key;
        content.frozen.insert(row.segment, row);
        named
    })?;
    each_row(database, FORKS, &mut |key, row: ForkRow| {
        let named = row.fork.to_string() == key;
        content.forks.insert(row.fork, row);
        named
    })?;
    each_row(database, INHERITS, &mut |key, row: InheritRow| {
        let named = row.inherit.to_string() == key;
        content.inherits.insert(row.inherit, row);
        named
    })?;
    each_row(database, SETTINGS, &mut |key, policy: FlattenPolicy| {
        content.policy = Some(policy);
        key == POLICY
    })?;
    Ok(content)
}

/// Gives `take` every row of a table with its key; it tells whether the two belong together.
fn each_row<R: DeserializeOwned>(
    database: &Database,
    table: Table,
    take: &mut dyn FnMut(&str, R) -> bool,
) -> Result<()> {
    let read = database.begin_read().map_err(from_redb)?;
    let table = match read.open_table(table) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(()),
        Err(e) => return Err(from_redb(e)),
    };
    for entry in table.iter().map_err(from_redb)? {
        let (key, value) = entry.map_err(from_redb)?;
        let row: R = serde_json::from_slice(value.value()).map_err(damaged)?;
        if !take(key.value(), row) {
            return Err(damaged(format!("the row {} is for something else", key.value())));
        }
    }
    Ok(())
}

/// The table of a change, the key of its row, and the row if it is not removed.
fn row_of(change: &Change) -> Result<(Table, String, Option<Vec<u8>>)> {
    fn bytes(row: &impl Serialize) -> Result<Option<Vec<u8>>> {
        serde_json::to_vec(row).map(Some).map_err(damaged)
    }
    Ok(match change {
        Change::Put(row) => (DISKS, row.name.clone(), bytes(row)?),
        Change::Remove(name) => (DISKS, name.clone(), None),
        Change::PutFrozen(row) => (FROZEN, row.segment.to_string(), bytes(row)?),
        Change::RemoveFrozen(segment) => (FROZEN, segment.to_string(), None),
        Change::PutFork(row) => (FORKS, row.fork.to_string(), bytes(row)?),
        Change::RemoveFork(fork) => (FORKS, fork.to_string(), None),
        Change::PutInherit(row) => (INHERITS, row.inherit.to_string(), bytes(row)?),
        Change::RemoveInherit(inherit) => (INHERITS, inherit.to_string(), None),
        Change::PutPolicy(policy) => (SETTINGS, POLICY.into(), bytes(policy)?),
    })
}

fn write_rows(database: &Database, changes: &[Change]) -> Result<()> {
    let write = database.begin_write().map_err(from_redb)?;
    for change in changes {
        let (table, key, row) = row_of(change)?;
        let mut table = write.open_table(table).map_err(from_redb)?;
        match row {
            Some(row) => _ = table.insert(key.as_str(), row.as_slice()).map_err(from_redb)?,
            None => _ = table.remove(key.as_str()).map_err(from_redb)?,
        }
    }
    write.commit().map_err(from_redb)
}

#[cfg(test)]
mod tests {
    use format::superblock::Mode;

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
            mode: Mode::Persistent,
            base: None,
            relabel: false,
            changing: false,
            flattening: None,
            policy: None,
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
        let fresh = Catalogue::replace(&store, &[Change::Put(row("c"))]).unwrap();
        assert_eq!(fresh.rows(), vec![row("c")]);
    }
}
