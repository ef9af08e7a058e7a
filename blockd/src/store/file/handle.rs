//! One open file of a [`super::FileStore`].
//!
//! - A single range goes through `pread`/`pwrite`: one system call, as cheap as a ring of one.
//! - A batch on a direct file goes through a ring, so that the device sees all of it at once, and
//!   so does a batch of buffered reads, where the ring overlaps what is not in the page cache.
//! - A batch of buffered writes goes through `pwrite`: it is a copy into the page cache under the
//!   inode's lock either way, and a ring hands each one to a kernel thread first on file systems
//!   that cannot write without waiting.
//! - Long writes into the page cache take turns and go in steps: the kernel lets in one at a time,
//!   under the inode's lock, and whoever waits for that lock spins as long as its holder runs.
//! - On a direct file, ranges that are not aligned take the detour of [`super::bounce`]. Such
//!   writes and length changes hold `growth` exclusively, aligned writes and punches share it, so
//!   within one handle a read-modify-write excludes all other changes. Across handles the caller
//!   excludes changes to one 4 KiB block, and of the length, at the same time as an unaligned
//!   write.

use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Context, Error, Kind, Result};
use io_uring::{opcode, squeue, types};
use parking_lot::{Mutex, RwLock};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{Advice, FallocateFlags, Mode, SeekFrom, Stat};
use rustix::io::{Errno, pread, retry_on_intr};

use super::super::{File, RawFile, ReadOp, WriteOp, range_end};
use super::bounce::{self, Align};
use super::clone;
use super::host;
use super::lock::LockKind;
use super::ring::{Batch, Rings};

/// How long to wait for the I/O that a killed process left with the kernel.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);
const LOCK_WAIT_STEP: Duration = Duration::from_millis(5);

/// Largest single transfer handed to the kernel, which itself stops short of 2 GiB.
const TRANSFER_MAX: usize = 1 << 30;

/// From how many bytes on a write into the page cache waits for its turn.
const LONG_WRITE: usize = 256 << 10;
/// Bytes of one write into the page cache. For a larger one the kernel looks for larger pieces of
/// memory than it may find at once.
const CACHED_STEP: usize = 512 << 10;

pub(super) struct FileHandle {
    pub(super) fd: OwnedFd,
    /// Full path, for messages.
    pub(super) path: String,
    pub(super) writable: bool,
    /// `None`: through the page cache.
    pub(super) direct: Option<Align>,
    pub(super) growth: RwLock<()>,
    /// Held during a long write into the page cache; nothing else is taken under it.
    pub(super) turn: Mutex<()>,
    pub(super) rings: Arc<Rings>,
}

/// Adds what every error of a range must say.
fn on_range(e: Error, verb: &str, len: usize, offset: u64, path: &str) -> Error {
    e.tried(format!("{verb} {len} bytes at offset {offset} of")).on(path)
}

fn ends_early() -> Error {
    Error::corrupt("the file ends early")
}

impl FileHandle {
    /// True when the range can go to the kernel as it is.
    fn fits(&self, buf: &[u8], offset: u64) -> bool {
        self.direct.is_none_or(|align| align.fits(buf, offset))
    }

    fn stat(&self) -> Result<Stat> {
        let stat = rustix::fs::fstat(&self.fd);
        stat.map_err(host).context("read the size of", || self.path.clone())
    }

