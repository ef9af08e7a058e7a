//! The control half of a front end: requests, replies and acknowledgements over the socket.
//!
//! A back end answers in the order in which it was asked, so requests need not wait for each other:
//! what was told without waiting is acknowledged before the answer to the next question, and a
//! question may be followed by others before its answer is taken. A device is set up, and its
//! configuration read, in four round trips instead of sixteen; who waits for a new machine notices.
//! They are: the features, the protocol features (which may be asked for only of who has them),
//! what depends on both, and what depends on the in-flight area.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::proto::{BACKEND_CONFIG_CHANGE, Config, F_PROTOCOL_FEATURES};
use crate::proto::{FLAG_NEED_REPLY, FLAG_REPLY, feature, request};
use crate::socket::{Message, Received, Receiver, concat, send};

/// How long a back end may take for an answer: it may have to drain a ring first.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// What the back end has yet to say to a request.
#[derive(Debug, Clone, Copy)]
enum Owed {
    /// That it did it.
    Ack(u32),
    /// An answer, which is taken by [`FrontEnd::take_answer`].
    Answer(u32),
}

/// A connection to a back end.
#[derive(Debug)]
pub struct FrontEnd {
    socket: UnixStream,
    receiver: Receiver,
    /// Whether REPLY_ACK was negotiated.
    acks: bool,
    /// What is to come, the oldest first.
    owed: VecDeque<Owed>,
}

impl FrontEnd {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// The host's error, for example when nobody listens.
    pub fn connect(path: &Path) -> Result<FrontEnd> {
        Ok(FrontEnd::new(UnixStream::connect(path)?))
    }

    /// Uses a connected socket.
    #[must_use]
    pub fn new(socket: UnixStream) -> FrontEnd {
        FrontEnd { socket, receiver: Receiver::default(), acks: false, owed: VecDeque::new() }
    }

    /// Says whether REPLY_ACK was negotiated; requests then ask for an acknowledgement.
    pub fn set_acks(&mut self, acks: bool) {
        self.acks = acks;
    }

    /// Sends a request that has no reply; waits for its acknowledgement if that was negotiated.
    ///
    /// # Errors
    /// `Invalid` when the back end said no, `Io` when it is gone.
    pub fn tell<T: IntoBytes + Immutable + ?Sized>(
        &mut self,
        code: u32,
        payload: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.tell_soon(code, payload, fds)?;
        self.settle()
    }

    /// As [`FrontEnd::tell`], without waiting: [`FrontEnd::settle`] does, or the next request that
    /// waits for something.
    ///
    /// # Errors
    /// `Io` when the back end is gone.
    pub fn tell_soon<T: IntoBytes + Immutable + ?Sized>(
        &mut self,
        code: u32,
        payload: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let flags = if self.acks { FLAG_NEED_REPLY } else { 0 };
        send(self.socket.as_fd(), code, flags, payload.as_bytes(), fds)?;
        if self.acks {
            self.owed.push_back(Owed::Ack(code));
        }
        Ok(())
    }

    /// Waits for what is to be acknowledged. No answer may be left to take.
    ///
    /// # Errors
    /// `Invalid` when the back end said no, `Io` when it is gone.
    pub fn settle(&mut self) -> Result<()> {
        match self.next_answer()? {
            None => Ok(()),
            Some(_) => Err(Error::new(Kind::Failed, "an answer of the back end was not taken")),
        }
    }

