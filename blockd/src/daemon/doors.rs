//! The sockets on which disks are served: vhost-user for virtual machines, NBD for tools.
//!
//! A socket that was served and cannot be served any more (its certificate is gone, its address is
//! taken) fails alone: it is listed with the reason, it is remembered, and it can be attached anew.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use format::{Context as _, Error, Kind, Result};
use vhost_blk::session::Handover;

use super::events::Events;
use crate::api::types::{
    Event, EventKind, Export, ExportKind, ExportSpec, ExportState, Place, SocketName, TlsFiles,
};
use crate::nbd::{
    self, ExportEntry, Exports, Listener, NbdServer, ServerOptions, StoreAncestors, TlsConfig,
    VolumeExport,
};
use crate::serve::vhost::VhostServer;
use crate::serve::{Observer, Volume, VolumeEvent};
use crate::sockets;
use crate::storedir::StoreDir;

/// How long NBD requests under way may take when their socket goes away.
const NBD_GRACE: Duration = Duration::from_secs(5);

enum Server {
    Vhost(VhostServer),
    Nbd {
        /// None while a handover is prepared.
        server: Option<NbdServer>,
        /// The same socket once more, to go on with.
        listener: OwnedFd,
    },
    /// Nobody serves it, for this reason.
    Failed(String),
}

/// A socket that one daemon hands to the next.
#[derive(Debug, Default)]
pub(super) struct HandedDoor {
    /// The listening socket; one that could not be kept is made anew.
    pub(super) listener: Option<OwnedFd>,
    /// The front ends that stay connected.
    pub(super) sessions: Vec<Handover>,
}

/// A socket of a disk.
pub(super) struct Door {
    spec: ExportSpec,
    server: Server,
}

/// The one disk of an NBD socket.
struct OneDisk {
    volume: Arc<Volume>,
    read_only: bool,
    dir: Arc<StoreDir>,
}

impl Exports for OneDisk {
    fn open(&self, name: &str) -> Result<Arc<dyn nbd::Export>> {
        if !name.is_empty() && name != self.volume.name() {
            return Err(Error::new(Kind::NotFound, "this socket serves another disk")
                .on(format!("export {name}")));
        }
        let ancestors = StoreAncestors::of(&self.dir, &self.volume.disk());
        let export = VolumeExport::new(Arc::clone(&self.volume));
        let export = export.with_ancestors(Box::new(ancestors));
        Ok(Arc::new(if self.read_only { export.read_only() } else { export }))
    }

    fn list(&self) -> Vec<ExportEntry> {
        vec![ExportEntry { name: self.volume.name().to_owned(), description: String::new() }]
    }

    fn client_came(&self, _: &str, peer: &str) {
        self.volume.tell(VolumeEvent::ClientConnected(peer.to_owned()));
    }

    fn client_went(&self, _: &str, peer: &str, why: Option<&str>) {
        let why = why.map(str::to_owned);
        self.volume.tell(VolumeEvent::ClientDisconnected(peer.to_owned(), why));
    }
}

/// Tells of what happens to volumes.
pub(super) struct Teller(Arc<Events<Event>>);

impl Teller {
    /// Tells `events`.
    pub(super) fn new(events: Arc<Events<Event>>) -> Self {
        Teller(events)
    }
}

impl Observer for Teller {
    fn event(&self, volume: &str, event: VolumeEvent) {
        let object = format!("disk {volume}");
        match event {
            VolumeEvent::Held(why) => self.0.add(EventKind::Held, object, why),
            VolumeEvent::Resumed => self.0.add(EventKind::Resumed, object, ""),
            VolumeEvent::Failed(why) => self.0.add(EventKind::Failed, object, why),
            VolumeEvent::Connected(pid) => {
                let who = pid.map_or_else(String::new, |pid| format!("process {pid}"));
                self.0.add(EventKind::Connected, object, who);
            }
            VolumeEvent::Disconnected(why) => {
                self.0.add(EventKind::Disconnected, object, why.unwrap_or_default());
            }
            VolumeEvent::ClientConnected(who) => self.0.add(EventKind::Connected, object, who),
            VolumeEvent::ClientDisconnected(who, why) => {
                let why = why.map_or_else(String::new, |why| format!(": {why}"));
                self.0.add(EventKind::Disconnected, object, format!("{who}{why}"));
            }
            VolumeEvent::Skipped(count) => {
                let what = format!("{count} events that its clients caused");
                self.0.add(EventKind::Skipped, object, what);
            }
            VolumeEvent::QueueFailed(queue, why) => {
                self.0.add(EventKind::Failed, object, format!("queue {queue}: {why}"));
            }
        }
    }
}