    fn check_writable(&self, tried: &'static str) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(Kind::ReadOnly, "the file was opened for reading only")
            .tried(tried)
            .on(self.path.as_str()))
    }

    /// Also keeps offsets away from the kernel that it takes for "at the current position".
    fn check_range(&self, verb: &str, offset: u64, buf: &[u8]) -> Result<()> {
        range_end(offset, buf.len() as u64)
            .map(|_| ())
            .map_err(|e| on_range(e, verb, buf.len(), offset, &self.path))
    }

    /// Fills `buf` by plain calls.
    fn read_plain(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let (at, rest) = (offset + done as u64, &mut buf[done..]);
            let got = match self.direct.filter(|align| !align.fits(rest, at)) {
                Some(align) => {
                    match bounce::read(self.fd.as_fd(), align, at, rest).map_err(host)? {
                        got if got < rest.len() => 0,
                        got => got,
                    }
                }
                None => retry_on_intr(|| pread(&self.fd, &mut *rest, at)).map_err(host)?,
            };
            if got == 0 {
                return Err(ends_early());
            }
            done += got;
        }
        Ok(())
    }

    /// Writes `buf`, aligned or not, taking the lock that its shape needs.
    fn write_plain(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let fd = self.fd.as_fd();
        let written = match self.direct {
            None => {
                let _turn = (buf.len() >= LONG_WRITE).then(|| self.turn.lock());
                let mut steps = (offset..).step_by(CACHED_STEP).zip(buf.chunks(CACHED_STEP));
                steps.try_for_each(|(at, step)| bounce::write_all(fd, at, step))
            }
            Some(align) if align.splits_block(buf.len(), offset) => {
                let _alone = self.growth.write();
                bounce::write(fd, align, offset, buf)
            }
            Some(align) => {
                let _shared = self.growth.read();
                match align.fits(buf, offset) {
                    true => bounce::write_all(fd, offset, buf),
                    false => bounce::write(fd, align, offset, buf),
                }
            }
        };
        written.map_err(host)
    }
}

