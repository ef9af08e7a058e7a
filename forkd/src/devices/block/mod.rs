//! A disk: a virtio block device whose content is blockd's.
//!
//! We own the guest's ring and are a vhost-user front end of blockd over a private arena
//! ([`DiskPath::Arena`]), so guest memory can be copied on write and blockd never maps it. Each
//! disk has one thread, which sleeps until the guest, blockd or the machine wants something.

mod arena;
mod engine;
mod link;
mod shape;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use format::{Context, Error, Kind, Result};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use vhost_blk::event::EventFd;
use vhost_blk::queue::{Queue, QueueSetup};

use super::mmio::{Notifier, VirtioDevice};
use engine::Engine;
use link::{Link, Sources};
use shape::Shape;

/// How long a stop waits for requests that blockd has.
const QUIESCE: Duration = Duration::from_secs(2);
const QUEUE_SIZE: u16 = 256;

/// One disk of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// What it is called.
    pub name: String,
    /// The socket on which blockd serves it.
    pub socket: PathBuf,
    /// Whether the guest must not write it, whatever blockd would allow.
    pub read_only: bool,
}

/// How the data of a disk gets from blockd to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskPath {
    /// Through a private arena: blockd never sees guest memory.
    Arena,
}

/// A disk as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// What it is called.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// How data gets to the guest.
    pub path: DiskPath,
    /// Whether blockd is there. If not, requests wait.
    pub connected: bool,
    /// Why not.
    pub problem: Option<String>,
    /// Requests in work.
    pub in_work: u64,
}

/// What the disk's thread, the registers and the machine share.
struct Shared {
    engine: Mutex<Engine>,
    shape: Arc<Shape>,
    /// Rung by the guest.
    doorbell: EventFd,
    /// Rung by whoever wants the thread to look again.
    wake: EventFd,
    ending: AtomicBool,
}

/// The machine's end of a disk. Dropping it ends its thread.
pub(super) struct Disk {
    name: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Disk {
    /// Connects to blockd and starts the thread.
    pub(super) fn new(
        config: &DiskConfig,
        doorbell: EventFd,
        notifier: Arc<Notifier>,
    ) -> Result<Disk> {
        let mut link = Link::connect(&config.socket)?;
        let space = link.space()?;
        let shape = Arc::new(Shape::new(link.features(), space, config.read_only));
        let shared = Arc::new(Shared {
            engine: Mutex::new(Engine::new(link, shape.clone(), notifier)),
            shape,
            doorbell,
            wake: EventFd::new()?,
            ending: AtomicBool::new(false),
        });
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("disk-{}", config.name).chars().take(15).collect())
            .spawn(move || for_thread.serve())
            .context("start a thread for", || format!("disk {}", config.name))?;
        Ok(Disk { name: config.name.clone(), shared, thread: Some(thread) })
    }

