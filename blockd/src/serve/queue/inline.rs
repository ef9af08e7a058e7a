//! Writes through the page cache, done by the worker itself.
//!
//! Such a write is a copy under the inode's lock. A ring hands it to a kernel thread first on file
//! systems that cannot promise not to wait (ext4 among them), which costs more than the copy. So
//! the worker copies, as long as that is quick: when one copy had to wait, for dirty pages to be
//! written back most likely, the ring gets the writes for a while, so that reads go on meanwhile.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use format::{Error, Result};
use rustix::fd::AsRawFd;

/// A copy that took longer had to wait for something.
const STALL: Duration = Duration::from_millis(2);
/// How long the ring gets the writes after that.
const PAUSE: Duration = Duration::from_millis(50);

/// Whether writes are quick at present.
#[derive(Debug, Default)]
pub(super) struct Inline {
    /// Not before this.
    paused_until: Option<Instant>,
}

impl Inline {
    /// Whether the worker may write by itself at `now`.
    pub(super) fn is_quick(&mut self, now: Instant) -> bool {
        match self.paused_until {
            Some(until) if now < until => false,
            _ => {
                self.paused_until = None;
                true
            }
        }
    }

    /// Writes the buffers at `offset`; returns the bytes that were written, which may be fewer.
    ///
    /// # Errors
    /// What the host reports.
    pub(super) fn write(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        iovecs: &[libc::iovec],
        now: &mut Instant,
    ) -> Result<u64> {
        let count = i32::try_from(iovecs.len()).expect("a transfer has at most 1024 buffers");
        let at = i64::try_from(offset).map_err(|_| Error::invalid("an offset past all files"))?;
        let written = loop {
            // SAFETY: the buffers are guest memory that the request's chain keeps mapped.
            let written = unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), count, at) };
            match u64::try_from(written) {
                Ok(bytes) => break Ok(bytes),
                Err(_) => match std::io::Error::last_os_error() {
                    e if e.kind() == std::io::ErrorKind::Interrupted => {}
                    e => break Err(Error::from(e)),
                },
            }
        };
        let begun = std::mem::replace(now, Instant::now());
        if *now - begun > STALL {
            self.paused_until = Some(*now + PAUSE);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_gives_the_ring_a_turn() {
        let mut inline = Inline::default();
        let now = Instant::now();
        assert!(inline.is_quick(now));
        let file = tempfile::tempfile().unwrap();
        let mut bytes = *b"some bytes";
        let iovec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut begun = Instant::now() - STALL * 2;

        let written = inline.write(rustix::fd::AsFd::as_fd(&file), 5, &[iovec], &mut begun);

        assert_eq!(written.unwrap(), 10);
        assert!(!inline.is_quick(begun));
        assert!(inline.is_quick(begun + PAUSE));
    }

    #[test]
    fn a_refused_write_is_an_error() {
        let mut inline = Inline::default();
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut byte = 1u8;
        let iovec = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let file = rustix::fd::AsFd::as_fd(&file);
        assert!(inline.write(file, 0, &[iovec], &mut Instant::now()).is_err());
    }
}
