//! Messages with descriptors over a Unix stream socket.
//!
//! Invariants: a peer that sends half a message never blocks us ([`Receiver::poll`] returns and
//! goes on later); every descriptor received is owned from the first moment, and closed when its
//! message is refused.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use format::{Error, Kind, Result};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::proto::{FDS_MAX, FLAG_VERSION, HEADER_SIZE, Header, PAYLOAD_MAX};
use crate::util::{index, low32, wide};

const FD_SPACE: usize = rustix::cmsg_space!(ScmRights(FDS_MAX));

/// One message as received. Its size is within the protocol's limits, nothing else is checked.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as `T`, if it has exactly that length.
    pub(crate) fn body<T: FromBytes>(&self) -> Result<T> {
        T::read_from_bytes(&self.payload)
            .map_err(|_| Error::invalid("the payload has the wrong length"))
    }

    pub(crate) fn number(&self) -> Result<u64> {
        self.body::<u64>()
    }
}

/// What [`Receiver::poll`] found.
#[derive(Debug)]
pub(crate) enum Received {
    /// A whole message.
    Message(Message),
    /// Nothing more for now.
    Pending,
    /// The peer closed the connection between two messages.
    Closed,
}

/// Collects messages from a stream, however it is cut up.
#[derive(Debug, Default)]
pub(crate) struct Receiver {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Receiver {
    /// Whether a message has begun and not ended.
    pub(crate) fn in_message(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Reads what there is, up to the end of one message; never blocks.
    ///
    /// # Errors
    /// `Invalid` when the peer breaks the framing, `Io` when the socket fails.
    pub(crate) fn poll(&mut self, socket: BorrowedFd<'_>) -> Result<Received> {
        loop {
            let header = self.header()?;
            let want = HEADER_SIZE + header.map_or(0, |h| index(u64::from(h.size)));
            if header.is_some() && self.bytes.len() == want {
                return Ok(Received::Message(self.finish()));
            }
            match self.read(socket, want)? {
                None => return Ok(Received::Pending),
                Some(0) if self.in_message() => {
                    return Err(Error::invalid("the connection ended inside a message"));
                }
                Some(0) => return Ok(Received::Closed),
                Some(_) => {}
            }
        }
    }

    fn header(&self) -> Result<Option<Header>> {
        let Some(raw) = self.bytes.get(..HEADER_SIZE) else { return Ok(None) };
        let header = Header::read_from_bytes(raw)
            .map_err(|_| Error::new(Kind::Failed, "a header of the wrong length"))?;
        if header.flags & 3 != FLAG_VERSION {
            return Err(Error::invalid("a message of an unknown protocol version"));
        }
        if header.size > low32(wide(PAYLOAD_MAX)) {
            return Err(Error::invalid("a message is longer than any request"));
        }
        Ok(Some(header))
    }

    fn finish(&mut self) -> Message {
        let bytes = std::mem::take(&mut self.bytes);
        let (head, payload) = bytes.split_at(HEADER_SIZE);
        let header = Header::read_from_bytes(head).expect("the length was checked");
        Message { header, payload: payload.to_vec(), fds: std::mem::take(&mut self.fds) }
    }

    fn read(&mut self, socket: BorrowedFd<'_>, want: usize) -> Result<Option<usize>> {
        let have = self.bytes.len();
        self.bytes.resize(want, 0);
        let mut space = [MaybeUninit::uninit(); FD_SPACE];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut iov = [IoSliceMut::new(&mut self.bytes[have..])];
        let got = recvmsg(socket, &mut iov, &mut control, flags);
        self.bytes.truncate(have + got.as_ref().map_or(0, |r| r.bytes));
        let got = match got {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            // The peer died with unread data in its socket: as good as an orderly end.
            Err(Errno::CONNRESET) => return Ok(Some(0)),
            Err(e) => return Err(Error::from(std::io::Error::from(e)).tried("receive")),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > FDS_MAX {
            return Err(Error::invalid("a message has too many descriptors"));
        }
        Ok(Some(got.bytes))
    }
}

/// Sends one message; never blocks.
///
/// # Errors
/// `Busy` when the peer does not read what it is sent, `Io` when the connection is gone.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    request: u32,
    flags: u32,
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<()> {
    let header = Header { request, flags: flags | FLAG_VERSION, size: low32(wide(payload.len())) };
    let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(payload);
    send_bytes(socket, &bytes, fds)
}

/// Sends raw bytes with descriptors; never blocks.
///
/// # Errors
/// As [`send`].
pub(crate) fn send_bytes(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); FD_SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Error::invalid("a message has too many descriptors"));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    match sent {
        Ok(n) if n == bytes.len() => Ok(()),
        // A stream socket takes a short message whole or not at all, unless it is nearly full.
        Ok(_) | Err(Errno::AGAIN) => {
            Err(Error::new(Kind::Busy, "the peer does not read what it is sent"))
        }
        Err(e) => Err(Error::from(std::io::Error::from(e)).tried("send")),
    }
}

/// The bytes of a payload and what follows it.
pub(crate) fn concat<T: IntoBytes + Immutable>(head: &T, tail: &[u8]) -> Vec<u8> {
    let mut bytes = head.as_bytes().to_vec();
    bytes.extend_from_slice(tail);
    bytes
}

/// Whether a descriptor is a Unix stream socket.
pub(crate) fn is_unix_stream(fd: impl AsFd) -> bool {
    use rustix::net::{AddressFamily, SocketType, sockopt};
    sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(&fd) == Ok(SocketType::STREAM)
}