impl Door {
    /// Makes the socket and serves on it.
    ///
    /// # Errors
    /// `Exists` when the path is taken, or what the host reports.
    pub(super) fn open(
        dir: &Arc<StoreDir>,
        volume: &Arc<Volume>,
        spec: ExportSpec,
    ) -> Result<Door> {
        let listener = listen(spec.place()?)?;
        Door::serve_on(dir, volume, spec, listener)
    }

    /// Serves on a socket of a predecessor, and its front ends first of all. One that cannot be
    /// served is cut off, and may connect again. When the socket itself cannot be served, the door
    /// is a failed one.
    pub(super) fn take_over(
        dir: &Arc<StoreDir>,
        volume: &Arc<Volume>,
        spec: ExportSpec,
        handed: HandedDoor,
    ) -> Door {
        let opened = match handed.listener {
            Some(listener) => Door::serve_on(dir, volume, spec.clone(), listener),
            None => Door::open(dir, volume, spec.clone()),
        };
        let door = opened.unwrap_or_else(|e| Door { spec, server: Server::Failed(e.to_string()) });
        if let Server::Vhost(server) = &door.server {
            for session in handed.sessions {
                if let Err(error) = server.adopt(session) {
                    let socket = &door.spec.socket;
                    tracing::warn!(%socket, %error, "a front end must connect again");
                }
            }
        }
        door
    }

    fn serve_on(
        dir: &Arc<StoreDir>,
        volume: &Arc<Volume>,
        spec: ExportSpec,
        listener: OwnedFd,
    ) -> Result<Door> {
        match serve(dir, volume, &spec, listener) {
            Ok(server) => Ok(Door { spec, server }),
            Err(e) => {
                remove_socket(&spec.socket);
                Err(e)
            }
        }
    }

    /// Stops serving NBD clients, who hold the store; the socket stays, and clients that come wait.
    /// NBD has no way to go on with a connection: those there are, are cut off between two
    /// requests.
    pub(super) fn pause_nbd(&mut self) {
        if let Server::Nbd { server, .. } = &mut self.server
            && let Some(server) = server.take()
        {
            stop_nbd(&server, &self.spec);
        }
    }

    /// Goes on after [`Door::pause_nbd`]. When that cannot be, the door is a failed one.
    pub(super) fn resume_nbd(&mut self, dir: &Arc<StoreDir>, volume: &Arc<Volume>) {
        if let Server::Nbd { server: None, listener } = &self.server {
            let listener = listener.try_clone().map_err(Error::from);
            let resumed = listener.and_then(|l| serve(dir, volume, &self.spec, l));
            self.server = resumed.unwrap_or_else(|e| {
                remove_socket(&self.spec.socket);
                Server::Failed(e.to_string())
            });
        }
    }

    /// Stops serving, for a successor: the socket stays, and so do front ends of vhost-user.
    pub(super) fn hand_over(mut self) -> HandedDoor {
        self.pause_nbd();
        match self.server {
            Server::Vhost(server) => {
                let (listener, sessions) = server.hand_over();
                HandedDoor { listener: listener.map(OwnedFd::from), sessions }
            }
            Server::Nbd { listener, .. } => {
                HandedDoor { listener: Some(listener), sessions: Vec::new() }
            }
            Server::Failed(_) => HandedDoor::default(),
        }
    }

    /// Cuts the front ends off and takes the socket away.
    pub(super) fn close(mut self) {
        self.pause_nbd();
        // The listener goes before its file: who finds the file finds somebody.
        match self.server {
            Server::Vhost(server) => drop(server.stop()),
            Server::Nbd { listener, .. } => drop(listener),
            // What is at its path, if anything, is somebody else's.
            Server::Failed(_) => return,
        }
        remove_socket(&self.spec.socket);
    }

    /// Why nobody serves it, if nobody does.
    pub(super) fn failure(&self) -> Option<&str> {
        match &self.server {
            Server::Failed(why) => Some(why),
            Server::Vhost(_) | Server::Nbd { .. } => None,
        }
    }

    /// What it serves.
    pub(super) fn spec(&self) -> &ExportSpec {
        &self.spec
    }

