//! Starting a VM process.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use format::{Context as _, Result};
use uuid::Uuid;

use super::link::{Link, Process};
use super::serve::Options;
use super::wire::{Folder, Ready};
use super::zygote::{Wanted, Zygotes};
use crate::machine::SizeClass;

/// Starts shells.
pub struct Spawner {
    vms: PathBuf,
    sandbox: bool,
    zygotes: Zygotes,
}

impl Spawner {
    /// One whose shells have their folders below `vms`, and confine themselves or do not.
    #[must_use]
    pub fn new(vms: PathBuf, sandbox: bool) -> Spawner {
        Spawner { zygotes: Zygotes::new(vms.clone()), vms, sandbox }
    }

    /// Starts a shell in a new folder, and waits until it is ready.
    ///
    /// # Errors
    /// What the shell says about why it cannot be one, or what the host reports. Nothing is left
    /// then.
    pub fn spawn(&self, class: &SizeClass) -> Result<Process> {
        let id = Uuid::new_v4();
        let folder = self.vms.join(id.simple().to_string());
        fs::DirBuilder::new().mode(0o700).create(&folder).context("create", || object(id))?;
        self.start(id, &folder, class).map_err(|e| {
            // What stays is an empty shell's, and goes at the next start of the daemon.
            let _ = fs::remove_dir_all(&folder);
            e.tried("start").on(object(id))
        })
    }

    fn start(&self, id: Uuid, path: &Path, class: &SizeClass) -> Result<Process> {
        let (ours, theirs) = UnixStream::pair()?;
        let log = fs::File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(Folder(path.to_owned()).log())?;
        let options = Options { dir: path.to_owned(), class: *class, sandbox: self.sandbox };
        // The other end is the shell's alone from here on: its death is seen here, and the
        // daemon's there.
        let (pid, itself) = self.zygotes.begin(&Wanted(options), OwnedFd::from(theirs), &log)?;
        let process = Process::started(id, path.to_owned(), (pid, itself), Link::new(ours)?);
        if let Err(e) = process.first_word::<Ready>() {
            let _ = process.kill();
            return Err(e);
        }
        Ok(process)
    }
}

fn object(id: Uuid) -> String {
    format!("shell {id}")
}
