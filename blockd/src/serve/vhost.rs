//! A disk behind a vhost-user-blk socket.
//!
//! A server accepts front ends, each with a control thread of its own. Several may be connected,
//! as in a live migration, when source and destination are; but the rings of only one of them run
//! at a time, because two guests on one disk would destroy its file system.
//!
//! Lock order: `sessions`, then a front end's `workers`.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use vhost_blk::blk::{Capabilities, RangeLimits};
use vhost_blk::event::EventFd;
use vhost_blk::session::{ActiveQueue, Device, End, Handover, Session, SessionHandle};

use super::queue::{self, Setup, WorkerState};
use super::slow::Mailbox;
use super::volume::{Volume, VolumeEvent};
use crate::sockets::Peer;

/// Front ends that may be connected at once: two of a migration, and two that are about to go.
const SESSIONS_MAX: usize = 4;
/// Bytes of one discard or write-zeroes range: what a thread empties at once.
const RANGE_BYTES_MAX: u32 = 1 << 30;
const SECTOR: u32 = 512;
/// How long a front end that wants to run waits for another one's rings to stop: that of a monitor
/// that has just died still finishes what it has in work.
const OWNER_WAIT: Duration = Duration::from_secs(2);
/// How long to look for a worker's next round before waking it again.
const ROUND_WAIT: Duration = Duration::from_micros(200);

/// How a disk is offered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VhostOptions {
    /// Number of queues.
    pub queues: u16,
    /// Most descriptors of a queue.
    pub queue_size_max: u16,
    /// Refuse writes, whatever the disk could do.
    pub read_only: bool,
    /// Let the driver choose packed rings.
    pub packed: bool,
    /// Most microseconds that a queue polls before it sleeps; 0 for never.
    pub poll_us_max: u32,
    /// Logical block size that the guest is told, in bytes.
    pub block_size: u32,
}

impl Default for VhostOptions {
    fn default() -> Self {
        VhostOptions {
            queues: 1,
            queue_size_max: 1024,
            read_only: false,
            packed: true,
            poll_us_max: 32,
            block_size: SECTOR,
        }
    }
}

/// What a server is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostStatus {
    /// Front ends that are connected.
    pub connected: usize,
    /// Their process ids, where the host tells.
    pub peers: Vec<u32>,
    /// Queues that run.
    pub queues_running: usize,
}

/// What the server and its front ends share.
struct Shared {
    volume: Arc<Volume>,
    options: VhostOptions,
    sessions: Mutex<Vec<Front>>,
    next_id: AtomicU64,
    /// The front end whose rings run.
    owner: Mutex<Owner>,
    /// A ring of it stopped.
    ring_stopped: Condvar,
    stopping: AtomicBool,
    wake: EventFd,
}

#[derive(Default)]
struct Owner {
    id: u64,
    queues: usize,
}

impl Shared {
    /// Gives back what a front end that is gone has kept open. Its thread, which is the caller, is
    /// still waited for by who stops the server.
    fn end_session(&self, id: u64) {
        // Begun under the same lock that it was entered under: it is there, or the server stops.
        let mut sessions = self.sessions.lock();
        if let Some(front) = sessions.iter_mut().find(|front| front.id == id) {
            front.handle = None;
        }
    }
}

/// A connected front end, or one that is gone and whose thread is about to end.
struct Front {
    id: u64,
    peer: Option<u32>,
    /// None from the end of its session on: what it keeps open is given back at once, and not when
    /// the next front end comes, which may be never.
    handle: Option<SessionHandle>,
    thread: JoinHandle<Option<Session>>,
}

/// One vhost-user socket of one volume.
pub struct VhostServer {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<UnixListener>>,
}

