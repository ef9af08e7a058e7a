//! Unix sockets: their files, and who is at the other end.
//!
//! Invariant: a socket file that somebody listens on is left alone; one that nobody answers on is
//! what a killed process left, and may be replaced.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use format::{Error, Kind, Result};
use rustix::fs::Mode;

/// Groups that are asked about at the other end, at most.
const GROUPS_MAX: usize = 1024;

/// Who is at the other end of a connection, as the kernel says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer {
    /// The process; none when it cannot be seen from here.
    pub(crate) pid: Option<u32>,
    /// Its user.
    pub(crate) uid: u32,
    /// Its group.
    pub(crate) gid: u32,
}

impl Peer {
    /// The one at the other end of `socket`.
    ///
    /// # Errors
    /// What the host reports.
    pub(crate) fn of(socket: impl AsFd) -> io::Result<Peer> {
        let mut found = [libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX }];
        ask(&socket, libc::SO_PEERCRED, &mut found)?;
        let [libc::ucred { pid, uid, gid }] = found;
        Ok(Peer { pid: u32::try_from(pid).ok().filter(|pid| *pid != 0), uid, gid })
    }

    /// True for those who can do everything that this process can: its own user, and root.
    pub(crate) fn is_trusted(&self) -> bool {
        self.uid == rustix::process::geteuid().as_raw() || self.uid == 0
    }
}

/// The supplementary groups of the one at the other end of `socket`; none when the host does not
/// tell.
pub(crate) fn groups_of(socket: impl AsFd) -> Vec<u32> {
    let mut groups = vec![0; GROUPS_MAX];
    let count = ask(&socket, libc::SO_PEERGROUPS, &mut groups).unwrap_or(0);
    groups.truncate(count);
    groups
}

/// Asks for an option of a socket that is a list of values; gives back how many there are.
fn ask<T: Copy>(socket: &impl AsFd, option: libc::c_int, values: &mut [T]) -> io::Result<usize> {
    let bytes = size_of_val(values);
    let mut len = libc::socklen_t::try_from(bytes).map_err(io::Error::other)?;
    let fd = socket.as_fd().as_raw_fd();
    let to = values.as_mut_ptr().cast();
    // SAFETY: the descriptor is open, `values` has room for `len` bytes, and both outlive the call.
    // The two options that are asked for are made of integers, for which any bytes will do.
    match unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option, to, &raw mut len) } {
        0 => Ok(len as usize / size_of::<T>()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes away a socket that nobody answers on. False when somebody does.
///
/// # Errors
/// `Exists` when something else than a socket is there, or what the host reports.
pub(crate) fn clear(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(e) => return Err(e.into()),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::new(Kind::Exists, "something else than a socket is there"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path)?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Listens at `path`.
///
/// # Errors
/// `Invalid` for a path that is too long; else what the host reports.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    UnixListener::bind(path).map_err(|e| match e.kind() {
        io::ErrorKind::InvalidInput => {
            Error::invalid("its path is too long for a socket (107 bytes at most)")
        }
        _ => e.into(),
    })
}

/// As [`listen`], on a file that never has more permissions than its owner's. The mask is that of
/// the process: no other of its threads may make files meanwhile.
///
/// # Errors
/// As [`listen`].
pub(crate) fn listen_alone(path: &Path) -> Result<UnixListener> {
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = listen(path);
    rustix::process::umask(before);
    bound
}
