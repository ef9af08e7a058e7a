//! The ring of one queue worker: data transfers, syncs, doorbells.
//!
//! Relied on: the kernel imports an iovec array when the entry is submitted, so the array may
//! change once [`DataRing::submit`] returned, and only then.
//!
//! Doorbells are watched by polls that fire again and again and are never drained: an eventfd wakes
//! its pollers at each signal, whatever its counter. That saves a read for each wake-up.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use format::{Error, Result};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};

/// Entries that can be made before they must be submitted.
const ENTRIES: u32 = 256;
/// Completions that can wait. More than that wait in the kernel.
const COMPLETIONS: u32 = 4096;

/// What completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    /// A data transfer or sync of a slot: bytes, or a negative error number.
    Transfer { slot: u32, part: u32, result: i32 },
    /// A doorbell rang, or its poll ended (`again` is false then) and must be started anew.
    Bell { bell: Bell, again: bool, result: i32 },
}

/// The doorbells of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bell {
    /// The driver made requests.
    Kick = 0,
    /// The session wants something.
    Control = 1,
    /// The slow lane is done with something, or the volume wants attention.
    Mail = 2,
}

const BELL: u64 = 1 << 63;

pub(super) struct DataRing {
    ring: IoUring,
    /// Entries made and not yet submitted.
    unsubmitted: u32,
}

impl DataRing {
    /// A ring of the calling thread, which alone may use it. `files` are known to it by index.
    ///
    /// # Errors
    /// When the host has no rings, or no memory for one.
    pub(super) fn new(files: &[i32]) -> Result<Self> {
        let build = |modern: bool| {
            let mut builder = IoUring::builder();
            builder.setup_cqsize(COMPLETIONS).setup_clamp();
            if modern {
                // Completions are looked at when the worker asks, never by interrupting it.
                builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
            }
            builder.build(ENTRIES)
        };
        let made = build(true).or_else(|_| build(false));
        let ring = made.map_err(|e| Error::from(e).tried("make a ring"))?;
        if !files.is_empty() {
            let registered = ring.submitter().register_files(files);
            registered.map_err(|e| Error::from(e).tried("register files with a ring"))?;
        }
        Ok(DataRing { ring, unsubmitted: 0 })
    }

    /// Knows these files by index from now on. What is in work keeps its file.
    ///
    /// # Errors
    /// What the host reports.
    pub(super) fn replace_files(&mut self, files: &[i32]) -> Result<()> {
        let submitter = self.ring.submitter();
        let replaced = submitter.unregister_files().and_then(|()| submitter.register_files(files));
        replaced.map_err(|e| Error::from(e).tried("register files with a ring"))
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<()> {
        loop {
            // SAFETY: what the entry refers to stays valid until its completion: buffers are guest
            // memory whose mapping a chain keeps, iovec arrays belong to slots that are not reused
            // before, doorbells live as long as the queue.
            let pushed = unsafe { self.ring.submission().push(entry) };
            if pushed.is_ok() {
                self.unsubmitted += 1;
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Reads into, or writes from, the buffers of `iovecs`.
    pub(super) fn transfer(
        &mut self,
        write: bool,
        file: u16,
        offset: u64,
        iovecs: &[libc::iovec],
        (slot, part): (u32, u32),
    ) -> Result<()> {
        let file = types::Fixed(u32::from(file));
        let count = u32::try_from(iovecs.len()).expect("a transfer has at most 1024 buffers");
        let entry = match (write, iovecs) {
            (true, [one]) => {
                let len = u32::try_from(one.iov_len).expect("a request has at most 4 GiB");
                opcode::Write::new(file, one.iov_base.cast(), len).offset(offset).build()
            }
            (false, [one]) => {
                let len = u32::try_from(one.iov_len).expect("a request has at most 4 GiB");
                opcode::Read::new(file, one.iov_base.cast(), len).offset(offset).build()
            }
            (true, many) => opcode::Writev::new(file, many.as_ptr(), count).offset(offset).build(),
            (false, many) => opcode::Readv::new(file, many.as_ptr(), count).offset(offset).build(),
        };
        self.push(&entry.user_data(u64::from(slot) << 32 | u64::from(part)))
    }

    /// Syncs the data of a file.
    pub(super) fn sync(&mut self, file: u16, slot: u32) -> Result<()> {
        let entry = opcode::Fsync::new(types::Fixed(u32::from(file)))
            .flags(types::FsyncFlags::DATASYNC)
            .build();
        self.push(&entry.user_data(u64::from(slot) << 32))
    }

    /// Watches a doorbell.
    pub(super) fn watch(&mut self, bell: Bell, fd: BorrowedFd<'_>) -> Result<()> {
        let events = u32::from(libc::POLLIN.unsigned_abs());
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events).multi(true).build();
        self.push(&entry.user_data(BELL | bell as u64))
    }

    /// How much of what was made the kernel does not have yet.
    pub(super) fn unsubmitted(&self) -> u32 {
        self.unsubmitted
    }

    /// Hands what was made to the kernel, without waiting.
    pub(super) fn submit(&mut self) -> Result<()> {
        if self.unsubmitted > 0 {
            self.enter(0, None)?;
        }
        Ok(())
    }

    /// Hands what was made to the kernel and waits until something completes or time is up.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> Result<()> {
        self.enter(1, timeout)
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> Result<()> {
        let time = timeout.map(types::Timespec::from);
        let entered = match &time {
            Some(time) => {
                let args = types::SubmitArgs::new().timespec(time);
                self.ring.submitter().submit_with_args(want, &args)
            }
            None => self.ring.submit_and_wait(want),
        };
        self.unsubmitted = u32::try_from(self.ring.submission().len()).unwrap_or(0);
        match entered {
            Ok(_) => Ok(()),
            Err(e) => match e.raw_os_error() {
                // Nothing completed in time, a signal came, or completions must be taken first.
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(Error::from(e).tried("submit to a ring")),
            },
        }
    }

    /// Whether a completion waits. Two loads when there is none.
    pub(super) fn has_completions(&mut self) -> bool {
        if !self.ring.completion().is_empty() {
            return true;
        }
        if self.ring.submission().taskrun() {
            // SAFETY: no argument is passed, so nothing can dangle. A failure means that nothing
            // was run, and the next call finds it.
            let _ = unsafe {
                let flags = EnterFlags::GETEVENTS.bits();
                self.ring.submitter().enter::<libc::sigset_t>(0, 0, flags, None)
            };
            return !self.ring.completion().is_empty();
        }
        false
    }

    /// The next completion.
    pub(super) fn next(&mut self) -> Option<Done> {
        let entry = self.ring.completion().next()?;
        let (data, result) = (entry.user_data(), entry.result());
        if data & BELL == 0 {
            let (slot, part) = ((data >> 32) as u32, (data & 0xffff_ffff) as u32);
            return Some(Done::Transfer { slot, part, result });
        }
        let bell = match data & !BELL {
            0 => Bell::Kick,
            1 => Bell::Control,
            _ => Bell::Mail,
        };
        Some(Done::Bell { bell, again: cqueue::more(entry.flags()), result })
    }
}
