//! A disk: a virtio block device whose content is blockd's.
//!
//! Mostly we own the guest's ring and are a vhost-user front end of blockd over a private arena
//! ([`DiskPath::Arena`]), so guest memory can be copied on write and blockd never maps it. On
//! request, and while guest memory is one shared file, blockd has the guest's ring itself
//! ([`DiskPath::Direct`]). Each disk has one thread, which sleeps until the guest, blockd or the
//! machine wants something.
//!
//! Disks become arenas' in three steps, each for all of them before the next: rings are had back,
//! arenas are there (`Disk::through_arena`), they take over (`Disk::take_over`). Up to the last
//! one all can stay as they were.

mod arena;
mod direct;
mod engine;
mod link;
mod shape;
mod way;

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
use vhost_blk::queue::QueueSetup;

use super::mmio::{Notifier, VirtioDevice};
use direct::Direct;
pub(super) use direct::Lent;
use engine::Engine;
use link::{Link, Sources};
use shape::Shape;
use way::Way;

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
    /// How its data is to get to the guest.
    #[serde(default)]
    pub path: DiskPath,
}

/// How the data of a disk gets from blockd to the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskPath {
    /// Through a private arena: blockd never sees guest memory.
    #[default]
    Arena,
    /// blockd maps guest memory, and moves data there by itself.
    Direct,
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
    way: Mutex<Way>,
    /// Whether blockd has the guest's ring. Changes with `way`, to false, and under its lock.
    direct: AtomicBool,
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
    /// Connects to blockd and starts the thread. What the guest lends is there for a disk whose
    /// path is [`DiskPath::Direct`].
    pub(super) fn new(
        config: &DiskConfig,
        doorbell: EventFd,
        lent: Option<Lent>,
        notifier: Arc<Notifier>,
    ) -> Result<Disk> {
        let (way, shape) = match lent {
            Some(lent) => {
                let (read_only, kick) = (config.read_only, doorbell.try_clone()?);
                let direct = Direct::connect(&config.socket, read_only, lent, kick, notifier)?;
                let shape = direct.shape.clone();
                (Way::Direct(Box::new(direct)), shape)
            }
            None => {
                let link = Link::connect(&config.socket)?;
                let space = link.first_space();
                let shape = Arc::new(Shape::new(link.features(), space, config.read_only));
                (Way::Arena(Box::new(Engine::new(link, shape.clone(), notifier))), shape)
            }
        };
        let shared = Arc::new(Shared {
            direct: AtomicBool::new(matches!(way, Way::Direct(_))),
            way: Mutex::new(way),
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
        let way = self.shared.way.lock();
        let direct = matches!(*way, Way::Direct(_));
        DiskStatus {
            name: self.name.clone(),
            size: self.shared.shape.size(),
            path: if direct { DiskPath::Direct } else { DiskPath::Arena },
            connected: way.is_up(),
            problem: way.problem().map(Error::to_string),
            in_work: u64::try_from(way.in_work()).unwrap_or(0),
        }
    }

    /// Takes no more requests.
    pub(super) fn pause(&self) {
        self.shared.way.lock().set_paused(true);
    }

    /// Waits until blockd has no request of this disk any more. [`Disk::pause`] or
    /// [`Disk::set_leaving`] was called.
    ///
    /// # Errors
    /// `Busy` when that takes longer than two seconds.
    pub(super) fn drain(&self) -> Result<()> {
        let end = Instant::now() + QUIESCE;
        let mut way = self.shared.way.lock();
        loop {
            way.run();
            if way.is_quiet() {
                return Ok(());
            }
            if Instant::now() >= end {
                let reason = "requests do not come back";
                let e =
                    Error::new(Kind::Busy, reason).tried("stop").on(format!("disk {}", self.name));
                return Err(e.hint("see whether blockd serves the disk"));
            }
            way.wait_a_little();
        }
    }

    /// Takes requests again, first those that came meanwhile.
    pub(super) fn resume(&self) {
        self.shared.way.lock().set_paused(false);
        self.shared.wake.signal();
    }

    /// Whether blockd has the guest's ring.
    pub(super) fn is_direct(&self) -> bool {
        self.shared.is_direct()
    }

    /// Asks blockd for the ring, or gives it back.
    fn set_leaving(&self, leaving: bool) {
        if let Way::Direct(direct) = &mut *self.shared.way.lock() {
            direct.set_leaving(leaving);
        }
        // What its thread sleeps on may be another connection now.
        self.shared.wake.signal();
    }

    /// The arena that is to go on where the ring stands; none for a disk that has one.
    ///
    /// # Errors
    /// When blockd does not serve it so.
    fn through_arena(&self) -> Result<Option<Box<Engine>>> {
        match &*self.shared.way.lock() {
            Way::Direct(direct) => direct.through_arena().map(|engine| Some(Box::new(engine))),
            Way::Arena(_) => Ok(None),
        }
    }

    /// Goes on through an arena, and has blockd let go of guest memory.
    fn take_over(&self, engine: Box<Engine>) {
        let mut way = self.shared.way.lock();
        if let Way::Direct(direct) = std::mem::replace(&mut *way, Way::Arena(engine)) {
            way.set_paused(direct.take_memory_back());
        }
        self.shared.direct.store(false, Ordering::Release); // pairs with the load in `is_direct`
        // The last interrupts came from blockd, without the cause that the driver asks for.
        if let Way::Arena(engine) = &*way {
            engine.notify();
        }
        self.shared.wake.signal();
    }
}

/// Has all disks whose rings blockd has go on through arenas, or none. Gives back their names.
///
/// # Errors
/// What keeps one of them from it.
pub(super) fn take_memory_back(disks: &[Disk]) -> Result<Vec<String>> {
    let direct: Vec<&Disk> = disks.iter().filter(|disk| disk.is_direct()).collect();
    // All first: while one drains, the others shall not begin more.
    direct.iter().for_each(|disk| disk.set_leaving(true));
    let drained = direct.iter().try_for_each(|disk| disk.drain());
    let arenas = drained.and_then(|()| {
        let arenas = direct.iter().map(|disk| disk.through_arena());
        arenas.collect::<Result<Vec<_>>>()
    });
    let arenas = arenas.inspect_err(|_| direct.iter().for_each(|disk| disk.set_leaving(false)))?;
    for (disk, arena) in direct.iter().zip(arenas) {
        arena.into_iter().for_each(|arena| disk.take_over(arena));
    }
    Ok(direct.iter().map(|disk| disk.name.clone()).collect())
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
    fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Acquire) // pairs with the store in `take_over`
    }

    /// The disk's thread.
    fn serve(&self) {
        let mut tend = false;
        // Pairs with the store in `drop`.
        while !self.ending.load(Ordering::Acquire) {
            let (sources, until, bell, idle, direct) = {
                let mut way = self.way.lock();
                if tend {
                    way.tend();
                }
                let more = way.run();
                let idle = !more && way.arm();
                let (sources, until) = way.sleep_on();
                (sources, until, way.bell(), idle, matches!(*way, Way::Direct(_)))
            };
            let most = if idle { until } else { Some(Instant::now()) };
            let doorbell = (!direct).then_some(&self.doorbell);
            let broken = self.sleep(doorbell, sources.as_deref(), &bell, most);
            tend = broken || sources.is_none();
            // A doorbell that is blockd's is left to it.
            doorbell.map(EventFd::drain);
            self.wake.drain();
        }
    }

    /// Sleeps until something happens; whether it happened to the connection.
    fn sleep(
        &self,
        doorbell: Option<&EventFd>,
        sources: Option<&Sources>,
        bell: &EventFd,
        until: Option<Instant>,
    ) -> bool {
        let mut fds: [Option<BorrowedFd<'_>>; 5] = [None; 5];
        fds[0] = doorbell.map(AsFd::as_fd);
        fds[1] = Some(self.wake.as_fd());
        fds[2] = Some(bell.as_fd());
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
        let before = self.shared.shape.is_write_back();
        self.shared.shape.write(offset, data);
        if self.shared.shape.is_write_back() != before
            && self.shared.is_direct()
            && let Way::Direct(direct) = &mut *self.shared.way.lock()
        {
            // The driver counts on the new mode as soon as this access ends: it waits for blockd,
            // which makes durable what was written under the old one.
            direct.cache_mode_changed();
        }
    }

    fn config_generation(&self) -> u32 {
        self.shared.shape.generation()
    }

    fn start(&mut self, features: u64, rings: Vec<QueueSetup>) -> Result<()> {
        let setup = rings.into_iter().next().ok_or_else(|| Error::invalid("no queue"))?;
        let implied = Shape::initial_write_back(features);
        self.shared.shape.set_write_back(self.write_back.take().unwrap_or(implied));
        self.shared.way.lock().start(setup)?;
        self.shared.wake.signal();
        Ok(())
    }

    fn stop(&mut self) {
        self.shared.way.lock().stop();
        self.shared.shape.set_write_back(true);
    }

    fn notify(&mut self, _queue: u16) {
        self.shared.doorbell.signal();
    }

    fn completes_unseen(&self) -> bool {
        self.shared.is_direct()
    }

    fn bases(&self) -> Vec<u32> {
        self.shared.way.lock().base().into_iter().collect()
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