impl File for FileHandle {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len();
        self.check_range("read", offset, buf)?;
        self.read_plain(offset, buf).map_err(|e| on_range(e, "read", len, offset, &self.path))
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check_writable("write")?;
        self.check_range("write", offset, buf)?;
        self.write_plain(offset, buf)
            .map_err(|e| on_range(e, "write", buf.len(), offset, &self.path))
    }

    fn read_many(&self, ops: &mut [ReadOp<'_>]) -> Result<()> {
        for op in &*ops {
            self.check_range("read", op.offset, op.buf)?;
        }
        if ops.len() < 2 || self.rings.run(&mut Reads { file: self, ops }).transpose()?.is_none() {
            return ops.iter_mut().try_for_each(|op| self.read_at(op.offset, op.buf));
        }
        let mut left = ops.iter_mut().filter(|op| !self.fits(op.buf, op.offset));
        left.try_for_each(|op| self.read_at(op.offset, op.buf))
    }

    fn write_many(&self, ops: &[WriteOp<'_>]) -> Result<()> {
        let one_by_one = || ops.iter().try_for_each(|op| self.write_at(op.offset, op.buf));
        self.check_writable("write")?;
        for op in ops {
            self.check_range("write", op.offset, op.buf)?;
        }
        if ops.len() < 2 || self.direct.is_none() {
            return one_by_one();
        }
        let shared = self.growth.read();
        let ran = self.rings.run(&mut Writes { file: self, ops }).transpose()?;
        drop(shared);
        if ran.is_none() {
            return one_by_one();
        }
        let mut left = ops.iter().filter(|op| !self.fits(op.buf, op.offset));
        left.try_for_each(|op| self.write_at(op.offset, op.buf))
    }

    fn sync(&self) -> Result<()> {
        let synced = retry_on_intr(|| rustix::fs::fdatasync(&self.fd));
        synced.map_err(host).context("sync", || self.path.clone())
    }

    fn write_behind(&self) {
        if self.direct.is_none() {
            // Writes out what is dirty, without waiting, and drops what is clean. Not a call that
            // waits: that could take note of a failed transfer for this handle, and then the sync
            // that has to report the failure would succeed.
            let _ = rustix::fs::fadvise(&self.fd, 0, None, Advice::DontNeed);
        }
    }

    fn write_out(&self) {
        if self.direct.is_none() {
            let (fd, begin) = (self.fd.as_raw_fd(), libc::SYNC_FILE_RANGE_WRITE);
            // It takes no note of a failed transfer either: it waits for none.
            // SAFETY: the descriptor is open as long as `self` is, and no memory is handed over.
            let _ = unsafe { libc::sync_file_range(fd, 0, 0, begin) };
        }
    }

    fn size(&self) -> Result<u64> {
        Ok(self.stat()?.st_size.cast_unsigned())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check_writable("change the length of")?;
        let _alone = self.growth.write();
        range_end(0, len)
            .and_then(|_| retry_on_intr(|| rustix::fs::ftruncate(&self.fd, len)).map_err(host))
            .map_err(|e| e.tried(format!("set a length of {len} bytes for")).on(&*self.path))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable("punch a hole into")?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punch = || {
            range_end(offset, len)?;
            let _shared = self.growth.read();
            match len {
                0 => Ok(()),
                _ => retry_on_intr(|| rustix::fs::fallocate(&self.fd, flags, offset, len))
                    .map_err(host),
            }
        };
        punch().map_err(|e| {
            e.tried(format!("punch a hole of {len} bytes at offset {offset} into")).on(&*self.path)
        })
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable("reserve space in")?;
        let reserve = || match range_end(offset, len) {
            Ok(_) if len == 0 => Ok(()),
            Ok(_) => {
                let keep = FallocateFlags::KEEP_SIZE;
                retry_on_intr(|| rustix::fs::fallocate(&self.fd, keep, offset, len)).map_err(host)
            }
            Err(e) => Err(e),
        };
        reserve().map_err(|e| {
            e.tried(format!("reserve {len} bytes at offset {offset} in")).on(&*self.path)
        })
    }

    fn clone_range(&self, source: &dyn File, from: u64, to: u64, len: u64) -> Result<bool> {
        self.check_writable("clone into")?;
        let Some(source) = source.raw() else { return Ok(false) };
        let cloned = || {
            range_end(from, len)?;
            range_end(to, len)?;
            let _shared = self.growth.read();
            clone::range(self.fd.as_fd(), source.fd, (from, to, len)).map_err(host)
        };
        cloned().map_err(|e| {
            e.tried(format!("clone {len} bytes to offset {to} of")).on(self.path.as_str())
        })
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.stat()?.st_blocks.cast_unsigned() * 512)
    }

    fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        let seek = |to| retry_on_intr(|| rustix::fs::seek(&self.fd, to));
        let next = || match range_end(from, 0).map(|from| seek(SeekFrom::Data(from)))? {
            // No data from there on, or the file ends before.
            Err(Errno::NXIO) => Ok(None),
            start => {
                let start = start.map_err(host)?;
                let end = seek(SeekFrom::Hole(start)).map_err(host)?;
                Ok((start < end).then_some((start, end)))
            }
        };
        next().map_err(|e: Error| {
            e.tried(format!("look for data from offset {from} on in")).on(&*self.path)
        })
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        let readers = Mode::RUSR | Mode::RGRP | Mode::ROTH;
        let mode = if read_only { readers } else { readers | Mode::WUSR };
        // The permission bits are not part of what fdatasync promises.
        retry_on_intr(|| rustix::fs::fchmod(&self.fd, mode))
            .and_then(|()| retry_on_intr(|| rustix::fs::fsync(&self.fd)))
            .map_err(host)
            .context("change the permissions of", || self.path.clone())
    }

    fn lock(&self) -> Result<()> {
        let deadline = Instant::now() + LOCK_WAIT_MAX;
        loop {
            match super::lock::set(self.fd.as_fd(), LockKind::Exclusive, &self.path) {
                Err(e) if e.kind() == Kind::Busy && Instant::now() < deadline => {
                    std::thread::sleep(LOCK_WAIT_STEP);
                }
                // Without locks on the file system, the lock of the store has to do.
                Err(e) if e.kind() == Kind::Unsupported => return Ok(()),
                outcome => return outcome,
            }
        }
    }

    fn unlock(&self) -> Result<()> {
        match super::lock::clear(self.fd.as_fd(), &self.path) {
            Err(e) if e.kind() == Kind::Unsupported => Ok(()),
            outcome => outcome,
        }
    }

    fn forget_cached(&self) -> Result<()> {
        retry_on_intr(|| rustix::fs::fadvise(&self.fd, 0, None, Advice::DontNeed))
            .map_err(host)
            .context("drop the cache of", || self.path.clone())
    }

    fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    fn raw(&self) -> Option<RawFile<'_>> {
        let (memory_align, offset_align) =
            self.direct.map_or((1, 1), |align| (align.memory, align.offset as u64));
        Some(RawFile { fd: self.fd.as_fd(), memory_align, offset_align })
    }
}

