//! The server: listening sockets, the connections, and how it stops.
//!
//! Invariants:
//! - A connection is on the list from the moment it is accepted until its last thread has left it
//!   and nothing of it uses an export any more: whoever has stopped a server can close the disks.
//! - Beyond `connections_max`, a client is told so in the handshake, as long as few are being told;
//!   after that it is closed at once.
//!
//! Lock order: the list of connections is a leaf; nothing waits under it.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use format::{Context, Error, Kind, Result};
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::retry_on_intr;

use super::connection::serve;
use super::execute::Served;
use super::stream::{Listener, Stream};
use super::wire::{Request, command};
use super::{Exports, tls::TlsConfig};

/// Clients beyond the limit that are told so at one time.
const REFUSED_MAX: usize = 4;
/// Pause after the host refused to accept a client (too many open files, most likely).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Limits of a server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Connections served at one time.
    pub connections_max: usize,
    /// Threads of one connection: that many requests of it are served at one time.
    pub threads_max: usize,
    /// Bytes of data in flight on one connection; a single larger request passes alone.
    pub bytes_max: usize,
    /// Time from connecting to the end of the handshake.
    pub handshake_max: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            connections_max: 64,
            threads_max: 16,
            bytes_max: 64 << 20,
            handshake_max: Duration::from_secs(30),
        }
    }
}

/// Counts of one connection.
#[derive(Debug, Default)]
pub struct Counters {
    in_flight: AtomicU64,
    requests: AtomicU64,
    errors: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

/// A request that is being served.
pub struct Counted<'a>(&'a Counters);

impl Counters {
    pub fn begin(&self) -> Counted<'_> {
        // Relaxed, here and below: figures for people, nothing is decided by them.
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Counted(self)
    }
}

impl Counted<'_> {
    pub fn end(self, request: &Request, served: Served) {
        let counters = self.0;
        counters.requests.fetch_add(1, Ordering::Relaxed);
        match (served, request.command) {
            (Err(_), _) => counters.errors.fetch_add(1, Ordering::Relaxed),
            (_, command::READ) => counters.bytes_read.fetch_add(request.len, Ordering::Relaxed),
            (_, command::WRITE) => counters.bytes_written.fetch_add(request.len, Ordering::Relaxed),
            _ => 0,
        };
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A client, as the server knows it.
pub struct Connection {
    pub id: u64,
    pub stream: Stream,
    pub counters: Counters,
    peer: String,
    since: Instant,
    export: OnceLock<String>,
    /// Why it ended, if not in order.
    ended: OnceLock<String>,
}

impl Connection {
    /// It ends because of this; the first reason stays.
    pub fn ends(&self, why: &io::Error) {
        self.ended.get_or_init(|| match why.kind() {
            io::ErrorKind::InvalidData => "it does not follow the protocol".to_owned(),
            io::ErrorKind::UnexpectedEof => "it went in the middle of a request".to_owned(),
            _ => why.to_string(),
        });
    }

    fn status(&self) -> ConnectionStatus {
        let counters = &self.counters;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ConnectionStatus {
            id: self.id,
            peer: self.peer.clone(),
            tls: self.stream.is_tls(),
            export: self.export.get().cloned(),
            age: self.since.elapsed(),
            in_flight: of(&counters.in_flight),
            requests: of(&counters.requests),
            errors: of(&counters.errors),
            bytes_read: of(&counters.bytes_read),
            bytes_written: of(&counters.bytes_written),
        }
    }
}

/// What [`NbdServer::status`] says about a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionStatus {
    /// Its number.
    pub id: u64,
    /// Process and user, or address and port.
    pub peer: String,
    /// TLS is on.
    pub tls: bool,
    /// The export, once the handshake is over.
    pub export: Option<String>,
    /// Time since it was accepted.
    pub age: Duration,
    /// Requests being served now.
    pub in_flight: u64,
    /// Requests answered.
    pub requests: u64,
    /// Of those, with an error.
    pub errors: u64,
    /// Bytes that answered reads asked for.
    pub bytes_read: u64,
    /// Bytes that answered writes carried.
    pub bytes_written: u64,
}

