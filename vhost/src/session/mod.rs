//! Device side of one vhost-user connection.
//!
//! One control thread per connection calls [`Session::run`]; it owns everything that was
//! negotiated. Rings are started and stopped by it and run by worker threads of the daemon (see
//! [`ActiveQueue`]). A ring runs exactly while it has size, addresses, kick descriptor and memory,
//! and is enabled.
//!
//! Trust: a front end is not believed. A message with the wrong length, number of descriptors,
//! version or order of a kind that the protocol does not have ends the session with an error that
//! names the request. A well-formed request that cannot be granted is answered with "no" if the
//! front end asked for an answer, and ends the session if not, because the front end would
//! otherwise go on in the belief that it was granted. In both cases every ring is drained and
//! stopped, and nothing outside the session notices.

mod handle;
mod handover;
mod requests;
mod rings;
mod transfer;
mod worker;

pub use handle::SessionHandle;
pub use handover::Handover;
pub use worker::{ActiveQueue, Control};

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::blk::Capabilities;
use crate::dirty_log::{DirtyLog, WriteLog};
use crate::event::EventFd;
use crate::inflight::InflightArea;
use crate::memory::Memory;
use crate::proto::{self, feature};
use crate::socket::{self, Message, Received, Receiver};
use rings::Ring;
use transfer::Transfer;

/// Protocol features that every session offers.
pub const PROTOCOL_FEATURES: u64 = feature::MQ
    | feature::LOG_SHMFD
    | feature::REPLY_ACK
    | feature::BACKEND_REQ
    | feature::CONFIG
    | feature::INFLIGHT_SHMFD
    | feature::RESET_DEVICE
    | feature::CONFIGURE_MEM_SLOTS
    | feature::STATUS
    | feature::DEVICE_STATE;

/// How long a front end in the middle of a message may delay the end of a session.
const STOP_GRACE: Duration = Duration::from_millis(200);

/// Most queues of one device: the protocol numbers them with one byte.
pub const QUEUES_MAX: u16 = 256;

/// What the daemon does for a session. All methods are called from the control thread.
pub trait Device {
    /// What the disk can do now. Asked again for each question of the front end, so that a resize
    /// shows; `queues` and `queue_size_max` must not change while a session lives.
    fn capabilities(&self) -> Capabilities;

    /// Hands a ring to a worker thread. Requests may already wait in it, and with an in-flight area
    /// the first ones may be those that an earlier process left. Returning an error drops
    /// the queue and refuses the front end's request.
    ///
    /// # Errors
    /// Whatever keeps the daemon from serving the queue.
    fn start_queue(&mut self, queue: ActiveQueue) -> Result<()>;

    /// The guest switched the cache mode, or the negotiated features imply one. When it went to
    /// write-through, everything completed so far must be durable before this returns; that
    /// includes writes which a worker began under the old mode and completes during the call, so
    /// let every worker pass [`ActiveQueue::control`] once and flush after that.
    ///
    /// # Errors
    /// When the cache could not be made durable; the mode stays as it was.
    fn write_cache_changed(&mut self, write_back: bool) -> Result<()>;

    /// The cache mode that this guest chose in an earlier session, if the daemon knows it: after a
    /// reconnect the guest relies on it and the front end does not repeat it.
    fn remembered_write_cache(&self) -> Option<bool>;

    /// The guest broke a ring, or a worker lost one. The session goes on.
    fn queue_failed(&mut self, index: u16, error: &Error);
}

/// How a session ended in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The front end closed the connection.
    Disconnected,
    /// [`SessionHandle::stop`] was called. [`Session::into_handover`] has what a successor needs.
    Stopped,
}

/// What control thread, workers and handles share.
#[derive(Debug)]
pub(crate) struct Shared {
    wake: EventFd,
    stop: AtomicBool,
    /// A worker found that the front end truncated its memory.
    lost: AtomicBool,
    write_back: AtomicBool,
    /// Acknowledged protocol features, for the backend channel.
    protocol: AtomicU64,
    failures: Mutex<Vec<(u16, Error)>>,
    channel: Mutex<Option<OwnedFd>>,
}

impl Shared {
    fn new() -> Result<Arc<Shared>> {
        Ok(Arc::new(Shared {
            wake: EventFd::new()?,
            stop: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            write_back: AtomicBool::new(false),
            protocol: AtomicU64::new(0),
            failures: Mutex::default(),
            channel: Mutex::default(),
        }))
    }

    fn report(&self, index: u16, error: Error) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push((index, error));
        self.wake.signal();
    }
}

/// One connection to a front end; see the module's head.
#[derive(Debug)]
pub struct Session {
    socket: UnixStream,
    receiver: Receiver,
    shared: Arc<Shared>,
    /// Acknowledged virtio features.
    features: u64,
    /// Acknowledged protocol features.
    protocol: u64,
    /// Device status as the front end set it.
    status: u8,
    /// Cache mode that the guest chose, as opposed to the one that features imply.
    cache_choice: Option<bool>,
    /// Whether the cache mode was ever announced to the device.
    cache_known: bool,
    memory: Arc<Memory>,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightArea>>,
    rings: Vec<Ring>,
    /// Whether a ring ever ran in this session.
    ran: bool,
    transfer: Option<Transfer>,
}

/// Device status bit: the device gave up and wants a reset.
const STATUS_NEEDS_RESET: u8 = 0x40;

