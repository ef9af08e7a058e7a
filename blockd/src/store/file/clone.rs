//! Sharing the space of file ranges, where the file system can (XFS, Btrfs, …).

use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;

/// Has a range of `target` share the space of one of `source`: offset in the source, offset in the
/// target, bytes. False when the file system cannot.
///
/// # Errors
/// What the host reports besides.
pub(super) fn range(
    target: BorrowedFd<'_>,
    source: BorrowedFd<'_>,
    (from, to, len): (u64, u64, u64),
) -> Result<bool, Errno> {
    let asked = libc::file_clone_range {
        src_fd: i64::from(source.as_raw_fd()),
        src_offset: from,
        src_length: len,
        dest_offset: to,
    };
    loop {
        // SAFETY: the call reads a `file_clone_range`, which outlives it, and both descriptors are
        // borrowed for as long as it takes.
        let done = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONERANGE, &raw const asked) };
        if done == 0 {
            return Ok(true);
        }
        return match Errno::from_io_error(&std::io::Error::last_os_error()) {
            Some(Errno::INTR) => continue,
            // Not on this file system, not between these two, not at these offsets.
            Some(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL) => Ok(false),
            Some(other) => Err(other),
            None => Err(Errno::IO),
        };
    }
}
