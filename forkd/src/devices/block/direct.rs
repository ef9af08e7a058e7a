//! A disk whose ring is blockd's: it maps guest memory, is kicked by the guest and raises the
//! guest's interrupt itself. What is left to do here is to say when it has the ring.
//!
//! blockd is asked to give the ring back when the machine stands, when the driver resets the
//! device, and when guest memory is taken back; what it has begun is finished before it answers.
//! The guest puts requests into its ring meanwhile, and they wait there.
//!
//! Invariants:
//! - [`Ring`] says who has the ring. Only what is `Stopped` is started, and it is `Stopped` only by
//!   an answer of blockd, or when blockd is gone and had nothing to do.
//! - While blockd is gone, the ring counts as blockd's: the in-flight area tells the next one which
//!   requests the last one had begun, and the used index where it was.
//! - A driver that was reset finds nobody in its memory: a reset waits for the ring.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Context as _, Error, Kind, Result};
use vhost_blk::blk::{F_CONFIG_WCE, F_RO};
use vhost_blk::client::{DirectClient, GuestRing, SharedMemory};
use vhost_blk::event::EventFd;
use vhost_blk::memory::GuestAddr;
use vhost_blk::queue::{Queue, QueueSetup};

use super::engine::Engine;
use super::link::{Link, RETRY, SPACE, Sources, is_readable_in, readable};
use super::shape::Shape;
use crate::devices::mmio::Notifier;

/// How long a reset waits for requests that blockd has.
const RESET_MAX: Duration = Duration::from_secs(30);

/// What a guest lends to blockd.
pub(in crate::devices) struct Lent {
    /// Its memory.
    pub(in crate::devices) memory: SharedMemory,
    /// Rings the interrupt.
    pub(in crate::devices) call: EventFd,
}

/// Who has the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ring {
    /// There is none.
    Off,
    /// blockd, or the next one, when there is none.
    Theirs,
    /// blockd, which was asked to give it back.
    Asked,
    /// Nobody: it stands at this position.
    Stopped(u32),
}

/// One disk at work.
pub(super) struct Direct {
    path: PathBuf,
    client: DirectClient,
    sources: Arc<Sources>,
    /// When to try again to connect; `None` while connected.
    down: Option<Instant>,
    /// How long to wait after the next loss.
    wait: Duration,
    problem: Option<Error>,
    /// What the guest's driver set up.
    driver: Option<QueueSetup>,
    ring: Ring,
    /// The machine stands.
    paused: bool,
    /// Guest memory is about to be taken back.
    leaving: bool,
    /// blockd said that the configuration changed, and it was not read yet.
    announced: bool,
    kick: EventFd,
    call: EventFd,
    /// Rung by blockd when the driver broke its ring.
    broke: Arc<EventFd>,
    pub(super) shape: Arc<Shape>,
    notifier: Arc<Notifier>,
}

impl Direct {
    /// Connects, and lends the guest's memory. `kick` is rung by the guest.
    ///
    /// # Errors
    /// When nobody serves the disk there, or not as needed.
    pub(super) fn connect(
        path: &Path,
        read_only: bool,
        lent: Lent,
        kick: EventFd,
        notifier: Arc<Notifier>,
    ) -> Result<Direct> {
        let connect = || -> Result<Direct> {
            let mut client = DirectClient::connect(path, lent.memory)?;
            if read_only && client.offered() & F_RO == 0 {
                let reason = "it is served for writing, and nobody stands between it and a guest \
                              that is to read only";
                return Err(Error::invalid(reason));
            }
            let mut space = [0; SPACE];
            client.config(0, &mut space)?;
            let shape = Arc::new(Shape::new(client.offered(), space, false));
            let sources = Arc::new(sources_of(&client)?);
            Ok(Direct {
                path: path.to_owned(),
                client,
                sources,
                down: None,
                wait: RETRY.0,
                problem: None,
                driver: None,
                ring: Ring::Off,
                paused: true,
                leaving: false,
                announced: false,
                kick,
                call: lent.call,
                broke: Arc::new(EventFd::new()?),
                shape,
                notifier,
            })
        };
        connect().context("connect to the disk at", || path.display().to_string())
    }

