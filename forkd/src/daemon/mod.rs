//! The daemon: which machines there are, and what is to become of them.
//!
//! Machines live in processes of their own (`process/`), which go on without the daemon; disks are
//! blockd's. What this daemon knows stands in its folder (`state.rs`), so that one which starts
//! again knows the same.
//!
//! Invariants:
//! - Whatever takes several steps is written down before the first one, with what to remove if the
//!   last one is never reached (`undo.rs`). So a fork has all of its children or none, whoever is
//!   killed when, and nothing is left over that nobody knows of.
//! - A name is given once: it is reserved before work on a machine begins, until it is in the table
//!   or given up.
//! - Functions may block; the server calls them on threads of their own.
//!
//! Lock order: a machine's change, the table, a machine's state, the pool, what stands by, what is
//! to be undone, processes, events. None but the first is held over a question to somebody else.

mod blockd;
mod direct;
mod fork;
mod fork_disks;
mod life;
mod metrics;
mod net;
mod pool;
mod recover;
mod restore;
mod run;
mod snapshot;
mod standby;
mod state;
mod table;
mod undo;

use std::path::PathBuf;
use std::sync::Arc;

use format::Result;
use tokio::sync::watch;

use crate::api::types::{Event, EventKind, Health, VmState};
use ::blockd::api::types::Version;
use ::blockd::clock;
use ::blockd::daemon::{Events, Jobs};

pub use blockd::Blockd;
pub use state::StateDir;

use fork::Forks;
use pool::Pool;
use standby::Standby;
use table::Table;
use undo::Janitor;

/// Version of the interface.
pub const API_VERSION: &str = "v1";

/// What the daemon is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its folder.
    pub state: PathBuf,
    /// The socket of the daemon that has the disks.
    pub blockd: PathBuf,
    /// Shells that are to be ready of each kind.
    pub pool_size: usize,
    /// Whether children stand by for a machine that was forked.
    pub standby: bool,
    /// Whether VM processes confine themselves.
    pub sandbox: bool,
}

/// The daemon.
pub struct Daemon {
    state: StateDir,
    blockd: Blockd,
    table: Table,
    pool: Arc<Pool>,
    /// Whether there is to be a set in `standby`.
    stands_by: bool,
    standby: Standby,
    janitor: Janitor,
    events: Arc<Events<Event>>,
    forks: Forks,
    jobs: Jobs,
    started: u64,
    confined_by: Vec<String>,
    stopping: watch::Sender<bool>,
}

impl Daemon {
    /// Takes the folder, finds machines again, and begins to remove what was left unfinished.
    ///
    /// # Errors
    /// As [`StateDir::open`].
    pub fn open(options: &Options, confined_by: Vec<String>) -> Result<Arc<Daemon>> {
        let state = StateDir::open(&options.state)?;
        let events = Arc::new(Events::default());
        let daemon = Arc::new(Daemon {
            pool: Arc::new(Pool::new(
                state.vms(),
                options.pool_size,
                options.sandbox,
                Arc::clone(&events),
            )),
            stands_by: options.standby,
            standby: Standby::default(),
            blockd: Blockd::at(options.blockd.clone()),
            table: Table::default(),
            janitor: Janitor::open(&state)?,
            state,
            events,
            forks: Forks::default(),
            jobs: Jobs::default(),
            started: clock::now(),
            confined_by,
            stopping: watch::Sender::new(false),
        });
        daemon.events.add(EventKind::Started, format!("folder {}", options.state.display()), "");
        daemon.recover()?;
        daemon.start_janitor()?;
        daemon.pool.start()?;
        daemon.start_standby()?;
        Ok(daemon)
    }

    /// What happened.
    #[must_use]
    pub fn events(&self) -> &Arc<Events<Event>> {
        &self.events
    }

    /// Long work: snapshots that are taken or restored.
    #[must_use]
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Who answers.
    #[must_use]
    pub fn version(&self) -> Version {
        Version { version: env!("CARGO_PKG_VERSION").into(), api: API_VERSION.into() }
    }

    /// How it is.
    #[must_use]
    pub fn health(&self) -> Health {
        let machines = self.table.all();
        let living = machines.iter().filter(|m| m.state() != VmState::Ended);
        Health {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            path: self.state.path().to_owned(),
            blockd: self.blockd.socket().to_owned(),
            started: self.started,
            vms: living.count() as u64,
            pool: self.pool.classes(),
            pool_size: self.pool.size() as u64,
            standby: self.standby.parent(),
            unfinished: self.janitor.pending(),
            sandbox: self.confined_by.clone(),
        }
    }

    /// Asks the daemon to end. Machines go on.
    pub fn stop(&self) {
        if !self.stopping.send_replace(true) {
            let object = format!("folder {}", self.state.path().display());
            self.events.add(EventKind::Stopping, object, "");
        }
    }

    /// Tells when the daemon is going to end.
    #[must_use]
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Ends what does not outlive the daemon.
    pub fn end_service(&self) {
        self.jobs.suspend_all();
        self.end_standby();
        self.pool.close();
    }
}
