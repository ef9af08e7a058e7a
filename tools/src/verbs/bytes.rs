//! `disk read`, `disk write`, `disk discard`: a part of a disk by bytes.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;

use blockd::api::types::{ByteRange, Moved, SessionUse};
use blockd::pump::Watch as _;
use blockd::store::Access;
use blockd::store::buf::AlignedBuf;
use blockd::verbs::check_end;
use format::limits::SECTOR;
use format::units::index;
use format::{Context as _, Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::Session;
use crate::cli::{Discard, Range, Write};
use crate::output::{Outcome, Verdict, write_object, wrote};
use crate::progress::Progress;
use crate::signals;
use crate::size::show;
use crate::store::Writing;

/// Bytes moved at once.
const PIECE: u64 = 1 << 20;

/// `disk read`
pub fn read(s: &Session, args: &Range) -> Outcome {
    let store = s.open(Access::Read)?;
    let object = || format!("disk {}", args.name);
    let disk = store.open(&args.name, SessionUse::Read, args.tail.accept_lost_tail)?;
    let length = args.length.unwrap_or(disk.size().saturating_sub(args.offset));
    let end = check_end(disk.size(), args.offset, length).context("read", object)?;
    let progress = Progress::new(s.out, "reading");
    progress.expect(length);
    let mut out = io::stdout().lock();
    let mut buf = AlignedBuf::zeroed(index(PIECE));
    let mut at = args.offset;
    while at < end {
        let from = at / SECTOR * SECTOR;
        let to = (from + PIECE).min(end.next_multiple_of(SECTOR));
        let bytes = &mut buf[..index(to - from)];
        disk.read_at(0, from, bytes).context("read", object)?;
        let stop = to.min(end);
        wrote(out.write_all(&bytes[index(at - from)..index(stop - from)]))?;
        progress.add(stop - at);
        at = stop;
    }
    wrote(out.flush())?;
    if s.out.json {
        let moved = Moved { disk: args.name.clone(), offset: args.offset, length };
        wrote(write_object(io::stderr().lock(), &moved))?;
    }
    Ok(Verdict::Done)
}

/// `disk write`
pub fn write(s: &Session, args: &Write) -> Outcome {
    let store = s.open(Access::Write)?;
    let object = || format!("disk {}", args.name);
    let disk = store.open_for_writing(&args.name, args.tail.accept_lost_tail)?;
    let progress = Progress::new(s.out, "writing");
    let mut length = 0;
    let copied = copy_in(&*disk, args, &mut length, &progress).context("write", object);
    // What was written is made durable also when it is not all; the first error is the one to tell.
    let closed = disk.finish().context("write", object);
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
    let moved = Moved { disk: args.name.clone(), offset: args.offset, length };
    s.out.confirm(&moved, || {
        format!("wrote {length} bytes at {} of disk {}", args.offset, args.name)
    })?;
    Ok(Verdict::Done)
}

fn copy_in(disk: &dyn Writing, args: &Write, length: &mut u64, progress: &Progress) -> Result<()> {
    let size = disk.size();
    let end = match args.length {
        Some(length) => check_end(size, args.offset, length)?,
        None => check_end(size, args.offset, 0).map(|_| size)?,
    };
    let mut buf = vec![0; index(PIECE)];
    let mut at = args.offset;
    while at < end {
        let want = (PIECE - at % PIECE).min(end - at);
        let got = read_input(&mut buf[..index(want)])?;
        disk.write(at, &buf[..got])?;
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

/// `disk discard`
pub fn discard(s: &Session, args: &Discard) -> Outcome {
    let store = s.open(Access::Write)?;
    let range = ByteRange { offset: args.offset, length: args.length };
    let moved = store.discard(&args.name, range, args.tail.accept_lost_tail)?;
    s.out.confirm(&moved, || {
        format!("discarded {} at {} of disk {}", show(args.length), args.offset, args.name)
    })?;
    Ok(Verdict::Done)
}
