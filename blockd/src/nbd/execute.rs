//! Serving one command: the calls to the export, and the reply.
//!
//! Order: a write's reply is sent after the export's call returned, with FUA after it is durable;
//! a chunk of data is sent only after all of it was read, so that no reply ever has to be taken
//! back.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use format::{Error, Result};

use super::buffers::{Buffer, Buffers};
use super::command::{Command, Limits};
use super::contexts::Context;
use super::negotiate::clip;
use super::status::collect;
use super::wire::command::READ;
use super::wire::{Errno, Request, Style, chunk, chunk_header, simple_reply};
use super::{BlockStatus, Export, Extent, STATE_ZERO, Visit};

/// Bytes read into one data chunk, where the client lets us choose.
const CHUNK_MAX: u64 = 1 << 20;

/// Where replies go. `head` and `data` together are one message; it is not mixed with others.
pub trait Replies {
    /// Sends a message.
    ///
    /// # Errors
    /// The client is gone.
    fn send(&self, head: &[u8], data: &[u8]) -> io::Result<()>;
}

/// What commands of a connection work on.
pub struct Executor<'a> {
    pub export: &'a dyn Export,
    pub limits: &'a Limits,
    pub contexts: &'a [Context],
    pub buffers: &'a Buffers,
    /// Time spent in reads and writes of the export; sending replies is the client's time.
    pub spent: Cell<Duration>,
}

struct AllocationOf<'a>(&'a dyn Export);

impl BlockStatus for AllocationOf<'_> {
    fn extents(&self, offset: u64, len: u64, visit: &mut Visit<'_>) -> Result<()> {
        self.0.allocation(offset, len, visit)
    }
}

/// An error for the client: the number, a message, and where.
pub struct Failure {
    pub errno: Errno,
    message: String,
    offset: Option<u64>,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Failure { errno, message: String::new(), offset: None }
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        // The reason alone: what object and cause would add concerns the host, not the client.
        Failure { errno: Errno::of(e.kind()), message: e.reason().to_owned(), offset: None }
    }
}

/// How serving a command ended, when the client still listens.
pub type Served = std::result::Result<(), Errno>;