struct Reads<'a, 'b> {
    file: &'a FileHandle,
    ops: &'a mut [ReadOp<'b>],
}

// SAFETY: the buffers are borrowed, mutably, for as long as the implementor is, and a `ReadOp` with
// an operation in flight is not looked into: `rest` reads the length of the slice only.
unsafe impl Batch for Reads<'_, '_> {
    fn count(&self) -> usize {
        self.ops.len()
    }

    fn rest(&self, op: usize, done: usize) -> usize {
        self.ops[op].buf.len().saturating_sub(done)
    }

    fn entry(&mut self, op: usize, done: usize) -> Option<squeue::Entry> {
        let ReadOp { offset, buf } = &mut self.ops[op];
        let (at, rest) = (*offset + done as u64, &mut buf[done..]);
        if rest.is_empty() || !self.file.fits(rest, at) {
            return None;
        }
        let fd = types::Fd(self.file.fd.as_raw_fd());
        let entry = opcode::Read::new(fd, rest.as_mut_ptr(), transfer(rest.len()));
        Some(entry.offset(at).build())
    }

    fn finish(&mut self, op: usize, done: usize) -> Result<()> {
        let ReadOp { offset, buf } = &mut self.ops[op];
        let at = *offset + done as u64;
        self.file.read_at(at, &mut buf[done..])
    }

    fn failed(&self, op: usize, done: usize, errno: Errno) -> Error {
        let at = self.ops[op].offset + done as u64;
        on_range(host(errno), "read", self.rest(op, done), at, &self.file.path)
    }
}

struct Writes<'a, 'b> {
    file: &'a FileHandle,
    ops: &'a [WriteOp<'b>],
}

// SAFETY: the buffers are borrowed, shared, for as long as the implementor is, so nobody writes to
// them; the kernel only reads them.
unsafe impl Batch for Writes<'_, '_> {
    fn count(&self) -> usize {
        self.ops.len()
    }

    fn rest(&self, op: usize, done: usize) -> usize {
        self.ops[op].buf.len().saturating_sub(done)
    }

    fn entry(&mut self, op: usize, done: usize) -> Option<squeue::Entry> {
        let WriteOp { offset, buf } = self.ops[op];
        let (at, rest) = (offset + done as u64, &buf[done..]);
        if rest.is_empty() || !self.file.fits(rest, at) {
            return None;
        }
        let fd = types::Fd(self.file.fd.as_raw_fd());
        let entry = opcode::Write::new(fd, rest.as_ptr(), transfer(rest.len()));
        Some(entry.offset(at).build())
    }

    /// The caller of the ring holds `growth` shared, so this must not take it.
    fn finish(&mut self, op: usize, done: usize) -> Result<()> {
        let WriteOp { offset, buf } = self.ops[op];
        let (at, rest) = (offset + done as u64, &buf[done..]);
        bounce::write_all(self.file.fd.as_fd(), at, rest)
            .map_err(|e| on_range(host(e), "write", rest.len(), at, &self.file.path))
    }

    fn failed(&self, op: usize, done: usize, errno: Errno) -> Error {
        let at = self.ops[op].offset + done as u64;
        on_range(host(errno), "write", self.rest(op, done), at, &self.file.path)
    }
}

/// The length of one entry; what is beyond it goes on as after any short transfer.
fn transfer(len: usize) -> u32 {
    u32::try_from(len.min(TRANSFER_MAX)).expect("the maximum fits")
}
