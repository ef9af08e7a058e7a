//! A store of a test's own, and what is left of it.

use std::fs;
use std::path::{Path, PathBuf};

use blockd::storedir::{IDENTITY_FILE, Identity, StoreDir};
use tempfile::TempDir;

use crate::daemon::Daemon;

/// Where a store keeps its tails; `None` when there is no store.
#[must_use]
pub fn tail_folder(store: &Path) -> Option<PathBuf> {
    let text = fs::read(store.join(IDENTITY_FILE)).ok()?;
    Some(serde_json::from_slice::<Identity>(&text).ok()?.tail_dir)
}

/// Takes away what a store has in memory that outlives processes. Nobody has it open any more.
pub fn forget_tails(store: &Path) {
    if let Some(folder) = tail_folder(store) {
        // A store whose disks were never in service has none.
        let _ = fs::remove_dir_all(folder);
    }
}

/// A store in a temporary folder. Both go when it is dropped, and so does what outlives processes.
pub struct TestStore {
    dir: TempDir,
    store: PathBuf,
}

impl TestStore {
    /// A new one.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = dir.path().join("store");
        Self::made(dir, store)
    }

    /// A new one in a folder of another file system.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn at(store: PathBuf) -> Self {
        Self::made(tempfile::tempdir().expect("a temporary folder"), store)
    }

    fn made(dir: TempDir, store: PathBuf) -> Self {
        StoreDir::init(&store, None).expect("a new store");
        TestStore { dir, store }
    }

    /// The folder of the store.
    #[must_use]
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// A path beside it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a daemon on it.
    ///
    /// # Panics
    /// When it does not get ready.
    #[must_use]
    pub fn daemon(&self) -> Daemon {
        Daemon::start(&self.store, &self.path("api"))
    }
}

impl Default for TestStore {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestStore {
    fn drop(&mut self) {
        forget_tails(&self.store);
    }
}