impl Executor<'_> {
    /// Serves a command and replies. `payload` is the data of a write.
    ///
    /// # Errors
    /// The client is gone.
    pub fn run(
        &self,
        request: &Request,
        command: &Command,
        payload: Option<Buffer<'_>>,
        to: &dyn Replies,
    ) -> io::Result<Served> {
        let done = match *command {
            Command::Read { offset, len, whole } => {
                return self.read(request, (offset, len), whole, to);
            }
            Command::BlockStatus { offset, len, one } => {
                return self.block_status(request, (offset, len), one, to);
            }
            Command::Write { offset, fua } => {
                let data = payload.as_deref().unwrap_or_default();
                self.timed(|| self.export.write(offset, data, fua))
            }
            Command::Flush => self.export.flush(),
            Command::Trim { offset, len, fua } => self.export.trim(offset, len, fua),
            Command::WriteZeroes { offset, len, unmap, fast, .. }
                if fast && !self.export.zeroes_fast(offset, len, unmap) =>
            {
                return self.fail(request, Errno::NotSup.into(), to);
            }
            Command::WriteZeroes { offset, len, unmap, fua, .. } => {
                self.export.write_zeroes(offset, len, unmap, fua)
            }
            Command::Disconnect => return Ok(Ok(())),
        };
        drop(payload);
        match done {
            Ok(()) => self.succeed(request, to),
            Err(e) => self.fail(request, e.into(), to),
        }
    }

    fn timed<T>(&self, call: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let outcome = call();
        self.spent.set(self.spent.get() + begun.elapsed());
        outcome
    }

    fn extended(&self) -> bool {
        self.limits.style == Style::Extended
    }

    fn succeed(&self, request: &Request, to: &dyn Replies) -> io::Result<Served> {
        let mut head = Vec::with_capacity(32);
        // With compact headers the shorter reply is allowed to everything but a read.
        let simple = match self.limits.style {
            Style::Simple => true,
            Style::Structured => request.command != READ,
            Style::Extended => false,
        };
        if simple {
            simple_reply(&mut head, request.cookie, 0);
        } else {
            let kind = (chunk::NONE, chunk::DONE);
            chunk_header(&mut head, request, self.extended(), kind, 0);
        }
        to.send(&head, &[])?;
        Ok(Ok(()))
    }

    /// Replies with an error.
    ///
    /// # Errors
    /// The client is gone.
    pub fn fail(
        &self,
        request: &Request,
        failure: Failure,
        to: &dyn Replies,
    ) -> io::Result<Served> {
        let mut head = Vec::with_capacity(64);
        let number = failure.errno as u32;
        if self.limits.style == Style::Simple {
            simple_reply(&mut head, request.cookie, number);
        } else {
            let message = clip(&failure.message);
            let kind = failure.offset.map_or(chunk::ERROR, |_| chunk::ERROR_OFFSET);
            let len = 6 + message.len() + failure.offset.map_or(0, |_| 8);
            chunk_header(&mut head, request, self.extended(), (kind, chunk::DONE), len as u64);
            head.extend(number.to_be_bytes());
            head.extend(u16::try_from(message.len()).expect("a short message").to_be_bytes());
            head.extend(message);
            head.extend(failure.offset.map(u64::to_be_bytes).into_iter().flatten());
        }
        to.send(&head, &[])?;
        Ok(Err(failure.errno))
    }

    fn read(
        &self,
        request: &Request,
        (offset, len): (u64, u64),
        whole: bool,
        to: &dyn Replies,
    ) -> io::Result<Served> {
        if len == 0 {
            return self.succeed(request, to);
        }
        if self.limits.style == Style::Simple {
            let mut data = self.buffers.take(bytes(len));
            if let Err(e) = self.timed(|| self.export.read(offset, &mut data)) {
                return self.fail(request, e.into(), to);
            }
            let mut head = Vec::with_capacity(16);
            simple_reply(&mut head, request.cookie, 0);
            to.send(&head, &data)?;
            return Ok(Ok(()));
        }
        let pieces = self.pieces((offset, len), whole);
        let mut at = offset;
        for piece in pieces {
            let last = at + piece.len == offset + len;
            let sent = if piece.flags & STATE_ZERO != 0 {
                self.send_hole(request, (at, piece.len), last, to)
            } else {
                self.send_data(request, (at, piece.len), last, to)
            };
            if let Err(e) = sent? {
                let failure = Failure { offset: Some(at), ..Failure::from(e) };
                return self.fail(request, failure, to);
            }
            at += piece.len;
        }
        Ok(Ok(()))
    }

    /// How a read is cut into chunks: all of its range, in order.
    fn pieces(&self, (offset, len): (u64, u64), whole: bool) -> Vec<Extent> {
        let found = collect(&AllocationOf(self.export), offset, len, false).unwrap_or_default();
        let covered: u64 = found.iter().map(|e| e.len).sum();
        // What the map cannot tell is read: the read says what is wrong with it.
        let rest = Extent { len: len - covered, flags: 0 };
        if whole {
            let zero = covered == len && found.iter().all(|e| e.flags & STATE_ZERO != 0);
            return vec![Extent { len, flags: if zero { STATE_ZERO } else { 0 } }];
        }
        let mut pieces = Vec::with_capacity(found.len());
        for Extent { mut len, flags } in found.into_iter().chain([rest]) {
            let most = if flags & STATE_ZERO != 0 { u64::MAX } else { CHUNK_MAX };
            while len > 0 {
                pieces.push(Extent { len: len.min(most), flags });
                len -= len.min(most);
            }
        }
        pieces
    }

    fn send_hole(
        &self,
        request: &Request,
        (offset, len): (u64, u64),
        last: bool,
        to: &dyn Replies,
    ) -> io::Result<Result<()>> {
        let flags = if last { chunk::DONE } else { 0 };
        let mut head = Vec::with_capacity(48);
        chunk_header(&mut head, request, self.extended(), (chunk::OFFSET_HOLE, flags), 12);
        head.extend(offset.to_be_bytes());
        head.extend(u32::try_from(len).expect("reads are short").to_be_bytes());
        to.send(&head, &[])?;
        Ok(Ok(()))
    }

    fn send_data(
        &self,
        request: &Request,
        (offset, len): (u64, u64),
        last: bool,
        to: &dyn Replies,
    ) -> io::Result<Result<()>> {
        let mut data = self.buffers.take(bytes(len));
        if let Err(e) = self.timed(|| self.export.read(offset, &mut data)) {
            return Ok(Err(e));
        }
        let flags = if last { chunk::DONE } else { 0 };
        let mut head = Vec::with_capacity(48);
        let kind = (chunk::OFFSET_DATA, flags);
        chunk_header(&mut head, request, self.extended(), kind, 8 + len);
        head.extend(offset.to_be_bytes());
        to.send(&head, &data)?;
        Ok(Ok(()))
    }

    fn block_status(
        &self,
        request: &Request,
        (offset, len): (u64, u64),
        one: bool,
        to: &dyn Replies,
    ) -> io::Result<Served> {
        let mut answers = Vec::with_capacity(self.contexts.len());
        for context in self.contexts {
            match collect(context.status.as_ref(), offset, len, one) {
                Ok(extents) => answers.push(extents),
                Err(e) => return self.fail(request, e.into(), to),
            }
        }
        for (id, extents) in (0u32..).zip(&answers) {
            let last = index_of_last(&answers) == id;
            let body = self.status_body(id, extents);
            let mut head = Vec::with_capacity(32);
            let kind = if self.extended() { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
            let flags = if last { chunk::DONE } else { 0 };
            let len = body.len() as u64;
            chunk_header(&mut head, request, self.extended(), (kind, flags), len);
            to.send(&head, &body)?;
        }
        Ok(Ok(()))
    }

    fn status_body(&self, id: u32, extents: &[Extent]) -> Vec<u8> {
        let mut body = Vec::with_capacity(8 + 16 * extents.len());
        body.extend(id.to_be_bytes());
        if self.extended() {
            let count = u32::try_from(extents.len()).expect("bounded by what is collected");
            body.extend(count.to_be_bytes());
        }
        for extent in extents {
            if self.extended() {
                body.extend(extent.len.to_be_bytes());
                body.extend(u64::from(extent.flags).to_be_bytes());
            } else {
                // Compact requests are shorter than 4 GiB, and extents no longer than requests.
                let len = u32::try_from(extent.len).expect("no longer than the request");
                body.extend(len.to_be_bytes());
                body.extend(extent.flags.to_be_bytes());
            }
        }
        body
    }
}

fn index_of_last(answers: &[Vec<Extent>]) -> u32 {
    u32::try_from(answers.len()).expect("few contexts").saturating_sub(1)
}

fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("bounded by the largest payload")
}
