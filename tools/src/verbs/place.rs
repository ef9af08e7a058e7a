//! Where the store is: in a folder, or with a daemon.
//!
//! The order in which a daemon is looked for: the socket that `--api` names; the one that the
//! daemon which has the store of `--store` left in its folder; without a store, the one that
//! `OFFSHOOT_API` names, then the usual place. A daemon that is gone leaves its file behind: nobody
//! answers there, and the folder is opened.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use blockd::api::types::Health;
use blockd::daemon::DaemonFile;
use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{OpenOptions, StoreDir, boot_id};
use format::{Context as _, Error, Kind, Result};

use super::Session;
use crate::client::Client;
use crate::signals;
use crate::store::{Local, Remote, Store};

/// How long a verb waits for another process to let go of the store.
const PATIENCE: Duration = Duration::from_secs(1);
/// Where a daemon listens unless it is told otherwise.
const USUAL_SOCKET: &str = "/run/offshoot/blockd.sock";
/// Use of the page cache unless something else is said.
pub(super) const USUAL_CACHE: CacheMode = CacheMode::Buffered;
/// Names the socket of a daemon.
const API_VARIABLE: &str = "OFFSHOOT_API";

impl Session {
    /// The folder of the store.
    pub(super) fn store_path(&self) -> Result<&Path> {
        self.global.store.as_deref().ok_or_else(|| {
            Error::invalid("nothing says which one")
                .tried("open")
                .on("store")
                .hint("say --store DIR, or set OFFSHOOT_STORE")
        })
    }

    /// True when something says which store is meant.
    pub(super) fn names_a_store(&self) -> bool {
        self.global.store.is_some() || self.global.api.is_some() || named_socket().is_some()
    }

    pub(super) fn options(&self, access: Access) -> OpenOptions {
        let cache = self.global.cache_mode().unwrap_or(USUAL_CACHE);
        OpenOptions { access, cache, boot: boot_id() }
    }

    /// Finds the store, and opens it when no daemon has it. A verb that writes is told of signals
    /// from here on, so that it ends between two steps.
    pub(super) fn open(&self, access: Access) -> Result<Box<dyn Store>> {
        if access == Access::Write {
            signals::ask_to_be_told();
        }
        if let Some(client) = self.daemon()? {
            return Ok(Box::new(Remote::new(client, self.global.store.clone())));
        }
        let path = self.store_path()?;
        let dir = with_patience(|| StoreDir::open(path, &self.options(access)));
        let dir = dir.context("open", || format!("store {}", path.display()))?;
        Ok(Box::new(Local::new(dir, path, self.out)))
    }

    /// The daemon that has the store, for what only a daemon can do.
    ///
    /// # Errors
    /// `NotFound` when there is none, or as [`Session::daemon`].
    pub(super) fn need_daemon(&self) -> Result<Client> {
        let object = || match &self.global.store {
            Some(store) => format!("the daemon of store {}", store.display()),
            None => format!("the daemon at {}", default_socket().display()),
        };
        self.daemon()?.ok_or_else(|| {
            Error::new(Kind::NotFound, "none is running")
                .tried("reach")
                .on(object())
                .hint("start one: `offshoot daemon start`")
        })
    }

    /// The daemon that has the store, if one answers.
    ///
    /// # Errors
    /// `NotFound` when nobody answers at the socket that `--api` names, `Invalid` when the one who
    /// does has another store than the one that was named, or uses the page cache in another way;
    /// `Io`.
    pub(super) fn daemon(&self) -> Result<Option<Client>> {
        let found = self.find_daemon()?;
        if let (Some(client), Some(asked)) = (&found, self.global.cache_mode()) {
            check_cache(client, asked)?;
        }
        Ok(found)
    }

    fn find_daemon(&self) -> Result<Option<Client>> {
        let store = self.global.store.as_deref();
        if let Some(socket) = &self.global.api {
            let client = Client::open(socket, self.out)?;
            if let Some(store) = store {
                check_store(&client, store)?;
            }
            return Ok(Some(client));
        }
        let socket = match store {
            Some(store) => DaemonFile::read(store).map(|file| file.api),
            None => Some(default_socket()),
        };
        let Some(socket) = socket else { return Ok(None) };
        match Client::open(&socket, self.out) {
            Ok(client) => Ok(Some(client)),
            Err(e) if e.kind() == Kind::NotFound && named_socket().is_none() => Ok(None),
            Err(e) if e.kind() == Kind::NotFound && store.is_some() => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Where a daemon listens when nothing else is said.
pub(super) fn default_socket() -> PathBuf {
    named_socket().unwrap_or_else(|| USUAL_SOCKET.into())
}

fn named_socket() -> Option<PathBuf> {
    std::env::var_os(API_VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// Refuses a daemon that has another store than the one that was named.
fn check_store(client: &Client, store: &Path) -> Result<()> {
    let health: Health = client.get("/v1/health".into())?;
    let same = match (health.path.canonicalize(), store.canonicalize()) {
        (Ok(theirs), Ok(ours)) => theirs == ours,
        _ => false,
    };
    if same {
        return Ok(());
    }
    let reason =
        format!("the daemon at {} has {}", client.socket().display(), health.path.display());
    Err(Error::invalid(reason)
        .tried("open")
        .on(format!("store {}", store.display()))
        .hint("leave one of --store and --api out"))
}

/// Refuses a daemon that uses the page cache in another way than was asked for.
fn check_cache(client: &Client, asked: CacheMode) -> Result<()> {
    let health: Health = client.get("/v1/health".into())?;
    if health.cache == asked.name() || health.cache.is_empty() {
        return Ok(());
    }
    let reason = format!("it was started with --cache {}, for all of its disks", health.cache);
    Err(Error::invalid(reason)
        .tried(format!("use --cache {} with", asked.name()))
        .on(format!("the daemon of store {}", health.path.display()))
        .hint(format!("leave it out, or stop it and start it with --cache {}", asked.name())))
}

/// Tries again for a second while the store is busy: a process that was killed, or whose reader
/// went away, has the lock until the kernel is done with it.
pub(super) fn with_patience<T>(mut open: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match open() {
            Err(e) if e.kind() == Kind::Busy && start.elapsed() < PATIENCE => {
                signals::check()?;
                thread::sleep(PATIENCE / 50);
            }
            opened => return opened,
        }
    }
}