impl Session {
    /// A session on a connection that was just accepted. Nothing is read before [`Session::run`].
    ///
    /// # Errors
    /// `Invalid` when the device has no or too many queues; the host's error when no descriptor is
    /// free.
    pub fn new(socket: UnixStream, device: &dyn Device) -> Result<(Session, SessionHandle)> {
        let queues = device.capabilities().queues;
        if queues == 0 || queues > QUEUES_MAX {
            return Err(Error::invalid("a device of no queue, or of more than 256"));
        }
        let shared = Shared::new()?;
        let handle = SessionHandle::new(shared.clone());
        let session = Session {
            socket,
            receiver: Receiver::default(),
            shared,
            features: 0,
            protocol: 0,
            status: 0,
            cache_choice: device.remembered_write_cache(),
            cache_known: false,
            memory: Arc::default(),
            log: None,
            inflight: None,
            rings: (0..queues).map(|_| Ring::default()).collect(),
            ran: false,
            transfer: None,
        };
        Ok((session, handle))
    }

    /// The connection.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Serves the connection until it ends. When this returns, no ring runs.
    ///
    /// # Errors
    /// What the front end did wrong, or what the host refused. The session is over in any case.
    pub fn run(&mut self, device: &mut dyn Device) -> Result<End> {
        let result = self.restart(device).and_then(|()| self.serve(device));
        let stopped = self.stop_all();
        self.report_failures(device);
        let end = result?;
        // What a successor finds undone in the in-flight area it does again.
        let handed_on = end == End::Stopped && self.inflight.is_some();
        if handed_on { Ok(end) } else { stopped.map(|()| end) }
    }

    fn serve(&mut self, device: &mut dyn Device) -> Result<End> {
        let mut grace = None;
        loop {
            if self.wait(grace.is_some())? {
                self.shared.wake.drain();
                self.report_failures(device);
            }
            if self.shared.lost.load(Ordering::Acquire) || self.areas_lost() {
                return Err(Error::invalid("the front end truncated its shared memory"));
            }
            // Pairs with the Release store in `SessionHandle::stop`. If possible between two
            // messages, so that a successor can go on reading.
            if self.shared.stop.load(Ordering::Acquire) {
                let end = *grace.get_or_insert_with(|| Instant::now() + STOP_GRACE);
                if !self.receiver.in_message() || Instant::now() >= end {
                    return Ok(End::Stopped);
                }
            }
            match self.receiver.poll(self.socket.as_fd())? {
                Received::Message(message) => self.answer(message, device)?,
                Received::Pending => {}
                Received::Closed => return Ok(End::Disconnected),
            }
        }
    }

    /// Sleeps until there is something to do, or not for long if the session is to end; returns
    /// whether it is for [`Shared::wake`].
    fn wait(&self, ending: bool) -> Result<bool> {
        let nap = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::new(&self.shared.wake, PollFlags::IN),
        ];
        match poll(&mut fds, ending.then_some(&nap)) {
            Ok(_) => Ok(!fds[1].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(e) => Err(Error::from(std::io::Error::from(e)).tried("wait for")),
        }
    }

    fn areas_lost(&self) -> bool {
        self.memory.is_lost()
            || self.log.as_ref().is_some_and(|l| l.is_lost())
            || self.inflight.as_ref().is_some_and(|a| a.is_lost())
    }

    fn report_failures(&self, device: &mut dyn Device) {
        let mut failures = self.shared.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = std::mem::take(&mut *failures);
        for (index, error) in &failures {
            device.queue_failed(*index, error);
        }
    }

    /// Checks one message, grants or refuses it, and answers.
    fn answer(&mut self, message: Message, device: &mut dyn Device) -> Result<()> {
        let code = message.header.request;
        let Some(shape) = proto::shape(code) else {
            let e = Error::new(Kind::Unsupported, "the front end sent an unknown request");
            return Err(e.on(format!("request {code}")));
        };
        let need_reply = message.header.flags & proto::FLAG_NEED_REPLY != 0;
        let granted = self
            .check(&message, &shape)
            .map_err(|e| (e, true))
            .and_then(|()| self.grant(message, device).map_err(|e| (e, false)));
        // The feature that allows answers may have come with this very request.
        let ack = need_reply && self.protocol & feature::REPLY_ACK != 0 && !shape.replies;
        match granted {
            Ok(requests::Answer::Done) if !ack => Ok(()),
            Ok(requests::Answer::Done) => self.reply(code, &0u64.to_ne_bytes(), None),
            Ok(requests::Answer::Bytes(bytes)) => self.reply(code, &bytes, None),
            Ok(requests::Answer::WithFile(bytes, file)) => self.reply(code, &bytes, Some(file)),
            Err((_, false)) if ack => self.reply(code, &1u64.to_ne_bytes(), None),
            Err((e, _)) => Err(e.tried("serve").on(format!("request {}", shape.name))),
        }
    }

    fn check(&self, message: &Message, shape: &proto::Shape) -> Result<()> {
        let within = |n: usize, (low, high): (usize, usize)| n >= low && n <= high;
        if message.header.flags & proto::FLAG_REPLY != 0 {
            return Err(Error::invalid("the front end sent a reply instead of a request"));
        }
        if !within(message.payload.len(), shape.payload) {
            return Err(Error::invalid("the payload has the wrong length"));
        }
        if !within(message.fds.len(), shape.fds) {
            return Err(Error::invalid("the wrong number of descriptors came with it"));
        }
        if shape.needs != 0 && self.protocol & shape.needs == 0 {
            return Err(Error::invalid("its protocol feature was not negotiated"));
        }
        Ok(())
    }

    fn reply(&self, code: u32, payload: &[u8], file: Option<OwnedFd>) -> Result<()> {
        let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        match socket::send(self.socket.as_fd(), code, proto::FLAG_REPLY, payload, &fds) {
            // A front end that hangs up while we answer is found by the next receive.
            Err(e) if e.kind() == Kind::Io => Ok(()),
            other => other,
        }
    }
}
