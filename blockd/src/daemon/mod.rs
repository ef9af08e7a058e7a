//! The daemon's state: one store, and everybody who asks for something in it.
//!
//! Invariants:
//! - The daemon has the store's lock from its start to its end, and whoever uses a disk holds its
//!   name (`holds.rs`): within the daemon, names are what the lock is between processes.
//! - Nothing here runs on the data path. Functions may block; the server calls them on threads of
//!   their own.
//! - Disks in service (`served.rs`) are used by their front ends on threads of their own; a request
//!   that reads one besides goes through the same volume.
//! - The store is the daemon's except while a successor has it (`handover/`).
//! - What a client leaves half done ends with its connection (`sessions.rs`).
//!
//! Lock order: a session's content, the change of what is served, the table of what is served,
//! holds, jobs, events; only the first two are held over I/O.

mod again;
mod ahead;
mod attachments;
mod cut;
mod disks;
mod doors;
mod events;
mod flatten;
mod fork;
mod going;
mod handover;
mod holds;
mod inherit;
mod jobs;
mod metrics;
mod modes;
mod pace;
pub mod sandbox;
mod served;
mod sessions;
mod standing;
mod state;
mod tokens;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use format::{Context as _, Result};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use flatten::Underway;
use going::Outcomes;
use tokens::Tokens;

use crate::api::types::{Event, EventKind, ExportState, Health, Version};
use crate::clock;
use crate::store::Access;
use crate::store::file::CacheMode;
use crate::storedir::{Identity, OpenOptions, StoreDir, boot_id};

pub use disks::Noted;
pub use events::{Events, Happened};
pub use handover::{Inheritance, Predecessor};
pub use holds::{Hold, Holds, PATIENCE};
pub use jobs::{Entry, Jobs, Running};
pub use metrics::Page;
pub use served::Service;
pub use sessions::{Content, Sessions};
pub use state::{DaemonFile, FILE};

/// Version of the interface.
pub const API_VERSION: &str = "v1";

/// The daemon.
pub struct Daemon {
    /// None while a successor has the store.
    dir: RwLock<Option<Arc<StoreDir>>>,
    identity: Identity,
    cache: CacheMode,
    path: PathBuf,
    started: u64,
    holds: Arc<Holds>,
    jobs: Jobs,
    events: Arc<Events<Event>>,
    sessions: Sessions,
    service: Service,
    sandbox: Vec<String>,
    arguments: Vec<String>,
    /// The control interface's listening socket, for a successor.
    control: OnceLock<OwnedFd>,
    handed_over: AtomicBool,
    /// Held by the one who makes sums of frozen segments.
    summing: Mutex<()>,
    flattening: Underway,
    tokens: Tokens,
    outcomes: Outcomes,
    stopping: watch::Sender<bool>,
}

impl Daemon {
    /// Takes a store. Another process that is about to let go of it is waited for.
    ///
    /// # Errors
    /// As [`StoreDir::open`].
    pub fn open(path: &Path, cache: CacheMode) -> Result<Self> {
        let dir = Self::open_dir(path, cache)?;
        let events = Arc::new(Events::default());
        let holds: Arc<Holds> = Arc::default();
        let daemon = Daemon {
            identity: dir.identity().clone(),
            dir: RwLock::new(Some(Arc::new(dir))),
            cache,
            path: path.to_owned(),
            started: clock::now(),
            jobs: Jobs::new(Arc::clone(&events)),
            events,
            sessions: Sessions::default(),
            service: Service::of(path, holds.standing()),
            holds,
            sandbox: Vec::new(),
            arguments: Vec::new(),
            control: OnceLock::new(),
            handed_over: AtomicBool::new(false),
            summing: Mutex::default(),
            flattening: Underway::default(),
            tokens: Tokens::default(),
            outcomes: Outcomes::default(),
            stopping: watch::Sender::new(false),
        };
        daemon.events.add(EventKind::Started, format!("store {}", path.display()), "");
        Ok(daemon)
    }

    fn open_dir(path: &Path, cache: CacheMode) -> Result<StoreDir> {
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
        Ok(dir)
    }

    /// The same, started with these arguments and confined by what has these names.
    #[must_use]
    pub fn started_with(self, arguments: Vec<String>, sandbox: Vec<String>) -> Self {
        Daemon { arguments, sandbox, ..self }
    }

    /// Keeps the listening socket of the control interface for a successor.
    pub fn controlled_at(&self, listener: OwnedFd) {
        // There is one control interface: a second one would be a bug, and change nothing.
        let _ = self.control.set(listener);
    }

    /// True when a successor has what this daemon had.
    #[must_use]
    pub fn has_handed_over(&self) -> bool {
        self.handed_over.load(Ordering::Acquire) // pairs with the store in `hand_over_to`
    }

    /// Its jobs.
    #[must_use]
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// What happened.
    #[must_use]
    pub fn events(&self) -> &Arc<Events<Event>> {
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
            store: self.identity.store,
            started: self.started,
            jobs: self.jobs.running(),
            served: stats.len() as u64,
            connected: exports.iter().map(|e| e.connected).sum(),
            held: held.map(|d| d.disk.clone()).collect(),
            failed,
            sandbox: self.sandbox.clone(),
            arguments: self.arguments.clone(),
            cache: self.cache.name().into(),
        }
    }

    /// Asks the daemon to end; [`Daemon::stopping`] tells those who have something to finish.
    pub fn stop(&self) {
        if !self.stopping.send_replace(true) {
            self.events.add(EventKind::Stopping, format!("store {}", self.path.display()), "");
            self.jobs.suspend_all();
            self.release_all();
        }
    }

    /// Tells when the daemon is going to end.
    #[must_use]
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }
}