impl VhostServer {
    /// Serves `volume` on a listening socket.
    ///
    /// # Errors
    /// `Invalid` for an impossible number of queues, or what the host reports.
    pub fn start(
        volume: Arc<Volume>,
        listener: UnixListener,
        options: VhostOptions,
    ) -> Result<VhostServer> {
        if options.queues == 0 || options.queues > vhost_blk::session::QUEUES_MAX {
            let reason = format!("{} queues: a device has 1 to 256", options.queues);
            return Err(Error::invalid(reason).on(format!("disk {}", volume.name())));
        }
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            volume,
            options,
            sessions: Mutex::default(),
            next_id: AtomicU64::new(1),
            owner: Mutex::default(),
            ring_stopped: Condvar::new(),
            stopping: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let accepting = Arc::clone(&shared);
        let name = format!("accept {}", shared.volume.name());
        let acceptor = std::thread::Builder::new()
            .name(name)
            .spawn(move || accept_all(&accepting, listener))
            .map_err(|e| Error::from(e).tried("start a thread"))?;
        Ok(VhostServer { shared, acceptor: Some(acceptor) })
    }

    /// What the server is doing.
    #[must_use]
    pub fn status(&self) -> VhostStatus {
        let sessions = self.shared.sessions.lock();
        let live = || sessions.iter().filter(|front| front.handle.is_some());
        VhostStatus {
            connected: live().count(),
            peers: live().filter_map(|front| front.peer).collect(),
            queues_running: self.shared.owner.lock().queues,
        }
    }

    /// The volume it serves.
    #[must_use]
    pub fn volume(&self) -> &Arc<Volume> {
        &self.shared.volume
    }

    /// Tells the guests that the disk has another size now.
    pub fn config_changed(&self) {
        for handle in self.shared.sessions.lock().iter().filter_map(|f| f.handle.as_ref()) {
            if let Err(error) = handle.config_changed() {
                tracing::debug!(%error, "a front end was not told of the new size");
            }
        }
    }

    /// Serves a front end that a predecessor was serving.
    ///
    /// # Errors
    /// As [`Session::from_handover`].
    pub fn adopt(&self, handover: Handover) -> Result<()> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed); // any number will do
        let device = FrontDevice::new(&self.shared, id);
        let (session, handle) = Session::from_handover(handover, &device)?;
        let peer = pid_of(session.socket());
        run_session(&self.shared, device, session, handle, peer)
    }

    /// Stops: requests in work are finished, front ends disconnected. Returns the listener, whose
    /// socket stays where it is.
    pub fn stop(mut self) -> Option<UnixListener> {
        self.end().0
    }

    /// Stops and keeps the front ends connected, for a successor in another process.
    pub fn hand_over(mut self) -> (Option<UnixListener>, Vec<Handover>) {
        let (listener, sessions) = self.end();
        let hand = |session: Session| match session.into_handover() {
            Ok(handover) => Some(handover),
            Err(error) => {
                tracing::warn!(%error, "a front end must connect again");
                None
            }
        };
        (listener, sessions.into_iter().filter_map(hand).collect())
    }

    fn end(&mut self) -> (Option<UnixListener>, Vec<Session>) {
        self.shared.stopping.store(true, Ordering::Release); // pairs with the load in `accept_all`
        self.shared.wake.signal();
        let listener = self.acceptor.take().and_then(|thread| thread.join().ok());
        let fronts = std::mem::take(&mut *self.shared.sessions.lock());
        fronts.iter().filter_map(|f| f.handle.as_ref()).for_each(SessionHandle::stop);
        let sessions = fronts.into_iter().filter_map(|front| front.thread.join().ok().flatten());
        (listener, sessions.collect())
    }
}

impl Drop for VhostServer {
    fn drop(&mut self) {
        self.end();
    }
}

