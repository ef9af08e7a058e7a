//! The daemon's state: one store, and everybody who asks for something in it.
//!
//! Invariants:
//! - The daemon has the store's lock from its start to its end, and whoever uses a disk holds its
//!   name (`holds.rs`): within the daemon, names are what the lock is between processes.
//! - Nothing here runs on the data path. Functions may block; the server calls them on threads of
//!   their own.
//! - Disks in service (`served.rs`) are used by their front ends on threads of their own; a request
//!   that reads one besides goes through the same volume.
//! - What a client leaves half done ends with its connection (`sessions.rs`).
//!
//! Lock order: a session's content, the change of what is served, the table of what is served,
//! holds, jobs, events; only the first two are held over I/O.

mod attachments;
mod disks;
mod doors;
mod events;
mod holds;
mod jobs;
mod metrics;
pub mod sandbox;
mod served;
mod sessions;
mod state;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use format::{Context as _, Result};
use tokio::sync::watch;

use crate::api::types::{EventKind, ExportState, Health, Version};
use crate::store::Access;
use crate::store::file::CacheMode;
use crate::storedir::{OpenOptions, StoreDir, boot_id};

pub use disks::Noted;
pub use events::Events;
pub use holds::{Hold, Holds, PATIENCE};
pub use jobs::{Entry, Jobs, Running};
pub use served::Service;
pub use sessions::{Content, Sessions};
pub use state::{DaemonFile, FILE};

/// Version of the interface.
pub const API_VERSION: &str = "v1";

/// The daemon.
pub struct Daemon {
    dir: Arc<StoreDir>,
    path: PathBuf,
    started: u64,
    holds: Arc<Holds>,
    jobs: Jobs,
    events: Arc<Events>,
    sessions: Sessions,
    service: Service,
    sandbox: Vec<String>,
    stopping: watch::Sender<bool>,
}

impl Daemon {
    /// Takes a store. Another process that is about to let go of it is waited for.
    ///
    /// # Errors
    /// As [`StoreDir::open`].
    pub fn open(path: &Path, cache: CacheMode) -> Result<Self> {
        let options = OpenOptions { access: Access::Write, cache, boot: boot_id() };
        let start = Instant::now();
        let dir = loop {
            match StoreDir::open(path, &options) {
                Err(e) if e.kind() == format::Kind::Busy && start.elapsed() < PATIENCE => {
                    std::thread::sleep(PATIENCE / 50);
                }
                opened => break opened.context("open", || format!("store {}", path.display()))?,
            }
        };
        dir.notes.iter().for_each(|note| tracing::info!(%note, "the store was mended"));
        let events = Arc::new(Events::default());
        let daemon = Daemon {
            dir: Arc::new(dir),
            path: path.to_owned(),
            started: jobs::now(),
            holds: Arc::default(),
            jobs: Jobs::new(Arc::clone(&events)),
            events,
            sessions: Sessions::default(),
            service: Service::of(path),
            sandbox: Vec::new(),
            stopping: watch::Sender::new(false),
        };
        daemon.events.add(EventKind::Started, format!("store {}", path.display()), "");
        Ok(daemon)
    }

    /// The same, confined by what has these names.
    #[must_use]
    pub fn confined_by(self, sandbox: Vec<String>) -> Self {
        Daemon { sandbox, ..self }
    }

    /// Its jobs.
    #[must_use]
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// What happened.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The folder of its store.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who answers.
    #[must_use]
    pub fn version(&self) -> Version {
        Version { version: env!("CARGO_PKG_VERSION").into(), api: API_VERSION.into() }
    }

    /// How it is.
    #[must_use]
    pub fn health(&self) -> Health {
        let exports = self.exports();
        let failed = exports.iter().filter(|e| e.state == ExportState::Failed);
        let mut failed: Vec<String> = failed.map(|e| e.disk.clone()).collect();
        failed.dedup();
        let stats = self.stats();
        let held = stats.iter().filter(|d| d.stats.held.is_some());
        Health {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            path: self.path.clone(),
            store: self.dir.identity().store,
            started: self.started,
            jobs: self.jobs.running(),
            served: stats.len() as u64,
            connected: exports.iter().map(|e| e.connected).sum(),
            held: held.map(|d| d.disk.clone()).collect(),
            failed,
            sandbox: self.sandbox.clone(),
        }
    }

    /// Asks the daemon to end; [`Daemon::stopping`] tells those who have something to finish.
    pub fn stop(&self) {
        if !self.stopping.send_replace(true) {
            self.events.add(EventKind::Stopping, format!("store {}", self.path.display()), "");
            self.jobs.cancel_all();
        }
    }

    /// Tells when the daemon is going to end.
    #[must_use]
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }
}