    /// Waits for acknowledgements up to the next answer, and returns what that one is to.
    fn next_answer(&mut self) -> Result<Option<u32>> {
        while let Some(owed) = self.owed.pop_front() {
            match owed {
                Owed::Answer(code) => return Ok(Some(code)),
                Owed::Ack(code) => {
                    let (bytes, _) = self.receive_bytes(code)?;
                    if u64::read_from_bytes(&bytes).map_err(|_| wrong_length())? != 0 {
                        let e = Error::invalid("the back end refused");
                        return Err(e.on(format!("request {code}")));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Sends a request that has a reply, which [`FrontEnd::take_answer`] gives, after those of
    /// earlier requests. Other requests may follow meanwhile.
    ///
    /// # Errors
    /// `Io` when the back end is gone.
    pub(super) fn ask_ahead<T: IntoBytes + Immutable + ?Sized>(
        &mut self,
        code: u32,
        payload: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        send(self.socket.as_fd(), code, 0, payload.as_bytes(), fds)?;
        self.owed.push_back(Owed::Answer(code));
        Ok(())
    }

    /// The reply to the oldest [`FrontEnd::ask_ahead`], and the descriptor with it.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`]; `Invalid` also when the back end said no to something before that.
    pub(super) fn take_answer<R: FromBytes>(&mut self) -> Result<(R, Option<OwnedFd>)> {
        let (bytes, file) = self.take_bytes()?;
        let reply = R::read_from_bytes(&bytes);
        reply.map(|r| (r, file)).map_err(|_| wrong_length())
    }

    fn take_bytes(&mut self) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        match self.next_answer()? {
            Some(code) => self.receive_bytes(code),
            None => Err(Error::new(Kind::Failed, "nothing was asked of the back end")),
        }
    }

    /// Sends a request that has a reply.
    ///
    /// # Errors
    /// `Invalid` when the reply has another form, `Io` when the back end is gone.
    pub fn ask<T: IntoBytes + Immutable + ?Sized, R: FromBytes>(
        &mut self,
        code: u32,
        payload: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(R, Option<OwnedFd>)> {
        self.ask_ahead(code, payload, fds)?;
        self.take_answer()
    }

    /// As [`FrontEnd::ask`], with the reply's bytes as they are.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub fn ask_bytes(&mut self, code: u32, payload: &[u8]) -> Result<Vec<u8>> {
        self.ask_ahead(code, payload, &[])?;
        Ok(self.take_bytes()?.0)
    }

    /// Begins: says who owns the device, and negotiates protocol features, of which `protocol` are
    /// wanted; with none, the oldest dialect is spoken. Returns the virtio features that the back
    /// end offers, and the protocol features that both have.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub(super) fn greet(&mut self, protocol: u64) -> Result<(u64, u64)> {
        let none = &[0u8; 0];
        self.tell(request::SET_OWNER, none, &[])?;
        let offered: u64 = self.ask(request::GET_FEATURES, none, &[])?.0;
        if protocol == 0 || offered & F_PROTOCOL_FEATURES == 0 {
            return Ok((offered & !F_PROTOCOL_FEATURES, 0));
        }
        let has: u64 = self.ask(request::GET_PROTOCOL_FEATURES, none, &[])?.0;
        let protocol = has & protocol;
        self.tell(request::SET_PROTOCOL_FEATURES, &protocol, &[])?;
        self.set_acks(protocol & feature::REPLY_ACK != 0);
        Ok((offered, protocol))
    }

    /// Reads configuration bytes from `offset`.
    ///
    /// # Errors
    /// `Invalid` when the back end does not have them.
    pub(super) fn config(&mut self, offset: u32, dst: &mut [u8]) -> Result<()> {
        self.ask_config(offset, dst)?;
        self.take_config(dst)
    }

    /// Asks for `dst.len()` configuration bytes from `offset`, ahead.
    ///
    /// # Errors
    /// `Io` when the back end is gone.
    pub(super) fn ask_config(&mut self, offset: u32, dst: &[u8]) -> Result<()> {
        let size = u32::try_from(dst.len()).map_err(|_| Error::invalid("too many bytes"))?;
        let head = Config { offset, size, flags: 0 };
        self.ask_ahead(request::GET_CONFIG, &concat(&head, dst)[..], &[])
    }

    /// The answer to [`FrontEnd::ask_config`].
    ///
    /// # Errors
    /// `Invalid` when the back end does not have them.
    pub(super) fn take_config(&mut self, dst: &mut [u8]) -> Result<()> {
        let (reply, _) = self.take_bytes()?;
        match reply.get(size_of::<Config>()..) {
            Some(bytes) if bytes.len() == dst.len() => dst.copy_from_slice(bytes),
            _ => return Err(Error::invalid("the back end has no such configuration")),
        }
        Ok(())
    }

    /// Switches the cache mode.
    ///
    /// # Errors
    /// `Invalid` when the back end refuses.
    pub(super) fn set_write_cache(&mut self, write_back: bool) -> Result<()> {
        let head = Config { offset: 32, size: 1, flags: 0 };
        let bytes = concat(&head, &[u8::from(write_back)]);
        self.tell(request::SET_CONFIG, &bytes[..], &[])
    }

    /// Sends a request that has a reply, which [`FrontEnd::answer`] gives. Nothing else may be
    /// asked or told until it is there.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub(super) fn ask_soon<T: IntoBytes + Immutable + ?Sized>(
        &mut self,
        code: u32,
        payload: &T,
    ) -> Result<()> {
        self.settle()?;
        send(self.socket.as_fd(), code, 0, payload.as_bytes(), &[])
    }

    /// The reply to [`FrontEnd::ask_soon`], if it is there.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub(super) fn answer<R: FromBytes>(&mut self, code: u32) -> Result<Option<R>> {
        let Some(message) = self.poll(code)? else { return Ok(None) };
        R::read_from_bytes(&message.payload).map(Some).map_err(|_| wrong_length())
    }

    /// Sends bytes as they are: for tests of what a back end does with them.
    ///
    /// # Errors
    /// `Io` when the back end is gone.
    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        crate::socket::send_bytes(self.socket.as_fd(), bytes, fds)
    }

