//! Byte streams: a Unix socket as it is, or a TCP socket under TLS.
//!
//! What is relied on: one thread at a time receives, and one thread at a time sends (the two may be
//! at it together). Under TLS both share the session, which is locked only while bytes are put in
//! or taken out and never while a socket is waited for: a client that reads its replies late must
//! not keep the server from taking its requests, or both would wait for ever.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use format::{Context, Result};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, sockopt};
use rustls::ServerConnection;

use super::tls::TlsConfig;
use crate::sockets::Peer;

/// Ciphertext taken from the socket at once.
const RAW: usize = 64 << 10;

/// A bound socket that clients come to. TCP exists only together with TLS.
#[derive(Debug)]
pub enum Listener {
    /// Who may connect is decided by the permissions of the socket's file.
    Unix(UnixListener),
    /// Every client must turn TLS on before anything else.
    Tls(TcpListener, TlsConfig),
}

impl Listener {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tls(listener, _) => listener.as_fd(),
        }
    }

    pub(super) fn set_nonblocking(&self) -> Result<()> {
        let set = match self {
            Listener::Unix(listener) => listener.set_nonblocking(true),
            Listener::Tls(listener, _) => listener.set_nonblocking(true),
        };
        set.context("serve NBD on", || "a listening socket".to_owned())
    }

    /// The next client: its stream, and what to call it.
    pub(super) fn accept(&self) -> io::Result<(Stream, String)> {
        match self {
            Listener::Unix(listener) => {
                let (socket, _) = listener.accept()?;
                let Peer { pid, uid, .. } = Peer::of(&socket)?;
                let process = pid.map_or("a process".into(), |pid| format!("process {pid}"));
                Ok((Stream::new(socket.into()), format!("{process} of user {uid}")))
            }
            Listener::Tls(listener, _) => {
                let (socket, peer) = listener.accept()?;
                // Without it replies are late, and correct.
                let _ = socket.set_nodelay(true);
                Ok((Stream::new(socket.into()), peer.to_string()))
            }
        }
    }
}

struct Session {
    tls: Mutex<ServerConnection>,
    /// Ciphertext that the session has not taken yet; the receiving thread's own.
    raw: Mutex<Raw>,
    /// Ciphertext on its way out; the sending thread's own.
    out: Mutex<Vec<u8>>,
}

struct Raw {
    buf: Box<[u8]>,
    from: usize,
    to: usize,
}

/// A connected stream.
pub struct Stream {
    socket: OwnedFd,
    session: OnceLock<Session>,
}

fn broken(e: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

impl Stream {
    fn new(socket: OwnedFd) -> Self {
        Stream { socket, session: OnceLock::new() }
    }

    /// True when TLS is on.
    pub fn is_tls(&self) -> bool {
        self.session.get().is_some()
    }

    /// Turns TLS on, as the server. Once per stream.
    ///
    /// # Errors
    /// What the socket reports, or what is wrong with the client's side of it.
    pub fn start_tls(&self, tls: ServerConnection, deadline: Instant) -> io::Result<()> {
        let raw = Raw { buf: vec![0; RAW].into(), from: 0, to: 0 };
        let session = Session { tls: Mutex::new(tls), raw: Mutex::new(raw), out: Mutex::default() };
        let session = self.session.get_or_init(|| session);
        loop {
            drain(&self.socket, session)?;
            if !session.tls.lock().is_handshaking() {
                return Ok(());
            }
            if !feed(&self.socket, session, Some(deadline))? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Receives some bytes; 0 at the end. With a deadline, fails when it passes.
    ///
    /// # Errors
    /// What the socket or the session report.
    pub fn recv(&self, buf: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
        let Some(session) = self.session.get() else {
            return recv_raw(&self.socket, buf, deadline);
        };
        loop {
            match session.tls.lock().reader().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                got => return got,
            }
            if !feed(&self.socket, session, deadline)? {
                return Ok(0);
            }
        }
    }

    /// Sends all of the parts.
    ///
    /// # Errors
    /// What the socket or the session report; the stream is then of no use any more.
    pub fn send(&self, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        let Some(session) = self.session.get() else {
            return send_raw(&self.socket, parts);
        };
        for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                let taken = session.tls.lock().writer().write(rest)?;
                rest = &rest[taken..];
                drain(&self.socket, session)?;
            }
        }
        Ok(())
    }

    /// Whether the client has sent something that nobody has received yet.
    pub fn has_input(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Sending fails when the peer takes nothing for so long; `None` waits for ever.
    ///
    /// # Errors
    /// What the socket reports.
    pub fn set_send_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(&self.socket, sockopt::Timeout::Send, timeout)?)
    }

    /// Says goodbye where there is a way to; nothing is to be sent afterwards.
    pub fn close(&self) {
        if let Some(session) = self.session.get() {
            session.tls.lock().send_close_notify();
            // A peer that is gone does not need to hear it.
            let _ = drain(&self.socket, session);
        }
        self.shutdown(Shutdown::Both);
    }

    /// Ends one or both directions, whoever waits on them.
    pub fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        // It fails only when the peer is gone already.
        let _ = rustix::net::shutdown(&self.socket, how);
    }
}

/// Waits until there is something to receive.
fn wait(socket: &OwnedFd, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    match retry_on_intr(|| poll(&mut fds, Some(&left)))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

fn recv_raw(socket: &OwnedFd, buf: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
    if let Some(deadline) = deadline {
        wait(socket, deadline)?;
    }
    match retry_on_intr(|| rustix::net::recv(socket, &mut *buf, RecvFlags::empty())) {
        Ok((got, _)) => Ok(got),
        // A killed client resets the connection: the end, as far as we are concerned.
        Err(Errno::CONNRESET) => Ok(0),
        Err(e) => Err(e.into()),
    }
}

fn send_raw(socket: &OwnedFd, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        let sent = retry_on_intr(|| {
            let mut nothing = SendAncillaryBuffer::default();
            rustix::net::sendmsg(socket, parts, &mut nothing, SendFlags::NOSIGNAL)
        })?;
        IoSlice::advance_slices(&mut parts, sent);
    }
    Ok(())
}

/// Sends the ciphertext that the session has ready. Called by the sending thread, and by the only
/// thread of a handshake.
fn drain(socket: &OwnedFd, session: &Session) -> io::Result<()> {
    let mut out = session.out.lock();
    out.clear();
    {
        let mut tls = session.tls.lock();
        while tls.wants_write() {
            tls.write_tls(&mut *out)?;
        }
    }
    send_raw(socket, &mut [IoSlice::new(&out)])
}

/// Gives the session more ciphertext; false at the end of the stream.
fn feed(socket: &OwnedFd, session: &Session, deadline: Option<Instant>) -> io::Result<bool> {
    let mut raw = session.raw.lock();
    let raw = &mut *raw;
    if raw.from == raw.to {
        raw.from = 0;
        raw.to = recv_raw(socket, &mut raw.buf, deadline)?;
        if raw.to == 0 {
            return Ok(false);
        }
    }
    let mut tls = session.tls.lock();
    let mut fresh = &raw.buf[raw.from..raw.to];
    raw.from += tls.read_tls(&mut fresh)?;
    let processed = tls.process_new_packets();
    if let Err(e) = processed {
        drop(tls);
        // The alert tells the client what is wrong; it may be gone.
        if session.out.try_lock().is_some() {
            let _ = drain(socket, session);
        }
        return Err(broken(e));
    }
    Ok(true)
}