    /// A driver set up its ring.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn start(&mut self, setup: QueueSetup) -> Result<()> {
        self.stop();
        // What blockd would refuse is the driver's fault, and it is told of it here.
        Queue::new(setup.clone())?;
        self.ring = Ring::Stopped(setup.base);
        self.driver = Some(setup);
        self.go_on();
        Ok(())
    }

    /// The driver is gone, or broke its ring. Waits until blockd has nothing to do with it.
    pub(super) fn stop(&mut self) {
        if self.driver.take().is_none() {
            return;
        }
        self.ask_back();
        let until = Instant::now() + RESET_MAX;
        while self.ring == Ring::Asked {
            if is_readable_in(&self.sources.socket, until.saturating_duration_since(Instant::now()))
            {
                self.hear();
            } else {
                self.lost(Error::new(Kind::Busy, "blockd does not give the ring back"));
            }
        }
        self.ring = Ring::Off;
        self.client.forget();
    }

    pub(super) fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
        self.hand_on();
    }

    pub(super) fn set_leaving(&mut self, leaving: bool) {
        self.leaving = leaving;
        self.hand_on();
    }

    fn is_held(&self) -> bool {
        self.paused || self.leaving
    }

    fn hand_on(&mut self) {
        if self.is_held() { self.ask_back() } else { self.go_on() }
    }

    /// Gives the ring to blockd if it is there and nothing holds the ring.
    fn go_on(&mut self) {
        if let (Ring::Stopped(base), None, false) = (self.ring, self.down, self.is_held()) {
            self.give(base);
        }
    }

    fn give(&mut self, base: u32) {
        let Some(setup) = &self.driver else { return };
        let ring = GuestRing {
            size: setup.size,
            addrs: setup.addrs,
            features: setup.features,
            write_back: self.shape.is_write_back(),
            kick: &self.kick,
            call: &self.call,
            err: &self.broke,
        };
        // Before it is tried: from the first word on, only blockd or the area knows where it is.
        self.ring = Ring::Theirs;
        match self.client.start(&ring, base) {
            Ok(()) => {
                self.wait = RETRY.0;
                // A kick may have been taken by one that did not look any more.
                self.kick.signal();
            }
            Err(e) => self.lost(e),
        }
    }

    /// Asks for the ring, if blockd has it.
    fn ask_back(&mut self) {
        if self.ring != Ring::Theirs {
            return;
        }
        if self.down.is_some() {
            if let (0, Some(used)) = (self.in_ring(), self.used_index()) {
                self.ring = Ring::Stopped(used.into());
            }
            return;
        }
        match self.client.stop_soon() {
            Ok(()) => self.ring = Ring::Asked,
            Err(e) => self.lost(e),
        }
    }

    /// Takes what blockd says: the answer that was asked for. Nothing else comes but the end.
    fn hear(&mut self) {
        let heard = match self.ring {
            Ring::Asked => self.client.stopped(),
            _ => Err(Error::new(Kind::Io, "blockd closed the connection")),
        };
        match heard {
            Ok(None) => {}
            Ok(Some(base)) => {
                self.ring = Ring::Stopped(base);
                self.go_on();
            }
            Err(e) => self.lost(e),
        }
    }

    fn lost(&mut self, why: Error) {
        self.down = Some(Instant::now() + self.wait);
        self.wait = (self.wait * 2).min(RETRY.1);
        self.problem = Some(why);
        if self.ring == Ring::Asked {
            self.ring = Ring::Theirs;
        }
    }

    /// Looks after the connection.
    pub(super) fn tend(&mut self) {
        match self.down {
            Some(next) if Instant::now() < next => return,
            Some(_) => self.connect_again(),
            None if readable(&self.sources.socket) => self.hear(),
            None => {}
        }
        self.look_at_configuration();
    }

    fn connect_again(&mut self) {
        let again = self.client.reconnect(&self.path).and_then(|()| sources_of(&self.client));
        match again {
            Ok(sources) => self.sources = Arc::new(sources),
            Err(e) => return self.lost(e),
        }
        (self.down, self.problem, self.announced) = (None, None, true);
        match self.ring {
            Ring::Theirs => {
                self.give(self.used_index().unwrap_or(0).into());
                self.hand_on();
            }
            _ => self.go_on(),
        }
    }

    fn look_at_configuration(&mut self) {
        if self.sources.channel.as_ref().is_some_and(readable) {
            match self.client.config_changed() {
                Ok(true) => self.announced = true,
                // A channel that is at its end, or where something else arrives, would wake us for
                // ever.
                Ok(false) | Err(_) => {
                    if let Ok(Sources { socket, .. }) = sources_of(&self.client) {
                        self.sources = Arc::new(Sources { socket, channel: None });
                    }
                }
            }
        }
        if !self.announced || self.down.is_some() || self.ring == Ring::Asked {
            return;
        }
        self.announced = false;
        let mut space = [0; SPACE];
        match self.client.config(0, &mut space) {
            Ok(()) if self.shape.update(&space) => self.notifier.config_changed(),
            Ok(()) => {}
            Err(e) => self.lost(e),
        }
    }

    /// The guest switched the cache mode. What it asks for from now on is done under the new one.
    pub(super) fn cache_mode_changed(&mut self) {
        let switches = self.driver.as_ref().is_some_and(|d| d.features & F_CONFIG_WCE != 0);
        // In any other state the mode goes with the ring, when that does.
        if switches && self.ring == Ring::Theirs && self.down.is_none() {
            let mode = self.shape.is_write_back();
            self.client.set_write_cache(mode).unwrap_or_else(|e| self.lost(e));
        }
    }

    /// Takes note of a ring that blockd found broken.
    pub(super) fn run(&mut self) {
        if self.broke.drain() && self.driver.is_some() {
            self.stop();
            self.notifier.needs_reset();
        }
    }

    /// Whether blockd has nothing to do with guest memory, and has left nothing undone.
    pub(super) fn is_quiet(&self) -> bool {
        match self.ring {
            Ring::Off => true,
            Ring::Stopped(base) => self.used_index().is_none_or(|used| base == u32::from(used)),
            Ring::Theirs | Ring::Asked => false,
        }
    }

    /// Waits for blockd, but not for long.
    pub(super) fn wait_a_little(&mut self) {
        if self.down.is_some() {
            std::thread::sleep(RETRY.0);
        } else {
            is_readable_in(&self.sources.socket, RETRY.0);
        }
        self.tend();
    }

    /// Requests that blockd has, or has left undone: at most those in the ring, while it has that.
    pub(super) fn in_work(&self) -> usize {
        let used = self.used_index().map(u32::from);
        match self.ring {
            Ring::Off => 0,
            Ring::Stopped(base) if used == Some(base) => 0,
            _ => self.in_ring().into(),
        }
    }

    /// The position of the ring, when blockd does not have it.
    pub(super) fn base(&self) -> Option<u32> {
        match self.ring {
            Ring::Stopped(base) => Some(base),
            _ => None,
        }
    }

    pub(super) fn problem(&self) -> Option<&Error> {
        self.problem.as_ref().filter(|_| self.down.is_some())
    }

    pub(super) fn is_up(&self) -> bool {
        self.down.is_none()
    }

    /// What to sleep on, if connected; else, until when.
    pub(super) fn sleep_on(&self) -> (Option<Arc<Sources>>, Option<Instant>) {
        match self.down {
            None => (Some(self.sources.clone()), None),
            Some(next) => (None, Some(next)),
        }
    }

    /// Rung when [`Direct::run`] has something to do.
    pub(super) fn bell(&self) -> Arc<EventFd> {
        self.broke.clone()
    }

    /// The same disk through an arena, at the place where the ring stands. It takes nothing yet.
    ///
    /// # Errors
    /// When blockd does not serve it so.
    pub(super) fn through_arena(&self) -> Result<Engine> {
        let mut link = Link::connect(&self.path)?;
        link.use_write_back()?;
        let space = link.space()?;
        let mut engine = Engine::new(link, self.shape.clone(), self.notifier.clone());
        if let (Some(setup), Ring::Stopped(base)) = (&self.driver, self.ring) {
            let queue = Queue::new(QueueSetup { base, ..setup.clone() })?;
            engine.start(queue, setup.features);
        }
        if self.shape.update(&space) {
            self.notifier.config_changed();
        }
        Ok(engine)
    }

    /// Has blockd unmap guest memory; says whether the machine stands. The ring is not blockd's.
    pub(super) fn take_memory_back(mut self) -> bool {
        // One that is gone does not map it, and from one that refuses the kernel knows: the memory
        // cannot be sealed then, and no cut is made.
        let _ = self.client.unshare();
        self.paused
    }

    fn used_index(&self) -> Option<u16> {
        self.driver.as_ref().and_then(|d| index_at(d, d.addrs.device.0))
    }

    /// Requests between the last used and the last available entry, as the ring says. The guest
    /// may say anything.
    fn in_ring(&self) -> u16 {
        let Some(driver) = &self.driver else { return 0 };
        let offered = index_at(driver, driver.addrs.driver.0).zip(self.used_index());
        offered.map_or(0, |(offered, used)| offered.wrapping_sub(used).min(driver.size))
    }
}

/// The index of a part of the ring.
fn index_at(driver: &QueueSetup, part: u64) -> Option<u16> {
    let mut index = [0; 2];
    driver.memory.read(GuestAddr(part + 2), &mut index).ok()?;
    Some(u16::from_le_bytes(index))
}

fn sources_of(client: &DirectClient) -> Result<Sources> {
    let (socket, channel) = client.sources()?;
    Ok(Sources { socket, channel: Some(channel) })
}