    fn receive_bytes(&mut self, code: u32) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        let end = Instant::now() + ANSWER_TIME;
        loop {
            if let Some(m) = self.poll(code)? {
                return Ok((m.payload, m.fds.into_iter().next()));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !readable(&self.socket, left) {
                return Err(Error::new(Kind::Busy, "the back end did not answer in time"));
            }
        }
    }

    /// The reply to request `code`, if it is there.
    fn poll(&mut self, code: u32) -> Result<Option<Message>> {
        match self.receiver.poll(self.socket.as_fd())? {
            Received::Closed => Err(Error::new(Kind::Io, "the back end closed the connection")),
            Received::Message(m) if m.header.request != code => {
                Err(Error::invalid("a reply to another request"))
            }
            Received::Message(m) if m.header.flags & FLAG_REPLY == 0 => {
                Err(Error::invalid("a request instead of a reply"))
            }
            Received::Message(m) => Ok(Some(m)),
            Received::Pending => Ok(None),
        }
    }
}

fn wrong_length() -> Error {
    Error::invalid("a reply of the wrong length")
}

impl AsFd for FrontEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The channel on which a back end announces changes of its configuration.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    receiver: Receiver,
}

impl Channel {
    /// Gives the back end a new channel.
    pub(super) fn open(front: &mut FrontEnd) -> Result<Channel> {
        let (ours, theirs) = UnixStream::pair()?;
        front.tell_soon(request::SET_BACKEND_REQ_FD, &[0u8; 0], &[theirs.as_fd()])?;
        Ok(Channel { socket: ours.into(), receiver: Receiver::default() })
    }

    /// Its descriptor, to sleep on.
    pub(super) fn source(&self) -> Result<OwnedFd> {
        Ok(self.socket.try_clone()?)
    }

    /// Waits for an announcement, at most `timeout_ms`.
    ///
    /// # Errors
    /// `Invalid` when something else arrives.
    pub(super) fn config_changed(&mut self, timeout_ms: u32) -> Result<bool> {
        if !readable(&self.socket, Duration::from_millis(timeout_ms.into())) {
            return Ok(false);
        }
        match self.receiver.poll(self.socket.as_fd())? {
            Received::Message(m) if m.header.request == BACKEND_CONFIG_CHANGE => Ok(true),
            Received::Message(_) => Err(Error::invalid("an unknown request of the back end")),
            Received::Pending | Received::Closed => Ok(false),
        }
    }
}

/// Waits until `fd` is readable or closed, at most `time`.
pub(super) fn readable(fd: impl AsFd, time: Duration) -> bool {
    let Ok(time) = Timespec::try_from(time) else { return false };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&time)), Ok(n) if n > 0)
}
