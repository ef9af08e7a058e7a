//! `disk read`, `disk write`, `disk discard`: a part of a disk by bytes.
//!
//! The engine works in sectors of 512 bytes. A write that begins or ends inside one reads it first;
//! nobody else has the store meanwhile.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;

use blockd::disk::Disk;
use blockd::store::Access;
use blockd::store::buf::AlignedBuf;
use format::limits::SECTOR;
use format::units::index;
use format::{Context as _, Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;

use super::Session;
use crate::cli::{Discard, Range, Write};
use crate::output::{Outcome, Verdict, write_object, wrote};
use crate::progress::Progress;
use crate::signals;
use crate::size::show;

/// Bytes moved at once.
const PIECE: u64 = 1 << 20;

#[derive(Serialize)]
struct Moved<'a> {
    disk: &'a str,
    offset: u64,
    length: u64,
}

/// The end of a range inside a disk.
fn end_of(disk: &Disk, offset: u64, length: u64) -> Result<u64> {
    let size = disk.size();
    let end = offset.checked_add(length).filter(|end| *end <= size);
    end.ok_or_else(|| {
        Error::invalid(format!("{length} bytes from {offset} pass its end, at {size}"))
    })
}

/// `disk read`
pub fn read(s: &Session, args: &Range) -> Outcome {
    let dir = s.open(Access::Read)?;
    let object = || format!("disk {}", args.name);
    let disk = s.disk(&dir, &args.name, args.tail)?;
    let length = args.length.unwrap_or(disk.size().saturating_sub(args.offset));
    let end = end_of(&disk, args.offset, length).context("read", object)?;
    let progress = Progress::new(s.out, "reading");
    progress.expect(|| Ok::<u64, Error>(length))?;
    let mut out = io::stdout().lock();
    let mut buf = AlignedBuf::zeroed(index(PIECE));
    let mut at = args.offset;
    while at < end {
        let from = at / SECTOR * SECTOR;
        let to = (from + PIECE).min(end.next_multiple_of(SECTOR));
        let bytes = &mut buf[..index(to - from)];
        disk.read(0, from, bytes).context("read", object)?;
        let stop = to.min(end);
        wrote(out.write_all(&bytes[index(at - from)..index(stop - from)]))?;
        progress.add(stop - at);
        at = stop;
    }
    wrote(out.flush())?;
    if s.out.json {
        let moved = Moved { disk: &args.name, offset: args.offset, length };
        wrote(write_object(io::stderr().lock(), &moved))?;
    }
    Ok(Verdict::Done)
}

/// `disk write`
pub fn write(s: &Session, args: &Write) -> Outcome {
    let dir = s.open(Access::Write)?;
    let object = || format!("disk {}", args.name);
    let disk = s.disk_as(&dir, &args.name, args.tail, Access::Write)?;
    let progress = Progress::new(s.out, "writing");
    let mut length = 0;
    let copied = copy_in(&disk, args, &mut length, &progress).context("write", object);
    // What was written is made durable also when it is not all; the first error is the one to tell.
    let closed = disk.close().context("write", object);
    copied.and(closed).map_err(|e| match e.kind() {
        Kind::NoSpace => {
            let name = &args.name;
            e.hint(format!(
                "free some, then `offshoot disk repair {name}` frees what was unflushed"
            ))
        }
        _ => e,
    })?;
    drop(progress);
    let moved = Moved { disk: &args.name, offset: args.offset, length };
    s.out.confirm(&moved, || {
        format!("wrote {length} bytes at {} of disk {}", args.offset, args.name)
    })?;
    Ok(Verdict::Done)
}

fn copy_in(disk: &Disk, args: &Write, length: &mut u64, progress: &Progress) -> Result<()> {
    let size = disk.size();
    let end = match args.length {
        Some(length) => end_of(disk, args.offset, length)?,
        None => end_of(disk, args.offset, 0).map(|_| size)?,
    };
    let mut buf = vec![0; index(PIECE)];
    let mut at = args.offset;
    while at < end {
        let want = (PIECE - at % PIECE).min(end - at);
        let got = read_input(&mut buf[..index(want)])?;
        write_bytes(disk, at, &buf[..got])?;
        at += got as u64;
        *length += got as u64;
        progress.add(got as u64);
        if (got as u64) < want {
            return Ok(());
        }
    }
    if args.length.is_none() && read_input(&mut buf[..1])? > 0 {
        let reason = format!("the input goes on past its end, at {size}");
        return Err(Error::invalid(reason).hint("what fits was written"));
    }
    Ok(())
}

/// Fills `buf` from standard input; less only at its end.
fn read_input(buf: &mut [u8]) -> Result<usize> {
    let context = |e: io::Error| Error::from(e).tried("read").on("standard input");
    let mut input = io::stdin().lock();
    let mut got = 0;
    while got < buf.len() {
        wait_for_input()?;
        match input.read(&mut buf[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(context(e)),
        }
    }
    Ok(got)
}

/// Waits until there is input, or its end, or a signal: a read that waits would not see a signal.
fn wait_for_input() -> Result<()> {
    let tick = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    let stdin = io::stdin();
    loop {
        signals::check()?;
        let mut fds = [PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&tick)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(Error::from(io::Error::from(e)).tried("wait for").on("input")),
        }
    }
}

/// Writes bytes at any offset.
fn write_bytes(disk: &Disk, at: u64, bytes: &[u8]) -> Result<()> {
    let end = at + bytes.len() as u64;
    let (from, to) = (at / SECTOR * SECTOR, end.next_multiple_of(SECTOR));
    if bytes.is_empty() {
        return Ok(());
    }
    if (from, to) == (at, end) {
        return disk.write(0, at, bytes);
    }
    let mut whole = AlignedBuf::zeroed(index(to - from));
    let len = whole.len();
    if from < at {
        disk.read(0, from, &mut whole[..index(SECTOR)])?;
    }
    if to > end {
        disk.read(0, to - SECTOR, &mut whole[len - index(SECTOR)..])?;
    }
    whole[index(at - from)..index(end - from)].copy_from_slice(bytes);
    disk.write(0, from, &whole)
}

/// `disk discard`
pub fn discard(s: &Session, args: &Discard) -> Outcome {
    let dir = s.open(Access::Write)?;
    let object = || format!("disk {}", args.name);
    let disk = s.disk_as(&dir, &args.name, args.tail, Access::Write)?;
    let done = disk.discard(0, args.offset, args.length).context("discard", object);
    let closed = disk.close().context("discard", object);
    done.and(closed)?;
    let moved = Moved { disk: &args.name, offset: args.offset, length: args.length };
    s.out.confirm(&moved, || {
        format!("discarded {} at {} of disk {}", show(args.length), args.offset, args.name)
    })?;
    Ok(Verdict::Done)
}
