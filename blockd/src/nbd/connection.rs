//! One connection: the handshake, then requests served by a few threads (`lead.rs`).
//!
//! Invariants:
//! - Memory in flight is bounded by the buffers, threads by the lead; a client that sends without
//!   reading is simply not read from any more.
//! - Replies that wait in `pending` are sent before any thread waits for the client or for memory,
//!   and whenever a thread gives up the lead.
//! - Whatever ends a connection, the last thread that leaves it closes the socket and takes it off
//!   the server's list ([`Place`]).
//!
//! Lock order: lead, `pending`, buffers. None is held during a call to the export.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::buffers::{Buffer, Buffers};
use super::command::Command;
use super::execute::{Executor, Replies};
use super::lead::{Lead, Then};
use super::negotiate::{Agreed, Negotiator, Next, Tls};
use super::server::{Connection, Place};
use super::tls::TlsConfig;
use super::wire::{
    Errno, OPTION_HEADER, OPTION_MAX, OptionHeader, PAYLOAD_MAX, Request, Style, greeting, reply,
};

/// Bytes received at once: a batch of small requests, or a small write.
const INPUT: usize = 64 << 10;
/// Replies are gathered up to this many bytes while more requests are there already.
const PENDING_MAX: usize = 256 << 10;
/// Largest read or write that the reading thread may serve itself.
const QUICK_BYTES_MAX: u64 = 64 << 10;
/// And how long such requests may take on average.
const QUICK_NANOS_MAX: u64 = 50_000;

/// A client that sent nothing while so many slow requests in a row were served is taken to wait for
/// each of its replies.
const ALONE_MIN: u32 = 32;

/// The peer does not follow the protocol.
fn violation() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

/// Serves a client from its first byte to its last.
pub fn serve(place: Place, tls: Option<&TlsConfig>, refusal: Option<&str>) {
    let connection = place.connection();
    let deadline = Instant::now() + place.options().handshake_max;
    // A failure ends the connection; dropping the place closes it and counts it.
    let agreed = Handshake { connection, deadline }.run(&place, tls, refusal);
    if let Ok(Some(agreed)) = agreed {
        place.agreed(agreed.export.name());
        let options = place.options();
        let buffers = Buffers::new(options.bytes_max);
        let lead = Lead::new(Input::new(), options.threads_max);
        let (recent, alone) = (AtomicU64::new(0), AtomicU32::new(0));
        let pending = Mutex::default();
        Arc::new(Session { agreed, lead, pending, buffers, recent, alone, place }).work();
    }
}

struct Handshake<'a> {
    connection: &'a Connection,
    deadline: Instant,
}

impl Handshake<'_> {
    fn run(
        &self,
        place: &Place,
        tls: Option<&TlsConfig>,
        refusal: Option<&str>,
    ) -> io::Result<Option<Agreed>> {
        let stream = &self.connection.stream;
        stream.set_send_timeout(Some(place.options().handshake_max))?;
        let mode = if tls.is_some() { Tls::Required } else { Tls::Never };
        let mut negotiator = Negotiator::new(place.exports(), mode);
        if let Some(message) = refusal {
            negotiator.refuse(reply::ERR_POLICY, message);
        }
        self.send(&greeting())?;
        if !negotiator.client_flags(u32::from_be_bytes(self.recv()?)) {
            return Err(violation());
        }
        let mut data = Vec::new();
        let mut replies = Vec::new();
        loop {
            let header = OptionHeader::decode(&self.recv::<OPTION_HEADER>()?);
            let header = header.ok_or_else(violation)?;
            let len = usize::try_from(header.len).unwrap_or(usize::MAX);
            if len > OPTION_MAX {
                return Err(violation());
            }
            data.resize(len, 0);
            self.recv_exact(&mut data)?;
            if place.stopping() {
                negotiator.refuse(reply::ERR_SHUTDOWN, "the server is stopping");
            }
            replies.clear();
            let next = negotiator.option(header.option, &data, &mut replies);
            self.send(&replies)?;
            match (next, tls) {
                (Next::Option, _) => {}
                (Next::StartTls, Some(tls)) => {
                    let session = tls.session().map_err(io::Error::other)?;
                    stream.start_tls(session, self.deadline)?;
                    negotiator.secured();
                }
                (Next::Transmit(agreed), _) => {
                    stream.set_send_timeout(None)?;
                    return Ok(Some(agreed));
                }
                (Next::Close | Next::StartTls, _) => return Ok(None),
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.connection.stream.send(&mut [IoSlice::new(bytes)])
    }

    fn recv<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.recv_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Receives exactly this much: what follows may be meant for TLS.
    fn recv_exact(&self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.connection.stream.recv(buf, Some(self.deadline))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                got => buf = &mut buf[got..],
            }
        }
        Ok(())
    }
}

