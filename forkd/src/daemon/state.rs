//! The folder of the daemon: what is in it, and how it is written.
//!
//! ```text
//! lock           held by the daemon that has the folder
//! vms/ID/        one VM process, or what is left of it:
//!     vm.json        who the machine is; without it, this is a shell or something unfinished
//!     control        the socket of the process
//!     console        the socket of the serial console
//!     disk0, …       sockets at which blockd serves its disks
//!     ended.json     how it ended
//!     log            what the process has to say
//! undo/ID.json   something under way: what to remove if it is not finished
//! undo/ID.soon   the same, not durable yet
//! ```
//!
//! Invariants, and the crash each is for:
//! - A file appears under its name when it is complete and durable: written beside, synced,
//!   renamed, the folder synced. A power cut in between leaves the old one, or none.
//! - What is undone is decided by `undo/`, what there is by `vm.json`; both are named by identity,
//!   so that a name which is given twice is no confusion.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use format::{Context as _, Error, Kind, Result};
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::Write as _;
use uuid::Uuid;

use crate::api::types::{VmDisk, VmParent};
use crate::machine::SizeClass;
use crate::process::wire::NetHardware;

/// Version of what is in the files.
const LAYOUT: u32 = 1;
/// Name of a machine's description in its folder.
const DESCRIPTION: &str = "vm.json";
/// How long to wait for a lock that somebody has.
const LOCK_WAIT: Duration = Duration::from_secs(1);
/// Bytes of the folder's path at most: sockets below it have 107.
const PATH_MAX: usize = 54;

/// The folder.
pub struct StateDir {
    path: PathBuf,
    _lock: File,
}

/// Who a machine is, as it is found again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Version of this file.
    pub layout: u32,
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: Uuid,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Its processors.
    pub vcpus: u8,
    /// Its disks.
    pub disks: Vec<VmDisk>,
    /// Its network card.
    #[serde(default)]
    pub net: Option<NetHardware>,
    /// Its generation identity.
    pub generation_id: Uuid,
    /// The address of its network card.
    pub mac: [u8; 6],
    /// What it was forked from.
    pub parent: Option<VmParent>,
    /// Sealed layers of memory below its own.
    pub layers: u64,
    /// Seconds since 1970 at its making.
    pub created: u64,
}

impl Description {
    /// The present version of the file.
    pub const LAYOUT: u32 = LAYOUT;

    /// The shells that fit.
    #[must_use]
    pub fn class(&self) -> SizeClass {
        SizeClass { memory_bytes: self.memory_bytes, vcpus: self.vcpus }
    }
}

impl StateDir {
    /// Takes the folder, which is made if it is not there.
    ///
    /// # Errors
    /// `Busy` when another daemon has it; `Invalid` for a path that is too long for sockets; or
    /// what the host reports.
    pub fn open(path: &Path) -> Result<StateDir> {
        let object = || format!("folder {}", path.display());
        let open = || -> Result<StateDir> {
            if path.as_os_str().len() > PATH_MAX {
                return Err(Error::invalid(format!(
                    "its path is longer than {PATH_MAX} bytes, too long for sockets in it"
                )));
            }
            for folder in ["vms", "undo"] {
                // Memory and disks of machines are behind these sockets: their owner's alone.
                let mut made = fs::DirBuilder::new();
                made.recursive(true).mode(0o700).create(path.join(folder))?;
            }
            let mut options = File::options();
            let lock = options.create(true).truncate(false).write(true).mode(0o600);
            let lock = lock.open(path.join("lock"))?;
            take_lock(&lock)?;
            Ok(StateDir { path: path.to_owned(), _lock: lock })
        };
        open().context("open", object)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of VM processes.
    #[must_use]
    pub fn vms(&self) -> PathBuf {
        self.path.join("vms")
    }

    /// The folder of a VM process.
    #[must_use]
    pub fn vm(&self, id: Uuid) -> PathBuf {
        self.vms().join(id.simple().to_string())
    }

    /// The folder of things under way.
    #[must_use]
    pub fn undo(&self) -> PathBuf {
        self.path.join("undo")
    }

    /// Every folder of a VM process, and who it is if it is somebody; or why that cannot be read.
    ///
    /// # Errors
    /// What the host reports.
    pub fn machines(&self) -> Result<Vec<(Uuid, Result<Option<Description>>)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.vms())? {
            let name = entry?.file_name();
            // What has another name was not put there by this program.
            let Some(id) = name.to_str().and_then(|name| Uuid::parse_str(name).ok()) else {
                continue;
            };
            found.push((id, read(&self.vm(id).join(DESCRIPTION))));
        }
        Ok(found)
    }

    /// Writes down who a machine is. Durable when `durable` says so; complete or not there in any
    /// case.
    ///
    /// # Errors
    /// What the host reports.
    pub fn describe(&self, machine: &Description, durable: bool) -> Result<()> {
        write(&self.vm(machine.id), DESCRIPTION, machine, durable)
    }

    /// Makes descriptions durable that were written, side by side: the host makes many durable at
    /// once for little more than one.
    ///
    /// # Errors
    /// What the host reports.
    pub fn sync(&self, ids: &[Uuid]) -> Result<()> {
        const LANES: usize = 16;
        let one = |id: &Uuid| -> Result<()> {
            File::open(self.vm(*id).join(DESCRIPTION))?.sync_all()?;
            sync_folder(&self.vm(*id))
        };
        let lane = |part: &[Uuid]| part.iter().try_for_each(one);
        std::thread::scope(|s| {
            let parts = ids.chunks(ids.len().div_ceil(LANES).max(1));
            let lanes: Vec<_> = parts.map(|part| s.spawn(move || lane(part))).collect();
            let joined = lanes.into_iter().map(|lane| {
                // A panic in there is a bug, and is one here as well.
                lane.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
            });
            joined.collect::<Vec<Result<()>>>().into_iter().collect::<Result<()>>()
        })?;
        sync_folder(&self.vms())
    }
}

