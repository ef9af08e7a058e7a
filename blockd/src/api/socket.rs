//! The socket: where it is, who may connect.
//!
//! Invariants:
//! - The file never exists with more permissions than it is to have: it is made under a umask that
//!   leaves its owner alone in, and opened up afterwards.
//! - A socket file that somebody answers on is left alone; one that nobody answers on is what a
//!   killed daemon left, and is replaced.
//! - Permissions of the file are not all: who is at the other end is asked of the kernel as well,
//!   for each connection.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use format::{Context as _, Error, Kind, Result};
use rustix::fs::Mode;

/// Groups that are asked about at the other end, at most.
const GROUPS_MAX: usize = 1024;

/// Who may connect besides the owner of the daemon and root.
#[derive(Debug, Clone, Copy, Default)]
pub struct Access {
    /// Members of this group.
    pub group: Option<u32>,
}

/// The listening socket; its file goes when this is dropped.
pub struct ApiSocket {
    /// None when its file is a successor's.
    path: Option<PathBuf>,
    listener: UnixListener,
    access: Access,
}

/// The number of a group, by name or number.
///
/// # Errors
/// `NotFound`, or what the host reports.
pub fn group_id(name: &str) -> Result<u32> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let groups = fs::read_to_string("/etc/group").context("read", || "/etc/group".into())?;
    let mut rows = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let row = rows.find(|row| row.first() == Some(&name));
    row.and_then(|row| row.get(2)?.parse().ok()).ok_or_else(|| {
        Error::new(Kind::NotFound, "there is no such group").on(format!("group {name}"))
    })
}

impl ApiSocket {
    /// Listens at `path`; the folder is made if it is not there.
    ///
    /// # Errors
    /// `Busy` when somebody answers there; `Exists` when something else than a socket is there;
    /// `Invalid` for a path that is too long; else what the host reports.
    pub fn bind(path: &Path, access: Access) -> Result<Self> {
        let object = || format!("socket {}", path.display());
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).context("create", || folder.display().to_string())?;
        }
        clear(path).context("listen on", object)?;
        // The process is young: nobody else makes files meanwhile.
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(before);
        let listener = bound
            .map_err(|e| match e.kind() {
                io::ErrorKind::InvalidInput => {
                    Error::invalid("its path is too long for a socket (107 bytes at most)")
                }
                _ => e.into(),
            })
            .context("listen on", object)?;
        if let Some(group) = access.group {
            chown(path, None, Some(group)).context("give the group", object)?;
            let mode = fs::Permissions::from_mode(0o660);
            fs::set_permissions(path, mode).context("give the group", object)?;
        }
        listener.set_nonblocking(true).context("listen on", object)?;
        Ok(ApiSocket { path: Some(path.to_owned()), listener, access })
    }

    /// Goes on with the socket of a predecessor, which is at `path`.
    ///
    /// # Errors
    /// What the host reports.
    pub fn inherit(path: &Path, listener: UnixListener, access: Access) -> Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(ApiSocket { path: Some(path.to_owned()), listener, access })
    }

    /// Lets the socket go without its file, which a successor has.
    pub fn leave(mut self) {
        self.path = None;
    }

    /// The socket, to accept from.
    ///
    /// # Errors
    /// What the host reports.
    pub fn listener(&self) -> Result<UnixListener> {
        Ok(self.listener.try_clone()?)
    }

    /// True when the one at the other end may ask for something.
    #[must_use]
    pub fn admits(&self, stream: &tokio::net::UnixStream) -> bool {
        let Ok(peer) = stream.peer_cred() else { return false };
        let own = rustix::process::geteuid().as_raw();
        if peer.uid() == own || peer.uid() == 0 {
            return true;
        }
        let Some(group) = self.access.group else { return false };
        peer.gid() == group || groups_of(stream).contains(&group)
    }
}

/// The supplementary groups of the one at the other end.
fn groups_of(stream: &tokio::net::UnixStream) -> Vec<libc::gid_t> {
    let mut groups: Vec<libc::gid_t> = vec![0; GROUPS_MAX];
    let bytes = std::mem::size_of_val(groups.as_slice());
    let Ok(mut len) = libc::socklen_t::try_from(bytes) else { return Vec::new() };
    // SAFETY: the descriptor is open, `groups` has room for `len` bytes, and both outlive the call.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if got != 0 {
        return Vec::new();
    }
    groups.truncate(len as usize / size_of::<libc::gid_t>());
    groups
}

/// Takes away what a killed daemon left.
fn clear(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt as _;
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e.into()),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::new(Kind::Exists, "something else than a socket is there"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::new(Kind::Busy, "another process answers there")
            .hint("stop it, or choose another path")),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(fs::remove_file(path)?),
        Err(e) => Err(e.into()),
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        // What stays is found to be dead by whoever connects, and replaced.
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}