/// Bytes received and not yet used.
struct Input {
    buf: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Input {
    fn new() -> Self {
        Input { buf: vec![0; INPUT].into(), from: 0, to: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.buf[self.from..self.to]
    }

    /// Moves what is there into `to`; returns how much.
    fn take(&mut self, to: &mut [u8]) -> usize {
        let count = to.len().min(self.bytes().len());
        to[..count].copy_from_slice(&self.bytes()[..count]);
        self.from += count;
        count
    }
}

/// A request that was read.
struct Work<'a> {
    request: Request,
    command: Result<Command, Errno>,
    payload: Option<Buffer<'a>>,
    /// Another request, or the start of one, has been received.
    more: bool,
}

/// A connection that transmits.
struct Session {
    agreed: Agreed,
    lead: Lead<Input>,
    /// Replies to be sent.
    pending: Mutex<Vec<u8>>,
    buffers: Buffers,
    /// Nanoseconds that small reads and writes took of late, on average.
    recent: AtomicU64,
    /// Slow requests in a row during which the client sent nothing.
    alone: AtomicU32,
    // Last: without it, the server may be taken to be done with the export.
    place: Place,
}

/// Whether the reading thread may serve this itself, if such requests are quick.
fn small(work: &Work<'_>) -> bool {
    let plain = match work.command {
        Ok(Command::Read { .. } | Command::Write { fua: false, .. }) | Err(_) => true,
        Ok(_) => false,
    };
    plain && work.request.len <= QUICK_BYTES_MAX
}

impl Session {
    /// What each thread of the connection does.
    fn work(self: &Arc<Self>) {
        while let Some(input) = self.lead.take() {
            if let Err(e) = self.lead_on(input) {
                self.place.connection().ends(&e);
                self.end();
            }
        }
        // The last one drops the session, and so closes the connection.
    }

    fn end(&self) {
        self.lead.end();
    }

    /// Reads requests and serves them, until the lead goes to another thread.
    fn lead_on(self: &Arc<Self>, mut input: Input) -> io::Result<()> {
        loop {
            let Some(work) = self.next(&mut input)? else {
                self.flush_pending()?;
                self.end();
                return Ok(());
            };
            let small = small(&work);
            // Relaxed: a hint.
            let quick = small && self.recent.load(Ordering::Relaxed) <= QUICK_NANOS_MAX;
            if !quick {
                self.flush_pending()?;
            }
            if !quick && !self.is_alone(&work) {
                let (number, then) = self.lead.hand_over(input);
                self.follow(then);
                let to = ReplyTo { session: self, more: false, slow: Some(number) };
                return self.execute(work, small, &to);
            }
            let (number, then) = self.lead.park(input);
            self.follow(then);
            let to = ReplyTo { session: self, more: work.more, slow: (!quick).then_some(number) };
            let outcome = self.execute(work, small, &to);
            match self.lead.take_back(number) {
                Some(back) => input = back,
                None => {
                    outcome?;
                    return self.flush_pending();
                }
            }
            outcome?;
        }
    }

    /// Whether nobody waits while this thread serves a slow request itself: the client, as far as
    /// is known, waits for the reply. If not, what it sends meanwhile waits for a tick or two.
    fn is_alone(&self, work: &Work<'_>) -> bool {
        // Relaxed: a hint.
        !work.more && self.alone.load(Ordering::Relaxed) >= ALONE_MIN
    }

    /// Takes note of whether the client sent something while a slow request was served, before it
    /// gets the reply; `number` is that of the request's hand-over.
    fn note_company(&self, number: u64) {
        let company = self.lead.number() != number || self.stream().has_input();
        // Relaxed: a hint; a lost update does no harm.
        let alone = self.alone.load(Ordering::Relaxed);
        let alone = if company { 0 } else { alone.saturating_add(1) };
        self.alone.store(alone, Ordering::Relaxed);
    }

    fn follow(self: &Arc<Self>, then: Then) {
        if then == Then::Spawn {
            let session = Arc::clone(self);
            let name = format!("nbd-{}", self.place.connection().id);
            // Without another thread, requests are served one after the other.
            if thread::Builder::new().name(name).spawn(move || session.work()).is_err() {
                self.lead.not_spawned();
            }
        }
    }

    /// Takes note of how long a small request took.
    fn note(&self, took: Duration) {
        // One that waited, for a processor or for the host, says little about the next.
        let took = took.min(Duration::from_nanos(4 * QUICK_NANOS_MAX)).subsec_nanos();
        // Relaxed: a hint; a lost update does no harm.
        let recent = self.recent.load(Ordering::Relaxed);
        self.recent.store(recent / 8 * 7 + u64::from(took) / 8, Ordering::Relaxed);
    }

    fn style(&self) -> Style {
        self.agreed.limits.style
    }

