//! Starting a VM process.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use format::{Context as _, Error, Result};
use uuid::Uuid;

use super::link::{Link, Process};
use super::wire::{Folder, Ready};
use crate::machine::SizeClass;

/// This very program, also after its file was replaced by another version of it.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Starts a shell in a new folder below `vms`, and waits until it is ready.
///
/// # Errors
/// What the shell says about why it cannot be one, or what the host reports. Nothing is left then.
pub fn spawn(vms: &Path, class: &SizeClass, sandbox: bool) -> Result<Process> {
    let id = Uuid::new_v4();
    let folder = vms.join(id.simple().to_string());
    fs::DirBuilder::new().mode(0o700).create(&folder).context("create", || object(id))?;
    start(id, &folder, class, sandbox).map_err(|e| {
        // What stays is an empty shell's, and goes at the next start of the daemon.
        let _ = fs::remove_dir_all(&folder);
        e.tried("start").on(object(id))
    })
}

fn object(id: Uuid) -> String {
    format!("shell {id}")
}

fn start(id: Uuid, path: &Path, class: &SizeClass, sandbox: bool) -> Result<Process> {
    let (ours, theirs) = UnixStream::pair()?;
    let log = fs::File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(Folder(path.to_owned()).log())?;
    let mut command = Command::new(OWN_PROGRAM);
    command.arg0("forkd").arg("vm").arg("--dir").arg(path);
    command.arg("--memory").arg(class.memory_bytes.to_string());
    command.arg("--vcpus").arg(class.vcpus.to_string());
    command.arg("--sandbox").arg(if sandbox { "on" } else { "off" });
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(log);
    // SAFETY: between fork and exec, only a system call that may be made there is made.
    unsafe {
        // A session of its own: no terminal, and no signal that is meant for the daemon, ends it.
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(std::io::Error::from));
    }
    let child = command.spawn().map_err(Error::from)?;
    // The other end is the child's alone: its death is seen here, and the daemon's there.
    drop(command);
    let process = Process::started(id, path.to_owned(), child, Link::new(ours)?)?;
    let ready = process.first_word::<Ready>();
    if let Err(e) = ready {
        let _ = process.kill();
        return Err(e);
    }
    Ok(process)
}