/// What [`NbdServer::status`] says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerStatus {
    /// Clients now, refused ones not among them.
    pub connections: Vec<ConnectionStatus>,
    /// Clients ever accepted.
    pub accepted: u64,
    /// Of those, refused because of the limit.
    pub refused: u64,
    /// Of those, gone before the handshake was over.
    pub unfinished: u64,
}

#[derive(Default)]
struct Register {
    connections: BTreeMap<u64, Arc<Connection>>,
    /// Those of the connections that are being told that there are too many.
    refused_now: usize,
    accepted: u64,
    refused: u64,
    unfinished: u64,
}

struct Shared {
    options: ServerOptions,
    register: Mutex<Register>,
    left: Condvar,
    stopping: AtomicBool,
    /// Readable once the server stops.
    wake: OwnedFd,
}

/// A connection's place at the server; dropping it closes the connection and takes it off the list.
pub struct Place {
    // Before the entry: off the list means that no export is in use.
    exports: Arc<dyn Exports>,
    entry: Entry,
}

impl Place {
    pub fn connection(&self) -> &Connection {
        &self.entry.connection
    }

    pub fn options(&self) -> &ServerOptions {
        &self.entry.shared.options
    }

    pub fn exports(&self) -> Arc<dyn Exports> {
        Arc::clone(&self.exports)
    }

    /// The handshake chose an export.
    pub fn agreed(&self, export: &str) {
        let connection = self.connection();
        connection.export.get_or_init(|| export.to_owned());
        self.exports.client_came(export, &connection.peer);
    }

    /// True when requests that come now are to be refused.
    pub fn stopping(&self) -> bool {
        // Acquire pairs with the Release store in `stop`.
        self.entry.shared.stopping.load(Ordering::Acquire)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let connection = self.connection();
        if let Some(export) = connection.export.get() {
            let why = connection.ended.get().map(String::as_str);
            self.exports.client_went(export, &connection.peer, why);
        }
    }
}

/// A connection on the list.
struct Entry {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    refused: bool,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.connection.stream.close();
        let mut register = self.shared.register.lock();
        register.connections.remove(&self.connection.id);
        register.refused_now -= usize::from(self.refused);
        let finished = self.refused || self.connection.export.get().is_some();
        register.unfinished += u64::from(!finished);
        drop(register);
        self.shared.left.notify_all();
    }
}

/// A running NBD server.
pub struct NbdServer {
    shared: Arc<Shared>,
    acceptors: Mutex<Vec<JoinHandle<()>>>,
}

impl NbdServer {
    /// Serves `exports` on sockets that are bound and listening already.
    ///
    /// # Errors
    /// What the host reports.
    pub fn start(
        listeners: Vec<Listener>,
        exports: Arc<dyn Exports>,
        options: ServerOptions,
    ) -> Result<Self> {
        let object = || "the NBD server".to_owned();
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(io::Error::from)
            .context("start", object)?;
        let shared = Arc::new(Shared {
            options,
            register: Mutex::default(),
            left: Condvar::new(),
            stopping: AtomicBool::new(false),
            wake,
        });
        let server = NbdServer { shared, acceptors: Mutex::default() };
        for listener in listeners {
            listener.set_nonblocking()?;
            let (shared, exports) = (Arc::clone(&server.shared), Arc::clone(&exports));
            let acceptor = thread::Builder::new()
                .name("nbd-accept".to_owned())
                .spawn(move || accept(&shared, &exports, &listener))
                .context("start", object)?;
            server.acceptors.lock().push(acceptor);
        }
        Ok(server)
    }