    /// Reads the next request; `None` when there is none and will be none.
    fn next(&self, input: &mut Input) -> io::Result<Option<Work<'_>>> {
        let header = self.style().request_bytes();
        while input.bytes().len() < header {
            if !self.fill(input)? {
                return Ok(None);
            }
        }
        let request = Request::decode(&input.bytes()[..header], self.style());
        let request = request.ok_or_else(violation)?;
        input.from += header;
        let payload = request.payload(self.style());
        if payload > PAYLOAD_MAX {
            return Err(violation());
        }
        let mut command = Command::parse(&request, &self.agreed.limits);
        if command == Ok(Command::Disconnect) {
            return Ok(None);
        }
        if self.place.stopping() {
            command = Err(Errno::Shutdown);
        }
        let payload = match (payload, &command) {
            (0, _) => None,
            (len, Ok(Command::Write { .. })) => Some(self.payload(input, len)?),
            (len, _) => {
                self.skip(input, len)?;
                None
            }
        };
        let more = input.bytes().len() >= header;
        Ok(Some(Work { request, command, payload, more }))
    }

    /// Receives more; false at the end.
    fn fill(&self, input: &mut Input) -> io::Result<bool> {
        self.flush_pending()?;
        input.buf.copy_within(input.from..input.to, 0);
        (input.from, input.to) = (0, input.to - input.from);
        let got = self.stream().recv(&mut input.buf[input.to..], None)?;
        input.to += got;
        Ok(got > 0)
    }

    fn payload(&self, input: &mut Input, len: u64) -> io::Result<Buffer<'_>> {
        let len = usize::try_from(len).map_err(|_| violation())?;
        if len > input.bytes().len() {
            // What follows may wait: for memory, or for the client.
            self.flush_pending()?;
        }
        let mut payload = self.buffers.take(len);
        let mut got = input.take(&mut payload);
        while got < len {
            match self.stream().recv(&mut payload[got..], None)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => got += more,
            }
        }
        Ok(payload)
    }

    /// Receives and forgets the payload of a request that is refused.
    fn skip(&self, input: &mut Input, len: u64) -> io::Result<()> {
        let mut left = usize::try_from(len).map_err(|_| violation())?;
        loop {
            let count = left.min(input.bytes().len());
            input.from += count;
            left -= count;
            if left == 0 {
                return Ok(());
            }
            if !self.fill(input)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn execute(&self, work: Work<'_>, small: bool, to: &ReplyTo<'_>) -> io::Result<()> {
        let Work { request, command, payload, .. } = work;
        let executor = Executor {
            export: self.agreed.export.as_ref(),
            limits: &self.agreed.limits,
            contexts: &self.agreed.contexts,
            buffers: &self.buffers,
            spent: Cell::default(),
        };
        let counted = self.place.connection().counters.begin();
        let served = match command {
            Ok(command) => executor.run(&request, &command, payload, to)?,
            Err(errno) => executor.fail(&request, errno.into(), to)?,
        };
        counted.end(&request, served);
        if small {
            self.note(executor.spent.get());
        }
        Ok(())
    }

    fn stream(&self) -> &super::stream::Stream {
        &self.place.connection().stream
    }

    /// Sends what is pending. When another thread is at it already, it sends this as well, or it
    /// only added to it and calls this afterwards: waiting for it would keep requests unread that
    /// the client may have to get rid of before it reads replies.
    fn flush_pending(&self) -> io::Result<()> {
        match self.pending.try_lock() {
            Some(mut pending) if !pending.is_empty() => self.send(&mut pending, &[], &[]),
            _ => Ok(()),
        }
    }

    /// Sends what is pending and a message behind it; the caller holds the lock of the first.
    fn send(&self, pending: &mut Vec<u8>, head: &[u8], data: &[u8]) -> io::Result<()> {
        let mut parts = [IoSlice::new(pending), IoSlice::new(head), IoSlice::new(data)];
        let sent = self.stream().send(&mut parts);
        pending.clear();
        if sent.is_err() {
            // Half a message may be out: nothing can follow it.
            self.stream().shutdown(Shutdown::Both);
        }
        sent
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // An error means that the client is gone.
        let _ = self.flush_pending();
    }
}

struct ReplyTo<'a> {
    session: &'a Session,
    more: bool,
    /// The number of the hand-over or the parking under a slow request.
    slow: Option<u64>,
}

impl Replies for ReplyTo<'_> {
    fn send(&self, head: &[u8], data: &[u8]) -> io::Result<()> {
        if let Some(number) = self.slow {
            self.session.note_company(number);
        }
        let mut pending = self.session.pending.lock();
        if self.more && pending.len() + head.len() + data.len() <= PENDING_MAX {
            pending.extend(head);
            pending.extend(data);
            return Ok(());
        }
        self.session.send(&mut pending, head, data)
    }
}