fn accept_all(shared: &Arc<Shared>, listener: UnixListener) -> UnixListener {
    loop {
        let mut fds =
            [PollFd::new(&listener, PollFlags::IN), PollFd::new(&shared.wake, PollFlags::IN)];
        // An interrupted wait looks at both and waits again.
        let _ = poll(&mut fds, None);
        if shared.stopping.load(Ordering::Acquire) {
            return listener;
        }
        match listener.accept() {
            Ok((socket, _)) => {
                if let Err(error) = greet(shared, socket) {
                    let why = format!("refused: {error}");
                    shared.volume.tell(VolumeEvent::Disconnected(Some(why)));
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(disk = %shared.volume.name(), %error, "cannot accept");
                // No descriptor is free, most likely: others will end.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn greet(shared: &Arc<Shared>, socket: UnixStream) -> Result<()> {
    shared.sessions.lock().retain(|front| !front.thread.is_finished());
    if shared.sessions.lock().len() >= SESSIONS_MAX {
        return Err(Error::new(Kind::Busy, "too many front ends are connected"));
    }
    let peer = pid_of(&socket);
    let id = shared.next_id.fetch_add(1, Ordering::Relaxed); // any number will do
    let device = FrontDevice::new(shared, id);
    let (session, handle) = Session::new(socket, &device)?;
    run_session(shared, device, session, handle, peer)
}

/// The process at the other end, where the host tells.
fn pid_of(socket: &UnixStream) -> Option<u32> {
    Peer::of(socket).ok()?.pid
}

fn run_session(
    shared: &Arc<Shared>,
    mut device: FrontDevice,
    mut session: Session,
    handle: SessionHandle,
    peer: Option<u32>,
) -> Result<()> {
    let (name, id) = (format!("vhost {}", shared.volume.name()), device.id);
    let mut sessions = shared.sessions.lock();
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        device.shared.volume.tell(VolumeEvent::Connected(peer));
        let outcome = session.run(&mut device);
        device.join_workers();
        // Dropped here unless it goes to a successor.
        let session = matches!(outcome, Ok(End::Stopped)).then_some(session);
        device.shared.end_session(device.id);
        let why = outcome.err().map(|e| e.to_string());
        device.shared.volume.tell(VolumeEvent::Disconnected(why));
        session
    });
    let thread = thread.map_err(|e| Error::from(e).tried("start a thread"))?;
    sessions.push(Front { id, peer, handle: Some(handle), thread });
    Ok(())
}

/// A worker thread of a front end.
struct WorkerHandle {
    state: Arc<WorkerState>,
    mailbox: Weak<Mailbox>,
    thread: JoinHandle<()>,
}

/// The device that one front end sees.
struct FrontDevice {
    shared: Arc<Shared>,
    id: u64,
    workers: Vec<WorkerHandle>,
}

impl FrontDevice {
    fn reads_only(&self) -> bool {
        self.shared.options.read_only || !self.shared.volume.disk().is_writable()
    }

    fn new(shared: &Arc<Shared>, id: u64) -> Self {
        FrontDevice { shared: Arc::clone(shared), id, workers: Vec::new() }
    }

    /// Drops workers that have ended.
    fn sweep(&mut self) {
        for worker in self.workers.extract_if(.., |w| w.thread.is_finished()) {
            // A worker that panicked has said so already.
            let _ = worker.thread.join();
        }
    }

    fn join_workers(&mut self) {
        for worker in self.workers.drain(..) {
            let _ = worker.thread.join();
        }
    }

    /// Waits until every worker has begun a round after now.
    fn pass_all(&mut self) {
        self.sweep();
        for worker in &self.workers {
            let seen = worker.state.rounds();
            while worker.state.rounds() == seen && !worker.state.has_ended() {
                if let Some(mailbox) = worker.mailbox.upgrade() {
                    mailbox.wake();
                }
                std::thread::sleep(ROUND_WAIT);
            }
        }
    }

    fn serial(&self) -> [u8; 20] {
        let mut serial = [0; 20];
        let name = self.shared.volume.name().as_bytes();
        let len = name.len().min(serial.len());
        serial[..len].copy_from_slice(&name[..len]);
        serial
    }
}

/// Marks a queue of a front end as running for as long as it lives.
struct Running {
    shared: Arc<Shared>,
}

impl Running {
    fn begin(shared: &Arc<Shared>, id: u64) -> Result<Running> {
        let mut owner = shared.owner.lock();
        let until = Instant::now() + OWNER_WAIT;
        while owner.queues > 0 && owner.id != id {
            if shared.ring_stopped.wait_until(&mut owner, until).timed_out() {
                return Err(Error::new(Kind::Busy, "another front end is running this disk")
                    .tried("start a queue of")
                    .on(format!("disk {}", shared.volume.name())));
            }
        }
        owner.id = id;
        owner.queues += 1;
        Ok(Running { shared: Arc::clone(shared) })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.owner.lock().queues -= 1;
        self.shared.ring_stopped.notify_all();
    }
}

impl Device for FrontDevice {
    fn capabilities(&self) -> Capabilities {
        let (volume, options) = (&self.shared.volume, &self.shared.options);
        let disk = volume.disk();
        let read_only = self.reads_only();
        let ranges = RangeLimits {
            sectors_max: RANGE_BYTES_MAX / SECTOR,
            ranges_max: 16,
            alignment: 4096 / SECTOR,
        };
        let physical = 4096 / options.block_size.max(SECTOR);
        Capabilities {
            sectors: disk.size() / u64::from(SECTOR),
            block_size: options.block_size,
            physical_block_exp: u8::try_from(physical.max(1).ilog2()).unwrap_or(0),
            min_io_blocks: u16::try_from(physical.max(1)).unwrap_or(1),
            opt_io_blocks: (64 << 10) / options.block_size.max(SECTOR),
            read_only,
            volatile_cache: !read_only,
            discard: Some(ranges),
            write_zeroes: Some(ranges),
            write_zeroes_unmaps: true,
            queues: options.queues,
            queue_size_max: options.queue_size_max,
            packed: options.packed,
            serial: self.serial(),
            ..Capabilities::default()
        }
    }

    fn start_queue(&mut self, queue: ActiveQueue) -> Result<()> {
        self.sweep();
        let running = Running::begin(&self.shared, self.id)?;
        let state = Arc::<WorkerState>::default();
        let setup = Setup {
            volume: Arc::clone(&self.shared.volume),
            limits: self.capabilities().limits(queue.features()),
            poll_us_max: self.shared.options.poll_us_max,
            serial: self.serial(),
            state: Arc::clone(&state),
            queue,
        };
        let name = format!("queue {} {}", setup.queue.index(), self.shared.volume.name());
        let (started, outcome) = sync_channel(1);
        let work = move || {
            queue::work(setup, &started);
            drop(running);
        };
        let thread = std::thread::Builder::new().name(name).spawn(work);
        let thread = thread.map_err(|e| Error::from(e).tried("start a thread"))?;
        let gone = || Error::new(Kind::Failed, "the worker of a queue ended at once");
        let mailbox = outcome.recv().map_err(|_| gone())??;
        self.workers.push(WorkerHandle { state, mailbox: Arc::downgrade(&mailbox), thread });
        Ok(())
    }

    fn write_cache_changed(&mut self, write_back: bool) -> Result<()> {
        if self.reads_only() {
            // It has nothing that could be lost. Another front end's choice is not its business,
            // and a store that nobody writes to has no folder to remember anything in.
            return Ok(());
        }
        if !write_back {
            // What a worker began under the old mode completes before its next round, or is
            // flushed by the worker itself, which has seen the new mode then.
            self.pass_all();
            self.shared.volume.disk().flush()?;
        }
        self.shared.volume.cache_mode().remember(write_back)
    }

    fn remembered_write_cache(&self) -> Option<bool> {
        if self.reads_only() { None } else { self.shared.volume.cache_mode().remembered() }
    }

    fn queue_failed(&mut self, index: u16, error: &Error) {
        self.shared.volume.tell(VolumeEvent::QueueFailed(index, error.to_string()));
    }
}
