//! Copies from and to the page cache, done by the worker itself.
//!
//! A read of what the page cache has is a copy, whoever makes it. A ring makes many in one call;
//! for one alone a call of its own is the shorter way. It never waits: what the page cache does not
//! have is left to the ring.
//!
//! A write is a copy under the inode's lock. A ring hands it to a kernel thread first on file
//! systems that cannot promise not to wait (ext4 among them), which costs more than the copy. So
//! the worker copies, as long as that is quick: when a copy had to wait, for dirty pages to be
//! written back most likely, the ring gets the writes for a while, so that reads go on meanwhile.
//!
//! A copy can also take long because the host gave the processor to somebody else. The kernel
//! counts how often a thread waited by itself; the counter costs a system call, so it is looked at
//! only for a while after a copy took long.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use format::{Error, Result};
use rustix::fd::AsRawFd;

/// A copy that took longer may have waited for something.
const STALL: Duration = Duration::from_millis(2);
/// How long copies are watched after one took long.
const WATCH: Duration = Duration::from_secs(1);
/// How long the ring gets the writes after one that waited.
const PAUSE: Duration = Duration::from_millis(50);

/// Whether copies are quick at present.
#[derive(Debug, Default)]
pub(super) struct Inline {
    /// The file system cannot promise not to wait for a read.
    reads_refused: bool,
    watched_until: Option<Instant>,
    /// Not before this.
    paused_until: Option<Instant>,
}

impl Inline {
    /// Whether the worker may write by itself at `now`.
    pub(super) fn is_quick(&mut self, now: Instant) -> bool {
        self.paused_until.take_if(|until| now >= *until);
        self.paused_until.is_none()
    }

    /// Reads what the page cache has at `offset` into the buffers, from the front; returns how many
    /// bytes that were. What went wrong with the rest is for the ring to find out.
    pub(super) fn read(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        iovecs: &[libc::iovec],
    ) -> u64 {
        let Ok(at) = i64::try_from(offset) else { return 0 };
        if self.reads_refused {
            return 0;
        }
        let count = i32::try_from(iovecs.len()).expect("a transfer has at most 1024 buffers");
        let (fd, buffers, flags) = (file.as_raw_fd(), iovecs.as_ptr(), libc::RWF_NOWAIT);
        // SAFETY: the buffers are guest memory that the request's chain keeps mapped.
        let read = unsafe { libc::preadv2(fd, buffers, count, at, flags) };
        u64::try_from(read).unwrap_or_else(|_| {
            let error = std::io::Error::last_os_error().raw_os_error();
            self.reads_refused = error == Some(libc::EOPNOTSUPP);
            0
        })
    }

    /// Writes the buffers at `offset`; returns the bytes that were written, which may be fewer.
    /// `now` is the time before, and becomes the time after.
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
        self.watched_until.take_if(|until| *now >= *until);
        let waits = self.watched_until.map(|_| waits());
        let written = loop {
            // SAFETY: the buffers are guest memory that the request's chain keeps mapped.
            let written = unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), count, at) };
            match u64::try_from(written) {
                Ok(bytes) => break Ok(bytes),
                Err(_) => match std::io::Error::last_os_error() {
                    e if e.kind() == std::io::ErrorKind::Interrupted => {}
                    // What cannot be done without waiting is for the ring, which may wait.
                    e if e.kind() == std::io::ErrorKind::WouldBlock => break Ok(0),
                    e => break Err(Error::from(e)),
                },
            }
        };
        let begun = std::mem::replace(now, Instant::now());
        if *now - begun > STALL {
            self.took_long(*now, waits);
        }
        written
    }

    /// A copy took long; `before` are the waits of the thread before it, if it was watched.
    fn took_long(&mut self, now: Instant, before: Option<i64>) {
        self.watched_until = Some(now + WATCH);
        if before.is_some_and(|before| waits() != before) {
            self.paused_until = Some(now + PAUSE);
        }
    }
}

/// How often this thread has given up the processor because it had to wait.
fn waits() -> i64 {
    // SAFETY: a plain structure of numbers, for which zeroes are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: writes to `usage` and nothing else. It cannot fail: the thread is the calling one.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nvcsw
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One write that seems to have begun `ago`, and the time after it.
    fn write(inline: &mut Inline, ago: Duration) -> Instant {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = *b"some bytes";
        let iovec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut now = Instant::now() - ago;
        let file = rustix::fd::AsFd::as_fd(&file);
        assert_eq!(inline.write(file, 5, &[iovec], &mut now).unwrap(), 10);
        now
    }

    #[test]
    fn a_write_that_waited_gives_the_ring_a_turn() {
        let mut inline = Inline::default();
        assert!(inline.is_quick(Instant::now()));

        // The first one that takes long is not known to have waited; the next ones are watched.
        let now = write(&mut inline, STALL * 2);
        assert!(inline.is_quick(now) && inline.watched_until.is_some());
        let before = waits();
        std::thread::sleep(Duration::from_millis(1));
        inline.took_long(now, Some(before));

        assert!(!inline.is_quick(now));
        assert!(inline.is_quick(now + PAUSE));
    }

    #[test]
    fn a_write_that_only_lost_the_processor_does_not() {
        let mut inline = Inline::default();
        let now = Instant::now();
        inline.took_long(now, Some(waits()));
        assert!(inline.is_quick(now));
        write(&mut inline, Duration::ZERO);
        assert!(inline.watched_until.is_some(), "it is watched for a while");
        inline.watched_until = Some(Instant::now());
        write(&mut inline, Duration::ZERO);
        assert!(inline.watched_until.is_none());
    }

    #[test]
    fn a_read_gives_what_the_file_has_and_leaves_the_rest() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"some bytes", 0).unwrap();
        let mut bytes = [0u8; 16];
        let iovec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut inline = Inline::default();
        let file = rustix::fd::AsFd::as_fd(&file);

        let read = inline.read(file, 5, &[iovec]);

        // A file system in memory may refuse: then it is not asked again.
        assert!(
            (read, inline.reads_refused) == (5, false) || (read, inline.reads_refused) == (0, true)
        );
        assert_eq!(&bytes[..5], if read > 0 { b"bytes" } else { &[0; 5] });
        assert_eq!(inline.read(file, u64::MAX, &[iovec]), 0);
        let closed = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(inline.read(rustix::fd::AsFd::as_fd(&closed), 0, &[iovec]), 0);
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