    /// Stops: no more clients, no more requests; those under way are answered, then connections are
    /// closed. The listening sockets are closed as well.
    ///
    /// # Errors
    /// `Busy` when requests were still under way after `wait`: their connections are cut, and their
    /// threads end when the export's calls return.
    pub fn stop(&self, wait: Duration) -> Result<()> {
        // Release pairs with the Acquire load in `Place::stopping`.
        self.shared.stopping.store(true, Ordering::Release);
        // It can only fail when it was written 2^64 times.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        for acceptor in self.acceptors.lock().drain(..) {
            let _ = acceptor.join();
        }
        let deadline = Instant::now() + wait;
        self.shut_down(|c| if c.export.get().is_some() { Shutdown::Read } else { Shutdown::Both });
        if self.wait_empty(deadline) {
            return Ok(());
        }
        // Clients that do not read their replies, among others.
        self.shut_down(|_| Shutdown::Both);
        if self.wait_empty(Instant::now() + Duration::from_secs(1)) {
            return Ok(());
        }
        let left = self.shared.register.lock().connections.len();
        let reason = format!("requests of {left} connections are still under way");
        Err(Error::new(Kind::Busy, reason).tried("stop").on("the NBD server"))
    }

    fn shut_down(&self, how: impl Fn(&Connection) -> Shutdown) {
        let register = self.shared.register.lock();
        register.connections.values().for_each(|c| c.stream.shutdown(how(c)));
    }

    /// True when the last connection has gone before the deadline.
    fn wait_empty(&self, deadline: Instant) -> bool {
        let mut register = self.shared.register.lock();
        while !register.connections.is_empty() {
            if self.shared.left.wait_until(&mut register, deadline).timed_out() {
                return register.connections.is_empty();
            }
        }
        true
    }

    /// Who is connected, and what they have done.
    #[must_use]
    pub fn status(&self) -> ServerStatus {
        let register = self.shared.register.lock();
        ServerStatus {
            connections: register.connections.values().map(|c| c.status()).collect(),
            accepted: register.accepted,
            refused: register.refused,
            unfinished: register.unfinished,
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        // Whoever wants requests to be answered first calls `stop`.
        let _ = self.stop(Duration::ZERO);
    }
}

fn accept(shared: &Arc<Shared>, exports: &Arc<dyn Exports>, listener: &Listener) {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    let tls = match listener {
        Listener::Unix(_) => None,
        Listener::Tls(_, config) => Some(config),
    };
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(listener.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(shared.wake.as_fd(), PollFlags::IN),
        ];
        let polled = retry_on_intr(|| poll(&mut fds, None));
        if polled.is_err() || !fds[1].revents().is_empty() {
            return;
        }
        match listener.accept() {
            Ok((stream, peer)) => {
                if let Some(entry) = admit(shared, stream, peer) {
                    welcome(Place { exports: Arc::clone(exports), entry }, tls.cloned());
                }
            }
            // The client has gone again: its own affair, and nothing for the log.
            Err(e) if matches!(e.kind(), WouldBlock | ConnectionAborted | Interrupted) => {}
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept an NBD client");
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

/// Takes a client on the list; `None` when there are so many that it is not even told.
fn admit(shared: &Arc<Shared>, stream: Stream, peer: String) -> Option<Entry> {
    let mut register = shared.register.lock();
    register.accepted += 1;
    let served = register.connections.len() - register.refused_now;
    let refused = served >= shared.options.connections_max;
    register.refused += u64::from(refused);
    if refused && register.refused_now >= REFUSED_MAX {
        return None;
    }
    register.refused_now += usize::from(refused);
    let connection = Arc::new(Connection {
        id: register.accepted,
        stream,
        counters: Counters::default(),
        peer,
        since: Instant::now(),
        export: OnceLock::new(),
        ended: OnceLock::new(),
    });
    register.connections.insert(connection.id, Arc::clone(&connection));
    drop(register);
    Some(Entry { shared: Arc::clone(shared), connection, refused })
}

fn welcome(place: Place, tls: Option<TlsConfig>) {
    let limit = place.options().connections_max;
    let refusal = place.entry.refused.then(|| format!("{limit} clients are connected, the limit"));
    let name = format!("nbd-{}", place.connection().id);
    // Without a thread the place is dropped, and the client sees its connection closed.
    let spawned = thread::Builder::new()
        .name(name)
        .spawn(move || serve(place, tls.as_ref(), refusal.as_deref()));
    if let Err(e) = spawned {
        tracing::warn!(error = %e, "cannot start a thread for an NBD client");
    }
}