    /// Tells the guests that the disk has another size.
    pub(super) fn config_changed(&self) {
        // NBD has no word for it: clients that connect from now on see the new size.
        if let Server::Vhost(server) = &self.server {
            server.config_changed();
        }
    }

    /// How it is.
    pub(super) fn export(&self, disk: &str) -> Export {
        let (connected, peers, queues_running) = match &self.server {
            Server::Vhost(server) => {
                let status = server.status();
                (status.connected, status.peers, status.queues_running)
            }
            Server::Nbd { server, .. } => {
                let clients = |server: &NbdServer| server.status().connections.len();
                (server.as_ref().map_or(0, clients), Vec::new(), 0)
            }
            Server::Failed(why) => {
                let failed = described(disk, &self.spec, ExportState::Failed);
                return Export { error: Some(why.clone()), ..failed };
            }
        };
        let state = match connected {
            0 => ExportState::Listening,
            _ => ExportState::Connected,
        };
        Export {
            connected: connected as u64,
            peers,
            queues_running: queues_running as u64,
            ..described(disk, &self.spec, state)
        }
    }
}

/// An export that nobody is connected to.
pub(super) fn described(disk: &str, spec: &ExportSpec, state: ExportState) -> Export {
    Export {
        disk: disk.to_owned(),
        kind: spec.kind,
        socket: spec.socket.clone(),
        tls: spec.tls.clone(),
        read_only: spec.read_only,
        queues: spec.queues,
        state,
        connected: 0,
        peers: Vec::new(),
        queues_running: 0,
        error: None,
    }
}

/// Serves on a socket that is bound and listening.
fn serve(
    dir: &Arc<StoreDir>,
    volume: &Arc<Volume>,
    spec: &ExportSpec,
    listener: OwnedFd,
) -> Result<Server> {
    let volume = Arc::clone(volume);
    let same = listener.try_clone()?;
    let listener = match (spec.kind, spec.place()?) {
        (ExportKind::VhostUser, _) => {
            let server = VhostServer::start(volume, listener.into(), spec.vhost_options());
            return server.map(Server::Vhost);
        }
        (ExportKind::Nbd, Place::Unix(_)) => Listener::Unix(listener.into()),
        (ExportKind::Nbd, Place::Tls(_, files)) => Listener::Tls(listener.into(), read(files)?),
    };
    let (dir, read_only) = (Arc::clone(dir), spec.read_only);
    let exports = Arc::new(OneDisk { volume, read_only, dir });
    let server = NbdServer::start(vec![listener], exports, ServerOptions::default())?;
    Ok(Server::Nbd { server: Some(server), listener: same })
}

fn stop_nbd(server: &NbdServer, spec: &ExportSpec) {
    if let Err(error) = server.stop(NBD_GRACE) {
        tracing::warn!(socket = %spec.socket, %error, "cut off");
    }
}

fn read(files: &TlsFiles) -> Result<TlsConfig> {
    let config = TlsConfig::from_files(&files.cert, &files.key, files.client_ca.as_deref());
    config.map_err(|e| match e.kind() {
        Kind::ReadOnly => e.hint(
            "let the daemon's user read it; confined, the daemon reads only below /etc, /run, /tmp \
             and the folders of its store, its control socket and --socket-dir",
        ),
        _ => e,
    })
}

/// Binds a socket and listens.
fn listen(place: Place<'_>) -> Result<OwnedFd> {
    match place {
        Place::Unix(path) => {
            let object = || format!("socket {}", path.display());
            let listen = || match sockets::clear(path)? {
                true => sockets::listen(path),
                false => Err(Error::new(Kind::Exists, "another process listens there")
                    .hint("choose another path")),
            };
            listen().context("listen on", object).map(OwnedFd::from)
        }
        Place::Tls(address, _) => {
            let bound = TcpListener::bind(address).map_err(|e| match e.kind() {
                io::ErrorKind::AddrInUse => {
                    Error::new(Kind::Exists, "another process listens there")
                        .hint("choose another port")
                }
                io::ErrorKind::AddrNotAvailable => {
                    Error::new(Kind::NotFound, "this machine does not have that address")
                }
                _ => e.into(),
            });
            bound.context("listen on", || format!("socket {address}")).map(OwnedFd::from)
        }
    }
}

fn remove_socket(socket: &SocketName) {
    if let SocketName::Unix(path) = socket {
        // What stays is found to be dead by whoever binds there next.
        let _ = fs::remove_file(path);
    }
}
