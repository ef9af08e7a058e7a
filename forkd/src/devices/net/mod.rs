//! A network card: a virtio network device over a tap interface of the host.
//!
//! One queue in each direction, and one thread, which sleeps until the guest, the host or the
//! machine wants something. A guest is never asked to announce itself in the network: a child has
//! the network address of its parent's configuration until something in it changes that, and would
//! take the parent's place with everyone who listens.

mod engine;
mod link;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use format::{Context, Error, Result};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vhost_blk::event::EventFd;
use vhost_blk::queue::{Queue, QueueSetup};

use super::mmio::{Notifier, VirtioDevice};
use crate::tap::Tap;
pub use engine::NetCounts;
use engine::{
    Engine, F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MAC,
    F_MRG_RXBUF, F_STATUS, QUEUE_SIZE, Wish,
};
use link::Link;
pub use link::{LinkState, LinkWhen};

/// What is offered, whatever the interface: a child's may be another one.
const FEATURES: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_MRG_RXBUF
    | F_STATUS;

/// The network card of a machine.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// What it is connected to, if anything.
    pub tap: Option<Arc<Tap>>,
    /// When the link comes up after the machine became another one.
    pub link: LinkWhen,
}

/// A network card as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetStatus {
    /// How its link is.
    pub link: LinkState,
    /// What passed it since the machine began.
    #[serde(flatten)]
    pub counts: NetCounts,
}

/// What the card's thread, the registers and the machine share.
struct Shared {
    engine: Mutex<Engine>,
    link: Arc<Link>,
    tap: Option<Arc<Tap>>,
    /// Rung by the guest: buffers to receive into, frames to send.
    doorbells: [EventFd; 2],
    /// Rung by whoever wants the thread to look again.
    wake: EventFd,
    /// Whether rings and interface are left alone. A machine that does not run yet is so.
    paused: Arc<AtomicBool>,
    ending: AtomicBool,
    notifier: Arc<Notifier>,
}

/// The machine's end of a network card. Dropping it ends its thread.
pub(super) struct Nic {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Nic {
    /// Starts the thread.
    pub(super) fn new(
        config: &NetConfig,
        doorbells: [EventFd; 2],
        notifier: Arc<Notifier>,
    ) -> Result<Nic> {
        let link = Arc::new(Link::new(config.tap.is_some(), config.link));
        let paused = Arc::new(AtomicBool::new(true));
        let (tap, told) = (config.tap.clone(), notifier.clone());
        let shared = Arc::new(Shared {
            engine: Mutex::new(Engine::new(tap.clone(), link.clone(), paused.clone(), told)),
            link,
            tap,
            doorbells,
            wake: EventFd::new()?,
            paused,
            ending: AtomicBool::new(false),
            notifier,
        });
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name("net".into())
            .spawn(move || for_thread.serve())
            .context("start a thread for", || "the network card".into())?;
        Ok(Nic { shared, thread: Some(thread) })
    }

    /// What the guest sees of it.
    pub(super) fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Net { shared: self.shared.clone(), inherited: false })
    }

    pub(super) fn status(&self) -> NetStatus {
        let counts = self.shared.engine.lock().counts();
        NetStatus { link: self.shared.link.state(), counts }
    }

    /// Gives the card its address.
    pub(super) fn set_mac(&self, mac: [u8; 6]) {
        self.shared.link.set_mac(mac);
    }

    /// What is to be called when the guest has taken its identity.
    pub(super) fn when_identified(&self) -> Box<dyn Fn() + Send> {
        let shared = self.shared.clone();
        Box::new(move || {
            shared.link.identified();
            shared.wake.signal();
        })
    }

    /// Leaves rings and interface alone. Nothing is in work then.
    pub(super) fn pause(&self) {
        // Pairs with the load in `Engine::is_paused`; what is begun ends before the lock is had.
        self.shared.paused.store(true, Ordering::Release);
        self.shared.engine.lock().let_go();
    }

    /// Goes on. A driver that was another machine's is told to look at the link.
    pub(super) fn resume(&self) {
        self.shared.paused.store(false, Ordering::Release); // as in `pause`
        if self.shared.link.is_unseen() {
            self.shared.notifier.config_changed();
        }
        self.shared.wake.signal();
    }
}

impl Drop for Nic {
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
    /// The card's thread.
    fn serve(&self) {
        // Pairs with the store in `drop`.
        while !self.ending.load(Ordering::Acquire) {
            let wish = {
                let mut engine = self.engine.lock();
                engine.run();
                engine.arm()
            };
            if !wish.now {
                self.sleep(wish);
            }
        }
    }

    fn sleep(&self, wish: Wish) {
        let none = (self.wake.as_fd(), PollFlags::empty());
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, wish.frame);
        flags.set(PollFlags::OUT, wish.room);
        // An interface that is not asked for anything is left out: one that is gone would wake.
        let asked = self.tap.as_ref().filter(|_| !flags.is_empty());
        let tap: (BorrowedFd<'_>, PollFlags) = asked.map_or(none, |tap| (tap.as_fd(), flags));
        let bells = [&self.doorbells[0], &self.doorbells[1], &self.wake];
        let [receive, send, wake] = bells.map(|bell| (bell.as_fd(), PollFlags::IN));
        let mut polls =
            [receive, send, wake, tap].map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags));
        // An interrupted call is a wake-up for nothing.
        let _ = poll(&mut polls, None);
        for (bell, _) in bells.iter().zip(&polls).filter(|(_, poll)| !poll.revents().is_empty()) {
            bell.drain();
        }
    }
}

/// The device as its registers see it.
struct Net {
    shared: Arc<Shared>,
    /// Whether the driver that is about to start was another machine's until now.
    inherited: bool,
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        1
    }

    fn queues(&self) -> u16 {
        2
    }

    fn queue_size_max(&self) -> u16 {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if self.shared.link.read(offset, data) {
            self.shared.wake.signal();
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn config_generation(&self) -> u32 {
        self.shared.link.generation()
    }

    fn start(&mut self, features: u64, rings: Vec<QueueSetup>) -> Result<()> {
        let mut queues = rings.into_iter().map(Queue::new);
        let (Some(receive), Some(send)) = (queues.next(), queues.next()) else {
            return Err(Error::invalid("a network card has two queues"));
        };
        let unseen = std::mem::take(&mut self.inherited) && features & F_STATUS != 0;
        self.shared.link.set_unseen(unseen);
        self.shared.engine.lock().start(receive?, send?, features);
        self.shared.wake.signal();
        Ok(())
    }

    fn stop(&mut self) {
        self.inherited = false;
        self.shared.link.set_unseen(false);
        self.shared.engine.lock().stop();
        self.shared.wake.signal();
    }

    fn notify(&mut self, queue: u16) {
        if let Some(bell) = self.shared.doorbells.get(usize::from(queue)) {
            bell.signal();
        }
    }

    fn bases(&self) -> Vec<u32> {
        self.shared.engine.lock().bases()
    }

    /// Address and link are the machine's that it becomes, not that of this one.
    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn restore(&mut self, _state: &serde_json::Value) -> Result<()> {
        self.inherited = true;
        self.shared.link.begin_anew();
        Ok(())
    }
}
