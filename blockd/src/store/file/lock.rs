//! Locks between processes (and between two openings in one process) on a whole file.
//!
//! Relied on: a lock of the open file description (`F_OFD_SETLK`) belongs to the descriptor it was
//! taken through. Unlike a classic record lock it is not lost when some other descriptor of the
//! same file is closed, and it conflicts with a second opening by the same process. The kernel
//! drops it when the last copy of the descriptor is closed, however the process ended.

use std::ffi::{c_int, c_short};
use std::io;

use format::{Error, Kind, Result};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;

/// How a file is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// Many holders, no exclusive one.
    Shared,
    /// One holder.
    Exclusive,
}

/// Holds a lock until dropped.
#[derive(Debug)]
pub struct LockGuard {
    _fd: OwnedFd,
}

/// `struct flock` of the C library for 64-bit Linux.
#[repr(C)]
struct Flock {
    kind: c_short,
    whence: c_short,
    start: i64,
    len: i64,
    pid: c_int,
}

const F_OFD_SETLK: c_int = 37;
const F_RDLCK: c_short = 0;
const F_WRLCK: c_short = 1;
const F_UNLCK: c_short = 2;
const SEEK_SET: c_short = 0;

unsafe extern "C" {
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
}

/// Locks the file that `fd` is open on, or fails at once; the guard holds the lock.
pub(super) fn take(fd: OwnedFd, kind: LockKind, path: &str) -> Result<LockGuard> {
    set(fd.as_fd(), kind, path)?;
    Ok(LockGuard { _fd: fd })
}

/// Locks the file that `fd` is open on, or fails at once; the open file description holds the lock.
pub(super) fn set(fd: BorrowedFd<'_>, kind: LockKind, path: &str) -> Result<()> {
    let kind = match kind {
        LockKind::Shared => F_RDLCK,
        LockKind::Exclusive => F_WRLCK,
    };
    change(fd, kind, path).map_err(|e| e.tried("lock").on(path))
}

/// Ends what [`set`] began, for all descriptors of the open file.
pub(super) fn clear(fd: BorrowedFd<'_>, path: &str) -> Result<()> {
    change(fd, F_UNLCK, path).map_err(|e| e.tried("unlock").on(path))
}

fn change(fd: BorrowedFd<'_>, kind: c_short, path: &str) -> Result<()> {
    let lock = Flock {
        kind,
        whence: SEEK_SET,
        start: 0,
        len: 0, // To the end, however long the file gets.
        pid: 0, // Must be zero for this kind of lock.
    };
    // SAFETY: `fd` is open, the command takes a pointer to a `struct flock`, `lock` is one and
    // outlives the call.
    if unsafe { fcntl(fd.as_raw_fd(), F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(());
    }
    let e = io::Error::last_os_error();
    let error = match Errno::from_io_error(&e) {
        Some(Errno::AGAIN | Errno::ACCESS) => Error::new(Kind::Busy, "another process has it open")
            .hint(format!("stop it or wait for it; `fuser -v {path}` names it")),
        Some(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK) => {
            Error::new(Kind::Unsupported, "the file system has no locks").caused_by(e)
        }
        _ => Error::from(e),
    };
    Err(error)
}