/// Takes the lock, and waits a little for it: a daemon that was killed while it started a shell has
/// left it to that one, which lets go of it as soon as it has become a program of its own.
fn take_lock(lock: &File) -> Result<()> {
    let since = Instant::now();
    loop {
        match flock(lock.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(_) if since.elapsed() < LOCK_WAIT => std::thread::sleep(LOCK_WAIT / 100),
            Err(e) => {
                return Err(Error::new(Kind::Busy, "another daemon has it")
                    .caused_by(std::io::Error::from(e))
                    .hint("stop it, or choose another folder with --state"));
            }
        }
    }
}

/// What a file says; `None` when it is not there.
///
/// # Errors
/// `Corrupt` when it makes no sense, `Unsupported` when it is of a newer version; or what the host
/// reports.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    #[derive(Deserialize)]
    struct Version {
        layout: u32,
    }
    let object = || path.display().to_string();
    let text = match fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.context("read", object)?,
    };
    let strange = |e: serde_json::Error| {
        Error::corrupt("it is not what is expected").caused_by(e).tried("read").on(object())
    };
    let Version { layout } = serde_json::from_slice(&text).map_err(strange)?;
    if layout != LAYOUT {
        let reason = format!("it is of version {layout}, this program knows {LAYOUT}");
        return Err(Error::new(Kind::Unsupported, reason).tried("read").on(object()));
    }
    serde_json::from_slice(&text).map(Some).map_err(strange)
}

/// Writes a file that is complete or not there.
///
/// # Errors
/// What the host reports.
pub fn write(folder: &Path, name: &str, value: &impl Serialize, durable: bool) -> Result<()> {
    let put = || -> Result<()> {
        let text = serde_json::to_vec_pretty(value).map_err(std::io::Error::from)?;
        let new = folder.join(format!("{name}.new"));
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        if durable {
            // Before the rename: a power cut must not leave the name with nothing behind it.
            file.sync_all()?;
        }
        fs::rename(&new, folder.join(name))?;
        if durable {
            sync_folder(folder)?;
        }
        Ok(())
    };
    put().context("write", || folder.join(name).display().to_string())
}

/// Makes the names in a folder durable.
///
/// # Errors
/// What the host reports.
pub fn sync_folder(folder: &Path) -> Result<()> {
    Ok(File::open(folder)?.sync_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::LinkWhen;

    fn machine(id: Uuid) -> Description {
        Description {
            layout: LAYOUT,
            name: "web1".into(),
            id,
            memory_bytes: 1 << 20,
            vcpus: 1,
            disks: Vec::new(),
            net: Some(NetHardware { tap: Some("tap0".into()), link: LinkWhen::AtOnce }),
            generation_id: Uuid::from_u128(7),
            mac: [2, 0, 0, 0, 0, 1],
            parent: None,
            layers: 0,
            created: 3,
        }
    }

    #[test]
    fn machines_are_found_again_and_half_made_ones_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let (known, shell) = (Uuid::from_u128(1), Uuid::from_u128(2));
        for id in [known, shell] {
            fs::create_dir(state.vm(id)).unwrap();
        }
        fs::create_dir(state.vms().join("lost+found")).unwrap();
        state.describe(&machine(known), true).unwrap();
        // A write that was cut short.
        fs::write(state.vm(shell).join("vm.json.new"), "{").unwrap();

        let mut found = state.machines().unwrap();

        found.sort_by_key(|(id, _)| *id);
        let found: Vec<_> = found.into_iter().map(|(id, is)| (id, is.unwrap())).collect();
        assert_eq!(found, [(known, Some(machine(known))), (shell, None)]);
    }

    #[test]
    fn a_folder_has_one_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path()).unwrap();
        assert_eq!(StateDir::open(dir.path()).err().unwrap().kind(), Kind::Busy);
        drop(first);

        assert!(StateDir::open(dir.path()).is_ok());
    }

    #[test]
    fn nonsense_and_newer_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.json");
        for (text, kind) in [
            ("{", Kind::Corrupt),
            ("{\"layout\": 1}", Kind::Corrupt),
            ("{\"layout\": 2}", Kind::Unsupported),
        ] {
            fs::write(&path, text).unwrap();
            let error = read::<Description>(&path).unwrap_err();
            assert_eq!(error.kind(), kind, "{text}");
            assert!(error.to_string().contains("vm.json"), "{error}");
        }
    }
}
