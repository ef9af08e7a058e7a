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
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use format::{Context as _, Error, Kind, Result};

use crate::sockets::{self, Peer, groups_of};

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
        let listen = || {
            if !sockets::clear(path)? {
                return Err(Error::new(Kind::Busy, "another process answers there")
                    .hint("stop it, or choose another path"));
            }
            // The process is young: nobody else makes files meanwhile.
            sockets::listen_alone(path)
        };
        let listener = listen().context("listen on", object)?;
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
        let Ok(peer) = Peer::of(stream) else { return false };
        let in_group = |group| peer.gid == group || groups_of(stream).contains(&group);
        peer.is_trusted() || self.access.group.is_some_and(in_group)
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