    /// What the guest sees of it.
    pub(super) fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Block { shared: self.shared.clone(), write_back: None })
    }

    pub(super) fn status(&self) -> DiskStatus {
        let engine = self.shared.engine.lock();
        DiskStatus {
            name: self.name.clone(),
            size: self.shared.shape.size(),
            path: DiskPath::Arena,
            connected: engine.link.is_up(),
            problem: engine.link.problem().map(Error::to_string),
            in_work: u64::try_from(engine.in_work()).unwrap_or(0),
        }
    }

    /// Takes no more requests.
    pub(super) fn pause(&self) {
        self.shared.engine.lock().set_paused(true);
    }

    /// Waits until blockd has no request of this disk any more. [`Disk::pause`] was called.
    ///
    /// # Errors
    /// `Busy` when that takes longer than two seconds.
    pub(super) fn drain(&self) -> Result<()> {
        let end = Instant::now() + QUIESCE;
        let mut engine = self.shared.engine.lock();
        loop {
            engine.run();
            if engine.in_work() == 0 {
                return Ok(());
            }
            if Instant::now() >= end {
                let reason = "requests do not come back";
                let e =
                    Error::new(Kind::Busy, reason).tried("stop").on(format!("disk {}", self.name));
                return Err(e.hint("see whether blockd serves the disk"));
            }
            if !engine.link.queue.wait(5) {
                engine.tend();
            }
        }
    }

    /// Takes requests again, first those that came meanwhile.
    pub(super) fn resume(&self) {
        self.shared.engine.lock().set_paused(false);
        self.shared.wake.signal();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release); // pairs with the load in `serve`
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked said so; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The disk's thread.
    fn serve(&self) {
        let mut tend = false;
        // Pairs with the store in `drop`.
        while !self.ending.load(Ordering::Acquire) {
            let (sources, until, calls, idle) = {
                let mut engine = self.engine.lock();
                if tend {
                    engine.tend();
                }
                let more = engine.run();
                let idle = !more && engine.arm();
                let (sources, until) = engine.link.sleep_on();
                (sources, until, engine.link.queue.calls(), idle)
            };
            let most = if idle { until } else { Some(Instant::now()) };
            let broken = self.sleep(sources.as_deref(), &calls, most);
            tend = broken || sources.is_none();
            self.doorbell.drain();
            self.wake.drain();
        }
    }

    /// Sleeps until something happens; whether it happened to the connection.
    fn sleep(&self, sources: Option<&Sources>, calls: &EventFd, until: Option<Instant>) -> bool {
        let mut fds: [Option<BorrowedFd<'_>>; 5] = [None; 5];
        fds[0] = Some(self.doorbell.as_fd());
        fds[1] = Some(self.wake.as_fd());
        fds[2] = Some(calls.as_fd());
        fds[3] = sources.map(|s| s.socket.as_fd());
        fds[4] = sources.and_then(|s| s.channel.as_ref()).map(AsFd::as_fd);
        let wake = self.wake.as_fd();
        // A descriptor that is not there is looked at with no wish.
        let mut polls = fds.map(|fd| match fd {
            Some(fd) => PollFd::from_borrowed_fd(fd, PollFlags::IN),
            None => PollFd::from_borrowed_fd(wake, PollFlags::empty()),
        });
        let time = until.map(|t| t.saturating_duration_since(Instant::now()));
        let time = time.and_then(|t| Timespec::try_from(t).ok());
        // An interrupted call is a wake-up for nothing.
        let _ = poll(&mut polls, time.as_ref());
        polls[3..].iter().zip(&fds[3..]).any(|(p, fd)| fd.is_some() && !p.revents().is_empty())
    }
}

/// The device as its registers see it.
struct Block {
    shared: Arc<Shared>,
    /// The cache mode of a saved device, until it starts.
    write_back: Option<bool>,
}

/// What is saved besides the registers.
#[derive(Debug, Serialize, Deserialize)]
struct BlockState {
    write_back: bool,
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        2
    }

    fn queues(&self) -> u16 {
        1
    }

    fn queue_size_max(&self) -> u16 {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.shared.shape.features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.shape.read(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.shared.shape.write(offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.shared.shape.generation()
    }

    fn start(&mut self, features: u64, rings: Vec<QueueSetup>) -> Result<()> {
        let setup = rings.into_iter().next().ok_or_else(|| Error::invalid("no queue"))?;
        let queue = Queue::new(setup)?;
        let implied = Shape::initial_write_back(features);
        self.shared.shape.set_write_back(self.write_back.take().unwrap_or(implied));
        self.shared.engine.lock().start(queue, features);
        self.shared.wake.signal();
        Ok(())
    }

    fn stop(&mut self) {
        self.shared.engine.lock().stop();
        self.shared.shape.set_write_back(true);
    }

    fn notify(&mut self, _queue: u16) {
        self.shared.doorbell.signal();
    }

    fn bases(&self) -> Vec<u32> {
        self.shared.engine.lock().base().into_iter().collect()
    }

    fn save(&self) -> serde_json::Value {
        let state = BlockState { write_back: self.shared.shape.is_write_back() };
        serde_json::to_value(state).unwrap_or_default()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<()> {
        let state = BlockState::deserialize(state)
            .map_err(|e| Error::corrupt("the state of a disk cannot be read").caused_by(e))?;
        self.write_back = Some(state.write_back);
        Ok(())
    }
}
