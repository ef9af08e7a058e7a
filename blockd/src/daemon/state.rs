//! The file by which others find the daemon that has a store.
//!
//! Invariant: it is a hint, never a lock. It is written after the store's lock was taken and
//! removed before that is let go; after a kill it stays, and whoever reads it finds nobody at the
//! socket.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use format::{Context as _, Error, Result};
use serde::{Deserialize, Serialize};

/// Its name in the folder of the store.
pub const FILE: &str = "daemon.json";
const NEW_FILE: &str = "daemon.json.new";

/// Who has the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonFile {
    /// Its process.
    pub pid: u32,
    /// The socket of its interface, as an absolute path.
    pub api: PathBuf,
    /// Its version.
    pub version: String,
}

impl DaemonFile {
    /// What stands in the folder of a store; `None` when there is nothing, or nothing that makes
    /// sense: the lock of the store then decides what can be done.
    #[must_use]
    pub fn read(store: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(store.join(FILE)).ok()?).ok()
    }

    /// Puts it into the folder of a store.
    ///
    /// # Errors
    /// What the host reports.
    pub fn write(&self, store: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::from)?;
        let new = store.join(NEW_FILE);
        // Renamed, so that a reader never sees a half of it; not synced, because after a power cut
        // there is no daemon to find.
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, store.join(FILE)))
            .map_err(Error::from)
            .context("write", || store.join(FILE).display().to_string())
    }

    /// Takes it out of the folder of a store.
    pub fn remove(store: &Path) {
        // What stays is found to be out of date by whoever reads it.
        let _ = fs::remove_file(store.join(FILE));
    }
}
